"""How fast the journal takes records and how soon a node is ready after a kill.

Figures: durable commits per second of one appender that waits each time; durable records per second of 50 concurrent ones
(group commit), and how many records shared a commit; seconds to open (verify the whole chain) and to fold 500,000 records.
Peer in the same run: a bare file with one fdatasync per record, which is what the disk itself allows.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import trio

from node.store.fold import replay
from node.store.ledger import Entry, Ledger, Record

TAG = bytes(20)
APPENDERS = 50


def voucher(n: int) -> Entry:
    """A record of the usual size: about 230 bytes with its hash."""
    body = {"channel": n.to_bytes(32, "big"), "cumulative": str(10**9 + n), "signature": bytes(65)}
    return Entry("voucher.received", n.to_bytes(32, "big"), body)


def run(args: Any = None) -> dict[str, Any]:
    """Measure. `args` may carry `records` (default 500,000) and `repeat` (default 3; medians are reported)."""
    records = getattr(args, "records", None) or 500_000
    repeat = getattr(args, "repeat", None) or 3
    with tempfile.TemporaryDirectory(prefix="bench-journal-") as name:
        folder = Path(name)
        floor = median(_rate(partial(_bare, folder / f"bare{i}", 300)) for i in range(repeat))
        single = [_single(folder / f"single{i}" / "journal.sqlite", 300) for i in range(repeat)]
        grouped = [_grouped(folder / f"group{i}" / "journal.sqlite", 100) for i in range(repeat)]
        figures = {
            "commits_per_second": median(single),
            "records_per_second": median(rate for rate, _ in grouped),
            "records_per_commit": median(share for _, share in grouped),
            **_start(folder / "start" / "journal.sqlite", records, repeat),
        }
    return {
        "figures": {key: round(value, 3) for key, value in figures.items()},
        "peers": {"bare file, fdatasync each": {"commits_per_second": round(floor, 3)}},
        "conditions": {
            "sqlite": sqlite3.sqlite_version,
            "appenders": APPENDERS,
            "replayed_records": records,
            "repeat": repeat,
            "load": os.getloadavg()[0],
        },
    }


def _rate(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def _bare(path: Path, count: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for _ in range(count):
        os.write(descriptor, bytes(230))
        os.fdatasync(descriptor)
    os.close(descriptor)
    return count


def _single(path: Path, count: int) -> float:
    async def main() -> int:
        for n in range(count):
            await ledger.append([voucher(n)])
        return count

    with Ledger.open(path, chain_tag=TAG) as ledger:
        return _rate(lambda: trio.run(main))


def _grouped(path: Path, rounds: int) -> tuple[float, float]:
    async def appender() -> None:
        for n in range(rounds):
            await ledger.append([voucher(n)])

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            for _ in range(APPENDERS):
                nursery.start_soon(appender)
        return APPENDERS * rounds

    with Ledger.open(path, chain_tag=TAG) as ledger:
        rate = _rate(lambda: trio.run(main))
        return rate, ledger.head.seq / ledger.commits


def _start(path: Path, count: int, repeat: int) -> dict[str, float]:
    with Ledger.open(path, chain_tag=TAG) as ledger:
        for first in range(0, count, 1000):
            ledger.append_sync([voucher(n) for n in range(first, min(first + 1000, count))])

    def reducer(total: int, record: Record) -> int:
        return total + int(msgspec.msgpack.decode(record.body)["cumulative"])

    opened, folded = [], []
    for _ in range(repeat):
        start = time.perf_counter()
        with Ledger.open(path, chain_tag=TAG, create=False) as ledger:
            opened.append(time.perf_counter() - start)
            replay(ledger, reducer, 0)
            folded.append(time.perf_counter() - start - opened[-1])
    each = [a + b for a, b in zip(opened, folded, strict=True)]
    return {
        "replay_500k_seconds": median(each) * 500_000 / count,
        "open_seconds": median(opened),
        "fold_seconds": median(folded),
        "journal_megabytes": path.stat().st_size / 1e6,
    }
