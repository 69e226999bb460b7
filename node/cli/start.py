"""`start`: run the worker until SIGTERM (drain, then stop) or Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from node.cli import passwords
from node.cli.assets import sums
from node.cli.main import Command, Shared
from node.cli.options import password_options, setting_option
from node.cli.output import LogFormat
from node.signer.sources import KeyFile

if TYPE_CHECKING:
    import trio

    from node.app import Running
    from node.chains import Chains
    from node.runtime.backend import TorchBackend
    from node.runtime.tasks.backend import TaskModels
    from node.store.channels import ChannelBook
    from node.worker.claims import ClaimReport
    from node.worker.worker import Worker

DRAIN_SECONDS = 30.0


@click.command(cls=Command)
@setting_option("--network", "network", metavar="NAME", help="Network to serve on.")
@setting_option("--listen", "p2p.listen", multiple=True, metavar="MULTIADDR", help="Listen here; repeatable.")
@setting_option(
    "--bootstrap", "p2p.bootstrap", multiple=True, metavar="MULTIADDR", help="Connect to this peer; repeatable."
)
@setting_option("--model", "worker.models", multiple=True, metavar="MODEL", help="Serve this model; repeatable.")
@setting_option(
    "--metrics",
    "telemetry.metrics",
    metavar="HOST:PORT",
    help="Serve metrics for Prometheus there; a port alone: on 127.0.0.1.",
)
@setting_option(
    "--backend", "engine.backend", metavar="NAME", help="What runs the models: torch, openai, transformers, onnx, ray."
)
@password_options
@click.option(
    "--drain", "drain_s", type=float, default=DRAIN_SECONDS, help="Seconds that running jobs get after SIGTERM."
)
@click.pass_obj
def command(shared: Shared, drain_s: float) -> None:
    """Run the worker.

    With --json each event is one line: `ready` once everything is checked and jobs are taken, `stopped` at the end.
    """
    import trio

    handler = logging.StreamHandler()
    handler.setFormatter(LogFormat("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if shared.debug else logging.WARNING, handlers=[handler])
    key = passwords.source(shared, "worker")
    trio.run(_serve, shared, key, drain_s)


async def _serve(shared: Shared, key: KeyFile, drain_s: float) -> None:
    import trio

    ready, stop = trio.Event(), trio.Event()

    async def watch() -> None:
        async for _ in signals:
            stop.set()
            if not ready.is_set():  # nothing to drain: hashing and loading models may take minutes
                nursery.cancel_scope.cancel()

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await _run(shared, key, drain_s, ready, stop)
            nursery.cancel_scope.cancel()
    if not ready.is_set():
        shared.output.row({"event": "stopped", "clean": True}, "stopped before it was ready")


async def _run(shared: Shared, key: KeyFile, drain_s: float, ready: trio.Event, stop: trio.Event) -> None:
    import trio

    from node.app import open_worker
    from node.cli.model_control import model_handlers
    from node.cli.models import progress
    from node.worker import control

    output = shared.output
    async with (
        open_worker(shared.config, key, say=output.say, bar=progress) as running,
        trio.open_nursery() as nursery,
    ):
        worker = running.worker

        async def status(_: dict[str, Any]) -> Mapping[str, Any]:
            return await report(worker, running.models, running.tasks)

        async def claim(_: dict[str, Any]) -> Mapping[str, Any]:
            return await claim_report(worker.chains, worker.book, await worker.claim())

        async def drain(_: dict[str, Any]) -> Mapping[str, Any]:
            stop.set()
            return {"draining": True}

        handlers = {"status": status, "claim": claim, "drain": drain, **model_handlers(shared, running.models)}
        path = shared.config.data_dir / "control.sock"
        nursery.start_soon(control.serve, path, handlers)
        metrics = await _metrics(shared, running, nursery) if shared.config.telemetry.metrics else None
        addresses = list(worker.network.addresses)
        ready.set()
        output.row(
            {
                "event": "ready",
                "pid": os.getpid(),
                "peer_id": worker.key.peer_id,
                "account": worker.key.address,
                "addresses": addresses,
                "metrics": metrics,
            },
            "\n".join(
                [
                    f"ready   {worker.key.peer_id}",
                    *(f"listens {address}" for address in addresses),
                    *([f"metrics http://{metrics}/metrics"] if metrics else []),
                ]
            ),
        )
        await stop.wait()
        output.say(f"draining: {worker.server.busy} jobs under way")
        clean = await worker.drain(drain_s)
        output.row({"event": "stopped", "clean": clean}, "stopped" if clean else "stopped with jobs under way")
        nursery.cancel_scope.cancel()


async def _metrics(shared: Shared, running: Running, nursery: trio.Nursery) -> str:
    """Serve the metrics; returns where. Raises `NetworkError`."""
    from functools import partial

    from node.settings import split_endpoint
    from node.telemetry.server import MetricsServer

    host, port = split_endpoint(shared.config.telemetry.metrics)
    server = MetricsServer(running.metrics, running.health)
    where: str = await nursery.start(partial(server.serve, host, port))
    return where


async def report(worker: Worker, models: TorchBackend | None = None, tasks: TaskModels | None = None) -> dict[str, Any]:
    """What `status` shows. Amounts stand once for each asset."""
    from protocol.payment import unsecured

    stats = worker.server.stats
    amounts = {
        "earned": lambda state: state.spent,
        "claimed": lambda state: state.claimed,
        "claimable": lambda state: state.claimable,
        "unpaid": lambda state: unsecured(state, worker.meter.running(state.channel_id)),
    }
    return {
        "peer_id": str(worker.key.peer_id),
        "account": str(worker.key.address),
        "addresses": list(worker.network.addresses),
        "models": models.report()
        if models
        else [
            {"name": info.name, "id": str(info.id), "dtype": info.dtype}
            for info in worker.server.backend.models.values()
        ],
        "tasks": tasks.report() if tasks else [],
        "draining": worker.server.draining,
        "streams": worker.server.busy,
        "accepted": stats.accepted,
        "finished": stats.finished,
        "output_tokens": stats.output_tokens,
        "refused": dict(stats.refused),
        "ended": dict(stats.ended),
        "channels": len(worker.book.channels),
        "assets": await sums(worker.chains, worker.book.channels.values(), amounts),
        "chains": [
            {"name": watch.name, "chain_id": watch.chain.chain_id, "age_ms": watch.age_ms()}
            for watch in worker.watches.values()
        ],
        "batch": worker.batch.report() if worker.batch else [],
        "journal_records": worker.ledger.head.seq,
    }


async def claim_report(chains: Chains, book: ChannelBook, done: ClaimReport) -> dict[str, Any]:
    """What `claim` shows."""
    states = [book.channels[channel] for channel in done.claimed]
    return {
        "claimed": {str(channel): str(amount) for channel, amount in done.claimed.items()},
        "totals": await sums(chains, states, {"amount": lambda state: done.claimed[state.channel_id]}),
        "transactions": [transaction(result) for result in done.transactions],
    }


def transaction(result: Any) -> dict[str, Any]:
    """One transaction in the form of `--json`."""
    return {"purpose": result.purpose, "hash": "0x" + result.hash.hex(), "gas": result.gas_used, "block": result.block}
