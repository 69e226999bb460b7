"""The times of one request, and the histograms that they go to. All of it belongs to the engine's thread but `arrived`.

Phases, in seconds of one clock:

    arrived --queue--> taken --prefill--> first token --decode--> last token

*queue* ends when the engine's thread takes the request; what it waits for inside the engine, because there is no memory or others
go first, is part of *prefill*. A pause that the receiver caused (it was behind, or had not paid) is no inter-token latency.
"""

from __future__ import annotations

from typing import Final, Protocol

OUTCOMES: Final = ("stop", "length", "abort", "error")
"""vLLM's words for how a request ends; `abort`: whoever asked has left."""


class Observed(Protocol):
    """Where the times go: `node.telemetry.engine.EngineMetrics`."""

    def first_token(self, seconds: float) -> None: ...

    def next_token(self, seconds: float) -> None: ...

    def ended(self, timing: RequestTiming, outcome: str, now: float) -> None: ...


class RequestTiming:
    """One request under way."""

    __slots__ = ("_last", "_to", "arrived", "first", "generated", "last", "max_tokens", "prompt_tokens", "taken")

    def __init__(self, to: Observed, *, arrived: float, prompt_tokens: int, max_tokens: int) -> None:
        self._to = to
        self.arrived = arrived
        self.taken = 0.0
        self.first = 0.0
        self.last = 0.0
        """When the newest token was there; 0 before the first one."""
        self._last = 0.0
        """As `last`, but 0 after a pause."""
        self.generated = 0
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens

    def take(self, now: float) -> None:
        """The engine's thread has it."""
        self.taken = now

    def tokens(self, count: int, now: float) -> None:
        """One step brought so many."""
        if not self.generated:
            self.first = now
            self._to.first_token(now - self.arrived)
        elif self._last:
            self._to.next_token(now - self._last)
        self.generated += count
        self.last = self._last = now

    def pause(self) -> None:
        """Its receiver makes it wait."""
        self._last = 0.0

    def end(self, outcome: str, now: float) -> None:
        """One of `OUTCOMES`."""
        self._to.ended(self, outcome, now)
