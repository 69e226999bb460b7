"""The node's end of one engine: streams in, tokens out, and the engine started again when it dies.

Rules
- The engine is not trusted. Each message is held against what was asked: a token for a stream that runs, at the next position,
  inside the vocabulary, no further ahead than the window, with log probabilities that can be. An engine that says anything else
  is killed.
- A step's tokens come in one message for all streams. A stream whose reader is behind (it has not been paid, or the peer reads
  slowly) is held: the engine skips it, so unpaid work never runs further ahead than `window` tokens.
- An engine that died (killed, crashed, out of memory, hung) is started again, and its streams go on from the tokens that came:
  the same tokens as unbroken ones, since a stream is its tokens. A stream that was running in `MAX_DEATHS` deaths may be what
  kills engines, and ends. Streams that came in the meantime wait.
- An engine that cannot be loaded again is tried ever less often; meanwhile streams are refused, and `failure` says why.
"""

from __future__ import annotations

import itertools
import logging
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol

import msgspec
import trio

from node.errors import ModelError, PromptInvalid
from node.groups import plain_errors
from node.runtime import wire
from node.runtime.engine.blocks import BLOCK_TOKENS, blocks_for
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput
from node.runtime.launch import Child, Launcher
from node.telemetry.engine import EngineMetrics, EngineStats
from node.telemetry.requests import RequestTiming
from protocol.errors import GristmillError
from protocol.frames import FrameReader
from protocol.logprobs import fault as logprobs_fault
from protocol.messages import ResponseFormat
from protocol.sampling import SamplingParams
from protocol.tame import one_line

log = logging.getLogger(__name__)
MAX_DEATHS: Final = 2
"""A stream that was running in so many deaths is not tried again."""
BURST: Final = 256
"""Tokens that one step may bring one stream beyond its window: speculative decoding brings several."""
UNREAD: Final = 4 * wire.TO_ENGINE
"""Bytes for an engine that it may leave unread. One that talks and does not listen would fill our memory and never hang."""
_READ: Final = 1 << 18
_FINISH: Final = {"": None, **{reason.value: reason for reason in FinishReason}}


class EngineLost(Exception):
    """The engine is gone or was given up, and why."""


@dataclass(frozen=True, slots=True)
class Limits:
    load_s: float = 600.0
    """An engine that is not ready by then is killed."""
    hang_s: float = 30.0
    """An engine that has not finished a step in this time is killed."""
    backoff_s: float = 0.5
    """Wait before the second of several loads that fail; doubled each time."""
    backoff_max_s: float = 60.0


class StepObserver(Protocol):
    """Hears of every step; must be quick and must not raise."""

    def stepped(self, stats: EngineStats | None, began: float, ended: float) -> None:
        """`began`, `ended`: seconds of `time.perf_counter`, as the step's message came."""


@dataclass(eq=False, slots=True)
class _Stream:
    number: int
    sequence: Sequence
    response_format: ResponseFormat | None
    timing: RequestTiming
    received: list[int] = field(default_factory=list)
    """Every token that the engine sent."""
    outputs: deque[StepOutput] = field(default_factory=deque)
    """Of those, what the reader has yet to take."""
    consumed: int = 0
    first: int = 0
    """`consumed` when it was last submitted."""
    credited: int = 0
    """What the engine knows of `consumed`."""
    submitted: bool = False
    deaths: int = 0
    error: str = ""
    fault: str = ""
    """Which limit its grammar passed."""
    news: trio.Event = field(default_factory=trio.Event)

    @property
    def tokens(self) -> int:
        """Prompt and answer at most."""
        return len(self.sequence.prompt_ids) + self.sequence.max_tokens

    def tell(self, error: str = "") -> None:
        self.error = self.error or error
        self.news.set()


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
    ) -> None:
        """`heard` is called when the engine's stage, failure or readiness changed; `observers` hear of every step."""
        self.metrics = metrics or EngineMetrics("", 1)
        self._observers = (self.metrics, *observers)
        self._satisfied: set[object] = set()
        self._launch = launch
        self._load = load
        self._limits = limits or Limits()
        self._heard = heard
        self._numbers = itertools.count()
        self._streams: dict[int, _Stream] = {}
        self._room = 0
        self._sent = self._acknowledged = 0
        self._unheard: deque[_Stream] = deque()
        """Submits that `_room` does not count yet."""
        self._step_ended = 0.0
        self._out = bytearray()
        self._writable = trio.Event()
        self._sock: socket.socket | None = None
        self._child: Child | None = None
        self._heard_of = 0
        """Messages of this engine since it was ready."""
        self.stopped = False
        """`run` has ended."""
        self.facts: wire.Ready | None = None
        """Of the last engine that was ready."""
        self.ready = False
        self.stage = "waiting"
        """How far a load is, in words."""
        self.deaths = 0
        self.last_death = ""
        self.load_s = 0.0
        """How long the last load took."""
        self.failure = ""
        """Why the engine cannot be loaded; empty while there is hope."""

    # --------------------------------------------------------------------------------------------------- for anybody

    @property
    def mode(self) -> str:
        return self._launch.mode

    @property
    def pid(self) -> int | None:
        """Of the process that was started, which may be a sandbox's."""
        return self._child.pid if self._child else None

    @property
    def running(self) -> int:
        return len(self._streams)

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a sequence of this size would be taken now, by what the engine said last less what it has not counted yet."""
        size = prompt_tokens + max_tokens
        promised = sum(_room_of(stream.tokens) for stream in self._unheard)
        return self.could_fit(size) and _room_of(size) <= self._room - promised

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
        stream = _Stream(next(self._numbers), sequence, response_format, timing)
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
                outputs = list(stream.outputs)
                stream.outputs.clear()
                stream.consumed += len(outputs)
                self._credit(stream)
                if stream.fault and outputs[-1].finish_reason is FinishReason.ERROR:
                    raise PromptInvalid(f"the client's grammar passed a limit: {one_line(stream.fault)}"[:300])
                yield outputs
                if outputs[-1].finish_reason is not None:
                    return
        finally:
            if self._streams.pop(stream.number, None) is not None:
                if stream.submitted:
                    self._send(wire.Abort(stream.number))
                timing.end("stop" if sequence.id in self._satisfied else "abort", time.perf_counter())
            self._satisfied.discard(sequence.id)

    # ---------------------------------------------------------------------------------------------------- the engine

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep an engine running until cancelled; started once the first is ready. Raises `ModelError` when that one fails."""
        failed = 0
        try:
            while True:
                self.stage = "starting"
                try:
                    await self._live(task_status)
                except (EngineLost, ModelError) as lost:  # a `ModelError`: there was not even a process
                    reason, worked = one_line(str(lost))[:500], self.ready and bool(self._heard_of or self._sent)
                    self._bury(reason)
                if worked:
                    failed = 0
                    log.error("the engine died: %s; it is started again", reason)
                elif self.facts is None:
                    raise ModelError(f"the model cannot be loaded: {reason}")
                else:
                    failed += 1
                    self.failure = f"the engine cannot be started again ({failed} times): {reason}"
                    log.error("%s", self.failure)
                    self._end_all(self.failure)
                self._heard()
                if failed:
                    await trio.sleep(min(self._limits.backoff_s * 2 ** (failed - 1), self._limits.backoff_max_s))
        finally:
            self.stopped = True
            self.ready = False
            self.metrics.stats = lambda: None
            self._end_all("the model runtime is stopping")

    async def _live(self, task_status: trio.TaskStatus[None]) -> NoReturn:
        """One engine from start to death. Raises `EngineLost`."""
        ours, theirs = socket.socketpair()
        with plain_errors(), ours:
            async with self._launch.start(theirs, self._load.folder) as child:
                ours.setblocking(False)
                self._sock, self._child = ours, child
                self._out.clear()
                try:
                    reader = FrameReader(wire.TO_NODE)
                    began = trio.current_time()
                    self._send(self._load)
                    facts = await self._handshake(reader)
                    self.load_s = trio.current_time() - began
                    self._begin(facts)
                    if self.deaths == 0:
                        task_status.started()
                    with plain_errors():
                        await self._serve(reader)
                except EngineLost as lost:
                    child.kill()
                    raise EngineLost(f"{lost}; {await child.epitaph()}") from lost
                finally:
                    self._sock = self._child = None
                    ours.close()  # the end of the line is the end of a thread, too
        raise EngineLost("its line ended")

    async def _handshake(self, reader: FrameReader) -> wire.Ready:
        with trio.move_on_after(self._limits.load_s):
            while True:
                for message in await self._receive(reader):
                    match message:
                        case wire.Loading():
                            self.stage = one_line(message.stage)
                            self._heard()
                        case wire.Ready():
                            return message
                        case wire.Failed():
                            raise EngineLost(message.reason)
                        case _:
                            raise EngineLost(f"a {type(message).__name__} before it was ready")
        raise EngineLost(f"not loaded after {self._limits.load_s:g} s")

    def _begin(self, facts: wire.Ready) -> None:
        if self.facts is not None and _lasting(facts) != _lasting(self.facts):
            raise EngineLost("the model is another one than before it died")
        self.facts, self._room = facts, facts.room
        self._sent = self._acknowledged = 0
        self._unheard.clear()
        self.ready, self.stage, self.failure = True, "ready", ""
        for stream in list(self._streams.values()):
            try:
                self._submit(stream)
            except ModelError as error:
                self._end(stream, error.message)
        self._heard()

    async def _serve(self, reader: FrameReader) -> None:
        self._heard_of = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            nursery.start_soon(self._watch)
            while True:
                for message in await self._receive(reader):
                    self._heard_of += 1
                    self._take(message)

    async def _receive(self, reader: FrameReader) -> list[wire.ToNode]:
        sock = self._sock
        while sock is not None:
            try:
                data = sock.recv(_READ)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)
                continue
            except OSError as error:
                raise EngineLost(f"its line broke: {error}") from None
            if not data:
                break
            try:
                messages = [wire.read_by_node(payload) for payload in reader.feed(data)]
            except (msgspec.DecodeError, GristmillError) as error:
                raise EngineLost(f"it said what no engine says: {error}") from None
            await trio.lowlevel.checkpoint()
            return messages
        raise EngineLost("its line ended")

    async def _watch(self) -> None:
        """Four questions without any answer are a hang. Counted, not timed: if we were the ones who stood still, the first wait
        after that is one question and no more."""
        heard, silent = -1, 0
        for number in itertools.count():
            self._send(wire.Ping(number))
            await trio.sleep(self._limits.hang_s / 4)
            if len(self._out) > UNREAD:
                raise EngineLost(f"it leaves {len(self._out)} bytes unread")
            silent = 0 if self._heard_of != heard else silent + 1
            heard = self._heard_of
            if silent >= 4:
                raise EngineLost(
                    f"it hangs: no step has ended and no question was answered for {self._limits.hang_s:g} s"
                )

    # ---------------------------------------------------------------------------------------------------- what it says

    def _take(self, message: wire.ToNode) -> None:
        """Raises `EngineLost` for whatever was not asked for."""
        match message:
            case wire.Stepped():
                if not self._acknowledged <= message.submits <= self._sent:
                    raise EngineLost("it counts sequences that it was not given")
                now = time.perf_counter()
                for _ in range(message.submits - self._acknowledged):
                    taken = self._unheard.popleft()
                    if taken.number in self._streams and not taken.timing.taken:
                        taken.timing.take(now)
                self._acknowledged, self._room = message.submits, message.room
                if (stats := message.stats) is not None:
                    self.metrics.stats = lambda: stats
                if message.seconds:
                    began, self._step_ended = max(now - message.seconds, self._step_ended), now
                    for observer in self._observers:
                        observer.stepped(stats, began, now)
                fresh: dict[_Stream, list[StepOutput]] = {}
                for output in message.outputs:
                    stream = self._streams.get(output.number)
                    if stream is not None:  # else it was left, and the engine has yet to hear of it
                        fresh.setdefault(stream, []).append(self._checked(stream, output))
                for stream, outputs in fresh.items():
                    stream.outputs.extend(outputs)
                    _time(stream.timing, outputs, now)
                    if len(stream.received) - stream.consumed >= self._load.window:
                        stream.timing.pause()
                    self._credit(stream)
                    stream.tell()
            case wire.Refused():
                refused = self._streams.get(message.number)
                if refused is not None:
                    self._end(refused, f"the engine refused the sequence: {one_line(message.reason)}")
            case wire.Pong():
                pass
            case wire.Failed():
                raise EngineLost(("out of memory: " if message.memory else "") + message.reason)
            case wire.Loading() | wire.Ready():
                raise EngineLost("it started twice")

    def _checked(self, stream: _Stream, output: wire.Output) -> StepOutput:
        sequence, facts = stream.sequence, self.facts
        reason = _FINISH.get(output.finish, output.finish)
        done = len(sequence.generated_ids) + len(stream.received)
        sound = (
            isinstance(reason, FinishReason | None)
            and facts is not None
            and stream.submitted
            and output.position == len(sequence.prompt_ids) + done
            and done < sequence.max_tokens
            and len(stream.received) - stream.consumed < self._load.window + BURST
            and (output.token_id == -1 if reason is FinishReason.ERROR else 0 <= output.token_id < facts.vocab_size)
        )
        if not sound:
            raise EngineLost(f"token {output.token_id} at {output.position} is none of the stream's")
        wrong = _told_wrong(sequence.logprobs, output, facts.vocab_size if facts else 0)
        if wrong:
            raise EngineLost(f"log probabilities of token {output.token_id} at {output.position}: {wrong}")
        stream.received.append(output.token_id)
        stream.fault = output.why
        if reason is not None:
            del self._streams[stream.number]
        return StepOutput(sequence.id, output.token_id, output.position, reason, output.logprob, output.top_logprobs)

    # ---------------------------------------------------------------------------------------------------- what we say

    def _submit(self, stream: _Stream) -> None:
        sequence = stream.sequence
        sampling = sequence.sampling
        if not isinstance(sampling, SamplingParams):
            raise TypeError("a sequence's sampling is protocol.sampling's")
        self._send(
            wire.Submit(
                stream.number,
                sequence.prompt_ids,
                sampling,
                sequence.max_tokens,
                (*sequence.generated_ids, *stream.received),
                len(stream.received) - stream.consumed,
                None if sequence.eos_ids is None else tuple(sequence.eos_ids),
                sequence.logprobs,
                stream.response_format,
                sequence.salt,
                sequence.paid,
                sequence.speculate,
            )
        )
        stream.submitted = True
        stream.first = stream.credited = stream.consumed
        self._sent += 1
        self._unheard.append(stream)

    def _credit(self, stream: _Stream) -> None:
        """Let the engine know what was read: when half of the window is, or when it holds the stream."""
        if not stream.submitted:
            return
        window = self._load.window
        fresh = stream.consumed - stream.credited
        held = len(stream.received) - stream.credited >= window
        if fresh and (held or 2 * fresh >= window) and stream.number in self._streams:
            stream.credited = stream.consumed
            self._send(wire.Consumed(((stream.number, stream.consumed - stream.first),)))

    def _send(self, message: wire.ToEngine) -> None:
        """Write what the line takes now; the rest follows."""
        if self._sock is None:
            return
        try:
            self._out += wire.for_engine(message)
        except GristmillError as error:
            raise ModelError(f"the sequence is too large for the engine: {error}") from None
        self._flush()
        if self._out:
            self._writable.set()

    def _flush(self) -> None:
        try:
            while self._out and self._sock is not None:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            return
        except OSError:  # the reader hears of it, and of the reason
            self._out.clear()

    async def _write(self) -> None:
        while True:
            while self._out and self._sock is not None:
                await trio.lowlevel.wait_writable(self._sock)
                self._flush()
            self._writable = trio.Event()
            await self._writable.wait()

    # ------------------------------------------------------------------------------------------------------------ death

    def _bury(self, reason: str) -> None:
        """Take stock after a death: who waits for the next engine, and who was there once too often."""
        self.ready = False
        self.metrics.stats = lambda: None
        self._room = 0
        self._unheard.clear()
        self.deaths += 1
        self.last_death = reason
        for stream in list(self._streams.values()):
            if stream.submitted:
                stream.submitted = False
                stream.deaths += 1
                if stream.deaths >= MAX_DEATHS:
                    self._end(stream, f"the engine died {stream.deaths} times while this sequence ran, last: {reason}")

    def _end_all(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, reason)

    def _end(self, stream: _Stream, reason: str) -> None:
        """By an error."""
        del self._streams[stream.number]
        stream.timing.end("error", time.perf_counter())
        stream.tell(reason)


def _room_of(tokens: int) -> int:
    """What a sequence of so many tokens takes of the engine's room: whole blocks, and none for the last token."""
    return blocks_for(tokens - 1) * BLOCK_TOKENS


def _told_wrong(asked: int, output: wire.Output, vocabulary: int) -> str:
    """What is wrong with an output's log probabilities; empty when nothing is."""
    if not asked or output.token_id < 0:
        return "nobody asked for them" if output.top_logprobs or output.logprob is not None else ""
    return logprobs_fault(output.token_id, output.logprob, output.top_logprobs, asked, vocabulary)


def _lasting(facts: wire.Ready) -> wire.Ready:
    """What must be the same of every engine of one model."""
    return msgspec.structs.replace(facts, room=0, walls=None)


_OUTCOMES: Final = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ERROR: "error"}


def _time(timing: RequestTiming, outputs: list[StepOutput], now: float) -> None:
    """What one step brought one stream."""
    count = sum(1 for output in outputs if output.token_id >= 0)
    if count:
        timing.tokens(count, now)
    reason = outputs[-1].finish_reason
    if reason is not None:
        timing.end(_OUTCOMES[reason], now)
