"""A model's life on one worker, as a table. Pure; an illegal move is a missing key.

Rules
- What is advertised has passed its self-test since its engine last started.
- A model that dies goes through its test again before it is advertised again; its streams do not wait long for that.
- Draining is the only way out of `READY` but death, so no stream is cut off by an operator's wish.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from node.errors import ModelError


class Phase(StrEnum):
    COLD = "cold"
    """Known, and not in memory."""
    LOADING = "loading"
    """Its engine starts, for the first time or again after a death."""
    TESTING = "testing"
    """Its engine runs; the self-test job is under way."""
    READY = "ready"
    """Tested: new jobs are taken."""
    DRAINING = "draining"
    """No new jobs; those that run come to their end."""
    FAILED = "failed"
    """It could not be loaded or did not pass its test. Nobody is sold it."""


class Event(StrEnum):
    LOAD = "load"
    """The operator, a job for a cold model, or the start wants it in memory."""
    LOADED = "loaded"
    PASSED = "passed"
    FLUNKED = "flunked"
    """The load failed, or the self-test did."""
    DIED = "died"
    """The engine ended by itself; it is started again."""
    UNLOAD = "unload"
    """The operator, or another model that needs the memory, wants it out."""
    EMPTY = "empty"
    """The last stream has ended and the memory is free."""


TABLE: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (Phase.COLD, Event.LOAD): Phase.LOADING,
    (Phase.LOADING, Event.LOADED): Phase.TESTING,
    (Phase.LOADING, Event.FLUNKED): Phase.FAILED,
    (Phase.LOADING, Event.UNLOAD): Phase.DRAINING,
    (Phase.TESTING, Event.PASSED): Phase.READY,
    (Phase.TESTING, Event.FLUNKED): Phase.FAILED,
    (Phase.TESTING, Event.DIED): Phase.LOADING,
    (Phase.TESTING, Event.UNLOAD): Phase.DRAINING,
    (Phase.READY, Event.DIED): Phase.LOADING,
    (Phase.READY, Event.UNLOAD): Phase.DRAINING,
    (Phase.DRAINING, Event.DIED): Phase.DRAINING,
    (Phase.DRAINING, Event.LOADED): Phase.DRAINING,
    (Phase.DRAINING, Event.FLUNKED): Phase.DRAINING,
    (Phase.DRAINING, Event.PASSED): Phase.DRAINING,
    (Phase.DRAINING, Event.EMPTY): Phase.COLD,
    (Phase.FAILED, Event.LOAD): Phase.LOADING,
    (Phase.FAILED, Event.LOADED): Phase.TESTING,
    (Phase.FAILED, Event.FLUNKED): Phase.FAILED,
    (Phase.FAILED, Event.UNLOAD): Phase.DRAINING,
}


def move(phase: Phase, event: Event) -> Phase:
    """The phase after an event. Raises `ModelError` for one that cannot happen in this phase."""
    try:
        return TABLE[phase, event]
    except KeyError:
        raise ModelError(f"a model that is {phase} knows no {event}") from None


def can(phase: Phase, event: Event) -> bool:
    return (phase, event) in TABLE
