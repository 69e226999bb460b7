"""`node.ports.Jobs` and `node.ports.Slashes` over `protocol.escrow` in this process: a part of `node.chain.memory`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from node.ports import DisputeOnChain, JobOnChain, TxResult
from protocol import escrow
from protocol.errors import RemoteProtocolError
from protocol.escrow import Escrow, JobState, Slash, SlashState
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId
from protocol.keys import recover
from protocol.typed_data import Acceptance, Domain, Order, Quote, Submission

if TYPE_CHECKING:
    from node.chain.memory import Events, MemoryChain, World


def signer_of(digest: bytes, signature: bytes) -> Address | None:
    """Who signed; None when nobody can have."""
    try:
        return recover(digest, signature)
    except RemoteProtocolError:
        return None


class MemoryJobs:
    """For the account of one `MemoryChain`. What resolvers find is the test's to say: `MemoryLedger.findings`."""

    def __init__(self, chain: MemoryChain) -> None:
        self._chain = chain
        self._ledger = chain.ledger

    @property
    def domain(self) -> Domain:
        return self._ledger.jobs_domain

    @property
    def committee(self) -> Address:
        return ZERO_ADDRESS

    # --------------------------------------------------------------------------------------------------------- looking

    async def job(self, job_id: JobId) -> JobOnChain:
        found = (await self._chain.look()).escrow.job(job_id)
        return JobOnChain(found.state, found.window_end, found.claimed, found.result_hash)

    async def confirmed_time(self) -> int | None:
        return None

    async def paid(self, quote: Quote) -> int | None:
        await self._chain.look()
        job_id = quote.job_id(self.domain)
        settled = [e for e in self._ledger.canonical_events() if e.name == "JobsSettled" and e.args["jobId"] == job_id]
        return int(settled[-1].args["paid"]) if settled else None

    async def dispute(self, quote: Quote) -> DisputeOnChain:
        job_id = quote.job_id(self.domain)
        found = (await self._chain.look()).escrow.dispute(job_id)
        return DisputeOnChain(found.resolve_by, found.outcome if found.ended else self._ledger.finding(job_id))

    async def dispute_bond(self, quote: Quote) -> int:
        await self._chain.look()
        return escrow.bond_for(quote)

    async def holdable(self, worker: Address, token: Address) -> int:
        state = (await self._chain.look()).escrow
        stake = state.stake_of(state.owner_of(worker), token)
        locked = escrow.locked_stake(state, self._ledger.head.timestamp, state.owner_of(worker), token)
        return max(0, min(stake.exposure - stake.held, stake.total - locked))

    # -------------------------------------------------------------------------------------------------------- changing

    async def open(self, quote: Quote, worker_signature: bytes, order_signature: bytes) -> TxResult:
        job_id, me = quote.job_id(self.domain), self._chain.account
        worker = signer_of(quote.digest(self.domain), worker_signature)
        client = signer_of(Order(job_id).digest(self.domain), order_signature)
        args = {"jobId": job_id, "client": quote.client, "worker": quote.worker, "quote": quote}
        return await self._change(
            "open", lambda s, now: (escrow.open_job(s, now, me, quote, worker, client), [("Opened", args)])
        )

    async def submit(self, quote: Quote, result_hash: Hash32, claimed: int, signature: bytes) -> TxResult:
        job_id, me = quote.job_id(self.domain), self._chain.account
        signer = signer_of(Submission(job_id, result_hash, claimed).digest(self.domain), signature)

        def change(state: Escrow, now: int) -> tuple[Escrow, Events]:
            after = escrow.submit(state, now, me, quote, result_hash, claimed, signer)
            args = {"jobId": job_id, "resultHash": result_hash, "claimed": claimed}
            return after, [("Submitted", {**args, "windowEnd": after.job(job_id).window_end})]

        return await self._change("submit", change)

    async def settle(self, quote: Quote, result_hash: Hash32, amount: int, signature: bytes) -> TxResult:
        job_id, me = quote.job_id(self.domain), self._chain.account
        signer = signer_of(Acceptance(job_id, result_hash, amount).digest(self.domain), signature)
        return await self._change(
            "settle",
            lambda s, now: (
                after := escrow.settle_job(s, now, me, quote, result_hash, amount, signer),
                self._settled(after, quote, amount),
            ),
        )

    async def finalize(self, quote: Quote) -> TxResult:
        job_id = quote.job_id(self.domain)
        return await self._change(
            "finalize",
            lambda s, now: (
                after := escrow.finalize(s, now, quote),
                self._settled(after, quote, s.job(job_id).claimed),
            ),
        )

    async def refund(self, quote: Quote) -> TxResult:
        me, args = self._chain.account, {"jobId": quote.job_id(self.domain)}
        return await self._change("refund", lambda s, now: (escrow.refund(s, now, me, quote), [("Refunded", args)]))

    async def fail(self, quote: Quote) -> TxResult:
        me, args = self._chain.account, {"jobId": quote.job_id(self.domain)}
        return await self._change("fail", lambda s, now: (escrow.fail(s, now, me, quote), [("Failed", args)]))

    async def open_dispute(self, quote: Quote, evidence: Hash32) -> TxResult:
        me, args = self._chain.account, {"jobId": quote.job_id(self.domain)}
        block = self._ledger.head.number + 1
        return await self._change(
            "dispute",
            lambda s, now: (escrow.open_dispute(s, now, block, me, quote, evidence), [("Disputed", args)]),
        )

    async def resolve_dispute(self, quote: Quote) -> TxResult:
        job_id = quote.job_id(self.domain)
        said = self._ledger.finding(job_id)

        def change(state: Escrow, now: int) -> tuple[Escrow, Events]:
            claimed = state.job(job_id).claimed
            after = escrow.resolve_dispute(state, now, quote, said)
            paid = {escrow.Outcome.ACCEPT: 0, escrow.Outcome.REJECT: claimed}.get(said, claimed // 2)
            return after, [*self._settled(after, quote, paid), ("DisputeResolved", {"jobId": job_id, "outcome": said})]

        return await self._change("resolve", change)

    async def _change(self, purpose: str, change: Callable[[Escrow, int], tuple[Escrow, Events]]) -> TxResult:
        def on_world(world: World, now: int) -> tuple[World, Events]:
            state, events = change(world.escrow, now)
            return replace(world, escrow=state), events

        return await self._chain.send(f"job_{purpose}", on_world)

    def _settled(self, after: Escrow, quote: Quote, paid: int) -> Events:
        job_id = quote.job_id(self.domain)
        if after.job(job_id).state is not JobState.SETTLED:
            return []
        return [("JobsSettled", {"jobId": job_id, "payout": after.payout_of(quote.worker), "paid": paid})]


class MemorySlashes:
    """For the account of one `MemoryChain`."""

    def __init__(self, chain: MemoryChain) -> None:
        self._chain = chain

    async def get(self, slash_id: int) -> Slash:
        return (await self._chain.look()).escrow.slashes.get(slash_id, _NO_SLASH)

    async def move(self, slash_id: int) -> TxResult:
        def change(world: World, now: int) -> tuple[World, Events]:
            return replace(world, escrow=escrow.move_slash(world.escrow, now, slash_id)), [
                ("SlashMoved", {"slashId": slash_id})
            ]

        return await self._chain.send("move_slash", change)


_NO_SLASH = Slash(ZERO_ADDRESS, ZERO_ADDRESS, 0, ZERO_ADDRESS, ZERO_ADDRESS, 0, SlashState.NONE, Hash32(bytes(32)))
