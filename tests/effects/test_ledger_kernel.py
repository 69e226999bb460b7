"""Disks that the kernel fails: calls (strace), a file that may not grow (RLIMIT_FSIZE), a full disk of 1 MB (tmpfs), 20 times a
file system that shuts down below the writer (ext4 on a loop device). Invariants J1 and J4; with `synchronous=NORMAL` the same
shutdown loses what was acknowledged.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node.store import errors
from node.testing.journal_witness import acknowledged, finish, found, lost, start, went_on


def test_a_file_that_may_not_grow_stops_the_writer(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel refuses the write as a full disk would; no root needed."""
    path = tmp_path / "data" / "journal.sqlite"
    lines = finish(start(path, "--rounds", "600", "--limit", "150000"))
    acks = acknowledged(lines)
    assert len(acks) > 5
    assert went_on(lines) == []  # although the space is back after the first failure
    assert len(acks) + sum(line.startswith("failed") for line in lines) == 600
    assert lost(acks, found(path)) == {}


@contextmanager
def mount(kind: str, folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own below `folder`, for root. Raises `subprocess.CalledProcessError`."""
    where, image = folder / "mounted", folder / "image"
    where.mkdir()
    if kind == "tmpfs":
        options = ["-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "none"]
    else:
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        run("mkfs.ext4", "-q", "-F", str(image))
        options = ["-o", "loop", str(image)]
    run("mount", *options, str(where))
    try:
        where.chmod(0o700)
        yield where
    finally:
        run("umount", str(where))


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def disk(kind: str, folder: Path, megabytes: int) -> Iterator[Path]:
    """Such a file system, or a skip that says why not."""
    if os.geteuid() != 0:
        pytest.skip(f"only root may mount {kind}")
    for tool in ("mount", *(["mkfs.ext4"] if kind == "ext4" else [])):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    mounting = mount(kind, folder, megabytes)
    try:
        where = mounting.__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{kind} cannot be mounted here: {error.stderr.decode().strip()}")
    yield where
    mounting.__exit__(None, None, None)


@pytest.fixture
def megabyte(tmp_path: Path) -> Iterator[Path]:
    yield from disk("tmpfs", tmp_path, 1)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    yield from disk("ext4", tmp_path, 48)


def test_a_full_disk_of_one_megabyte(megabyte: Path, tmp_path: Path) -> None:
    path, fence = megabyte / "data" / "journal.sqlite", tmp_path / "fence" / "fence.json"
    lines = finish(start(path, "--rounds", "600", "--pad", "2000", "--fence", str(fence)))
    acks = acknowledged(lines)
    assert len(acks) > 20
    assert went_on(lines) == []
    (megabyte / "filler").write_bytes(b"")
    try:
        with (megabyte / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    except OSError:
        pass
    refused = finish(start(path, "--fence", str(fence)))  # a start on the full megabyte says so, and harms nothing
    assert refused[0] in ("refused journal_failed", f"ready {max(acks)} 2")
    run("mount", "-o", "remount,size=16m", str(megabyte))
    assert lost(acks, found(path, fence)) == {}


SHUTDOWN, NO_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH (Linux, fs/ext4/ext4.h)


def shut_down(disk: Path, path: Path, rng: random.Random, *options: str) -> tuple[list[str], dict[int, str], str]:
    """The file system stops below a writer at a random moment, nothing flushed; then it is mounted again as after a power cut.

    Returns what the writer said, the records found, and the name of the refusal if the journal was not opened.
    """
    child = start(path, "--rounds", "100000", "--writers", "3", "--fence", str(disk / "state" / "fence.json"), *options)
    assert child.stdout is not None
    before = [child.stdout.readline().rstrip("\n") for _ in range(2 + rng.randrange(60))]
    descriptor = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_FLUSH))
    os.close(descriptor)
    after = []
    while not after or not after[-1].startswith("failed"):
        after.append(child.stdout.readline().rstrip("\n"))
    child.kill()
    child.communicate()
    run("umount", str(disk))
    run("mount", "-o", "loop", str(disk.parent / "image"), str(disk))
    try:
        return before + after, found(path, disk / "state" / "fence.json"), ""
    except errors.LedgerError as error:
        return before + after, {}, error.code


def test_20_shutdowns_of_a_file_system_lose_nothing(ext4: Path) -> None:
    rng = random.Random(5)
    path = ext4 / "data" / "journal.sqlite"
    acks: dict[int, str] = {}
    for _ in range(20):
        lines, hashes, refusal = shut_down(ext4, path, rng)
        assert went_on(lines) == []
        acks |= acknowledged(lines)
        assert refusal == ""
        assert lost(acks, hashes) == {}
    assert len(acks) > 200


def test_with_synchronous_normal_a_shutdown_loses_records(ext4: Path) -> None:
    rng = random.Random(6)
    gone: dict[int, str] = {}
    for n in range(3):
        lines, hashes, _ = shut_down(ext4, ext4 / f"data{n}" / "journal.sqlite", rng, "--normal")
        gone |= lost(acknowledged(lines), hashes)
        (ext4 / "state" / "fence.json").unlink(missing_ok=True)
    assert gone, "the test cannot see what it is for"


# ---------------------------------------------------------------------------------------------------------------- strace


def strace_works() -> bool:
    return (
        shutil.which("strace") is not None
        and subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "true"]).returncode == 0
    )


needs_strace = pytest.mark.skipif(not strace_works(), reason="strace is not installed or may not trace here")


def traced(path: Path, log: Path, options: tuple[str, ...], *child: str) -> tuple[list[str], list[str]]:
    """Run the child under strace; returns what it said and the traced calls in order."""
    lines = finish(start(path, *child, prefix=("strace", "-f", "-y", "-qq", "-s", "16", "-o", str(log), *options)))
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
@pytest.mark.parametrize(("options", "early"), [((), 0), (("--normal",), 5)])
def test_the_disk_has_it_before_the_caller_hears_of_it(tmp_path: Path, options: tuple[str, ...], early: int) -> None:
    """Seen in the system calls; with `synchronous=NORMAL` the same check must find every acknowledgement too early."""
    path = tmp_path / "data" / "journal.sqlite"
    lines, calls = traced(path, tmp_path / "calls", ("-e", "trace=pwrite64,fdatasync,fsync,write"), *options)
    assert len(acknowledged(lines)) == 5
    assert unsynced_acks(calls) == early


@needs_strace
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64", "fsync", "ftruncate", "rename", "unlink"])
def test_the_kernel_fails_a_call(tmp_path: Path, call: str, error: str, long: bool) -> None:
    """The n-th call of each thread fails, for some n; with --long for every n."""
    path, fence = tmp_path / "data" / "journal.sqlite", tmp_path / "state" / "fence.json"
    _, calls = traced(path, tmp_path / "calls", ("-e", f"trace={call}"), "--fence", str(fence))
    for folder in (path.parent, fence.parent):
        shutil.rmtree(folder)
    most = max(
        (sum(1 for line in calls if line.startswith(pid)) for pid in {line.split()[0] for line in calls}), default=0
    )
    assert most > 0
    for nth in range(1, most + 1) if long else sorted({1, most // 2 + 1, most}):
        inject = ("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={nth}")
        lines, _ = traced(path, tmp_path / "calls", inject, "--fence", str(fence))
        acks = acknowledged(lines)
        assert went_on(lines) == []
        if acks or path.exists():
            assert lost(acks, found(path, fence)) == {}
        for folder in (path.parent, fence.parent):
            shutil.rmtree(folder, ignore_errors=True)
