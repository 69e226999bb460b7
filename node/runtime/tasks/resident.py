"""One task model on this worker: what runs it while it is in memory, who uses it, and what is known of it when it is not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from node.errors import ModelError
from node.ports import Step
from node.runtime.stored_model import StoredModel
from node.runtime.tasks.host import TaskHost
from node.runtime.tasks.prepare import Preparer
from node.runtime.tasks.runner import Memory
from protocol.messages import Params

Steps = Callable[[Any, Params, AsyncGenerator[bytes, None]], AsyncGenerator[Step, None]]


@dataclass(eq=False, slots=True)
class TaskModel(StoredModel):
    preparer: Preparer | None = None
    memory: Memory | None = None
    steps: Steps | None = None
    """What runs its jobs; None while it is not in memory."""
    host: TaskHost | None = None
    """None also where it runs in a thread of the node."""
    loading: bool = False
    over: trio.Event = field(default_factory=trio.Event)
    """Its process has ended."""

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
            **self.described(),
            "tasks": [task.value for task in self.info.tasks] if self.info else [],
            "phase": phase,
            "stage": "",
            "trouble": self.trouble or (host.failure if host else ""),
            "streams": self.users,
            "in_memory": self.in_memory,
            "deaths": host.deaths if host else 0,
            "last_death": host.failure if host else "",
            "isolation": "",
            "self_test": None,
        }
