"""Task models in processes of their own: the same answers, and what happens when one lies, hangs or is killed."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

import node  # noqa: E402
from node.errors import InputInvalid, ModelError  # noqa: E402
from node.models.manifest import Manifest  # noqa: E402
from node.models.store import ModelStore  # noqa: E402
from node.ports import Step  # noqa: E402
from node.runtime import supervisor  # noqa: E402
from node.runtime.engine.rows import Row  # noqa: E402
from node.runtime.launch import launcher  # noqa: E402
from node.runtime.tasks import wire  # noqa: E402
from node.runtime.tasks.backend import TaskModels, open_tasks  # noqa: E402
from node.runtime.tasks.child import serve  # noqa: E402
from node.runtime.tasks.host import LIMITS, TaskHost  # noqa: E402
from node.runtime.tasks.loading import TaskSettings  # noqa: E402
from node.runtime.tasks.prepare import Rows  # noqa: E402
from node.runtime.tasks.runner import Memory  # noqa: E402
from protocol.ids import ModelId  # noqa: E402
from protocol.messages import FinishReason, Params  # noqa: E402
from protocol.tasks import Audio, EmbedRequest, Image, OcrRequest, Task, TranscribeRequest  # noqa: E402


class _Child:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def kill(self) -> None:
        self.process.kill()

    async def epitaph(self) -> str:
        return f"status {await trio.to_thread.run_sync(self.process.wait)}"


class Plain:
    """Starts the real child, as a plain process."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[_Child]:
        tree = str(Path(node.__file__).resolve().parents[1])
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "node.runtime.tasks.child", str(theirs.fileno()), "alone"],
                pass_fds=[theirs.fileno()],
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": tree,
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "OMP_NUM_THREADS": "1",
                },
            )
        self.started.append(process)
        try:
            yield _Child(process)
        finally:
            process.kill()
            process.wait()


@asynccontextmanager
async def opened(folder: Path, launch: Any, **limits: float) -> AsyncIterator[tuple[TaskModels, ModelId]]:
    manifest = Manifest.parse((folder / "manifest.json").read_bytes())
    async with open_tasks(
        ModelStore(folder.parent), [manifest], TaskSettings(), launch=launch, limits=replace(LIMITS, **limits)
    ) as backend:
        yield backend, manifest.id


async def pieces(data: bytes, size: int = 4000) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), size):
        await trio.lowlevel.checkpoint()
        yield data[start : start + size]


async def answer(backend: TaskModels, model: ModelId, request: Any, media: bytes = b"", **params: Any) -> list[Step]:
    prepared = backend.prepare(model, request)
    return [step async for step in backend.run(prepared, Params(**params), pieces(media))]


async def until(what: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not what():
            await trio.sleep(0.05)


def test_vectors_are_those_of_a_thread_and_a_killed_process_comes_back(stored: Callable[[str], Path]) -> None:
    folder = stored("minilm")
    texts = EmbedRequest(("A man is eating food.", "The girl is carrying a baby.") * 60)

    async def main() -> None:
        async with opened(folder, None) as (backend, model):
            info, memory = backend.models[model], backend.memory(model)
            expected = await answer(backend, model, texts)
        plain = Plain()
        async with opened(folder, plain) as (backend, model):
            assert backend.models[model] == info and backend.memory(model) == memory
            assert await answer(backend, model, texts) == expected  # bit for bit
            steps = backend.run(backend.prepare(model, texts), Params(), pieces(b""))
            await anext(steps)
            plain.started[0].send_signal(signal.SIGKILL)
            with pytest.raises(ModelError, match="process ended"):
                async for _ in steps:
                    pass
            assert backend.free_slots == 4
            assert model not in backend.models  # not sold while it is not there
            await until(lambda: model in backend.models)
            assert len(plain.started) == 2 and await answer(backend, model, texts) == expected
        assert all(process.poll() is not None for process in plain.started)

    trio.run(main)


def test_media_go_to_the_process_as_it_asks_for_them(stored: Callable[[str], Path], speech: bytes) -> None:
    folder = stored("whisper-tiny.en")

    async def main() -> None:
        async with opened(folder, Plain()) as (backend, model):
            request = TranscribeRequest(Audio(speech[:100], len(speech)))
            steps = await answer(backend, model, request, speech)
            text = "".join(step.text for step in steps)
            assert "the lazy dog." in text and text.endswith("Hello, my name is John.")
            cut = backend.run(backend.prepare(model, request), Params(), pieces(speech))
            await anext(cut)
            await cut.aclose()  # cancelled there, and the next job runs at once
            assert [s.token_ids for s in await answer(backend, model, request, speech)] == [s.token_ids for s in steps]
            with pytest.raises(InputInvalid, match="inside a sample"):
                await answer(backend, model, request, speech[:999])

    trio.run(main)


@pytest.mark.parametrize("isolation", ["process", "bwrap"])
@pytest.mark.parametrize("name", ["minilm", "whisper-tiny.en", "ppocr-v6-small"])
def test_every_task_runs_behind_the_walls_of_an_engine(
    stored: Callable[[str], Path], speech: bytes, name: str, isolation: str
) -> None:
    if name.startswith("ppocr"):
        for package in ("rapidocr", "onnxruntime", "cv2", "PIL"):
            pytest.importorskip(package)
    if isolation == "bwrap" and trio.run(launcher, "auto").mode != "bwrap":
        pytest.skip("bubblewrap does not work here")
    folder = stored(name)
    manifest = Manifest.parse((folder / "manifest.json").read_bytes())

    async def job(backend: TaskModels) -> list[Step]:
        if name == "minilm":
            return await answer(backend, manifest.id, EmbedRequest(("A man is eating food.",)))
        if name.startswith("whisper"):
            return await answer(backend, manifest.id, TranscribeRequest(Audio(speech[:100], len(speech))), speech)
        picture = io.BytesIO()
        image_module = pytest.importorskip("PIL.Image")
        image_module.new("RGB", (200, 100), "white").save(picture, "PNG")
        data = picture.getvalue()
        return await answer(backend, manifest.id, OcrRequest(Image(data, len(data), "image/png")), data)

    async def main() -> None:
        store, found = ModelStore(folder.parent), []
        for way in ("thread", isolation):
            async with open_tasks(store, [manifest], TaskSettings(), isolation=way) as backend:
                steps = await job(backend)
                found.append((backend.models, b"".join(s.data for s in steps), "".join(s.text for s in steps)))
                one = backend.residents[manifest.id].host
                assert (one is None) == (way == "thread")
        assert found[0] == found[1]

    trio.run(main)


def test_a_hostile_picture_is_still_the_client_s_fault(stored: Callable[[str], Path]) -> None:
    for package in ("rapidocr", "onnxruntime", "cv2", "PIL"):
        pytest.importorskip(package)
    folder = stored("ppocr-v6-small")
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x40\x00\x00\x00\x40"

    async def main() -> None:
        async with opened(folder, Plain()) as (backend, model):
            with pytest.raises(InputInvalid, match="cannot be decoded"):
                await answer(backend, model, OcrRequest(Image(header, len(header), "image/png")), header)

    trio.run(main)


# ------------------------------------------------------------------------------------------- processes that are not honest

READY = wire.Ready((Task.OCR,), 8, 0, "0" * 32, (1, 2, 3))


class Scripted:
    """A child that says what a script says: bytes for each message that it gets."""

    def __init__(self, *script: list[bytes] | None) -> None:
        self.script = script
        self.lives = 0

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Any]:
        life, self.lives = self.script[min(self.lives, len(self.script) - 1)], self.lives + 1
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))

        async def act() -> None:
            reader, lines = wire.TO_CHILD.reader(), iter(life or [])
            async for data in stream:
                for _ in reader.feed(bytes(data)):
                    try:
                        said = next(lines)
                    except StopIteration:
                        continue
                    if said == b"end":
                        await stream.aclose()
                        return
                    if said:
                        await stream.send_all(said)

        class Nobody:
            def kill(self) -> None: ...

            async def epitaph(self) -> str:
                return "gone"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(act)
            yield Nobody()
            nursery.cancel_scope.cancel()


def host(script: Scripted, **limits: float) -> TaskHost:
    return TaskHost(script, wire.Load("/nowhere", "cpu", "float32", 1), replace(LIMITS, **limits))


ready = wire.TO_NODE.frame(READY)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"\x00\x00\x00\x05hello", "rubbish"),
        (b"\xff\xff\xff\xff", "rubbish"),
        (ready, "ready twice"),
        (wire.TO_NODE.frame(wire.Failed("out of memory")), "out of memory"),
        (b"end", "line ended"),
        (2 * wire.TO_NODE.frame(wire.Stepped(0, (), "a", None, b"")), "not asked"),
        (wire.TO_NODE.frame(wire.Pull(0)), "not asked"),  # again and again: it would never answer, and never hang
    ],
)
def test_a_process_that_is_not_honest_ends_and_its_job_too(said: bytes, why: str) -> None:
    script = Scripted([ready, b"", said, said], [ready])

    async def main() -> None:
        one = host(script)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.run)
            assert one.facts == READY and one.memory == Memory(1, 2, 3)
            with pytest.raises(ModelError, match=why):
                async for _ in one.steps(None, Params(), pieces(b"")):
                    pass
            await until(lambda: one.ready)
            assert script.lives == 2 and one.deaths == 1 and not one._jobs
            nursery.cancel_scope.cancel()

    trio.run(main)


class Deaf:
    """Reads what it loads, then talks and listens to nothing."""

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Any]:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))

        async def chatter() -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stream.receive_some(1 << 16)
                await stream.send_all(ready)
                await trio.sleep(0.2)  # one who spoke at once would not be taken
                while True:
                    for number in range(8):
                        await stream.send_all(wire.TO_NODE.frame(wire.Refused(number, "model", "later")))
                    await trio.sleep(0.02)

        class Nobody:
            def kill(self) -> None: ...

            async def epitaph(self) -> str:
                return "gone"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(chatter)
            yield Nobody()
            nursery.cancel_scope.cancel()


def test_a_process_that_talks_and_does_not_listen_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it leaves unread lies in our memory, and its chatter is no answer."""
    monkeypatch.setattr(supervisor, "UNREAD", 1 / 32)
    rows = Rows(tuple(Row((30_000,) * 500) for _ in range(400)))

    async def main() -> None:
        one = host(Deaf(), hang_s=1.0, backoff_s=5.0)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            await nursery.start(one.run)
            for _ in range(6):
                with pytest.raises(ModelError, match=r"later|bytes unread"):
                    async for _ in one.steps(rows, Params(), pieces(b"")):
                        pass
            await until(lambda: one.deaths >= 1)
            assert "bytes unread" in caplog.text
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize(
    "bad",
    [
        {"token_ids": (-1,)},
        {"token_ids": tuple(range(70_000))},
        {"finish": 77},
        {"text": "x" * 70_000},
        {"number": -1},
    ],
)
def test_messages_out_of_bounds_are_rubbish(bad: dict[str, Any]) -> None:
    import msgspec

    good = {"number": 0, "token_ids": (1,), "text": "a", "finish": FinishReason.STOP, "data": b""}
    assert wire.TO_NODE.read(msgspec.msgpack.encode(["Stepped", *good.values()])) == wire.Stepped(**good)
    with pytest.raises(msgspec.DecodeError):
        wire.TO_NODE.read(msgspec.msgpack.encode(["Stepped", *{**good, **bad}.values()]))


def test_a_process_that_hangs_is_killed_but_one_that_waits_for_media_is_not() -> None:
    pull = wire.TO_NODE.frame(wire.Pull(0))
    script = Scripted([ready, b"", pull], [ready])

    async def main() -> None:
        one = host(script, hang_s=2.0)

        async def slow() -> AsyncGenerator[bytes, None]:
            await trio.sleep(30)  # a live source that says nothing: nobody's fault
            assert one.deaths == 0
            yield b"sound"

        async with trio.open_nursery() as nursery:
            await nursery.start(one.run)
            began = trio.current_time()
            with pytest.raises(ModelError, match="said nothing for 2 s"):
                async for _ in one.steps(None, Params(), slow()):
                    pass
            assert 32 <= trio.current_time() - began < 35
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.1))


def test_one_that_is_not_what_it_was_or_never_ready_is_refused() -> None:
    other = wire.TO_NODE.frame(wire.Ready((Task.OCR,), 8, 0, "1" * 32, (1, 2, 3)))
    script = Scripted([ready, b"end"], [other], [other], [ready])

    async def main() -> None:
        one = host(script, backoff_s=1.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.run)
            with pytest.raises(ModelError):
                async for _ in one.steps(None, Params(), pieces(b"")):
                    pass
            with pytest.raises(ModelError, match="not the model that it was"):
                while not one.ready:
                    await trio.sleep(0.1)
                    async for _ in one.steps(None, Params(), pieces(b"")):
                        pass
                    await trio.sleep(0.1)
            while not one.ready:
                await trio.sleep(0.1)
            assert script.lives == 4
            nursery.cancel_scope.cancel()
        silent = host(Scripted([b""]), load_s=5.0)
        with pytest.raises(ModelError, match="not ready within 5 s"):
            await silent.run()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.1))


def test_a_process_that_cannot_be_started_again_is_tried_again() -> None:
    script = Scripted([ready, b"end"], [ready])
    begin, full = script.start, [False, True, False]

    @asynccontextmanager
    async def start(theirs: socket.socket, folder: str) -> AsyncIterator[Any]:
        if full.pop(0):
            theirs.close()
            raise ModelError("the process cannot be started: no memory")
        async with begin(theirs, folder) as child:
            yield child

    script.start = start  # type: ignore[method-assign]

    async def main() -> None:
        one = host(script, backoff_s=1.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.run)
            with pytest.raises(ModelError, match="process ended"):
                await anext(one.steps(None, Params(), pieces(b"")))
            await until(lambda: one.deaths == 2 and "no memory" in one.failure)
            await until(lambda: one.ready)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.1))


def test_the_child_ends_with_its_line_and_with_rubbish() -> None:
    def never(_: wire.Load) -> Any:
        raise AssertionError("nothing may be loaded")

    async def main(said: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(said)
            ours.shutdown(socket.SHUT_WR)
            with trio.fail_after(5):
                await serve(theirs, never, never)

    rubbish: Iterator[bytes] = iter((b"", b"\x00\x00\x00\x03abc", b"\xff" * 8, wire.TO_CHILD.frame(wire.Next(1))))
    for said in rubbish:
        trio.run(main, said)
