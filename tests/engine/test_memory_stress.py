"""Random loads, swaps, jobs, hang-ups and kills of several models in real processes under a small budget: nothing passes it, in
the books or in the machine (M9), and nobody dies for want of memory.

`--long` for a full count. What is resident is what a process cannot give back (`RssAnon`): mapped files can be read again.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

pytest.importorskip("torch")

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.runtime.backend import TorchBackend, open_backend
from node.runtime.fleet import EngineSettings
from node.runtime.footprint import measure
from node.runtime.launch import TASKS, ProcessLauncher
from node.runtime.memory import MemoryBudget
from node.runtime.packing import Packing
from node.runtime.tasks.backend import TaskModels, open_tasks
from node.runtime.tasks.loading import TaskSettings
from node.runtime.tasks.needs import needs
from node.testing.tiny_model import add_tiny, add_tiny_encoder
from protocol.messages import ChatMessage, Params
from protocol.tasks import EmbedRequest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc")
CACHE = 32 << 20
PLAN = ["chat"] * 5 + ["hang up"] * 2 + ["vectors"] * 3 + ["load", "swap", "kill"]
LONG = 25
"""Times that the plan is gone through with `--long`."""
AT_ONCE = 4
SIZES = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
}
"""Large enough that weights, and not processes, decide what fits."""


class Books:
    """Looks at the processes and the budget, again and again."""

    def __init__(self, backend: TorchBackend, tasks: TaskModels, memory: MemoryBudget) -> None:
        self._backend, self._tasks, self._memory = backend, tasks, memory
        self.counted = self.resident = self.looks = 0

    async def keep(self) -> None:
        while True:
            self.counted = max(self.counted, self._memory.used)
            self.resident = max(self.resident, sum(map(_resident, self._pids())))
            self.looks += 1
            await trio.sleep(0.02)

    def _pids(self) -> list[int]:
        engines = [one.host.pid for one in self._backend.fleet.residents.values() if one.host]
        others = [one.host._process.pid for one in self._tasks.residents.values() if one.host]
        return [pid for pid in (*engines, *others) if pid is not None]


def _resident(pid: int) -> int:
    """Bytes that the process cannot give back; 0 for one that has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


async def nothing() -> AsyncIterator[bytes]:
    return
    yield b""


@pytest.mark.slow
def test_nothing_passes_the_budget_and_nobody_dies_of_it(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    plan = PLAN * (LONG if request.config.getoption("--long", default=False) else 1)
    rounds = len(plan)
    store, draw = ModelStore(tmp_path_factory.mktemp("store")), random.Random(20261126)
    draw.shuffle(plan)
    chats = [
        add_tiny(store, tmp_path_factory.mktemp("chat"), f"tiny-{n}", **SIZES, num_hidden_layers=n) for n in (6, 12, 18)
    ]
    encoder = add_tiny_encoder(
        store, tmp_path_factory.mktemp("encoder"), hidden_size=256, intermediate_size=1024, num_hidden_layers=8
    )
    sizes = [measure(store.path(one.id), one, Packing("float32"), CACHE).total for one in chats]
    other = needs(store.path(encoder.id), encoder, "float32", AT_ONCE, process=True).total
    budget = max(sizes[2] + sizes[0], other)  # the two largest chats do not fit together, nor the encoder with any
    assert sizes[1] + sizes[2] > budget
    done: Counter[str] = Counter()
    killed: set[int] = set()

    async def act(backend: TorchBackend, tasks: TaskModels, what: str) -> None:
        one = draw.choice(chats)
        try:
            if what in ("chat", "hang up"):
                await chat(backend, one, hang_up=what == "hang up")
            elif what == "vectors":
                prepared = tasks.prepare(encoder.id, EmbedRequest(("the mill turns and the river " * 3,) * 64))
                steps = [step async for step in tasks.run(prepared, Params(), nothing())]  # type: ignore[arg-type]
                assert steps[-1].finish_reason is not None
            elif what == "load":
                await backend.fleet.load(one)
            elif what == "swap":
                await backend.fleet.swap(one.id, draw.choice(chats))
            else:
                pids = [known.host.pid for known in backend.fleet.residents.values() if known.ready and known.host]
                for pid in pids[:1]:
                    if pid is not None:
                        killed.add(pid)
                        os.kill(pid, signal.SIGKILL)
            done[what] += 1
        except ModelError as error:
            done[f"{what} refused"] += 1
            assert "memory" not in error.message or "bytes of memory" in error.message, error.message

    async def chat(backend: TorchBackend, one: Manifest, *, hang_up: bool) -> None:
        prompt = backend.prepare(one.id, [ChatMessage(role="user", content="hello " * draw.randrange(1, 20))])
        steps = backend.generate(prompt, Params(max_tokens=24, temperature=1.0, seed=draw.randrange(99)))
        count = 0
        async for step in steps:
            count += len(step.token_ids)
            if hang_up and count > 3:
                break
        await steps.aclose()

    async def main() -> None:
        memory = MemoryBudget(budget)
        settings = EngineSettings(cache_bytes=CACHE, max_streams=AT_ONCE, lazy=True)
        with trio.fail_after(120 + 30 * rounds):
            async with (
                open_backend(store, chats, settings, launch=ProcessLauncher(), memory=memory) as backend,
                open_tasks(
                    store, [encoder], TaskSettings(lazy=True), launch=ProcessLauncher(TASKS), memory=memory
                ) as tasks,
                trio.open_nursery() as watching,
            ):
                books = Books(backend, tasks, memory)
                watching.start_soon(books.keep)

                async def worker() -> None:
                    while plan:
                        await act(backend, tasks, plan.pop())

                async with trio.open_nursery() as nursery:
                    for _ in range(AT_ONCE):
                        nursery.start_soon(worker)
                for resident in backend.fleet.residents.values():
                    deaths = resident.host.last_death if resident.host else ""
                    assert "memory" not in deaths.lower(), deaths
                    assert resident.host is None or resident.host.deaths <= len(killed)
                assert all(not one.host or not one.host.deaths for one in tasks.residents.values())
                assert 0 < books.counted <= budget and books.looks > rounds
                assert 0 < books.resident <= budget, f"{books.resident} resident bytes, {budget} in the budget"
                assert memory.used == sum(
                    one.footprint.total
                    for one in (*backend.fleet.residents.values(), *tasks.residents.values())
                    if one.in_memory
                )
                watching.cancel_scope.cancel()
        print(
            f"{dict(done)}; at most {books.counted >> 20} MiB counted, {books.resident >> 20} resident, {budget >> 20} allowed"
        )

    trio.run(main)
    assert done["chat"] and done["vectors"], done
