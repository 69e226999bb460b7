"""What a juror does about one case, and when: pure, so that it can be walked through against the model of the contracts.

Rules
- *One vote.* A juror votes with all its seats alike: it ran the job once.
- *Journal, then speak* (J1, Y3). A vote, the hash of the juror's own result and the secret behind its salts are durable before
  the first commitment leaves. Who has lost them can not reveal, and a seat that does not reveal loses a tenth of its bond.
- *The secret is random* (Y4). Each ticket's salt is a hash of it and of the ticket, so nothing that is revealed helps to guess
  another, and until then nobody can find a vote by trying both.
- A step follows from what the chain shows and from the vote alone; so it is safe to look again at any time, and after a crash.
- What pays nobody is not done by itself: sealing is for who has tickets, resolving for who gains the fee by it, forfeiting for
  who asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.errors import LocalProtocolError
from protocol.escrow import Case, Dispute, Outcome, Seat, SeatState, commitment_of, wins
from protocol.escrow.committee import is_drawn
from protocol.ids import Address, Hash32, JobId, keccak256

VOTES: Final = (Outcome.ACCEPT, Outcome.REJECT)
"""What can be voted; a draw is as many of one as of the other."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What a juror has found about one case, and the secret with which it says so."""

    job_id: JobId
    outcome: Outcome
    result_hash: Hash32
    """Of what the juror's own execution gave; for everybody to compare."""
    secret: bytes
    """32 random bytes."""

    def __post_init__(self) -> None:
        if self.outcome not in VOTES:
            raise LocalProtocolError("a vote is accept or reject")
        if len(self.secret) != 32:
            raise LocalProtocolError("a vote's secret has 32 bytes")

    def salt(self, ticket: int) -> Hash32:
        return Hash32(keccak256(b"gristmill seat" + self.secret + ticket.to_bytes(32)))

    def commitment(self, juror: Address, ticket: int) -> Hash32:
        return commitment_of(self.job_id, juror, ticket, self.outcome, self.result_hash, self.salt(ticket))


class Duty(StrEnum):
    SEAL = "seal"
    """Fix the seed by its block's header, or have a new block named."""
    COMMIT = "commit"
    REVEAL = "reveal"
    RESOLVE = "resolve"
    """End the dispute by what the committee has found."""
    CLAIM = "claim"
    """Take a seat's share of the fee."""


@dataclass(frozen=True, slots=True)
class Due:
    duty: Duty
    ticket: int = 0
    vote: Vote | None = None
    """What to commit to or to reveal."""


@dataclass(frozen=True, slots=True)
class Sight:
    """One case as the contracts have it at one block, for one juror."""

    job_id: JobId
    juror: Address
    case: Case
    block: int
    """Number of the last block."""
    now: int
    """Its time, chain seconds."""
    held: int
    """Tickets that the juror had at the snapshot."""
    total: int
    """Tickets that all had."""
    seats: int
    """Of a case, on average."""
    mine: Mapping[int, Seat]
    """By ticket, for those that are drawn."""
    found: Outcome
    """What the committee has found by now."""
    dispute: Dispute


def drawn(seed: Hash32, juror: Address, held: int, total: int, seats: int) -> list[int]:
    """The juror's tickets that have a seat; none before the seed is known."""
    if not any(seed):
        return []
    return [ticket for ticket in range(held) if is_drawn(seed, juror, ticket, total, seats)]


def due(sight: Sight, votes: Iterable[Vote]) -> list[Due]:
    """What to send now. `votes`: all of this case that were ever journaled here, oldest first; the last one counts."""
    case, votes = sight.case, list(votes)
    if not case.snapshot:
        return []
    if not any(case.seed):
        # The transaction comes into a later block than the last one, as the contract wants.
        waits = sight.held and sight.now < case.commit_ends and sight.block >= case.seed_block
        return [Due(Duty.SEAL)] if waits else []
    if sight.now < case.commit_ends:
        free = [ticket for ticket, seat in sight.mine.items() if seat.state is SeatState.NONE] if votes else []
        return [Due(Duty.COMMIT, ticket, votes[-1]) for ticket in free]
    steps = []
    if sight.now < case.reveal_ends:
        for ticket in committed(sight):
            vote = behind(sight, ticket, votes)
            if vote is not None:
                steps.append(Due(Duty.REVEAL, ticket, vote))
    if steps:
        return steps
    if not sight.dispute.ended:
        gains = any(wins(seat.state, sight.found) for seat in sight.mine.values())
        known = sight.found is not Outcome.NONE and sight.dispute.resolve_by
        return [Due(Duty.RESOLVE)] if known and gains else []
    if not sight.dispute.fee:
        return []
    return [Due(Duty.CLAIM, n) for n, seat in sight.mine.items() if wins(seat.state, sight.dispute.outcome)]


def committed(sight: Sight) -> list[int]:
    """Tickets that have committed and not revealed."""
    return [ticket for ticket, seat in sight.mine.items() if seat.state is SeatState.COMMITTED]


def behind(sight: Sight, ticket: int, votes: Iterable[Vote]) -> Vote | None:
    """The vote that this ticket has committed to; None when it is none of ours."""
    said = sight.mine[ticket].commitment
    return next((vote for vote in votes if vote.commitment(sight.juror, ticket) == said), None)
