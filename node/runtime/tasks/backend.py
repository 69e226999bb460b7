"""Models for tasks beyond chat, loaded and ready, behind `node.ports.TaskBackend`.

Each model has a runner of its own, in a process where a launcher is given, else in threads of this one. Every file is hashed
against the model's id before it is read (M1), and a fixed input is computed before the first job, which gives the numerics class
and shows that the model works.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from node.errors import ModelError
from node.groups import plain_errors
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.models.tasks import tasks_of
from node.ports import ModelInfo, Step, TaskInput
from node.runtime.launch import TASKS, Launcher, launcher
from node.runtime.supervisor import Limits
from node.runtime.tasks import wire
from node.runtime.tasks.host import LIMITS, TaskHost
from node.runtime.tasks.loading import TaskSettings
from node.runtime.tasks.prepare import Preparer
from node.runtime.tasks.runner import Memory, Runner
from protocol.ids import ModelId
from protocol.messages import Params
from protocol.tasks import Task, TaskRequest

Watch = Callable[[Manifest], AbstractContextManager[Progress]]
"""Sees a model being hashed."""
Steps = Callable[[Any, Params, AsyncGenerator[bytes, None]], AsyncGenerator[Step, None]]


@dataclass(frozen=True, slots=True)
class _Loaded:
    info: ModelInfo
    prepare: Preparer
    steps: Steps
    memory: Memory
    host: TaskHost | None
    """None in a thread."""


class TaskModels:
    """What `open_tasks` has loaded."""

    def __init__(self, max_jobs: int) -> None:
        self._max_jobs = max_jobs
        self._active = 0
        self._loaded: dict[ModelId, _Loaded] = {}

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        """Those that work now: one whose process is being started again is not among them."""
        return {model: one.info for model, one in self._loaded.items() if one.host is None or one.host.ready}

    @property
    def free_slots(self) -> int:
        return max(0, self._max_jobs - self._active)

    def memory(self, model: ModelId) -> Memory:
        """What the model needs."""
        return self._get(model).memory

    def prepare(self, model: ModelId, request: TaskRequest) -> TaskInput:
        """Raises `InputInvalid`, and `ModelError` for a task that the model does not serve."""
        units, content = self._get(model).prepare(request)
        return TaskInput(model, request, units, content)

    async def run(
        self, prepared: TaskInput, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        """Raises `InputInvalid` and `ModelError`; closing the generator stops the work at its next turn."""
        one = self._get(prepared.model)
        self._active += 1
        try:
            async with aclosing(one.steps(prepared.content, params, media)) as steps:
                async for step in steps:
                    yield step
        finally:
            self._active -= 1

    def _get(self, model: ModelId) -> _Loaded:
        try:
            return self._loaded[model]
        except KeyError:
            raise ModelError(f"model {model} is not loaded") from None


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
) -> AsyncIterator[TaskModels]:
    """Load models. Raises `DeviceNotFound`, and `ModelError`, also for bytes that its model id does not commit to (M1).

    `isolation`: as `engine.isolation`; `thread` runs the models in this process. `launch`: how a model's process is started, if
    not by `isolation`. `hidden`: what they should not be able to read.
    """
    from node.runtime.hal.probe import chosen

    if launch is None and isolation != "thread":
        launch = await launcher(isolation, TASKS)

    choice = await trio.to_thread.run_sync(chosen, settings.device)
    settings = replace(settings, device=choice.device.torch_name)
    backend = TaskModels(settings.max_jobs)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            for manifest in models:
                with watch(manifest) as progress:
                    await trio.to_thread.run_sync(store.verify, manifest.id, progress)
                folder = store.path(manifest.id)
                if launch is None:
                    loaded = await _in_thread(manifest, folder, settings)
                else:
                    load = wire.Load(str(folder), settings.device, settings.dtype, settings.threads, hidden=hidden)
                    host = TaskHost(launch, load, limits)
                    await nursery.start(host.run)
                    loaded = _in_process(manifest, folder, settings, host)
                backend._loaded[manifest.id] = loaded
            try:
                yield backend
            finally:
                nursery.cancel_scope.cancel()


async def _in_thread(manifest: Manifest, folder: Path, settings: TaskSettings) -> _Loaded:
    from node.runtime.tasks.loading import load_runner

    runner: Runner
    runner, numerics = await trio.to_thread.run_sync(load_runner, folder, settings)
    info = _info(manifest, settings, numerics, runner.tasks, runner.context_length, runner.dimensions)
    return _Loaded(info, Preparer(folder, info.tasks, info.context_length), runner.run, runner.memory, None)


def _in_process(manifest: Manifest, folder: Path, settings: TaskSettings, host: TaskHost) -> _Loaded:
    facts = host.facts
    if facts is None or facts.tasks != tasks_of(folder):
        raise ModelError(f"{manifest.name}: its process serves other tasks than its config.json says")
    info = _info(manifest, settings, facts.numerics_class, facts.tasks, facts.context_length, facts.dimensions)
    return _Loaded(info, Preparer(folder, info.tasks, info.context_length), host.steps, host.memory, host)


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
