"""Who gets what of a slash, when it can move, and which of a client's jobs may have booked one.

Rules
- Half to the victim, a quarter to the reporter, the rest to nobody; rounded down, and what has no name is burnt.
- Booked at `t` it moves from `t + SLASH_DELAY` on, by anybody. Numbers rise with the time of booking, so `moves_at` never falls
  from one to the next: who looks for slashes since a moment walks down from the newest and may stop before it.
- A client spends gas only for a share that is worth it to it (`least`), and never for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.batch import QUOTE_LIFE, BatchState
from protocol.escrow import JobState, Outcome, Slash, SlashState
from protocol.escrow.disputes import RESOLVE_WINDOW
from protocol.escrow.state import PPM
from protocol.escrow.workers import REPORTER_PPM, SLASH_DELAY, VICTIM_PPM
from protocol.ids import ZERO_ADDRESS, Address

EARLIEST: Final = QUOTE_LIFE + 23 * 3600
"""Seconds before `valid_before`, earlier than which a job was not opened. Far more than a clock is wrong by: a slash that is
passed over is money lost, and a day of them is read with few questions."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Smallest unit of the slash's token."""

    victim: int
    reporter: int
    burnt: int


def shares_of(slash: Slash) -> Shares:
    """What moving it pays, and to whom."""
    victim = 0 if slash.victim == ZERO_ADDRESS else slash.amount * VICTIM_PPM // PPM
    reporter = 0 if slash.reporter == ZERO_ADDRESS else slash.amount * REPORTER_PPM // PPM
    return Shares(victim, reporter, slash.amount - victim - reporter)


def share_for(slash: Slash, account: Address) -> int:
    """What `account` gets of it: as victim, as reporter, or as both."""
    shares = shares_of(slash)
    return (shares.victim if account == slash.victim else 0) + (shares.reporter if account == slash.reporter else 0)


def is_due(slash: Slash, head: int) -> bool:
    """Whether it can be moved in a block after the one of this time."""
    return slash.state is SlashState.BOOKED and head >= slash.moves_at


def worth_moving(slash: Slash, account: Address, least: int) -> bool:
    """Whether `account` spends gas on it by itself. `least`: smallest unit; 0 never."""
    return slash.state is SlashState.BOOKED and 0 < least <= share_for(slash, account)


def may_have_booked(state: BatchState) -> bool:
    """Client: whether this job ended in a way that books a slash, had the worker's owner any stake."""
    lost = state.chain is JobState.SETTLED and state.outcome is Outcome.ACCEPT
    return state.quote.penalty > 0 and (lost or state.chain is JobState.REFUNDED)


def booked_since(state: BatchState) -> int:
    """Chain seconds before which a slash of such a job was not booked."""
    if state.resolve_by:
        return state.resolve_by - RESOLVE_WINDOW
    return max(0, state.quote.valid_before - EARLIEST)


def is_before(slash: Slash, since: int) -> bool:
    """Whether it was booked before this moment, and with it every one of a lower number."""
    return slash.moves_at < since + SLASH_DELAY
