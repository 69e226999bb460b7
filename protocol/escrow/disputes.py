"""Disputes: two receipts with one number convict a key; a resolver's word ends a challenge.

A resolver is a stranger's contract. What it says is the caller's to find out (`said`), but when it is the Committee of
the state's terms, which is part of the model: `resolver_says` tells.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocol.escrow import committee, jobs, vault, workers
from protocol.escrow.state import PPM, Dispute, Escrow, EscrowError, Module, Outcome, put, require
from protocol.ids import UINT128_MAX, ZERO_ADDRESS, Address, Hash32, JobId
from protocol.typed_data import ChannelConfig, Quote, Receipt

BOND_PPM: Final = 100_000
RESOLVE_WINDOW: Final = 14 * 24 * 3600


def bond_for(quote: Quote) -> int:
    """What a challenge of `quote` costs to open: a tenth of the amount, rounded up."""
    return max(-(-quote.amount * BOND_PPM // PPM), 1)


def most_beside_bond(balance: int) -> int:
    """The highest amount of a quote that `balance` holds together with the bond of its challenge."""
    return max(0, min(balance * PPM // (PPM + BOND_PPM), balance - 1))


def prove_equivocation(
    state: Escrow,
    now: int,
    caller: Address,
    config: ChannelConfig,
    first: Receipt,
    first_signer: Address | None,
    second: Receipt,
    second_signer: Address | None,
) -> Escrow:
    """Convict the receiver of `config` by two receipts of its own key; slash up to the cap for the payer, once per token."""
    channel_id = config.channel_id(state.domain)
    require(
        first.channel_id == second.channel_id == channel_id and first.sequence == second.sequence and first != second,
        "Disputes_NoEquivocation",
    )
    require(first_signer == config.receiver, "Disputes_BadSignature")
    require(second_signer == config.receiver, "Disputes_BadSignature")
    require((config.receiver, config.token) not in state.proven, "Disputes_ConvictedBefore")
    state, _ = workers.convict(state, config.receiver)
    state = replace(state, proven=state.proven | {(config.receiver, config.token)})
    cause = Hash32(second.digest(state.domain))
    return workers.book_slash(state, now, config.receiver, config.token, UINT128_MAX, config.payer, caller, cause)


def open_dispute(state: Escrow, now: int, block: int, caller: Address, quote: Quote, evidence: Hash32) -> Escrow:
    """Disputes.open: the client locks the bond and stops the window. Whether the resolver took it changes nothing here."""
    job_id = quote.job_id(state.jobs_domain)
    require(caller == quote.client, "Disputes_NotClient")
    require(quote.resolver != ZERO_ADDRESS, "Disputes_NoResolver")
    state = jobs.dispute(state, now, quote)
    bond = bond_for(quote)
    state = replace(state, disputes=put(state.disputes, job_id, Dispute(bond, now + RESOLVE_WINDOW)))
    state = vault.lock_bond(state, Module.DISPUTES, quote.token, quote.client, bond)
    if quote.resolver == state.terms.address:
        try:
            return committee.begin(state, now, block, job_id, quote.spec_hash, state.job(job_id).result_hash, evidence)
        except EscrowError:
            return state
    return state


def resolver_says(state: Escrow, now: int, quote: Quote) -> Outcome:
    """What the Committee has found, when it is the quote's resolver; else nothing."""
    if quote.resolver == state.terms.address:
        return committee.outcome(state, now, quote.job_id(state.jobs_domain))
    return Outcome.NONE


def resolve_dispute(state: Escrow, now: int, quote: Quote, said: Outcome) -> Escrow:
    """Disputes.resolve: end the dispute by what the resolver `said`, or as a draw from `resolve_by` on."""
    job_id = quote.job_id(state.jobs_domain)
    dispute = state.dispute(job_id)
    require(dispute.resolve_by != 0, "Disputes_NoDispute")
    require(not dispute.ended, "Disputes_Ended")
    require(said is not Outcome.NONE or now >= dispute.resolve_by, "Disputes_Undecided")
    fee = 0 if said is Outcome.NONE else dispute.bond // 2
    ended = replace(dispute, bond=0, ended=True, outcome=said, fee=fee)
    state = replace(state, disputes=put(state.disputes, job_id, ended))
    claimed = state.job(job_id).claimed
    to_worker = {Outcome.ACCEPT: 0, Outcome.REJECT: claimed}.get(said, claimed // 2)
    state = jobs.resolve_job(state, now, quote, to_worker, said is Outcome.ACCEPT)
    state = _release(state, quote.token, quote.resolver, fee)
    winner = state.payout_of(quote.worker) if said is Outcome.REJECT else quote.client
    return _release(state, quote.token, winner, dispute.bond - fee)


def fee_of(state: Escrow, job_id: JobId) -> tuple[Outcome, int]:
    """How a dispute ended and what its resolver got."""
    dispute = state.dispute(job_id)
    return dispute.outcome, dispute.fee


def _release(state: Escrow, token: Address, to: Address, amount: int) -> Escrow:
    return vault.release(state, Module.DISPUTES, token, to, amount)
