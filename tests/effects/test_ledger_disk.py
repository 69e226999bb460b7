"""Disks that fail, call by call: invariants J1, J4 and J5.

Every single call by which the journal and its fence change the disk fails, one at a time, in four ways; in the process, by the
recorder of `node.testing.powercut`. Whatever fails: nobody is told of success afterwards, the refusal has a name and comes within
a second, and what was acknowledged is there at the next start. Then the current fails as well, and it is still there: what a
failed sync has lost is not made good by a later one.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from node.store import errors
from node.store.ledger import Entry, Ledger
from node.testing import powercut
from node.testing.failing_disk import FAILURES, ONCE, Lives
from node.testing.journal_child import TAG
from node.testing.journal_witness import acknowledged, found, half_written, lost, went_on

CHILD = "node.testing.journal_child"


class Recorded(Lives):
    """Lives of a journal. `planted`: a statement that runs first in their process."""

    def __init__(self, folder: Path, planted: str = "") -> None:
        super().__init__(folder, CHILD, planted)

    def template(self, kind: str) -> Path:
        """A folder to begin with."""
        made = self.folder / "template"
        shutil.rmtree(made, ignore_errors=True)
        if kind == "nothing":
            made.mkdir(mode=0o700)
            return made
        (self.folder / "empty").mkdir(mode=0o700, exist_ok=True)
        self.live(self.folder / "empty", 0, errno.EIO, ONCE, 200)
        shutil.copytree(self.folder / "root", made)
        if kind == "a killed journal":
            with Ledger.open(made / "data" / "journal.sqlite", chain_tag=TAG) as ledger:
                ledger.append_sync([Entry("t", b"", {"pad": bytes(9000)})] * 2)
                shutil.rmtree(self.folder / "empty")
                shutil.copytree(made, self.folder / "empty")
            shutil.rmtree(made)
            (self.folder / "empty").rename(made)
        return made


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        made = Recorded(Path(name))
        yield made
        made.close()


needs_recorder = [
    pytest.mark.skipif(sys.platform != "linux", reason="the recorder knows Linux's calls only"),
    pytest.mark.skipif(powercut.compiler() is None, reason="no C compiler (cc): the recorder cannot be built"),
]


def recorder_test(test: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_recorder:
        test = mark(test)
    return test


def a_life(recorded: Recorded, begin: Path, nth: int, number: int, how: int, pad: int = 200) -> list[str]:
    """One life with one failure, judged: as the machine goes on, and as if the current had failed too."""
    lines, disk = recorded.live(begin, nth, number, how, pad)
    assert went_on(lines) == []
    acks = acknowledged(lines)
    for rng in (None, random.Random(nth)):
        root = recorded.folder / ("cut" if rng else "root")
        if rng is not None:
            shutil.rmtree(root, ignore_errors=True)
            disk.cut(rng, root)
        path = root / "data" / "journal.sqlite"
        if acks or path.exists():
            try:
                hashes = found(path, root / "state" / "fence.json")
                assert lost(acks, hashes) == {} and not half_written(hashes)
            except errors.LedgerError as error:
                where = f"call {nth}, {errno.errorcode[number]} ({how}), {'power cut' if rng else 'as it is'}: {lines}"
                raise AssertionError(where) from error
    return lines


@recorder_test
@pytest.mark.parametrize("begin", ["nothing", "a closed journal", "a killed journal"])
def test_each_call_fails(recorded: Recorded, begin: str) -> None:
    template = recorded.template(begin)
    lines, _ = recorded.live(template, 0, errno.EIO, ONCE, 200)
    calls = int(lines[-1].removeprefix("calls "))
    assert calls > 30 and lines[-2] == "done"
    seen = set()
    for nth in range(1, calls + 1):
        for number, how in FAILURES:
            lines = a_life(recorded, template, nth, number, how)
            seen |= {line.split()[0] for line in lines}
    assert seen == {"refused", "ready", "ack", "failed", "done", "calls"}


@recorder_test
def test_calls_fail_around_a_checkpoint(recorded: Recorded, long: bool) -> None:
    """Records so large that the log is copied into the file on the way."""
    template = recorded.template("a closed journal")
    pad = 700_000
    lines, _ = recorded.live(template, 0, errno.EIO, ONCE, pad)
    calls = int(lines[-1].removeprefix("calls "))
    assert calls > 2000
    step = 10 if long else 80
    for turn, nth in enumerate(range(1, calls + 1, step)):
        a_life(recorded, template, nth, *FAILURES[turn % 4], pad)


@recorder_test
def test_planted_a_writer_that_goes_on_after_a_failure_is_seen(recorded: Recorded) -> None:
    """The log's next sync succeeds, and is taken for the durability of what the failed one has lost."""
    recorded.close()
    careless = Recorded(
        recorded.folder,
        planted="from node.store import writer; writer.Writer.failure = property(lambda s: None, lambda s, v: None)\n"
        "fail = writer._fail; writer._fail = lambda group, why, cause=None: fail(group, why or 'planted', cause)",
    )
    template = careless.template("a closed journal")
    with pytest.raises(AssertionError):
        for nth in range(1, 60):
            a_life(careless, template, nth, errno.EIO, ONCE)
    careless.close()
