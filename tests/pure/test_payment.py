"""Vouchers written by `protocol.payment` are always ones that the channel takes, and what runs ahead stays under a tick."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from node.testing.pair import Parties
from protocol.channel import ChannelOpened, ChannelState, JobEnded, JobOpened, Role, VoucherAdded, apply, opened
from protocol.ids import JobId
from protocol.payment import first_voucher, last_voucher, next_voucher, recovered_costs

PARTIES = Parties()
CHANNEL = PARTIES.channel_id


def channel(allocated: int) -> ChannelState:
    return opened(Role.CLIENT, ChannelOpened(CHANNEL, PARTIES.config, allocated, 2**40 - 1, bytes(65)))


@given(st.integers(0, 2**64), st.integers(0, 50), st.integers(0, 30))
@settings(deadline=None, max_examples=200)
def test_every_voucher_is_one_that_the_channel_takes(seed: int, tick: int, input_cost: int) -> None:
    """Several parts on one channel, delivered in any interleaving; the client pays as `payment` says."""
    random = Random(seed)
    state = channel(random.choice([100, 1000, 10_000]))
    running: dict[int, int] = {}
    for number in range(60):
        cost_so_far = sum(running.values())
        pick = random.random()
        if pick < 0.2:
            limit = random.randint(input_cost, input_cost + 300)
            if limit > state.free:
                continue
            state, _ = apply(state, JobOpened(CHANNEL, JobId(bytes([number]) * 32), 0, 0, limit))
            amount = first_voucher(state, cost_so_far, input_cost, tick)
            assert amount >= state.cumulative
            assert amount <= max(state.cumulative, state.spent + cost_so_far + input_cost + max(tick, 1))
            if amount > state.cumulative:
                state, _ = apply(state, VoucherAdded(CHANNEL, amount, bytes(65)))
            running[number] = 0
        elif running and pick < 0.8:
            one = random.choice(list(running))
            limit = state.open_jobs[JobId(bytes([one]) * 32), 0]
            running[one] = min(limit, running[one] + random.randint(0, 20))
            cost_so_far = sum(running.values())
            amount = next_voucher(state, cost_so_far, tick)
            if amount is not None:
                assert amount <= state.spent + cost_so_far + max(tick, 1)
                state, _ = apply(state, VoucherAdded(CHANNEL, amount, bytes(65)))
            due = state.spent + cost_so_far
            capped = state.cumulative >= min(state.spent + state.reserved, state.ceiling)
            assert capped or (state.cumulative - due) * 2 > tick or state.cumulative - due >= max(tick, 1)
        elif running:
            one = random.choice(list(running))
            state, _ = apply(state, JobEnded(CHANNEL, JobId(bytes([one]) * 32), 0, running.pop(one), 0, b""))
            last = last_voucher(state, sum(running.values()))
            if last is not None:
                state, _ = apply(state, VoucherAdded(CHANNEL, last, bytes(65)))
            assert state.cumulative >= state.spent + sum(running.values()), "after a receipt nothing is owed"


@given(
    st.sampled_from(Role),
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(0, 60),
    st.lists(st.integers(0, 200), max_size=5),
)
@settings(deadline=None)
def test_what_is_booked_after_a_crash(role: Role, spent: int, vouched: int, tick: int, limits: list[int]) -> None:
    state = replace(
        channel(10_000),
        role=role,
        spent=spent,
        cumulative=spent + vouched,
        open_jobs={(JobId(bytes([n]) * 32), 0): limit for n, limit in enumerate(limits)},
    )
    costs = recovered_costs(state, tick)
    assert costs.keys() == state.open_jobs.keys()
    assert all(0 <= costs[part] <= limit for part, limit in state.open_jobs.items())
    ahead = tick if role is Role.WORKER else 0
    assert sum(costs.values()) == min(sum(limits), max(0, vouched - ahead))
