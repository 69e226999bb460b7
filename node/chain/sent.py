"""What was sent from one account of one chain, and what became of it: in the journal first, then in memory.

Rules
- *Journal, then speak*: nonce, hash and raw bytes are journaled before they are sent, an end before anybody is told of it.
- *One nonce, one call* (N4). A nonce is its transaction's from the record on, until there is a receipt or the transaction was
  dropped. One that was dropped is never sent again; a server may have kept it all the same (`node.chain.refused`).
- Whatever is journaled without an end is among the stalled, or some task waits for it.
- The last transactions are kept as they were sent: a reorganisation may throw out what has landed.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from node.chain.pending import Answered, History, Journal, PendingTx, answered, dropped, landed, unfinished
from node.chain.refused import Refused
from node.chain.values import Receipt
from node.ports import TxResult
from protocol.ids import Address

RECENT = 64
"""How many transactions we could send again after a reorganisation."""


@dataclass(slots=True)
class Stalled:
    """A transaction that may be out, that has no end, and that nobody waits for."""

    attempts: list[PendingTx]
    answers_equal_calls: bool
    """Its caller was told of a failure and may try again. One that went away (cancelled) is not expected back: the next equal
    call is meant as another one."""


class Sent:
    """Of one account on one chain. Who holds the sender's lock, or waits for a transaction, changes it."""

    def __init__(self, account: Address, chain_id: int, anchor: bytes, journal: Journal) -> None:
        self.anchor = anchor.hex()
        self._account = account
        self._chain_id = chain_id
        self._journal = journal
        self.recent: dict[int, PendingTx] = {}
        """By nonce: the last transactions that a node took."""
        self.ended: dict[int, bytes] = {}
        """By nonce: those of them that have landed, and the hash of the block."""
        self.stalled: dict[int, Stalled] = {}
        """By nonce: those that may be out, have no end, and that nobody waits for."""
        self.answered: dict[str, Answered] = {}
        """By request id: what has been done already."""
        self.refused = Refused()

    def recall(self, history: History) -> dict[int, list[PendingTx]]:
        """Take up what the journal knows. What has no end yet, by nonce, is the answer: all attempts at it, in order."""
        for tx in landed(history, self._chain_id, self.anchor, RECENT):
            self.keep(tx)
            self.ended[tx.signed.transaction.nonce] = b""
        self.answered |= answered(history, self._chain_id, self.anchor)
        self.refused.add(*dropped(history, self._chain_id, self.anchor, RECENT))
        by_nonce: dict[int, list[PendingTx]] = {}
        for tx in unfinished(history, self._chain_id):
            by_nonce.setdefault(tx.signed.transaction.nonce, []).append(tx)
        return by_nonce

    async def record(self, attempt: PendingTx) -> None:
        """Before it is sent."""
        with trio.CancelScope(shield=True):  # a record that may be there or not would make its nonce nobody's
            await self._journal("tx_signed", bytes(self._account), attempt.to_body())

    def keep(self, attempt: PendingTx) -> None:
        """A node took it."""
        nonce = attempt.signed.transaction.nonce
        self.recent[nonce] = attempt
        for old in [known for known in self.recent if known <= nonce - RECENT]:
            self._forget(old)

    async def end(self, winner: PendingTx, receipt: Receipt, error: str) -> TxResult:
        """It has landed. `error`: name of the contract's error when it reverted."""
        nonce = winner.signed.transaction.nonce
        body = {
            "purpose": winner.purpose,
            "nonce": nonce,
            "hash": receipt.hash.hex(),
            "block": receipt.block_number,
            "gas_used": receipt.gas_used,
            "ok": receipt.ok,
            "error": error,
        }
        if self.ended.get(nonce) != receipt.block_hash:  # else it is journaled already
            await self._journal("tx_final", bytes(self._account), body)
        self.refused.forget(nonce)
        self.keep(winner)
        self.ended[nonce] = receipt.block_hash
        result = TxResult(winner.purpose, receipt.hash, receipt.block_number, receipt.gas_used, receipt.ok, error)
        if winner.request:
            self.answered[winner.request] = Answered(winner.call, result)
        return result

    async def drop(self, attempt: PendingTx, why: str) -> None:
        """It has not landed and is not to."""
        nonce = attempt.signed.transaction.nonce
        body = {"nonce": nonce, "hash": attempt.signed.hash.hex(), "reason": why}
        self._forget(nonce)  # its caller is told that it will not happen: it is never sent again
        self.refused.add(attempt)
        await self._journal("tx_dropped", bytes(self._account), body)

    def _forget(self, nonce: int) -> None:
        self.recent.pop(nonce, None)
        self.ended.pop(nonce, None)
