"""Transactions under a request id: each purpose of one request happens once, however often it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from node.errors import ChainError
from node.ports import TxResult
from protocol.ids import Address

if TYPE_CHECKING:
    from node.chain.txs import TxSender

MAX_ID: Final = 64
"""Characters of a request id."""


class Requesting:
    """What `EvmChain` uses of a `TxSender`, with an id on every call. A request of several transactions names each by its
    purpose, so one that was cut off goes on where it stopped."""

    def __init__(self, sender: TxSender, request: str) -> None:
        if not (1 <= len(request) <= MAX_ID and request.isascii() and request.isprintable()):
            raise ChainError(f"a request id has 1 to {MAX_ID} printable ASCII characters")
        self._sender = sender
        self._request = request

    @property
    def account(self) -> Address:
        return self._sender.account

    async def send(self, purpose: str, to: Address, data: bytes, value: int = 0, *, derived: bool = False) -> TxResult:
        """As `TxSender.send`. Raises `RequestConflict` when the id was used for another call."""
        request = f"{self._request}:{purpose}"
        return await self._sender.send(purpose, to, data, value, derived=derived, request=request)

    async def fee(self) -> int:
        return await self._sender.fee()

    async def catch_up(self) -> None:
        await self._sender.catch_up()

    def has_answered(self, request: str) -> bool:
        return self._sender.has_answered(request)
