"""A model in this worker's store that can be brought into memory: what models of chats and of other tasks have in common.

It is a `memory.Tenant` and has its `proof.Files`; how it is loaded and what it runs are its subclasses'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from node.models.manifest import Manifest
from node.ports import ModelInfo
from node.runtime.footprint import UNKNOWN, Footprint


@dataclass(eq=False, slots=True)
class StoredModel:
    manifest: Manifest
    folder: Path
    pinned: bool = False
    """Never put out of memory to make room for another."""
    footprint: Footprint = UNKNOWN
    """Known from the first load on; an estimate until what runs it has weighed it."""
    weighed: tuple[int, int] | None = None
    """Bytes of weights, and of what its streams or jobs need, as it said when it was loaded."""
    info: ModelInfo | None = None
    """As it was when it was last ready."""
    trouble: str = ""
    """Why it is not sold, in words."""
    used: int = 0
    """When it was last used, as a count of uses of all models."""
    users: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Ends what runs it."""
    hashing: int | None = None
    """Bytes hashed so far, while it is."""
    proven: tuple[tuple[str, int, int, int], ...] = ()
    """Files as they were when they last matched their hashes: name, inode, size, change time."""
    changed: trio.Event = field(default_factory=trio.Event)

    @property
    def name(self) -> str:
        return self.manifest.name

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    @contextmanager
    def using(self) -> Iterator[None]:
        """Kept in memory for the length of the block."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.notify()

    def described(self) -> dict[str, Any]:
        """For `status`: what is said of every model in the same words."""
        return {
            "name": self.manifest.name,
            "id": str(self.manifest.id),
            "dtype": self.info.dtype if self.info else self.manifest.dtype,
            "pinned": self.pinned,
            "weight_bytes": self.footprint.weights,
            "cache_bytes": self.footprint.cache,
            "memory_bytes": self.footprint.total,
            "weighed": self.weighed is not None,
        }
