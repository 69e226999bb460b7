"""Group commit: one thread, one connection, one queue. Knows nothing about what is written.

Rules
- A caller is told only after the COMMIT that holds its work has returned, and SQLite returns only after the fsync.
- Work runs in the order in which it was submitted. Whoever waits while another group is being synced shares the next one;
  a lone caller waits for nobody. After a crowded group the thread allows the same callers `gather_s` to come back,
  because they were all woken by that commit: without it every second group would hold one straggler.
- Work may refuse (raise a LedgerError): its own changes are undone and the rest of its group is committed.
- Anything else that goes wrong is final. The group is rolled back, everybody in it and everybody after it gets
  LedgerFailed. After a failed COMMIT it is unknown whether the group is on disk; only a new start can tell.
- So is a failure of `after_commit`: the group is on disk then, but nobody may act on it.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from node.store.errors import LedgerClosed, LedgerError, LedgerFailed
from node.store.faults import fault_point

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
_Request = tuple[Work[Any], "Future[Any]"]

GATHER_S = 0.002
MAX_GROUP = 512


class Writer:
    """Runs submitted work in shared transactions. `after_commit` is called in the thread, before any caller is told."""

    def __init__(
        self, connection: sqlite3.Connection, after_commit: Callable[[], None], *, gather_s: float = GATHER_S
    ) -> None:
        self.commits = 0
        """Transactions committed since the start."""
        self.failure: str | None = None
        """Why nothing can be written any more, or None."""
        self._connection = connection
        self._after_commit = after_commit
        self._gather_s = gather_s
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopping = False
        # A daemon, so that a process that forgets to close still ends; what it had acknowledged is durable anyway.
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def submit(self, work: Work[T]) -> Future[T]:
        """Queue work for the next group. Raises LedgerClosed or LedgerFailed at once when it could never be done."""
        future: Future[T] = Future()
        with self._lock:
            if self._stopping:
                raise LedgerClosed("the journal is closed")
            if self.failure is not None:
                raise LedgerFailed(self.failure)
            self._queue.put((work, future))
        return future

    def stop(self) -> None:
        """Finish what is queued and end the thread; afterwards the connection is the caller's again."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        expected = 1
        while True:
            first = self._queue.get()
            if first is None:
                return
            group, last = self._gather(first, expected)
            expected = len(group)
            if self.failure is None:
                self._commit(group)
            else:
                _fail(group, self.failure)
            if last:
                return

    def _gather(self, first: _Request, expected: int) -> tuple[list[_Request], bool]:
        """The next group, and whether it is the last one. Waits only for callers that were there a moment ago."""
        group = [first]
        until = time.monotonic() + self._gather_s
        while len(group) < MAX_GROUP:
            wait = until - time.monotonic() if len(group) < expected else 0.0
            try:
                request = self._queue.get(timeout=wait) if wait > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if request is None:
                return group, True
            group.append(request)
        return group, False

    def _commit(self, group: list[_Request]) -> None:
        connection = self._connection
        outcomes: list[tuple[Future[Any], Any, LedgerError | None]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for work, future in group:
                connection.execute("SAVEPOINT work")
                try:
                    outcomes.append((future, work(connection), None))
                except LedgerFailed:
                    raise
                except LedgerError as refusal:
                    connection.execute("ROLLBACK TO work")
                    outcomes.append((future, None, refusal))
                connection.execute("RELEASE work")
            fault_point("journal.before_commit")
            connection.execute("COMMIT")
            fault_point("journal.after_commit")
            self.commits += 1
            self._after_commit()
        except Exception as error:  # the boundary: whatever it was, this journal takes no more records
            code = getattr(error, "sqlite_errorname", type(error).__name__)
            with self._lock:
                self.failure = f"the journal could not be written ({code}: {error}); nothing more is recorded or signed"
            try:
                connection.execute("ROLLBACK")
            except sqlite3.Error:
                pass  # SQLite has rolled back by itself, or cannot; the failure above already says so
            _fail(group, self.failure, error)
            return
        for future, value, refused in outcomes:
            if refused is None:
                future.set_result(value)
            else:
                future.set_exception(refused)


def _fail(group: list[_Request], why: str, cause: BaseException | None = None) -> None:
    for _, future in group:
        failure = LedgerFailed(why)
        failure.__cause__ = cause
        future.set_exception(failure)
