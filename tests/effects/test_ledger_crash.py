"""The journal against real deaths: a child process writes, acknowledges on a pipe, and dies.

kill -9 says nothing about fsync, because the page cache survives: for that see `test_ledger_powercut.py` and
`test_ledger_kernel.py`.
"""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest

from node.store import errors
from node.store.faults import POINTS, Fault
from node.store.fence import Fence
from node.store.ledger import Ledger
from node.testing.journal_child import TAG
from node.testing.journal_witness import ROOT, acknowledged, finish, found, half_written, lost, start


def sound(path: Path, acks: dict[int, str]) -> int:
    """What was acknowledged is there, and no half of an append; returns the journal's length."""
    began = time.monotonic()
    hashes = found(path)
    assert time.monotonic() - began < 5
    assert lost(acks, hashes) == {} and not half_written(hashes)
    return len(hashes)


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, long: bool) -> None:
    """J1."""
    path = tmp_path / "data" / "journal.sqlite"
    acks: dict[int, str] = {}
    rng = random.Random(1)
    for _ in range(200 if long else 20):
        child = start(path, "--rounds", "100000", "--writers", "4")
        assert child.stdout is not None
        lines = [child.stdout.readline().rstrip("\n") for _ in range(1 + rng.randrange(1, 120))]
        child.kill()
        lines += finish(child)
        assert child.returncode == -signal.SIGKILL
        assert lines[0].startswith("ready")
        acks.update(acknowledged(lines))
        assert sound(path, acks) >= max(acks)
    assert len(acks) >= 20


@pytest.mark.parametrize("passage", range(1, 6))
@pytest.mark.parametrize(
    "point", [name for name in POINTS if name.startswith("journal.") and name != "journal.after_epoch"]
)
def test_dying_at_a_named_point(tmp_path: Path, point: str, passage: int) -> None:
    """J1."""
    path = tmp_path / "data" / "journal.sqlite"
    child = start(path, GRISTMILL_TESTING="1", GRISTMILL_FAULT=f"{point}:{passage}")
    acks = acknowledged(finish(child))
    assert child.returncode == -signal.SIGKILL
    assert len(acks) == passage - 1
    durable = passage if point == "journal.after_commit" else passage - 1
    assert sound(path, acks) == 2 * durable


def test_dying_five_times_between_the_journal_and_the_fence(tmp_path: Path) -> None:
    """The epochs of the journal run ahead of the fence; it is still the same journal."""
    path, fence = tmp_path / "data" / "journal.sqlite", tmp_path / "state" / "fence.json"
    options = ("--fence", str(fence))
    finish(start(path, *options))
    for _ in range(5):
        child = start(path, *options, GRISTMILL_TESTING="1", GRISTMILL_FAULT="journal.after_epoch:1")
        assert finish(child) == []
        assert child.returncode == -signal.SIGKILL
    lines = finish(start(path, *options))
    assert lines[0] == "ready 10 7" and lines[-1] == "done"
    with Ledger.open(path, chain_tag=TAG, fence=Fence(fence)) as ledger:
        assert ledger.epoch == 8 and ledger.head.seq == 20


def test_the_kill_switch_needs_two_hands(tmp_path: Path) -> None:
    path = tmp_path / "data" / "journal.sqlite"
    lines = finish(start(path, GRISTMILL_TESTING="", GRISTMILL_FAULT="journal.before_commit:1"))
    assert lines[-1] == "done"
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
    """J3."""
    path = tmp_path / "data" / "journal.sqlite"
    holder = start(path, "--hold")
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("ready")
    with pytest.raises(errors.LedgerLocked, match=f"process {holder.pid}") as caught:
        Ledger.open(path, chain_tag=TAG)
    assert caught.value.pid == holder.pid
    holder.kill()
    finish(holder)
    Ledger.open(path, chain_tag=TAG).close()  # the kernel has given the lock back
