"""Booked slashes: the part of the Workers contract between a verdict and the money, for one account.

A slash is found by its number, not by its event: a view is what a quorum of nodes says, needs no old logs, and there are few.
Amounts are in the smallest unit of the slash's token, times in chain seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Final

import trio

from node.chain.artifacts import contract
from node.errors import ChainError
from node.ports import ChainEvent, Slashes, TxResult
from protocol.equivocation import Contradiction
from protocol.escrow import Slash, SlashState
from protocol.ids import Address, ChannelId, Hash32, keccak256
from protocol.typed_data import ChannelConfig

if TYPE_CHECKING:
    from node.chain.client import EvmChain

PAGE: Final = 16
"""Slashes that are asked for at once."""
PROVE: Final = "prove_equivocation"
MOVE: Final = "move_slash"
"""Purposes of transactions, in the journal."""
GUARDIAN: Final = keccak256(b"GUARDIAN")


class EvmSlashes:
    """Implements `node.ports.Slashes`."""

    def __init__(self, chain: EvmChain) -> None:
        self._chain = chain

    async def get(self, slash_id: int) -> Slash:
        found = await self._chain.view("Workers", "slash", slash_id)
        owner, token, amount, victim, reporter, moves_at, state, cause = found
        return Slash(
            owner=Address(owner),
            token=Address(token),
            amount=int(amount),
            victim=Address(victim),
            reporter=Address(reporter),
            moves_at=int(moves_at),
            state=SlashState(state),
            cause=Hash32(cause),
        )

    async def move(self, slash_id: int) -> TxResult:
        # It follows from a look: one that a reorganisation threw out is brought back by itself, not sent twice.
        return await self._chain.change(MOVE, "Workers", "moveSlash", slash_id, derived=True)

    async def cancel(self, slash_id: int) -> TxResult:
        """Only for a guardian of the vault, and before it moves."""
        return await self._chain.change("cancel_slash", "Workers", "cancelSlash", slash_id)

    async def prove(self, found: Contradiction, config: ChannelConfig) -> TxResult:
        """Convict the receiver of this channel's config by two receipts; whoever asks is the reporter."""
        words: list[object] = []
        for one in (found.first, found.second):
            words += [tuple(getattr(one.receipt, field.name) for field in fields(one.receipt)), one.signature]
        raw = tuple(getattr(config, field.name) for field in fields(config))
        return await self._chain.change(PROVE, "Disputes", "proveEquivocation", raw, *words)

    async def config_of(self, channel_id: ChannelId) -> ChannelConfig | None:
        """Of a channel that was ever allocated, as far as a node tells of it; its id is the hash of it, so nobody can lie."""
        topics = (contract("Channels").topic("Allocated"), bytes(channel_id))

        def read(event: ChainEvent) -> ChannelConfig | None:
            config = event.args["config"]
            ours = isinstance(config, ChannelConfig) and config.channel_id(self._chain.domain) == channel_id
            return config if ours else None

        return await self._chain.search_back("Channels", topics, read)

    async def is_guardian(self, account: Address) -> bool:
        return bool(await self._chain.view("Vault", "hasRole", GUARDIAN, account))


async def newest(slashes: Slashes, known: int = 0) -> int:
    """The highest number that is booked, 0 when none is; `known` is one that is. Numbers have no holes.

    Raises `ChainError`.
    """

    async def exists(slash_id: int) -> bool:
        return (await slashes.get(slash_id)).state is not SlashState.NONE

    step, low = 1, known
    while await exists(low + step):
        low += step
        step *= 2
    high = low + step  # not there
    while high - low > 1:
        middle = (low + high) // 2
        if await exists(middle):
            low = middle
        else:
            high = middle
    return low


async def read(slashes: Slashes, ids: Iterable[int]) -> list[tuple[int, Slash]]:
    """These slashes, in this order, all asked for at once. Raises `ChainError`."""
    wanted, found = list(ids), dict[int, Slash]()
    errors: list[ChainError] = []

    async def one(slash_id: int) -> None:
        try:
            found[slash_id] = await slashes.get(slash_id)
        except ChainError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for slash_id in wanted:
            nursery.start_soon(one, slash_id)
    if errors:
        raise errors[0]
    return [(slash_id, found[slash_id]) for slash_id in wanted]


def page_below(first: int, last: int = 1) -> range:
    """The numbers of one page, from `first` down to `last` at the lowest."""
    return range(first, max(last - 1, first - PAGE), -1)
