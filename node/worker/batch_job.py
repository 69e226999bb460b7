"""One batch job under way, in memory: what is finished, what is begun, how long it took. `batch_run` does the rest."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio

from protocol.ids import Hash32, JobId, keccak256
from protocol.typed_data import Domain
from protocol.workload import BatchSpec, ResultItem

Piece = tuple[tuple[int, ResultItem], ...]
"""Finished items with their numbers, as they are kept on disk."""


@dataclass(slots=True)
class Begun:
    """What there is of an item that is not finished. In memory only."""

    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    steps: int = 0
    lent: int = 0
    """Steps of them in the share of streams' time."""


@dataclass(slots=True)
class RunningJob:
    """One job under way, in memory."""

    job_id: JobId
    domain: Domain
    spec: BatchSpec
    deadline: int
    until_ms: int
    """How long its pieces are kept."""
    guess_s: float
    salt: bytes
    """Its client's, for the runtime."""
    items: dict[int, ResultItem] = field(default_factory=dict)
    waiting: deque[int] = field(default_factory=deque)
    running: dict[int, trio.CancelScope] = field(default_factory=dict)
    begun: dict[int, Begun] = field(default_factory=dict)
    unsaved: list[int] = field(default_factory=list)
    unsaved_since: float = 0.0
    pieces: int = 0
    kept: bool = False
    """Its specification is kept until its end: what is not opened is kept for a day."""
    failures: int = 0
    finished: float = 0.0
    busy: int = 0
    """Items that compute at full speed."""
    busy_s: float = 0.0
    busy_since: float = 0.0

    @property
    def total(self) -> int:
        return len(self.spec.inputs)

    def computes(self, more: int) -> None:
        """One more item computes at full speed, or one less."""
        now = trio.current_time()
        self.busy_s += now - self.busy_since if self.busy else 0.0
        self.busy, self.busy_since = self.busy + more, now


def piece_key(job_id: JobId, number: int) -> Hash32:
    """Under which name a piece of finished items is kept."""
    return Hash32(keccak256(b"gristmill batch items" + job_id + number.to_bytes(4)))


def pieces_of(job: RunningJob) -> list[Hash32]:
    return [piece_key(job.job_id, number) for number in range(job.pieces)]
