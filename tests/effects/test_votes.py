"""A juror's votes in its journal: durable before they are spoken, found again in their order, refused when damaged. Y3."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from node.store.errors import LedgerDamaged
from node.store.ledger import Entry, Ledger
from node.store.votes import VOTED, keep, votes
from protocol.escrow import Outcome
from protocol.ids import Hash32, JobId
from protocol.jury import Vote

ONE, TWO = JobId(b"\1" * 32), JobId(b"\2" * 32)
TAG = b"\7" * 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "journal.sqlite"


def vote(job: JobId, outcome: Outcome, fill: int) -> Vote:
    return Vote(job, outcome, Hash32(bytes([fill]) * 32), bytes([fill + 1]) * 32)


def test_votes_are_found_again_after_a_restart_oldest_first(path: Path) -> None:
    first, other, second = vote(ONE, Outcome.ACCEPT, 3), vote(TWO, Outcome.REJECT, 5), vote(ONE, Outcome.REJECT, 9)

    async def write() -> None:
        with Ledger.open(path, chain_tag=TAG) as ledger:
            assert votes(ledger) == {}
            for one in (first, other, second):
                await keep(ledger, one)
            await ledger.append([Entry("something else", b"", {})])

    trio.run(write)
    for read_only in (True, False):
        with Ledger.open(path, chain_tag=TAG, read_only=read_only) as ledger:
            assert votes(ledger) == {ONE: [first, second], TWO: [other]}


@pytest.mark.parametrize(
    ("subject", "body"),
    [
        (b"\1" * 31, {"vote": 1, "result_hash": b"\2" * 32, "secret": b"\3" * 32}),
        (bytes(ONE), {"vote": 9, "result_hash": b"\2" * 32, "secret": b"\3" * 32}),
        (bytes(ONE), {"vote": 3, "result_hash": b"\2" * 32, "secret": b"\3" * 32}),
        (bytes(ONE), {"vote": 1, "result_hash": b"\2" * 32, "secret": b"\3"}),
        (bytes(ONE), {"vote": 1, "result_hash": b"\2", "secret": b"\3" * 32}),
        (bytes(ONE), {"vote": 1}),
    ],
)
def test_a_record_that_is_no_vote_stops_the_juror(path: Path, subject: bytes, body: dict[str, object]) -> None:
    with Ledger.open(path, chain_tag=TAG) as ledger:
        ledger.append_sync([Entry(VOTED, subject, body)])
        with pytest.raises(LedgerDamaged, match="no vote"):
            votes(ledger)
