"""The Jobs and Disputes contracts, for one account: `node.ports.Jobs` over an `EvmChain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from node.chain.artifacts import contract
from node.chain.stakes import Stakes
from node.errors import ChainError
from node.ports import DisputeOnChain, JobOnChain, TxResult
from protocol.batch import QUOTE_LIFE
from protocol.escrow import JobState, Outcome
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId
from protocol.typed_data import Domain, Quote

if TYPE_CHECKING:
    from node.chain.client import EvmChain

EARLIEST: Final = QUOTE_LIFE + 3600
"""Seconds before its quote's end, earlier than which a job was not opened. An hour for a wrong clock, no more: each hour is pages
of logs that every node is asked for in vain when there is no event, and without one the amount is only not told."""
ENDED: Final = (JobState.SETTLED, JobState.REFUNDED)


def quote_tuple(quote: Quote) -> tuple[bytes | int, ...]:
    """A quote in the order of its Solidity struct."""
    return (
        quote.spec_hash,
        quote.client,
        quote.worker,
        quote.token,
        quote.amount,
        quote.penalty,
        quote.valid_before,
        quote.deadline,
        quote.window,
        quote.resolver,
        quote.salt,
    )


def careful(now: JobOnChain, confirmed: JobOnChain) -> JobOnChain:
    """One sight out of two, at the head and below the blocks that may still be undone.

    Nobody computes for an opening that may be undone, and nobody looks away from a job whose end may be; what lies between
    counts at once.
    """
    began = now.state is not JobState.NONE and confirmed.state is JobState.NONE
    ended = now.state in ENDED and confirmed.state is not now.state
    return confirmed if began or ended else now


class EvmJobs:
    """Implements `node.ports.Jobs`."""

    def __init__(self, chain: EvmChain, *, confirmations: int) -> None:
        self._chain = chain
        self._confirmations = confirmations
        self._domain = chain.deployment.jobs_domain

    @property
    def domain(self) -> Domain:
        return self._domain

    @property
    def committee(self) -> Address:
        return self._chain.deployment.committee

    # --------------------------------------------------------------------------------------------------------- looking

    async def job(self, job_id: JobId) -> JobOnChain:
        if not self._confirmations:
            return await self._job_at(job_id, "latest")
        head = await self._chain.head()
        now = await self._job_at(job_id, head.hash)
        deep = head.number - self._confirmations
        if deep < self._chain.deployment.block:
            return careful(now, _NO_JOB)
        return careful(now, await self._job_at(job_id, await self._chain.block_hash(deep)))

    async def confirmed_time(self) -> int | None:
        if not self._confirmations:
            return None
        deep = (await self._chain.head()).number - self._confirmations
        return await self._chain.block_time(deep) if deep >= self._chain.deployment.block else 0

    async def _job_at(self, job_id: JobId, block: str | bytes) -> JobOnChain:
        state, window_end, claimed, result_hash = await self._chain.view("Jobs", "job", job_id, block=block)
        return JobOnChain(JobState(state), window_end, claimed, Hash32(result_hash))

    async def paid(self, quote: Quote) -> int | None:
        """The amount is journaled, so a quorum has to tell it; and nobody is searched for further back than the job can be."""
        topics = (contract("Jobs").topic("Settled"), bytes(quote.job_id(self._domain)))
        return await self._chain.search_back(
            "Jobs", topics, lambda event: int(event.args["paid"]), since=quote.valid_before - EARLIEST, agreed=True
        )

    async def dispute(self, quote: Quote) -> DisputeOnChain:
        job_id = quote.job_id(self._domain)
        _, resolve_by, ended, outcome, _ = await self._chain.view("Disputes", "disputeOf", job_id)
        if resolve_by and not ended and quote.resolver != ZERO_ADDRESS:
            outcome = await self._finding(quote, job_id)
        return DisputeOnChain(resolve_by, _outcome(outcome))

    async def _finding(self, quote: Quote, job_id: JobId) -> int:
        """What the resolver says by now. It is a stranger's contract: one that reverts or talks nonsense has said nothing."""
        try:
            return int(await self._chain.view("Committee", "outcome", job_id, at=quote.resolver))
        except ChainError:
            return 0

    async def dispute_bond(self, quote: Quote) -> int:
        return int(await self._chain.view("Disputes", "bondFor", quote_tuple(quote)))

    async def holdable(self, worker: Address, token: Address) -> int:
        owner = (await self._chain.worker(worker)).owner
        if owner == ZERO_ADDRESS:
            return 0
        stake = await Stakes(self._chain).of(owner, token)
        return max(0, min(stake.exposure - stake.held, stake.active + stake.unbonding - stake.locked))

    # -------------------------------------------------------------------------------------------------------- changing

    async def open(self, quote: Quote, worker_signature: bytes, order_signature: bytes) -> TxResult:
        return await self._change("open", quote, worker_signature, order_signature)

    async def submit(self, quote: Quote, result_hash: Hash32, claimed: int, signature: bytes) -> TxResult:
        return await self._change("submit", quote, result_hash, claimed, signature)

    async def settle(self, quote: Quote, result_hash: Hash32, amount: int, signature: bytes) -> TxResult:
        return await self._change("settle", quote, result_hash, amount, signature)

    async def finalize(self, quote: Quote) -> TxResult:
        return await self._change("finalize", quote)

    async def refund(self, quote: Quote) -> TxResult:
        return await self._change("refund", quote)

    async def fail(self, quote: Quote) -> TxResult:
        return await self._change("fail", quote)

    async def open_dispute(self, quote: Quote, evidence: Hash32) -> TxResult:
        return await self._chain.change("job_dispute", "Disputes", "open", quote_tuple(quote), evidence, derived=True)

    async def resolve_dispute(self, quote: Quote) -> TxResult:
        return await self._chain.change("job_resolve", "Disputes", "resolve", quote_tuple(quote), derived=True)

    async def _change(self, function: str, quote: Quote, *args: Any) -> TxResult:
        # Every step follows from a look at the job: one that a reorganisation threw out comes again by itself, not twice.
        return await self._chain.change(f"job_{function}", "Jobs", function, quote_tuple(quote), *args, derived=True)


_NO_JOB: Final = JobOnChain(JobState.NONE, 0, 0, Hash32(bytes(32)))


def _outcome(raw: int) -> Outcome:
    try:
        return Outcome(raw)
    except ValueError:
        return Outcome.NONE
