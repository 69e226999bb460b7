"""What the journal knows of a transaction: its records, and the fold that finds those without an end.

Journal records (kind, subject, body): ``tx_signed`` before each send, ``tx_final`` with the receipt, ``tx_dropped`` when the
nonce is known to be free or another's. Subject is the account, 20 bytes; amounts are decimal strings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from node.errors import ChainError
from node.ports import TxResult
from protocol.errors import InvalidValue
from protocol.ids import Address
from protocol.transactions import SignedTransaction, Transaction

Journal = Callable[[str, bytes, Mapping[str, Any]], Awaitable[None]]
Call = tuple[Address | None, bytes, int]
"""To whom, calldata, wei."""
History = Sequence[tuple[str, Mapping[str, Any]]]
"""(kind, body) of one account's records of transactions, in order."""


async def no_journal(kind: str, subject: bytes, body: Mapping[str, Any]) -> None:
    """For throw-away keys on simulated chains only: a crash forgets what was sent."""


@dataclass(frozen=True, slots=True)
class PendingTx:
    """A journaled transaction without a final record."""

    purpose: str
    signed: SignedTransaction
    anchor: str = ""
    """Hash of an old block of the chain that it is for, hex: `TxSender`."""
    request: str = ""
    """The id under which a person or a program asked for it; empty when nobody named one."""

    def to_body(self) -> dict[str, Any]:
        tx = self.signed.transaction
        return {
            "purpose": self.purpose,
            "chain_id": tx.chain_id,
            "nonce": tx.nonce,
            "tip": str(tx.tip),
            "max_fee": str(tx.max_fee),
            "gas": tx.gas,
            "to": "" if tx.to is None else str(tx.to),
            "value": str(tx.value),
            "data": tx.data.hex(),
            "hash": self.signed.hash.hex(),
            "raw": self.signed.raw.hex(),
            "anchor": self.anchor,
            "request": self.request,
        }

    @property
    def call(self) -> Call:
        tx = self.signed.transaction
        return tx.to, tx.data, tx.value

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> PendingTx:
        """Raises `ChainError` for a record that is not ours."""
        try:
            transaction = Transaction(
                chain_id=int(body["chain_id"]),
                nonce=int(body["nonce"]),
                tip=int(body["tip"]),
                max_fee=int(body["max_fee"]),
                gas=int(body["gas"]),
                to=Address(body["to"]) if body["to"] else None,
                value=int(body["value"]),
                data=bytes.fromhex(body["data"]),
            )
            signed = SignedTransaction(transaction, bytes.fromhex(body["raw"]), bytes.fromhex(body["hash"]))
            return cls(str(body["purpose"]), signed, str(body.get("anchor", "")), str(body.get("request", "")))
        except (KeyError, ValueError, TypeError, InvalidValue) as error:
            raise ChainError(f"the journal holds a damaged transaction record: {error}") from error


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that has its end: what was asked, and what became of it."""

    call: Call
    result: TxResult


def answered(records: History, chain_id: int, anchor: str) -> dict[str, Answered]:
    """By request id: the transactions on this chain that were asked for under an id and have a receipt."""
    asked: dict[str, PendingTx] = {}
    found: dict[str, Answered] = {}
    for kind, body in records:
        if kind == "tx_signed" and body.get("request") and int(body["chain_id"]) == chain_id:
            if body.get("anchor", "") in ("", anchor):
                asked[body["hash"]] = PendingTx.from_body(body)
        elif kind == "tx_final" and body["hash"] in asked:
            tx = asked[body["hash"]]
            end = (bytes.fromhex(body["hash"]), int(body["block"]), int(body["gas_used"]), bool(body["ok"]))
            found[tx.request] = Answered(tx.call, TxResult(tx.purpose, *end, str(body["error"])))
    return found


def unfinished(records: History, chain_id: int) -> list[PendingTx]:
    """Fold one account's (kind, body) journal records, in order: what was signed for this chain and has no end yet.

    A journal may hold transactions of several chains, each with nonces of its own: an end counts where its hash was signed.
    """
    waiting: dict[str, PendingTx] = {}
    signed: set[str] = set()
    for kind, body in records:
        if kind == "tx_signed":
            tx = PendingTx.from_body(body)
            if tx.signed.transaction.chain_id == chain_id:
                signed.add(body["hash"])
                waiting[body["hash"]] = tx
        elif kind == "tx_final":
            if body["hash"] in signed:
                done = int(body["nonce"])
                waiting = {h: tx for h, tx in waiting.items() if tx.signed.transaction.nonce != done}
        elif kind == "tx_dropped":
            waiting.pop(body["hash"], None)
    return sorted(waiting.values(), key=lambda tx: tx.signed.transaction.nonce)


def dropped(records: History, chain_id: int, anchor: str, last: int = 64) -> list[PendingTx]:
    """The last transactions on this chain whose caller was told that they will not happen, by nonces that have no end. A server
    that refused one may have kept it."""
    found: dict[str, PendingTx] = {}
    signed: dict[str, Mapping[str, Any]] = {}
    for kind, body in records:
        if kind == "tx_signed" and int(body["chain_id"]) == chain_id and body.get("anchor", "") in ("", anchor):
            signed[body["hash"]] = body
        elif kind == "tx_dropped" and body["hash"] in signed:
            found[body["hash"]] = PendingTx.from_body(signed[body["hash"]])
        elif kind == "tx_final" and body["hash"] in signed:
            found = {h: tx for h, tx in found.items() if tx.signed.transaction.nonce != int(body["nonce"])}
    return list(found.values())[-last:]


def landed(records: History, chain_id: int, anchor: str, last: int = 64) -> list[PendingTx]:
    """The last transactions on this chain that ended with a receipt: what a reorganisation may have thrown out meanwhile."""
    signed: dict[str, Mapping[str, Any]] = {}
    found: dict[int, Mapping[str, Any]] = {}
    for kind, body in records:
        if kind == "tx_signed" and int(body["chain_id"]) == chain_id and body.get("anchor") == anchor:
            signed[body["hash"]] = body
        elif kind == "tx_final" and body["hash"] in signed:
            found[int(body["nonce"])] = signed[body["hash"]]
            signed = {h: one for h, one in signed.items() if int(one["nonce"]) > int(body["nonce"]) - last}
    return [PendingTx.from_body(found[nonce]) for nonce in sorted(found)[-last:]]
