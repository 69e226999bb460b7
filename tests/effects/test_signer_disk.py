"""Disks that fail, and power cuts, below the signer's table: invariant K9 as `tests/effects/test_ledger_disk.py` has J1 and J4.

Every single call by which the table changes the disk fails, one at a time, in four ways. Whatever fails: nothing is signed after
it, not even again what was signed before; the refusal has its name; and each mark of what was signed is there at the next start,
also when the current fails as well. The planted bugs sign what they do not remember, and these tests must see it.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.testing import fixtures, powercut
from node.testing.failing_disk import FAILURES, ONCE, Lives
from node.testing.signer_child import CHANNEL, HEAD, known, receipt, table, voucher
from protocol.signing import Scope, SigningRefused

CHILD = "node.testing.signer_child"
SMALL_LOG = "from node.store import database; database.SETTINGS += (('wal_autocheckpoint', 4),)"
"""A log of a thousand pages is copied into the file on the way; marks are small, so here it is one of four."""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the recorder knows Linux's calls only"),
    pytest.mark.skipif(powercut.compiler() is None, reason="no C compiler (cc): the recorder cannot be built"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def template(lives: Lives, kind: str) -> Path:
    """A folder to begin with."""
    made = lives.folder / "template"
    made.mkdir(mode=0o700)
    if kind == "nothing":
        return made
    shutil.rmtree(made)
    (lives.folder / "empty").mkdir(mode=0o700)
    lives.live(lives.folder / "empty", 0, errno.EIO, ONCE)
    shutil.copytree(lives.root, made)
    if kind == "a killed signer":
        with fixtures.signer(table(made)) as core:
            core.meet([], HEAD, adopting=False)
            total, number = known(core)
            core.handle([voucher(total + 10), receipt(number + 1, 1)])
            shutil.copytree(made, lives.folder / "killed")
        shutil.rmtree(made)
        (lives.folder / "killed").rename(made)
    return made


def calls(lives: Lives, begin: Path, size: int = 1) -> int:
    """How many calls a life without failures makes."""
    lines, _ = lives.live(begin, 0, errno.EIO, ONCE, size)
    assert lines[-2] == "done" and not any(line.startswith(("failed", "refused")) for line in lines)
    return int(lines[-1].removeprefix("calls "))


def went_on(lines: list[str]) -> list[str]:
    """What is wrong with how a failure was told: a signature after it, or a refusal without its name."""
    told = [n for n, line in enumerate(lines) if line.startswith(("failed", "refused"))]
    after = lines[told[0] :] if told else []
    wrong = [line for line in after if line.startswith(("signed", "again"))]
    return wrong + [line for line in after if line.startswith("failed") and line != "failed signer_failed"]


def forgotten(root: Path, lines: list[str]) -> list[str]:
    """What was signed and is not known at the next start; and what the next start would sign against it. Raises `SignerError`."""
    signed = [tuple(map(int, line.split()[1:])) for line in lines if line.startswith("signed")]
    lost: list[str] = []
    with fixtures.signer(table(root)) as core:
        core.meet([], HEAD, adopting=core.table.empty)
        marks = dict(core.table.all())
        for total, number, cost in signed:
            held = marks.get((Scope.VOUCHER, bytes(CHANNEL)))
            if held is None or held.value < total:
                lost.append(f"voucher {total}")
            key = (Scope.RECEIPT, bytes(CHANNEL) + number.to_bytes(8))
            if key not in marks or marks[key].digest != receipt(number, cost).digest:
                lost.append(f"receipt {number}")
            other = core.handle([voucher(total - 1), receipt(number, cost + 1)])
            if not all(isinstance(answer, SigningRefused) for answer in other):
                lost.append(f"what speaks against {total} and {number} is signed")
        if signed and not lost:
            last = signed[-1]
            again = core.handle([voucher(last[0] + 1000), receipt(last[1] + 5, 1)])
            assert all(isinstance(answer, bytes) for answer in again)
    return lost


def judge(lives: Lives, lines: list[str], disk: powercut.Disk, where: str) -> None:
    """As the machine goes on, and as if the current had failed too: what was signed is known, and the table opens."""
    assert went_on(lines) == [], where
    cut = lives.folder / "cut"
    shutil.rmtree(cut, ignore_errors=True)
    disk.cut(random.Random(where), cut)
    for root in (lives.root, cut):
        assert forgotten(root, lines) == [], f"{where}, {root.name}: {lines}"


@pytest.mark.parametrize("begin", ["nothing", "a closed signer", "a killed signer"])
def test_each_call_fails(folder: Path, begin: str) -> None:
    lives = Lives(folder, CHILD)
    made = template(lives, begin)
    count, seen = calls(lives, made), set[str]()
    assert count > 20
    for nth in range(1, count + 1):
        for number, how in FAILURES:
            lines, disk = lives.live(made, nth, number, how)
            judge(lives, lines, disk, f"call {nth}, {errno.errorcode[number]} ({how})")
            seen |= {line.split()[0] for line in lines}
    lives.close()
    assert seen == {"refused", "ready", "signed", "again", "failed", "done", "calls"}


def test_calls_fail_around_a_checkpoint(folder: Path, long: bool) -> None:
    """The log is copied into the file again and again, and used from its beginning."""
    lives = Lives(folder, CHILD, SMALL_LOG)
    made = template(lives, "a closed signer")
    count = calls(lives, made, 5)
    assert count > 80
    for nth in range(1, count + 1):
        for number, how in FAILURES if long else [FAILURES[nth % 4]]:
            lines, disk = lives.live(made, nth, number, how, 5)
            judge(lives, lines, disk, f"call {nth}, {errno.errorcode[number]} ({how})")
    lives.close()


def cuts(lives: Lives, begin: Path, seed: int, count: int) -> int:
    """Power cuts at places picked at random in one life; returns how much was signed before the last of them."""
    disk, events = lives.record(begin, size=5)
    rng, done, cut, signed = random.Random(seed), 0, lives.folder / "cut", 0
    for place in sorted(rng.randrange(len(events) + 1) for _ in range(count)):
        for event in events[done:place]:
            disk.take(event)
        done = place
        shutil.rmtree(cut, ignore_errors=True)
        disk.cut(random.Random(f"{seed} {place}"), cut)
        lines = disk.said.decode().splitlines()
        signed = sum(line.startswith("signed") for line in lines)
        assert forgotten(cut, lines) == [], f"life {seed}, after call {place}: {lines}"
    return signed


def test_power_cuts_forget_nothing_that_was_signed(folder: Path, long: bool) -> None:
    lives = Lives(folder, CHILD, SMALL_LOG)
    begin = folder / "begin"
    begin.mkdir(mode=0o700)
    signed = 0
    for life in range(40 if long else 4):
        signed += cuts(lives, begin, life, 25)
        # The next life begins with what a cut left: its recovery is cut too.
        shutil.rmtree(begin)
        (folder / "cut").rename(begin)
    lives.close()
    assert signed > 20


PLANTED = {
    "goes on after a failure": """
from node.signer.table import Table
honest = Table.store
def store(self, changes):
    try:
        honest(self, changes)
    except Exception:
        self.failure = None
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        raise
Table.store = store
""",
    "signs again what is known, after a failure": """
from node.signer.core import Core
from node.signer.table import Table
honest = Core.handle
def handle(self, asked, witness=None):
    failure, self.table.failure = self.table.failure, None
    try:
        return honest(self, asked, witness)
    finally:
        self.table.failure = self.table.failure or failure
Core.handle = handle
""",
    "says too early that a mark is there": """
from node.signer.table import Table
honest = Table.store
def store(self, changes):
    try:
        honest(self, changes)
    except Exception:
        self._cache.update(changes)
Table.store = store
""",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_bugs_of_a_failing_disk_are_seen(folder: Path, planted: str) -> None:
    lives = Lives(folder, CHILD, PLANTED[planted])
    made = template(lives, "a closed signer")
    with pytest.raises(AssertionError):
        for nth in range(1, calls(lives, made) + 1):
            judge(lives, *lives.live(made, nth, errno.EIO, ONCE), f"call {nth}")
    lives.close()


@pytest.mark.parametrize(
    "planted",
    [
        "from node.store import database; database.SETTINGS += (('synchronous', 'NORMAL'),); database.REQUIRED = ()",
        "from node.store import database; database.sync_folder = lambda folder: None",
    ],
    ids=["normal", "folder"],
)
def test_planted_bugs_of_a_power_cut_are_seen(folder: Path, planted: str) -> None:
    lives = Lives(folder, CHILD, planted)
    (folder / "begin").mkdir(mode=0o700)
    with pytest.raises(AssertionError, match=r"voucher|receipt"):
        for life in range(10):
            cuts(lives, folder / "begin", life, 25)
    lives.close()
