"""A juror at work beside a committee that shows what it is told to: which cases it looks at, and whose seats it burns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import trio

from node.chain.committee import EvmCommittee
from node.juror import LOOK_BACK_MS, JurorAtWork
from node.ports import TxResult
from node.store.ledger import Ledger
from node.store.votes import keep
from protocol.escrow import Case, CommitteeTerms, Dispute, Outcome
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId
from protocol.jury import Sight, Vote

ME, OTHER = Address(b"\1" * 20), Address(b"\2" * 20)
OLD, NEW, BEGUN = (JobId(bytes([n]) * 32) for n in (1, 2, 3))


class Committee:
    """One case that is over, in which two jurors were silent."""

    def __init__(self) -> None:
        self.burnt: list[tuple[Address, int]] = []

    async def terms(self) -> CommitteeTerms:
        return CommitteeTerms(ZERO_ADDRESS, ZERO_ADDRESS, 100, 3, 1, 3600, 3600, 10**6)

    async def begun(self, within_s: int) -> list[JobId]:
        return [NEW, BEGUN]

    async def sight(self, job_id: JobId, juror: Address) -> Sight:
        case = Case(snapshot=1, commit_ends=10, reveal_ends=20, commits=2, seed=Hash32(b"\1" * 32))
        return Sight(job_id, juror, case, 9, 30, 1, 2, 3, {}, Outcome.NONE, Dispute())

    async def silent(self, sight: Sight) -> list[tuple[Address, int]]:
        return [(ME, 0), (OTHER, 4)]

    async def forfeit(self, job_id: JobId, juror: Address, ticket: int) -> TxResult:
        self.burnt.append((juror, ticket))
        return TxResult("juror_forfeit", bytes(32), 1, 1, True)


def at_work(tmp_path: Path, committee: Committee, votes: dict[JobId, int]) -> tuple[Ledger, JurorAtWork]:
    """`votes`: cases, and when they were voted on."""
    now = [0]
    ledger = Ledger.open(tmp_path / "journal" / "owner.sqlite", chain_tag=bytes(ME), clock=lambda: now[0])

    async def write() -> None:
        for job_id, now[0] in votes.items():
            await keep(ledger, Vote(job_id, Outcome.ACCEPT, Hash32(bytes(32)), bytes(32)))

    trio.run(write)
    work = JurorAtWork(cast(EvmCommittee, committee), ledger, ME, lambda: bytes(32), lambda: LOOK_BACK_MS + 1000)
    return ledger, work


async def nothing(*_: Any) -> None: ...


def test_silent_seats_of_others_are_burnt_and_our_own_never_are(tmp_path: Path) -> None:
    committee, said = Committee(), list[str]()
    ledger, work = at_work(tmp_path, committee, {})
    with ledger:
        tended = trio.run(lambda: work.tend(NEW, nothing, forfeit=said.append))
        assert committee.burnt == tended.forfeited == [(OTHER, 4)] and tended.problems == []
        (text,) = said
        assert str(OTHER) in text and "ticket 4" in text
        assert trio.run(lambda: work.tend(NEW, nothing)).forfeited == []


def test_what_was_voted_on_long_ago_is_looked_at_only_when_all_is_asked_for(tmp_path: Path) -> None:
    ledger, work = at_work(tmp_path, Committee(), {OLD: 999, NEW: 1000})
    with ledger:
        assert trio.run(work.cases) == [NEW, BEGUN]
        assert trio.run(lambda: work.cases(everything=True)) == [OLD, NEW, BEGUN]
        assert len(work.votes(OLD)) == 1, "it can still be revealed"
