"""One stream between its reader and an engine that is not trusted: what was asked, what came of it, how far the reader is.

A stream outlives engines: what it needs to go on with another one is the tokens that came. A stream whose reader is behind by the
window is held, so unpaid work never runs further ahead than that.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import trio

from node.runtime import wire
from node.runtime.engine.blocks import BLOCK_TOKENS, blocks_for
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput
from node.runtime.link import ProcessLost
from node.telemetry.requests import RequestTiming
from protocol.logprobs import fault as logprobs_fault
from protocol.messages import ResponseFormat
from protocol.sampling import SamplingParams

BURST: Final = 256
"""Tokens that one step may bring one stream beyond its window: speculative decoding brings several."""
_FINISH: Final = {"": None, **{reason.value: reason for reason in FinishReason}}
_OUTCOMES: Final = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ERROR: "error"}


@dataclass(eq=False, slots=True)
class Stream:
    number: int
    sequence: Sequence
    response_format: ResponseFormat | None
    timing: RequestTiming
    window: int
    received: list[int] = field(default_factory=list)
    """Every token that an engine sent."""
    outputs: deque[StepOutput] = field(default_factory=deque)
    """Of those, what the reader has yet to take."""
    consumed: int = 0
    first: int = 0
    """`consumed` when it was last submitted."""
    credited: int = 0
    """What the engine knows of `consumed`."""
    had: int = 0
    """Tokens that had come when it was last submitted."""
    submitted: bool = False
    """The engine that runs now has it."""
    deaths: int = 0
    """Engines that died while they had it."""
    error: str = ""
    fault: str = ""
    """Which limit its grammar passed."""
    news: trio.Event = field(default_factory=trio.Event)

    @property
    def room(self) -> int:
        """What it takes of the engine's room: whole blocks, and none for the last token."""
        return room_of(len(self.sequence.prompt_ids) + self.sequence.max_tokens)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.sequence.prompt_ids) + len(self.sequence.generated_ids) + len(self.received)

    @property
    def held(self) -> bool:
        """The reader has a whole window to take, and the engine waits for it."""
        return len(self.received) - self.consumed >= self.window

    @property
    def brought(self) -> int:
        """Tokens of it that came from the engine that has it."""
        return len(self.received) - self.had

    def question(self) -> wire.Submit:
        """What an engine is asked, for a first time or again."""
        sequence, sampling = self.sequence, self.sequence.sampling
        if not isinstance(sampling, SamplingParams):
            raise TypeError("a sequence's sampling is protocol.sampling's")
        self.first = self.credited = self.consumed
        self.had = len(self.received)
        return wire.Submit(
            self.number,
            sequence.prompt_ids,
            sampling,
            sequence.max_tokens,
            (*sequence.generated_ids, *self.received),
            len(self.received) - self.consumed,
            None if sequence.eos_ids is None else tuple(sequence.eos_ids),
            sequence.logprobs,
            self.response_format,
            sequence.salt,
            sequence.paid,
            sequence.speculate,
        )

    def accept(self, output: wire.Output, vocab_size: int) -> StepOutput:
        """A token that the engine sent. Raises `ProcessLost` when it cannot be the stream's next one."""
        reason = _FINISH.get(output.finish, output.finish)
        sound = (
            isinstance(reason, FinishReason | None)
            and self.submitted
            and output.position == self.length
            and self.length < len(self.sequence.prompt_ids) + self.sequence.max_tokens
            and len(self.received) - self.consumed < self.window + BURST
            and (output.token_id == -1 if reason is FinishReason.ERROR else 0 <= output.token_id < vocab_size)
        )
        if not sound:
            raise ProcessLost(f"token {output.token_id} at {output.position} is none of the stream's")
        if wrong := _told_wrong(self.sequence.logprobs, output, vocab_size):
            raise ProcessLost(f"log probabilities of token {output.token_id} at {output.position}: {wrong}")
        self.received.append(output.token_id)
        self.fault = output.why
        return StepOutput(
            self.sequence.id, output.token_id, output.position, reason, output.logprob, output.top_logprobs
        )

    def deliver(self, outputs: list[StepOutput], now: float) -> None:
        """What one step brought, for the reader. `now`: `time.perf_counter`."""
        self.outputs.extend(outputs)
        count = sum(1 for output in outputs if output.token_id >= 0)
        if count:
            self.timing.tokens(count, now)
        reason = outputs[-1].finish_reason
        if reason is not None:
            self.timing.end(_OUTCOMES[reason], now)
        if self.held:
            self.timing.pause()
        self.tell()

    def take(self) -> list[StepOutput]:
        """All that is there for the reader."""
        outputs = list(self.outputs)
        self.outputs.clear()
        self.consumed += len(outputs)
        return outputs

    def credit(self) -> wire.Consumed | None:
        """What the engine is to know of the reader: when half of the window was read, or when it holds the stream."""
        fresh = self.consumed - self.credited
        held = len(self.received) - self.credited >= self.window
        if not fresh or not self.submitted or not (held or 2 * fresh >= self.window):
            return None
        self.credited = self.consumed
        return wire.Consumed(((self.number, self.consumed - self.first),))

    def lost(self) -> int:
        """Its engine has died; how many did so far."""
        self.submitted = False
        self.deaths += 1
        return self.deaths

    def fail(self, error: str) -> None:
        self.timing.end("error", time.perf_counter())
        self.tell(error)

    def tell(self, error: str = "") -> None:
        self.error = self.error or error
        self.news.set()


def room_of(tokens: int) -> int:
    """What a sequence of so many tokens, prompt and answer at most, takes of an engine's room."""
    return blocks_for(tokens - 1) * BLOCK_TOKENS


def _told_wrong(asked: int, output: wire.Output, vocabulary: int) -> str:
    """What is wrong with an output's log probabilities; empty when nothing is."""
    if not asked or output.token_id < 0:
        return "nobody asked for them" if output.top_logprobs or output.logprob is not None else ""
    return logprobs_fault(output.token_id, output.logprob, output.top_logprobs, asked, vocabulary)
