"""Transactions whose caller was told that they will not happen. A server that refused one may have kept it all the same.

Rules
- Before another nonce is chosen we ask for each of them whether a node has it or it has landed: then it is no refused one but
  one that is under way, and an equal call is answered with its end.
- That a nonce is used and none of its own has landed is believed after two looks some time apart: one alone may have met a node
  that is behind (N4).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import trio

from node.chain.agreed import AgreedEth
from node.chain.eth import Eth
from node.chain.pending import Call, PendingTx
from protocol.ids import Address

MOST: Final = 64
"""Nonces that are remembered."""


class Refused:
    """Of one account on one chain, by nonce."""

    def __init__(self) -> None:
        self._all: dict[int, list[PendingTx]] = {}
        self._used_since: dict[int, float] = {}
        self._believed: dict[int, set[bytes]] = {}
        """Hashes that a node said to have, once. It is believed once: what did not land then is not waited for again."""

    def add(self, *attempts: PendingTx) -> None:
        for attempt in attempts:
            self._all.setdefault(attempt.signed.transaction.nonce, []).append(attempt)
        for old in sorted(self._all)[:-MOST]:
            self.forget(old)

    def forget(self, nonce: int) -> None:
        """Its nonce has its end."""
        self._all.pop(nonce, None)
        self._used_since.pop(nonce, None)
        self._believed.pop(nonce, None)

    def calls(self, request: str) -> set[Call]:
        """What was asked for under this id and refused."""
        return {tx.call for attempts in self._all.values() for tx in attempts if tx.request == request}

    async def back(
        self, eth: Eth | AgreedEth, account: Address, patience: float, busy: Collection[int]
    ) -> dict[int, list[PendingTx]]:
        """Those that are out after all, by nonce; they are not in here any more. `busy`: nonces that somebody waits for. Raises
        `ChainError`."""
        found: dict[int, list[PendingTx]] = {}
        if not self._all:
            return found
        used = await eth.nonce(account)
        for nonce in sorted(self._all.keys() - set(busy)):
            attempts = self._all[nonce]
            out = [tx for tx in attempts if await self._is_out(eth, tx, nonce < used)]
            if out:
                found[nonce] = out
                self._all[nonce] = [tx for tx in attempts if tx not in out]
            elif nonce < used and self._for_long(nonce, patience):
                self.forget(nonce)
        return found

    def _for_long(self, nonce: int, patience: float) -> bool:
        """Whether an earlier look found the nonce used as well."""
        now = trio.current_time()
        return now >= self._used_since.setdefault(nonce, now) + patience

    async def _is_out(self, eth: Eth | AgreedEth, tx: PendingTx, used: bool) -> bool:
        """`used`: the nonce is, so only a receipt counts."""
        if await eth.receipt(tx.signed.hash) is not None:
            return True
        believed = self._believed.setdefault(tx.signed.transaction.nonce, set())
        if used or tx.signed.hash in believed or not await eth.knows(tx.signed.hash):
            return False
        believed.add(tx.signed.hash)
        return True
