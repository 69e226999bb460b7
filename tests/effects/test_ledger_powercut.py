"""Power cuts: invariants J1, J2 and J5 on a disk that keeps what was synced and, of the rest, whatever it likes.

The real journal with its fence runs in a process of its own and is recorded (`node.testing.powercut`). Then the current fails 300
times, at calls picked at random: over the first life, over later ones that begin with the remains of a cut, and so in the middle
of recoveries, checkpoints, migrations and openings. After each cut the journal must open (an honest power cut is never "damaged"
and never "an old copy"), hold every record that had been acknowledged, and take the next one. A kill -9 proves none of this: the
page cache survives it.

The planted bugs lose acknowledged records, or the whole journal, and this test must see it: `synchronous=NORMAL`, a folder that
is not synced, an acknowledgement before the commit, and a fence that runs ahead of its journal.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from node.store import errors
from node.store.fence import Fence
from node.store.ledger import Entry, Ledger
from node.store.results import Results
from node.testing import powercut

TAG = b"\x11" * 20
ROOT = Path(__file__).parents[2]
NOW = 1_700_000_000_000

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the recorder knows Linux's calls only"),
    pytest.mark.skipif(powercut.compiler() is None, reason="no C compiler (cc): the recorder cannot be built"),
]

CHILD = """
import os, random, sys, threading
from pathlib import Path
from node.store import database
from node.store.fence import Fence
from node.store.ledger import Entry, Ledger
from node.store.results import Results

root, seed, bug, rounds = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
if bug == "normal":
    database.SETTINGS += (("synchronous", "NORMAL"),)
    database.REQUIRED = ()
elif bug == "folder":
    database.sync_folder = lambda folder: None
elif bug == "fence":
    appending = Ledger._appending
    def early(self, entries, also):
        work = appending(self, entries, also)
        def both(connection):
            records = work(connection)
            self._fence.advance(self._tail)
            os.fsync(self._fence._file)
            return records
        return both
    Ledger._appending = early
if int(seed) % 3:  # a checkpoint comes after 1000 pages; these lives are too short for one
    database.SETTINGS += (("wal_autocheckpoint", 60),)
rng = random.Random(seed)

def say(text):
    os.write(1, text.encode() + b"\\n")

def live(rounds, crash):
    ledger = Ledger.open(root / "data" / "journal.sqlite", chain_tag=bytes([0x11]) * 20,
                         fence=Fence(root / "state" / "fence.json"))
    results = Results(ledger, max_bytes=200_000)
    say(f"open {ledger.head.seq} {ledger.head.hash.hex()}")
    numbers = iter(range(10**9))

    def write(rng):
        for n in range(rounds):
            entries = [Entry("t", b"", {"pad": rng.randbytes(rng.choice([10, 300, 6000]))}) for _ in range(rng.randint(1, 3))]
            job = rng.randbytes(32) if n % 7 == 0 else None
            also = results.keeping(job, bytes(rng.randrange(3000)), 2**60, now_ms=0) if job else None
            if bug == "early":
                future = ledger._submit(ledger._appending(entries, also))
                say(f"ack {ledger.head.seq + len(entries)} early")
            records = ledger.append_sync(entries, also=also) if bug != "early" else future.result()
            say(f"ack {records[-1].seq} {records[-1].hash.hex()}" + (f" {job.hex()}" if job else ""))

    threads = [threading.Thread(target=write, args=(random.Random(f"{seed} {i} {rounds}"),)) for i in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    if crash:
        os._exit(0)
    ledger.close()

live(3, False)
live(rounds // 2, False)
live(rounds // 2, True)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return powercut.build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: what is durable is decided by the record, not by this disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="gristmill-powercut-", dir=memory) as name:
        yield Path(name)


class Life:
    """One recorded process on a folder, and the cuts of its record."""

    def __init__(self, library: Path, folder: Path, root: Path, seed: int, bug: str = "", rounds: int = 60) -> None:
        self.folder = folder
        self.seed = seed
        self.disk = powercut.Disk(root)
        trace = folder / f"trace-{seed}"
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(root), str(seed), bug, str(rounds)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **powercut.environment(library, root, trace)},
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        self.events = powercut.read(trace)
        assert len(self.events) > 100
        self.raw: dict[int, str] = {}
        """What SQLite alone found after the last cut: seq -> hash."""
        self.done = 0

    def places(self, rng: random.Random, count: int) -> list[int]:
        """After how many calls the current fails: anywhere, and more often while the journal is being made or opened."""
        early = [rng.randrange(min(200, len(self.events))) for _ in range(count // 4)]
        return sorted(early + [rng.randrange(len(self.events) + 1) for _ in range(count - len(early))])

    def cut(self, place: int, target: Path) -> tuple[str, dict[int, str], set[bytes]]:
        """Play up to `place`, cut there, and open what is left. Returns how that went, the records and the results kept."""
        for event in self.events[self.done : place]:
            self.disk.take(event)
        self.done = place
        shutil.rmtree(target, ignore_errors=True)
        self.disk.cut(random.Random(f"{self.seed} {place}"), target)
        self.raw = raw(target)
        try:
            with reopened(target) as ledger:
                hashes = {record.seq: record.hash.hex() for record in ledger.records()}
                kept = Results(ledger)
                jobs = {job for job in self.jobs if kept.get(job) is not None}
                ledger.append_sync([Entry("t", b"", {})])
        except errors.LedgerError as error:
            return error.code, {}, set()
        return "open", hashes, jobs

    @property
    def acknowledged(self) -> dict[int, str]:
        """seq -> hash, of what was acknowledged before the cut; also what a process found at its opening."""
        return {
            int(m[1]): m[2]
            for m in re.finditer(r"^(?:ack|open) (\d+) (\w+)", self.disk.said.decode(), re.M)
            if m[1] != "0"
        }

    @property
    def jobs(self) -> set[bytes]:
        return {bytes.fromhex(m[1]) for m in re.finditer(r"^ack \d+ \w+ (\w+)$", self.disk.said.decode(), re.M)}

    def verdict(self, place: int, target: Path) -> str:
        """ "sound", or what is wrong: the journal's refusal, and whether something acknowledged is not in the file."""
        outcome, hashes, jobs = self.cut(place, target)
        found = hashes if outcome == "open" else self.raw
        lost = any(
            found.get(seq) != digest and (digest != "early" or seq not in found)
            for seq, digest in self.acknowledged.items()
        )
        lost = lost or (outcome == "open" and jobs != self.jobs)
        return " ".join([*(["lost"] if lost else []), *([outcome] if outcome != "open" else [])]) or "sound"


def raw(root: Path) -> dict[int, str]:
    """What SQLite alone finds in a copy of the file, whatever we would say to it."""
    copy = root.with_name("raw")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    try:
        with closing(sqlite3.connect(copy / "data" / "journal.sqlite")) as connection:
            return {seq: digest.hex() for seq, digest in connection.execute("SELECT seq, hash FROM records")}
    except sqlite3.Error:
        return {}


def reopened(root: Path) -> Ledger:
    return Ledger.open(root / "data" / "journal.sqlite", chain_tag=TAG, fence=Fence(root / "state" / "fence.json"))


def fresh(folder: Path) -> Path:
    root = folder / "disk"
    root.mkdir(mode=0o700)
    return root


def test_300_power_cuts_lose_nothing_that_was_acknowledged(library: Path, folder: Path, long: bool) -> None:
    rng = random.Random(1)
    root = fresh(folder)
    verdicts: Counter[str] = Counter()
    recovered = 0
    for life in range(40 if long else 6):
        lived = Life(library, folder, root, life)
        places = lived.places(rng, 50)
        chosen = rng.choice(places)
        for place in places:
            verdicts[lived.verdict(place, folder / "cut")] += 1
            assert set(verdicts) == {"sound"}, f"life {life}, cut after call {place}: {verdicts}"
            if place == chosen:
                shutil.rmtree(folder / "next", ignore_errors=True)
                lived.disk.cut(random.Random(f"next {life}"), folder / "next")
        recovered = max(recovered, len(lived.acknowledged))
        # The next life begins with what a cut left: its recovery is recorded and cut too.
        shutil.rmtree(root)
        (folder / "next").rename(root)
    assert verdicts["sound"] >= 300
    assert recovered > 100


def test_a_journal_of_the_first_schema_survives_cuts_in_its_migration(library: Path, folder: Path) -> None:
    root = fresh(folder)
    (root / "data").mkdir(mode=0o700)
    path = root / "data" / "journal.sqlite"
    path.touch(mode=0o600)
    path.write_bytes(gzip.decompress((ROOT / "tests/vectors/ledger_v1.sqlite.gz").read_bytes()))
    lived = Life(library, folder, root, 0, rounds=4)
    for place in range(0, 150, 3):
        outcome, hashes, _ = lived.cut(place, folder / "cut")
        assert outcome == "open" and len(hashes) >= 22, place


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        ("normal", "lost"),
        ("early", "lost"),
        ("folder", "lost"),
        ("fence", "journal_fenced"),
    ],
)
def test_planted_bugs_are_seen(library: Path, folder: Path, bug: str, seen: str) -> None:
    """With `synchronous=NORMAL` the same cuts must lose records that were acknowledged."""
    rng = random.Random(2)
    lived = Life(library, folder, fresh(folder), 7, bug)
    verdicts = Counter(lived.verdict(place, folder / "cut") for place in lived.places(rng, 60))
    assert any(seen in verdict for verdict in verdicts), verdicts
