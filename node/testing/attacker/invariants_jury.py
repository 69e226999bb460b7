"""What must hold of the Committee: tickets and their bonds, cases, seats. The draw is made here a second time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.testing.attacker.reads import Words
from node.testing.attacker.seen import Seen
from protocol.escrow import BURNT, Outcome, SeatState
from protocol.escrow.committee import BURN_DIVISOR, SEED_DELAY
from protocol.ids import Address, JobId, keccak256

if TYPE_CHECKING:
    from node.testing.attacker.judge import Judge

SEAT_MOVES = {
    (SeatState.NONE, SeatState.COMMITTED): {"Committee.commit"},
    (SeatState.COMMITTED, SeatState.ACCEPTED): {"Committee.reveal"},
    (SeatState.COMMITTED, SeatState.REJECTED): {"Committee.reveal"},
    (SeatState.COMMITTED, SeatState.FORFEITED): {"Committee.forfeit"},
    (SeatState.ACCEPTED, SeatState.PAID): {"Committee.claimFee"},
    (SeatState.REJECTED, SeatState.PAID): {"Committee.claimFee"},
}
COUNTED = (SeatState.COMMITTED, SeatState.ACCEPTED, SeatState.REJECTED, SeatState.PAID)
"""What a case counts, in its order."""


def juror(judge: Judge, seen: Seen, key: Address, before: Words, now: Words) -> None:
    require, bond = judge.require, judge.state.terms.seat_bond
    was, total = before[0] * bond + before[1], now[0] * bond + now[1]
    judge.tickets.setdefault(key, []).append((judge.block, now[0]))
    if now[0] < before[0]:
        judge.seen["left", key] = judge.now
        freed = judge.now + judge.state.terms.leave_delay
        require(now[2] == freed, "I8: tickets leave at another time than they should")
    else:
        require(now[2] == before[2], "I8: the time of what leaves changed")
    if seen.call == "Committee.withdrawBond":
        late = judge.now >= judge.when("left", key) + judge.state.terms.leave_delay
        require(seen.sender == key and late, "I8: a bond left before its delay")
        require(now[:2] == (before[0], 0), "I8: tickets left with the bond")
    elif seen.call == "Committee.forfeit":
        burnt = bond // BURN_DIVISOR if before[0] else min(bond // BURN_DIVISOR, before[1])
        require(was - total == burnt and now[0] == max(before[0] - 1, 0), "I7: a forfeit is not a tenth of a ticket")
        require(seen.gains(judge.tokens[0]) == ({BURNT: burnt} if burnt else {}), "I7: a forfeit paid out")
    else:
        require(total >= was and seen.sender == key, f"I10: {seen.call} took from a juror")
        change = {"Committee.enroll": 1, "Committee.resign": -1}.get(seen.call, 0)
        made = now[0] - before[0] == change * seen.args[0] if change else False
        require(made, f"I1: {seen.call} made or lost tickets")
        require(seen.call != "Committee.resign" or total == was, "I8: resigning changed the bond")


def case(judge: Judge, seen: Seen, key: JobId, before: Words, now: Words) -> None:
    require, terms = judge.require, judge.state.terms
    if not before[0]:
        require(seen.call == "Disputes.open", "I6: a case began without a dispute")
        commit_ends = judge.now + terms.commit_window
        times = (judge.block, judge.block + SEED_DELAY, commit_ends, commit_ends + terms.reveal_window)
        require(now[:9] == (*times, 0, 0, 0, 0, 0), "I5: a case begins with other times than it should")
        return
    require(before[0] == now[0] and before[2:4] == now[2:4], "I6: a case changed its snapshot or its times")
    require(before[9:] == now[9:], "I6: a case changed its subject")
    if before[1] != now[1] or before[8] != now[8]:
        fits = seen.call == "Committee.seal" and before[8] == 0 and before[1] < judge.block and judge.now < now[2]
        require(fits, "I6: a seed changed, or came at another time")
        require(now[1] in (before[1], judge.block + SEED_DELAY), "I5: a seed of another block")
    moved = [(SeatState(b[1]), SeatState(n[1])) for k, b, n in seen.of("seat") if k[0] == key]
    for count, state in zip(range(4, 8), COUNTED, strict=True):
        more = sum(move[1] is state for move in moved)
        require(now[count] - before[count] == more, f"I3: a case counts other seats than there are: {state.name}")


def seat(judge: Judge, seen: Seen, key: tuple[JobId, Address, int], before: Words, now: Words) -> None:
    require = judge.require
    move = (SeatState(before[1]), SeatState(now[1]))
    require(seen.call in SEAT_MOVES.get(move, ()), f"I6: {seen.call} moved a seat {move[0].name} -> {move[1].name}")
    found = judge.numbers.values["case", key[0]]
    if move[1] is SeatState.COMMITTED:
        require(seen.sender == key[1], "I4: somebody else took a seat")
        require(judge.now < found[2] and found[8] != 0, "I5: a seat was taken too late, or before the seed")
        require(_drawn(judge, found, *key[1:]), "I3: a seat for a ticket that was not drawn, or was not there")
        return
    require(now[0] == before[0], "I3: a seat changed its commitment")
    if seen.call == "Committee.reveal":
        require(found[2] <= judge.now < found[3], "I5: a vote was opened outside its window")
        _, ticket, vote, result, salt = seen.args
        words = (key[0], bytes(12) + key[1], ticket.to_bytes(32), int(vote).to_bytes(32), result, salt)
        said = int.from_bytes(keccak256(b"".join(words)))
        require(seen.sender == key[1] and said == before[0], "I4: a vote that was not committed")
        counted = {Outcome.ACCEPT: SeatState.ACCEPTED, Outcome.REJECT: SeatState.REJECTED}
        require(counted.get(vote) is move[1], "I3: a vote counts for the other side")
    elif seen.call == "Committee.forfeit":
        require(judge.now >= found[3], "I5: a ticket was forfeited while it could still speak")
    else:
        quote = judge.quotes[key[0]]
        dispute = judge.numbers.values["dispute", key[0]]
        voted = 1 if move[0] is SeatState.ACCEPTED else 2
        require(bool(dispute[2]) and dispute[3] in (voted, 3), "I3: a fee for the losing side, or before the end")
        fee, winners = dispute[4], {1: found[5], 2: found[6]}.get(dispute[3], found[5] + found[6])
        gain = seen.gains(quote.token)[seen.sender]
        require(fee // winners <= gain <= -(-fee // winners), "I11: a share of a fee is off by more than a unit")


def _at(judge: Judge, juror: Address, block: int) -> int:
    """Tickets at the end of a block, by our own notes."""
    return next((n for since, n in reversed(judge.tickets.get(juror, [])) if since <= block), 0)


def _drawn(judge: Judge, found: Words, juror: Address, ticket: int) -> bool:
    total = sum(_at(judge, one, found[0]) for one in judge.tickets)
    if ticket >= _at(judge, juror, found[0]):
        return False
    draw = int.from_bytes(keccak256(found[8].to_bytes(32) + bytes(12) + juror + ticket.to_bytes(32)))
    seats = judge.state.terms.seats
    return total <= seats or draw < (2**256 - 1) // total * seats
