"""The back end that the configuration names, instead of the torch engine in this process. Each is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from node.config import Config
from node.errors import ConfigError, ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.ports import Backend

if TYPE_CHECKING:
    from node.runtime.backend import EngineSettings

MAX_KEY: Final = 4096
"""Bytes of a file with a server's key."""

Say = Callable[[str], None]
Watch = Callable[[Manifest], AbstractContextManager[Progress]]


def open_chosen(
    config: Config, engine: EngineSettings, store: ModelStore, models: Sequence[Manifest], say: Say, watch: Watch
) -> AbstractAsyncContextManager[Backend]:
    """Opens `engine.backend`, which is not `torch`. `engine`: how our own engine would be started. Raises `ConfigError`; the
    block's beginning raises `ModelError`."""
    if config.engine.exact and config.engine.backend != "ray":
        raise ConfigError("engine.exact is a mode of our own engine", hint="engine.backend torch or ray")
    if config.engine.draft_models:
        raise ConfigError("engine.draft_models is for our own engine in this machine", hint="engine.backend torch")
    match config.engine.backend:
        case "openai":
            return _openai(config, store, models, say)
        case "transformers":
            return _transformers(config, store, models, watch)
        case "ray":
            return _ray(config, engine, store, models, say)
        case other:
            raise ConfigError(f"engine.backend is {other!r}", hint="torch, openai, transformers or ray")


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


def _transformers(
    config: Config, store: ModelStore, models: Sequence[Manifest], watch: Watch
) -> AbstractAsyncContextManager[Backend]:
    from node.runtime.backends.transformers_backend import FORMATS, TransformersSettings, open_transformers

    engine = config.engine
    if engine.dtype not in FORMATS:
        raise ConfigError(f"transformers does not run {engine.dtype} here", hint=f"engine.dtype {', '.join(FORMATS)}")
    settings = TransformersSettings(
        device=engine.device,
        dtype=engine.dtype,
        threads=engine.threads,
        cache_bytes=engine.kv_bytes,
        max_streams=config.worker.max_streams,
    )
    return open_transformers(store, models, settings, watch)


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
