"""What the runners of all tasks have in common: one lane to compute in, and an account of their memory.

A runner is used from trio; what computes goes through its lane, one thing at a time and in turn, so that two jobs never need
the working memory of two, and trio's loop never waits. A job that is cancelled stops at its next turn: a batch of rows, a token,
a few lines.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio

from node.errors import ModelError
from node.ports import Step
from protocol.messages import Params
from protocol.tasks import Task

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, each an upper bound."""

    weights: int
    """Held as long as the model is loaded."""
    working: int
    """Needed while it computes, however many jobs there are."""
    job: int
    """Held by each job under way."""

    def total(self, jobs: int) -> int:
        return self.weights + self.working + jobs * self.job


class Lane:
    """One thread's worth of computing. Waiting jobs get their turns in the order in which they came."""

    def __init__(self) -> None:
        self._limit = trio.CapacityLimiter(1)

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Not abandoned when cancelled: the thread would go on with the memory of a job that is over."""
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._limit, abandon_on_cancel=False)

    async def each(self, items: Iterator[T]) -> AsyncGenerator[T, None]:
        """What an iterator gives, one turn for each."""
        end = object()
        while (item := await self.run(next, items, end)) is not end:
            yield item  # type: ignore[misc]


class Runner(Protocol):
    """One loaded model at its tasks."""

    tasks: tuple[Task, ...]
    context_length: int
    """As `protocol.tasks.UNITS` says for its first task."""
    dimensions: int
    """Numbers in one vector; 0 when it makes none."""
    memory: Memory

    def run(self, content: object, params: Params, media: AsyncGenerator[bytes, None]) -> AsyncGenerator[Step, None]:
        """As `TaskBackend.run`."""

    def probe(self) -> bytes:
        """Outputs for a fixed input, bit for bit: machines that agree in them compute alike. Runs everything once."""


def settings(folder: Path) -> dict[str, Any]:
    """config.json of a stored model, which was checked when it was stored."""
    value = json.loads((folder / "config.json").read_bytes())
    if not isinstance(value, dict):
        raise ModelError("config.json is not a JSON object")
    return value
