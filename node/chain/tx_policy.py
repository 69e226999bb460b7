"""How patient and how generous the sender of transactions is.

Rules
- What waits too long is replaced, and in the end its caller is told; it stays journaled, whatever the caller does.
- No fee is above `max_fee`, however often a transaction was replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

GWEI = 10**9


@dataclass(frozen=True, slots=True)
class TxPolicy:
    """How patient and how generous we are. Times are seconds, fees are wei per gas."""

    poll: float = 1.0
    """Between two looks for a receipt; 0.01 on a simulated chain."""
    bump_after: float = 45.0
    """Without a receipt for so long, send again or replace with higher fees."""
    give_up_after: float = 900.0
    """Then `TxTimeout`; the transaction stays journaled and may still land."""
    confirmations: int = 0
    """Blocks on top of the receipt's before the result is believed."""
    gas_margin: int = 20
    """Percent over the estimate."""
    tip: int = GWEI
    max_fee: int = 1000 * GWEI
    """Never more than this, bumps included."""


DEFAULT_POLICY = TxPolicy()
DEVNET_POLICY = TxPolicy(poll=0.01, bump_after=5.0, give_up_after=60.0)
