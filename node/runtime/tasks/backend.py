"""Models for tasks beyond chat, loaded and ready, behind `node.ports.TaskBackend`.

Each model has a runner with a lane of its own; every file is hashed against the model's id before it is read (M1), and a fixed
input is computed before the first job, which gives the numerics class and shows that the model works.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import trio

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.models.tasks import tasks_of
from node.ports import ModelInfo, Step, TaskInput
from node.runtime.tasks.runner import Memory, Runner
from protocol.ids import ModelId
from protocol.messages import Params
from protocol.tasks import Task, TaskRequest

_DTYPES: Final = ("float32", "bfloat16")
Watch = Callable[[Manifest], AbstractContextManager[Progress]]
"""Sees a model being hashed."""


@dataclass(frozen=True, slots=True)
class TaskSettings:
    device: str = "cpu"
    """`auto`, or a kind of `node.runtime.hal` with or without an index."""
    """torch's; ONNX models run on the CPU."""
    dtype: str = "float32"
    threads: int = 1
    """Of each model while it computes."""
    max_jobs: int = 4


class TaskModels:
    """What `open_tasks` has loaded."""

    def __init__(self, max_jobs: int) -> None:
        self._max_jobs = max_jobs
        self._active = 0
        self._loaded: dict[ModelId, tuple[ModelInfo, Runner]] = {}

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        return {model: info for model, (info, _) in self._loaded.items()}

    @property
    def free_slots(self) -> int:
        return max(0, self._max_jobs - self._active)

    def memory(self, model: ModelId) -> Memory:
        """What the model needs, to the byte where that is known."""
        return self._runner(model).memory

    def prepare(self, model: ModelId, request: TaskRequest) -> TaskInput:
        """Raises `InputInvalid`, and `ModelError` for a task that the model does not serve."""
        units, content = self._runner(model).prepare(request)
        return TaskInput(model, request, units, content)

    async def run(
        self, prepared: TaskInput, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        """Raises `InputInvalid` and `ModelError`; closing the generator stops the work at its next turn."""
        runner = self._runner(prepared.model)
        self._active += 1
        try:
            async with aclosing(runner.run(prepared.content, params, media)) as steps:
                async for step in steps:
                    yield step
        finally:
            self._active -= 1

    def _runner(self, model: ModelId) -> Runner:
        try:
            return self._loaded[model][1]
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
) -> AsyncIterator[TaskModels]:
    """Load models. Raises `DeviceNotFound`, and `ModelError`, also for bytes that its model id does not commit to (M1)."""
    from node.runtime.hal.probe import chosen

    choice = await trio.to_thread.run_sync(chosen, settings.device)
    settings = replace(settings, device=choice.device.torch_name)
    backend = TaskModels(settings.max_jobs)
    for manifest in models:
        with watch(manifest) as progress:
            await trio.to_thread.run_sync(store.verify, manifest.id, progress)
        runner, numerics = await trio.to_thread.run_sync(_load, store.path(manifest.id), settings)
        info = ModelInfo(
            id=manifest.id,
            name=manifest.name,
            context_length=runner.context_length,
            dtype=settings.dtype,
            numerics_class=numerics,
            tasks=runner.tasks,
            dimensions=runner.dimensions,
        )
        backend._loaded[manifest.id] = info, runner
    yield backend


def _load(folder: Path, settings: TaskSettings) -> tuple[Runner, str]:
    """The runner of a model folder and its numerics class. Raises `ModelError`."""
    import torch

    from node.runtime.engine.errors import EngineError

    torch.set_num_threads(settings.threads)
    load = _LOADERS.get(tasks_of(folder))
    if load is None:
        raise ModelError("this is a model for chats")
    try:
        runner = load(folder, settings)
        outputs = runner.probe()
    except EngineError as error:
        raise ModelError(f"the model cannot be loaded: {error}") from error
    return runner, hashlib.sha256(f"{settings.dtype} {settings.device} ".encode() + outputs).hexdigest()[:32]


def _embed(folder: Path, settings: TaskSettings) -> Runner:
    from node.runtime.tasks.embed import EmbedRunner

    return EmbedRunner(folder, settings.device, _dtype(settings))


def _rerank(folder: Path, settings: TaskSettings) -> Runner:
    from node.runtime.tasks.rerank import RerankRunner

    return RerankRunner(folder, settings.device, _dtype(settings))


def _transcribe(folder: Path, settings: TaskSettings) -> Runner:
    from node.runtime.tasks.transcribe import TranscribeRunner

    return TranscribeRunner(folder, settings.device, _dtype(settings))


def _ocr(folder: Path, settings: TaskSettings) -> Runner:
    try:
        from node.runtime.tasks.ocr import OcrRunner
    except ImportError as error:
        raise ModelError(
            f"OCR needs packages that are missing: {error}", hint="pip install 'gristmill[tasks]'"
        ) from None
    return OcrRunner(folder, settings.threads)


_LOADERS: Final[Mapping[tuple[Task, ...], Callable[[Path, TaskSettings], Runner]]] = MappingProxyType(
    {
        (Task.EMBED, Task.RERANK): _embed,
        (Task.RERANK,): _rerank,
        (Task.TRANSCRIBE,): _transcribe,
        (Task.OCR,): _ocr,
    }
)


def _dtype(settings: TaskSettings) -> Any:
    import torch

    if settings.dtype not in _DTYPES:
        raise ModelError(f"dtype {settings.dtype!r} is not supported; choose one of {', '.join(_DTYPES)}")
    return getattr(torch, settings.dtype)
