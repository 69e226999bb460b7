"""`engine.backend` decides who runs the models, and what is wrong with its settings is said before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("torch")

from node.config import Config, load
from node.errors import ConfigError, ModelError
from node.groups import plain_errors
from node.models.store import ModelStore
from node.models.tokenizer import Tokenizer
from node.runtime.backend import EngineSettings
from node.runtime.backends import chosen, ray_backend
from node.runtime.backends.chosen import open_chosen
from node.testing.openai_server import Script, open_scripted
from node.testing.tiny_model import add_tiny
from node.worker.worker import self_test

ENGINE = EngineSettings(
    dtype="int8", exact=True, isolation="process", lazy=True, max_streams=3, trace=Path("trace.json")
)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    def make(**flags: Any) -> Config:
        (tmp_path / "data").mkdir(mode=0o700, exist_ok=True)
        named = {name.replace("__", "."): str(value) for name, value in flags.items()}
        return load(named, environ={"GRISTMILL_DATA_DIR": str(tmp_path / "data"), "PATH": "/bin"})

    return make


def opened(config: Config, store: ModelStore, engine: EngineSettings = ENGINE) -> Any:
    said: list[str] = []
    watch = lambda _: nullcontext(lambda _: None)  # noqa: E731
    return open_chosen(config, engine, store, store.list(), said.append, watch)


def test_each_name_opens_its_back_end(tmp_path: Path, config: Callable[..., Config]) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "source").mkdir()
    store = ModelStore(tmp_path / "store")
    manifest = add_tiny(store, tmp_path / "source")
    key = tmp_path / "key"
    key.write_text("a-secret\nnot this\n")

    async def main() -> None:
        with trio.fail_after(120):
            fallback = config(engine__backend="transformers", engine__device="cpu")
            plain = EngineSettings(isolation="thread")
            async with opened(fallback, store, plain) as backend:
                assert backend._settings.runtime == "transformers" and manifest.id in await self_test(backend)
            tokenizer = Tokenizer(store.path(manifest.id))
            async with open_scripted(tokenizer, Script(answer=(70, 71, 72, 2))) as server:
                given = config(
                    engine__backend="openai",
                    openai__url=server.url,
                    openai__dtype="fp8",
                    openai__served="scripted",
                    openai__api_key_file=key,
                )
                async with opened(given, store) as backend:
                    assert backend.models[manifest.id].dtype == "fp8" and manifest.id in await self_test(backend)
                    assert backend._address.secret == "a-secret" and "a-secret" not in repr(backend._address)

    with plain_errors():
        trio.run(main)


@pytest.mark.parametrize("content", [b"", b"\n", b"with space\n", b"x" * 5000, "schlüssel".encode()])
def test_a_key_that_is_none_is_said(tmp_path: Path, config: Callable[..., Config], content: bytes) -> None:
    key = tmp_path / "key"
    key.write_bytes(content)
    with pytest.raises(ModelError, match="holds no key"):
        opened(config(engine__backend="openai", openai__api_key_file=key), ModelStore(tmp_path))
    key.unlink()
    with pytest.raises(ModelError, match="No such file"):
        opened(config(engine__backend="openai", openai__api_key_file=key), ModelStore(tmp_path))


def test_bounds_that_cross_are_said(tmp_path: Path, config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"above ray\.replicas_max"):
        opened(config(engine__backend="ray", ray__replicas_min=3), ModelStore(tmp_path))


def test_what_is_our_engines_is_not_promised_of_others(tmp_path: Path, config: Callable[..., Config]) -> None:
    for other in ("openai", "transformers", "onnx"):
        with pytest.raises(ConfigError, match="a mode of our own engine"):
            opened(config(engine__backend=other, engine__exact="true"), ModelStore(tmp_path))
    for other in ("openai", "transformers", "ray"):
        with pytest.raises(ConfigError, match="draft_models"):
            opened(config(engine__backend=other, engine__draft_models="large=small"), ModelStore(tmp_path))
    for dtype in ("int8", "int4"):
        with pytest.raises(ConfigError, match=f"does not run {dtype}"):
            opened(config(engine__backend="transformers", engine__dtype=dtype), ModelStore(tmp_path))


def test_a_replica_is_our_engine_as_it_would_be_here(
    tmp_path: Path, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ray_backend, "open_ray", lambda store, models, settings, say: seen.append(settings.engine))
    opened(config(engine__backend="ray", engine__exact="true", ray__streams=7), ModelStore(tmp_path))
    assert seen == [replace(ENGINE, max_streams=7, lazy=False, trace=None)]


@pytest.mark.parametrize("name", ["transformers", "onnx"])
def test_without_its_library_it_says_what_to_install(
    name: str, tmp_path: Path, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="not installed") as caught:
        opened(config(engine__backend=name), ModelStore(tmp_path))
    assert f"gristmill[{name}]" in str(caught.value.hint)


def test_onnx_runs_on_the_processor(tmp_path: Path, config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="on the processor"):
        opened(config(engine__backend="onnx", engine__device="cuda"), ModelStore(tmp_path))


def test_without_ray_it_says_what_to_install(tmp_path: Path, config: Callable[..., Config]) -> None:
    import importlib.util

    if importlib.util.find_spec("ray") is not None:
        pytest.skip("ray is installed here")

    async def main() -> None:
        async with opened(config(engine__backend="ray"), ModelStore(tmp_path)):
            raise RuntimeError("served")

    with pytest.raises(ModelError, match="not installed") as caught, plain_errors():
        trio.run(main)
    assert "gristmill[ray]" in str(caught.value.hint)
