"""The engines of a fleet's models: started, followed through their models' lives, tested each time they come back, traced, ended.

Rules
- An engine's news are events of its model's life (`node.runtime.life`); what they lead to, the table says.
- An engine that comes up is given a real job before its model is sold. It goes on after a death, as every stream does.
- After a death that job goes first, since it is short: the streams follow when it has passed, or after `FIRST_S` beside it.
- A fault of ours in one model's host ends that model, not the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from node.errors import ModelError
from node.models.tokenizer import Tokenizer
from node.ports import SAMPLING_PARAMS, ModelInfo, Speed, offered_logprobs
from node.runtime import tracing, wire
from node.runtime.engine_settings import EngineSettings
from node.runtime.host import EngineHost
from node.runtime.kernels import CompiledKernels
from node.runtime.launch import Launcher
from node.runtime.life import Event, Phase
from node.runtime.resident import Resident
from node.runtime.selftest import SelfTest
from node.telemetry.engine import EngineMetrics
from protocol.ids import ModelId

log = logging.getLogger(__name__)
FIRST_S: Final = 2.0
"""So long, streams that outlived an engine wait for the test of the next one."""


class Keeper:
    """Made by `node.runtime.fleet.Fleet`, which says which models are in memory."""

    def __init__(
        self,
        settings: EngineSettings,
        launch: Launcher,
        nursery: trio.Nursery,
        test: Callable[[Resident], Awaitable[SelfTest]],
        touch: Callable[[Resident], None],
        kernels: CompiledKernels | None,
    ) -> None:
        """`test` runs the self-test job on a model; `touch` is told that a model was used; without `kernels` each engine compiles
        its own."""
        self._settings = settings
        self._launch = launch
        self._nursery = nursery
        self._test = test
        self._touch = touch
        self._kernels = kernels
        self.speeds: dict[ModelId, Speed] = {}
        """By the last self-test of each model."""

    async def start(self, one: Resident, *, alone: bool) -> None:
        """`alone`: it is the only model. Returns when its engine is ready. Raises `ModelError`."""
        settings, draft = self._settings, one.draft
        if one.tokenizer is None:
            one.tokenizer = Tokenizer(one.folder)
        one.tokenizer.warm()
        load = wire.Load(
            folder=str(one.folder),
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads,
            cache_bytes=settings.cache_bytes,
            window=settings.window,
            # What a GPU's driver maps is not memory of the process, and was not measured under a limit.
            memory_limit=one.footprint.process_limit if settings.device == "cpu" else 0,
            exact=settings.exact,
            runtime=settings.runtime,
            hidden=settings.hidden,
            draft_folder="" if draft is None else str(draft.folder),
            draft_cache_bytes=0 if draft is None else settings.draft_cache_bytes,
            graph_bytes=settings.graphs,
        )
        seen = _Seen()
        if one.metrics is None:
            if settings.trace is not None:
                tracing.from_start(one, settings.trace, alone=alone)
            one.metrics = EngineMetrics(one.manifest.name, one.manifest.context_length)
        one.host = EngineHost(
            self._launch if draft is None else self._launch.seeing(str(draft.folder)),
            load,
            limits=settings.limits,
            heard=lambda: self._heard(one, seen),
            metrics=one.metrics,
            observers=[one.tracing],
            kernels=lambda: self._kernels.given if self._kernels else None,
            test_first=True,
        )
        one.scope = trio.CancelScope()
        await self._nursery.start(self._keep, one)

    async def _keep(self, one: Resident, task_status: trio.TaskStatus[None]) -> None:
        """Run the engine until its scope is cancelled. A fault of ours ends the model, not the worker."""
        host = one.engine()
        try:
            with one.scope:
                await host.run(task_status)
        except ModelError:
            raise
        except Exception as error:
            log.exception("the host of %s failed", one.manifest.name)
            one.trouble = f"a fault of ours: {type(error).__name__}: {error}"[:300]
            one.news(Event.DIED)
            one.news(Event.FLUNKED)
        one.notify()

    async def end(self, one: Resident) -> None:
        """Let its streams end, then its engine; its memory is free then."""
        while one.users:
            await one.changed.wait()
        one.scope.cancel()
        while one.host is not None and not one.host.stopped:
            await one.changed.wait()
        one.host = None

    def trace(self, one: Resident, path: Path, seconds: float) -> None:
        """Trace a model's steps for so long, at most. Raises `ModelError`."""
        self._nursery.start_soon(tracing.end_after, one, tracing.begin(one, path), seconds)

    # ---------------------------------------------------------------------------------------------- what engines do

    def _heard(self, one: Resident, seen: _Seen) -> None:
        """The host's news as events of the model's life."""
        host = one.host
        if host is None:
            return
        if seen.ready and not host.ready:
            seen.ready = False
            one.news(Event.DIED)
        if host.failure != seen.failure:
            seen.failure = one.trouble = host.failure
            if host.failure:
                one.news(Event.FLUNKED)
        if host.ready and not seen.ready:
            seen.ready = True
            self._met(one, host)
            one.news(Event.LOADED)
            if one.phase is Phase.TESTING and not one.examining:
                one.examining = True
                self._nursery.start_soon(self._examine, one, host)
            else:  # among the streams is the test, if there is one
                host.go_on()
        one.notify()

    def _met(self, one: Resident, host: EngineHost) -> None:
        facts = host.facts
        if facts is not None:
            from node.runtime.grammar import Grammars

            one.capacity, one.load_s = facts.capacity, host.load_s
            one.grammars = one.grammars or Grammars(one.folder, facts.eos_ids)
            one.info = ModelInfo(
                id=one.manifest.id,
                name=one.manifest.name,
                context_length=facts.context_length,
                dtype=self._settings.dtype,
                numerics_class=facts.numerics_class,
                params=(*SAMPLING_PARAMS, "response_format", *offered_logprobs(facts.vocab_size)),
            )

    async def _examine(self, one: Resident, host: EngineHost) -> None:
        """The self-test, and what follows from it."""
        self._nursery.start_soon(self._no_longer_first, host)
        try:
            tested: SelfTest = await self._test(one)
        finally:
            host.go_on()
            one.examining = False
            one.notify()
        one.test = tested
        self._touch(one)
        if tested.passed:
            lazy = one.load_s * 1000 if self._settings.lazy and not one.pinned else 0.0
            speed = tested.speed
            self.speeds[one.manifest.id] = Speed(speed.tokens_per_second, round(speed.ttft_ms + lazy, 2))
            if one.phase is Phase.TESTING:
                one.on(Event.PASSED)
            self._learn(one)
        elif one.phase in (Phase.LOADING, Phase.TESTING):
            one.trouble = f"the self-test did not pass: {tested.reason}"
            log.error("%s is not sold: %s", one.manifest.name, one.trouble)
            one.on(Event.FLUNKED)
            while one.users and one.phase is Phase.FAILED:
                await one.changed.wait()
            if one.phase is Phase.FAILED:  # else another engine came, and has a test of its own
                await self.end(one)

    async def _no_longer_first(self, host: EngineHost) -> None:
        await trio.sleep(FIRST_S)
        host.go_on()

    def _learn(self, one: Resident) -> None:
        """Have what its engine had to compile compiled for the next one, now that its speed has been measured."""
        facts = one.host.facts if one.host else None
        if self._kernels is not None and facts is not None and facts.compiled:
            self._nursery.start_soon(self._kernels.learn, facts.compiled)


@dataclass(slots=True)
class _Seen:
    """What was told of a host already."""

    ready: bool = False
    failure: str = ""
