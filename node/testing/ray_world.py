"""A Ray cluster of two nodes on this machine, a back end on it, and a node that dies under load. Product code: for tests.

    python -m node.testing.ray_world FOLDER dies     a node of two dies under load; prints one JSON object with what was seen
    python -m node.testing.ray_world FOLDER hangs    a replica that the queue had started stops answering
    python -m node.testing.ray_world FOLDER fills    its memory for objects is filled under load, and strangers come to its ports
    python -m node.testing.ray_world FOLDER costs    what a token costs directly and through Ray

Runs in whatever Python has Ray; the test starts it in one that has. The nodes are processes on loopback, and the model is of
random weights: what is real is Ray, the engine, and the death.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import trio

from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.ports import Backend, Prompt
from node.runtime.backend import EngineSettings, open_backend
from node.runtime.backends.autoscale import Scale
from node.runtime.backends.ray_backend import RayBackend, open_ray
from node.runtime.backends.ray_cluster import LOCAL_ONLY, LOOPBACK
from node.runtime.backends.ray_pool import RaySettings
from node.testing.tiny_model import add_tiny
from protocol.messages import Params

STREAMS: Final = 8
TOKENS: Final = 400
SLOTS: Final = 4
IDLE_S: Final = 25
"""Longer than trio keeps a thread that has nothing to do."""


def store_of(folder: Path) -> tuple[ModelStore, Manifest]:
    store, source = ModelStore(folder / "store"), folder / "source"
    source.mkdir(parents=True)
    return store, add_tiny(store, source)


def asked(manifest: Manifest, number: int) -> tuple[Prompt, Params]:
    """The same in every run: one of several streams, drawn with a seed, that does not end by itself."""
    prompt = Prompt(manifest.id, tuple((7 * n + number) % 400 + 3 for n in range(20)))
    never = ((2, -100.0),)
    return prompt, Params(max_tokens=TOKENS, temperature=1.0, top_p=0.95, seed=number, logit_bias=never)


class Load:
    """All streams at once, and what became of them."""

    def __init__(self, backend: RayBackend, manifest: Manifest, *, hold: bool = False) -> None:
        """`hold`: streams stop after their first tokens until `go`."""
        self.go = trio.Event()
        if not hold:
            self.go.set()
        self._backend, self._manifest = backend, manifest
        self.ids: dict[int, list[int]] = {number: [] for number in range(STREAMS)}
        self.text = dict.fromkeys(range(STREAMS), "")
        self.pause = 0.0
        self.cut = 0
        """Streams under way at what happened."""
        """Longest between two steps of a stream, in seconds."""

    async def run(self, strike: Callable[[], Awaitable[None]]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(strike)
            for number in range(STREAMS):
                nursery.start_soon(self._stream, number)

    async def under_way(self, streams: int) -> None:
        """Until so many streams have had some tokens each."""
        while sum(len(ids) >= 8 for ids in self.ids.values()) < streams:
            await trio.sleep(0.002)

    async def _stream(self, number: int) -> None:
        last = 0.0
        async with aclosing(self._backend.generate(*asked(self._manifest, number))) as steps:
            async for step in steps:
                now = time.perf_counter()
                self.pause = max(self.pause, now - last if last else 0.0)
                last = now
                self.ids[number] += step.token_ids
                self.text[number] += step.text
                if len(self.ids[number]) >= 8:
                    await self.go.wait()

    def compare(self, wanted: Mapping[int, tuple[list[int], str]]) -> dict[str, Any]:
        return {
            "same tokens": sum(self.ids[n] == wanted[n][0] for n in range(STREAMS)),
            "same text": sum(self.text[n] == wanted[n][1] for n in range(STREAMS)),
            "tokens": sum(map(len, self.ids.values())),
            "under way": self.cut,
            "longest pause s": round(self.pause, 2),
        }


async def direct(store: ModelStore, manifest: Manifest) -> dict[int, tuple[list[int], str]]:
    """What one engine in this process says."""
    found = {}
    async with open_backend(store, [manifest], EngineSettings()) as backend:
        for number in range(STREAMS):
            ids: list[int] = []
            text = ""
            async with aclosing(backend.generate(*asked(manifest, number))) as steps:
                async for step in steps:
                    ids += step.token_ids
                    text += step.text
            found[number] = ids, text
    return found


def settings(address: str, scale: Scale, health_s: float) -> RaySettings:
    engine = EngineSettings(max_streams=SLOTS)
    return RaySettings(engine=engine, address=address, scale=scale, health_s=health_s, load_s=240, queue_s=240)


async def a_node_dies(store: ModelStore, manifest: Manifest, address: str, kill: Callable[[], object]) -> Load:
    """Two replicas on two nodes, places for all streams; one node goes while every stream is under way."""
    async with open_ray(store, [manifest], settings(address, Scale(2, 2), health_s=10)) as backend:
        while len(backend.pool.members) < 2:
            await trio.sleep(0.1)
        load = Load(backend, manifest)

        async def strike() -> None:
            await load.under_way(STREAMS)
            load.cut = sum(len(ids) < TOKENS for ids in load.ids.values())
            await trio.to_thread.run_sync(kill)

        await load.run(strike)
        return load


async def a_replica_hangs(store: ModelStore, manifest: Manifest, seen: dict[str, Any]) -> Load:
    """One replica on a cluster of our own; the queue has a second one started, which then stops answering; idle ones leave."""
    scale = Scale(1, 2, up_s=0.2, down_s=1.0)
    async with open_ray(store, [manifest], settings("", scale, health_s=4)) as backend:
        seen["replicas"] = [len(backend.pool.members)]
        load = Load(backend, manifest, hold=True)

        async def strike() -> None:
            await load.under_way(STREAMS)  # half of them by the second replica, which their waiting has started
            seen["replicas"].append(len(backend.pool.members))
            second = backend.pool.members[-1]
            while not second.pid:
                await trio.sleep(0.01)
            os.kill(second.pid, signal.SIGSTOP)
            load.cut = second.active
            load.go.set()

        await load.run(strike)
        with trio.move_on_after(60):
            while len(backend.pool.members) > 1:
                await trio.sleep(0.1)
        seen["replicas"].append(len(backend.pool.members))
        return load


async def the_store_fills(store: ModelStore, manifest: Manifest, seen: dict[str, Any]) -> Load:
    """A cluster of our own: somebody in it puts several times more objects away than there is memory for, while streams run.
    Where its processes listen, and what one gets there who has another token, is noted too."""
    import ray

    async with open_ray(store, [manifest], settings("", Scale(1, 1), health_s=30)) as backend:
        load = Load(backend, manifest)

        def fill() -> int:
            kept = []
            try:
                for _ in range(64):
                    kept.append(ray.put(bytes(8 << 20)))
            except ray.exceptions.RayError as error:
                seen["full"] = type(error).__name__
            return len(kept)

        async def strike() -> None:
            await load.under_way(SLOTS)
            load.cut = sum(len(ids) < TOKENS for ids in load.ids.values())
            seen["put"] = await trio.to_thread.run_sync(fill)

        seen["memory"] = int(ray.cluster_resources()["object_store_memory"])
        seen["listening"] = sorted({address for pid in _family() for address in _listening(pid)})
        await load.run(strike)
        await trio.sleep(IDLE_S)
        seen["later"] = 0
        async with aclosing(backend.generate(*asked(manifest, 0))) as steps:
            async for step in steps:
                seen["later"] += len(step.token_ids)
        there = ray.get_runtime_context().gcs_address
        seen["stranger"] = await trio.to_thread.run_sync(_stranger, there)
        return load


def _stranger(address: str) -> str:
    """What a process gets that reaches the head and has another token."""
    code = (
        "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False); "
        "print('in', ray.get(ray.remote(lambda: 7).remote()))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no answer"
    return done.stdout.strip() or f"status {done.returncode}: " + done.stderr.strip().splitlines()[-1][:200]


def _family() -> list[int]:
    """This process and all below it, and those that Ray has put beside it: they share its session's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if os.environ["RAY_TMPDIR"] in line or int(entry.name) == os.getpid():
                found.append(int(entry.name))
    return found


def _listening(pid: int) -> set[str]:
    """Addresses on which a process accepts connections."""
    held = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                held.add(os.readlink(entry))
            except OSError:
                continue
        lines = [*Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        lines6 = [*Path(f"/proc/{pid}/net/tcp6").read_text().splitlines()[1:]]
    except OSError:
        return set()
    found = set()
    for line, family in [(line, socket.AF_INET) for line in lines] + [(line, socket.AF_INET6) for line in lines6]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in held:
            raw = bytes.fromhex(words[1].partition(":")[0])
            raw = b"".join(raw[n : n + 4][::-1] for n in range(0, len(raw), 4))  # words of the machine's own order
            found.add(socket.inet_ntop(family, raw))
    return found


async def timed(backend: Backend, manifest: Manifest, streams: int) -> tuple[float, float]:
    """Seconds to the first token of the first stream, and seconds per token when so many run side by side."""
    began, first, count = time.perf_counter(), [0.0], [0]

    async def one(number: int) -> None:
        async with aclosing(backend.generate(*asked(manifest, number))) as steps:
            async for step in steps:
                first[0] = first[0] or time.perf_counter() - began
                count[0] += len(step.token_ids)

    async with trio.open_nursery() as nursery:
        for number in range(streams):
            nursery.start_soon(one, number)
    return first[0], (time.perf_counter() - began - first[0]) / count[0]


async def what_it_costs(store: ModelStore, manifest: Manifest, runs: int = 7) -> dict[str, float]:
    """Medians over runs in turns: the engine in this process, and the same engine in a replica."""
    found: dict[str, list[float]] = {}
    local = EngineSettings(max_streams=SLOTS)
    async with (
        open_ray(store, [manifest], settings("", Scale(1, 1), health_s=60)) as there,
        open_backend(store, [manifest], local) as here,
    ):
        for run in range(runs + 1):
            for streams in (1, SLOTS):
                for name, backend in (("direct", here), ("ray", there)):
                    first, each = await timed(backend, manifest, streams)
                    if run:  # the first warms up
                        found.setdefault(f"us_per_token_{name}_{streams}", []).append(each * 1e6)
                        found.setdefault(f"ttft_ms_{name}_{streams}", []).append(first * 1e3)
    figures = {name: round(median(values), 2) for name, values in found.items()}
    for streams in (1, SLOTS):
        for unit in ("us_per_token", "ttft_ms"):
            added = figures[f"{unit}_ray_{streams}"] - figures[f"{unit}_direct_{streams}"]
            figures[f"added_{unit}_{streams}"] = round(added, 2)
    return figures


def main(folder: Path, what: str) -> None:
    os.environ |= {
        "RAY_ENABLE_AUTO_CONNECT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
        LOCAL_ONLY: "0",
    }
    store, manifest = store_of(folder)
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # the path of a socket has 107 bytes at most
        os.environ["RAY_TMPDIR"] = short
        if what == "costs":
            print(json.dumps(trio.run(what_it_costs, store, manifest)))  # noqa: T201
            return
        wanted = trio.run(direct, store, manifest)
        seen: dict[str, Any] = {}
        scene = the_store_fills if what == "fills" else a_replica_hangs
        load = dies(store, manifest) if what == "dies" else trio.run(scene, store, manifest, seen)
        print(json.dumps(seen | load.compare(wanted)))  # noqa: T201


def dies(store: ModelStore, manifest: Manifest) -> Load:
    from ray.cluster_utils import Cluster

    common = {"include_dashboard": False, "object_store_memory": 80 << 20, "node_ip_address": LOOPBACK}
    cluster = Cluster(initialize_head=True, head_node_args={**common, "num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1, **common) for _ in range(2)]
        kill = partial(cluster.remove_node, nodes[0], allow_graceful=False)
        return trio.run(a_node_dies, store, manifest, cluster.address, kill)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
