"""How long a model is away when its engine dies in the middle of a batch, and whether its streams notice.

SmolLM2-135M-Instruct in an engine process of its own, with streams under way, greedy and sampled. The engine is killed (SIGKILL),
stopped (SIGSTOP: it hangs), or runs out of memory (its limit is lowered under it, then longer prompts come). Beside it the same
model's load without a death, its self-test included.

Figures, medians of `--runs` (default 3), in seconds: `load_s` and `load_and_test_s` without a death. By way of death, from the
moment of the harm on: `_noticed_s`; `_running_s`, another engine is loaded; `_resumed_s`, all streams that were under way have
brought their next token; `_sold_s`, it has passed its self-test, and new jobs are taken; and `_beyond_load_s`, what of `_sold_s`
is not the load, which is what the bar of 5 s is for. `engine.hang_ms` has its default. The third hang in a row is noticed later
than the first two, since it might be a slow machine: `hung_noticed_each_s` has them all. `streams_identical`: of all streams, how
many brought exactly the tokens that they bring when nothing dies.
"""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from statistics import median
from typing import Any

import trio

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NAME = "smollm2-135m-instruct"
STREAMS = 4
LONGS = 8
"""Long prompts that come when memory is short: so many that a step takes more of them than it ever had memory for."""
TOKENS = 48
LONG = "The sea is salty because rivers carry minerals from the land into it. " * 34


def run(args: Any = None) -> dict[str, Any]:
    result: dict[str, Any] = trio.run(_run, getattr(args, "runs", None) or 3)
    return result


async def _run(runs: int) -> dict[str, Any]:
    from node.models.packages import add_known
    from node.models.store import ModelStore
    from node.runtime.backend import open_backend
    from node.runtime.engine_settings import EngineSettings

    with tempfile.TemporaryDirectory() as scratch:
        store = ModelStore(Path(os.environ.get("GRISTMILL_TEST_MODELS") or scratch))
        manifest = next((one for one in store.list() if one.name == NAME), None) or add_known(store, NAME)
        settings = EngineSettings(cache_bytes=256 << 20, max_streams=STREAMS + LONGS)
        async with open_backend(store, [manifest], settings) as backend:
            return await _Bench(backend, manifest, settings.limits.hang_s).measure(runs)


class _Bench:
    def __init__(self, backend: Any, manifest: Any, hang_s: float) -> None:
        self.backend = backend
        self.manifest = manifest
        self.hang_s = hang_s
        self.identical = self.streams = 0

    @property
    def one(self) -> Any:
        return self.backend.fleet.get(self.manifest.id)

    async def measure(self, runs: int) -> dict[str, Any]:
        from node.runtime.walls import words

        wanted = [[token async for token in self._answer(n)] for n in range(STREAMS + LONGS)]
        loads, tests = [], []
        for _ in range(runs):
            await self.backend.fleet.unload(self.manifest.id)
            began = time.perf_counter()
            await self.backend.fleet.load(self.manifest)
            tests.append(time.perf_counter() - began)
            loads.append(self.one.load_s)
        figures: dict[str, Any] = {
            "load_s": round(median(loads), 2),
            "load_and_test_s": round(median(tests), 2),
        }
        for way, harm, long in (("killed", _kill, 0), ("hung", _stop, 0), ("out_of_memory", _starve, LONGS)):
            found = [await self._death(harm, wanted[: STREAMS + long]) for _ in range(runs)]
            if way == "hung":
                figures["hung_noticed_each_s"] = [round(one["noticed"], 2) for one in found]
            for name in found[0]:
                figures[f"{way}_{name}_s"] = round(median(one[name] for one in found), 2)
        figures["streams_identical"] = f"{self.identical} of {self.streams}"
        host = self.one.engine()
        return {
            "figures": figures,
            "conditions": {
                "runs": runs,
                "streams": STREAMS,
                "tokens": TOKENS,
                "hang_s": self.hang_s,
                "load_average": [round(value, 1) for value in os.getloadavg()],
                "engine": words(host.mode, host.facts.walls),
            },
        }

    async def _death(self, harm: Callable[[int], None], wanted: list[list[int]]) -> dict[str, float]:
        """Harm the engine in the middle of a batch; seconds by what they are of."""
        got: list[list[int]] = [[] for _ in wanted]
        deaths = self.one.engine().deaths
        began = 0.0
        resumed: dict[int, float] = {}

        async def read(n: int) -> None:
            async for token in self._answer(n):
                if began and self.one.engine().deaths > deaths:
                    resumed.setdefault(n, time.perf_counter() - began)
                got[n].append(token)

        async with trio.open_nursery() as nursery:
            for n in range(STREAMS):
                nursery.start_soon(read, n)
            while not all(len(tokens) > 4 for tokens in got[:STREAMS]):
                await trio.sleep(0.005)
            harm(_innermost(self.one.engine().pid))
            began = time.perf_counter()
            for n in range(STREAMS, len(wanted)):
                nursery.start_soon(read, n)
            with trio.move_on_after(120):
                while self.one.ready:
                    await self.one.changed.wait()
            if self.one.ready:
                raise RuntimeError("the engine lives on")
            noticed = time.perf_counter() - began
            while not self.one.engine().ready:
                await self.one.changed.wait()
            running = time.perf_counter() - began
            while not self.one.ready:
                await self.one.changed.wait()
            sold = time.perf_counter() - began
        if self.one.engine().deaths != deaths + 1:
            raise RuntimeError(f"the engine died another time: {self.one.engine().last_death}")
        if not all(n in resumed for n in range(STREAMS)):
            raise RuntimeError("a stream was over before the engine died")
        self.streams += len(wanted)
        self.identical += sum(mine == theirs for mine, theirs in zip(got, wanted, strict=True))
        return {
            "noticed": noticed,
            "running": running,
            "resumed": max(resumed[n] for n in range(STREAMS)),
            "sold": sold,
            "beyond_load": sold - self.one.load_s,
        }

    async def _answer(self, n: int) -> Any:
        """Tokens of the n-th stream: the last ones have long prompts, every second one is sampled."""
        from protocol.messages import ChatMessage, Params

        text = f"{n}. {LONG}" if n >= STREAMS else f"Tell me {n + 2} things about the number {n}."
        params = Params(max_tokens=TOKENS, temperature=float(n % 2), seed=n)
        prompt = self.backend.prepare(self.manifest.id, [ChatMessage("user", text)])
        async with aclosing(self.backend.generate(prompt, params)) as steps:
            async for step in steps:
                for token in step.token_ids:
                    yield token


def _innermost(pid: int) -> int:
    """The process that computes: the started one, or the innermost child of the sandbox that was started."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def _starve(pid: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_DATA, (1 << 20, 1 << 20))
