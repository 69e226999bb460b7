"""Attacks on the Committee: jurors who come late, vote at random, say nothing, or claim what is not theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.testing.attacker.crowd import CROWD, JURORS, MALLORY, Dice
from node.testing.attacker.work import RESULTS
from node.testing.contracts import quote_tuple
from protocol import escrow
from protocol.escrow import Outcome, SeatState
from protocol.escrow.committee import MAX_TICKETS, tickets_at
from protocol.ids import Address, Hash32, JobId, keccak256

if TYPE_CHECKING:
    from node.testing.attacker.attacker import Attacker


def enroll(a: Attacker, dice: Dice) -> None:
    who = dice.choice((*JURORS, *JURORS, MALLORY))
    tickets = dice.choice((0, 1, 1, 2, MAX_TICKETS, 10_000))
    model = lambda s: escrow.enroll(s, a.block, who, tickets)  # noqa: E731
    a.step(who, "Committee.enroll", (tickets,), model, consent={who})


def enroll_plainly(a: Attacker, who: Address, tickets: int) -> None:
    """As the honest do."""
    model = lambda s: escrow.enroll(s, a.block, who, tickets)  # noqa: E731
    a.step(who, "Committee.enroll", (tickets,), model, consent={who})


def resign(a: Attacker, dice: Dice) -> None:
    who = dice.choice((*JURORS, MALLORY))
    held = a.state.juror(who).tickets
    tickets = dice.choice((0, 1, 1, 1, held, held + 1))
    model = lambda s: escrow.resign(s, a.now, a.block, who, tickets)  # noqa: E731
    a.step(who, "Committee.resign", (tickets,), model)


def withdraw_bond(a: Attacker, dice: Dice) -> None:
    who = dice.choice((*JURORS, MALLORY))
    leaving = [j for j, juror in a.state.jurors.items() if juror.leaving]
    if leaving and dice.randint(0, 1):
        who = dice.choice(leaving)
        if dice.randint(0, 4) == 0:
            a.maybe_wait(dice, a.state.juror(who).free_at)
    a.step(who, "Committee.withdrawBond", (), lambda s: escrow.withdraw_bond(s, a.now, who))


def case(a: Attacker, dice: Dice, *, sealed: bool) -> JobId:
    """Mostly one that still takes a seed, or seats."""
    fitting = [j for j, c in a.state.cases.items() if any(c.seed) == sealed and a.now < c.commit_ends]
    if fitting and dice.randint(0, 14):
        return dice.choice(fitting)
    if a.state.cases and dice.randint(0, 2):
        return dice.choice(list(a.state.cases))
    return dice.choice(list(a.quotes)) if a.quotes else JobId(bytes(32))


def seal(a: Attacker, dice: Dice) -> None:
    job_id = case(a, dice, sealed=False)
    found = a.state.case(job_id)
    past = a.block - found.seed_block
    if found.seed_block and not any(found.seed) and past <= 256 and dice.randint(0, 3):
        a.wait_until(a.now + 257 - past)
    readable, header, randomness = a.header(dice, found.seed_block)
    model = lambda s: escrow.seal(s, a.now, a.block, job_id, readable, randomness)  # noqa: E731
    a.step(dice.choice(CROWD), "Committee.seal", (job_id, header), model, once=True)


def ticket(a: Attacker, dice: Dice, job_id: JobId) -> tuple[Address, int]:
    """Mostly one that has a seat."""
    who = dice.choice((*JURORS, MALLORY))
    held = tickets_at(a.state, who, a.state.case(job_id).snapshot)
    seats = [n for n in range(min(held, 8)) if escrow.has_seat(a.state, job_id, who, n)]
    if seats and dice.randint(0, 5):
        return who, dice.choice(seats)
    return who, dice.choice((0, 1, max(held - 1, 0), held, 2**32 - 1))


def commit(a: Attacker, dice: Dice) -> None:
    job_id = case(a, dice, sealed=True)
    who, number = ticket(a, dice, job_id)
    vote, salt = dice.choice((Outcome.ACCEPT, Outcome.REJECT)), Hash32(keccak256(b"%d" % dice.randint(0, 9)))
    commitment = escrow.commitment_of(job_id, who, number, vote, RESULTS[0], salt)
    a.votes[job_id, who, number] = vote, salt
    model = lambda s: escrow.commit(s, a.now, who, job_id, number, commitment)  # noqa: E731
    a.step(who, "Committee.commit", (job_id, number, commitment), model)


def _committed(a: Attacker, dice: Dice, *states: SeatState) -> tuple[JobId, Address, int]:
    found = [k for k, seat in a.state.seats.items() if seat.state in states]
    if found and dice.randint(0, 7):
        return dice.choice(found)
    job_id = case(a, dice, sealed=True)
    return job_id, *ticket(a, dice, job_id)


def reveal(a: Attacker, dice: Dice) -> None:
    job_id, who, number = _committed(a, dice, SeatState.COMMITTED)
    a.maybe_wait(dice, a.state.case(job_id).commit_ends)
    vote, salt = a.votes.get((job_id, who, number), (Outcome.ACCEPT, RESULTS[0]))
    result = RESULTS[0]
    if dice.randint(0, 5) == 0:
        vote = dice.choice(list(Outcome))
        result = dice.choice(RESULTS)
    model = lambda s: escrow.reveal(s, a.now, who, job_id, number, vote, result, salt)  # noqa: E731
    a.step(who, "Committee.reveal", (job_id, number, vote, result, salt), model)


def forfeit(a: Attacker, dice: Dice) -> None:
    job_id, who, number = _committed(a, dice, SeatState.COMMITTED)
    if dice.randint(0, 2) == 0:
        a.maybe_wait(dice, a.state.case(job_id).reveal_ends)
    model = lambda s: escrow.forfeit(s, a.now, a.block, job_id, who, number)  # noqa: E731
    a.step(dice.choice(CROWD), "Committee.forfeit", (job_id, who, number), model)


def claim_fee(a: Attacker, dice: Dice) -> None:
    job_id, who, number = _committed(a, dice, SeatState.ACCEPTED, SeatState.REJECTED)
    quote = a.quotes.get(job_id)
    if quote is None:
        return
    model = lambda s: escrow.claim_fee(s, who, quote, number)  # noqa: E731
    a.step(who, "Committee.claimFee", (quote_tuple(quote), number), model, consent={a.world.committee.address})
