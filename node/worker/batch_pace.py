"""Is a batch job in time, and may it go on beside live streams? Pure: seconds and counts in, a decision out.

Batch jobs give way to live streams as long as they can afford to (`pressed`). A job that cannot be done is given up early enough
to say so before its deadline, which costs a quarter of silence (`hopeless`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ENOUGH_ITEMS: Final = 4
"""Finished here since the start, before their speed is taken for the job's."""
SLACK: Final = 1.5
"""Work takes so much longer than it looks."""
BEYOND: Final = 3.0
"""So much more work than time is beyond hope: an estimate that is a little off must not end a job."""


@dataclass(frozen=True, slots=True)
class Pace:
    left: int
    """Items that are not finished."""
    finished: float
    """Items that were finished since this process took the job up, without what was computed of them in the streams' time."""
    busy_s: float
    """Seconds in which at least one of its items was computed, since then; pauses and the streams' time left out."""
    guess_s: float
    """Seconds per item, from the self-test, for as long as too few are finished; 0 when that is unknown."""

    @property
    def needed_s(self) -> float:
        """Seconds of work that are left, as far as one can tell; 0 when nothing is known."""
        each = self.busy_s / self.finished if self.finished >= ENOUGH_ITEMS else self.guess_s
        return each * self.left


def pressed(pace: Pace, time_left_s: float) -> bool:
    """No time to give way any more."""
    return pace.left > 0 and pace.needed_s * SLACK >= time_left_s


def hopeless(pace: Pace, time_left_s: float) -> bool:
    """Not to be done in time, whatever happens. `time_left_s`: until the margin before the deadline begins."""
    if not pace.left:
        return False
    if time_left_s <= 0:
        return True
    return pace.finished >= ENOUGH_ITEMS and pace.needed_s > time_left_s * BEYOND


class Share:
    """The part of the time in which batch items may go on while live streams run: one item at once, in turns of one step.

    A turn that took t seconds is followed by a rest of t (1 - part) / part, so however long a step is, all turns together
    take `part` of the time, 0 to 1.
    """

    def __init__(self, part: float) -> None:
        self._part = part
        self._taken, self._since = False, 0.0
        self._rest_until = -1e18

    def take(self, now: float) -> bool:
        """Begin a turn, if there is one to be had."""
        if not self._part or self._taken or now < self._rest_until:
            return False
        self._taken, self._since = True, now
        return True

    def give(self, now: float) -> None:
        """End the turn that was taken."""
        self._taken = False
        self._rest_until = now + (now - self._since) * (1 - self._part) / self._part

    def rest(self, now: float) -> float:
        """Seconds until a turn may begin."""
        return max(self._rest_until - now, 0.0)
