"""The place where concrete classes meet to make a running worker. (`node.client.connect` does it for a client.)"""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

import node
from node.books import Key, open_books
from node.chains import Chains
from node.config import COMMITTEE, DEFAULT, Config
from node.config.folders import default_kernels_dir
from node.errors import ModelError
from node.ports import Backend, ModelInfo, TaskBackend
from node.settings import task_price_of
from node.telemetry.exposition import Source, render
from node.telemetry.market import MarketState, market_samples
from node.telemetry.server import Health
from node.wiring import now_ms, open_chains, token_of
from node.worker.accepted import Accepted
from node.worker.batch_quotes import QuoteRules
from node.worker.batch_run import RunSettings
from node.worker.batch_service import BatchSettings
from node.worker.claims import ClaimPolicy
from node.worker.desk import Speed
from node.worker.payout import payout_notice
from node.worker.serve import ServeSettings
from node.worker.trial import try_tasks
from node.worker.worker import Worker, WorkerSettings, self_test
from protocol.claiming import COIN, ClaimTerms
from protocol.ids import ZERO_ADDRESS, Address, ModelId
from protocol.pricing import Price
from protocol.signing import KeyRole

if TYPE_CHECKING:
    from node.models.manifest import Manifest
    from node.models.store import Progress
    from node.runtime.backend import TorchBackend
    from node.runtime.hal.devices import Choice, Device
    from node.runtime.tasks.backend import TaskModels

Say = Callable[[str], None]
Bar = Callable[[str, int], AbstractContextManager["Progress"]]
"""Shows what is under way, and how much of so many bytes is done."""
SWITCH_SECONDS = 0.00005


@dataclass(frozen=True, slots=True)
class Running:
    """A worker that serves."""

    worker: Worker
    chains: Chains
    backend: Backend
    models: TorchBackend | None = None
    """The model runtime, where it is ours to manage."""
    tasks: TaskModels | None = None
    """That of tasks other than chat, where it is ours."""

    def metrics(self) -> bytes:
        """The page for Prometheus, as it is now."""
        engine = self.backend.samples() if isinstance(self.backend, Source) else ()
        return render((*engine, *market_samples(partial(market_state, self.worker))))

    def health(self) -> Health:
        """Whether this worker takes jobs."""
        return Health(not self.worker.server.draining, "draining" if self.worker.server.draining else "ok")


def market_state(worker: Worker) -> MarketState:
    stats = worker.server.stats
    return MarketState(
        accepted=stats.accepted,
        finished=stats.finished,
        output_tokens=stats.output_tokens,
        refused=stats.refused,
        ended=stats.ended,
        streams=worker.server.busy,
        free_slots=max(0, worker.server.free_slots),
        draining=worker.server.draining,
        channels=len(worker.book.channels),
        journal_records=worker.ledger.head.seq,
    )


def accepted_asset(config: Config, chains: Chains, name: str) -> Accepted:
    """A token of `worker.accept`, with the amounts that go with it. Raises `ConfigError`."""
    chain, address = token_of(config, chains, name)
    if name == DEFAULT:
        given = config.worker
        return Accepted(
            domain=chain.domain,
            token=address,
            price=Price(request=given.price_request, input=given.price_input, output=given.price_output),
            task_prices=dict(map(task_price_of, given.task_prices)),
            min_allocation=given.claim_min,
            credit_limit=given.global_credit,
            min_job=given.batch_min,
            max_penalty=given.batch_penalty,
        )
    token = config.tokens[name]
    return Accepted(
        domain=chain.domain,
        token=address,
        price=Price(request=token.price_request, input=token.price_input, output=token.price_output),
        task_prices=dict(map(task_price_of, token.task_prices)),
        min_allocation=token.claim_min,
        credit_limit=token.global_credit,
        min_job=token.batch_min,
        max_penalty=token.batch_penalty,
    )


def batch_settings(config: Config, chains: Chains) -> BatchSettings:
    """What the operator says about batch jobs."""
    given = config.worker
    named = {Address(name) for name in given.batch_resolvers if name != COMMITTEE}
    if COMMITTEE in given.batch_resolvers:
        named |= {chain.jobs.committee for chain in chains if chain.jobs is not None}
    return BatchSettings(
        quotes=QuoteRules(resolvers=frozenset(named | {ZERO_ADDRESS}), max_jobs=given.batch_jobs),
        run=RunSettings(streams=given.batch_streams, share=given.batch_share / 100),
    )


def claim_terms(config: Config, accepted: Accepted, name: str) -> ClaimTerms:
    """When claims in a token of `worker.accept` are worth their gas. The chain's own coin is worth itself."""
    given = config.worker
    value = given.coin_value
    if name != DEFAULT:
        token = config.tokens[name]
        value = token.coin_value
    return ClaimTerms(
        minimum=accepted.min_allocation,
        coin_value=COIN if accepted.token == ZERO_ADDRESS else value,
        gain_percent=given.claim_gain_percent,
        at_loss=given.claim_at_loss,
    )


def head_age_s(config: Config, name: str) -> int:
    """How old the newest block of a chain may be; 0 = any age. What `devnet up` started makes a block per transaction."""
    devnet = config.network == "devnet" and name == DEFAULT
    return 0 if devnet else config.chain_named(name).max_head_age_s


def worker_settings(config: Config, chains: Chains) -> WorkerSettings:
    given = config.worker
    accepts = tuple(accepted_asset(config, chains, name) for name in given.accept)
    claims = ClaimPolicy(
        own={one.asset: claim_terms(config, one, name) for one, name in zip(accepts, given.accept, strict=True)},
        every_s=given.claim_every_s,
        least_delay=given.min_withdraw_delay_s,
    )
    return WorkerSettings(
        accepts=accepts,
        serve=ServeSettings(
            coalesce_ms=given.coalesce_ms,
            stall_ms=given.stall_ms,
            max_streams=given.max_streams,
        ),
        claims=claims,
        offer_ttl_ms=given.offer_ttl_s * 1000,
        tick_tokens=given.tick_tokens,
        tick_ms=given.tick_ms,
        credit_ticks=given.credit_ticks,
        min_withdraw_delay=given.min_withdraw_delay_s,
        batch=batch_settings(config, chains),
        head_ages_s={chains.named(name).domain: head_age_s(config, name) for name in chains.names},
        polls_ms={chains.named(name).domain: max(config.chain_named(name).poll_ms, 100) for name in chains.names},
        version=node.__version__,
    )


def _runtimes(
    config: Config, say: Say, bar: Bar, heard: Callable[[Choice], None]
) -> tuple[AbstractAsyncContextManager[Backend], AbstractAsyncContextManager[TaskBackend] | None]:
    """The configured back end on the models for chats, and what runs the others, if there are any. Raises `ConfigError`,
    `ModelError`."""
    if config.engine.isolation == "thread":
        # The engine's thread needs the interpreter between any two kernels; by default the network's may keep it for 5 ms.
        sys.setswitchinterval(SWITCH_SECONDS)
    from node.models.store import ModelStore
    from node.runtime.backend import EngineSettings, open_backend
    from node.runtime.hal.probe import look_ahead
    from node.runtime.memory import MemoryBudget
    from node.runtime.supervisor import Limits
    from node.runtime.tasks.backend import TaskSettings, is_task_model, open_tasks

    store = ModelStore(config.models_dir)
    manifests = [store.resolve(name) for name in config.worker.models] or list(store.list())
    if not manifests:
        raise ModelError("the model store is empty", hint="gristmill models add smollm2-135m-instruct")
    settings = EngineSettings(
        device=config.engine.device,
        dtype=config.engine.dtype,
        threads=config.engine.threads,
        cache_bytes=config.engine.kv_bytes,
        max_streams=config.worker.max_streams,
        exact=config.engine.exact,
        isolation=config.engine.isolation,
        memory_budget=config.engine.memory_budget,
        drafts=config.engine.draft_models,
        draft_cache_bytes=config.engine.draft_kv_bytes,
        graph_bytes=config.engine.graph_bytes,
        pinned=config.engine.pinned,
        lazy=config.engine.lazy,
        limits=Limits(load_s=config.engine.load_ms / 1000, hang_s=config.engine.hang_ms / 1000),
        hidden=tuple(str(path) for path in (config.keys_dir, config.journal("worker")) if path.exists()),
        kernels=default_kernels_dir(),
        trace=config.telemetry.engine_trace,
    )

    def watch(manifest: Manifest) -> AbstractContextManager[Progress]:
        size = sum(entry.size for entry in manifest.files)
        say(f"{manifest.name}: hashing {-(-size // 1_000_000)} MB")
        return bar(f"verifying {manifest.name}", size)

    others = [manifest for manifest in manifests if is_task_model(store, manifest)]
    chats = [manifest for manifest in manifests if manifest not in others]
    task_settings = TaskSettings(
        device=config.engine.device,
        threads=config.engine.threads,
        max_jobs=config.worker.max_streams,
        pinned=config.engine.pinned,
        lazy=config.engine.lazy,
    )
    if others or config.engine.backend == "torch":
        look_ahead()
    memory = MemoryBudget(config.engine.memory_budget)
    tasks = None
    if others:
        tasks = open_tasks(
            store,
            others,
            task_settings,
            watch,
            isolation=settings.isolation,
            hidden=settings.hidden,
            memory=memory,
            say=say,
        )
    if config.engine.backend != "torch":
        from node.runtime.backends.chosen import open_chosen

        return open_chosen(config, settings, store, chats, say, watch, memory), tasks
    return open_backend(store, chats, settings, watch, heard, say=say, memory=memory), tasks


def benched(
    config: Config, worker: Address, models: Mapping[ModelId, ModelInfo], device: Device, say: Say
) -> dict[ModelId, Speed]:
    """What stable benchmarks of this worker, device and torch say of the models that are served; see `gristmill bench`."""
    from importlib import metadata

    from node.runtime.bench.kept import KeptBenchmarks

    kept, torch = KeptBenchmarks(config.benchmarks_dir), metadata.version("torch")
    found = {}
    for model, info in models.items():
        claim = kept.claim(model, info.dtype, device.uuid, worker=worker, torch=torch, now_ms=now_ms())
        if claim is not None:
            found[model] = Speed(claim.tokens_per_second, claim.ttft_ms)
            say(
                f"{info.name}: the offer claims what was benchmarked, {claim.tokens_per_second} tokens/s for one stream"
            )
    return found


@asynccontextmanager
async def open_worker(
    config: Config,
    key: Key,
    *,
    say: Say = lambda _: None,
    bar: Bar = lambda _what, _total: nullcontext(lambda _: None),
    backend: Backend | None = None,
    tasks: AbstractAsyncContextManager[TaskBackend] | None = None,
) -> AsyncIterator[Running]:
    """A worker that serves for the length of the block. `say` hears what is going on, in words; `bar` shows how far
    the models are hashed.

    `backend`: a model runtime that is there already; by default the torch engine on the models of the configuration.
    `tasks`: opens what runs tasks other than chat, beside such a `backend`; by default nothing does.

    Raises `ConfigError`, `KeyError_`, `SignerError`, `LedgerError`, `ChainError`, `ModelError`, `NetworkError`: a worker that
    cannot be right does not start.
    """
    from node.network.host import open_host

    choices: list[Choice] = []
    engine: AbstractAsyncContextManager[Backend] | None = None
    if backend is None:
        engine, tasks = _runtimes(config, say, bar, choices.append)
    async with AsyncExitStack() as stack:
        books = await stack.enter_async_context(open_books(config, "worker", {KeyRole.WORKER: key}))
        hot, ledger = books.signers[KeyRole.WORKER], books.ledger
        chains = await stack.enter_async_context(open_chains(config, hot, ledger))
        for chain in chains:
            say(f"chain {chain.chain_id}, contracts checked")
        network = await stack.enter_async_context(
            open_host(hot, listen=config.p2p.listen, bootstrap=config.p2p.bootstrap)
        )
        models = None
        if engine is not None:
            from node.runtime.backend import TorchBackend

            backend = await stack.enter_async_context(engine)
            models = backend if isinstance(backend, TorchBackend) else None
        for choice in choices:
            say(f"models run on {choice.device.label}: {choice.why}")
        tested = models.speeds if models else await self_test(backend)
        # A benchmark is one of the fast mode.
        fast = choices and not config.engine.exact
        claims = benched(config, hot.address, backend.models, choices[0].device, say) if fast else {}
        speeds = ChainMap(claims, tested)
        runtime, ours = await stack.enter_async_context(tasks) if tasks is not None else None, None
        if runtime is not None:
            from node.runtime.tasks.backend import TaskModels

            ours = runtime if isinstance(runtime, TaskModels) else None
            for model, spent in (await try_tasks(runtime)).items():
                info = runtime.models[model]
                say(f"{info.name}: self-test passed, {', '.join(info.tasks)} in {spent * 1000:.0f} ms")
        payout = Address(config.worker.payout) if config.worker.payout else None
        for name in chains.names:
            notice = await payout_notice(chains.named(name), hot.address, payout)
            if notice:
                say(notice if len(chains) == 1 else f"{notice} (chain {name})")
        worker = Worker(
            key=hot,
            book=books.book,
            network=network,
            chains=chains,
            ledger=ledger,
            backend=backend,
            settings=worker_settings(config, chains),
            now_ms=now_ms,
            speeds=speeds,
            tasks=runtime,
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(worker.run)
        try:
            yield Running(worker, chains, backend, models, ours)
        finally:
            nursery.cancel_scope.cancel()
