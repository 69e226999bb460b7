"""Starts `node.testing.journal_child`, keeps what it was promised, and looks for it after whatever was done to it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from node.store.fence import Fence
from node.store.ledger import Entry, Ledger
from node.testing.journal_child import TAG

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
FAILED = ("failed", "refused")


def start(path: Path, *options: str, prefix: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
    """A child that writes the journal at `path`, under the command `prefix`."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "node.testing.journal_child", str(path), *options],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **env},
    )


def finish(child: subprocess.Popen[str], timeout_s: float = 120) -> list[str]:
    """The rest of what it says, until it ends."""
    out, _ = child.communicate(timeout=timeout_s)
    return out.splitlines()


def acknowledged(lines: list[str]) -> dict[int, str]:
    """seq -> hash of every whole acknowledgement."""
    return {int(m[1]): m[2] for line in lines if (m := re.fullmatch(r"ack (\d+) ([0-9a-f]{64})", line))}


def found(path: Path, fence: Path | None = None) -> dict[int, str]:
    """seq -> hash as the next start finds them; it must be able to write as well. Raises `LedgerError`."""
    with Ledger.open(path, chain_tag=TAG, create=False, fence=Fence(fence) if fence else None) as ledger:
        hashes = {record.seq: record.hash.hex() for record in ledger.records()}
        ledger.append_sync([Entry("t", b"", {})] * 2)
    return hashes


def lost(acks: dict[int, str], hashes: dict[int, str]) -> dict[int, str]:
    """What was acknowledged and is not there."""
    return {seq: digest for seq, digest in acks.items() if hashes.get(seq) != digest}


def half_written(hashes: dict[int, str]) -> bool:
    """The child appends in pairs: an odd number is half of an append."""
    return len(hashes) % 2 == 1


def went_on(lines: list[str], within_ms: int = 1000) -> list[str]:
    """What is wrong with how a failure was told: a success after it, a refusal without its name, a slow one."""
    failures = [line.split() for line in lines if line.startswith(FAILED)]
    first = next((number for number, line in enumerate(lines) if line.startswith(FAILED)), len(lines))
    return [
        *(f"acknowledged after a failure: {seq}" for seq in acknowledged(lines[first:])),
        *(f"a failure is called {words[1]}" for words in failures if words[1] != "journal_failed"),
        *(f"told after {words[2]} ms" for words in failures if len(words) > 2 and int(words[2]) > within_ms),
    ]
