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

from node.chains import Chains
from node.errors import LedgerError, NetworkError, SignerFailed
from node.groups import plain_errors
from node.network.discovery import OfferBook, announce, follow_gossip
from node.network.drive import serve_one
from node.ports import Backend, ByteStream, Chain, ChainEvent, Network, Signer, TaskBackend
from node.store.channels import ChannelBook
from node.store.ledger import Ledger
from node.store.meter import Meter
from node.store.results import Results
from node.worker.accepted import Accepted, AcceptedAssets
from node.worker.batch_quotes import BatchAsset
from node.worker.batch_service import BatchService, BatchSettings
from node.worker.channels import ChannelDesk, ChannelRules
from node.worker.claims import Claimer, ClaimPolicy, ClaimReport, claim_all
from node.worker.desk import OfferDesk, Speed, Terms, merged
from node.worker.serve import JobServer, ServeSettings
from node.worker.tenants import Tenants
from node.worker.watch import ChainWatch
from protocol.channel import ChannelState, ClaimNow, Role
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import ModelId, PeerId
from protocol.messages import (
    BATCH_PROTOCOL,
    CHANNEL_PROTOCOL,
    JOB_PROTOCOL,
    OFFER_PROTOCOL,
    ChatMessage,
    GetOffer,
    OfferMessage,
    Params,
)
from protocol.typed_data import Domain

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    accepts: tuple[Accepted, ...]
    """What the worker is paid in, in the order of its offer."""
    serve: ServeSettings = field(default_factory=ServeSettings)
    claims: ClaimPolicy = field(default_factory=ClaimPolicy)
    offer_ttl_ms: int = 60_000
    tick_tokens: int = 64
    tick_ms: int = 2000
    credit_ticks: int = 1
    min_withdraw_delay: int = 900
    min_earned: int = 1
    """What a channel must have earned before it is closed at once; else its payer waits out the delay."""
    max_tokens: int = 65_536
    chain_poll_ms: int = 1000
    """How often a chain's head is asked for ..."""
    polls_ms: Mapping[Domain, int] = field(default_factory=dict)
    """... but for chains that have an interval of their own."""
    reread_ms: int = 30_000
    """How often every channel is read again, whether or not an event told of it."""
    head_ages_s: Mapping[Domain, int] = field(default_factory=dict)
    """How old a chain's newest block may be; any age where there is no entry."""
    sweep_ms: int = 600_000
    """How often kept results past their time are dropped. (Room for a new one is made at once, whenever it is needed.)"""
    models_poll_ms: int = 500
    """How often the models of the offer are compared with those that are ready."""
    batch: BatchSettings | None = None
    """None: no batch jobs."""
    version: str = ""


class Worker:
    """Made by `open_worker`-like code in `node.app`; `run` serves until it is cancelled or drained."""

    def __init__(
        self,
        *,
        key: Signer,
        network: Network,
        chains: Chains,
        ledger: Ledger,
        backend: Backend,
        settings: WorkerSettings,
        now_ms: Callable[[], int],
        speeds: Mapping[ModelId, Speed] | None = None,
        book: ChannelBook | None = None,
        tasks: TaskBackend | None = None,
    ) -> None:
        """`book`: the fold of `ledger`, where the caller has made it already. `tasks`: what runs tasks other than chat."""
        self.key = key
        self.network = network
        self.chains = chains
        self.ledger = ledger
        self.settings = settings
        self.now_ms = now_ms
        self.book = book or ChannelBook.restore(ledger, Role.WORKER, chains.domains)
        self.speeds = {} if speeds is None else speeds
        """As `speeds` changes, so do our offers."""
        self.results = Results(ledger)
        self.meter = Meter()
        self.offers = OfferBook(now_ms)
        """What other workers sell; verified, because only sound offers are passed on."""
        for one in settings.accepts:
            chains.of(one.domain)
        credit_tokens = settings.tick_tokens * settings.credit_ticks
        models = merged(backend.models, tasks.models if tasks else {})
        self.accepted = AcceptedAssets(
            settings.accepts,
            tick_tokens=settings.tick_tokens,
            credit_tokens=credit_tokens,
            tasks={task for info in models.values() for task in info.tasks},
        )
        self.channels = ChannelDesk(
            key=key,
            book=self.book,
            chains=chains,
            accepted=self.accepted,
            rules=ChannelRules(settings.min_withdraw_delay, settings.min_earned),
            now_s=lambda: now_ms() // 1000,
            claim_now=self._claim_now,
        )
        self.claimers = {
            chain.domain: Claimer(
                book=self.book,
                chain=chain,
                policy=settings.claims,
                follow=self.channels.follow,
                now_s=trio.current_time,
                receiver=key.address,
            )
            for chain in chains
        }
        self.watches = {
            chain.domain: ChainWatch(
                name=chains.name(chain.domain),
                chain=chain,
                book=self.book,
                follow=self.channels.follow,
                restore=self.channels.restore,
                now_s=lambda: now_ms() // 1000,
                head_age_s=settings.head_ages_s.get(chain.domain, 0),
                poll_ms=settings.polls_ms.get(chain.domain, settings.chain_poll_ms),
                reread_ms=settings.reread_ms,
                heard=self._heard,
            )
            for chain in chains
        }
        self.desk = OfferDesk(
            key,
            Terms(
                accepted=self.accepted,
                ttl_ms=settings.offer_ttl_ms,
                tick_tokens=settings.tick_tokens,
                tick_ms=settings.tick_ms,
                credit_tokens=credit_tokens,
                min_withdraw_delay=settings.min_withdraw_delay,
                max_tokens=settings.max_tokens,
                version=settings.version,
            ),
            lambda: merged(backend.models, tasks.models if tasks else {}),
            self.speeds,
            lambda: network.addresses,
            lambda: self.server.offered_slots,
            now_ms,
        )
        self.tenants = Tenants()
        self.server = JobServer(
            key=key,
            accepted=self.accepted,
            book=self.book,
            results=self.results,
            backend=backend,
            tasks=tasks,
            desk=self.desk,
            meter=self.meter,
            settings=settings.serve,
            now_ms=now_ms,
            chain_age_ms=self.sight_age_ms,
            tenants=self.tenants,
        )
        self.batch = self._batch_service(settings.batch, self.speeds) if settings.batch else None
        if self.batch:
            self.server.lodger = self.batch.runner

    def _batch_service(self, settings: BatchSettings, speeds: Mapping[ModelId, Speed]) -> BatchService:
        by_jobs = {chain.jobs.domain: chain for chain in self.chains if chain.jobs}
        return BatchService(
            worker=self.key.address,
            sign=self.key.sign,
            ledger=self.ledger,
            results=self.results,
            chains=by_jobs,
            assets={
                (jobs.domain, one.token): BatchAsset(one.price, one.min_job, one.max_penalty)
                for one in self.accepted
                if one.min_job and (jobs := self.chains.of(one.domain).jobs) is not None
            },
            backend=self.server.backend,
            speeds=speeds,
            settings=settings,
            places=self.settings.serve.max_streams,
            streams_live=lambda: self.server.live,
            chain_age_ms=lambda jobs: self.age_of(by_jobs[jobs].domain),
            now_ms=self.now_ms,
            tenants=self.tenants,
        )

    @property
    def chain(self) -> Chain:
        """The default one."""
        return self.chains.first

    def age_of(self, domain: Domain) -> int:
        """Milliseconds since one chain was last seen."""
        return self.watches[domain].age_ms()

    def sight_age_ms(self, state: ChannelState) -> int:
        """Since a channel's chain was last seen, or since the channel itself was due to be read, if that is longer ago."""
        return max(self.age_of(state.home), self.watches[state.home].unread_ms(state.channel_id))

    def chain_age_ms(self) -> int:
        """Since the chain that was seen least lately was seen."""
        return max(watch.age_ms() for watch in self.watches.values())

    def _heard(self, event: ChainEvent) -> None:
        if self.batch:
            self.batch.see(event)

    def _claim_now(self, effect: ClaimNow) -> None:
        state = self.book.channels[effect.channel_id]
        self.claimers[state.home].hurry(effect)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Catch up with the chains, then serve. Raises `LedgerError` or `SignerFailed` as soon as one of them fails."""
        ended = await self.book.close_open_jobs(self.accepted.tick)
        if ended:
            log.warning("%d parts were cut off by the last stop; booked what their vouchers cover", ended)
        for state in self.book.channels.values():
            if self.chains.get(state.domain) is None and not state.closed:
                log.warning("channel %s is on a chain that is not configured: nothing is done for it", state.channel_id)
        for watch in self.watches.values():
            await watch.catch_up()
        # A peer passes on only what it subscribes to: without this, workers would not spread each other's offers.
        await follow_gossip(self.network, self.offers)
        self.network.handle(OFFER_PROTOCOL, self._serve_offer)
        self.network.handle(CHANNEL_PROTOCOL, self._serve_channel)
        self.network.handle(JOB_PROTOCOL, self.server.handle)
        if self.batch:
            self.network.handle(BATCH_PROTOCOL, self.batch.handle)
        with plain_errors():
            await self._run_loops(task_status)

    async def _run_loops(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            for watch in self.watches.values():
                watch.start(nursery)
            for claimer in self.claimers.values():
                nursery.start_soon(claimer.run)
            nursery.start_soon(self._announce)
            nursery.start_soon(self._sweep)
            nursery.start_soon(self._watch_ledger)
            if self.batch:
                nursery.start_soon(self.batch.run)
            task_status.started()

    async def claim(self) -> ClaimReport:
        """Claim and settle everything there is, chain by chain. Raises `ChainError` when one failed, after the others."""
        return await claim_all(self.claimers.values())

    async def drain(self, timeout_s: float = 30) -> bool:
        """Take nothing new and let what runs end. False when the time was up first."""
        self.server.draining = self.channels.draining = True
        if self.batch:
            self.batch.desk.draining = True
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
        return await self.desk.current()

    async def _serve_channel(self, stream: ByteStream) -> None:
        await serve_one(stream, CHANNEL_PROTOCOL, self.channels.answer, timeout_s=600)

    # ------------------------------------------------------------------------------------------------------ loops

    async def _announce(self) -> None:
        """Gossip the offer now, whenever half of its life is over, and when other models are sold."""
        while True:
            try:
                await announce(self.network, await self.desk.current())
            except NetworkError as error:
                log.warning("the offer could not be gossiped: %s", error)
            with trio.move_on_after(self.settings.offer_ttl_ms / 2000):
                while not self.desk.outdated:
                    await trio.sleep(self.settings.models_poll_ms / 1000)

    async def _sweep(self) -> None:
        """Clients' data do not stay longer than was said, also on a disk that never gets full."""
        while True:
            await trio.sleep(self.settings.sweep_ms / 1000)
            dropped = await self.results.sweep(self.now_ms())
            if dropped:
                log.info("%d kept results were past their time", dropped)

    async def _watch_ledger(self) -> None:
        while self.ledger.failure is None and self.key.failure is None:
            await trio.sleep(0.25)
        hint = "nothing more is signed; free the disk or check it, then start again"
        if self.ledger.failure is not None:
            raise LedgerError(self.ledger.failure, hint=hint)
        raise SignerFailed(self.key.failure or "", hint=hint)


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


__all__ = ["Accepted", "Worker", "WorkerSettings", "self_test"]
