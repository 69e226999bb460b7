"""Models for tasks beyond chat, behind `node.ports.TaskBackend`, in the same budget of memory as the worker's other models.

Each model has a runner of its own, in a process where a launcher is given, else in threads of this one. Every file is hashed
against the model's id before it is read (M1), and a fixed input is computed before the first job, which gives the numerics class
and shows that the model works. What was put out of memory for another is sold on with `lazy`, and loaded when a job wants it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Final

import trio

from node.errors import ModelError
from node.groups import plain_errors
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.models.tasks import tasks_of
from node.ports import ModelInfo, Step, TaskInput
from node.runtime.launch import TASKS, Launcher, launcher
from node.runtime.memory import MemoryBudget, NoRoom, finish
from node.runtime.proof import prove
from node.runtime.supervisor import Limits
from node.runtime.tasks import wire
from node.runtime.tasks.host import LIMITS, TaskHost
from node.runtime.tasks.loading import TaskSettings
from node.runtime.tasks.needs import needs, weighed
from node.runtime.tasks.prepare import Preparer
from node.runtime.tasks.resident import TaskModel
from node.runtime.tasks.runner import Memory, Runner
from protocol.ids import ModelId
from protocol.messages import Params
from protocol.tasks import Task, TaskRequest

Watch = Callable[[Manifest], AbstractContextManager[Progress]]
"""Sees a model being hashed."""
_LOOK_S: Final = 0.05
"""How often a job that waits for room looks again."""


class TaskModels:
    """What `open_tasks` has loaded."""

    def __init__(
        self,
        store: ModelStore,
        settings: TaskSettings,
        memory: MemoryBudget,
        nursery: trio.Nursery,
        launch: Launcher | None,
        *,
        limits: Limits,
        hidden: tuple[str, ...],
        watch: Watch,
    ) -> None:
        self._store = store
        self._settings = settings
        self._memory = memory
        self._nursery = nursery
        self._launch = launch
        self._limits, self._hidden = limits, hidden
        self._watch = watch
        self._active = 0
        self.residents: dict[ModelId, TaskModel] = {}

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        """Those that work now, or are loaded when they are wanted: one whose process is being started again is not among them."""
        return {
            model: one.info
            for model, one in self.residents.items()
            if one.info and (one.ready or (self._settings.lazy and not one.in_memory and not one.trouble))
        }

    @property
    def free_slots(self) -> int:
        return max(0, self._settings.max_jobs - self._active)

    def memory(self, model: ModelId) -> Memory:
        """What the model needs."""
        return self._get(model).memory or Memory(0, 0, 0)

    def prepare(self, model: ModelId, request: TaskRequest) -> TaskInput:
        """Raises `InputInvalid`, and `ModelError` for a task that the model does not serve."""
        units, content = self._get(model).known()(request)
        return TaskInput(model, request, units, content)

    async def run(
        self, prepared: TaskInput, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        """Raises `InputInvalid` and `ModelError`; closing the generator stops the work at its next turn."""
        one = self._get(prepared.model)
        self._active += 1
        try:
            with one.using():
                self._memory.touch(one)
                steps_of = one.steps
                while steps_of is None:
                    await finish(self._nursery, partial(self._wake, one))
                    steps_of = one.steps
                    await trio.sleep(0 if steps_of else _LOOK_S)
                async with aclosing(steps_of(prepared.content, params, media)) as steps:
                    async for step in steps:
                        yield step
        finally:
            self._active -= 1

    def report(self) -> list[dict[str, Any]]:
        """For `status`."""
        return [one.report() for one in self.residents.values()]

    def _get(self, model: ModelId) -> TaskModel:
        try:
            return self.residents[model]
        except KeyError:
            raise ModelError(f"model {model} is not loaded") from None

    # --------------------------------------------------------------------------------------------------------- changes

    async def load(self, manifest: Manifest, *, evict: bool) -> None:
        """Bring a model in. `evict`: others may be put out for it. Raises `ModelError`: no room, damaged, not loadable."""
        pinned = not {manifest.name, str(manifest.id)}.isdisjoint(self._settings.pinned)
        one = self.residents[manifest.id] = TaskModel(manifest, self._store.path(manifest.id), pinned)
        self._memory.join(one, one.end)
        async with self._memory.changing:
            await self._bring_in(one, evict=evict)

    async def _wake(self, one: TaskModel) -> None:
        async with self._memory.changing:
            if one.steps is not None:
                return
            if not self._settings.lazy or one.trouble:
                raise ModelError(one.trouble or f"{one.name} is not in service")
            try:
                await self._bring_in(one, evict=True)
            except NoRoom:
                if not self._memory.could_ever(one):
                    raise

    async def _bring_in(self, one: TaskModel, *, evict: bool) -> None:
        """Whatever is raised, it holds no memory then."""
        settings, jobs = self._settings, self._settings.max_jobs
        try:
            with self._watch(one.manifest) as progress:
                await prove(self._store, one, progress)
            expected = needs(one.folder, one.manifest, settings.dtype, jobs, process=self._launch is not None)
            one.footprint = expected if one.weighed is None else expected.weighed(*one.weighed)
            await self._memory.make_room(one, evict=evict)
            await self._start(one, expected.process_limit if settings.device == "cpu" else 0)
            said = weighed(self.memory(one.manifest.id), jobs)
            if settings.device == "cpu" and sum(said) > expected.process_limit:
                raise ModelError(f"its process says that it needs {sum(said)} bytes, more than it may have")
            one.weighed = said
            await self._memory.weigh(one, *said, evict=evict)
        except BaseException as error:
            one.hashing, one.loading = None, False
            with trio.CancelScope(shield=True):
                await self._give_up(one)
            if isinstance(error, ModelError) and not isinstance(error, NoRoom):
                one.trouble = error.message
            raise

    async def _give_up(self, one: TaskModel) -> None:
        if one.host is not None:
            one.scope.cancel()
            await one.over.wait()
        one.steps = one.host = None

    async def _start(self, one: TaskModel, memory_limit: int) -> None:
        settings, manifest = self._settings, one.manifest
        one.loading = True
        if self._launch is None:
            from node.runtime.tasks.loading import load_runner

            runner: Runner
            runner, numerics = await trio.to_thread.run_sync(load_runner, one.folder, settings)
            one.memory = runner.memory
            one.info = _info(manifest, settings, numerics, runner.tasks, runner.context_length, runner.dimensions)
            steps = runner.run
        else:
            load = wire.Load(
                str(one.folder), settings.device, settings.dtype, settings.threads, memory_limit, self._hidden
            )
            one.host = TaskHost(self._launch, load, self._limits)
            one.scope, one.over = trio.CancelScope(), trio.Event()
            await self._nursery.start(self._keep, one, one.host)
            facts = one.host.facts
            if facts is None or facts.tasks != tasks_of(one.folder):
                raise ModelError(f"{manifest.name}: its process serves other tasks than its config.json says")
            one.memory = one.host.memory
            one.info = _info(
                manifest, settings, facts.numerics_class, facts.tasks, facts.context_length, facts.dimensions
            )
            steps = one.host.steps
        one.preparer = one.preparer or Preparer(one.folder, one.info.tasks, one.info.context_length)
        one.steps, one.loading = steps, False

    async def _keep(self, one: TaskModel, host: TaskHost, task_status: trio.TaskStatus[None]) -> None:
        try:
            with one.scope:
                await host.run(task_status)
        finally:
            one.over.set()


def is_task_model(store: ModelStore, manifest: Manifest) -> bool:
    """Whether `open_tasks` is for this model, not the chat back end. Raises `ModelError`."""
    return Task.CHAT not in tasks_of(store.path(manifest.id))


@asynccontextmanager
async def open_tasks(
    store: ModelStore,
    models: Sequence[Manifest],
    settings: TaskSettings,
    watch: Watch = lambda _: nullcontext(lambda _: None),
    *,
    isolation: str = "thread",
    launch: Launcher | None = None,
    limits: Limits = LIMITS,
    hidden: tuple[str, ...] = (),
    memory: MemoryBudget | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[TaskModels]:
    """Load models. One for which there is no room is left out, unless it is the only one, and `say` hears of it.

    Raises `DeviceNotFound`, and `ModelError`, also for bytes that its model id does not commit to (M1).

    `isolation`: as `engine.isolation`; `thread` runs the models in this process. `launch`: how a model's process is started, if
    not by `isolation`. `hidden`: what they should not be able to read. `memory`: shared with models that are not among these.
    """
    from node.runtime.hal.probe import chosen

    if launch is None and isolation != "thread":
        launch = await launcher(isolation, TASKS)
    choice = await trio.to_thread.run_sync(chosen, settings.device)
    settings = replace(settings, device=choice.device.torch_name)
    memory = memory or MemoryBudget()
    memory.limit = memory.limit or choice.device.memory_total
    with plain_errors():
        async with trio.open_nursery() as nursery:
            backend = TaskModels(store, settings, memory, nursery, launch, limits=limits, hidden=hidden, watch=watch)
            try:
                missing: list[NoRoom] = []
                for manifest in models:
                    try:
                        await backend.load(manifest, evict=settings.lazy)
                    except NoRoom as error:
                        missing.append(error)
                        say(f"{manifest.name} is not sold: {error.message}")
                if missing and not backend.models:
                    raise missing[0]
                yield backend
            finally:
                for one in backend.residents.values():
                    memory.leave(one)
                nursery.cancel_scope.cancel()


def _info(
    manifest: Manifest, settings: TaskSettings, numerics: str, tasks: tuple[Task, ...], context: int, dimensions: int
) -> ModelInfo:
    return ModelInfo(
        id=manifest.id,
        name=manifest.name,
        context_length=context,
        dtype=settings.dtype,
        numerics_class=numerics,
        tasks=tasks,
        dimensions=dimensions,
    )
