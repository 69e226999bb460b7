"""What an engine's process does between two messages: which streams step, which wait for their reader, how much room is left.

No socket, no clock, no torch. `window` is how far a stream may be ahead of its reader, so unpaid work never runs further than
that: the payment's edge reaches the engine as tokens that nobody takes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch comes after the walls: it starts threads, and a process with threads cannot leave its network
    from node.runtime.engine.sequence import Sequence, StepOutput


class StepEngine(Protocol):
    """What is needed of an engine (`node.runtime.engine.engine.Engine`)."""

    @property
    def idle(self) -> bool: ...
    @property
    def room(self) -> int: ...
    @property
    def starved(self) -> bool: ...
    def submit(self, sequence: Sequence) -> None: ...
    def abort(self, sequence_id: Hashable) -> bool: ...
    def step(self, hold: Container[Hashable] = ()) -> list[StepOutput]: ...
    def could_fit(self, tokens: int) -> bool: ...
    def check_integrity(self) -> None: ...


class Stepper:
    """One engine and the credit of its streams."""

    def __init__(self, engine: StepEngine, window: int) -> None:
        self.engine = engine
        self._window = window
        self._ahead: dict[Hashable, int] = {}
        self._start: dict[Hashable, int] = {}
        self._produced: dict[Hashable, int] = {}
        self._constraints: dict[Hashable, object] = {}
        self._changed = False
        """Something may have made room since the last step."""
        self.submits = 0
        """Sequences handed in so far, refused ones too."""

    @property
    def held(self) -> set[Hashable]:
        return {number for number, ahead in self._ahead.items() if ahead >= self._window}

    @property
    def blocked(self) -> bool:
        """Nothing to compute until a message comes."""
        starved = self.engine.starved and not self._changed
        return starved or self.engine.idle or len(self.held) == len(self._ahead)

    @property
    def room(self) -> int:
        """Tokens of cache that are free."""
        return self.engine.room

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that an idle engine takes."""
        return _largest(self.engine.could_fit)

    def submit(self, sequence: Sequence, ahead: int = 0) -> None:
        """Raises `EngineError`."""
        self.submits += 1
        self.engine.submit(sequence)
        self._changed = True
        self._ahead[sequence.id] = self._start[sequence.id] = ahead
        self._produced[sequence.id] = 0
        self._constraints[sequence.id] = sequence.constraint

    def abort(self, number: Hashable) -> None:
        self.engine.abort(number)
        self._forget(number)
        self._changed = True

    def consumed(self, number: Hashable, count: int) -> None:
        """Its reader has taken so many tokens since it was submitted."""
        if number in self._ahead:
            self._ahead[number] = self._start[number] + self._produced[number] - count
            self._changed = True

    def step(self) -> list[tuple[StepOutput, str]]:
        """One step of everything that is not held: what it brought, each with the reason why a grammar ended it, if one did.
        Raises what the engine raises, which then is of no more use."""
        outputs = []
        self._changed = False
        for output in self.engine.step(hold=self.held):
            self._ahead[output.id] += 1
            self._produced[output.id] += 1
            why = ""
            if output.finish_reason is not None:
                why = str(getattr(self._constraints[output.id], "failure", ""))[:300]
                self._forget(output.id)
            outputs.append((output, why))
        if self.engine.idle:
            self.engine.check_integrity()
        return outputs

    def _forget(self, number: Hashable) -> None:
        for books in (self._ahead, self._start, self._produced, self._constraints):
            books.pop(number, None)


def _largest(fits: Callable[[int], bool], limit: int = 1 << 30) -> int:
    """The largest count that fits, of a rule that only big ones break; about forty questions at most."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < limit and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
