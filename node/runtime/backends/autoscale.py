"""How many replicas there should be, from how long the queue is. Pure: the clock is an argument.

Rules: what is wanted rises when somebody has waited for a place all the time for `up_s`, and falls by one when one
replica fewer would have had a place for everybody all the time for `down_s`. Between the two nothing changes, so a
load at the edge does not start and stop replicas in turns; and nothing more is started while one that was wanted is
still starting.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    least: int = 1
    most: int = 1
    up_s: float = 2.0
    down_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What is there at one moment."""

    waiting: int
    """Streams without a place."""
    active: int
    """Streams with one."""
    ready: int
    """Replicas that serve."""
    starting: int
    slots: int
    """Places of one replica."""


class Autoscaler:
    """Ask `wanted` every moment or so."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._short_since: float | None = None
        self._spare_since: float | None = None

    def wanted(self, now: float, demand: Demand) -> int:
        """Replicas that there should be, starting ones included."""
        scale, there = self._scale, demand.ready + demand.starting
        short = demand.waiting > 0
        spare = not short and demand.starting == 0 and demand.active <= (demand.ready - 1) * demand.slots
        self._short_since = (now if self._short_since is None else self._short_since) if short else None
        self._spare_since = (now if self._spare_since is None else self._spare_since) if spare else None
        wanted = there
        if self._short_since is not None and now - self._short_since >= scale.up_s and not demand.starting:
            wanted += -(-demand.waiting // demand.slots)
            self._short_since = now
        elif self._spare_since is not None and now - self._spare_since >= scale.down_s:
            wanted -= 1
            self._spare_since = now
        return min(max(wanted, scale.least), scale.most)
