"""Libraries that compute in an engine's process are treated as our own engine is: not in the node, behind its walls, tested again
after each start, streams unbroken."""

from __future__ import annotations

import os
import signal
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

pytest.importorskip("torch")
pytest.importorskip("transformers")

from node.groups import plain_errors
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.ports import Prompt
from node.runtime.backend import EngineSettings, TorchBackend, open_backend
from node.testing.tiny_model import add_tiny
from protocol.messages import Params


def added(store: ModelStore, root: Path, runtime: str) -> Manifest:
    """A tiny Llama in the form that this library reads."""
    (root / "tiny").mkdir()
    tiny = add_tiny(store, root / "tiny")
    if runtime == "transformers":
        return tiny
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx", reason="the exporter needs it")
    from node.testing.onnx_export import export

    (root / "exported").mkdir()
    return store.add_folder(export(store.path(tiny.id), root / "exported"), "exported")


async def ids_of(backend: TorchBackend, prompt: Prompt, params: Params) -> list[int]:
    found: list[int] = []
    async with aclosing(backend.generate(prompt, params)) as steps:
        async for step in steps:
            found += step.token_ids
    return found


@pytest.mark.parametrize("runtime", ["transformers", "onnx"])
def test_it_runs_in_a_process_of_its_own_and_a_killed_one_is_resumed(runtime: str, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    manifest = added(store, tmp_path, runtime)
    secret = tmp_path / "key"
    secret.write_text("secret")
    settings = EngineSettings(runtime=runtime, isolation="auto", hidden=(str(secret),))

    async def test(backend: TorchBackend) -> None:
        (report,) = backend.report()
        assert report["self_test"]["passed"] and report["isolation"].startswith(("bwrap:", "process:"))
        if report["isolation"].startswith("bwrap:"):
            assert "OPEN" not in report["isolation"], report["isolation"]
        host = backend.fleet.get(manifest.id).engine()
        assert host.pid is not None and host.pid != os.getpid()
        params = Params(max_tokens=200, temperature=1.0, seed=4)
        first, second = (Prompt(manifest.id, tuple(range(start, start + 20))) for start in (5, 50))
        wanted = {prompt: await ids_of(backend, prompt, params) for prompt in (first, second)}
        assert min(map(len, wanted.values())) > 20, "an answer that ends before the kill shows nothing"
        found: dict[Prompt, list[int]] = {first: [], second: []}

        async def one(prompt: Prompt) -> None:
            async with aclosing(backend.generate(prompt, params)) as steps:
                async for step in steps:
                    found[prompt] += step.token_ids
                    if len(found[first]) >= 20 and host.deaths == 0 and host.pid is not None:
                        os.kill(host.pid, signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, first)
            nursery.start_soon(one, second)
        assert found == wanted and host.deaths == 1
        while manifest.id not in backend.models:
            await trio.sleep(0.02)

    async def main() -> None:
        with trio.fail_after(120):
            async with open_backend(store, [manifest], settings) as backend:
                await test(backend)

    with plain_errors():
        trio.run(main)
