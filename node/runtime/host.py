"""The node's end of one engine: streams in, tokens out, whatever becomes of the process that computes them.

Rules
- The engine is not trusted. Each message is held against what was asked (`node.runtime.streams`): an engine that says anything
  else is killed.
- A step's tokens come in one message for all streams.
- An engine that is silent for much longer than its steps took hangs, and so does one that has work and does not come forward with
  it, whatever it answers (`node.runtime.hangs`).
- An engine that died (killed, crashed, out of memory, hung) is started again (`node.runtime.supervisor`), and its streams go on
  from the tokens that came: the same tokens as unbroken ones, since a stream is its tokens. A stream that was running in
  `MAX_DEATHS` deaths may be what kills engines, and ends. Streams that came in the meantime wait.
- While an engine cannot be loaded again streams are refused, and `failure` says why.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Several
from typing import Final, Protocol

import trio
from msgspec.structs import replace

from node.errors import ModelError, PromptInvalid
from node.runtime import wire
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput
from node.runtime.hangs import Hangs
from node.runtime.launch import Launcher
from node.runtime.link import ProcessLost
from node.runtime.streams import Stream, room_of
from node.runtime.supervisor import Limits, Supervisor
from node.telemetry.engine import EngineMetrics, EngineStats
from protocol.messages import ResponseFormat
from protocol.tame import one_line

log = logging.getLogger(__name__)
MAX_DEATHS: Final = 2
"""A stream that was running in so many deaths is not tried again."""


class StepObserver(Protocol):
    """Hears of every step; must be quick and must not raise."""

    def stepped(self, stats: EngineStats | None, began: float, ended: float) -> None:
        """`began`, `ended`: seconds of `time.perf_counter`, as the step's message came."""


class EngineHost:
    """One engine, wherever it runs. `run` it in a nursery; everything else is asked from its task."""

    def __init__(
        self,
        launch: Launcher,
        load: wire.Load,
        *,
        limits: Limits | None = None,
        heard: Callable[[], None] = lambda: None,
        metrics: EngineMetrics | None = None,
        observers: Several[StepObserver] = (),
        kernels: Callable[[], wire.Kernels | None] = lambda: None,
        test_first: bool = False,
    ) -> None:
        """`heard` is called when the engine's stage, failure or readiness changed; `observers` hear of every step; `kernels`:
        what each new engine is given besides `load`. `test_first`: streams that outlived an engine wait for `go_on` when another
        is ready; ones that come then do not."""
        self.metrics = metrics or EngineMetrics("", 1)
        self.mode = launch.mode
        self._observers = (self.metrics, *observers)
        self._satisfied: set[object] = set()
        self._load = load
        self._limits = limits or Limits()
        self._process = Supervisor[wire.ToEngine, wire.ToNode](
            self,
            launch,
            self._limits,
            load.folder,
            lambda: self._load_with(kernels()),
            wire.TO_ENGINE,
            wire.TO_NODE,
        )
        self._heard = heard
        self._test_first = test_first
        self._numbers = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._room = 0
        self._sent = self._acknowledged = 0
        self._unheard: deque[Stream] = deque()
        """Submits that `_room` does not count yet."""
        self._step_ended = 0.0
        # A thread cannot be ended: nothing is gained by haste.
        self._hangs = Hangs(self._limits, hasty=self.mode != "thread", drafts=bool(load.draft_folder))
        self.stopped = False
        """`run` has ended."""
        self.facts: wire.Ready | None = None
        """Of the last engine that was ready."""
        self.ready = False
        self.stage = "waiting"
        """How far a load is, in words."""
        self.deaths = 0
        self.last_death = ""
        self.failure = ""
        """Why the engine cannot be loaded; empty while there is hope."""

    # --------------------------------------------------------------------------------------------------- for anybody

    @property
    def pid(self) -> int | None:
        """Of the process that was started, which may be a sandbox's."""
        return self._process.pid

    @property
    def load_s(self) -> float:
        """How long the last load took."""
        return self._process.load_s

    @property
    def running(self) -> int:
        return len(self._streams)

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a sequence of this size would be taken now, by what the engine said last less what it has not counted yet."""
        size = prompt_tokens + max_tokens
        promised = sum(stream.room for stream in self._unheard)
        promised += sum(stream.room for stream in self._streams.values() if not stream.submitted)
        return self.could_fit(size) and room_of(size) <= self._room - promised

    def could_fit(self, tokens: int) -> bool:
        """Whether an idle engine would take a sequence of so many tokens, prompt and answer together."""
        return self.facts is not None and tokens <= self.facts.capacity

    def satisfied(self, sequence_id: object) -> None:
        """The receiver has all that it wanted, a stop string for instance: when it leaves now, that is no abort."""
        self._satisfied.add(sequence_id)

    async def generate(
        self, sequence: Sequence, response_format: ResponseFormat | None = None
    ) -> AsyncGenerator[list[StepOutput], None]:
        """The sequence's tokens as they come; closing the generator aborts it within a step. `response_format`: a grammar that
        was found good. Raises `ModelError`, and `PromptInvalid` for a grammar that passed a limit after all."""
        if self.stopped or self.failure:
            raise ModelError(self.failure or "the model runtime is stopping")
        timing = self.metrics.begin(
            arrived=time.perf_counter(), prompt_tokens=len(sequence.prompt_ids), max_tokens=sequence.max_tokens
        )
        stream = Stream(next(self._numbers), sequence, response_format, timing, self._load.window)
        self._streams[stream.number] = stream
        try:
            if self.ready:
                self._submit(stream)
            while True:
                while not stream.outputs:
                    if stream.error:
                        raise ModelError(stream.error)
                    await stream.news.wait()
                    stream.news = trio.Event()
                outputs = stream.take()
                self._credit(stream)
                if stream.fault and outputs[-1].finish_reason is FinishReason.ERROR:
                    raise PromptInvalid(f"the client's grammar passed a limit: {one_line(stream.fault)}"[:300])
                yield outputs
                if outputs[-1].finish_reason is not None:
                    return
        finally:
            if self._streams.pop(stream.number, None) is not None:
                if stream.submitted:
                    self._process.send(wire.Abort(stream.number))
                    self._hangs.leaves(stream, self._streams.values())
                timing.end("stop" if sequence.id in self._satisfied else "abort", time.perf_counter())
            self._satisfied.discard(sequence.id)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep an engine running until cancelled; started once the first is ready. Raises `ModelError` when that one fails."""
        try:
            await self._process.run(task_status)
        finally:
            self.stopped = True
            self.ready = False
            self.metrics.stats = lambda: None
            self._end_all("the model runtime is stopping")

    def go_on(self) -> None:
        """With the streams that wait since the engine was ready; nothing where none do."""
        for stream in list(self._streams.values()) if self.ready else ():
            if not stream.submitted:
                try:
                    self._submit(stream)
                except ModelError as error:
                    self._end(stream, error.message)

    # ----------------------------------------------------------------------------------------- for its supervisor

    def _load_with(self, kernels: wire.Kernels | None) -> wire.Load:
        """What could not be started again might be able to without them."""
        return replace(self._load, kernels=None if self.failure else kernels)

    @property
    def asked(self) -> bool:
        return self._sent > 0

    def starting(self) -> None:
        self.stage = "starting"

    def meet(self, message: wire.ToNode) -> bool:
        match message:
            case wire.Loading():
                self.stage = one_line(message.stage)
                self._heard()
                return False
            case wire.Ready():
                self._begin(message)
                return True
            case wire.Failed():
                raise ProcessLost(message.reason)
        raise ProcessLost(f"a {type(message).__name__} before it was ready")

    def _begin(self, facts: wire.Ready) -> None:
        if self.facts is not None and _lasting(facts) != _lasting(self.facts):
            raise ProcessLost("the model is another one than before it died")
        self.facts, self._room = facts, facts.room
        self._sent = self._acknowledged = 0
        self._unheard.clear()
        self._hangs.begin(trio.current_time(), facts.step_tokens)
        self.ready, self.stage, self.failure = True, "ready", ""
        if not self._test_first:
            self.go_on()
        self._heard()

    def look(self, late: float) -> None:
        """Questions without any answer are a hang, and so is work that nothing comes of."""
        reason = self._hangs.look(trio.current_time(), late, self._process.heard, self._streams.values())
        if reason:
            raise ProcessLost(reason)
        self._ask(wire.Ping(self._hangs.ping()))

    def take(self, message: wire.ToNode) -> None:
        match message:
            case wire.Stepped():
                self._stepped(message)
            case wire.Refused():
                refused = self._streams.get(message.number)
                if refused is not None:
                    self._end(refused, f"the engine refused the sequence: {one_line(message.reason)}")
                self._hangs.heard(trio.current_time(), self._streams.values())
            case wire.Pong():
                self._hangs.answered(message.number)
                self._hangs.heard(trio.current_time(), self._streams.values())
            case wire.Failed():
                raise ProcessLost(("out of memory: " if message.memory else "") + message.reason)
            case wire.Loading() | wire.Ready():
                raise ProcessLost("it started twice")

    def _stepped(self, message: wire.Stepped) -> None:
        """Raises `ProcessLost` for whatever was not asked for."""
        if not self._acknowledged <= message.submits <= self._sent:
            raise ProcessLost("it counts sequences that it was not given")
        now = time.perf_counter()
        for _ in range(message.submits - self._acknowledged):
            taken = self._unheard.popleft()
            if taken.number in self._streams and not taken.timing.taken:
                taken.timing.take(now)
        self._acknowledged, self._room = message.submits, message.room
        if (stats := message.stats) is not None:
            self.metrics.stats = lambda: stats
            self._hangs.progress.claims(stats.prompt_tokens)
        if message.seconds:
            began, self._step_ended = max(now - message.seconds, self._step_ended), now
            for observer in self._observers:
                observer.stepped(stats, began, now)
        fresh: dict[Stream, list[StepOutput]] = {}
        for said in message.outputs:
            stream = self._streams.get(said.number)
            if stream is None or self.facts is None:  # it was left, and the engine has yet to hear of it
                continue
            output = stream.accept(said, self.facts.vocab_size)
            self._hangs.progress.tokens += 1
            fresh.setdefault(stream, []).append(output)
            if output.finish_reason is not None:
                del self._streams[stream.number]
        for stream, outputs in fresh.items():
            stream.deliver(outputs, now)
            self._credit(stream)
        computed = max(stats.step_tokens if stats else 0, len(message.outputs), 1) if message.seconds else 0
        longest = max((stream.length for stream in fresh), default=0)
        self._hangs.heard(trio.current_time(), self._streams.values(), computed, longest, message.seconds)

    def bury(self, reason: str, failed: int) -> None:
        """Take stock: who waits for the next engine, and who was there once too often."""
        self.ready = False
        self.metrics.stats = lambda: None
        self._room = 0
        self._unheard.clear()
        self.deaths += 1
        self.last_death = reason
        for stream in list(self._streams.values()):
            if stream.submitted and stream.lost() >= MAX_DEATHS:
                self._end(stream, f"the engine died {stream.deaths} times while this sequence ran, last: {reason}")
        if failed:
            self.failure = f"the engine cannot be started again ({failed} times): {reason}"
            self._end_all(self.failure)
        log.error("%s", self.failure or f"the engine died: {reason}; it is started again")
        self._heard()

    # ---------------------------------------------------------------------------------------------------- what we say

    def _submit(self, stream: Stream) -> None:
        self._ask(stream.question())
        stream.submitted = True
        self._hangs.progress.given(stream)
        self._sent += 1
        self._unheard.append(stream)

    def _credit(self, stream: Stream) -> None:
        if stream.number in self._streams and (credit := stream.credit()) is not None:
            self._ask(credit)

    def _ask(self, message: wire.ToEngine) -> None:
        self._process.send(message)
        self._hangs.asked(trio.current_time())

    def _end_all(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, reason)

    def _end(self, stream: Stream, reason: str) -> None:
        """By an error."""
        del self._streams[stream.number]
        stream.fail(reason)


def _lasting(facts: wire.Ready) -> wire.Ready:
    """What must be the same of every engine of one model."""
    return replace(facts, room=0, walls=None, compiled=())
