"""A worker: its parts put together, its loops, its drain.

Everything it stands on is handed in (network, chain, ledger, model runtime), so the same worker runs on libp2p and an EVM chain
or, in a test, on a network and a chain in memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

from node.errors import ChainError, LedgerError, NetworkError, ReorgTooDeep
from node.network.discovery import OfferBook, announce, follow_gossip
from node.network.drive import serve_one
from node.network.groups import plain_errors
from node.ports import REORG_DEPTH, Backend, ByteStream, Chain, ChainEvent, Network
from node.store.channels import ChannelBook
from node.store.ledger import Ledger
from node.store.meter import Meter
from node.store.results import Results
from node.worker.channels import ChannelDesk, ChannelRules
from node.worker.claims import Claimer, ClaimPolicy, ClaimReport
from node.worker.desk import HONOURED, OfferDesk, Speed, Terms
from node.worker.serve import JobServer, ServeSettings
from protocol.channel import Role
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import Address, ChannelId, ModelId, PeerId
from protocol.keys import PrivateKey
from protocol.messages import (
    CHANNEL_PROTOCOL,
    JOB_PROTOCOL,
    OFFER_PROTOCOL,
    ChatMessage,
    GetOffer,
    OfferMessage,
    Params,
)
from protocol.pricing import Price, cost

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    price: Price
    token: Address
    serve: ServeSettings = field(default_factory=ServeSettings)
    claims: ClaimPolicy = field(default_factory=ClaimPolicy)
    offer_ttl_ms: int = 60_000
    tick_tokens: int = 64
    tick_ms: int = 2000
    credit_ticks: int = 1
    min_withdraw_delay: int = 900
    min_allocation: int = 1
    min_earned: int = 1
    """What a channel must have earned before it is closed at once; else its payer waits out the delay."""
    max_tokens: int = 65_536
    chain_poll_ms: int = 1000
    reread_ms: int = 30_000
    """How often every channel is read again, whether or not an event told of it."""
    version: str = ""

    @property
    def tick(self) -> int:
        """Cost of one tick of output, smallest unit: what a client pays ahead."""
        return cost(Price(output=self.price.output), 0, self.tick_tokens)


class Worker:
    """Made by `open_worker`-like code in `node.app`; `run` serves until it is cancelled or drained."""

    def __init__(
        self,
        *,
        key: PrivateKey,
        network: Network,
        chain: Chain,
        ledger: Ledger,
        backend: Backend,
        settings: WorkerSettings,
        now_ms: Callable[[], int],
        speeds: Mapping[ModelId, Speed] | None = None,
    ) -> None:
        self.key = key
        self.network = network
        self.chain = chain
        self.ledger = ledger
        self.settings = settings
        self.now_ms = now_ms
        self.book = ChannelBook.restore(ledger, Role.WORKER)
        self.results = Results(ledger)
        self.meter = Meter()
        self.offers = OfferBook(chain.domain, now_ms)
        """What other workers sell; verified, because only sound offers are passed on."""
        self._chain_seen = -1e9
        self._events_from = 0
        """Block from which a new reading of events misses nothing."""
        self.claimer = Claimer(
            book=self.book,
            chain=chain,
            policy=settings.claims,
            follow=lambda channel_id: self.channels.follow(channel_id),
            now_s=trio.current_time,
            receiver=key.address,
        )
        self.channels = ChannelDesk(
            key=key,
            domain=chain.domain,
            book=self.book,
            chain=chain,
            rules=ChannelRules(
                settings.token, settings.min_withdraw_delay, settings.min_allocation, settings.min_earned
            ),
            now_s=lambda: now_ms() // 1000,
            claim_now=self.claimer.hurry,
        )
        self.desk = OfferDesk(
            key,
            chain.domain,
            Terms(
                price=settings.price,
                token=settings.token,
                ttl_ms=settings.offer_ttl_ms,
                tick_tokens=settings.tick_tokens,
                tick_ms=settings.tick_ms,
                credit_tokens=settings.tick_tokens * settings.credit_ticks,
                min_withdraw_delay=settings.min_withdraw_delay,
                max_tokens=settings.max_tokens,
                version=settings.version,
            ),
            backend.models,
            speeds or {},
            lambda: network.addresses,
            lambda: self.server.free_slots,
            now_ms,
        )
        self.server = JobServer(
            key=key,
            domain=chain.domain,
            book=self.book,
            results=self.results,
            backend=backend,
            desk=self.desk,
            meter=self.meter,
            settings=settings.serve,
            now_ms=now_ms,
            chain_age_ms=self.chain_age_ms,
        )

    def chain_age_ms(self) -> int:
        """Since the chain was last seen."""
        return int((trio.current_time() - self._chain_seen) * 1000)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Catch up with the chain, then serve. Raises `LedgerError` as soon as the journal fails: nothing is signed then."""
        ended = await self.book.close_open_jobs(self.settings.tick)
        if ended:
            log.warning("%d parts were cut off by the last stop; booked what their vouchers cover", ended)
        await self._catch_up()
        # A peer passes on only what it subscribes to: without this, workers would not spread each other's offers.
        await follow_gossip(self.network, self.offers)
        self.network.handle(OFFER_PROTOCOL, self._serve_offer)
        self.network.handle(CHANNEL_PROTOCOL, self._serve_channel)
        self.network.handle(JOB_PROTOCOL, self.server.handle)
        with plain_errors():
            await self._run_loops(task_status)

    async def _run_loops(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_head)
            nursery.start_soon(self._watch_events)
            nursery.start_soon(self._reread)
            nursery.start_soon(self._announce)
            nursery.start_soon(self._watch_ledger)
            nursery.start_soon(self.claimer.run)
            task_status.started()

    async def claim(self) -> ClaimReport:
        """Claim and settle everything there is. Raises `ChainError`."""
        return await self.claimer.claim(everything=True)

    async def drain(self, timeout_s: float = 30) -> bool:
        """Take nothing new and let what runs end. False when the time was up first."""
        self.server.draining = self.channels.draining = True
        with trio.move_on_after(timeout_s):
            while self.server.busy:
                await trio.sleep(0.05)
            return True
        return False

    # ---------------------------------------------------------------------------------------------------- serving

    async def _serve_offer(self, stream: ByteStream) -> None:
        await serve_one(stream, OFFER_PROTOCOL, self._answer_offer, timeout_s=600)

    async def _answer_offer(self, peer: PeerId, question: object) -> OfferMessage:
        if not isinstance(question, GetOffer):
            raise RemoteProtocolError(WireCode.UNEXPECTED, f"{type(question).__name__} is no question")
        return self.desk.current()

    async def _serve_channel(self, stream: ByteStream) -> None:
        await serve_one(stream, CHANNEL_PROTOCOL, self.channels.answer, timeout_s=600)

    # ------------------------------------------------------------------------------------------------------ loops

    async def _catch_up(self) -> None:
        """See every channel as the contract has it now, before anything is served on it."""
        head = await self.chain.head()
        self._chain_seen = trio.current_time()
        # From before we look, so that nothing happens between the look and the first event unseen.
        self._events_from = max(0, head.number - REORG_DEPTH)
        await self._look_at_all()

    async def _watch_head(self) -> None:
        """Keep the view of the chain fresh; when it is not, `chain_stale` refuses new work."""
        while True:
            try:
                await self.chain.head()
                self._chain_seen = trio.current_time()
            except ChainError as error:
                log.warning("the chain cannot be read: %s", error)
            await trio.sleep(self.settings.chain_poll_ms / 1000)

    async def _watch_events(self) -> None:
        """Refresh a channel whenever the contract says something about it, undone or not."""
        missed = failed = False
        while True:
            try:
                if failed and (await self.chain.head()).number < self._events_from:
                    missed = True  # another, shorter chain: nothing would be told for long
                if missed:  # events told while we could not look, or undone too far back, are not told again
                    await self._catch_up()
                missed = failed = False
                async for event in self.chain.events(self._events_from):
                    missed = True
                    await self._see(event)
                    self._events_from = max(self._events_from, event.block_number - REORG_DEPTH)
                    missed = False
            except ChainError as error:
                failed, missed = True, missed or isinstance(error, ReorgTooDeep)
                log.warning("events of the chain cannot be followed: %s", error)
                await trio.sleep(self.settings.chain_poll_ms / 1000)

    async def _see(self, event: ChainEvent) -> None:
        raw = event.args.get("channelId")
        if isinstance(raw, bytes) and len(raw) == 32 and self.book.get(ChannelId(raw)) is not None:
            await self.channels.follow(ChannelId(raw))

    async def _look_at_all(self) -> None:
        for state in list(self.book.channels.values()):
            if not state.closed:
                await self.channels.follow(state.channel_id)

    async def _reread(self) -> None:
        """Look at every channel now and then: an event that never came must not hide a withdrawal for long."""
        while True:
            await trio.sleep(self.settings.reread_ms / 1000)
            try:
                await self._look_at_all()
            except ChainError as error:
                log.warning("channels could not be read again: %s", error)

    async def _announce(self) -> None:
        """Gossip the offer now and whenever half of its life is over."""
        while True:
            try:
                await announce(self.network, self.desk.current())
            except NetworkError as error:
                log.warning("the offer could not be gossiped: %s", error)
            await trio.sleep(self.settings.offer_ttl_ms / 2000)

    async def _watch_ledger(self) -> None:
        while self.ledger.failure is None:
            await trio.sleep(0.25)
        raise LedgerError(
            self.ledger.failure, hint="nothing more is signed; free the disk or check it, then start again"
        )


async def self_test(backend: Backend, *, tokens: int = 8) -> dict[ModelId, Speed]:
    """Run a short job on every model before it is offered, and measure it. Raises `ModelError` when one does not answer."""
    speeds = {}
    for model in backend.models:
        prompt = backend.prepare(model, [ChatMessage(role="user", content="Say hello.")])
        began = time.perf_counter()
        first, count = 0.0, 0
        async with aclosing(backend.generate(prompt, Params(max_tokens=tokens))) as steps:
            async for step in steps:
                first = first or time.perf_counter() - began
                count += len(step.token_ids)
        decoding = time.perf_counter() - began - first
        speed = (count - 1) / decoding if count > 1 and decoding > 0 else 0.0
        speeds[model] = Speed(tokens_per_second=round(speed, 2), ttft_ms=round(first * 1000, 2))
    return speeds


__all__ = ["HONOURED", "Worker", "WorkerSettings", "self_test"]
