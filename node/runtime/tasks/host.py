"""The node's end of one task model's process: jobs in, steps out, and the process started again when it dies.

Rules
- The process is not trusted: what it says is decoded strictly, and an answer that was not asked for ends it.
- A job whose process dies is over with a `ModelError`: it was paid for what came, and the client asks again. Jobs that come
  while it is started again are refused. No other model is touched, since each has a process of its own.
- It hangs when a job waits for an answer and none of any kind has come in `hang_s`.
"""

from __future__ import annotations

import itertools
import logging
import math
import socket
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol

import msgspec
import trio

from node.errors import InputInvalid, ModelError
from node.groups import plain_errors
from node.ports import Step
from node.runtime.tasks import wire
from node.runtime.tasks.prepare import Rows
from node.runtime.tasks.runner import Memory
from protocol.errors import GristmillError
from protocol.frames import FrameReader
from protocol.messages import Params
from protocol.tame import one_line

log = logging.getLogger(__name__)
UNREAD: Final = 4 * wire.TO_CHILD
"""Bytes for a process that it may leave unread. One that talks and does not listen would fill our memory and never hang."""
_READ: Final = 1 << 18


class Child(Protocol):
    """A process that was started."""

    def kill(self) -> None: ...

    async def epitaph(self) -> str:
        """How it ended, once it has."""


class Launcher(Protocol):
    def start(self, theirs: socket.socket, folder: str) -> AbstractAsyncContextManager[Child]:
        """Start a process that may read `folder`, with its end of the line; ended at the end of the block. Closes our copy of
        `theirs`. Raises `ModelError`."""


@dataclass(frozen=True, slots=True)
class Limits:
    load_s: float = 600.0
    """A process that is not ready by then is killed."""
    hang_s: float = 120.0
    """Longer than the longest turn: one large picture on a busy machine."""
    backoff_s: float = 0.5
    """Wait before the second of several loads that fail; doubled each time."""
    backoff_max_s: float = 60.0


class ProcessLost(Exception):
    """The process is gone or was given up, and why."""


_Answer = wire.Pull | wire.Stepped | wire.Refused


@dataclass(eq=False, slots=True)
class _Job:
    answers: trio.MemorySendChannel[_Answer]
    waiting: bool = False
    """For an answer, of which there is to be one."""


@dataclass(slots=True)
class TaskHost:
    """One model in a process. `run` it in a nursery."""

    launch: Launcher
    load: wire.Load
    limits: Limits = field(default_factory=Limits)
    facts: wire.Ready | None = None
    """Of the last process that was ready."""
    ready: bool = False
    failure: str = ""
    """Why jobs are refused; empty while they are not."""
    deaths: int = 0
    _jobs: dict[int, _Job] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _out: trio.MemorySendChannel[bytes] | None = None
    _unread: int = 0
    """Bytes in `_out`."""
    _heard: float = 0.0
    """When something was heard last, or had to be."""

    @property
    def memory(self) -> Memory:
        return Memory(*self.facts.memory) if self.facts else Memory(0, 0, 0)

    async def steps(
        self, content: Rows | None, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        """As `TaskBackend.run`."""
        if not self.ready:
            raise ModelError(self.failure or "the model is being started")
        number = next(self._numbers)
        send, receive = trio.open_memory_channel[_Answer](1)
        job = self._jobs[number] = _Job(send)
        try:
            self._send(wire.Start(number, params, content))
            while True:
                self._send(wire.Next(number))
                step = await self._step(number, job, receive, media)
                yield step
                if step.finish_reason is not None:
                    return
        finally:
            if self._jobs.pop(number, None) is not None:
                self._send(wire.Cancel(number))

    async def _step(
        self,
        number: int,
        job: _Job,
        answers: trio.MemoryReceiveChannel[_Answer],
        media: AsyncGenerator[bytes, None],
    ) -> Step:
        while True:
            if not any(other.waiting for other in self._jobs.values()):
                self._heard = trio.current_time()  # nothing was to be heard until now
            job.waiting = True
            try:
                answer = await answers.receive()
            except trio.EndOfChannel:
                raise ModelError(self.failure) from None
            finally:
                job.waiting = False
            match answer:
                case wire.Pull():
                    data = await anext(media, None)
                    self._send(wire.MediaEnd(number) if data is None else wire.Piece(number, data))
                case wire.Stepped():
                    return Step(answer.token_ids, answer.text, answer.finish, answer.data)
                case wire.Refused():
                    self._jobs.pop(number, None)
                    raise (InputInvalid if answer.blame == "input" else ModelError)(answer.reason)

    def _send(self, message: wire.ToChild) -> None:
        if self._out is not None:
            data = wire.for_child(message)
            self._unread += len(data)
            self._out.send_nowait(data)

    # -------------------------------------------------------------------------------------------------- the process

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a process running until cancelled; started once the first is ready. Raises `ModelError` when that one fails."""
        failed = 0
        try:
            while True:
                try:
                    await self._live(task_status)
                except (ProcessLost, ModelError) as lost:  # a `ModelError`: there was not even a process
                    reason, worked = one_line(str(lost))[:500], self.ready
                if self.facts is None:
                    raise ModelError(f"the model cannot be loaded: {reason}")
                self.ready, self.deaths = False, self.deaths + 1
                failed = 0 if worked else failed + 1
                self.failure = f"the model's process ended: {reason}"
                log.error("%s; it is started again", self.failure)
                self._end_jobs()
                if failed:
                    await trio.sleep(min(self.limits.backoff_s * 2 ** (failed - 1), self.limits.backoff_max_s))
        finally:
            self.ready, self.failure = False, self.failure or "the model runtime is stopping"
            self._end_jobs()

    def _end_jobs(self) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.answers.close()

    async def _live(self, task_status: trio.TaskStatus[None]) -> NoReturn:
        """One process from start to death. Raises `ProcessLost`."""
        ours, theirs = socket.socketpair()
        with plain_errors(), ours:
            async with self.launch.start(theirs, self.load.folder) as child:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
                try:
                    reader = FrameReader(wire.TO_NODE)
                    await stream.send_all(wire.for_child(self.load))
                    with trio.move_on_after(self.limits.load_s):
                        self._begin(await _first(stream, reader))
                    if not self.ready:
                        raise ProcessLost(f"it was not ready within {self.limits.load_s:.0f} s")
                    if self.deaths == 0:
                        task_status.started()
                    with plain_errors():
                        await self._serve(stream, reader)
                except (ProcessLost, OSError, trio.BrokenResourceError) as lost:
                    child.kill()
                    raise ProcessLost(f"{lost}; {await child.epitaph()}") from lost
                finally:
                    self._out = None

    def _begin(self, facts: wire.ToNode) -> None:
        if isinstance(facts, wire.Failed):
            raise ProcessLost(facts.reason)
        if not isinstance(facts, wire.Ready) or (self.facts is not None and facts != self.facts):
            raise ProcessLost("it is not the model that it was")
        self.facts, self.ready, self.failure = facts, True, ""

    async def _serve(self, stream: trio.SocketStream, reader: FrameReader) -> None:
        """Raises `ProcessLost`."""
        self._out, out = trio.open_memory_channel[bytes](math.inf)
        self._unread = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, stream, out)
            nursery.start_soon(self._watch)
            await self._listen(stream, reader)

    async def _listen(self, stream: trio.SocketStream, reader: FrameReader) -> NoReturn:
        while True:
            for message in await _some(stream, reader):
                self._heard = trio.current_time()
                if isinstance(message, wire.Failed):
                    raise ProcessLost(message.reason)
                if isinstance(message, wire.Ready):
                    raise ProcessLost("it was ready twice")
                job = self._jobs.get(message.number)
                if job is not None:  # else it was cancelled meanwhile
                    if not job.waiting:
                        raise ProcessLost("it answered what was not asked")
                    job.waiting = False
                    job.answers.send_nowait(message)

    async def _write(self, stream: trio.SocketStream, out: trio.MemoryReceiveChannel[bytes]) -> None:
        with suppress(trio.BrokenResourceError):  # who listens hears that too
            async for data in out:
                await stream.send_all(data)
                self._unread -= len(data)

    async def _watch(self) -> NoReturn:
        while True:
            await trio.sleep(min(1.0, self.limits.hang_s / 4))
            if self._unread > UNREAD:
                raise ProcessLost(f"it leaves {self._unread} bytes unread")
            waiting = any(job.waiting for job in self._jobs.values())
            if waiting and trio.current_time() - self._heard > self.limits.hang_s:
                raise ProcessLost(f"it said nothing for {self.limits.hang_s:.0f} s")


async def _first(stream: trio.SocketStream, reader: FrameReader) -> wire.ToNode:
    messages = await _some(stream, reader)
    if len(messages) != 1:
        raise ProcessLost("it spoke before it was asked")
    return messages[0]


async def _some(stream: trio.SocketStream, reader: FrameReader) -> list[wire.ToNode]:
    """At least one message. Raises `ProcessLost`."""
    while True:
        data = await stream.receive_some(_READ)
        if not data:
            raise ProcessLost("its line ended")
        try:
            messages = [wire.read_by_node(payload) for payload in reader.feed(bytes(data))]
        except (msgspec.DecodeError, GristmillError) as error:
            raise ProcessLost(f"it sent rubbish: {error}"[:300]) from None
        if messages:
            return messages
