"""One engine, one thread, bridged to trio.

The engine thread steps; each step's tokens cross into trio by one hop (`run_sync_soon`) for all streams together. A stream
whose consumer is behind (it has not been paid, or the peer reads slowly) is held: the engine skips it until it catches up,
so unpaid work never runs further ahead than `window` tokens.

Times are taken here, in the engine's thread, where tokens are born: what trio and the network add to them is theirs.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from node.errors import ModelError
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput
from node.telemetry.engine import EngineMetrics, EngineStats
from node.telemetry.requests import RequestTiming

if TYPE_CHECKING:
    from node.runtime.engine.engine import Engine

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Stream:
    """One sequence between the two worlds. `produced` is the thread's, `consumed` is trio's; both only read the other."""

    sequence: Sequence
    timing: RequestTiming
    outputs: deque[StepOutput] = field(default_factory=deque)
    error: str = ""
    news: trio.Event = field(default_factory=trio.Event)
    produced: int = 0
    consumed: int = 0


@dataclass(frozen=True, slots=True)
class _Submit:
    stream: _Stream


@dataclass(frozen=True, slots=True)
class _Abort:
    stream: _Stream


class _Wake:
    """A held stream has been read, or the host stops."""


_Command = _Submit | _Abort | _Wake


class StepObserver(Protocol):
    """Hears of every step, in the engine's thread; must be quick and must not raise."""

    def stepped(self, stats: EngineStats | None, began: float, ended: float) -> None:
        """`began`, `ended`: seconds of `time.perf_counter`."""


class EngineHost:
    """Owns the thread that owns the engine. `async with EngineHost.start(...)`-like use is the backend's business."""

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        window: int = 16,
        metrics: EngineMetrics | None = None,
        observers: Several[StepObserver] = (),
    ) -> None:
        self._load = load
        self.metrics = metrics or EngineMetrics("", 1)
        self._observers = (self.metrics, *observers)
        self._satisfied: set[object] = set()
        self._window = window
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[object, _Stream] = {}
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop = False
        self._ready: queue.SimpleQueue[Engine | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure = ""

    async def start(self) -> Engine:
        """Load the model in the engine's thread; returns the engine, whose constants may be read from anywhere.

        Raises `ModelError`.
        """
        self._token = trio.lowlevel.current_trio_token()
        self._thread.start()
        ready = await trio.to_thread.run_sync(self._ready.get)
        if isinstance(ready, Exception):
            raise ModelError(f"the model cannot be loaded: {ready}") from ready
        return ready

    async def stop(self) -> None:
        """End the thread; running streams end with an error."""
        self._stop = True
        self._commands.put(_Wake())
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)

    async def generate(self, sequence: Sequence) -> AsyncGenerator[list[StepOutput], None]:
        """The sequence's tokens as they come; closing the generator aborts it within a step. Raises `ModelError`."""
        timing = self.metrics.begin(
            arrived=time.perf_counter(), prompt_tokens=len(sequence.prompt_ids), max_tokens=sequence.max_tokens
        )
        stream = _Stream(sequence, timing)
        if self._stop or self.failure:
            raise ModelError(self.failure or "the model runtime is stopping")
        self._commands.put(_Submit(stream))
        try:
            while True:
                while not stream.outputs:
                    if stream.error:
                        raise ModelError(stream.error)
                    await stream.news.wait()
                    stream.news = trio.Event()
                outputs = list(stream.outputs)
                stream.outputs.clear()
                held = stream.produced - stream.consumed >= self._window
                stream.consumed += len(outputs)
                if held:
                    self._commands.put(_Wake())
                yield outputs
                if outputs[-1].finish_reason is not None:
                    return
        finally:
            self._commands.put(_Abort(stream))

    def satisfied(self, sequence_id: object) -> None:
        """The receiver has all that it wanted, a stop string for instance: when it leaves now, that is no abort."""
        self._satisfied.add(sequence_id)

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            engine = self._load()
        except Exception as error:  # the boundary of the thread: whatever it is, the operator must see it
            self._ready.put(error)
            return
        self._ready.put(engine)
        try:
            self._loop(engine)
        except Exception as error:
            log.exception("the engine failed")
            self.failure = f"the engine failed: {type(error).__name__}: {error}"[:300]
        for stream in self._streams.values():
            stream.timing.end("error" if self.failure else "abort", time.perf_counter())
            self._tell([(stream, [], self.failure or "the model runtime is stopping")])

    def _loop(self, engine: Engine) -> None:
        while not self._stop:
            held = {key for key, stream in self._streams.items() if stream.produced - stream.consumed >= self._window}
            blocked = engine.idle or len(held) == len(self._streams)
            self._obey(engine, block=blocked)
            for key in held & self._streams.keys():
                self._streams[key].timing.pause()
            computes, began = not engine.idle, time.perf_counter()
            outputs = engine.step(hold=held)
            now = time.perf_counter()
            by_stream: dict[_Stream, list[StepOutput]] = {}
            for output in outputs:
                stream = self._streams[output.id]
                stream.produced += 1
                by_stream.setdefault(stream, []).append(output)
                if output.finish_reason is not None:
                    del self._streams[output.id]
            if computes:
                stats = getattr(engine, "stats", None)
                for observer in self._observers:
                    observer.stepped(stats, began, now)
            if by_stream:
                for stream, tokens in by_stream.items():
                    _time(stream.timing, tokens, now)
                self._tell([(stream, tokens, "") for stream, tokens in by_stream.items()])
            if engine.idle:
                engine.check_integrity()

    def _obey(self, engine: Engine, *, block: bool) -> None:
        """Take every waiting command; wait for one when there is nothing to compute."""
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return
            block = False
            if isinstance(command, _Submit):
                self._submit(engine, command.stream)
            elif isinstance(command, _Abort):
                engine.abort(command.stream.sequence.id)
                if self._streams.pop(command.stream.sequence.id, None) is not None:
                    satisfied = command.stream.sequence.id in self._satisfied
                    command.stream.timing.end("stop" if satisfied else "abort", time.perf_counter())
                self._satisfied.discard(command.stream.sequence.id)

    def _submit(self, engine: Engine, stream: _Stream) -> None:
        from node.runtime.engine.errors import EngineError

        try:
            engine.submit(stream.sequence)
            self._streams[stream.sequence.id] = stream
            stream.timing.take(time.perf_counter())
        except EngineError as error:
            stream.timing.end("error", time.perf_counter())
            self._tell([(stream, [], f"the engine refused the sequence: {error}")])

    def _tell(self, news: list[tuple[_Stream, list[StepOutput], str]]) -> None:
        """One hop into trio for everything that one step brought."""

        def deliver() -> None:
            for stream, outputs, error in news:
                stream.outputs.extend(outputs)
                stream.error = stream.error or error
                stream.news.set()

        token = self._token
        if token is not None:
            try:
                token.run_sync_soon(deliver)
            except trio.RunFinishedError:
                self._stop = True


_OUTCOMES = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ERROR: "error"}


def _time(timing: RequestTiming, outputs: list[StepOutput], now: float) -> None:
    """What one step brought one stream."""
    count = sum(1 for output in outputs if output.token_id >= 0)
    if count:
        timing.tokens(count, now)
    reason = outputs[-1].finish_reason
    if reason is not None:
        timing.end(_OUTCOMES[reason], now)
