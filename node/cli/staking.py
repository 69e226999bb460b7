"""What `stake` and `unstake` share: the owner's key, its journal, its stake in words."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from node.cli.main import Shared
from node.config import DEFAULT

if TYPE_CHECKING:
    from node.books import Books
    from node.chain.client import EvmChain
    from node.chain.stakes import Stake
    from node.ports import TokenInfo
    from node.signer.sources import KeyFile


@asynccontextmanager
async def owner_chain(shared: Shared, owner: KeyFile, name: str | None) -> AsyncIterator[EvmChain]:
    """As `owner_books`, for who needs the chain alone."""
    async with owner_books(shared, owner, name) as (_, chain):
        yield chain


@asynccontextmanager
async def owner_books(shared: Shared, owner: KeyFile, name: str | None) -> AsyncIterator[tuple[Books, EvmChain]]:
    """The chain of this name (by default the default one) as the owner's account, with the owner's journal.

    Raises `InsufficientFunds` without a coin for gas.
    """
    from node.books import open_books
    from node.errors import InsufficientFunds
    from node.wiring import open_chain
    from protocol.signing import KeyRole

    async with (
        open_books(shared.config, "owner", {KeyRole.OWNER: owner}) as books,
        open_chain(shared.config, books.signers[KeyRole.OWNER], books.ledger, name or DEFAULT) as chain,
    ):
        if not await chain.native_balance(chain.account):
            raise InsufficientFunds(
                f"the owner's account {chain.account} has nothing to pay gas with",
                hint="send it some of the chain's coin",
            )
        yield books, chain


async def to_deposit(chain: EvmChain, info: TokenInfo, amount: int, what: str) -> int:
    """How much of `amount` is missing in the account's vault balance, so that it is deposited first. Raises `InsufficientFunds`
    when the account does not hold that much. `what`: the words for what needs it."""
    from node.errors import InsufficientFunds

    free = await chain.vault_balance(info.address, chain.account)
    missing = max(0, amount - free)
    held = await chain.token_balance(info.address, chain.account)
    if missing > held:
        raise InsufficientFunds(
            f"{what} needs {info.show(missing)} more than the vault's {info.show(free)}; "
            f"the account {chain.account} holds {info.show(held)}",
            hint="send tokens to the owner's account first",
        )
    return missing


def stake_data(stake: Stake, info: TokenInfo) -> dict[str, Any]:
    return {
        "token": str(info.address),
        "symbol": info.symbol,
        "decimals": info.decimals,
        "active": str(stake.active),
        "unbonding": str(stake.unbonding),
        "free_at": stake.free_at,
        "held": str(stake.held),
        "locked": str(stake.locked),
        "exposure": str(stake.exposure),
        "withdrawable": str(stake.withdrawable),
    }


def stake_text(stake: Stake, info: TokenInfo, now: int) -> str:
    show = info.show
    lines = [
        f"active     {show(stake.active)}",
        f"locked     {show(stake.locked)} ({show(stake.held)} of it held by open jobs, the rest by recent earnings)",
        f"exposure   {show(stake.exposure)}: the most that open jobs may hold",
    ]
    if stake.unbonding:
        ready = "now" if now >= stake.free_at else f"from {moment(stake.free_at)}"
        lines.append(f"unbonding  {show(stake.unbonding)}, {show(stake.withdrawable)} can be taken home {ready}")
    return "\n".join(lines)


def moment(seconds: int) -> str:
    """Chain seconds as a person reads them."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def days(seconds: int) -> str:
    """A delay as a person reads it."""
    whole, rest = divmod(seconds, 86_400)
    return f"{whole} days" if not rest else f"{seconds / 86_400:.1f} days"
