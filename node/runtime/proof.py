"""That a model's bytes are those that its id commits to, before an engine reads them (M1)."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

import trio

from node.errors import ModelError
from node.models.manifest import FileEntry, Manifest
from node.models.store import ModelStore, Progress


class Files(Protocol):
    """A model in the store, and what is known of its bytes."""

    manifest: Manifest
    folder: Path
    hashing: int | None
    """Bytes hashed so far, while it is."""
    proven: tuple[tuple[str, int, int, int], ...]
    """Files as they were when they last matched their hashes: name, inode, size, change time."""


async def prove(store: ModelStore, one: Files, progress: Progress) -> None:
    """Hash a model in as many threads as there are processors, since one reads slower than a disk can; cancelled, they end with
    the block that they are at. Files that have not changed since they last matched are not read again. Raises `ModelError`."""
    manifest = await trio.to_thread.run_sync(store.verify_names, one.manifest.id)
    as_they_are = _marks(one)
    if one.proven and one.proven == as_they_are:
        return
    one_at_a_time, limit = threading.Lock(), trio.CapacityLimiter(os.cpu_count() or 1)
    damaged: list[ModelError] = []
    one.proven, one.hashing = (), 0

    def tick(count: int) -> None:
        trio.from_thread.check_cancelled()
        with one_at_a_time:
            one.hashing = (one.hashing or 0) + count
            progress(count)

    async def verify(entry: FileEntry) -> None:
        try:
            await trio.to_thread.run_sync(store.verify_file, manifest.id, entry, tick, limiter=limit)
        except ModelError as error:
            damaged.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for entry in manifest.files:
            nursery.start_soon(verify, entry)
    one.hashing = None
    if damaged:
        raise damaged[0]
    one.proven = as_they_are


def _marks(one: Files) -> tuple[tuple[str, int, int, int], ...]:
    found = []
    for entry in one.manifest.files:
        stat = (one.folder / entry.path).stat()
        found.append((entry.path, stat.st_ino, stat.st_size, stat.st_ctime_ns))
    return tuple(found)
