"""The chat models of one worker: loaded, tested, swapped, put out of memory, kept alive, under one budget (`memory`).

Rules
- Memory is counted before it is used, by an estimate, and again when the engine has loaded, by what it says that it holds.
- What is not tested is not sold: a model is ready when a real job has passed since its engine last started.
- One change of the fleet at a time; streams do not wait for changes of other models.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Final

import trio

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.ports import ModelInfo
from node.runtime.drafts import draft_of
from node.runtime.engine_settings import EngineSettings
from node.runtime.footprint import Footprint, measure, measure_library
from node.runtime.keeper import Keeper
from node.runtime.kernels import CompiledKernels
from node.runtime.launch import Launcher
from node.runtime.life import Event, Phase
from node.runtime.memory import MemoryBudget, NoRoom, finish
from node.runtime.packing import Packing
from node.runtime.proof import prove
from node.runtime.resident import Resident
from node.runtime.selftest import SelfTest
from protocol.ids import ModelId

Watch = Callable[[Manifest], AbstractContextManager[Progress]]
"""Sees a model being hashed."""
_LOOK_S: Final = 0.05
"""How often a job that waits for room looks again."""


class Fleet:
    """Made and run by `node.runtime.backend.open_backend`."""

    def __init__(
        self,
        store: ModelStore,
        settings: EngineSettings,
        launch: Launcher,
        nursery: trio.Nursery,
        test: Callable[[Resident], Awaitable[SelfTest]],
        watch: Watch = lambda _: nullcontext(lambda _: None),
        memory: MemoryBudget | None = None,
        kernels: CompiledKernels | None = None,
    ) -> None:
        """`test` runs the self-test job on a model. `memory`: shared with other models of the worker; by default these have
        `settings.memory_budget` for themselves. `kernels`: see `Keeper`."""
        self._store = store
        self._settings = settings
        self._launch = launch
        self._nursery = nursery
        self._watch = watch
        self._memory = memory or MemoryBudget(settings.memory_budget)
        self.residents: dict[ModelId, Resident] = {}
        self.keeper = Keeper(settings, launch, nursery, test, self._memory.touch, kernels)

    # ------------------------------------------------------------------------------------------------------- questions

    @property
    def sold(self) -> Mapping[ModelId, ModelInfo]:
        """What may be advertised now."""
        return {model: one.info for model, one in self.residents.items() if one.info and self.on_sale(one)}

    def on_sale(self, one: Resident) -> bool:
        return one.ready or (self._settings.lazy and one.phase is Phase.COLD and bool(one.test and one.test.passed))

    @property
    def used(self) -> int:
        """Bytes of all models of the worker in memory."""
        return self._memory.used

    def could_warm(self, one: Resident) -> bool:
        """Whether a cold model could be brought in now."""
        return self._memory.could_take(one)

    def get(self, model: ModelId) -> Resident:
        try:
            return self.residents[model]
        except KeyError:
            raise ModelError(f"model {model} is not loaded") from None

    def touch(self, one: Resident) -> None:
        self._memory.touch(one)

    # --------------------------------------------------------------------------------------------------------- changes

    async def load(self, manifest: Manifest, *, evict: bool = True) -> Resident:
        """Bring a model in and test it. Idempotent. `evict`: others may be put out for it. Raises `ModelError`: no room, damaged,
        not loadable, test not passed."""
        async with self._memory.changing:
            one = self._known(manifest)
            if not one.ready:
                await self._bring_in(one, evict=evict)
            return one

    async def warm(self, one: Resident) -> None:
        """For a job: a model that is sold is in memory after this. Waits while streams of others have the room.

        Raises `ModelError`."""
        while True:
            if one.phase is Phase.DRAINING and one.ending:
                await one.changed.wait()
            elif one.ready or (one.host is not None and one.host.facts is not None):
                return  # it runs, or is started again
            else:
                await finish(self._nursery, partial(self._wake, one))
                await trio.sleep(0 if one.ready else _LOOK_S)

    async def _wake(self, one: Resident) -> None:
        async with self._memory.changing:
            if self.residents.get(one.manifest.id) is not one or not self.on_sale(one):
                raise ModelError(one.trouble or f"{one.manifest.name} is not in service")
            if one.phase is Phase.COLD:
                try:
                    await self._bring_in(one)
                except NoRoom:
                    if not self._memory.could_ever(one):
                        raise

    async def unload(self, model: ModelId) -> None:
        """Let a model's streams end, then free its memory."""
        async with self._memory.changing:
            await self._put_out(self.get(model))
            self._forget(model)

    async def swap(self, old: ModelId, manifest: Manifest) -> bool:
        """Replace a model by another; no stream is cut. True when both were in memory for a while, so that there was no moment
        without either; False when there was room for one only, and the old one had to end first."""
        async with self._memory.changing:
            leaving, coming = self.get(old), self._known(manifest)
            if leaving is coming:
                raise ModelError(f"{manifest.name} is the same model")
            try:
                await self._bring_in(coming, keep=leaving)
                beside = True
            except NoRoom:
                beside = False
                await self._put_out(leaving)
                await self._bring_in(coming)
            else:
                await self._put_out(leaving)
            self._forget(old)
            return beside

    def _known(self, manifest: Manifest) -> Resident:
        one = self.residents.get(manifest.id)
        if one is None:
            pinned = not {manifest.name, str(manifest.id)}.isdisjoint(self._settings.pinned)
            one = self.residents[manifest.id] = Resident(manifest, self._store.path(manifest.id), pinned)
            self._memory.join(one, partial(self._put_out, one))
        return one

    def _forget(self, model: ModelId) -> None:
        one = self.residents.pop(model)
        self._memory.leave(one)
        one.close()
        self.keeper.speeds.pop(model, None)

    async def _bring_in(self, one: Resident, *, evict: bool = True, keep: Resident | None = None) -> None:
        """Load and test. Whatever is raised, the model holds no memory then, or will hold none once its streams have ended."""
        if one.host is not None:  # it failed, and its engine is still being tried
            await self._put_out(one)
        one.on(Event.LOAD)
        one.trouble = ""
        try:
            with self._watch(one.manifest) as progress:
                await prove(self._store, one, progress)
                one.draft = draft_of(self._store, self._settings.drafts, one.manifest)
                if one.draft is not None:
                    await prove(self._store, one.draft, progress)
            one.footprint = self._footprint(one)
            await self._memory.make_room(one, evict=evict, keep=keep)
            await self.keeper.start(one, alone=len(self.residents) == 1)
        except BaseException as error:
            one.host = one.hashing = None
            one.trouble = error.message if isinstance(error, ModelError) else "the load was broken off"
            if isinstance(error, NoRoom):  # nothing is wrong with it
                one.on(Event.UNLOAD)
                one.on(Event.EMPTY)
            one.news(Event.FLUNKED)
            raise
        await self._weigh(one, evict, keep)
        while one.phase in (Phase.LOADING, Phase.TESTING):
            await one.changed.wait()
        if not one.ready:
            raise ModelError(f"{one.manifest.name}: {one.trouble or one.phase}")

    def _footprint(self, one: Resident) -> Footprint:
        """As it is known: by the engine that had it last, or an estimate."""
        settings = self._settings
        packing = Packing(settings.dtype, cpu=settings.device == "cpu", few_rows=not settings.exact)
        if settings.runtime == "torch":
            found = measure(one.folder, one.manifest, packing, settings.cache_bytes)
        else:
            found = measure_library(one.folder, one.manifest, settings.runtime, packing, settings.cache_bytes)
        if one.draft is not None:
            packing, cache = replace(packing, few_rows=True), settings.draft_cache_bytes
            found = found.beside(measure(one.draft.folder, one.draft.manifest, packing, cache, spare=0))
        found = replace(
            found,
            graphs=settings.graphs,
            process=0 if self._launch.mode == "thread" else found.process,
        )
        return found if one.weighed is None else found.weighed(*one.weighed)

    async def _weigh(self, one: Resident, evict: bool, keep: Resident | None) -> None:
        """Hold the estimate against what its engine says, which is not trusted to put others out by a lie. Raises `ModelError`
        when it is too much; its engine has ended then."""
        facts = one.host.facts if one.host else None
        if facts is None:
            return
        said = facts.weight_bytes, facts.cache_bytes
        try:
            if self._settings.device == "cpu" and sum(said) > one.footprint.process_limit:
                raise ModelError(f"its engine says that it holds {sum(said)} bytes, more than its process may have")
            one.weighed = said
            await self._memory.weigh(one, *said, evict=evict, keep=keep)
        except ModelError as error:
            await self._put_out(one)
            while one.examining:
                await one.changed.wait()
            one.trouble = error.message
            raise

    async def _put_out(self, one: Resident) -> None:
        """Let its streams end, then its engine."""
        if one.phase is Phase.COLD:
            return
        if one.phase is not Phase.DRAINING:
            one.on(Event.UNLOAD)
        await self.keeper.end(one)
        one.on(Event.EMPTY)
