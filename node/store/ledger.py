"""The journal: append-only, hash-chained, the one writer of money.

Rules
- Journal first, then speak: `append` returns only when the records are durable, and nothing may be signed or sent before.
- State is the fold of the records (`node.store.fold`); nobody keeps money anywhere else.
- Records are chained by hash from the identity that the journal belongs to (`node.store.records`).
- Opening verifies everything, once. A journal that is damaged, foreign, too new, too widely readable or in use is refused.
- Every open for writing begins an epoch, and with a fence (`node.store.fence`) an old copy is refused before it does.
- A failed write is final until the next start (see `node.store.writer`).

What the file alone cannot show: the loss of the very last transaction out of the write-ahead log looks like a power cut before
the commit, and an old but sound copy looks like the past. The fence knows, and so do peers and the chain.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import trio

from node.store import database, wal
from node.store.errors import (
    LedgerClosed,
    LedgerDamaged,
    LedgerFailed,
    LedgerForeign,
    LedgerMissing,
    LedgerTooNew,
)
from node.store.faults import fault_point
from node.store.fence import Fence
from node.store.migrations import MIGRATIONS, SCHEMA_VERSION
from node.store.records import WIDTHS, Entry, Head, Record, encode, genesis_hash, record_hash
from node.store.writer import Work, Writer

__all__ = ["Entry", "Head", "Ledger", "Record", "genesis_hash", "record_hash"]

T = TypeVar("T")

PAGE_ROWS = 4096
ADOPTED = "journal_adopted"
"""Kind of the record with which a journal goes on although the fence knew of a later one."""


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Pending(Generic[T]):
    """Work that is queued for the journal's thread."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    async def wait(self) -> T:
        """Until it is durable. Cannot be cancelled: a half-known write would be worse than one slow disk write."""
        if not self._future.done():
            done, token = trio.Event(), trio.lowlevel.current_trio_token()

            def wake(_: Future[T]) -> None:
                try:
                    token.run_sync_soon(done.set)
                except trio.RunFinishedError:
                    pass  # the caller's world is gone; what it wrote is not

            self._future.add_done_callback(wake)
            with trio.CancelScope(shield=True):
                await done.wait()
        return self._future.result()


class Ledger:
    """One open journal. Made by `Ledger.open`; a context manager that closes it."""

    def __init__(
        self,
        path: Path,
        head: Head,
        clock: Callable[[], int],
        *,
        lock: database.FileLock | None = None,
        fence: Fence | None = None,
    ) -> None:
        self.path = path
        self.epoch = 0
        """Number of this open among all opens for writing, from 1; rises with each. 0 when open for reading."""
        self._head = head
        self._tail = head  # belongs to the writer thread: the head as it will be when the open group is committed
        self._writer: Writer | None = None
        self._lock = lock
        self._fence = fence
        self._clock = clock
        self._connection: sqlite3.Connection | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        chain_tag: bytes,
        create: bool = True,
        read_only: bool = False,
        fence: Fence | None = None,
        clock: Callable[[], int] = wall_clock_ms,
        factory: database.Factory = sqlite3.Connection,
    ) -> Ledger:
        """Open and verify a journal; make it when it is missing and `create` is true.

        A read-only ledger takes no lock and asks no fence, so it works beside a running writer, and shows the journal as
        it was at that moment. `fence` is this account's; without one an old copy is not noticed. `clock` gives Unix
        milliseconds; `factory` lets tests watch or break the connection.

        Raises LedgerMissing, LedgerUnsafe, LedgerLocked, LedgerDamaged, LedgerForeign, LedgerFenced, LedgerTooNew,
        LedgerFailed.
        """
        path = path.resolve()
        try:
            if read_only:
                return cls._open_read_only(path, chain_tag, clock)
            return cls._open_writer(path, chain_tag, create, fence, clock, factory)
        except sqlite3.Error as error:
            raise database.blame(error) from error
        except OSError as error:
            raise LedgerFailed(f"cannot open the journal: {error}") from error

    @classmethod
    def _open_read_only(cls, path: Path, chain_tag: bytes, clock: Callable[[], int]) -> Ledger:
        if not path.exists():
            raise LedgerMissing(f"there is no journal at {path}")
        database.check_private(path.parent)
        database.check_private(path)
        with closing(database.connect(path, read_only=True)) as connection:
            connection.execute("BEGIN")  # one snapshot for all checks, whatever a writer does meanwhile
            database.check_structure(connection)
            if _schema_version(connection) < SCHEMA_VERSION:
                raise LedgerFailed("the journal has an older schema; start the node once to bring it up to date")
            return cls(path, _verify(connection, chain_tag), clock)

    @classmethod
    def _open_writer(
        cls,
        path: Path,
        chain_tag: bytes,
        create: bool,
        fence: Fence | None,
        clock: Callable[[], int],
        factory: database.Factory,
    ) -> Ledger:
        if not create and not path.exists():
            raise LedgerMissing(f"there is no journal at {path}")
        database.prepare_folder(path.parent)
        lock = database.FileLock.acquire(path)
        connection: sqlite3.Connection | None = None
        try:
            if fence is not None:
                fence.acquire(path)
            if not path.exists():
                if wal.path_of(path).exists() and wal.path_of(path).stat().st_size:
                    raise LedgerDamaged(0, f"{path.name} is gone but its write-ahead log is there")
                if fence is not None and fence.mark is not None and not fence.adopt:
                    raise fence.refusal(None, 0)
                database.create(path, lambda fresh: _found(fresh, chain_tag))
            database.check_private(path)
            wal.check(path)
            connection = database.connect(path, factory=factory)
            database.check_structure(connection)
            _migrate(connection)
            ledger = cls(path, _verify(connection, chain_tag), clock, lock=lock, fence=fence)
            # Start with an empty log: leftovers of a torn transaction must not be mixed with new ones (see `wal`).
            database.pragma(connection, "wal_checkpoint(TRUNCATE)")
            ledger._begin_epoch(connection, genesis_hash(chain_tag))
            ledger._connection = connection
            ledger._writer = Writer(connection, ledger._publish)
            return ledger
        except BaseException:
            if connection is not None:
                connection.close()
            if fence is not None:
                fence.release()
            lock.release()
            raise

    def _begin_epoch(self, connection: sqlite3.Connection, genesis: bytes) -> None:
        """Pass the fence, then make this open known: here first, at the fence second, and nothing is signed before both."""
        fence = self._fence
        mark = fence.mark if fence is not None else None
        (last,) = connection.execute("SELECT COALESCE(MAX(epoch), 0) FROM epochs").fetchone()
        passes = fence is None or fence.passes(connection, self._head, genesis)
        if fence is not None and not passes and not fence.adopt:
            raise fence.refusal(self._head, last)
        epoch, token = max(last, mark.epoch if mark else 0) + 1, os.urandom(16)
        connection.execute("BEGIN IMMEDIATE")
        if fence is not None and not passes:
            lost = {"epoch": mark.epoch, "seq": mark.seq, "hash": mark.hash} if mark is not None else {}
            self._appending([Entry(ADOPTED, b"", lost)], None)(connection)
            fence.adopted = True
        connection.execute(
            "INSERT INTO epochs (epoch, token, seq, hash, at_ms) VALUES (?, ?, ?, ?, ?)",
            (epoch, token, self._tail.seq, self._tail.hash, self._clock()),
        )
        connection.execute("COMMIT")
        self.epoch, self._head = epoch, self._tail
        fault_point("journal.after_epoch")
        if fence is not None:
            fence.begin(epoch, token, self._head)

    @property
    def head(self) -> Head:
        """The last durable record, as (seq, hash)."""
        return self._head

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing, is open, and has not failed."""
        return self._connection is not None and self.failure is None

    @property
    def failure(self) -> str | None:
        """Why the journal takes no more records, or None while it does."""
        return self._writer.failure if self._writer else None

    @property
    def commits(self) -> int:
        """Transactions committed since it was opened (each one fsync, shared by everything in its group)."""
        return self._writer.commits if self._writer else 0

    async def append(self, entries: Sequence[Entry], *, also: Work[object] | None = None) -> tuple[Record, ...]:
        """Record the entries, all or none, in order; returns when they are durable. No entries are no records.

        `also` is more work for the same transaction (`Results.keeping`); when it refuses, nothing is recorded. A cancellation
        arrives before anything is queued or not at all: a half-known append would be worse than one slow disk write.

        Raises EntryInvalid (nothing was written), LedgerClosed, LedgerFailed (final), or what `also` refuses with.
        """
        return await self.write(self._appending(entries, also))

    def begin(self, entries: Sequence[Entry], *, also: Work[object] | None = None) -> Pending[tuple[Record, ...]]:
        """`append` in two halves: queued when this returns, durable when its `wait` does."""
        return Pending(self._submit(self._appending(entries, also)))

    def append_sync(self, entries: Sequence[Entry], *, also: Work[object] | None = None) -> tuple[Record, ...]:
        """`append` for code outside trio. Blocks the calling thread."""
        return self.write_sync(self._appending(entries, also))

    async def write(self, work: Work[T]) -> T:
        """Run other work on the same file in the next group, e.g. for `Results`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        return await Pending(self._submit(work)).wait()

    def post(self, work: Work[object]) -> None:
        """`write` without waiting, for what may as well not be written. Raises LedgerClosed, LedgerFailed."""
        self._submit(work)

    def write_sync(self, work: Work[T]) -> T:
        """`write` for code outside trio."""
        return self._submit(work).result()

    def records(self, after: int = 0, *, prefix: str = "", subject: bytes | None = None) -> Iterator[Record]:
        """The durable records with seq > after, in order, up to the head at the time of the call; `prefix`: only those whose
        kind begins with it; `subject`: only those about it.

        Reads page by page through a connection of its own: a slow reader neither blocks the writer nor pins the log.
        """
        if not prefix and subject is None:
            return self._read(after, self._head.seq)
        return self._some(after, self._head.seq, prefix, subject)

    def _some(self, after: int, last: int, prefix: str, subject: bytes | None) -> Iterator[Record]:
        """SQLite passes over the others: a tenth of the time of reading them."""
        with self.reading() as connection:
            for row in connection.execute(
                "SELECT seq, at_ms, kind, subject, body, hash FROM records WHERE seq > ? AND seq <= ?"
                " AND substr(kind, 1, ?) = ? AND (? IS NULL OR subject = ?) ORDER BY seq",
                (after, last, len(prefix), prefix, subject, subject),
            ):
                yield Record(*row)

    def _read(self, after: int, last: int) -> Iterator[Record]:
        with self.reading() as connection:
            while after < last:
                rows = connection.execute(
                    "SELECT seq, at_ms, kind, subject, body, hash FROM records WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?",
                    (after, last, PAGE_ROWS),
                ).fetchall()
                if not rows:
                    raise LedgerDamaged(after + 1, "the record has gone since the journal was opened")
                for row in rows:
                    yield Record(*row)
                after = rows[-1][0]

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A short-lived read-only connection that sees what is committed."""
        with closing(database.connect(self.path, read_only=True)) as connection:
            yield connection

    def close(self) -> None:
        """Finish what is queued, fold the write-ahead log into the file, give back the lock. Idempotent."""
        if self._writer is not None:
            self._writer.stop()
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                if self.failure is None:
                    database.pragma(connection, "optimize")
                    database.pragma(connection, "wal_checkpoint(TRUNCATE)")
            except sqlite3.Error:
                pass  # everything acknowledged is in the log, and the next start reads it from there
            finally:
                connection.close()
        if self._fence is not None:
            self._fence.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, work: Work[T]) -> Future[T]:
        if self._writer is None:
            raise LedgerClosed("the journal is open for reading only")
        return self._writer.submit(work)

    def _publish(self) -> None:
        if self._fence is not None:
            self._fence.advance(self._tail)
        self._head = self._tail

    def _appending(self, entries: Sequence[Entry], also: Work[object] | None) -> Work[tuple[Record, ...]]:
        encoded = [encode(entry) for entry in entries]

        def work(connection: sqlite3.Connection) -> tuple[Record, ...]:
            fault_point("journal.before_append")
            if also is not None:
                also(connection)
            at_ms = self._clock()
            start = self._tail
            seq, link = start
            records = []
            for kind, subject, body in encoded:
                seq += 1
                link = record_hash(link, seq, at_ms, kind.encode(), subject, body)
                records.append(Record(seq, at_ms, kind, subject, body, link))
            connection.executemany(
                "INSERT INTO records (seq, at_ms, kind, subject, body, hash) VALUES (?, ?, ?, ?, ?, ?)",
                [(r.seq, r.at_ms, r.kind, r.subject, r.body, r.hash) for r in records],
            )
            moved = connection.execute(
                "UPDATE head SET seq = ?, hash = ? WHERE id = 1 AND seq = ? AND hash = ?",
                (seq, link, start.seq, start.hash),
            )
            if moved.rowcount != 1:
                raise LedgerFailed("somebody else has written to this journal")
            self._tail = Head(seq, link)
            return tuple(records)

        return work


def _found(connection: sqlite3.Connection, chain_tag: bytes) -> None:
    """Fill a new file: all tables, who it belongs to, an empty head."""
    for migration in MIGRATIONS:
        migration(connection)
    database.pragma(connection, f"user_version = {SCHEMA_VERSION}")
    connection.execute("INSERT INTO about (id, chain_tag, schema) VALUES (1, ?, ?)", (chain_tag, SCHEMA_VERSION))
    connection.execute("INSERT INTO head (id, seq, hash) VALUES (1, 0, ?)", (genesis_hash(chain_tag),))


def _schema_version(connection: sqlite3.Connection) -> int:
    """The schema version, which the file states twice. Raises LedgerTooNew before anything else is read."""
    version = int(database.pragma(connection, "user_version") or 0)
    if version > SCHEMA_VERSION:
        raise LedgerTooNew(version, SCHEMA_VERSION)
    row = connection.execute("SELECT schema FROM about").fetchone()
    if version < 1 or row is None or row[0] != version:
        raise LedgerDamaged(0, f"the header says schema {version}, the file says {row[0] if row else 'nothing'}")
    return version


def _migrate(connection: sqlite3.Connection) -> None:
    version = _schema_version(connection)
    if version == SCHEMA_VERSION:
        return
    try:
        connection.execute("BEGIN IMMEDIATE")
        for migration in MIGRATIONS[version:]:
            migration(connection)
        connection.execute("UPDATE about SET schema = ?", (SCHEMA_VERSION,))
        database.pragma(connection, f"user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except sqlite3.Error as error:  # closing the connection undoes it all
        raise LedgerFailed(
            f"the journal stays at schema {version}; bringing it to {SCHEMA_VERSION} failed: {error}"
        ) from error


def _verify(connection: sqlite3.Connection, chain_tag: bytes) -> Head:
    """Walk the whole chain in one pass and return its end. Raises LedgerDamaged at the first record that does not hold."""
    (owner,) = connection.execute("SELECT chain_tag FROM about").fetchone()
    if not isinstance(owner, bytes):
        raise LedgerDamaged(0, "the owner's tag is not readable")
    if owner != chain_tag:
        raise LedgerForeign(f"this journal belongs to {owner.hex()}, not to {chain_tag.hex()}")
    pack, sha256, join = WIDTHS.pack, hashlib.sha256, b"".join  # this loop is what the start-up time is made of
    seq, link = 0, genesis_hash(chain_tag)
    rows = connection.execute("SELECT seq, at_ms, kind, subject, body, hash FROM records ORDER BY seq")
    try:
        for found, at_ms, text, subject, body, stored in rows:
            seq += 1
            kind = text.encode()
            if found != seq:
                raise LedgerDamaged(seq, f"the record after it is {found}")
            widths = pack(seq, at_ms, len(kind), len(subject), len(body))
            link = sha256(join((link, widths, kind, subject, body))).digest()
            if link != stored:
                raise LedgerDamaged(seq, "its hash does not match")
    except (AttributeError, TypeError, struct.error) as error:
        raise LedgerDamaged(seq, f"a field has the wrong type: {error}") from error
    head = connection.execute("SELECT seq, hash FROM head WHERE id = 1").fetchone()
    if head != (seq, link):
        raise LedgerDamaged(
            seq + 1, f"the journal once had {head[0] if head else 'an unknown number of'} records, now {seq}"
        )
    return Head(seq, link)
