"""One journal per key on this machine: the fence stands outside every data dir and knows how far the key's journal had come.

An old backup put back and a second copy of a data dir are *sound* journals: nothing in them says that another one has signed
more. Whoever writes with them signs the same receipt numbers for other work. So the last mark of each account's journal is kept
in the user's state folder, where a backup of the data dir does not reach, and a journal that does not contain it is refused.

Rules
- A mark is (epoch, token, seq, hash). Every writable open begins an epoch with a random token, in the journal first and then
  here; so two copies part at their first open, whether or not they append. A journal passes when it knows the mark's epoch by
  the same token and has the mark's record by the same hash: it is that journal, at that point or later.
- The fence never runs ahead of the journal: a mark is written only when what it names is durable there. A journal that is
  ahead of the fence (the process died in between) passes.
- Each commit moves the mark before its callers hear of it, without an fsync: that survives every kill -9. A power cut may take
  the last seconds of marks with it; begin and close are synced.
- The lock is held while the journal is open for writing, so a copy is refused at once while the original runs.

Format: two slots of `_SLOT` bytes, each one line of JSON with its own checksum, padded with blanks; the higher mark counts. The
slot that was synced last is never written until the other one is synced, so a torn write leaves a mark.

What this cannot see: another machine, another user, a snapshot of the whole disk. There the peers' and the chain's
marks remain: invariant L8 for the client, `QueryChannel` for what the other side has seen.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from pathlib import Path

import msgspec

from node.store import database
from node.store.errors import LedgerFailed, LedgerFenced, LedgerLocked
from node.store.records import Head

_SLOT = 1024
_PATH = 600
"""So much of a journal's path is kept: it is for people."""


class Mark(msgspec.Struct, frozen=True):
    """How far a journal had come."""

    epoch: int
    """How often a journal of this account was opened for writing."""
    token: bytes
    """Random, of this epoch: tells two copies apart that opened equally often."""
    seq: int
    hash: bytes
    """32 bytes; with seq 0 the hash before the first record."""
    journal: str
    """Where the journal was."""


class _Slot(msgspec.Struct, frozen=True):
    mark: Mark
    check: int


def _encode(mark: Mark) -> bytes:
    check = zlib.crc32(msgspec.json.encode(mark))
    return msgspec.json.encode(_Slot(mark, check)).ljust(_SLOT - 1) + b"\n"


def _shown(journal: Path) -> str:
    """The path as a mark holds it: its end, in characters that take no more room in JSON than they have bytes."""
    text = os.fsencode(journal)[-_PATH:].decode(errors="replace")
    return "".join(c if c.isprintable() and c not in '"\\' else "?" for c in text)


def _decode(raw: bytes) -> Mark | None:
    try:
        slot = msgspec.json.decode(raw, type=_Slot)
    except msgspec.DecodeError:
        return None
    return slot.mark if zlib.crc32(msgspec.json.encode(slot.mark)) == slot.check else None


class Fence:
    """The fence of one account's journal. Handed to `Ledger.open`, which drives it; `close` gives it back.

    `adopt`: take a journal that does not contain the mark. Only for somebody who knows what that costs
    (`gristmill journal adopt`).
    """

    def __init__(self, path: Path, *, adopt: bool = False) -> None:
        self.path = path
        self.adopt = adopt
        self.mark: Mark | None = None
        """The mark as last read or written."""
        self.adopted = False
        """Set by the open: this journal did not contain the mark and was adopted."""
        self._unreadable = False
        self._lock: database.FileLock | None = None
        self._file: int | None = None
        self._synced = 0
        self._journal = ""

    def acquire(self, journal: Path) -> None:
        """Lock and read. Raises LedgerLocked, LedgerUnsafe, LedgerFailed, LedgerFenced (unreadable)."""
        self._journal = _shown(journal)
        try:
            database.prepare_folder(self.path.parent)
            try:
                self._lock = database.FileLock.acquire(self.path)
            except LedgerLocked as held:
                raise LedgerLocked(
                    journal, held.pid, hint="a key has one journal on a machine: stop the other one, or use another key"
                ) from None
            self.mark = self._read()
        except OSError as error:
            self.release()
            raise LedgerFailed(
                f"the fence {self.path} cannot be kept: {error.strerror}",
                hint="set fence_dir to a folder that can be written and is not part of the data dir's backups",
            ) from error
        except BaseException:
            self.release()
            raise

    def _read(self) -> Mark | None:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        database.check_private(self.path)
        os.fsync(self._file)  # the mark that counts may be one that a killed process left in the page cache
        raw = os.pread(self._file, 2 * _SLOT, 0)
        marks = {slot: mark for slot in (0, 1) if (mark := _decode(raw[slot * _SLOT : (slot + 1) * _SLOT]))}
        if not marks:
            if self.adopt:
                self._unreadable = True
                return None
            raise LedgerFenced(
                f"the fence {self.path} cannot be read, so nobody knows whether this journal is the last one",
                hint="gristmill journal adopt tells how to go on",
            )
        self._synced = max(marks, key=lambda slot: (marks[slot].epoch, marks[slot].seq))
        return marks[self._synced]

    def passes(self, connection: sqlite3.Connection, head: Head, genesis: bytes) -> bool:
        """Whether this journal contains the mark, so that it is the marked one, there or further on."""
        mark = self.mark
        if mark is None:
            return not self._unreadable
        epoch = connection.execute("SELECT token FROM epochs WHERE epoch = ?", (mark.epoch,)).fetchone()
        if epoch is None or epoch[0] != mark.token or mark.seq > head.seq:
            return False
        if mark.seq == 0:
            return mark.hash == genesis
        record = connection.execute("SELECT hash FROM records WHERE seq = ?", (mark.seq,)).fetchone()
        return record is not None and record[0] == mark.hash

    def refusal(self, found: Head | None, epoch: int) -> LedgerFenced:
        """Why a journal that does not pass is refused. `found`: its end, None when there is no file; `epoch`: its last."""
        mark = self.mark
        if mark is None:
            raise ValueError("nothing is marked, so nothing is to be refused")
        ours = f"has {found.seq} records, opened {epoch} times" if found else "is missing"
        return LedgerFenced(
            f"this journal is an old copy or a second one: it {ours}; the last one written with this key has {mark.seq}, "
            f"opened {mark.epoch} times, and was {mark.journal}",
            hint="go on with that one; if it is lost, `gristmill journal adopt` tells what going on without it costs",
        )

    def begin(self, epoch: int, token: bytes, head: Head) -> None:
        """The journal has begun an epoch: mark it, durably."""
        self.mark = Mark(epoch, token, head.seq, head.hash, self._journal)
        if self._file is None:
            self._create(self.mark)
        else:
            self._write(self.mark)
            self._sync()

    def advance(self, head: Head) -> None:
        """The journal has come this far, durably. Called in the writer's thread after each commit; costs one small write."""
        mark = self.mark
        if mark is None or self._file is None:
            return
        self.mark = Mark(mark.epoch, mark.token, head.seq, head.hash, mark.journal)
        self._write(self.mark)

    def close(self) -> None:
        """Make the last mark durable and give back the lock. Idempotent."""
        try:
            if self._file is not None:
                self._sync()
        except OSError:
            pass  # the mark of the begin is durable, and the journal is ahead of it, which passes
        finally:
            self.release()

    def release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _create(self, mark: Mark) -> None:
        """Made whole under another name, so that a fence that is there holds a mark."""
        draft = self.path.with_name(self.path.name + ".new")
        draft.unlink(missing_ok=True)
        self._file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.pwrite(self._file, _encode(mark) + b" " * (_SLOT - 1) + b"\n", 0)
        os.fsync(self._file)
        os.rename(draft, self.path)
        database.sync_folder(self.path.parent)
        self._synced = 0

    def _write(self, mark: Mark) -> None:
        if self._file is None:
            raise LedgerFailed("the fence is not open")
        raw = _encode(mark)
        if len(raw) != _SLOT or os.pwrite(self._file, raw, (1 - self._synced) * _SLOT) != _SLOT:
            raise LedgerFailed(f"the fence {self.path} could not be written")

    def _sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            self._synced = 1 - self._synced
