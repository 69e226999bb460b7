"""The audit of transactions: what the journal signed for an account, and what became of it. Pure, no chain is asked.

What must hold: each record is the transaction that it says, signed by the account that it names; an end belongs to a transaction
that was signed here; one nonce is for one call (N4); one request id is for one call and happens once (N8).

A transaction that was dropped is none: its nonce and its id are free again. One that landed may be thrown out by a
reorganisation, be replaced with higher fees and land again, as another transaction with the same call. Nonces and ids are those
of one chain, and of one chain among several of the same id (`TxSender`'s anchor). What else is in the journal is passed over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from node.chain.pending import PendingTx
from node.errors import ChainError
from node.store.records import Record
from protocol.errors import InvalidValue, RemoteProtocolError
from protocol.ids import keccak256
from protocol.keys import recover
from protocol.transactions import signature_of

TX_KINDS = ("tx_signed", "tx_final", "tx_dropped")
_Account = tuple[bytes, int, str]
"""Address, chain id, anchor: whose nonces and request ids are numbered together."""


def check_transactions(records: Iterable[Record]) -> list[str]:
    """Findings about the records of transactions, in order; empty when every rule holds."""
    history, findings = _History(), []
    for record in records:
        if record.kind in TX_KINDS:
            findings += [f"record {record.seq}: {what}" for what in history.take(record)]
    return findings


class _History:
    """The fold of the records so far. Hashes are hex, as in the records."""

    def __init__(self) -> None:
        self.signed: dict[str, tuple[PendingTx, _Account]] = {}
        self.open: defaultdict[tuple[_Account, int], dict[str, PendingTx]] = defaultdict(dict)
        """By nonce: what may land, or has."""
        self.landed: defaultdict[tuple[_Account, int], dict[str, PendingTx]] = defaultdict(dict)
        self.asked: defaultdict[tuple[_Account, str], dict[str, PendingTx]] = defaultdict(dict)
        """By request id: what was signed for it and not dropped."""
        self.happened: defaultdict[tuple[_Account, str], dict[str, int]] = defaultdict(dict)
        """By request id: what has landed, and its nonce."""

    def take(self, record: Record) -> list[str]:
        try:
            body = msgspec.msgpack.decode(record.body)
            if record.kind == "tx_signed":
                return self._sign(record.subject, PendingTx.from_body(body))
            return self._end(record.kind, record.subject, str(body["hash"]), int(body["nonce"]))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, ChainError) as error:
            return [f"{record.kind} is unreadable: {error}"]

    def _sign(self, subject: bytes, tx: PendingTx) -> list[str]:
        given, name = tx.signed.transaction, tx.signed.hash.hex()
        account = (bytes(subject), given.chain_id, tx.anchor)
        findings = _forged(tx, subject)
        beside, asked = self.open[account, given.nonce], self.asked[account, tx.request]
        if any(other.call != tx.call for other in beside.values()):
            findings.append(f"nonce {given.nonce} on chain {given.chain_id} is signed for a second call")
        if tx.request:
            if any(other.call != tx.call for other in asked.values()):
                findings.append(f"request id {tx.request!r} is used for two different calls")
            asked[name] = tx
        beside[name] = tx
        self.signed[name] = tx, account
        return findings

    def _end(self, kind: str, subject: bytes, name: str, nonce: int) -> list[str]:
        known = self.signed.get(name)
        if known is None or known[1][0] != subject:
            return [f"{kind} of a transaction that was not signed here"]
        tx, account = known
        given = tx.signed.transaction
        if nonce != given.nonce:
            return [f"{kind} with nonce {nonce} of a transaction with nonce {given.nonce}"]
        beside, landed = self.open[account, nonce], self.landed[account, nonce]
        happened: dict[str, int] = self.happened[account, tx.request] if tx.request else {}
        if kind == "tx_dropped":
            self.asked[account, tx.request].pop(name, None)
            beside.pop(name, None)
            happened.pop(name, None)
            landed.pop(name, None)
            return []
        findings = []
        if any(other.call != tx.call for other in landed.values()):
            findings.append(f"two calls landed with nonce {nonce} on chain {given.chain_id}")
        if any(other != nonce for other in happened.values()):
            findings.append(f"request id {tx.request!r} happened twice")
        happened[name] = nonce
        landed[name] = tx
        self.open[account, nonce] = {name: tx}  # whatever else was signed for the nonce can not land any more
        return findings


def _forged(tx: PendingTx, account: bytes) -> list[str]:
    """Whether hash, bytes and signer are what the record says."""
    if keccak256(tx.signed.raw) != tx.signed.hash:
        return ["the transaction's hash is not that of its bytes"]
    transaction = tx.signed.transaction
    try:
        signer = recover(transaction.digest(), signature_of(transaction, tx.signed.raw))
    except (InvalidValue, RemoteProtocolError) as error:
        return [f"the transaction's bytes are not what the record says: {error}"]
    return [] if signer == account else [f"the transaction is not signed by {bytes(account).hex()}"]
