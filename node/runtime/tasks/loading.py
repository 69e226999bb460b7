"""From a model folder to a runner that has computed once. Loads torch: run it where the model is to live."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from node.errors import ModelError
from node.models.tasks import tasks_of
from node.runtime.tasks.runner import Runner
from protocol.tasks import Task

_DTYPES: Final = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class TaskSettings:
    device: str = "cpu"
    """`auto`, or a kind of `node.runtime.hal` with or without an index; ONNX models run on the CPU."""
    dtype: str = "float32"
    threads: int = 1
    """Of each model while it computes."""
    max_jobs: int = 4
    pinned: tuple[str, ...] = ()
    """Names or ids of models that are never put out of memory for another."""
    lazy: bool = False
    """Models that were put out of memory are sold on, and loaded when a job wants them."""


def load_runner(folder: Path, settings: TaskSettings) -> tuple[Runner, str]:
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
