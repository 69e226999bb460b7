"""A juror at work: votes are kept before they are spoken, and whatever `protocol.jury` says is due is done, case by case.

Safe to run again at any time: a step follows from what the contracts show and from the journaled votes alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from node.chain.committee import FORFEIT_TIME, EvmCommittee
from node.errors import ChainError, ConfigError, SignerError
from node.ports import TxResult
from node.store import votes as journal
from node.store.ledger import Ledger, wall_clock_ms
from protocol.escrow import Outcome, SeatState
from protocol.ids import Address, Hash32, JobId
from protocol.jury import Due, Sight, Vote, behind, committed, due

ROUNDS: Final = 4
"""Steps that follow on each other in one look: seal, commit; reveal, resolve, claim."""
SLACK_S: Final = 3600
LOOK_BACK_MS: Final = 90 * 24 * 3600 * 1000
"""How long after its vote a case is looked at by itself: by then it has ended, and who looks now and then was paid."""
Announce = Callable[[Sight, Due], Awaitable[None]]
"""Told before each transaction."""


@dataclass(slots=True)
class Tended:
    """What came of one look at one case."""

    sight: Sight
    """After it."""
    done: list[tuple[Due, TxResult]] = field(default_factory=list)
    forfeited: list[tuple[Address, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class JurorAtWork:
    """The juror `account`, with the journal that holds its votes."""

    def __init__(
        self,
        committee: EvmCommittee,
        ledger: Ledger,
        account: Address,
        random32: Callable[[], bytes],
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._committee = committee
        self._ledger = ledger
        self._account = account
        self._random32 = random32
        self._now_ms = now_ms
        self._votes = journal.votes(ledger)

    def votes(self, job_id: JobId) -> list[Vote]:
        return self._votes.get(job_id, [])

    async def vote(self, job_id: JobId, outcome: Outcome, result_hash: Hash32 | None) -> Vote:
        """Decide, durably; nothing is sent. `result_hash`: of our own execution; by default what was submitted for a reject, and
        nothing for an accept. The same vote again changes nothing.

        Raises `ConfigError` when this account can not vote on it, or has committed to another vote.
        """
        sight = await self._committee.sight(job_id, self._account)
        case = sight.case
        if not case.snapshot:
            raise ConfigError(f"the committee has no case {job_id}", hint="gristmill juror show lists its cases")
        if not sight.held:
            raise ConfigError(f"{self._account} had no ticket when case {job_id} began")
        if result_hash is None:
            result_hash = case.result_hash if outcome is Outcome.REJECT else Hash32(bytes(32))
        last = self.votes(job_id)[-1:]
        if last and (last[0].outcome, last[0].result_hash) == (outcome, result_hash):
            return last[0]
        if sight.now >= case.commit_ends:
            raise ConfigError(f"seats of case {job_id} could commit until {case.commit_ends} (chain seconds)")
        if any(case.seed) and not sight.mine:
            raise ConfigError(f"none of the {sight.held} tickets of {self._account} is drawn for case {job_id}")
        if any(seat.state is not SeatState.NONE for seat in sight.mine.values()):
            raise ConfigError(
                f"a seat of case {job_id} has committed to another vote, which is final", hint="gristmill juror tend"
            )
        vote = Vote(job_id, outcome, result_hash, self._random32())
        await journal.keep(self._ledger, vote)
        self._votes.setdefault(job_id, []).append(vote)
        return vote

    async def cases(self, *, forfeit: bool = False, everything: bool = False) -> list[JobId]:
        """Those that something may be due in: what was voted on here and what began lately. `everything`: also what was voted on
        longer ago than `LOOK_BACK_MS`, where a fee may be left, for fees do not lapse."""
        terms = await self._committee.terms()
        within = terms.commit_window + terms.reveal_window + SLACK_S + (FORFEIT_TIME if forfeit else 0)
        voted = journal.voted_since(self._ledger, 0 if everything else self._now_ms() - LOOK_BACK_MS)
        return list(dict.fromkeys([*voted, *await self._committee.begun(within)]))

    async def tend(self, job_id: JobId, announce: Announce, *, forfeit: Callable[[str], None] | None = None) -> Tended:
        """Do what is due in one case. What fails is told in the answer, and the rest is done all the same. `forfeit`: burn what
        silent seats of others have lost as well, and say so there before.

        Raises `ChainError` when the case can not be looked at, `LedgerError`.
        """
        votes = self.votes(job_id)
        tended = Tended(await self._committee.sight(job_id, self._account))
        for _ in range(ROUNDS):
            todo = due(tended.sight, votes)
            for one in todo:
                try:
                    await announce(tended.sight, one)
                    result = await self._committee.do(tended.sight, one)
                    if result.ok:
                        tended.done.append((one, result))
                    else:
                        tended.problems.append(f"{one.duty.value} of ticket {one.ticket}: {result.error}")
                except (ChainError, SignerError) as error:
                    tended.problems.append(f"{one.duty.value} of ticket {one.ticket}: {error}")
            if not todo:
                break
            tended.sight = await self._committee.sight(job_id, self._account)
            if tended.problems:
                break
        if tended.sight.now < tended.sight.case.reveal_ends:
            tended.problems += [
                f"the vote that ticket {ticket} has committed to is not in this journal: without it the ticket is forfeited"
                for ticket in committed(tended.sight)
                if behind(tended.sight, ticket, votes) is None
            ]
        if forfeit is not None:
            await self._forfeit(tended, forfeit)
        return tended

    async def _forfeit(self, tended: Tended, say: Callable[[str], None]) -> None:
        for juror, ticket in await self._committee.silent(tended.sight):
            if juror == self._account:  # a tenth of our own bond: nobody but others gains by that
                continue
            try:
                say(f"case {tended.sight.job_id}: ticket {ticket} of {juror} was silent: a tenth of its bond is burnt")
                (await self._committee.forfeit(tended.sight.job_id, juror, ticket)).sound()
                tended.forfeited.append((juror, ticket))
            except (ChainError, SignerError) as error:
                tended.problems.append(f"forfeiting ticket {ticket} of {juror}: {error}")
