"""What `juror` says of a juror and of a case: as data, and in words with amounts in the token's unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from node.cli.staking import days, moment
from protocol.escrow import Outcome
from protocol.jury import Due, Duty, Sight, Vote

if TYPE_CHECKING:
    from node.ports import TokenInfo
    from protocol.escrow import CommitteeTerms, Juror
    from protocol.ids import Address


def juror_data(account: Address, mine: Juror, terms: CommitteeTerms, info: TokenInfo, free: int) -> dict[str, Any]:
    return {
        "juror": str(account),
        "tickets": mine.tickets,
        "seat_bond": str(terms.seat_bond),
        "bond": str(mine.tickets * terms.seat_bond),
        "leaving": str(mine.leaving),
        "free_at": mine.free_at,
        "vault_balance": str(free),
        "token": str(info.address),
        "symbol": info.symbol,
        "decimals": info.decimals,
    }


def juror_text(mine: Juror, terms: CommitteeTerms, info: TokenInfo, free: int, now: int) -> str:
    lines = [
        f"tickets  {mine.tickets}, {info.show(mine.tickets * terms.seat_bond)} of bond "
        f"(back {days(terms.leave_delay)} after `juror resign`)",
        f"vault    {info.show(free)} free",
    ]
    if mine.leaving:
        ready = "now" if now >= mine.free_at else f"from {moment(mine.free_at)}"
        lines.append(f"leaving  {info.show(mine.leaving)}, to be taken {ready} by `juror withdraw`")
    return "\n".join(lines)


def case_data(sight: Sight, votes: Sequence[Vote]) -> dict[str, Any]:
    case = sight.case
    return {
        "job": sight.job_id,
        "phase": phase(sight),
        "seed_block": case.seed_block,
        "commit_ends": case.commit_ends,
        "reveal_ends": case.reveal_ends,
        "spec_hash": case.spec_hash,
        "result_hash": case.result_hash,
        "evidence": case.evidence,
        "commits": case.commits,
        "accepts": case.accepts,
        "rejects": case.rejects,
        "found": sight.found,
        "fee": str(sight.dispute.fee),
        "tickets": sight.held,
        "seats": [{"ticket": ticket, "state": seat.state} for ticket, seat in sight.mine.items()],
        "vote": votes[-1].outcome if votes else None,
        "vote_result": votes[-1].result_hash if votes else None,
    }


def phase(sight: Sight) -> str:
    """One word for where a case stands."""
    case = sight.case
    if not case.snapshot:
        return "unknown"
    if sight.dispute.ended:
        return "ended"
    if sight.now < case.commit_ends:
        return "commit" if any(case.seed) else "seed"
    return "reveal" if sight.now < case.reveal_ends and sight.found is Outcome.NONE else "decided"


def case_text(sight: Sight, votes: Sequence[Vote]) -> str:
    case, name = sight.case, phase(sight)
    if name == "unknown":
        return f"case {sight.job_id}: the committee does not have it"
    if name == "seed":
        stands = f"waits for its seed, block {case.seed_block} (now {sight.block}); seats commit until {moment(case.commit_ends)}"
    elif name == "commit":
        stands = f"seats commit until {moment(case.commit_ends)}, {case.commits} have"
    elif name == "reveal":
        stands = f"seats reveal until {moment(case.reveal_ends)}, {case.accepts + case.rejects} of {case.commits} have"
    else:
        said = "nothing" if sight.found is Outcome.NONE else sight.found.name.lower()
        stands = f"the committee has found {said} ({case.accepts} accept, {case.rejects} reject)"
        stands += ", and the dispute has ended so" if name == "ended" else ""
    mine = ", ".join(f"{ticket} {seat.state.name.lower()}" for ticket, seat in sight.mine.items())
    lines = [
        f"case {sight.job_id}: {stands}",
        f"  result {case.result_hash} of specification {case.spec_hash}",
        f"  seats  {mine.replace(' none', ' free') or _why_none(sight)}",
    ]
    lines.append(
        f"  vote   {votes[-1].outcome.name.lower()}, result {votes[-1].result_hash}" if votes else "  vote   none here"
    )
    return "\n".join(lines)


def _why_none(sight: Sight) -> str:
    if not sight.held:
        return "none: there was no ticket when the case began"
    return "none of the tickets is drawn" if any(sight.case.seed) else f"not drawn yet, of {sight.held} tickets"


def will_do(sight: Sight, due: Due, bond: str) -> str:
    """Said before the transaction. `bond`: of one ticket, in the token's unit."""
    about, case = f"case {sight.job_id}", sight.case
    match due.duty:
        case Duty.SEAL:
            return f"{about}: fixing the seed by the header of block {case.seed_block}; this draws the seats"
        case Duty.COMMIT:
            return (
                f"{about}: ticket {due.ticket} takes its seat with a sealed vote. It must be revealed between "
                f"{moment(case.commit_ends)} and {moment(case.reveal_ends)}, or a tenth of its bond of {bond} is burnt"
            )
        case Duty.REVEAL:
            said = due.vote.outcome.name.lower() if due.vote else "nothing"
            return f"{about}: ticket {due.ticket} reveals {said}; its bond of {bond} is safe then"
        case Duty.RESOLVE:
            return f"{about}: ending the dispute as {sight.found.name.lower()}; the fee goes to the committee"
        case _:
            return f"{about}: ticket {due.ticket} takes its share of the fee into the vault balance of {sight.juror}"
