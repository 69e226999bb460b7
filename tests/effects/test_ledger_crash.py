"""The journal against real deaths and real disk errors: a child process writes, acknowledges on a pipe, and dies.

kill -9 says nothing about fsync (the page cache survives), so the syscall order is watched with strace where it is installed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from node.store import errors
from node.store.faults import POINTS, Fault
from node.store.fence import Fence
from node.store.ledger import Ledger

TAG = b"\x11" * 20
ROOT = Path(__file__).parents[2]

CHILD = """
import os, resource, sys, threading
from pathlib import Path
from node.store import database, errors
from node.store.fence import Fence
from node.store.ledger import Entry, Ledger

path, mode, writers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if mode == "normal":  # the planted bug: nothing waits for the disk
    database.SETTINGS += (("synchronous", "NORMAL"),)
    database.REQUIRED = ()
fence = Fence(Path(os.environ["GRISTMILL_FENCE_OF_TEST"])) if "GRISTMILL_FENCE_OF_TEST" in os.environ else None
ledger = Ledger.open(path, chain_tag=bytes([0x11]) * 20, fence=fence)
os.write(1, b"ready %d\\n" % ledger.head.seq)
if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))

def write(name, rounds):
    for n in range(rounds):
        try:
            records = ledger.append_sync([Entry("t", bytes([name]), {"n": n, "pad": bytes(200)})] * 2)
        except errors.LedgerFailed:
            os.write(1, b"failed\\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            continue
        os.write(1, b"ack %d %s\\n" % (records[-1].seq, records[-1].hash.hex().encode()))

if mode == "hold":
    sys.stdin.read()
rounds = 5 if mode in ("few", "normal") else 100_000 if mode == "many" else 600
threads = [threading.Thread(target=write, args=(name, rounds)) for name in range(writers)]
for thread in threads: thread.start()
for thread in threads: thread.join()
os.write(1, b"done\\n")
"""


def start(path: Path, mode: str, writers: int = 1, prefix: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", CHILD, str(path), mode, str(writers)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def acknowledged(lines: list[str]) -> dict[int, str]:
    """seq -> hash of every whole acknowledgement line."""
    return {int(m[1]): m[2] for line in lines if (m := re.fullmatch(r"ack (\d+) ([0-9a-f]{64})\n", line))}


def finish(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None and child.stdin is not None
    lines = child.stdout.readlines()
    child.stdin.close()
    child.wait(60)
    child.stdout.close()
    return lines


def holds_all(path: Path, acks: dict[int, str]) -> int:
    """Open the journal as the next start would, check that it holds every acknowledged record; returns its length."""
    with Ledger.open(path, chain_tag=TAG, create=False) as ledger:
        hashes = {record.seq: record.hash.hex() for record in ledger.records()}
    missing = {seq: digest for seq, digest in acks.items() if hashes.get(seq) != digest}
    assert missing == {}
    assert len(hashes) % 2 == 0  # no half of a pair
    return len(hashes)


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "data" / "journal.sqlite"
    acks: dict[int, str] = {}
    rng = random.Random(1)
    for _ in range(20):
        child = start(path, "many", writers=4)
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(1 + rng.randrange(1, 120))]
        child.kill()
        lines += finish(child)
        assert child.returncode == -signal.SIGKILL
        assert lines[0].startswith("ready")
        acks.update(acknowledged(lines))
        assert holds_all(path, acks) >= max(acks)
    assert len(acks) >= 20


@pytest.mark.parametrize("passage", range(1, 6))
@pytest.mark.parametrize(
    "point", [name for name in POINTS if name.startswith("journal.") and name != "journal.after_epoch"]
)
def test_dying_at_a_named_point(tmp_path: Path, point: str, passage: int) -> None:
    path = tmp_path / "data" / "journal.sqlite"
    child = start(path, "few", GRISTMILL_TESTING="1", GRISTMILL_FAULT=f"{point}:{passage}")
    acks = acknowledged(finish(child))
    assert child.returncode == -signal.SIGKILL
    assert len(acks) == passage - 1
    durable = passage if point == "journal.after_commit" else passage - 1
    assert holds_all(path, acks) == 2 * durable


def test_dying_five_times_between_the_journal_and_the_fence(tmp_path: Path) -> None:
    """The epochs of the journal run ahead of the fence; it is still the same journal."""
    path, fence = tmp_path / "data" / "journal.sqlite", tmp_path / "state" / "fence.json"
    finish(start(path, "few", GRISTMILL_FENCE_OF_TEST=str(fence)))
    for _ in range(5):
        child = start(
            path,
            "few",
            GRISTMILL_TESTING="1",
            GRISTMILL_FAULT="journal.after_epoch:1",
            GRISTMILL_FENCE_OF_TEST=str(fence),
        )
        assert finish(child) == []
        assert child.returncode == -signal.SIGKILL
    lines = finish(start(path, "few", GRISTMILL_FENCE_OF_TEST=str(fence)))
    assert lines[0] == "ready 10\n" and lines[-1] == "done\n"
    with Ledger.open(path, chain_tag=TAG, fence=Fence(fence)) as ledger:
        assert ledger.epoch == 8 and ledger.head.seq == 20


def test_the_kill_switch_needs_two_hands(tmp_path: Path) -> None:
    path = tmp_path / "data" / "journal.sqlite"
    lines = finish(start(path, "few", GRISTMILL_TESTING="", GRISTMILL_FAULT="journal.before_commit:1"))
    assert lines[-1] == "done\n"
    for wrong in ("journal.before_commit", "nowhere:1", "journal.before_commit:0", "journal.before_commit:x", ":1"):
        with pytest.raises(ValueError, match="GRISTMILL_FAULT"):
            Fault.from_environment({"GRISTMILL_TESTING": "1", "GRISTMILL_FAULT": wrong})
    assert Fault.from_environment({"GRISTMILL_FAULT": "journal.before_commit:1"}) is None


def test_every_fault_point_in_the_code_is_listed_and_every_listed_one_exists() -> None:
    called = set()
    for source in (ROOT / "node").rglob("*.py"):
        if source.name != "faults.py":
            called |= set(re.findall(r'\bfault_point\(\s*"([^"]+)"', source.read_text()))
    assert called == set(POINTS)


def test_one_writer_across_processes(tmp_path: Path) -> None:
    path = tmp_path / "data" / "journal.sqlite"
    holder = start(path, "hold")
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("ready")
    with pytest.raises(errors.LedgerLocked, match=f"process {holder.pid}") as caught:
        Ledger.open(path, chain_tag=TAG)
    assert caught.value.pid == holder.pid
    holder.kill()
    finish(holder)
    Ledger.open(path, chain_tag=TAG).close()  # the kernel has given the lock back


def test_a_full_disk_stops_the_writer_and_loses_nothing(tmp_path: Path) -> None:
    """The file size limit makes the kernel refuse the write as a full disk would; no root needed."""
    path = tmp_path / "data" / "journal.sqlite"
    lines = finish(start(path, "full"))
    acks = acknowledged(lines)
    assert len(acks) > 5
    first = lines.index("failed\n")
    assert lines[first:-1] == ["failed\n"] * (600 - len(acks))  # not one more, although the space is back
    assert holds_all(path, acks) >= max(acks)


def strace_works() -> bool:
    return (
        shutil.which("strace") is not None
        and subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "true"]).returncode == 0
    )


needs_strace = pytest.mark.skipif(not strace_works(), reason="strace is not installed or may not trace here")


def traced(path: Path, log: Path, mode: str, *options: str) -> tuple[list[str], list[str]]:
    """Run the child under strace; returns what it printed and the traced calls in order."""
    prefix = ("strace", "-f", "-y", "-qq", "-s", "16", "-o", str(log), *options)
    lines = finish(start(path, mode, prefix=prefix))
    return lines, log.read_text().splitlines()


def unsynced_acks(calls: list[str]) -> int:
    """Acknowledgements written while the log held bytes that were not synced."""
    dirty, unsynced = False, 0
    for call in calls:
        if "-wal>" in call and "pwrite64(" in call:
            dirty = True
        elif "-wal>" in call and ("fdatasync(" in call or "fsync(" in call):
            dirty = False
        elif '"ack ' in call:
            unsynced += dirty
    return unsynced


@needs_strace
@pytest.mark.parametrize(("mode", "judge"), [("few", lambda n: n == 0), ("normal", lambda n: n == 5)])
def test_the_disk_has_it_before_the_caller_hears_of_it(tmp_path: Path, mode: str, judge: Callable[[int], bool]) -> None:
    """Seen in the system calls; with `synchronous=NORMAL` the same check must find every acknowledgement too early."""
    path = tmp_path / "data" / "journal.sqlite"
    trace = "trace=pwrite64,fdatasync,fsync,write"
    lines, calls = traced(path, tmp_path / "calls", mode, "-e", trace)
    assert len(acknowledged(lines)) == 5
    assert judge(unsynced_acks(calls))


@needs_strace
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_a_disk_error_stops_the_writer(tmp_path: Path, call: str, error: str) -> None:
    path = tmp_path / "data" / "journal.sqlite"
    Ledger.open(path, chain_tag=TAG).close()
    nth = {"fdatasync": 3, "pwrite64": 9}[call]
    inject = f"inject={call}:error={error}:when={nth}"
    lines, _ = traced(path, tmp_path / "calls", "few", "-P", f"{path}-wal", "-e", f"trace={call}", "-e", inject)
    acks = acknowledged(lines)
    assert "failed\n" in lines and acks
    assert lines[1:-1] == [line for line in lines if line.startswith("ack")] + ["failed\n"] * (5 - len(acks))
    holds_all(path, acks)
