"""How fast the journal takes records and how soon a node is ready after a kill.

Figures: durable commits per second of one appender that waits each time; durable records per second of 50 concurrent ones
(group commit), and how many records shared a commit. Then a worker's journal of 500,000 records as they are in life (200
channels; per job one opening, four vouchers, one receipt) and its next start after a kill: `open_seconds` verifies the whole
chain behind the fence, `fold_seconds` gives the channel book. `replay_500k_seconds` is both; `replay_500k_no_snapshot_seconds`
both when there is no snapshot that can be used, as after an update of the code.
Peer in the same run: a bare file with one fdatasync per record, which is what the disk itself allows.
"""

from __future__ import annotations

import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import trio

from node.store.channels import ChannelBook
from node.store.fence import Fence
from node.store.ledger import Entry, Ledger
from protocol.channel import ChainSeen, Change, ChannelOpened, JobEnded, JobOpened, Role, VoucherAdded
from protocol.ids import Address, ChannelId, Hash32, JobId
from protocol.records import kind_of, to_body
from protocol.typed_data import ChannelConfig, Domain

TAG = bytes(20)
APPENDERS = 50
CHANNELS = 200
VOUCHERS = 4
RECEIPT_BYTES = 420
DOMAIN = Domain(31337, Address(bytes([7]) * 20))


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


def life(count: int) -> Iterator[Change]:
    """What a worker journals: `count` changes of CHANNELS channels, jobs of many clients mixed."""
    rng = random.Random(1)
    opened: list[ChannelId] = []
    for n in range(CHANNELS):
        payer, worker = Address((n + 1).to_bytes(20)), Address(bytes([9]) * 20)
        config = ChannelConfig(payer, payer, worker, worker, Address(bytes([5]) * 20), 3600, Hash32(n.to_bytes(32)))
        opened.append(config.channel_id(DOMAIN))
        yield ChannelOpened(opened[-1], config, 10**15, 2**39, rng.randbytes(65), DOMAIN)
        yield ChainSeen(opened[-1], 10**15, 0, 0, False)
    done = 2 * CHANNELS
    sequence, cumulative = dict.fromkeys(opened, 0), dict.fromkeys(opened, 0)
    while done < count:
        channel, job = rng.choice(opened), JobId(rng.randbytes(32))
        sequence[channel] += 1
        yield JobOpened(channel, job, 0, sequence[channel], 1000 * VOUCHERS)
        for _ in range(VOUCHERS):
            cumulative[channel] += 1000
            yield VoucherAdded(channel, cumulative[channel], rng.randbytes(65))
        yield JobEnded(channel, job, 0, 1000 * VOUCHERS, sequence[channel], rng.randbytes(RECEIPT_BYTES))
        done += 2 + VOUCHERS


def _start(path: Path, count: int, repeat: int) -> dict[str, float]:
    fence = path.with_name("fence") / "worker.json"

    def start() -> tuple[float, float, int]:
        begun = time.perf_counter()
        with Ledger.open(path, chain_tag=TAG, create=False, fence=Fence(fence)) as ledger:
            opened = time.perf_counter()
            book = ChannelBook.restore(ledger, Role.WORKER, [DOMAIN])
            return opened - begun, time.perf_counter() - opened, sum(s.spent for s in book.channels.values())

    with Ledger.open(path, chain_tag=TAG, fence=Fence(fence)) as ledger:
        batch: list[Entry] = []
        for change in life(count):
            batch.append(Entry(kind_of(change), bytes(change.channel_id), to_body(change)))
            if len(batch) == 1000:
                ledger.append_sync(batch)
                batch = []
        ledger.append_sync(batch)
        total = ledger.head.seq
    bare = start()  # takes the snapshot that the following ones begin with
    starts = [start() for _ in range(repeat)]
    if {earned for _, _, earned in starts} != {bare[2]}:
        raise SystemExit("error: the fold with a snapshot is not the fold without")
    scale = 500_000 / total
    return {
        "replay_500k_seconds": median(opened + folded for opened, folded, _ in starts) * scale,
        "replay_500k_no_snapshot_seconds": (bare[0] + bare[1]) * scale,
        "open_seconds": median(opened for opened, _, _ in starts),
        "fold_seconds": median(folded for _, folded, _ in starts),
        "journal_megabytes": path.stat().st_size / 1e6,
    }
