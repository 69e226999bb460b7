"""A process that writes a journal and says on stdout what it was promised; for tests that kill it, or the disk below it.

    python -m node.testing.journal_child JOURNAL [--fence FILE] [--writers N] [--rounds N] ...

Lines: `ready SEQ EPOCH` after the open, `ack SEQ HASH` once an append has returned, `failed CODE MS` for one that failed, with
how long it took to say so, `refused CODE` when the open failed, `done`. One write each, so no line is torn.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import threading
import time
from pathlib import Path

from node.store import database, errors
from node.store.fence import Fence
from node.store.ledger import Entry, Ledger

TAG = b"\x11" * 20


def say(*words: object) -> None:
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


def limit(size: int) -> None:
    """Bytes that a file may have from here on: the kernel refuses a larger one as a full disk would. 0 lifts it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def write(ledger: Ledger, name: int, rounds: int, pad: int) -> None:
    """Append pairs of records, and go on trying after a failure, as nobody should."""
    for n in range(rounds):
        began = time.monotonic()
        try:
            records = ledger.append_sync([Entry("t", bytes([name]), {"n": n, "pad": bytes(pad)})] * 2)
        except errors.LedgerError as error:
            say("failed", error.code, int((time.monotonic() - began) * 1000))
            limit(0)
            continue
        say("ack", records[-1].seq, records[-1].hash.hex())


def live(
    path: Path, *, fence: Path | None = None, writers: int = 1, rounds: int = 5, pad: int = 200, cap: int = 0
) -> None:
    """One life of the journal, from its open to its close."""
    try:
        ledger = Ledger.open(path, chain_tag=TAG, fence=Fence(fence) if fence else None)
    except errors.LedgerError as error:
        say("refused", error.code)
        return
    say("ready", ledger.head.seq, ledger.epoch)
    limit(cap)
    threads = [threading.Thread(target=write, args=(ledger, name, rounds, pad)) for name in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()
    say("done")


def recorded(root: Path, size: int) -> None:
    """A life for `node.testing.failing_disk`; `size`: bytes in a record."""
    live(root / "data" / "journal.sqlite", fence=root / "state" / "fence.json", rounds=3, pad=size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="journal_child", description=__doc__.split("\n")[0])
    parser.add_argument("journal", type=Path)
    parser.add_argument("--fence", type=Path)
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pad", type=int, default=200, help="bytes in a record")
    parser.add_argument("--limit", type=int, default=0, help="largest size of a file, once the journal is open")
    parser.add_argument("--hold", action="store_true", help="wait for the end of stdin with the journal open")
    parser.add_argument("--normal", action="store_true", help="the planted bug: commits do not wait for the disk")
    given = parser.parse_args()
    if given.normal:
        database.SETTINGS += (("synchronous", "NORMAL"),)
        database.REQUIRED = ()
    if given.hold:
        with Ledger.open(given.journal, chain_tag=TAG) as ledger:
            say("ready", ledger.head.seq, ledger.epoch)
            sys.stdin.read()
        return
    live(
        given.journal,
        fence=given.fence,
        writers=given.writers,
        rounds=given.rounds,
        pad=given.pad,
        cap=given.limit,
    )


if __name__ == "__main__":
    main()
