"""The journal as NDJSON: one record a line, in order, bodies decoded, bytes as 0x hex. Reads only.

Integers are written in full; a reader in a language with 53-bit numbers must take care (amounts of money are stored as text
or bytes, never as numbers).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from node.store import database
from node.store.errors import LedgerDamaged, LedgerMissing
from node.store.ledger import Ledger, Record


def read(path: Path) -> Ledger:
    """Any journal, to read, as the account's that it says it is: for who has no key of it. Raises `LedgerError`."""
    if not path.exists():
        raise LedgerMissing(f"there is no journal at {path}")
    try:
        with closing(database.connect(path, read_only=True)) as connection:
            database.check_structure(connection)
            owner = connection.execute("SELECT chain_tag FROM about").fetchone()
    except sqlite3.Error as error:
        raise database.blame(error) from error
    if owner is None:
        raise LedgerDamaged(0, "it does not say whose it is")
    return Ledger.open(path, chain_tag=owner[0], read_only=True)


def dump(ledger: Ledger, after: int = 0) -> Iterator[str]:
    """One JSON object per record with seq > `after`, without line ends."""
    for record in ledger.records(after):
        yield msgspec.json.encode(as_json(record)).decode()


def as_json(record: Record) -> dict[str, Any]:
    """The record as JSON values. A body that is not msgpack (never written by us) is shown as hex."""
    try:
        body = _plain(msgspec.msgpack.decode(record.body))
    except (msgspec.DecodeError, ValueError, RecursionError):
        body = _plain(record.body)
    return {
        "seq": record.seq,
        "at_ms": record.at_ms,
        "kind": record.kind,
        "subject": _plain(record.subject),
        "body": body,
        "hash": _plain(record.hash),
    }


def _plain(value: Any) -> Any:
    """JSON has no bytes and only text as keys."""
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
