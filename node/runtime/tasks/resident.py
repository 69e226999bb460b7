"""One task model on this worker: what runs it while it is in memory, who uses it, and what is known of it when it is not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from node.errors import ModelError
from node.models.manifest import Manifest
from node.ports import ModelInfo, Step
from node.runtime.footprint import UNKNOWN, Footprint
from node.runtime.tasks.host import TaskHost
from node.runtime.tasks.prepare import Preparer
from node.runtime.tasks.runner import Memory
from protocol.messages import Params

Steps = Callable[[Any, Params, AsyncGenerator[bytes, None]], AsyncGenerator[Step, None]]


@dataclass(eq=False, slots=True)
class TaskModel:
    """A tenant of `node.runtime.memory.MemoryBudget`."""

    manifest: Manifest
    folder: Path
    pinned: bool = False
    footprint: Footprint = UNKNOWN
    weighed: tuple[int, int] | None = None
    """Bytes of weights and of its jobs, as it said when it was loaded."""
    used: int = 0
    users: int = 0
    info: ModelInfo | None = None
    """As it was when it was last loaded."""
    preparer: Preparer | None = None
    memory: Memory | None = None
    steps: Steps | None = None
    """What runs its jobs; None while it is not in memory."""
    host: TaskHost | None = None
    """None also where it runs in a thread of the node."""
    loading: bool = False
    trouble: str = ""
    """Why it is not sold."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Ends its process."""
    over: trio.Event = field(default_factory=trio.Event)
    """Its process has ended."""
    hashing: int | None = None
    proven: tuple[tuple[str, int, int, int], ...] = ()
    changed: trio.Event = field(default_factory=trio.Event)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def in_memory(self) -> bool:
        return self.loading or self.steps is not None

    @property
    def idle(self) -> bool:
        return self.steps is not None and not self.users and not self.pinned

    @property
    def ready(self) -> bool:
        """Jobs can be given to it now; not while its process is started again."""
        return self.steps is not None and (self.host is None or self.host.ready)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Kept in memory for the length of the block."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.changed.set()
            self.changed = trio.Event()

    def known(self) -> Preparer:
        """Raises `ModelError` for one that was never loaded."""
        if self.preparer is None:
            raise ModelError(self.trouble or f"{self.name} is not loaded")
        return self.preparer

    async def end(self) -> None:
        """Let its jobs end, then free its memory."""
        while self.users:
            await self.changed.wait()
        if self.host is not None:
            self.scope.cancel()
            await self.over.wait()
        self.steps = self.host = None

    def report(self) -> dict[str, Any]:
        """For `status`, in the words of `node.runtime.resident`."""
        host = self.host
        phase = "ready" if self.ready else "loading" if self.in_memory else "failed" if self.trouble else "cold"
        return {
            "name": self.manifest.name,
            "id": str(self.manifest.id),
            "dtype": self.info.dtype if self.info else self.manifest.dtype,
            "tasks": [task.value for task in self.info.tasks] if self.info else [],
            "phase": phase,
            "stage": "",
            "trouble": self.trouble or (host.failure if host else ""),
            "pinned": self.pinned,
            "streams": self.users,
            "weight_bytes": self.footprint.weights,
            "cache_bytes": self.footprint.cache,
            "memory_bytes": self.footprint.total,
            "weighed": self.weighed is not None,
            "in_memory": self.in_memory,
            "deaths": host.deaths if host else 0,
            "last_death": host.failure if host else "",
            "isolation": "",
            "self_test": None,
        }
