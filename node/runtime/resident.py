"""One model on this worker: its phase, its engine, who uses it, and what is known of it when it is out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.tokenizer import Tokenizer
from node.ports import ModelInfo
from node.runtime import walls
from node.runtime.drafts import Draft
from node.runtime.footprint import UNKNOWN, Footprint
from node.runtime.host import EngineHost
from node.runtime.life import Event, Phase, can, move
from node.runtime.selftest import SelfTest
from node.telemetry.engine import EngineMetrics
from node.telemetry.steps import Tracing

if TYPE_CHECKING:
    from node.runtime.grammar import Grammars


@dataclass(eq=False, slots=True)
class Resident:
    manifest: Manifest
    folder: Path
    pinned: bool = False
    """Never put out of memory to make room for another."""
    phase: Phase = Phase.COLD
    footprint: Footprint = UNKNOWN
    """Known from the first load on; an estimate until its engine has weighed it."""
    weighed: tuple[int, int] | None = None
    """Bytes of weights and of keys and values, as its engine said."""
    draft: Draft | None = None
    """The smaller model that guesses for it."""
    host: EngineHost | None = None
    """There from the start of a load until the memory is free again."""
    info: ModelInfo | None = None
    """Of the last engine that was ready."""
    tokenizer: Tokenizer | None = None
    grammars: Grammars | None = None
    metrics: EngineMetrics | None = None
    tracing: Tracing = field(default_factory=Tracing)
    capacity: int = 0
    """Tokens of the longest sequence that its engine takes."""
    load_s: float = 0.0
    test: SelfTest | None = None
    examining: bool = False
    """A self-test is under way. It goes on after a death of the engine, as every stream does."""
    trouble: str = ""
    """Why it is not sold, in words."""
    used: int = 0
    """When it was last used, as a count of uses of all models."""
    users: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Ends its engine."""
    hashing: int | None = None
    """Bytes hashed so far, while it is."""
    proven: tuple[tuple[str, int, int, int], ...] = ()
    """Files as they were when they last matched their hashes: name, inode, size, change time."""
    changed: trio.Event = field(default_factory=trio.Event)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def in_memory(self) -> bool:
        return self.host is not None

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY

    @property
    def idle(self) -> bool:
        """Ready, and nobody's: what may be put out of memory."""
        return self.phase is Phase.READY and not self.users and not self.pinned

    @property
    def ending(self) -> bool:
        """Its engine is on its way out: too late for another stream."""
        return self.scope.cancel_called

    def on(self, event: Event) -> None:
        """Raises `ModelError` for what cannot happen in this phase."""
        self.phase = move(self.phase, event)
        self.notify()

    def news(self, event: Event) -> None:
        """What an engine did by itself; nothing in a phase that it means nothing to."""
        if can(self.phase, event):
            self.on(event)

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

    def engine(self) -> EngineHost:
        """Raises `ModelError` when there is none."""
        if self.host is None:
            raise ModelError(self.trouble or f"{self.manifest.name} is {self.phase}")
        return self.host

    def close(self) -> None:
        """End what it keeps beside its engine."""
        for one in (self.tokenizer, self.grammars, self.tracing):
            if one is not None:
                one.close()

    def report(self) -> dict[str, Any]:
        """For `status`."""
        host, test = self.host, self.test
        facts = host.facts if host else None
        return {
            "name": self.manifest.name,
            "id": str(self.manifest.id),
            "dtype": self.info.dtype if self.info else self.manifest.dtype,
            "phase": self.phase.value,
            "stage": self._stage(),
            "trouble": self.trouble,
            "pinned": self.pinned,
            "streams": host.running if host else 0,
            "weight_bytes": self.footprint.weights,
            "cache_bytes": self.footprint.cache,
            "memory_bytes": self.footprint.total,
            "weighed": self.weighed is not None,
            "draft": self.draft.manifest.name if self.draft else "",
            "in_memory": self.in_memory,
            "load_ms": round(self.load_s * 1000),
            "deaths": host.deaths if host else 0,
            "last_death": host.last_death if host else "",
            "trace": str(self.tracing.trace.path) if self.tracing.trace else "",
            "isolation": walls.words(host.mode, facts.walls) if host and facts else "",
            "self_test": None
            if test is None
            else {"passed": test.passed, "at": test.at, "tokens": test.tokens, "reason": test.reason},
        }

    def _stage(self) -> str:
        if self.hashing is not None:
            total = sum(entry.size for entry in self.manifest.files) or 1
            return f"hashing {100 * self.hashing // total} %"
        return self.host.stage if self.host and not self.ready else ""
