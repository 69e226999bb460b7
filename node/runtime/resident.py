"""One model on this worker: its phase, its engine, who uses it, and what is known of it when it is out of memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from node.errors import ModelError
from node.models.tokenizer import Tokenizer
from node.runtime import walls
from node.runtime.drafts import Draft
from node.runtime.host import EngineHost
from node.runtime.life import Event, Phase, can, move
from node.runtime.selftest import SelfTest
from node.runtime.stored_model import StoredModel
from node.telemetry.engine import EngineMetrics
from node.telemetry.steps import Tracing

if TYPE_CHECKING:
    from node.runtime.grammar import Grammars


@dataclass(eq=False, slots=True)
class Resident(StoredModel):
    phase: Phase = Phase.COLD
    draft: Draft | None = None
    """The smaller model that guesses for it."""
    host: EngineHost | None = None
    """There from the start of a load until the memory is free again."""
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
            **self.described(),
            "phase": self.phase.value,
            "stage": self._stage(),
            "trouble": self.trouble,
            "streams": host.running if host else 0,
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
