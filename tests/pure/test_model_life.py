"""The table of a model's life (`node/runtime/life.py`), walked. M8."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.errors import ModelError
from node.runtime.life import TABLE, Event, Phase, can, move


def reachable(start: Phase, without: frozenset[Event] = frozenset()) -> set[Phase]:
    found, ahead = {start}, [start]
    while ahead:
        here = ahead.pop()
        for (phase, event), then in TABLE.items():
            if phase is here and event not in without and then not in found:
                found.add(then)
                ahead.append(then)
    return found


def test_every_phase_is_reached_and_left_again() -> None:
    assert reachable(Phase.COLD) == set(Phase)
    for phase in Phase:
        assert Phase.COLD in reachable(phase)
        assert Phase.READY in reachable(phase)


def test_nothing_is_ready_without_a_passed_test() -> None:
    assert {phase for (phase, event), then in TABLE.items() if then is Phase.READY} == {Phase.TESTING}
    assert Phase.READY not in reachable(Phase.COLD, frozenset({Event.PASSED}))
    assert Phase.READY not in reachable(Phase.LOADING, frozenset({Event.LOADED}))


def test_only_a_death_or_draining_ends_readiness() -> None:
    assert {event: then for (phase, event), then in TABLE.items() if phase is Phase.READY} == {
        Event.DIED: Phase.LOADING,
        Event.UNLOAD: Phase.DRAINING,
    }


def test_memory_is_free_only_after_draining() -> None:
    assert {(phase, event) for (phase, event), then in TABLE.items() if then is Phase.COLD} == {
        (Phase.DRAINING, Event.EMPTY)
    }


def test_whatever_an_engine_does_a_model_that_is_leaving_leaves() -> None:
    for event in (Event.DIED, Event.LOADED, Event.FLUNKED, Event.PASSED):
        assert move(Phase.DRAINING, event) is Phase.DRAINING


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_walks(events: list[Event]) -> None:
    """Along any legal walk from the start: tested since the last load whenever ready."""
    phase, tested = Phase.COLD, False
    for event in events:
        if not can(phase, event):
            with pytest.raises(ModelError, match=phase.value):
                move(phase, event)
            continue
        phase = move(phase, event)
        if event in (Event.LOAD, Event.DIED, Event.LOADED):
            tested = False
        if event is Event.PASSED:
            tested = True
        assert phase is not Phase.READY or tested
