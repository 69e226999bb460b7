"""Which blocks are the chain, and what that makes of their logs. Pure: headers in, events out.

Rules:
- A block is named by its hash and belongs under its parent's. A log is known by (block hash, log index), never by number.
- `removed` logs of a node are not relied on: when a block leaves the chain, its events are undone here, last first.
- The last `KEEP` blocks are remembered with their events. A reorganisation that goes deeper is an error, not a guess.
- With `confirmations` c, a block's events are told when c blocks lie on it. An event never told is never undone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from node.chain.values import Header
from node.errors import ChainError, ReorgTooDeep
from node.ports import REORG_DEPTH, ChainEvent

KEEP: Final = REORG_DEPTH
"""Blocks that can be undone."""


@dataclass(slots=True)
class _Block:
    header: Header
    events: tuple[ChainEvent, ...]
    told: bool


class Follower:
    """The remembered end of one chain. Feed `extend`; everything else only looks."""

    def __init__(self, confirmations: int = 0, keep: int = KEEP) -> None:
        if not 0 <= confirmations < keep:
            raise ValueError("confirmations must be fewer than the blocks kept")
        self._confirmations = confirmations
        self._keep = keep
        self._blocks: deque[_Block] = deque()

    @property
    def tip(self) -> Header | None:
        return self._blocks[-1].header if self._blocks else None

    @property
    def oldest(self) -> Header | None:
        """The first block remembered; below it nothing can be undone."""
        return self._blocks[0].header if self._blocks else None

    def knows(self, block_hash: bytes) -> bool:
        return any(block.header.hash == block_hash for block in self._blocks)

    def extend(self, path: Sequence[Header], events: Mapping[bytes, Sequence[ChainEvent]]) -> list[ChainEvent]:
        """The chain now ends with `path`, oldest first: what to tell, undone events before new ones.

        The first header's parent must be remembered (or nothing be remembered yet); or `path` is one remembered block that
        became the tip again. `events` holds each new block's by its hash. Blocks already remembered are not told again.
        Raises `ReorgTooDeep` when the path hangs on a block that is older than what is remembered, `ChainError` when it is
        no chain.
        """
        for parent, child in pairwise(path):
            if child.parent != parent.hash or child.number != parent.number + 1:
                raise ChainError(f"block {child.number} is not the child of the block before it")
        fresh = list(path)
        while fresh and self.knows(fresh[0].hash):
            last = fresh.pop(0)
            if not fresh:
                return [*self._cut_to(last.hash), *self._tell()]
        if not fresh:
            return []
        told: list[ChainEvent] = []
        if self._blocks:
            if not self.knows(fresh[0].parent):
                raise ReorgTooDeep(
                    f"block {fresh[0].number} does not hang on any of the last {len(self._blocks)} blocks",
                    hint="the chain was reset or reorganised very deeply: read the channels anew",
                )
            told = self._cut_to(fresh[0].parent)
        for header in fresh:
            self._blocks.append(_Block(header, tuple(events.get(header.hash, ())), told=False))
        told += self._tell()
        while len(self._blocks) > self._keep:
            self._blocks.popleft()
        return told

    def settle(self) -> list[ChainEvent]:
        """Count everything remembered as final and forget it: what was not told yet. For a gap too wide to walk."""
        untold = [event for block in self._blocks if not block.told for event in block.events]
        self._blocks.clear()
        return untold

    def _cut_to(self, block_hash: bytes) -> list[ChainEvent]:
        undone: list[ChainEvent] = []
        while self._blocks[-1].header.hash != block_hash:
            block = self._blocks.pop()
            if block.told:
                undone += [replace(event, removed=True) for event in reversed(block.events)]
        return undone

    def _tell(self) -> list[ChainEvent]:
        told: list[ChainEvent] = []
        for block in self._blocks:
            if not block.told and self._blocks[-1].header.number - block.header.number >= self._confirmations:
                block.told = True
                told += block.events
        return told
