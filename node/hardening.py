"""What every process of ours that holds or computes something delicate does first: no core files, no debugger, no new rights.

Each function says what the system let it do. Nothing here raises: a wall that cannot be built is a wall that is not reported.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterable
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_NO_NEW_PRIVS: Final = 38
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000

KEPT: Final = ("PATH", "LANG", "LC_ALL", "TZ", "GRISTMILL_TESTING", "GRISTMILL_FAULT")
"""Of our environment, what a process of ours may see. Everything else may hold a secret."""


def harden() -> None:
    """Keep other processes of this user out of our memory, as far as the system lets us; leave Ctrl-C to the node."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends, also while we compute and read nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def leave_network() -> bool:
    """Move this process, which must have one thread only, into a network of its own, with nothing in it. False: not allowed."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def limit_memory(limit: int) -> bool:
    """Refuse this process more than `limit` bytes of private memory: an allocation then fails, and says so. Mapped files do not
    count."""
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    except (OSError, ValueError):
        return False
    return True


def environment(more: Iterable[str] = (), **values: str) -> dict[str, str]:
    """For a child: what is in `KEPT` and `more` of ours, and `values`."""
    return {**{name: os.environ[name] for name in (*KEPT, *more) if name in os.environ}, **values}
