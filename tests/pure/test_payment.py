"""How far ahead the client pays: never more than a tick and the prompt, never so little that an honest worker waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from protocol import payment
from protocol.channel import ChannelState, JobEnded, JobOpened, Part, Role, VoucherAdded, apply
from protocol.errors import ProtocolError
from protocol.ids import ZERO_ADDRESS, ChannelId, Hash32, JobId
from protocol.pricing import Price, cost
from protocol.typed_data import ChannelConfig

CHANNEL = ChannelId(bytes(32))
CONFIG = ChannelConfig(ZERO_ADDRESS, ZERO_ADDRESS, ZERO_ADDRESS, ZERO_ADDRESS, ZERO_ADDRESS, 3600, Hash32(bytes(32)))


def state(role: Role = Role.CLIENT, **fields: object) -> ChannelState:
    blank = ChannelState(
        role, CHANNEL, CONFIG, authorized=10**12, valid_before=0, allocation_signature=b"", allocated=10**12
    )
    return replace(blank, **fields)  # type: ignore[arg-type]


@dataclass
class Simulation:
    """Client and worker on one channel with several jobs at once; messages arrive at once, steps come in any order.

    Both sides book through `channel.apply`, so a voucher that breaks a rule there raises.
    """

    price: Price
    tick_tokens: int
    random: Random
    rules: object = payment
    client: ChannelState = field(default_factory=lambda: state(Role.CLIENT))
    worker: ChannelState = field(default_factory=lambda: state(Role.WORKER))
    counts: dict[Part, tuple[int, int, int]] = field(default_factory=dict)
    """part -> (prompt tokens, output tokens so far, output tokens in the end)"""

    @property
    def tick(self) -> int:
        return cost(Price(output=self.price.output), 0, self.tick_tokens)

    def running(self) -> int:
        return sum(cost(self.price, i, o) for i, o, _ in self.counts.values())

    def step_cost(self, size: int) -> int:
        return cost(Price(output=self.price.output), 0, size)

    def ask(self, number: int, prompt: int, estimate: int, length: int) -> None:
        part = (JobId(number.to_bytes(32)), 0)
        limit = cost(self.price, estimate, length)
        opening = JobOpened(CHANNEL, *part, 0, limit)
        preview, _ = apply(self.client, opening)
        amount = self.rules.first_voucher(preview, self.running(), cost(self.price, estimate, 0), self.tick)  # type: ignore[attr-defined]
        self.client = preview
        ahead = cost(self.price, estimate, 0) + max(self.tick, 1)
        before = self.client.cumulative
        self.pay(amount)
        owed = self.client.spent + self.running()
        assert self.client.cumulative - owed <= max(ahead, before - owed), "the prompt and a tick ahead, and no more"
        self.worker, _ = apply(
            self.worker,
            replace(opening, sequence=self.worker.sequence + 1, limit=cost(self.price, prompt, length)),
        )
        self.counts[part] = (prompt, 0, length)
        due = payment.unsecured(self.worker, self.running())
        assert due == 0, "an honest ask covers its prompt"

    def deliver(self, part: Part, size: int) -> None:
        prompt, done, length = self.counts[part]
        size = min(size, length - done)
        self.counts[part] = (prompt, done + size, length)
        assert payment.unsecured(self.worker, self.running()) <= self.tick, "an honest worker never waits for money"
        before = self.client.cumulative
        amount = self.rules.next_voucher(self.client, self.running(), self.tick)  # type: ignore[attr-defined]
        if amount is not None:
            needed = not payment.needless(self.worker)
            if needed:
                crumb = payment.crumb(self.worker, self.running(), amount, self.tick)
                assert not crumb, "an honest client pays no crumbs"
            self.pay(amount, booked=needed)
            ahead = self.client.cumulative - self.client.spent - self.running()
            assert self.client.cumulative > before and ahead <= max(self.tick, 1), "one tick ahead at most"
        if done + size == length:
            self.end(part)

    def end(self, part: Part) -> None:
        prompt, done, _ = self.counts.pop(part)
        total = cost(self.price, prompt, done)
        after, _ = apply(self.client, JobEnded(CHANNEL, *part, total, 0, b""))
        amount = self.rules.last_voucher(after, self.running())  # type: ignore[attr-defined]
        if amount is not None:
            self.pay(amount)
        elif self.client.cumulative > self.worker.cumulative:  # the ack says it again
            self.worker, _ = apply(self.worker, VoucherAdded(CHANNEL, self.client.cumulative, b"s"))
        self.client, _ = apply(self.client, JobEnded(CHANNEL, *part, total, 0, b""))
        self.worker, _ = apply(self.worker, JobEnded(CHANNEL, *part, total, 0, b""))
        assert self.client.cumulative >= self.client.spent + self.running(), "after a receipt nothing is owed"

    def pay(self, amount: int, *, booked: bool = True) -> None:
        if amount > self.client.cumulative:
            self.client, _ = apply(self.client, VoucherAdded(CHANNEL, amount, b"s"))
        if booked and amount > self.worker.cumulative:
            self.worker, _ = apply(self.worker, VoucherAdded(CHANNEL, amount, b"s"))

    def run(self, jobs: int) -> None:
        waiting = list(range(1, jobs + 1))
        while waiting or self.counts:
            if waiting and (not self.counts or self.random.random() < 0.3):
                prompt = self.random.randrange(1, 300)
                length = self.random.randrange(1, 6 * self.tick_tokens)
                self.ask(waiting.pop(), prompt, prompt + self.random.randrange(300), length)
            else:
                part = self.random.choice(list(self.counts))
                self.deliver(part, self.random.randrange(1, max(2, self.tick_tokens // 2)))
        assert self.client.spent == self.worker.spent <= self.client.cumulative == self.worker.cumulative


PRICES = st.builds(Price, request=st.integers(0, 50), input=st.integers(0, 3 * 10**6), output=st.integers(0, 3 * 10**6))


@settings(max_examples=150, deadline=None)
@given(PRICES, st.integers(1, 128), st.integers(1, 8), st.randoms(use_true_random=False))
def test_client_and_worker_keep_step_whatever_the_prices_and_the_crowd(
    price: Price, tick_tokens: int, jobs: int, random: Random
) -> None:
    Simulation(price, tick_tokens, random).run(jobs)


class Rules:
    """The real rules, one of them with a planted bug."""

    def __init__(self, **planted: Callable[..., object]) -> None:
        self.first_voucher = planted.get("first", payment.first_voucher)
        self.next_voucher = planted.get("next", payment.next_voucher)
        self.last_voucher = planted.get("last", payment.last_voucher)


def late(s: ChannelState, running: int, tick: int) -> int | None:
    """Waits until a whole tick is owed."""
    owed = s.spent + running - s.cumulative
    return payment.next_voucher(s, running, tick) if owed > tick else None


PLANTED = {
    "forgets the other streams": Rules(next=lambda s, running, tick: payment.next_voucher(s, running // 2, tick)),
    "pays two ticks ahead": Rules(next=lambda s, running, tick: payment.next_voucher(s, running, 2 * tick)),
    "pays late": Rules(next=late),
    "pays for everything at once": Rules(first=lambda s, running, prompt, tick: s.spent + s.reserved),
    "asks on credit": Rules(first=lambda s, running, prompt, tick: s.cumulative),
    "leaves the last tokens unpaid": Rules(next=lambda s, r, t: None, last=lambda s, running: None),
    "signs over what jobs can cost": Rules(first=lambda s, running, prompt, tick: s.spent + s.reserved + 1),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_in_the_rules_is_found(bug: str) -> None:
    price = Price(request=10, input=1_000_000, output=2_000_000)
    with pytest.raises((AssertionError, ProtocolError)):  # an assertion here or a rule of the channel: either finds it
        for seed in range(30):
            Simulation(price, 64, Random(seed), PLANTED[bug]).run(5)


# ------------------------------------------------------------------------------------------------------- recovery

PARTS = st.dictionaries(st.integers(0, 9).map(lambda n: (JobId(n.to_bytes(32)), 0)), st.integers(0, 500), max_size=4)


@given(st.integers(0, 1000), st.integers(0, 1500), PARTS, st.integers(0, 200), st.sampled_from(Role))
def test_what_a_crash_leaves_open_is_booked_within_limits_and_vouchers(
    spent: int, ahead: int, jobs: dict[Part, int], tick: int, role: Role
) -> None:
    cut = state(role, spent=spent, cumulative=spent + min(ahead, sum(jobs.values())), open_jobs=jobs)
    costs = payment.recovered_costs(cut, tick)
    assert costs.keys() == jobs.keys()
    for part, amount in costs.items():
        assert 0 <= amount <= jobs[part]
        cut, _ = apply(cut, JobEnded(CHANNEL, *part, amount, 0, b""))
    assert cut.spent <= max(spent, cut.cumulative)
    if role is Role.CLIENT:
        assert cut.spent == cut.cumulative, "the client counts on nothing that it has vouched for"
    else:
        assert cut.spent <= max(spent, cut.cumulative - tick)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 500), st.integers(0, 100))
def test_exposure_bounds_what_can_come_to_be_owed(
    spent: int, cumulative: int, allocated: int, reserved: int, credit: int
) -> None:
    jobs = {(JobId(bytes(32)), 0): reserved}
    channel = state(Role.WORKER, spent=spent, cumulative=cumulative, allocated=allocated, open_jobs=jobs)
    risk = payment.exposure(channel, credit)
    for running in range(0, reserved + 1, max(1, reserved // 7)):
        owed = payment.unsecured(channel, running)
        if owed <= credit or running == 0:  # no token leaves beyond the credit
            assert owed <= risk
    if min(cumulative, allocated) >= spent + reserved:
        assert risk == 0


def test_a_crumb_is_less_than_a_quarter_tick_and_settles_nothing() -> None:
    """C8."""
    busy = state(Role.WORKER, cumulative=100, spent=40, open_jobs={(JobId(bytes(32)), 0): 500})
    assert payment.crumb(busy, 0, 101, 100) and payment.crumb(busy, 0, 124, 100)
    assert not payment.crumb(busy, 0, 125, 100), "a quarter tick is none"
    assert not payment.crumb(busy, 70, 110, 100), "it settles what is owed"
    assert payment.crumb(busy, 70, 109, 100), "it does not quite"
    assert payment.crumb(busy, 60, 101, 100), "nothing is owed"
    nearly = replace(busy, cumulative=535)
    assert not payment.crumb(nearly, 0, 540, 100), "the last that can come to be owed"
    assert payment.needless(replace(busy, cumulative=540)) and not payment.needless(nearly)
    assert payment.needless(replace(busy, claimed=540)), "what was claimed is covered"
