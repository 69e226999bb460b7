"""How long an engine may be silent: learnt from what its steps took, between a floor and a limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.runtime import tempo
from node.runtime.tempo import BACK_OFF, FORGIVEN_S, FURTHER, LATELY_S, MULTIPLE, PAUSE_S, Tempo, Work
from node.testing.planted import notices

FLOOR, LIMIT = 3.0, 30.0
ONE = Work(tokens=1, longest=100)


class Engine:
    """A clock, and an engine that steps on it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.tempo = Tempo(FLOOR, LIMIT)
        self.tempo.begin(self.now)

    def step(self, seconds: float, tokens: int = 1, longest: int = 100) -> None:
        self.tempo.asked(self.now)
        self.now += seconds
        self.tempo.heard(self.now, owes=True, tokens=tokens, longest=longest)

    def allowed(self, work: Work = ONE) -> float:
        return self.tempo.allowed(self.now, work)


def test_what_was_never_seen_has_the_limit() -> None:
    engine = Engine()
    assert engine.allowed() == LIMIT
    assert engine.allowed(Work()) == FLOOR  # it owes no step
    engine.step(0.05)
    assert engine.allowed() == FLOOR
    assert engine.allowed(Work(1, 100, excused=True)) == LIMIT
    assert engine.allowed(Work(1, FURTHER * 100)) == FLOOR
    assert engine.allowed(Work(1, FURTHER * 100 + 1)) == LIMIT


def test_another_engine_is_another_one() -> None:
    engine = Engine()
    engine.step(0.05)
    engine.tempo.begin(engine.now)
    assert engine.allowed() == LIMIT


def test_slower_and_slower_is_no_hang() -> None:
    engine = Engine()
    for seconds in (2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 20.0):
        engine.step(seconds)
        assert engine.allowed() == min(MULTIPLE * seconds, LIMIT)


def test_more_tokens_take_longer_in_proportion_at_most() -> None:
    engine = Engine()
    engine.step(0.5, tokens=32)
    assert engine.allowed(Work(64, 100)) == pytest.approx(MULTIPLE * 1.0)
    assert engine.allowed(Work(512, 100)) == LIMIT
    engine.step(0.6, tokens=256)  # what is larger was quick: so is what is smaller
    assert engine.allowed(Work(512, 100)) == pytest.approx(MULTIPLE * 1.2)
    assert engine.allowed(Work(64, 100)) == pytest.approx(MULTIPLE * 0.6)
    engine.step(2.0, tokens=16)  # what is smaller was slow: so may be what is larger
    assert engine.allowed(Work(512, 100)) == pytest.approx(MULTIPLE * 2.0)


def test_it_is_remembered_for_a_while() -> None:
    engine = Engine()
    engine.step(2.0)
    began = engine.now
    while engine.now - began < LATELY_S - 1:
        engine.step(0.5)
        assert engine.allowed() == MULTIPLE * 2.0
    while engine.now - began < 2 * LATELY_S + 10:
        engine.step(0.5)
    assert engine.allowed() == MULTIPLE * 0.5


def test_after_a_pause_a_step_has_the_limit() -> None:
    engine = Engine()
    engine.step(0.05)
    engine.tempo.heard(engine.now, owes=False)
    engine.now += PAUSE_S + 1
    assert engine.allowed() == LIMIT
    assert engine.allowed(Work()) == FLOOR
    engine.step(0.05)
    assert engine.allowed() == FLOOR


def test_time_in_which_nothing_was_owed_is_no_step() -> None:
    engine = Engine()
    engine.step(0.05)
    engine.tempo.heard(engine.now, owes=False)
    engine.now += 20
    engine.step(0.05)
    assert engine.allowed() == FLOOR


def test_the_second_hasty_end_in_a_row_makes_patient() -> None:
    engine = Engine()
    engine.step(0.05)
    seen = []
    for _ in range(4):
        seen.append(engine.allowed())
        engine.tempo.ended(engine.now)
        engine.tempo.begin(engine.now)
        engine.step(0.05)
    assert seen == [FLOOR, FLOOR, BACK_OFF * FLOOR, LIMIT]
    while engine.now - 1000 < FORGIVEN_S + 10:
        engine.step(0.05)
    assert engine.allowed() == FLOOR


def test_one_that_never_learns_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: no multiple, no patience, no proportion."""
    for name, harmless, check in (
        ("MULTIPLE", 1, test_slower_and_slower_is_no_hang),
        ("BACK_OFF", 1, test_the_second_hasty_end_in_a_row_makes_patient),
        ("PAUSE_S", 1e9, test_after_a_pause_a_step_has_the_limit),
        ("LATELY_S", 1.0, test_it_is_remembered_for_a_while),
    ):
        with monkeypatch.context() as planted:
            planted.setattr(tempo, name, harmless)
            assert notices(check), name


@given(
    st.lists(st.tuples(st.floats(0.001, 100), st.integers(1, 1000), st.integers(1, 10_000)), max_size=30),
    st.builds(Work, st.integers(0, 1000), st.integers(0, 10_000), st.booleans()),
)
def test_never_below_the_floor_nor_above_the_limit_nor_below_what_was_seen(
    steps: list[tuple[float, int, int]], work: Work
) -> None:
    engine = Engine()
    for step in steps:
        engine.step(*step)
    allowed = engine.allowed(work)
    assert FLOOR <= allowed <= LIMIT
    now, slowest = engine.now, 0.0
    for seconds, tokens, _ in reversed(steps):
        if now >= engine.now - LATELY_S and tokens.bit_length() < work.tokens.bit_length():
            slowest = max(slowest, seconds)
        now -= seconds
    assert allowed >= min(slowest, LIMIT)
