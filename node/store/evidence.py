"""Receipts as evidence: those that were paid for and those that were refused, and which of them contradict each other.

What a client has accepted is in the records of its jobs' ends. A receipt that is signed by the worker and was refused is kept
beside them, because its number may come again under another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from typing import Final

import msgspec

from node.store.ledger import Entry, Ledger
from protocol.channel import JobEnded
from protocol.equivocation import Contradiction, SignedReceipt, contradict
from protocol.errors import RemoteProtocolError
from protocol.ids import ChannelId
from protocol.job import receipt_from_wire
from protocol.messages import JOB_PROTOCOL, ReceiptMessage, decode, encode
from protocol.records import decode_body, kind_of

REFUSED: Final = "receipt_refused"
"""Journal record, by channel: body {receipt: `ReceiptMessage` as it crossed the wire}."""
_ENDED: Final = kind_of(JobEnded)


async def keep_refused(ledger: Ledger, message: ReceiptMessage) -> None:
    """Returns when it is durable. Raises `LedgerError`."""
    await ledger.append([Entry(REFUSED, message.receipt.channel_id, {"receipt": encode(message)})])


def receipts(ledger: Ledger, channel_id: ChannelId | None = None) -> Iterator[SignedReceipt]:
    """All that this journal holds, or those of one channel, oldest first. Reads the whole journal."""
    subject = None if channel_id is None else bytes(channel_id)
    kinds = [ledger.records(prefix=kind, subject=subject) for kind in (_ENDED, REFUSED)]
    for record in merge(*kinds, key=lambda record: record.seq):
        if record.kind == REFUSED:
            raw = msgspec.msgpack.decode(record.body)["receipt"]
        else:
            ended = decode_body(record.kind, record.body)
            raw = ended.receipt if isinstance(ended, JobEnded) else b""
        found = _read(raw) if raw else None
        if found is not None:
            yield found


def channels_that_refused(ledger: Ledger) -> set[ChannelId]:
    """Those of which a refused receipt is kept."""
    return {ChannelId(record.subject) for record in ledger.records(prefix=REFUSED)}


def contradictions(ledger: Ledger) -> list[Contradiction]:
    """The first of every channel: one convicts its worker, once and for ever."""
    held: dict[tuple[ChannelId, int], SignedReceipt] = {}
    found: dict[ChannelId, Contradiction] = {}
    for one in receipts(ledger):
        first = held.setdefault((one.receipt.channel_id, one.receipt.sequence), one)
        if contradict(first.receipt, one.receipt):
            found.setdefault(one.receipt.channel_id, Contradiction(first, one))
    return list(found.values())


def _read(raw: bytes) -> SignedReceipt | None:
    try:
        message = decode(JOB_PROTOCOL, raw)
    except RemoteProtocolError:
        return None
    if not isinstance(message, ReceiptMessage):
        return None
    return SignedReceipt(receipt_from_wire(message.receipt), message.signature)
