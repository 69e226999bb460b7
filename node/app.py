"""The place where concrete classes meet to make a running worker. (`node.client.connect` does it for a client.)"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

import node
from node.config import Config
from node.errors import ModelError
from node.ports import Chain
from node.wiring import now_ms, open_chain, open_journal
from node.worker.claims import ClaimPolicy
from node.worker.payout import payout_notice
from node.worker.serve import ServeSettings
from node.worker.worker import Worker, WorkerSettings, self_test
from protocol.ids import Address
from protocol.keys import PrivateKey
from protocol.pricing import Price

Say = Callable[[str], None]
SWITCH_SECONDS = 0.00005


@dataclass(frozen=True, slots=True)
class Running:
    """A worker that serves."""

    worker: Worker
    chain: Chain


def worker_settings(config: Config, chain: Chain) -> WorkerSettings:
    given = config.worker
    return WorkerSettings(
        price=Price(request=given.price_request, input=given.price_input, output=given.price_output),
        token=chain.token,
        serve=ServeSettings(
            coalesce_ms=given.coalesce_ms,
            stall_ms=given.stall_ms,
            max_streams=given.max_streams,
            credit_limit=given.global_credit,
        ),
        claims=ClaimPolicy(minimum=given.claim_min, every_s=given.claim_every_s),
        offer_ttl_ms=given.offer_ttl_s * 1000,
        tick_tokens=given.tick_tokens,
        tick_ms=given.tick_ms,
        credit_ticks=given.credit_ticks,
        min_withdraw_delay=given.min_withdraw_delay_s,
        min_allocation=given.claim_min,
        chain_poll_ms=max(config.chain.poll_ms, 100),
        version=node.__version__,
    )


@asynccontextmanager
async def open_worker(config: Config, key: PrivateKey, *, say: Say = lambda _: None) -> AsyncIterator[Running]:
    """A worker that serves for the length of the block. `say` hears what is going on, in words.

    Raises `ConfigError`, `LedgerError`, `ChainError`, `ModelError`, `NetworkError`: a worker that cannot be right does not start.
    """
    # Before torch loads: with OpenMP's default a second busy process makes the engine twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The engine's thread needs the interpreter between any two kernels; by default the network's thread may keep it for 5 ms.
    sys.setswitchinterval(SWITCH_SECONDS)
    from node.models.store import ModelStore
    from node.network.host import open_host
    from node.runtime.backend import EngineSettings, open_backend

    store = ModelStore(config.models_dir)
    manifests = [store.resolve(name) for name in config.worker.models] or list(store.list())
    if not manifests:
        raise ModelError("the model store is empty", hint="gristmill models add smollm2-135m-instruct")
    async with AsyncExitStack() as stack:
        ledger = open_journal(config, "worker", key)
        stack.callback(ledger.close)
        chain = await stack.enter_async_context(open_chain(config, key, ledger))
        say(f"chain {chain.chain_id}, contracts checked")
        network = await stack.enter_async_context(
            open_host(key, listen=config.p2p.listen, bootstrap=config.p2p.bootstrap)
        )
        engine = EngineSettings(
            device=config.engine.device,
            dtype=config.engine.dtype,
            threads=config.engine.threads,
            cache_bytes=config.engine.kv_bytes,
            max_streams=config.worker.max_streams,
        )
        backend = await stack.enter_async_context(open_backend(store, manifests, engine))
        speeds = await self_test(backend)
        for model, speed in speeds.items():
            info = backend.models[model]
            say(f"{info.name}: self-test passed, {speed.tokens_per_second} tokens/s, first token {speed.ttft_ms} ms")
        notice = await payout_notice(
            chain, key.address, Address(config.worker.payout) if config.worker.payout else None
        )
        if notice:
            say(notice)
        worker = Worker(
            key=key,
            network=network,
            chain=chain,
            ledger=ledger,
            backend=backend,
            settings=worker_settings(config, chain),
            now_ms=now_ms,
            speeds=speeds,
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(worker.run)
        try:
            yield Running(worker, chain)
        finally:
            nursery.cancel_scope.cancel()
