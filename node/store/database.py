"""The journal as a file: its folder and modes, its lock, its SQLite connection. Knows nothing about records.

Rules
- 0600 in a 0700 folder; anything wider is refused, not repaired: somebody may already have read or changed it.
- The lock is an flock on `<journal>.lock`, held for as long as the journal is open for writing. The file stays when the
  lock is given back, because removing it would let two processes lock two different files. (Never lock the journal file
  itself: closing a descriptor of it would drop SQLite's own locks.)
- A new journal is made whole under another name and renamed into place, so a file that is there but empty is damage.
- Every setting that durability rests on is read back. `synchronous=NORMAL` would survive every kill -9 and lose
  acknowledged records in a power cut.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from node.store.errors import LedgerDamaged, LedgerError, LedgerFailed, LedgerLocked, LedgerUnsafe

APPLICATION_ID = 0x4752_5354  # "GRST", so that `file` and we can tell the journal from any other SQLite file

SETTINGS: tuple[tuple[str, str | int], ...] = (
    ("journal_mode", "wal"),
    ("synchronous", "FULL"),
    ("fullfsync", 1),
    ("checkpoint_fullfsync", 1),
    ("cell_size_check", 1),
    ("trusted_schema", 0),
)
REQUIRED: tuple[tuple[str, str | int], ...] = (("journal_mode", "wal"), ("synchronous", 2))

BUSY_TIMEOUT_S = 5.0

Factory = type[sqlite3.Connection]


class FileLock:
    """An exclusive, crash-safe lock: the kernel gives it back when the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, journal: Path) -> FileLock:
        """Take the lock of this journal or raise LedgerLocked at once, naming the holder's pid when it is known."""
        descriptor = os.open(journal.with_name(journal.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            written = os.pread(descriptor, 20, 0).strip()
            os.close(descriptor)
            raise LedgerLocked(journal, int(written) if written.isdigit() else None) from None
        except BaseException:
            os.close(descriptor)
            raise
        _sign(descriptor, b"%d\n" % os.getpid())
        return cls(descriptor)

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _sign(descriptor, b"")
            os.close(descriptor)


def _sign(descriptor: int, text: bytes) -> None:
    """Who holds the lock. For people: a full disk is no reason to fail here."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
    except OSError:
        pass


def prepare_folder(folder: Path) -> None:
    """Make the folder if it is missing (0700), durably with those above it; refuse one that others may enter."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        try:
            one.mkdir(mode=0o700)
        except FileExistsError:
            pass
        sync_folder(one.parent)
    check_private(folder)


def check_private(path: Path) -> None:
    """Raise LedgerUnsafe when group or others have any right to this file or folder."""
    found = os.lstat(path)
    wanted = 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise LedgerUnsafe(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}; check who used it, then: chmod {wanted:o} {path}"
        )


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path, build: Callable[[sqlite3.Connection], None]) -> None:
    """Make a new database: build it under another name, sync it, rename it into place. The caller holds the lock."""
    draft = path.with_name(path.name + ".new")
    for left_over in (draft, draft.with_name(draft.name + "-journal")):
        left_over.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(draft, isolation_level=None)
    try:
        pragma(connection, "synchronous = FULL")
        pragma(connection, f"application_id = {APPLICATION_ID}")
        connection.execute("BEGIN IMMEDIATE")
        build(connection)
        connection.execute("COMMIT")
    finally:
        connection.close()
    os.rename(draft, path)
    sync_folder(path.parent)


def connect(path: Path, *, read_only: bool = False, factory: Factory = sqlite3.Connection) -> sqlite3.Connection:
    """A connection to an existing journal, with every setting made and read back.

    It may be handed from thread to thread, but only one thread may use it at a time.
    """
    uri = f"file:{quote(os.fsencode(path))}?mode={'ro' if read_only else 'rw'}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, factory=factory
    )
    try:
        if read_only:
            pragma(connection, "query_only = 1")
            return connection
        for name, value in SETTINGS:
            pragma(connection, f"{name} = {value}")
        connection.execute("SELECT 1 FROM sqlite_schema").fetchall()  # only a read shows what a mode really is
        for name, value in REQUIRED:
            found = pragma(connection, name)
            if found != value:
                raise LedgerUnsafe(f"SQLite keeps {name}={found} here; the journal needs {value}")
        return connection
    except BaseException:
        connection.close()
        raise


def pragma(connection: sqlite3.Connection, text: str) -> str | int | None:
    """The first column of the first row of a PRAGMA, run to its end.

    To its end, because a switch to WAL that fails gives its row first and its error afterwards: who takes the row and goes
    stays in rollback mode, where FULL does not survive a power cut.
    """
    rows = connection.execute(f"PRAGMA {text}").fetchall()
    return rows[0][0] if rows else None


def check_structure(connection: sqlite3.Connection) -> None:
    """Raise LedgerDamaged when this is not our file or its pages do not hang together."""
    if pragma(connection, "application_id") != APPLICATION_ID:
        raise LedgerDamaged(0, "the file is not a journal of this program")
    findings = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
    if findings != ["ok"]:
        raise LedgerDamaged(0, "; ".join(findings))


# What the machine or the caller does to us, in contrast to what the file contains.
_CIRCUMSTANCES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_AUTH,
    }
)


def blame(error: sqlite3.Error) -> LedgerError:
    """Name an SQLite error met while opening: the machine's (LedgerFailed) or the file's (LedgerDamaged)."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _CIRCUMSTANCES:
        return LedgerFailed(f"cannot open the journal: {error} ({error.sqlite_errorname})")
    return LedgerDamaged(0, str(error))
