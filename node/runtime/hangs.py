"""Whether the engine that runs hangs: it is silent for longer than it may be, or it answers and nothing comes of its work.

Rules
- Silence is what `node.runtime.tempo` makes of it, and never more than `Limits.hang_s`.
- What we are late ourselves is taken off the engine's silence, twice: whatever held us up may have held it up as well. It is not
  taken off the limit, or an engine that hangs on a machine that is always late would live.
- Tokens that came, and tokens of prompts, are work (`node.runtime.progress`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from node.runtime.progress import Progress
from node.runtime.streams import Stream
from node.runtime.supervisor import Limits, Patience
from node.runtime.tempo import Tempo, Work, work_of

STANDSTILL: Final = 2
"""An engine that answers must have come forward in so many times `Limits.hang_s`: every step is one, and ends in that time."""


class Hangs:
    """Of one host's engines, one after another. `streams`: all that the host has; `now`: any clock's seconds, the same one's."""

    def __init__(self, limits: Limits, *, hasty: bool, drafts: bool = False) -> None:
        """`hasty`: engines may be ended before the limit. `drafts`: they have a draft model."""
        self._limits, self._drafts = limits, drafts
        self._tempo = Tempo(limits.floor_s if hasty else limits.hang_s, limits.hang_s)
        self.begin(0.0, 0)

    def begin(self, now: float, step_tokens: int) -> None:
        """Another engine is ready, of whose prompts a step has so many tokens at most."""
        self.progress = Progress()
        self._step_tokens = step_tokens
        self._tempo.begin(now)
        self._silence, self._excused, self._standstill = Patience(), Patience(), Patience()
        self._pings = self._left_until = 0
        self._left = Work()
        """Of streams that were left, which the engine may not have heard of."""

    def ping(self) -> int:
        """The number of the next one."""
        self._pings += 1
        return self._pings

    def asked(self, now: float) -> None:
        """Something that it has to answer."""
        self._tempo.asked(now)

    def heard(
        self, now: float, streams: Collection[Stream], tokens: int = 0, longest: int = 0, seconds: float = 0.0
    ) -> None:
        """It said something: see `Tempo.heard`."""
        owes = any(one.submitted and not one.held for one in streams)
        self._tempo.heard(now, owes, tokens, longest, seconds)

    def leaves(self, stream: Stream, streams: Collection[Stream]) -> None:
        """A reader wants no more of a stream, which is none of `streams` now. Until the engine has heard of that, a step may be
        the stream's."""
        self._left |= self._work([stream, *streams])
        self._left_until = self._pings + 1

    def answered(self, ping: int) -> None:
        if ping >= self._left_until:
            self._left = Work()

    def look(self, now: float, late: float, messages: int, streams: Collection[Stream]) -> str:
        """Why it is to be ended; empty when it is not. Asked each `Limits.between_looks_s`, `late` by so many seconds.
        `messages`: that it has sent."""
        look_s, hang_s = self._limits.between_looks_s, self._limits.hang_s
        allowed = self._tempo.allowed(now, self._left | self._work(streams))
        silent = self._silence.tried(messages, look_s)
        excused = self._excused.tried(messages, max(look_s - late, 0.0))
        hasty = excused >= allowed
        if hasty and allowed < hang_s:
            self._tempo.ended(now)
        if hasty or silent >= hang_s:
            silence = allowed if hasty else hang_s
            return f"it hangs: no step has ended and no question was answered for {silence:.3g} s"
        if self._standstill.tried(self.progress.mark(streams), look_s) >= STANDSTILL * hang_s:
            return f"it hangs: it answers, and nothing came of its work for {STANDSTILL * hang_s:g} s"
        return ""

    def _work(self, streams: Collection[Stream]) -> Work:
        return work_of(streams, self._step_tokens, drafts=self._drafts)
