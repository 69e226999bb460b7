"""How long an engine may be silent before that is a hang, learnt from how long it was. Who asks says what time it is.

Rules
- An engine says something at the end of every step, so silence is a step that does not end. One that takes `MULTIPLE` times what
  steps of its size took of late will not end; never is it less than a floor, nor more than a limit.
- What a step took is what we waited for it, or what the engine says where that is more: steps that are read together, because we
  were late, seem to take nothing. An engine that lies about it gains the limit at most, as one does whose steps are slow.
- A step is expected to take as long as the slowest one of no more tokens did, and no longer than any other in proportion to its
  tokens. So a few small ones say what the first large one may take.
- What was not seen of late is not judged and has the whole limit: a first step, also after a pause, since weights may have been
  swapped out; streams more than `FURTHER` times as long as any that brought a token; grammars, which compile between steps.
- Nor is one with a stream that has seen an engine die: another death may be its end, and must not be for haste.
- An engine without streams owes no step, only an answer, and has the floor.
- `HASTY` ends in a row may have been a slow machine's: each one more makes all of this `BACK_OFF` times as long, for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from node.runtime.streams import Stream

MULTIPLE: Final = 8
"""A machine that others use too may be several times slower from one step to the next."""
FURTHER: Final = 2
"""A token looks at all before it, so a step costs more the longer its streams are: so much is within `MULTIPLE`."""
CATCH_UP: Final = 64
"""Tokens of an answer by which a draft model has computed what is before it."""
LATELY_S: Final = 300.0
"""What was seen is remembered for so long at least, and twice as long at most while steps are made."""
PAUSE_S: Final = 60.0
HASTY: Final = 2
BACK_OFF: Final = 4
FORGIVEN_S: Final = 600.0
"""Ends that are longer ago than this do not count."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the step that runs now may consist of, at most."""

    tokens: int = 0
    longest: int = 0
    """Tokens of its longest stream."""
    excused: bool = False
    """Whatever it takes, it is not judged."""

    def __or__(self, other: Work) -> Work:
        return Work(max(self.tokens, other.tokens), max(self.longest, other.longest), self.excused or other.excused)


def work_of(streams: Iterable[Stream], step_tokens: int, *, drafts: bool = False) -> Work:
    """`step_tokens`: of prompts in one step, at most; 0: as many as there are. `drafts`: a draft model computes prompts, too, a
    piece in each step of the answer."""
    prompts = answers = longest = 0
    excused = False
    for stream in streams:
        if stream.submitted:
            answers += 1
            longest = max(longest, stream.length)
            excused = excused or stream.response_format is not None or stream.deaths > 0
            begins = stream.brought < (CATCH_UP if drafts else 1)
            if begins or not stream.sequence.paid:  # one that is not paid may be set back, and is a prompt again
                prompts += stream.length
    return Work(answers + (min(prompts, step_tokens) if step_tokens else prompts), longest, excused)


@dataclass(slots=True)
class _Seen:
    slowest: dict[int, float] = field(default_factory=dict)
    """Seconds of steps, by the largest power of two that is not above their tokens."""
    longest: int = 0
    """Tokens of the longest stream that brought one."""


class Tempo:
    """Of one host's engines, one after another."""

    def __init__(self, floor_s: float, limit_s: float) -> None:
        self._floor_s, self._limit_s = min(floor_s, limit_s), limit_s
        self._ended: deque[float] = deque(maxlen=16)
        """When engines were ended for silence below the limit."""
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Another engine is ready; nothing is known of it."""
        self._seen, self._before = _Seen(), _Seen()
        self._window = self._stepped = now
        self._owed: float | None = None
        """Since when the engine owes us something."""

    def asked(self, now: float) -> None:
        """Something that it has to answer."""
        if self._owed is None:
            self._owed = now

    def heard(self, now: float, owes: bool, tokens: int = 0, longest: int = 0, seconds: float = 0.0) -> None:
        """It said something, the end of a step of so many `tokens` if there are any, whose longest stream that brought one has
        `longest`, and which took `seconds`, as it says. `owes`: there is work left."""
        if tokens > 0:
            if now - self._window >= LATELY_S:
                self._before, self._seen, self._window = self._seen, _Seen(), now
            size, took = 1 << tokens.bit_length() - 1, 0.0 if self._owed is None else now - self._owed
            took = max(took, seconds)
            self._seen.slowest[size] = max(took, self._seen.slowest.get(size, 0.0))
            self._seen.longest = max(longest, self._seen.longest)
            self._stepped = now
        self._owed = now if owes else None

    def allowed(self, now: float, work: Work) -> float:
        """Seconds of silence that are no hang yet."""
        hasty = sum(1 for ended in self._ended if now - ended < FORGIVEN_S)
        back_off = BACK_OFF ** max(hasty - HASTY + 1, 0)
        return min(max(MULTIPLE * self._expected(now, work), self._floor_s) * back_off, self._limit_s)

    def ended(self, now: float) -> None:
        """It was ended for silence below the limit."""
        self._ended.append(now)

    def _expected(self, now: float, work: Work) -> float:
        """Seconds of the step that runs now."""
        if not work.tokens:
            return 0.0
        known = [*self._seen.slowest.items(), *self._before.slowest.items()]
        seen = FURTHER * max(self._seen.longest, self._before.longest)
        if not known or work.excused or work.longest > seen or now - self._stepped > PAUSE_S:
            return self._limit_s
        least = max((took for size, took in known if size <= work.tokens), default=0.0)
        most = min(took * max(work.tokens / size, 1.0) for size, took in known)
        return max(least, most)
