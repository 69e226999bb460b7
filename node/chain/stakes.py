"""A worker's stake, as its owner sees and moves it: the Workers contract beyond the registry.

Not part of the Chain port: only the owner's commands need it, and it has no twin in memory. Amounts are in the smallest unit of
the stake's token, times in chain seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.chain.artifacts import contract
from node.ports import TxResult
from protocol.ids import Address

if TYPE_CHECKING:
    from node.chain.client import EvmChain


@dataclass(frozen=True, slots=True)
class Stake:
    """What the contract holds for one owner in one token."""

    active: int
    unbonding: int
    """On its way out; still slashable."""
    held: int
    """Penalties of open jobs."""
    exposure: int
    """Most that may be held at once."""
    free_at: int
    """From when the unbonding part can be withdrawn; 0 when nothing was ever unstaked."""
    locked: int
    """Held, plus the share that recent earnings lock."""

    @property
    def withdrawable(self) -> int:
        """What `withdraw` would move once `free_at` has come."""
        return min(self.unbonding, max(0, self.active + self.unbonding - self.locked))


class Stakes:
    """Stakes of the account of `chain`."""

    def __init__(self, chain: EvmChain) -> None:
        self._chain = chain
        self._workers = contract("Workers")

    @property
    def owner(self) -> Address:
        return self._chain.account

    async def of(self, owner: Address, token: Address) -> Stake:
        found = await self._chain.view("Workers", "stakeOf", owner, token)
        active, unbonding, held, exposure, free_at = (int(value) for value in found)
        locked = int(await self._chain.view("Workers", "lockedStake", owner, token))
        return Stake(active, unbonding, held, exposure, free_at, locked)

    async def unbonding_seconds(self) -> int:
        """How long an unstaked amount waits."""
        return int(await self._chain.view("Workers", "UNBONDING"))

    async def stake(self, token: Address, amount: int) -> TxResult:
        """Vault balance of the owner -> active stake."""
        return await self._chain.change("stake", "Workers", "stake", token, amount)

    async def unstake(self, token: Address, amount: int) -> TxResult:
        return await self._chain.change("unstake", "Workers", "unstake", token, amount)

    async def withdraw(self, token: Address) -> TxResult:
        """What is unbonded and free -> vault balance of the owner."""
        return await self._chain.change("withdraw_stake", "Workers", "withdrawStake", token)

    async def expose(self, token: Address, exposure: int) -> TxResult:
        return await self._chain.change("set_exposure", "Workers", "setExposure", token, exposure)
