"""The node's end of one task model's process: jobs in, steps out, whatever becomes of the process (`node.runtime.supervisor`).

Rules
- The process is not trusted: what it says is decoded strictly, and an answer that was not asked for ends it.
- A job whose process dies is over with a `ModelError`: it was paid for what came, and the client asks again. Jobs that come
  while it is started again are refused. No other model is touched, since each has a process of its own.
- It hangs when a job waits for an answer and no job has got one in `hang_s`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

import trio

from node.errors import InputInvalid, ModelError
from node.ports import Step
from node.runtime.launch import Launcher
from node.runtime.link import ProcessLost
from node.runtime.supervisor import Limits, Patience, Supervisor
from node.runtime.tasks import wire
from node.runtime.tasks.prepare import Rows
from node.runtime.tasks.runner import Memory
from protocol.messages import Params

log = logging.getLogger(__name__)
LIMITS: Final = Limits(hang_s=120.0)
"""Longer than the longest turn: one large picture on a busy machine."""

_Answer = wire.Pull | wire.Stepped | wire.Refused


@dataclass(eq=False, slots=True)
class _Job:
    answers: trio.MemorySendChannel[_Answer]
    waiting: bool = False
    """For an answer, of which there is to be one."""
    fed: bool = False
    """It was told that there is no more media."""


class TaskHost:
    """One model in a process. `run` it in a nursery."""

    def __init__(self, launch: Launcher, load: wire.Load, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._process = Supervisor[wire.ToChild, wire.ToNode](
            self, launch, limits, load.folder, lambda: load, wire.TO_CHILD, wire.TO_NODE
        )
        self._jobs: dict[int, _Job] = {}
        self._numbers = itertools.count()
        self._answered = 0
        self._silence = Patience()
        self.asked = False
        """For a job, since the process was ready."""
        self.facts: wire.Ready | None = None
        """Of the last process that was ready."""
        self.ready = False
        self.failure = ""
        """Why jobs are refused; empty while they are not."""
        self.deaths = 0

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
            self.asked = True
            self._process.send(wire.Start(number, params, content))
            while True:
                self._process.send(wire.Next(number))
                step = await self._step(number, job, receive, media)
                yield step
                if step.finish_reason is not None:
                    return
        finally:
            if self._jobs.pop(number, None) is not None:
                self._process.send(wire.Cancel(number))

    async def _step(
        self,
        number: int,
        job: _Job,
        answers: trio.MemoryReceiveChannel[_Answer],
        media: AsyncGenerator[bytes, None],
    ) -> Step:
        while True:
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
                    job.fed = data is None
                    self._process.send(wire.MediaEnd(number) if data is None else wire.Piece(number, data))
                case wire.Stepped():
                    return Step(answer.token_ids, answer.text, answer.finish, answer.data)
                case wire.Refused():
                    self._jobs.pop(number, None)
                    raise (InputInvalid if answer.blame == "input" else ModelError)(answer.reason)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a process running until cancelled; started once the first is ready. Raises `ModelError` when that one fails."""
        try:
            await self._process.run(task_status)
        finally:
            self.ready, self.failure = False, self.failure or "the model runtime is stopping"
            self._end_jobs()

    def _end_jobs(self) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.answers.close()

    # ----------------------------------------------------------------------------------------- for its supervisor

    def starting(self) -> None:
        self.asked = False

    def meet(self, message: wire.ToNode) -> bool:
        if isinstance(message, wire.Failed):
            raise ProcessLost(message.reason)
        if not isinstance(message, wire.Ready) or (self.facts is not None and message != self.facts):
            raise ProcessLost("it is not the model that it was")
        self.facts, self.ready, self.failure = message, True, ""
        self._silence = Patience()
        return True

    def look(self, late: float) -> None:
        waiting = [number for number, job in self._jobs.items() if job.waiting]
        mark = (self._answered, min(waiting)) if waiting else None
        if self._silence.tried(mark, self._limits.between_looks_s) >= self._limits.hang_s:
            raise ProcessLost(f"it said nothing for {self._limits.hang_s:g} s")

    def take(self, message: wire.ToNode) -> None:
        if isinstance(message, wire.Failed):
            raise ProcessLost(message.reason)
        if isinstance(message, wire.Ready):
            raise ProcessLost("it was ready twice")
        job = self._jobs.get(message.number)
        if job is not None:  # else it was cancelled meanwhile
            if not job.waiting or (job.fed and isinstance(message, wire.Pull)):
                raise ProcessLost("it answered what was not asked")
            job.waiting = False
            self._answered += 1
            job.answers.send_nowait(message)

    def bury(self, reason: str, failed: int) -> None:
        self.ready, self.deaths = False, self.deaths + 1
        self.failure = f"the model's process ended: {reason}"
        log.error("%s; it is started again", self.failure)
        self._end_jobs()
