"""What can go wrong with the journal, by what the operator has to do about it.

Rule: none of these is ever retried by the code that meets it. A journal that cannot be trusted or cannot be written
means that nothing more is signed; the process says why and stops.
"""

from __future__ import annotations

from pathlib import Path

from node import errors


class LedgerError(errors.LedgerError):
    """Base of all errors of the journal."""

    code = "journal"


class LedgerMissing(LedgerError):
    """There is no journal at this path, and the caller did not ask for a new one."""

    code = "journal_missing"


class LedgerUnsafe(LedgerError):
    """The file or its folder may be read or written by others, or SQLite did not accept a setting that we depend on."""

    code = "journal_unsafe"


class LedgerLocked(LedgerError):
    """Another process (or another part of this one) has the journal open for writing."""

    code = "journal_locked"

    def __init__(
        self, path: Path, pid: int | None, *, hint: str = "stop it first, or give this one another --data-dir"
    ) -> None:
        holder = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"{path} is in use by {holder}; one journal has one writer", hint=hint)
        self.path = path
        self.pid = pid


class LedgerDamaged(LedgerError):
    """The journal is not what was written. `seq` is the first record that does not hold, 0 when it is the file itself."""

    code = "journal_damaged"

    def __init__(self, seq: int, why: str) -> None:
        super().__init__(f"journal damaged at record {seq}: {why}" if seq else f"journal damaged: {why}")
        self.seq = seq
        self.why = why


class LedgerForeign(LedgerError):
    """The journal is sound, but it was begun for another identity."""

    code = "journal_foreign"


class LedgerFenced(LedgerError):
    """The journal is an old copy, or a second one: another journal of the same key has gone further on this machine."""

    code = "journal_fenced"


class LedgerTooNew(LedgerError):
    """The journal was written by a later version of this program."""

    code = "journal_too_new"

    def __init__(self, found: int, known: int) -> None:
        super().__init__(
            f"the journal has schema version {found}; this program knows versions up to {known}",
            hint="use the newer version",
        )
        self.found = found
        self.known = known


class LedgerFailed(LedgerError):
    """A write failed, here or earlier. What was being written may or may not be on disk: only a new start can tell."""

    code = "journal_failed"


class LedgerClosed(LedgerError):
    """The journal was closed (or opened read-only) and takes no more records."""

    code = "journal_closed"


class EntryInvalid(LedgerError):
    """The caller's entry does not fit the journal: nothing was written."""

    code = "journal_entry_invalid"


class ResultsFull(LedgerError):
    """No room for a result: everything kept is still waiting for its client."""

    code = "results_full"


class ResultConflict(LedgerError):
    """Another result is already kept under this job id."""

    code = "result_conflict"
