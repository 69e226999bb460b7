"""The process of one task model: `python -m node.runtime.tasks.child FD MODE`, started by a node, by nobody else.

It decodes what strangers send, pictures above all, in libraries written in C. So it holds no key and needs no network, and what
it says is not trusted. The end of the line is the end of the process; so is any error that is nobody's input.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

import trio

from node.codec import Unreadable
from node.errors import InputInvalid, ModelError
from node.groups import plain_errors
from node.ports import Step
from node.runtime.tasks import wire
from node.runtime.tasks.loading import TaskSettings, load_runner
from node.runtime.tasks.runner import Runner

_READ: Final = 1 << 18


class _Line:
    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._reader = wire.TO_CHILD.reader()
        self._lock = trio.StrictFIFOLock()

    async def receive(self) -> list[wire.ToChild]:
        """What has come; nothing when the line has ended, or ended in rubbish."""
        while True:
            try:
                data = await self._stream.receive_some(_READ)
                messages = self._reader.feed(bytes(data))
            except (trio.BrokenResourceError, Unreadable):
                return []
            if messages or not data:
                return messages

    async def send(self, message: wire.ToNode) -> None:
        async with self._lock:
            await self._stream.send_all(wire.TO_NODE.frame(message))


class _Job:
    def __init__(self, line: _Line, start: wire.Start) -> None:
        self._line, self._start = line, start
        self.scope = trio.CancelScope()
        self._ask, self._asked = trio.open_memory_channel[None](1)
        self._give, self._given = trio.open_memory_channel[bytes | None](1)

    def next(self) -> None:
        self._ask.send_nowait(None)

    def piece(self, data: bytes | None) -> None:
        self._give.send_nowait(data)

    async def run(self, runner: Runner) -> None:
        number = self._start.number
        with self.scope:
            try:
                async with aclosing(runner.run(self._start.content, self._start.params, self._media())) as steps:
                    while True:
                        await self._asked.receive()
                        step = await anext(steps, None)
                        if step is None:
                            raise ModelError("the runner ended without an end")
                        await self._line.send(_stepped(number, step))
                        if step.finish_reason is not None:
                            return
            except InputInvalid as error:
                await self._line.send(wire.Refused(number, "input", error.message[:1000]))
            except ModelError as error:
                await self._line.send(wire.Refused(number, "model", error.message[:1000]))

    async def _media(self) -> AsyncGenerator[bytes, None]:
        while True:
            await self._line.send(wire.Pull(self._start.number))
            data = await self._given.receive()
            if data is None:
                return
            yield data


async def serve(
    sock: socket.socket, load: Callable[[wire.Load], tuple[Runner, str]], walls: Callable[[wire.Load], object]
) -> None:
    """The whole life of the process. `walls` shuts what a model does not need, before a byte of it is read."""
    line = _Line(sock)
    first = await line.receive()
    if len(first) != 1 or not isinstance(first[0], wire.Load):
        return
    try:
        walls(first[0])
        runner, numerics = await trio.to_thread.run_sync(load, first[0])
        memory = (runner.memory.weights, runner.memory.working, runner.memory.job)
        ready = wire.Ready(runner.tasks, runner.context_length, runner.dimensions, numerics, memory)
        await line.send(ready)
        with plain_errors():
            await _obey(line, runner)
    except trio.BrokenResourceError:
        return
    except Exception as error:  # the boundary of the process: whatever it is, the operator must see it
        await line.send(wire.Failed(f"{type(error).__name__}: {error}"[:1000]))


async def _obey(line: _Line, runner: Runner) -> None:
    jobs: dict[int, _Job] = {}

    async def run(number: int, job: _Job) -> None:
        try:
            await job.run(runner)
        finally:
            jobs.pop(number, None)

    async with trio.open_nursery() as nursery:
        while messages := await line.receive():
            for message in messages:
                if isinstance(message, wire.Start):
                    job = jobs[message.number] = _Job(line, message)
                    nursery.start_soon(run, message.number, job)
                elif not isinstance(message, wire.Load) and (known := jobs.get(message.number)):
                    _tell(known, message)
        nursery.cancel_scope.cancel()


def _tell(job: _Job, message: wire.Next | wire.Piece | wire.MediaEnd | wire.Cancel) -> None:
    match message:
        case wire.Next():
            job.next()
        case wire.Piece():
            job.piece(message.data)
        case wire.MediaEnd():
            job.piece(None)
        case wire.Cancel():
            job.scope.cancel()


def _stepped(number: int, step: Step) -> wire.Stepped:
    return wire.Stepped(number, step.token_ids, step.text, step.finish_reason, step.data)


def _load(load: wire.Load) -> tuple[Runner, str]:
    return load_runner(Path(load.folder), TaskSettings(load.device, load.dtype, load.threads))


def main(argv: list[str]) -> int:
    if len(argv) != 3 or not argv[1].isdecimal() or argv[2] not in ("alone", "walled"):
        sys.exit("error: this is the process of a task model; a node starts it itself")
    from node.runtime.walls import raise_walls

    with socket.socket(fileno=int(argv[1])) as sock:
        trio.run(serve, sock, _load, lambda load: raise_walls(load, alone=argv[2] == "alone"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
