"""Committee: jurors with tickets, a draw that nobody makes, commit and reveal.

A case's tickets are those at the end of the block in which it began; its seed comes from a later block's randomness.
`block` is the number of the block in which a call happens. Headers stay outside: `seal` is told whether the seed block's
hash can still be read and what randomness the shown header has, None when it is not that block's header.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocol.escrow import vault
from protocol.escrow.state import (
    BURNT,
    Case,
    Escrow,
    Juror,
    Module,
    Outcome,
    Seat,
    SeatState,
    put,
    require,
)
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId, keccak256
from protocol.typed_data import Quote

SEED_DELAY: Final = 128
"""Blocks between the beginning of a case and its seed."""
MAX_TICKETS: Final = 1_000_000
BURN_DIVISOR: Final = 10
"""Part of a ticket's bond that silence after a commitment burns."""
_MAX: Final = 2**256 - 1


def enroll(state: Escrow, block: int, caller: Address, tickets: int) -> Escrow:
    """Buy tickets."""
    require(tickets > 0, "Committee_ZeroAmount")
    juror = state.juror(caller)
    require(juror.tickets + tickets <= MAX_TICKETS, "Committee_TooManyTickets")
    state = _put_juror(state, block, caller, replace(juror, tickets=juror.tickets + tickets))
    return vault.lock(state, Module.COMMITTEE, state.terms.token, caller, tickets * state.terms.seat_bond)


def resign(state: Escrow, now: int, block: int, caller: Address, tickets: int) -> Escrow:
    """Give tickets back; the delay begins anew for all that is leaving."""
    require(tickets > 0, "Committee_ZeroAmount")
    require(tickets <= state.juror(caller).tickets, "Committee_TooFewTickets")
    return _take_out(state, now, block, caller, tickets, tickets * state.terms.seat_bond)


def withdraw_bond(state: Escrow, now: int, caller: Address) -> Escrow:
    juror = state.juror(caller)
    require(juror.leaving > 0, "Committee_NothingFree")
    require(now >= juror.free_at, "Committee_TooEarly")
    state = replace(state, jurors=put(state.jurors, caller, replace(juror, leaving=0)))
    return _release(state, caller, juror.leaving)


def begin(
    state: Escrow, now: int, block: int, job_id: JobId, spec_hash: Hash32, result_hash: Hash32, evidence: Hash32
) -> Escrow:
    """Disputes only."""
    require(state.case(job_id).snapshot == 0, "Committee_Known")
    commit_ends = now + state.terms.commit_window
    case = Case(
        snapshot=block,
        seed_block=block + SEED_DELAY,
        commit_ends=commit_ends,
        reveal_ends=commit_ends + state.terms.reveal_window,
        spec_hash=spec_hash,
        result_hash=result_hash,
        evidence=evidence,
    )
    return _put_case(state, job_id, case)


def seal(state: Escrow, now: int, block: int, job_id: JobId, readable: bool, randomness: bytes | None) -> Escrow:
    """Fix the seed, or name a new block when the old one's hash can no longer be read."""
    case = _known(state, job_id)
    require(not any(case.seed), "Committee_Sealed")
    require(now < case.commit_ends, "Committee_TooLate")
    require(block > case.seed_block, "Committee_TooEarly")
    if not readable:
        return _put_case(state, job_id, replace(case, seed_block=block + SEED_DELAY))
    require(randomness is not None, "Committee_WrongHeader")
    return _put_case(state, job_id, replace(case, seed=Hash32(keccak256((randomness or b"") + job_id))))


def commit(state: Escrow, now: int, caller: Address, job_id: JobId, ticket: int, commitment: Hash32) -> Escrow:
    """Take the seat of one of the caller's tickets."""
    case = _known(state, job_id)
    require(any(case.seed), "Committee_NotSealed")
    require(now < case.commit_ends, "Committee_TooLate")
    require(ticket < tickets_at(state, caller, case.snapshot), "Committee_NoSuchTicket")
    require(_is_drawn(state, case, caller, ticket), "Committee_NoSeat")
    require((job_id, caller, ticket) not in state.seats, "Committee_Committed")
    state = _put_seat(state, job_id, caller, ticket, Seat(commitment, SeatState.COMMITTED))
    return _put_case(state, job_id, replace(case, commits=case.commits + 1))


def reveal(
    state: Escrow,
    now: int,
    caller: Address,
    job_id: JobId,
    ticket: int,
    vote: Outcome,
    result_hash: Hash32,
    salt: Hash32,
) -> Escrow:
    """Open a commitment."""
    case = _known(state, job_id)
    require(now >= case.commit_ends, "Committee_TooEarly")
    require(now < case.reveal_ends, "Committee_TooLate")
    require(vote in (Outcome.ACCEPT, Outcome.REJECT), "Committee_BadVote")
    seat = state.seat(job_id, caller, ticket)
    said = commitment_of(job_id, caller, ticket, vote, result_hash, salt)
    require(seat.state is SeatState.COMMITTED and seat.commitment == said, "Committee_BadReveal")
    if vote is Outcome.ACCEPT:
        state = _put_case(state, job_id, replace(case, accepts=case.accepts + 1))
        return _put_seat(state, job_id, caller, ticket, replace(seat, state=SeatState.ACCEPTED))
    state = _put_case(state, job_id, replace(case, rejects=case.rejects + 1))
    return _put_seat(state, job_id, caller, ticket, replace(seat, state=SeatState.REJECTED))


def forfeit(state: Escrow, now: int, block: int, job_id: JobId, juror: Address, ticket: int) -> Escrow:
    """A seat that committed and kept silent loses its ticket: a tenth is burnt, the rest leaves."""
    case = _known(state, job_id)
    require(now >= case.reveal_ends, "Committee_TooEarly")
    seat = state.seat(job_id, juror, ticket)
    require(seat.state is SeatState.COMMITTED, "Committee_NothingToForfeit")
    state = _put_seat(state, job_id, juror, ticket, replace(seat, state=SeatState.FORFEITED))
    account = state.juror(juror)
    burnt = state.terms.seat_bond // BURN_DIVISOR
    if account.tickets > 0:
        state = _take_out(state, now, block, juror, 1, state.terms.seat_bond - burnt)
    else:
        burnt = min(burnt, account.leaving)
        state = replace(state, jurors=put(state.jurors, juror, replace(account, leaving=account.leaving - burnt)))
    return _release(state, BURNT, burnt)


def claim_fee(state: Escrow, caller: Address, quote: Quote, ticket: int) -> Escrow:
    """Pay the caller's seat its share; what does not divide goes to the last ones, a unit each (I11)."""
    job_id = quote.job_id(state.jobs_domain)
    case = _known(state, job_id)
    dispute = state.dispute(job_id)
    seat = state.seat(job_id, caller, ticket)
    require(wins(seat.state, dispute.outcome) and dispute.fee > 0, "Committee_NoFee")
    winners = {Outcome.ACCEPT: case.accepts, Outcome.REJECT: case.rejects}.get(
        dispute.outcome, case.accepts + case.rejects
    )
    share, rest = divmod(dispute.fee, winners)
    amount = share + (0 if case.paid < winners - rest else 1)
    state = _put_seat(state, job_id, caller, ticket, replace(seat, state=SeatState.PAID))
    state = _put_case(state, job_id, replace(case, paid=case.paid + 1))
    state = vault.lock_bond(state, Module.COMMITTEE, quote.token, state.terms.address, amount)
    return vault.release(state, Module.COMMITTEE, quote.token, caller, amount)


# --------------------------------------------------------------------------------------------------------------- views


def outcome(state: Escrow, now: int, job_id: JobId) -> Outcome:
    """What the committee has found; final once it is not NONE."""
    case = state.case(job_id)
    revealed = case.accepts + case.rejects
    if now < case.commit_ends or (now < case.reveal_ends and revealed < case.commits):
        return Outcome.NONE
    if revealed < state.terms.quorum:
        return Outcome.NONE
    if case.accepts == case.rejects:
        return Outcome.DRAW
    return Outcome.ACCEPT if case.accepts > case.rejects else Outcome.REJECT


def wins(seat: SeatState, ended: Outcome) -> bool:
    """Whether such a seat shares the fee of a dispute that ended so."""
    if ended is Outcome.DRAW:
        return seat in (SeatState.ACCEPTED, SeatState.REJECTED)
    return (seat, ended) in ((SeatState.ACCEPTED, Outcome.ACCEPT), (SeatState.REJECTED, Outcome.REJECT))


def tickets_at(state: Escrow, juror: Address, block: int) -> int:
    """Tickets of `juror` (of all, for the zero address) at the end of `block`."""
    return next((n for since, n in reversed(state.tickets.get(juror, ())) if since <= block), 0)


def has_seat(state: Escrow, job_id: JobId, juror: Address, ticket: int) -> bool:
    case = state.case(job_id)
    return (
        any(case.seed)
        and juror != ZERO_ADDRESS
        and ticket < tickets_at(state, juror, case.snapshot)
        and _is_drawn(state, case, juror, ticket)
    )


def is_drawn(seed: Hash32, juror: Address, ticket: int, total: int, seats: int) -> bool:
    """Whether a ticket has a seat in a case whose snapshot has `total` tickets, when there are `seats` seats on average."""
    if total <= seats:
        return True
    draw = int.from_bytes(keccak256(seed + bytes(12) + juror + ticket.to_bytes(32)))
    return draw < _MAX // total * seats


def commitment_of(
    job_id: JobId, juror: Address, ticket: int, vote: Outcome, result_hash: Hash32, salt: Hash32
) -> Hash32:
    """keccak256(abi.encode(jobId, juror, ticket, vote, resultHash, salt))"""
    words = (job_id, bytes(12) + juror, ticket.to_bytes(32), int(vote).to_bytes(32), result_hash, salt)
    return Hash32(keccak256(b"".join(words)))


# -------------------------------------------------------------------------------------------------------------- pieces


def _known(state: Escrow, job_id: JobId) -> Case:
    case = state.case(job_id)
    require(case.snapshot != 0, "Committee_Unknown")
    return case


def _is_drawn(state: Escrow, case: Case, juror: Address, ticket: int) -> bool:
    total = tickets_at(state, ZERO_ADDRESS, case.snapshot)
    return is_drawn(case.seed, juror, ticket, total, state.terms.seats)


def _take_out(state: Escrow, now: int, block: int, account: Address, tickets: int, bond: int) -> Escrow:
    juror = state.juror(account)
    free_at = now + state.terms.leave_delay
    return _put_juror(state, block, account, Juror(juror.tickets - tickets, juror.leaving + bond, free_at))


def _put_juror(state: Escrow, block: int, account: Address, juror: Juror) -> Escrow:
    """Also keeps how many tickets there are from this block on, of the juror and of all."""
    total = tickets_at(state, ZERO_ADDRESS, block) + juror.tickets - state.juror(account).tickets
    tickets = {
        **state.tickets,
        account: _from_now(state.tickets.get(account, ()), block, juror.tickets),
        ZERO_ADDRESS: _from_now(state.tickets.get(ZERO_ADDRESS, ()), block, total),
    }
    return replace(state, jurors=put(state.jurors, account, juror), tickets=tickets)


def _from_now(history: tuple[tuple[int, int], ...], block: int, tickets: int) -> tuple[tuple[int, int], ...]:
    if history and history[-1][0] == block:
        history = history[:-1]
    return (*history, (block, tickets))


def _put_case(state: Escrow, job_id: JobId, case: Case) -> Escrow:
    return replace(state, cases=put(state.cases, job_id, case))


def _put_seat(state: Escrow, job_id: JobId, juror: Address, ticket: int, seat: Seat) -> Escrow:
    return replace(state, seats=put(state.seats, (job_id, juror, ticket), seat))


def _release(state: Escrow, to: Address, amount: int) -> Escrow:
    return vault.release(state, Module.COMMITTEE, state.terms.token, to, amount)
