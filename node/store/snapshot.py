"""The fold up to some record, kept so that a start need not fold what came before. A cache: the records alone say what is.

Rules
- A snapshot is used only if everything that it rests on is as it was: the record it was taken at (by hash), the source code that
  folds, and its own bytes. Anything else, and the whole journal is folded as if there were none. It is never repaired.
- It is written through the journal's own queue, behind everything that it contains; so the head that it finds there is its own.
- `audit` folds from the first record and compares (`node.audit`).
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from node.store.ledger import Ledger
from node.store.writer import Work


def code_of(modules: Iterable[ModuleType], *more: bytes) -> bytes:
    """A hash of the source that folds, and of what else the fold depends on: after a change in it no old snapshot is used."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(hashlib.sha256(Path(module.__file__ or "").read_bytes()).digest())
    for one in more:
        digest.update(hashlib.sha256(one).digest())
    return digest.digest()


def keeping(name: str, code: bytes, payload: bytes) -> Work[None]:
    """Work for `Ledger.post`: keep this fold of everything that was queued until now."""

    def work(connection: sqlite3.Connection) -> None:
        seq, head = connection.execute("SELECT seq, hash FROM head").fetchone()
        connection.execute(
            "INSERT OR REPLACE INTO snapshots (name, seq, hash, code, payload, digest) VALUES (?, ?, ?, ?, ?, ?)",
            (name, seq, head, code, payload, _digest(seq, head, code, payload)),
        )

    return work


def load(ledger: Ledger, name: str, code: bytes) -> tuple[int, bytes] | None:
    """Number of the record that the kept fold goes up to, and the fold; None when there is none that can be used."""
    with ledger.reading() as connection:
        row = connection.execute(
            "SELECT seq, hash, code, payload, digest FROM snapshots WHERE name = ?", (name,)
        ).fetchone()
        if row is None or [type(value) for value in row] != [int, bytes, bytes, bytes, bytes]:
            return None
        seq, head, kept_code, payload, digest = row
        if kept_code != code or digest != _digest(seq, head, code, payload) or not 0 < seq <= ledger.head.seq:
            return None
        record = connection.execute("SELECT hash FROM records WHERE seq = ?", (seq,)).fetchone()
    return (seq, payload) if record is not None and record[0] == head else None


def _digest(seq: int, head: bytes, code: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(b"".join((seq.to_bytes(8), head, code, payload))).digest()
