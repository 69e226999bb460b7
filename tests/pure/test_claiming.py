"""The claim policy, attacked (P1 to P5): fees, values and departures chosen by an adversary."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace as changed
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from protocol import claiming
from protocol.channel import ChannelState, Role
from protocol.claiming import (
    BATCH,
    COIN,
    GAS_BASE,
    GAS_EACH,
    GAS_SETTLE,
    PATIENCE,
    ClaimTerms,
    due,
    is_old,
    worth_settling,
)
from protocol.ids import Address, ChannelId, Hash32
from protocol.typed_data import ChannelConfig

ADDRESS = Address(b"\x11" * 20)
DAY = 86_400
GAS = json.loads((Path(__file__).parents[1] / "contracts" / "gas.json").read_text())


def channel(n: int, claimable: int, *, delay: int = DAY, leaving: bool = False, claimed: int = 0) -> ChannelState:
    config = ChannelConfig(ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, delay, Hash32(bytes(32)))
    total = claimed + claimable
    return ChannelState(
        role=Role.WORKER,
        channel_id=ChannelId(n.to_bytes(32)),
        config=config,
        authorized=total,
        valid_before=0,
        allocation_signature=b"",
        allocated=total,
        claimed=claimed,
        withdraw_at=1 if leaving else 0,
        cumulative=total,
        spent=total,
    )


def chosen(
    states: list[ChannelState], terms: ClaimTerms, fee: int = 0, ages: dict[int, float] | None = None
) -> set[int]:
    since = {ChannelId(n.to_bytes(32)): -age for n, age in (ages or {}).items()}
    batches = due(states, lambda _: terms, since, 0.0, fee)
    return {int.from_bytes(state.channel_id) for batch in batches for state in batch}


# ------------------------------------------------------------------------------------------------------------- by hand

WEIGHED = ClaimTerms(minimum=10, coin_value=COIN, gain_percent=1000)
"""One smallest unit is worth one wei."""


def test_gas_is_a_line_above_what_the_contracts_use() -> None:
    assert GAS["claim_first"] <= GAS_BASE + GAS_EACH and GAS["claim_one"] <= GAS_BASE + GAS_EACH
    assert GAS["claim_100"] <= GAS_BASE + 100 * GAS_EACH <= GAS["claim_100"] * 1.1
    assert GAS["settle_first"] <= GAS_SETTLE <= GAS["settle_first"] * 1.1
    assert GAS_BASE + BATCH * GAS_EACH < 1 << 24


def test_without_a_coin_value_the_minimum_decides() -> None:
    terms = ClaimTerms(minimum=10)
    states = [channel(1, 9), channel(2, 10), channel(3, 1, leaving=True), channel(4, 1)]
    assert chosen(states, terms, fee=10**18) == {2, 3}
    assert chosen(states, terms, ages={4: DAY / 4 - 1}) == {2, 3}
    assert chosen(states, terms, ages={4: DAY / 4}) == {2, 3, 4}


def test_a_free_claim_waits_until_it_is_worth_its_gas() -> None:
    whole = GAS_BASE + GAS_EACH
    assert chosen([channel(1, 10 * whole - 1)], WEIGHED, fee=1) == set()
    assert chosen([channel(1, 10 * whole)], WEIGHED, fee=1) == {1}
    assert chosen([channel(1, 10 * whole)], WEIGHED, fee=2) == set()
    many = [channel(n, 10 * GAS_EACH + GAS_BASE) for n in range(10)]  # together they carry the base
    assert len(chosen(many, WEIGHED, fee=1)) == 10 and chosen(many[:9], WEIGHED, fee=1) == set()


def test_forced_money_is_claimed_when_it_gains_anything() -> None:
    whole = GAS_BASE + GAS_EACH
    for leaving, ages in ((True, {}), (False, {1: DAY})):
        assert chosen([channel(1, whole + 1, leaving=leaving)], WEIGHED, 1, ages) == {1}
        assert chosen([channel(1, whole, leaving=leaving)], WEIGHED, 1, ages) == set()
        assert chosen([channel(1, 1, leaving=leaving)], changed(WEIGHED, at_loss=True), 1, ages) == {1}


def test_a_leaving_payer_is_carried_by_those_who_stay() -> None:
    rich, poor = channel(1, 100 * GAS_BASE * 10), channel(2, GAS_EACH + 1, leaving=True)
    assert chosen([poor], WEIGHED, 1) == set()
    assert chosen([rich, poor], WEIGHED, 1) == {1, 2}


def test_closed_channels_and_empty_ones_are_left_alone() -> None:
    states = [replace(channel(1, 100), closed=True), channel(2, 0), replace(channel(3, 100), allocated=0)]
    assert due(states, lambda _: ClaimTerms(minimum=1), {}, 0.0, 0, everything=True) == []


def test_settling_waits_until_it_is_worth_its_gas() -> None:
    assert not worth_settling(0, WEIGHED, 0, everything=True)
    assert worth_settling(1, WEIGHED, 10**18, everything=True)
    assert not worth_settling(10 * GAS_SETTLE - 1, WEIGHED, 1) and worth_settling(10 * GAS_SETTLE, WEIGHED, 1)
    assert not worth_settling(9, ClaimTerms(minimum=10), 1) and worth_settling(10, ClaimTerms(minimum=10), 1)


# ---------------------------------------------------------------------------------------------------------- by an enemy

AMOUNTS = st.integers(0, 2**128 - 1) | st.integers(0, 10**7)
TERMS = st.builds(
    ClaimTerms,
    minimum=st.integers(0, 10**6),
    coin_value=st.just(0) | st.integers(1, 10**30),
    gain_percent=st.integers(0, 10_000),
    at_loss=st.booleans(),
)
CHANNELS = st.lists(
    st.tuples(AMOUNTS, st.booleans(), st.integers(900, 30 * DAY), st.floats(0, 10 * DAY), st.integers(0, 2)),
    max_size=30,
)


@settings(max_examples=400, deadline=None)
@given(CHANNELS, st.lists(TERMS, min_size=3, max_size=3), st.integers(0, 10**13), st.integers(1, 7))
def test_no_claim_pays_more_than_it_gains_and_no_money_is_left(
    rows: list[tuple[int, bool, int, float, int]], terms: list[ClaimTerms], fee: int, batch: int
) -> None:
    check_round(rows, terms, fee, batch)


def check_round(
    rows: list[tuple[int, bool, int, float, int]], terms: list[ClaimTerms], fee: int, batch: int, rules: Any = claiming
) -> None:
    """P1 to P4 of one round, whatever the channels, the operator and the fee are."""
    states = [channel(n, amount, delay=delay, leaving=leaving) for n, (amount, leaving, delay, _, _) in enumerate(rows)]
    since = {state.channel_id: -rows[n][3] for n, state in enumerate(states)}
    kind = {state.channel_id: terms[rows[n][4]] for n, state in enumerate(states)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "BATCH", batch)
        batches = rules.due(states, lambda state: kind[state.channel_id], since, 0.0, fee)
    assert all(1 <= len(one) <= batch for one in batches), "P3"
    taken = [state.channel_id for one in batches for state in one]
    assert len(taken) == len(set(taken))
    leavers = [state.withdraw_at != 0 for one in batches for state in one]
    assert leavers == sorted(leavers, reverse=True), "P4"

    def forced(state: ChannelState) -> bool:
        return state.withdraw_at != 0 or is_old(state, since[state.channel_id], 0.0)

    for one in batches:
        weighed = [s for s in one if kind[s.channel_id].coin_value]
        free = [s for s in one if not forced(s)]
        assert all(s.claimable >= kind[s.channel_id].minimum for s in free)
        if len(weighed) < len(one) or any(forced(s) and kind[s.channel_id].at_loss for s in one):
            continue
        worth = sum(kind[s.channel_id].in_wei(s.claimable) or 0 for s in one)
        gas = (GAS_BASE + GAS_EACH * len(one)) * fee
        if len(free) == len(one):
            assert all(worth * 100 >= kind[s.channel_id].gain_percent * gas for s in one), "P2"
        assert worth >= gas, "P2: nothing that may be left is claimed at a loss"

    left = [s for s in states if s.claimable and forced(s) and s.channel_id not in taken]
    for state in left:
        one_terms = kind[state.channel_id]
        worth = one_terms.in_wei(state.claimable)
        assert worth is not None and not one_terms.at_loss, "P1: forced money that nothing weighs is claimed"
        assert worth <= (GAS_BASE + GAS_EACH) * fee, "P1: what is left is not worth a claim of its own"


class Market:
    """Payers who spend, and leave at the worst moment; a worker that looks when the policy says so."""

    def __init__(self, delay: int, every_s: int, terms: ClaimTerms, rules: Any = claiming) -> None:
        self.now = 0.0
        self.states: dict[ChannelId, ChannelState] = {}
        self.delay, self.every_s, self.terms, self.rules = delay, every_s, terms, rules
        self.since: dict[ChannelId, float] = {}
        self.waiting: dict[ChannelId, float] = {}
        """The truth: since when each has had something to claim that is worth a claim."""
        self.lost = 0
        self.paid_gas = self.gained = 0
        self.fee = 1
        self.next_look = 0.0

    def earn(self, n: int, amount: int) -> None:
        key = ChannelId(n.to_bytes(32))
        held = self.states.get(key) or channel(n, 0, delay=self.delay)
        if held.withdraw_at or held.closed:
            return
        total = held.spent + amount
        self.states[key] = replace(held, allocated=total, authorized=total, cumulative=total, spent=total)
        worth = self.terms.in_wei(self.states[key].claimable)
        if worth is None or worth > (GAS_BASE + GAS_EACH) * self.fee or self.terms.at_loss:
            self.waiting.setdefault(key, self.now)

    def leave(self, n: int) -> None:
        key = ChannelId(n.to_bytes(32))
        held = self.states.get(key)
        if held is not None and not held.withdraw_at and not held.closed:
            self.states[key] = replace(held, withdraw_at=int(self.now) + self.delay)
            self.look()  # the event, or the next reading, makes the claimer hurry

    def look(self) -> None:
        for state in self.states.values():
            if state.claimable:
                self.since.setdefault(state.channel_id, self.now)
        for batch in self.rules.due(self.states.values(), lambda _: self.terms, self.since, self.now, self.fee):
            self.paid_gas += (GAS_BASE + GAS_EACH * len(batch)) * self.fee
            for state in batch:
                self.gained += self.terms.in_wei(state.claimable) or 0
                self.states[state.channel_id] = replace(state, claimed=state.claimed + state.claimable)
                self.since.pop(state.channel_id, None)
                self.waiting.pop(state.channel_id, None)
        self.next_look = self.now + self.rules.look_within(self.states.values(), self.every_s, self.delay)

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            ends = [s.withdraw_at for s in self.states.values() if s.withdraw_at and not s.closed]
            self.now = min(until, max(self.now, self.next_look), *(max(self.now, end) for end in ends))
            for key, state in list(self.states.items()):
                if state.withdraw_at and not state.closed and self.now >= state.withdraw_at:
                    self.lost += state.claimable  # the payer takes the rest home
                    self.states[key] = replace(state, closed=True)
                    self.waiting.pop(key, None)
            if self.now >= self.next_look:
                self.look()

    def check(self) -> None:
        for began in self.waiting.values():
            assert self.now - began <= self.delay / 2, "P5: money waited for more than half of its delay"


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("earn"), st.integers(0, 5), st.integers(1, 10**6)),
        st.tuples(st.just("leave"), st.integers(0, 5)),
        st.tuples(st.just("time"), st.floats(1, 5_000)),
    ),
    max_size=40,
)


def play(actions: list[tuple[Any, ...]], market: Market) -> Market:
    for action in actions:
        match action:
            case "earn", n, amount:
                market.earn(n, amount)
            case "leave", n:
                market.leave(n)
            case "time", seconds:
                market.pass_time(seconds)
        market.check()
    return market


@settings(max_examples=300, deadline=None)
@given(ACTIONS, st.integers(900, 20_000), st.integers(1, 604_800), TERMS)
def test_no_claimable_money_outlives_its_delay(
    actions: list[tuple[Any, ...]], delay: int, every_s: int, terms: ClaimTerms
) -> None:
    """P1 and P5 over time: payers choose when they spend and when they leave."""
    market = play(actions, Market(delay, every_s, terms))
    market.pass_time(delay + 1)
    per_channel = terms.in_wei(market.lost)
    if terms.at_loss or per_channel is None:
        assert market.lost == 0
    else:
        assert per_channel <= 6 * (GAS_BASE + GAS_EACH) * market.fee + 6
        assert market.gained >= market.paid_gas


# --------------------------------------------------------------------------------------------------------- planted bugs


SOURCE = inspect.getsource(claiming)
PLANTED: dict[str, tuple[str, str]] = {
    "P1 no claim is forced by age": (
        "(now_s - since) * PATIENCE >= state.config.withdraw_delay",
        "False",
    ),
    "P1 age counts twice": ("(now_s - since) * PATIENCE >=", "(now_s - since) * 2 >="),
    "P1 who leaves forces nothing": ("forced = leaving or is_old(", "forced = is_old("),
    "P1 forced money must gain ten times its gas": (
        "return one.worth > each if one.forced else one.worth * 100 >= one.gain_percent * each",
        "return one.worth * 100 >= one.gain_percent * each",
    ),
    "P1 what nothing weighs is left": (
        "if one.worth is None or (one.forced and one.at_loss):\n        return True",
        "if one.worth is None:\n        return False",
    ),
    "P2 gas is not weighed": ("if everything or _carries_base(batch, fee)]", "]"),
    "P2 a claim that gains nothing is made": ("worth > cost\n", "worth >= cost // 2\n"),
    "P2 the base is forgotten": ("cost = (GAS_BASE + GAS_EACH * len(batch)) * fee", "cost = GAS_EACH * len(batch) * fee"),
    "P2 every channel is held to the mildest terms": (
        "max(one.gain_percent for one in batch) * cost",
        "min(one.gain_percent for one in batch) * cost",
    ),
    "P2 the minimum does not count": ("if not one.forced and one.state.claimable < terms.minimum:", "if False:"),
    "P3 401 channels": ("BATCH: Final = 400", "BATCH: Final = 401"),
    "P3 a batch has one more": ("wanted[start : start + BATCH]", "wanted[start : start + BATCH + 1]"),
    "P3 one batch for all": ("for start in range(0, len(wanted), BATCH)]", "for start in (0,) for BATCH in [10**9] if wanted]"),
    "P4 who leaves goes last": ("key=lambda one: (not one.leaving,", "key=lambda one: (one.leaving,"),
    "P4 who leaves waits for the rich": ("key=lambda one: (not one.leaving, one", "key=lambda one: (one"),
    "P4 the order of the book": (
        "    wanted.sort(key=lambda one: (not one.leaving, one.worth is not None, -(one.worth or one.state.claimable)))\n",
        "",
    ),
    "P5 looks as rare as money may wait": ("LOOKS: Final = 8", "LOOKS: Final = 2"),
    "P5 a look in a whole delay": (
        "state.config.withdraw_delay / LOOKS for state",
        "state.config.withdraw_delay for state",
    ),
    "P5 the channels that open meanwhile are forgotten": ("[every_s, least_delay / LOOKS, *delays]", "[every_s, *delays]"),
    "P5 the channels that are open are forgotten": ("[every_s, least_delay / LOOKS, *delays]", "[every_s, least_delay / LOOKS]"),
    "P5 the operator decides": ("min([every_s, least_delay / LOOKS, *delays])", "every_s"),
    "P5 the longest delay counts": ("least_delay / LOOKS, *delays])", "least_delay / LOOKS, max(delays, default=every_s)])"),
}  # fmt: skip


def planted(old: str, new: str) -> Any:
    """`protocol.claiming` with one text replaced."""
    assert SOURCE.count(old) == 1, f"the source has changed: {old!r} must be planted anew"
    module = ModuleType("protocol.claiming")
    exec(compile(SOURCE.replace(old, new), "planted", "exec"), module.__dict__)  # our own source
    return module


def attack(rules: Any) -> None:
    """Everything that an enemy tries, in an order of its own: rounds, looks, and games over time."""
    check_batches(rules)
    check_looks(rules)
    check_forced(rules)
    unit = GAS_BASE + GAS_EACH
    amounts = [0, 1, 99, 100, GAS_EACH, GAS_EACH + 1, unit, unit + 1, 5 * unit, 10 * unit - 1, 10 * unit, 1000 * unit]
    for seed in range(300):
        random = Random(seed)

        def terms(random: Random = random) -> ClaimTerms:
            return ClaimTerms(
                minimum=random.choice([0, 100, unit]),
                coin_value=random.choice([0, COIN, COIN]),
                gain_percent=random.choice([0, 100, 1000]),
                at_loss=random.random() < 0.1,
            )

        kinds = [terms()] * 3 if random.random() < 0.5 else [terms() for _ in range(3)]
        restless = random.choice([0, 0.3])
        rows = [
            (random.choice(amounts), random.random() < restless, DAY, DAY * (random.random() < restless), kind)
            for kind in (random.randrange(3) for _ in range(random.randrange(12)))
        ]
        check_round(rows, kinds, random.choice([0, 1, 2]), random.randrange(1, 8), rules)
    dear = ClaimTerms(minimum=100, coin_value=COIN // 1000, gain_percent=1000)  # a unit is worth a thousand gas
    for seed in range(100):
        random = Random(seed)
        game: list[tuple[Any, ...]] = []
        for _ in range(12):
            n = random.randrange(3)
            game.append(
                random.choice(
                    [("earn", n, random.choice([1, 100, 10_000])), ("leave", n), ("time", random.uniform(1, 900))]
                )
            )
        market = play(game, Market(900, 604_800, dear, rules))
        market.pass_time(901)
        assert (dear.in_wei(market.lost) or 0) <= 3 * (GAS_BASE + GAS_EACH) and market.gained >= market.paid_gas


def check_batches(rules: Any) -> None:
    """P3 and P4, at the size that a transaction really has."""
    states = [channel(n, 1_000_000 + n) for n in range(1000)] + [channel(n, 5, leaving=True) for n in range(1000, 1010)]
    batches = rules.due(states, lambda _: ClaimTerms(minimum=1), {}, 0.0, 0)
    assert [len(batch) for batch in batches] == [400, 400, 210], "P3"
    assert {int.from_bytes(state.channel_id) for state in batches[0][:10]} == set(range(1000, 1010)), "P4"
    rest = [state.claimable for batch in batches for state in batch][10:]
    assert rest == sorted(rest, reverse=True), "the most valuable first"


def check_looks(rules: Any) -> None:
    """P5: money is forced at the first look after a quarter of its delay, and that look is over before the half."""
    for delays in ([], [900], [900, DAY], [DAY, 900, 30 * DAY]):
        for least in (900, 3600, DAY):
            for every_s in (1, 60, 604_800):
                states = [channel(n, 10, delay=delay) for n, delay in enumerate(delays)]
                within = rules.look_within(states, every_s, least)
                assert 0 < within <= every_s
                assert all(delay / PATIENCE + within <= delay / 2 for delay in (least, *delays)), "P5"


def check_forced(rules: Any) -> None:
    """P1: at a quarter of the delay, and not before."""
    poor = ClaimTerms(minimum=100)
    for age, claimed in ((DAY / PATIENCE - 1, False), (DAY / PATIENCE, True)):
        one = channel(1, 1)
        assert bool(rules.due([one], lambda _: poor, {one.channel_id: -age}, 0.0, 0)) is claimed, "P1"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str) -> None:
    bugged = planted(*PLANTED[name])
    with pytest.raises(AssertionError):
        attack(bugged)


def test_without_a_planted_bug_the_attack_finds_nothing() -> None:
    unchanged = "return worth * 100"
    attack(claiming)
    attack(planted(unchanged + " >= max(100", unchanged + " >= max(100"))
