"""How much strangers may make a worker do: so much per stranger and so much in all, each over its own time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass

from protocol.admission import Rejected
from protocol.errors import RefusalReason


@dataclass(frozen=True, slots=True)
class Limits:
    each: int
    """For one of them ..."""
    each_s: int
    """... in so many seconds."""
    all: int
    all_s: int
    what: str
    """For people: what is counted."""


class Allowance:
    """Counts what was taken of late. Memory: what fits into the longer time, which `all` bounds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._each: deque[tuple[int, Hashable, int]] = deque()
        self._by: Counter[Hashable] = Counter()
        self._all: deque[tuple[int, int]] = deque()
        self._total = 0

    def take(self, who: Hashable, now_s: int, amount: int = 1) -> None:
        """Raises `Rejected` (BUSY) when there is not so much left; nothing is counted then."""
        limits = self._limits
        while self._each and self._each[0][0] <= now_s - limits.each_s:
            _, old, gone = self._each.popleft()
            self._by[old] -= gone
            if not self._by[old]:
                del self._by[old]
        while self._all and self._all[0][0] <= now_s - limits.all_s:
            self._total -= self._all.popleft()[1]
        if self._by[who] + amount > limits.each:
            raise Rejected(
                RefusalReason.BUSY, f"{limits.each} {limits.what} in {limits.each_s} s for one client are the limit"
            )
        if self._total + amount > limits.all:
            raise Rejected(RefusalReason.BUSY, f"too many {limits.what} for all clients together; ask again later")
        self._each.append((now_s, who, amount))
        self._by[who] += amount
        self._all.append((now_s, amount))
        self._total += amount
