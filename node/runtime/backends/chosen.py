"""The back end that the configuration names, instead of our own engine. Each is imported when it is chosen.

Libraries that compute run where our engine would: in a process of their own behind the same walls, restarted and tested alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from node.config import Config
from node.errors import ConfigError, ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.ports import Backend

if TYPE_CHECKING:
    from node.runtime.backend import EngineSettings
    from node.runtime.memory import MemoryBudget

FORMATS: Final = ("float32", "bfloat16", "float16")
"""What `transformers` can compute in here."""
_PACKAGES: Final = {"transformers": ("transformers", "transformers"), "onnx": ("onnxruntime", "onnx")}
"""Runtime -> what is imported, and the extra that brings it."""
MAX_KEY: Final = 4096
"""Bytes of a file with a server's key."""

Say = Callable[[str], None]
Watch = Callable[[Manifest], AbstractContextManager[Progress]]


def open_chosen(
    config: Config,
    engine: EngineSettings,
    store: ModelStore,
    models: Sequence[Manifest],
    say: Say,
    watch: Watch,
    memory: MemoryBudget | None = None,
) -> AbstractAsyncContextManager[Backend]:
    """Opens `engine.backend`, which is not `torch`. `engine`: how our own engine would be started. `memory`: shared with models
    that are not among these, by back ends that compute here. Raises `ConfigError`; the block's beginning raises `ModelError`."""
    if config.engine.exact and config.engine.backend != "ray":
        raise ConfigError("engine.exact is a mode of our own engine", hint="engine.backend torch or ray")
    if config.engine.draft_models:
        raise ConfigError("engine.draft_models is for our own engine in this machine", hint="engine.backend torch")
    match config.engine.backend:
        case "openai":
            return _openai(config, store, models, say)
        case "transformers":
            if config.engine.dtype not in FORMATS:
                raise ConfigError(
                    f"transformers does not run {config.engine.dtype} here", hint=f"engine.dtype {', '.join(FORMATS)}"
                )
            return _library(replace(engine, runtime="transformers"), store, models, say, watch, memory)
        case "onnx":
            if config.engine.device not in ("auto", "cpu"):
                raise ConfigError("ONNX Runtime computes on the processor here", hint="engine.device cpu")
            return _library(replace(engine, runtime="onnx", device="cpu"), store, models, say, watch, memory)
        case "ray":
            return _ray(config, engine, store, models, say)
        case other:
            raise ConfigError(f"engine.backend is {other!r}", hint="torch, openai, transformers, onnx or ray")


def _openai(
    config: Config, store: ModelStore, models: Sequence[Manifest], say: Say
) -> AbstractAsyncContextManager[Backend]:
    from node.runtime.backends.openai_compatible import open_openai
    from node.runtime.backends.openai_meeting import ServerSettings

    server = config.openai
    settings = ServerSettings(
        url=server.url,
        dtype=server.dtype,
        served=server.served,
        kind=server.kind,
        context_length=server.context_length,
        secret=_secret(server.api_key_file),
        max_streams=config.worker.max_streams,
        connect_s=server.connect_ms / 1000,
        first_token_s=server.first_token_ms / 1000,
        stall_s=server.stall_ms / 1000,
        retries=server.retries,
    )
    return open_openai(store, models, settings, say)


def _library(
    engine: EngineSettings,
    store: ModelStore,
    models: Sequence[Manifest],
    say: Say,
    watch: Watch,
    memory: MemoryBudget | None,
) -> AbstractAsyncContextManager[Backend]:
    """`engine.runtime` in engines' processes. What is missing is said before one is started."""
    if engine.drafts:
        raise ConfigError("draft models guess for our own engine only", hint="unset engine.draft_models")
    from node.runtime.backend import open_backend

    package, extra = _PACKAGES[engine.runtime]
    if find_spec(package) is None:
        raise ModelError(
            f"the back end `{engine.runtime}` needs a package that is not installed",
            hint=f"pip install 'gristmill[{extra}]'",
        )
    return open_backend(
        store,
        models,
        engine,
        watch,
        lambda choice: say(f"models run on {choice.device.label}: {choice.why}"),
        say=say,
        memory=memory,
    )


def _ray(
    config: Config, engine: EngineSettings, store: ModelStore, models: Sequence[Manifest], say: Say
) -> AbstractAsyncContextManager[Backend]:
    from node.runtime.backends.autoscale import Scale
    from node.runtime.backends.ray_backend import open_ray
    from node.runtime.backends.ray_pool import RaySettings

    ray = config.ray
    if ray.replicas_min > ray.replicas_max:
        raise ConfigError(
            f"ray.replicas_min is {ray.replicas_min}, above ray.replicas_max, which is {ray.replicas_max}",
            hint="set both",
        )
    settings = RaySettings(
        # All replicas must have the same models ready, always; and nobody looks for a trace on their machines.
        engine=replace(engine, max_streams=ray.streams, lazy=False, trace=None),
        address=ray.address,
        scale=Scale(ray.replicas_min, ray.replicas_max, ray.up_ms / 1000, ray.down_ms / 1000),
        cpus=ray.cpus,
        gpus=ray.gpus,
        health_s=ray.health_ms / 1000,
    )
    return open_ray(store, models, settings, say)


def _secret(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            line = file.read(MAX_KEY + 1).split(b"\n", 1)[0].strip()
    except OSError as error:
        raise ModelError(f"openai.api_key_file: {error.strerror or error}") from None
    if not line or len(line) > MAX_KEY or not all(0x21 <= byte < 0x7F for byte in line):
        raise ModelError("openai.api_key_file holds no key in its first line")
    return line.decode()
