"""How far ahead the client pays: the only rule that decides when a voucher is written.

The client keeps its vouchers between half a tick and one tick of output ahead of what was delivered, so a worker never waits
for money over a round trip, and the client never has more than one tick (and, before prefill, the prompt's price) at risk.
"""

from __future__ import annotations

from typing import Final

from protocol.channel import ChannelState, Part, Role

LEAST_TICK: Final = 8
"""Units of the smallest tick that a client may pay by, where the worker is slow: what it adds is measured by this one."""


def first_voucher(state: ChannelState, running: int, input_cost: int, tick: int) -> int:
    """Cumulative amount to send with an ask: what is owed, the prompt, and one tick of output.

    `state` already holds the new job's reservation; `running` is the cost so far of the other parts under way. Never lower
    than the last voucher.
    """
    return max(state.cumulative, _capped(state, state.spent + running + input_cost + max(tick, 1)))


def next_voucher(state: ChannelState, running: int, tick: int) -> int | None:
    """The next cumulative amount, or None while the last one still covers half a tick of what is to come.

    `running`: cost so far of all parts under way.
    """
    ahead = state.cumulative - state.spent - running
    if ahead * 2 > tick:
        return None
    target = _capped(state, state.spent + running + max(tick, 1))
    return target if target > state.cumulative else None


def last_voucher(state: ChannelState, running: int) -> int | None:
    """After a receipt: exactly what is owed, if the last voucher does not cover it."""
    owed = state.spent + running
    return owed if owed > state.cumulative else None


def _capped(state: ChannelState, amount: int) -> int:
    """Never above what the jobs under way can cost in the end, nor above what was authorised."""
    return min(amount, state.spent + state.reserved, state.ceiling)


def unsecured(state: ChannelState, running: int) -> int:
    """Worker: cost delivered that is not covered, or that is vouched for and no longer locked on chain (a reorg)."""
    return max(0, state.spent + running - min(state.covered, state.allocated))


def exposure(state: ChannelState, credit: int) -> int:
    """Worker: the most that the channel may come to owe. A job that is paid ahead in full risks nothing."""
    return min(unsecured(state, state.reserved), max(credit, unsecured(state, 0)))


def needless(state: ChannelState) -> bool:
    """Worker: all that the jobs under way can come to cost is covered; a higher voucher in a stream changes nothing."""
    return state.covered >= state.spent + state.reserved


def crumb(state: ChannelState, running: int, cumulative: int, tick: int) -> bool:
    """Worker: this voucher adds less than a quarter tick and settles neither what is owed now nor all that can come to be.

    A client that follows `next_voucher` adds at least half a tick, or all that is missing. `running` and `tick` as there.
    """
    if (cumulative - state.cumulative) * 4 >= tick:
        return False
    due, most = state.spent + running, state.spent + state.reserved
    return not (state.covered < due <= cumulative or state.covered < most <= cumulative)


def recovered_costs(state: ChannelState, tick: int) -> dict[Part, int]:
    """What to book for parts that a crash cut off, when nobody remembers how much was delivered.

    The worker books what vouchers cover less the tick that the client pays ahead, so it never charges for what it cannot have
    delivered; the client books all that it vouched for, so it never counts on money that may be owed.
    """
    left = state.cumulative - state.spent - (tick if state.role is Role.WORKER else 0)
    costs: dict[Part, int] = {}
    for part, limit in state.open_jobs.items():
        costs[part] = max(0, min(limit, left))
        left -= costs[part]
    return costs
