"""Lives of a program on a disk that fails at one call, recorded, so that the current can fail as well afterwards or in between.

Each life is a fork of one process that has imported everything already. What it says on stdout is in the record, in order with
what it does to the disk (`node.testing.powercut`).
"""

from __future__ import annotations

import errno
import json
import select
import shutil
import subprocess
import sys
from pathlib import Path

from node.testing import powercut
from node.testing.journal_witness import ENVIRONMENT, ROOT

ONCE, HALF, FOR_GOOD = range(3)
"""How a call fails: it alone; a write in its middle and the next call; it and all that follow."""
FAILURES = ((errno.EIO, ONCE), (errno.ENOSPC, ONCE), (errno.ENOSPC, HALF), (errno.ENOSPC, FOR_GOOD))

PATIENCE_S = 120.0
"""How long a life may take; it takes milliseconds."""

_SERVER = """
import ctypes, importlib, json, os, sys
from pathlib import Path

recorder = ctypes.CDLL(sys.argv[1])
child = importlib.import_module(sys.argv[2])
recorder.powercut_calls.restype = ctypes.c_long
quiet = os.open("/dev/null", os.O_WRONLY)
for line in sys.stdin:
    given = json.loads(line)
    root = Path(given["root"])
    pid = os.fork()
    if pid == 0:
        os.dup2(quiet, 1)
        recorder.powercut_begin(os.fsencode(root), os.fsencode(given["trace"]))
        recorder.powercut_fail(ctypes.c_long(given["nth"]), given["error"], given["how"])
        child.recorded(root, given["size"])
        os.write(1, b"calls %d\\n" % recorder.powercut_calls())
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Lives:
    """Lives of `recorded(root, size)` of the module `child`, in forks of one process.

    `planted`: statements that run first in that process.
    """

    def __init__(self, folder: Path, child: str, planted: str = "") -> None:
        self.folder = folder
        library = powercut.build(folder)
        self._server = subprocess.Popen(
            [sys.executable, "-c", f"{planted}\n{_SERVER}", str(library), child],
            cwd=ROOT,
            env={**ENVIRONMENT, "LD_PRELOAD": str(library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        if self._server.poll() is None:
            self._server.communicate(timeout=60)

    @property
    def root(self) -> Path:
        """The folder of the last life."""
        return self.folder / "root"

    def record(
        self, begin: Path, nth: int = 0, error: int = errno.EIO, how: int = ONCE, size: int = 1
    ) -> tuple[powercut.Disk, list[powercut.Event]]:
        """One life that begins as the folder `begin` is, with a failure at its call `nth` (0: none). Returns its disk as it was
        before, and what was done to it."""
        trace = self.folder / "trace"
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(begin, self.root)
        trace.unlink(missing_ok=True)
        disk = powercut.Disk(self.root)
        job = {"root": str(self.root), "trace": str(trace), "nth": nth, "error": error, "how": how, "size": size}
        if self._server.stdin is None or self._server.stdout is None:
            raise ValueError("the process of the lives has no pipes")
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], PATIENCE_S)
        ended = self._server.stdout.readline() if ready else "no end"
        if ended != "0\n":  # no AssertionError: whoever plants a bug is not to take an accident for its discovery
            self._server.kill()
            raise RuntimeError(f"call {nth} failed with {errno.errorcode[error]}: the life ended with {ended!r}")
        return disk, powercut.read(trace)

    def live(self, begin: Path, nth: int, error: int, how: int, size: int = 1) -> tuple[list[str], powercut.Disk]:
        """A whole life: what it said, and its disk at the end."""
        disk, events = self.record(begin, nth, error, how, size)
        for event in events:
            disk.take(event)
        return disk.said.decode().splitlines(), disk
