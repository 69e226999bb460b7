"""Finished results, kept by job id until the client acknowledges or they expire: a paid answer outlives a broken stream.

Rules
- Kept in the journal's file but not chained: a result is its client's data and must go some day; the receipt in the journal
  is forever. `keeping(...)` puts both into one transaction.
- Bounded by bytes. Room is made by dropping what has expired, then what is acknowledged or released, oldest first; what still
  waits for its client is never dropped before its time, so a full store refuses new results.
- One job id, one result: the same one again is fine and may be kept longer for it, another one is a conflict.
- All times are Unix milliseconds given by the caller.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from node.store.errors import EntryInvalid, ResultConflict, ResultsFull
from node.store.ledger import Ledger
from node.store.writer import Work

KEEP_MS = 24 * 3600 * 1000
MAX_BYTES = 256 << 20


class Results:
    """The kept results of one journal. `max_bytes` bounds the sum of the payloads."""

    def __init__(self, ledger: Ledger, *, max_bytes: int = MAX_BYTES) -> None:
        self._ledger = ledger
        self._max_bytes = max_bytes

    async def put(self, job_id: bytes, payload: bytes, expires_ms: int, *, now_ms: int) -> None:
        """Keep a result; returns when it is durable. Raises ResultsFull, ResultConflict, EntryInvalid, LedgerFailed."""
        await self._ledger.write(self.keeping(job_id, payload, expires_ms, now_ms=now_ms))

    def keeping(self, job_id: bytes, payload: bytes, expires_ms: int, *, now_ms: int) -> Work[None]:
        """The same as work for `Ledger.append(entries, also=...)`: receipt and result become durable together."""
        if len(job_id) != 32:
            raise EntryInvalid(f"a job id has 32 bytes, not {len(job_id)}")

        def work(connection: sqlite3.Connection) -> None:
            kept = connection.execute("SELECT payload FROM results WHERE job_id = ?", (job_id,)).fetchone()
            if kept is not None:
                if kept[0] != payload:
                    raise ResultConflict(f"job {job_id.hex()} already has another result")
                connection.execute(
                    "UPDATE results SET expires_ms = MAX(expires_ms, ?) WHERE job_id = ?", (expires_ms, job_id)
                )
                return
            self._make_room(connection, len(payload), now_ms)
            connection.execute(
                "INSERT INTO results (job_id, payload, size, expires_ms) VALUES (?, ?, ?, ?)",
                (job_id, payload, len(payload), expires_ms),
            )

        return work

    def get(self, job_id: bytes) -> bytes | None:
        """The result, acknowledged or not, for as long as it is kept."""
        with self._ledger.reading() as connection:
            row = connection.execute("SELECT payload FROM results WHERE job_id = ?", (job_id,)).fetchone()
        return None if row is None else bytes(row[0])

    def piece(self, job_id: bytes, offset: int, size: int) -> bytes | None:
        """Some bytes of the result, fewer at its end; None when it is not kept."""
        with self._ledger.reading() as connection:
            row = connection.execute(
                "SELECT substr(payload, ?, ?) FROM results WHERE job_id = ?", (offset + 1, size, job_id)
            ).fetchone()
        return None if row is None else bytes(row[0])

    async def extend(self, job_id: bytes, expires_ms: int) -> bool:
        """Keep it so long, if it is not kept longer, and for no less whoever let go of it. False when the job is unknown."""

        def work(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(
                "UPDATE results SET expires_ms = MAX(expires_ms, ?), acknowledged_ms = NULL WHERE job_id = ?",
                (expires_ms, job_id),
            )
            return changed.rowcount > 0

        return await self._ledger.write(work)

    def forgetting(self, job_ids: Sequence[bytes]) -> Work[None]:
        """Work that drops these at once, whatever they waited for: pieces that have become a whole."""

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM results WHERE job_id = ?", [(job_id,) for job_id in job_ids])

        return work

    def releasing(self, job_id: bytes, *, now_ms: int) -> Work[None]:
        """Work that lets it go when room is needed; until then it stays to its time."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE results SET acknowledged_ms = ? WHERE job_id = ? AND acknowledged_ms IS NULL", (now_ms, job_id)
            )

        return work

    async def acknowledge(self, job_id: bytes, *, now_ms: int) -> bool:
        """The client has it: it may go when room is needed. False when the job is unknown. The first time counts."""
        release = self.releasing(job_id, now_ms=now_ms)

        def work(connection: sqlite3.Connection) -> bool:
            release(connection)
            return connection.execute("SELECT 1 FROM results WHERE job_id = ?", (job_id,)).fetchone() is not None

        return await self._ledger.write(work)

    async def sweep(self, now_ms: int) -> int:
        """Drop what has expired; returns how many."""
        return await self._ledger.write(lambda connection: _drop_expired(connection, now_ms))

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def used_bytes(self) -> int:
        """Sum of the payloads kept."""
        with self._ledger.reading() as connection:
            return _used(connection)

    def held_bytes(self, now_ms: int) -> int:
        """Of them, those that no new one can take the room of: neither expired nor acknowledged."""
        with self._ledger.reading() as connection:
            row = connection.execute(
                "SELECT COALESCE(SUM(size), 0) FROM results WHERE expires_ms > ? AND acknowledged_ms IS NULL", (now_ms,)
            ).fetchone()
        return int(row[0])

    def _make_room(self, connection: sqlite3.Connection, size: int, now_ms: int) -> None:
        excess = _used(connection) + size - self._max_bytes
        if excess <= 0:
            return
        _drop_expired(connection, now_ms)
        excess = _used(connection) + size - self._max_bytes
        drop: list[tuple[Any]] = []
        for row, freed in connection.execute(
            "SELECT rowid, size FROM results WHERE acknowledged_ms IS NOT NULL ORDER BY acknowledged_ms, rowid"
        ):
            if excess <= 0:
                break
            drop.append((row,))
            excess -= freed
        if excess > 0:
            raise ResultsFull(
                f"no room for a result of {size} bytes: {self._max_bytes} bytes are kept for clients to fetch"
            )
        connection.executemany("DELETE FROM results WHERE rowid = ?", drop)


def _used(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT COALESCE(SUM(size), 0) FROM results").fetchone()[0])


def _drop_expired(connection: sqlite3.Connection, now_ms: int) -> int:
    return connection.execute("DELETE FROM results WHERE expires_ms <= ?", (now_ms,)).rowcount
