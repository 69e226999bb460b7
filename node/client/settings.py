"""What the client library needs to know; frozen, made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

from protocol.batch import Timing
from protocol.ids import Address
from protocol.offers import Asset
from protocol.payment import LEAST_TICK
from protocol.selection import NO_LIMIT, PriceLimit
from protocol.typed_data import Domain

MAX_ANSWERS: Final = 128
"""To one request, at once."""


@dataclass(frozen=True, slots=True)
class Means:
    """One asset that the client pays with. Amounts are in its smallest unit."""

    domain: Domain
    token: Address
    name: str = "default"
    """What the configuration calls the token."""
    allocation: int = 1_000_000
    """Locked for a worker when a channel to it opens; more when a job needs more."""
    rate: Fraction | None = None
    """What one smallest unit is worth in smallest units of the default token; None = not comparable."""
    max_cost: int = 0
    """Most for one job; 0 = no limit of ours."""
    max_price: PriceLimit = NO_LIMIT

    @property
    def asset(self) -> Asset:
        return Asset.of(self.domain, self.token)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Times in milliseconds."""

    withdraw_delay_s: int = 3600
    allocation_valid_s: int = 3600
    """How long a signed allocation may be submitted."""
    deadline_ms: int = 120_000
    first_token_ms: int = 30_000
    stall_ms: int = 15_000
    open_timeout_ms: int = 30_000
    lock_wait_ms: int = 5_000
    """How long our own view of the chain may take to show what the worker says is locked."""
    tick_tokens: int = 64
    """Most output paid ahead, whatever tick an offer names: what one worker can take and not deliver."""
    min_tick_tokens: int = LEAST_TICK
    """Paid ahead to a slow worker too, where an offer's `tick_ms` would be less."""
    attempts: int = 3
    """Workers tried before the first token."""
    jobs: Timing = field(default_factory=Timing)
    """When batch jobs are brought forward."""
    job_poll_s: float = 2.0
    """How often a worker is asked how far a batch job is."""
    job_reread_s: float = 5.0
    """How often the contract is asked about one."""
    slash_look_s: float = 60.0
    """How often a client that stays looks for penalties that are due to it."""
    slash_min: int = 1
    """Least share of a penalty, smallest unit, that is worth the gas of moving it; 0: none is moved by itself."""
