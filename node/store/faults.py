"""Named points at which a test can kill this process, so that "journal first, then speak" is tested and not believed.

`GRISTMILL_FAULT=point:n` kills the process with SIGKILL at its n-th passage of the point (n counts from 1), and only if
`GRISTMILL_TESTING=1` is set too: a stray variable on an operator's machine does nothing. The passage counter is the one
piece of process-wide state here, because a process dies once.

Whoever adds a `fault_point(...)` call names it in POINTS; a test compares the two.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping

POINTS: dict[str, str] = {
    "journal.after_epoch": "opening: the epoch is durable in the journal, the fence has not heard of it",
    "journal.before_append": "inside the transaction, before the records of one append are inserted",
    "journal.before_commit": "all records of the group are inserted, nothing is committed",
    "journal.after_commit": "the group is durable, no appender has been told",
    "signer.before_insert": "signer: requests are judged, no mark of theirs is written",
    "signer.before_commit": "signer: the marks are written, nothing is committed",
    "signer.after_insert": "signer: the marks are durable, nothing is signed",
    "send.accept": "worker: the acceptance is durable, the client has not heard of it",
    "send.chunk": "worker: tokens are counted, about to be sent",
    "send.taken": "worker: input is taken and counted, the client has not heard of it",
    "send.receipt": "worker: the signed receipt is durable, about to be sent",
    "send.ask": "client: the job and its first voucher are durable, about to be sent",
    "send.voucher": "client: a voucher is durable, about to be sent",
    "send.input": "client: input is paid for, about to be sent",
    "send.transaction": "a signed transaction is durable, no node has heard of it",
    "send.ack": "client: the verified receipt is durable, about to be acknowledged",
    "send.allocation": "client: an allocation is durable, its worker has not heard of it",
    "send.close": "worker: the total of a close is durable and signed, about to be sent",
    "send.quote": "worker: a quote is on disk and signed, about to be sent",
    "send.order": "client: the order of a batch job is durable and signed, about to be sent",
    "send.submission": "worker: the result of a batch job is durable, its submission signed, about to be told",
    "send.acceptance": "client: the acceptance of a result is durable and signed, about to be sent",
}


class Fault:
    """One armed kill: counts passages of its point and ends the process at the chosen one."""

    def __init__(self, point: str, passage: int) -> None:
        if point not in POINTS:
            raise ValueError(f"GRISTMILL_FAULT names no known point: {point!r}; known: {', '.join(sorted(POINTS))}")
        if passage < 1:
            raise ValueError("GRISTMILL_FAULT counts passages from 1")
        self.point = point
        self._left = passage
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Fault | None:
        """The fault that the environment asks for, or None. Raises ValueError for one that could never happen."""
        wanted = environ.get("GRISTMILL_FAULT", "")
        if not wanted or environ.get("GRISTMILL_TESTING") != "1":
            return None
        point, _, passage = wanted.rpartition(":")
        if not passage.isascii() or not passage.isdigit():
            raise ValueError(f"GRISTMILL_FAULT must be point:n, not {wanted!r}")
        return cls(point, int(passage))

    def passed(self, point: str) -> None:
        if point != self.point:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


_armed = Fault.from_environment(os.environ)


def fault_point(point: str) -> None:
    """Mark the passage of a named point. Costs one comparison when no fault is armed."""
    if _armed is not None:
        _armed.passed(point)
