"""The back end that the configuration names, instead of the torch engine in this process. Each is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Final

from node.config import Config
from node.errors import ConfigError, ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.ports import Backend

MAX_KEY: Final = 4096
"""Bytes of a file with a server's key."""

Say = Callable[[str], None]
Watch = Callable[[Manifest], AbstractContextManager[Progress]]


def open_chosen(
    config: Config, store: ModelStore, models: Sequence[Manifest], say: Say, watch: Watch
) -> AbstractAsyncContextManager[Backend]:
    """Opens `engine.backend`, which is not `torch`. Raises `ConfigError`; the block's beginning raises `ModelError`."""
    match config.engine.backend:
        case "openai":
            return _openai(config, store, models, say)
        case "transformers":
            return _transformers(config, store, models, watch)
        case "ray":
            return _ray(config, store, models, say)
        case other:
            raise ConfigError(f"engine.backend is {other!r}", hint="torch, openai, transformers or ray")


def _openai(
    config: Config, store: ModelStore, models: Sequence[Manifest], say: Say
) -> AbstractAsyncContextManager[Backend]:
    from node.runtime.backends.openai_compatible import open_openai
    from node.runtime.backends.openai_meeting import ServerSettings

    given = config.openai
    settings = ServerSettings(
        url=given.url,
        dtype=given.dtype,
        served=given.served,
        kind=given.kind,
        context_length=given.context_length,
        secret=_secret(given.api_key_file),
        max_streams=config.worker.max_streams,
        connect_s=given.connect_ms / 1000,
        first_token_s=given.first_token_ms / 1000,
        stall_s=given.stall_ms / 1000,
        retries=given.retries,
    )
    return open_openai(store, models, settings, say)


def _transformers(
    config: Config, store: ModelStore, models: Sequence[Manifest], watch: Watch
) -> AbstractAsyncContextManager[Backend]:
    from node.runtime.backends.transformers_backend import TransformersSettings, open_transformers

    given = config.engine
    settings = TransformersSettings(
        device=given.device,
        dtype=given.dtype,
        threads=given.threads,
        cache_bytes=given.kv_bytes,
        max_streams=config.worker.max_streams,
    )
    return open_transformers(store, models, settings, watch)


def _ray(
    config: Config, store: ModelStore, models: Sequence[Manifest], say: Say
) -> AbstractAsyncContextManager[Backend]:
    from node.runtime.backend import EngineSettings
    from node.runtime.backends.autoscale import Scale
    from node.runtime.backends.ray_backend import open_ray
    from node.runtime.backends.ray_pool import RaySettings

    engine, given = config.engine, config.ray
    if given.replicas_min > given.replicas_max:
        raise ConfigError(
            f"ray.replicas_min is {given.replicas_min}, above ray.replicas_max, which is {given.replicas_max}",
            hint="set both",
        )
    settings = RaySettings(
        engine=EngineSettings(
            device=engine.device,
            dtype=engine.dtype,
            threads=engine.threads,
            cache_bytes=engine.kv_bytes,
            max_streams=given.streams,
        ),
        address=given.address,
        scale=Scale(given.replicas_min, given.replicas_max, given.up_ms / 1000, given.down_ms / 1000),
        cpus=given.cpus,
        gpus=given.gpus,
        health_s=given.health_ms / 1000,
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
