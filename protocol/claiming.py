"""When a worker turns vouchers into money: which channels go into a claim now. Pure: the driver brings the fee and the clock.

Rules (invariants P1 to P5, docs/invariants.md):

1. *Forced*: the payer has begun to leave, or the money has waited for a quarter of the withdraw delay. Forced money is claimed as
   soon as that gains more than its gas. (With `at_loss` even then; dust that is not worth its gas is left otherwise, or whoever
   opens a thousand channels, spends a unit on each and leaves makes us burn a thousand claims.)
2. *Free*: nothing forces. A claim is made when a channel has `minimum` to claim and all that goes into the transaction is worth
   `gain_percent` of its gas.
3. What a transaction costs is shared: its base is paid once, each channel adds its part. So a batch is judged as a whole, and a
   channel that is in it has at least paid for its own part.
4. Where the operator has not said what the chain's coin is worth, gas is not weighed.
5. Leaving payers go first, then the most valuable; at most `BATCH` channels to a transaction.

Money is compared in wei, the unit of the gas. Gas is a straight line above what the contracts use (tests/contracts/gas.json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.channel import ChannelState
from protocol.ids import ChannelId

BATCH: Final = 400
"""Channels in one transaction: EIP-7825 ends a transaction at 2**24 gas."""
COIN: Final = 10**18
"""Wei of one whole coin."""
GAS_BASE: Final = 44_000
"""Of a claim, however many channels it has."""
GAS_EACH: Final = 20_500
"""Of each channel in a claim."""
GAS_SETTLE: Final = 73_000
PATIENCE: Final = 4
"""Money waits for one part in so many of the withdraw delay, then it is claimed as if the payer were leaving."""
LOOKS: Final = 8
"""And is looked at twice as often, so that it never waits for more than half of the delay."""


@dataclass(frozen=True, slots=True)
class ClaimTerms:
    """What the operator decides about claims in one asset. Amounts are in its smallest unit."""

    minimum: int = 100_000
    """Below it nothing is claimed but by force."""
    coin_value: int = 0
    """What one whole coin of the chain is worth; 0 = gas is not weighed."""
    gain_percent: int = 1000
    """How much a free claim must be worth, in percent of its gas; at least 100."""
    at_loss: bool = False
    """Forced money is claimed whatever the gas costs."""

    def in_wei(self, amount: int) -> int | None:
        """What an amount is worth, rounded down; None when that is not known."""
        return amount * COIN // self.coin_value if self.coin_value else None


@dataclass(frozen=True, slots=True)
class _Candidate:
    state: ChannelState
    leaving: bool
    forced: bool
    worth: int | None
    """Wei; None when gas is not weighed."""
    at_loss: bool
    gain_percent: int


def is_old(state: ChannelState, since: float, now_s: float) -> bool:
    """Whether what can be claimed has waited for long enough. `since`: when there began to be something."""
    return (now_s - since) * PATIENCE >= state.config.withdraw_delay


def due(
    channels: Iterable[ChannelState],
    terms_of: Callable[[ChannelState], ClaimTerms],
    since: Mapping[ChannelId, float],
    now_s: float,
    fee: int,
    *,
    everything: bool = False,
) -> list[list[ChannelState]]:
    """The claims to make now, one list of channels per transaction.

    `since`: when each channel began to have something to claim; a channel that is missing began just now. `fee`: wei per gas.
    `everything`: the operator wants all there is, whatever it costs.
    """
    each = GAS_EACH * fee
    wanted = []
    for state in channels:
        if not state.claimable or state.closed:
            continue
        terms = terms_of(state)
        leaving = state.withdraw_at != 0
        forced = leaving or is_old(state, since.get(state.channel_id, now_s), now_s)
        one = _Candidate(
            state, leaving, forced, terms.in_wei(state.claimable), terms.at_loss, max(100, terms.gain_percent)
        )
        if everything or _pays_for_itself(one, terms, each):
            wanted.append(one)
    wanted.sort(key=lambda one: (not one.leaving, one.worth is not None, -(one.worth or one.state.claimable)))
    batches = [wanted[start : start + BATCH] for start in range(0, len(wanted), BATCH)]
    return [[one.state for one in batch] for batch in batches if everything or _carries_base(batch, fee)]


def _pays_for_itself(one: _Candidate, terms: ClaimTerms, each: int) -> bool:
    """Whether a channel is worth its own part of a claim."""
    if not one.forced and one.state.claimable < terms.minimum:
        return False
    if one.worth is None or (one.forced and one.at_loss):
        return True
    return one.worth > each if one.forced else one.worth * 100 >= one.gain_percent * each


def _carries_base(batch: Sequence[_Candidate], fee: int) -> bool:
    """Whether the channels of a transaction are worth all of it."""
    if any(one.worth is None or (one.forced and one.at_loss) for one in batch):
        return True
    worth = sum(one.worth or 0 for one in batch)
    cost = (GAS_BASE + GAS_EACH * len(batch)) * fee
    if any(one.forced for one in batch):
        return worth > cost
    return worth * 100 >= max(one.gain_percent for one in batch) * cost


def worth_settling(owed: int, terms: ClaimTerms, fee: int, *, everything: bool = False) -> bool:
    """Whether to move what the contract owes us. It is safe there, so nothing ever forces this. `owed`: smallest unit."""
    if not owed:
        return False
    worth = terms.in_wei(owed)
    if everything:
        return True
    if worth is None:
        return owed >= terms.minimum
    return worth * 100 >= max(100, terms.gain_percent) * GAS_SETTLE * fee


def look_within(channels: Iterable[ChannelState], every_s: float, least_delay: int) -> float:
    """Seconds until the channels must be looked at again, so that no money waits for more than half of its delay.

    `least_delay`: the shortest withdraw delay that a channel which opens meanwhile can have.
    """
    delays = [state.config.withdraw_delay / LOOKS for state in channels if not state.closed]
    return min([every_s, least_delay / LOOKS, *delays])
