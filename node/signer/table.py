"""The signer's memory: one SQLite file of marks, of which nobody but the signer knows more than what it is told.

Rules
- `store` returns when the marks are durable (WAL, `synchronous=FULL`, read back), and only then may anything be signed.
- One process holds it: an flock on `<table>.lock`. 0600 in a 0700 folder, refused when wider.
- It is bound to the accounts of its keys, so a table is never read for another key.
- Each mark carries a checksum. A damaged table is refused, not repaired: a mark that is too low is a signature too many.
- A failed write is final: nothing is signed after it until the next start.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final

from node.errors import SignerError, SignerFailed, SignerLocked
from node.store import database, wal
from node.store.errors import LedgerError, LedgerLocked
from node.store.faults import fault_point
from protocol.ids import Address
from protocol.signing import KeyRole, Mark, MarkKey, Scope

SCHEMA: Final = 1
_CACHE: Final = 1 << 16
"""Marks held in memory. Beyond it the cache begins anew: reading one takes microseconds."""
_WIDTH: Final = 16


class Table:
    """All marks of one set of keys. Made by `open` or, for throw-away keys, by `in_memory`."""

    def __init__(self, connection: sqlite3.Connection, lock: database.FileLock | None, identity: bytes) -> None:
        self.identity = identity
        """16 random bytes that this table was born with: another table of the same keys is not it."""
        self.failure: str | None = None
        """Why nothing can be stored any more, or None."""
        self.commits = 0
        self._connection = connection
        self._lock = lock
        self._cache: dict[MarkKey, Mark | None] = {}

    @classmethod
    def open(cls, path: Path, accounts: Mapping[KeyRole, Address], *, create: bool = True) -> Table:
        """Open and check, or make. Raises `SignerError`."""
        try:
            return cls._open(path.resolve(), _owners(accounts), create)
        except LedgerLocked as error:
            raise SignerLocked(error.message, hint=error.hint) from error
        except LedgerError as error:  # the file handling is the journal's; whose file it is, we say
            raise SignerError(f"the signer's table {path}: {error.message}", hint=error.hint) from error
        except sqlite3.Error as error:
            raise SignerError(f"the signer's table {path} cannot be opened: {error}") from error
        except OSError as error:
            raise SignerError(f"the signer's table {path} cannot be opened: {error.strerror}") from error

    @classmethod
    def _open(cls, path: Path, owners: bytes, create: bool) -> Table:
        if not create and not path.exists():
            raise SignerError(f"there is no signer's table at {path}")
        database.prepare_folder(path.parent)
        lock = database.FileLock.acquire(path)
        connection: sqlite3.Connection | None = None
        try:
            if not path.exists():
                database.create(path, lambda fresh: _build(fresh, owners, os.urandom(16)))
            database.check_private(path)
            wal.check(path)
            connection = database.connect(path)
            database.check_structure(connection)
            identity = _verify(connection, owners, path)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return cls(connection, lock, identity)
        except BaseException:
            if connection is not None:
                connection.close()
            lock.release()
            raise

    @classmethod
    def in_memory(cls, accounts: Mapping[KeyRole, Address]) -> Table:
        """For keys that own nothing: the end of the process forgets what they signed."""
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        identity = os.urandom(16)
        _build(connection, _owners(accounts), identity)
        return cls(connection, None, identity)

    @property
    def durable(self) -> bool:
        return self._lock is not None

    @property
    def empty(self) -> bool:
        """Nothing was ever stored."""
        return self._connection.execute("SELECT 1 FROM marks LIMIT 1").fetchone() is None

    def get(self, key: MarkKey) -> Mark | None:
        """Raises `SignerFailed` for a mark that is not what was stored."""
        cache = self._cache
        if key in cache:
            return cache[key]
        row = self._connection.execute(
            "SELECT value, digest, checksum FROM marks WHERE scope = ? AND subject = ?", key
        ).fetchone()
        mark = None if row is None else self._read(key, *row)
        if len(cache) >= _CACHE:
            cache.clear()
        cache[key] = mark
        return mark

    def all(self) -> list[tuple[MarkKey, Mark]]:
        """Every mark, for people and tests."""
        rows = self._connection.execute("SELECT scope, subject, value, digest, checksum FROM marks").fetchall()
        return [(key := (Scope(scope), subject), self._read(key, *rest)) for scope, subject, *rest in rows]

    def store(self, changes: Mapping[MarkKey, Mark]) -> None:
        """Returns when all are durable, or raises `SignerFailed`: then nothing may be signed any more."""
        if self.failure is not None:
            raise SignerFailed(self.failure)
        connection = self._connection
        try:
            fault_point("signer.before_insert")
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_UPSERT, _rows(changes.items()))
            fault_point("signer.before_commit")
            connection.execute("COMMIT")
        except Exception as error:  # the boundary: whatever it was, this table takes no more marks
            code = getattr(error, "sqlite_errorname", type(error).__name__)
            self.failure = f"the signer's table could not be written ({code}: {error}); nothing more is signed"
            raise SignerFailed(self.failure, hint="free the disk or check it, then start again") from error
        fault_point("signer.after_insert")
        self.commits += 1
        self._cache.update(changes)

    def close(self) -> None:
        try:
            if self.failure is None and self.durable:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            pass  # what was stored is in the log
        finally:
            self._connection.close()
            if self._lock is not None:
                self._lock.release()

    def _read(self, key: MarkKey, value: bytes, digest: bytes, checksum: int) -> Mark:
        if checksum != _checksum(key, value, digest):
            self.failure = f"mark {key[0].name.lower()} {key[1].hex()} of the signer's table is damaged"
            raise SignerFailed(self.failure, hint="restore the table, or make a new one from a journal that is sound")
        return Mark(int.from_bytes(value), digest)


_UPSERT: Final = (
    "INSERT INTO marks (scope, subject, value, digest, checksum) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (scope, subject) DO UPDATE SET value = excluded.value, digest = excluded.digest, checksum = excluded.checksum"
)


def _rows(changes: Iterable[tuple[MarkKey, Mark]]) -> list[tuple[int, bytes, bytes, bytes, int]]:
    rows = []
    for key, (number, digest) in changes:
        value = number.to_bytes(_WIDTH)
        rows.append((int(key[0]), bytes(key[1]), value, bytes(digest), _checksum(key, value, digest)))
    return rows


def _checksum(key: MarkKey, value: bytes, digest: bytes) -> int:
    return zlib.crc32(b"%d|%b|%b|%b" % (key[0], key[1], value, digest))


def _owners(accounts: Mapping[KeyRole, Address]) -> bytes:
    return b"".join(b"%b=%b;" % (role.value.encode(), accounts[role].hex().encode()) for role in sorted(accounts))


def _build(connection: sqlite3.Connection, owners: bytes, identity: bytes) -> None:
    connection.execute(
        "CREATE TABLE signer (id INTEGER PRIMARY KEY CHECK (id = 1), schema INTEGER NOT NULL, owners BLOB NOT NULL, "
        "identity BLOB NOT NULL)"
    )
    connection.execute(
        "CREATE TABLE marks (scope INTEGER NOT NULL, subject BLOB NOT NULL, value BLOB NOT NULL, digest BLOB NOT NULL, "
        "checksum INTEGER NOT NULL, PRIMARY KEY (scope, subject)) WITHOUT ROWID"
    )
    connection.execute("INSERT INTO signer VALUES (1, ?, ?, ?)", (SCHEMA, owners, identity))


def _verify(connection: sqlite3.Connection, owners: bytes, path: Path) -> bytes:
    """Who the table is. Raises `SignerError` when it is another's, or none."""
    found = connection.execute("SELECT name FROM sqlite_master WHERE name = 'signer'").fetchone()
    row = found and connection.execute("SELECT schema, owners, identity FROM signer").fetchone()
    if not row:
        raise SignerError(f"{path} is no signer's table")
    schema, bound, identity = row
    if schema != SCHEMA:
        raise SignerError(f"{path} has schema {schema}, this program knows {SCHEMA}", hint="use the newer version")
    if bound != owners:
        raise SignerError(f"{path} was begun for other keys ({bytes(bound).decode(errors='replace')[:200]})")
    return bytes(identity)


def read_identity(path: Path) -> bytes | None:
    """Which table lies at this path, without opening it for writing; None when there is none."""
    if not path.exists():
        return None
    with closing(database.connect(path, read_only=True)) as connection:
        row = connection.execute("SELECT identity FROM signer").fetchone()
    return bytes(row[0]) if row else None
