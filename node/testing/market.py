"""A whole marketplace in one process: workers and clients on a network in memory and a chain in memory. Product code.

    async with open_market() as market:
        worker = await market.worker()
        client = await market.client(deposit=1_000_000)
        async with client.chat("fake", [{"role": "user", "content": "hi"}]) as stream:
            text = await stream.text()

Nothing here is a network, a chain or a language model; it is for tests, and says so.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from node.chain.memory import MemoryChain, MemoryLedger
from node.chains import Chains
from node.client.client import Client
from node.client.settings import ClientSettings, Means
from node.client.wallet import ClientWallet
from node.errors import NodeError
from node.groups import plain_errors
from node.network.discovery import OfferBook
from node.network.memory import MemoryHub, open_hub
from node.ports import ByteStream, Chain, StreamHandler, TaskBackend
from node.signer.journal import attach, known_channels
from node.signer.local import LocalSigners
from node.signer.table import Table
from node.store.channels import ChannelBook
from node.store.errors import LedgerClosed
from node.store.ledger import Ledger
from node.testing.fake_backend import FakeBackend
from node.worker.accepted import Accepted
from node.worker.batch_service import BatchSettings
from node.worker.serve import ServeSettings
from node.worker.worker import Worker, WorkerSettings
from protocol.channel import Role
from protocol.ids import PeerId
from protocol.keys import PrivateKey
from protocol.pricing import Price, cost
from protocol.signing import DomainRule, KeyRole, Policy, TokenRule
from protocol.typed_data import MARKET_DOMAIN

START_MS = 1_800_000_000_000
PENALTY = 1_000
"""The most that answers for one batch job."""


def key(name: str) -> PrivateKey:
    """A key made from a name: the same in every run. For tests only."""
    return PrivateKey(hashlib.sha256(f"gristmill test key {name}".encode()).digest())


def raw_key(signer: Any) -> PrivateKey:
    """The secret behind a signer of a market: for cheats, which no policy would sign."""
    found: PrivateKey = signer._signers.core.keys[signer._role]
    return found


@dataclass(slots=True)
class Market:
    folder: Path
    hub: MemoryHub
    ledger: MemoryLedger
    nursery: trio.Nursery
    stack: AsyncExitStack
    now_ms: Callable[[], int]
    price: Price
    workers: list[Worker] = field(default_factory=list)
    failures: dict[PeerId, BaseException] = field(default_factory=dict)
    """How workers ended that ended by themselves."""
    further: dict[str, MemoryLedger] = field(default_factory=dict)
    """Chains besides `ledger`, by name; see `add_chain`."""
    day_locked: int = 0
    """What clients may lock of a token on one day; 0: no limit."""
    _scopes: dict[PeerId, trio.CancelScope] = field(default_factory=dict)
    _tables: dict[str, Table] = field(default_factory=dict)
    """By name of a node: what its signer has signed."""
    _names: itertools.count[int] = field(default_factory=itertools.count)
    _draws: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def tick(self) -> int:
        """Cost of one tick of output at the market's price."""
        return cost(Price(output=self.price.output), 0, self.settings().tick_tokens)

    def add_chain(self, name: str, chain_id: int) -> MemoryLedger:
        """One more chain, with contracts and a token of its own."""
        clock = self.now_ms
        self.further[name] = MemoryLedger(clock=lambda: clock() / 1000, chain_id=chain_id)
        return self.further[name]

    def ledgers(self, names: Sequence[str]) -> dict[str, MemoryLedger]:
        return {name: self.ledger if name == "default" else self.further[name] for name in names}

    def accepted(self, price: Price | None = None, ledger: MemoryLedger | None = None, **values: Any) -> Accepted:
        """To be paid in the token of a chain; by default of the first, at the market's price."""
        chain = ledger or self.ledger
        values.setdefault("token", chain.token)
        values.setdefault("max_penalty", PENALTY)
        return Accepted(domain=chain.domain, price=price or self.price, **values)

    def means(self, ledger: MemoryLedger | None = None, **values: Any) -> Means:
        """To pay with the token of a chain; by default of the first."""
        chain = ledger or self.ledger
        values.setdefault("token", chain.token)
        return Means(domain=chain.domain, **{"rate": Fraction(1), **values})

    def settings(self, *accepts: Accepted, **serve: int) -> WorkerSettings:
        """Defaults, but for these fields of `ServeSettings`; paid in the first chain's token unless told otherwise. Batch jobs
        are taken."""
        return WorkerSettings(
            accepts=accepts or (self.accepted(),),
            serve=ServeSettings(**serve),
            batch=BatchSettings(poll_s=0.1, reread_s=1.0),
        )

    async def worker(
        self,
        backend: FakeBackend | None = None,
        settings: WorkerSettings | None = None,
        name: str = "",
        chains: Sequence[str] = ("default",),
        on: Chain | None = None,
        tasks: TaskBackend | None = None,
    ) -> Worker:
        """A worker that serves, on these chains. The same `name` reopens the same key and journal. `on`: a chain of the caller's
        instead, opened for `key(name)`, with coins on it. `tasks`: what it does beyond chat."""
        name = name or f"worker {next(self._names)}"
        hot = key(name)
        ledgers = self.ledgers(() if on else chains)
        for ledger in ledgers.values():
            ledger.mint(hot.address, native=10**18)
        known = Chains(
            {"default": on} if on else {name: MemoryChain(ledger, hot.address) for name, ledger in ledgers.items()}
        )
        journal = self._journal(name, bytes(hot.address))
        book = ChannelBook.restore(journal, Role.WORKER, known.domains)
        signers = self.signers(name, {KeyRole.WORKER: hot})
        await attach(signers, journal, known_channels(book))
        worker = Worker(
            key=signers[KeyRole.WORKER],
            book=book,
            network=self.hub.join(hot.peer_id),
            chains=known,
            ledger=journal,
            backend=backend or FakeBackend(),
            settings=settings or self.settings(),
            now_ms=self.now_ms,
            tasks=tasks,
        )
        await self.nursery.start(self._run, worker)
        for protocol, handler in worker.network.handlers.items():
            worker.network.handle(protocol, _mortal(handler))
        self.workers.append(worker)
        return worker

    async def _run(self, worker: Worker, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        scope = self._scopes[worker.key.peer_id] = trio.CancelScope()
        try:
            with scope:
                await worker.run(task_status=task_status)
        except NodeError as error:
            self.failures[worker.key.peer_id] = error

    async def _run_jobs(self, client: Client) -> None:
        scope = self._scopes[client.network.peer_id] = trio.CancelScope()
        try:
            with scope:
                await client.jobs.run()
        except NodeError as error:
            self.failures[client.network.peer_id] = error

    def crash(self, node: Worker | Client) -> None:
        """Kill a node as `kill -9` would, as far as one process can play it; the same `name` opens it again.

        Its journal takes nothing more, its connections are gone, its loops end.
        """
        node.book.ledger.close()
        peer = node.network.peer_id
        self.hub.leave(peer)
        if peer in self._scopes:
            self._scopes.pop(peer).cancel()
        self.workers = [worker for worker in self.workers if worker is not node]

    async def client(
        self,
        *,
        deposit: int = 10_000_000,
        settings: ClientSettings | None = None,
        means: Sequence[Means] = (),
        name: str = "",
        meet: bool = True,
        chains: Sequence[str] = ("default",),
        on: Chain | None = None,
    ) -> Client:
        """A client that knows every worker's offer, with a deposit of everything that it pays with: by default the token of the
        first of `chains`. The same `name` reopens the same keys and journal. `on`: a chain of the caller's instead, opened
        for the payer `key(f"{name} payer")`, with what is deposited on it."""
        name = name or f"client {next(self._names)}"
        payer, session = key(f"{name} payer"), key(f"{name} session")
        ledgers = self.ledgers(() if on else chains)
        means = means or [self.means(next(iter(ledgers.values())))]
        for one in means if ledgers else ():
            (ledger,) = [ledger for ledger in ledgers.values() if ledger.domain == one.domain]
            ledger.mint(payer.address, native=10**18)
            ledger.apply(lambda world, _, token=one.token: (world.pay(token, payer.address, deposit), []))
        known = Chains(
            {"default": on} if on else {name: MemoryChain(ledger, payer.address) for name, ledger in ledgers.items()}
        )
        network = self.hub.join(session.peer_id)
        randoms = (hashlib.sha256(f"{name} {n}".encode()).digest() for n in self._draws)
        options = settings or ClientSettings()
        book = ChannelBook.restore(self._journal(name, bytes(payer.address)), Role.CLIENT, known.domains)
        signers = self.signers(name, {KeyRole.PAYER: payer, KeyRole.SESSION: session}, means)
        ahead = await attach(signers, book.ledger, known_channels(book))
        await book.close_open_jobs(lambda _: 0)
        wallet = ClientWallet(
            payer=signers[KeyRole.PAYER],
            session=signers[KeyRole.SESSION],
            ahead=ahead,
            chains=known,
            means=means,
            network=network,
            book=book,
            settings=options,
            random32=lambda: next(randoms),
            now_s=lambda: self.now_ms() // 1000,
        )
        client = Client(
            network=network,
            wallet=wallet,
            offers=OfferBook(self.now_ms),
            settings=options,
            spawn=self.nursery.start_soon,
            now_ms=self.now_ms,
            random32=lambda: next(randoms),
        )
        self.nursery.start_soon(self._run_jobs, client)
        for channel_id in tuple(book.channels):
            if known.get(book.channels[channel_id].domain) is not None:
                await wallet.refresh(channel_id)
        if deposit:
            for one in means:
                await client.deposit(deposit, one.asset)
        if meet:
            for worker in self.workers:
                await client.meet(worker.network.addresses[0])
        return client

    def copy_table(self, name: str) -> Table:
        """What the signer of a node remembers now, as a backup of its data dir would have it."""
        table = self._tables[name]
        copied = Table.in_memory({})
        copied._connection.deserialize(table._connection.serialize())
        copied.identity = table.identity
        return copied

    def put_back_table(self, name: str, table: Table) -> None:
        self._tables[name] = table

    def signers(self, name: str, keys: Mapping[KeyRole, PrivateKey], means: Sequence[Means] = ()) -> LocalSigners:
        """The real policy before these keys, with a table in memory that the same `name` finds again."""
        if name not in self._tables:
            self._tables[name] = Table.in_memory({role: held.address for role, held in keys.items()})
        kinds = ("Voucher", "Ask", "Receipt", "Close", "ChannelAllocation")
        rules = [DomainRule(kind, MARKET_DOMAIN.chain_id, bytes(20)) for kind in ("Offer", "Refusal")]
        for one in (self.ledger, *self.further.values()):
            rules += [DomainRule(kind, one.chain_id, bytes(one.channels)) for kind in kinds]
            home = bytes(one.jobs_domain.verifying_contract)
            rules += [
                DomainRule(kind, one.chain_id, home) for kind in ("Quote", "QuotedOrder", "Submission", "Acceptance")
            ]
        tokens = tuple(TokenRule(one.domain.chain_id, bytes(one.token), day_locked=self.day_locked) for one in means)
        policy = Policy(domains=tuple(rules), tokens=tokens)
        return LocalSigners(keys, policy, self._tables[name], clock=lambda: self.now_ms() / 1000)

    def _journal(self, name: str, tag: bytes) -> Ledger:
        path = self.folder / name.replace(" ", "-") / "journal.sqlite"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        ledger = Ledger.open(path, chain_tag=tag)
        self.stack.callback(ledger.close)
        return ledger


def _mortal(handler: StreamHandler) -> StreamHandler:
    """A handler of a node that may be crashed: with its journal it is dead, and the dead do not complain."""

    async def handle(stream: ByteStream) -> None:
        try:
            await handler(stream)
        except* LedgerClosed:  # alone, or beside the cancellation that the crash brought
            await stream.reset()

    return handle


def run_market(test: Callable[[Market], Awaitable[None]], *, timeout_s: float = 60, **options: Any) -> None:
    """`trio.run` of a test on a market of its own, made with `options`."""

    async def main() -> None:
        with trio.fail_after(timeout_s):
            async with open_market(**options) as market:
                await test(market)

    with plain_errors():
        trio.run(main)


@asynccontextmanager
async def open_market(
    *, seed: int | None = None, price: Price | None = None, latency: float = 0.0
) -> AsyncIterator[Market]:
    """A market while the block runs. Time is trio's, so a `MockClock` moves all of it."""
    begun = trio.current_time()

    def now_ms() -> int:
        return START_MS + int((trio.current_time() - begun) * 1000)

    async with AsyncExitStack() as stack, AsyncExitStack() as network:  # journals outlast those who write them
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="gristmill-market-")))
        hub = await network.enter_async_context(open_hub(seed=seed, latency=latency))
        async with trio.open_nursery() as nursery:
            yield Market(
                folder=folder,
                hub=hub,
                ledger=MemoryLedger(clock=lambda: now_ms() / 1000),
                nursery=nursery,
                stack=stack,
                now_ms=now_ms,
                price=price or Price(request=10, input=1_000_000, output=2_000_000),
            )
            nursery.cancel_scope.cancel()
