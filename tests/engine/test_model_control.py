"""`models load|unload|swap` and `status`, over the control socket of a worker's fleet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("torch")

from node.cli.main import Shared
from node.cli.model_control import model_handlers, watched
from node.cli.status import _model
from node.models.store import ModelStore
from node.runtime.backend import TorchBackend, open_backend
from node.runtime.engine_settings import EngineSettings
from node.runtime.launch import ThreadLauncher
from node.worker import control
from node.worker.control import ControlFailed, NotRunning
from protocol.messages import ChatMessage, Params


def test_a_running_worker_changes_its_models_on_request(make_chat_model: Callable[..., Path], tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    for layers in (1, 2):
        store.add_folder(make_chat_model(num_hidden_layers=layers), f"tiny-{layers}")
    shared = Shared(flags={"data_dir": str(tmp_path)})

    async def ask(action: str, **arguments: Any) -> dict[str, Any]:
        return await watched(shared, action, "changing", arguments)

    async def main() -> None:
        async with (
            open_backend(
                store, [store.resolve("tiny-1")], EngineSettings(cache_bytes=1 << 20), launch=ThreadLauncher()
            ) as backend,
            trio.open_nursery() as nursery,
        ):

            async def status(_: dict[str, Any]) -> Mapping[str, Any]:
                return {"models": backend.report()}

            handlers = {"status": status, **model_handlers(shared, backend)}
            nursery.start_soon(control.serve, tmp_path / "control.sock", handlers)
            await listening(tmp_path / "control.sock")

            assert (await ask("load", model="tiny-2"))["phase"] == "ready"
            told = (await control.ask(tmp_path / "control.sock", "status"))["models"]
            assert [one["name"] for one in told] == ["tiny-1", "tiny-2"]
            assert "tiny-2  ready" in _model(told[1]) and "self-test passed" in _model(told[1])
            await ask("unload", model="tiny-2")
            assert [info.name for info in backend.models.values()] == ["tiny-1"]
            swapped = await ask("swap", old="tiny-1", model="tiny-2")
            assert swapped["beside"] is True
            assert [info.name for info in backend.models.values()] == ["tiny-2"]

            traced = await ask("trace", model="tiny-2", seconds=1)
            path = Path(traced["path"])
            assert path.parent == tmp_path / "traces" and path.parent.stat().st_mode & 0o777 == 0o700
            assert "steps traced to" in _model((await control.ask(tmp_path / "control.sock", "status"))["models"][0])
            with pytest.raises(ControlFailed, match="traced already"):
                await ask("trace", model="tiny-2", seconds=5)
            await job(backend)
            while (await control.ask(tmp_path / "control.sock", "status"))["models"][0]["trace"]:
                await trio.sleep(0.05)  # it ends by itself
            events = json.loads(path.read_text())
            assert {"step 1", "forward"} <= {event["name"] for event in events}
            await job(backend)
            assert json.loads(path.read_text()) == events
            await ask("trace", model="tiny-2", seconds=3600)
            await job(backend)
            ended = await ask("trace", model="tiny-2")
            assert ended["path"] == str(path) and ended["steps"] >= 3
            assert len([event for event in json.loads(path.read_text()) if event["name"].startswith("step ")]) >= 3
            assert (await ask("trace", model="tiny-2"))["text"] == "tiny-2  was not traced"

            for action, arguments, complaint in (
                ("trace", {"model": "tiny-2", "seconds": 3601}, "1 to 3600 seconds"),
                ("trace", {"model": "tiny-2", "seconds": 0}, "1 to 3600 seconds"),
                ("trace", {"model": "tiny-2", "seconds": "9"}, "1 to 3600 seconds"),
                ("trace", {"model": "tiny-1", "seconds": 9}, "no model of this worker"),
                ("load", {"model": "no-such"}, "no model 'no-such' in the store"),
                ("unload", {"model": "tiny-1"}, "no model of this worker"),
                ("swap", {"old": "tiny-2", "model": "tiny-2"}, "the same model"),
            ):
                with pytest.raises(ControlFailed, match=complaint):
                    await ask(action, **arguments)
            nursery.cancel_scope.cancel()

    with_timeout(main)


async def job(backend: TorchBackend) -> None:
    (model,) = backend.models
    prompt = backend.prepare(model, [ChatMessage("user", "hello")])
    async for _ in backend.generate(prompt, Params(max_tokens=6)):
        pass


async def listening(path: Path) -> None:
    while True:
        try:
            await control.ask(path, "status")
        except NotRunning:
            await trio.sleep(0.01)
        else:
            return


def with_timeout(main: Callable[[], Any]) -> None:
    async def bounded() -> None:
        with trio.fail_after(60):
            await main()

    trio.run(bounded)


def test_a_worker_on_other_peoples_models_says_so() -> None:
    handlers = model_handlers(Shared(), None)

    async def main() -> None:
        with pytest.raises(Exception, match="not its own to manage"):
            await handlers["models.unload"]({"model": "x"})

    trio.run(main)
