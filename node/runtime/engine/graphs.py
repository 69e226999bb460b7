"""Steps that only decode, replayed as CUDA graphs: one launch instead of a thousand.

A graph fixes every shape and address, so a step is padded to a bucket of rows and of blocks, and its inputs are copied into
buffers that stay. Rows that are padding write into a block that belongs to nobody and see only that one. What the graph
computes is `Decoder.forward` with a `_Fixed` plan; without a GPU the same code runs uncaptured, which is how it is tested.

Not measured on a GPU yet: docs/measurements.md says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from node.runtime.engine.blocks import BLOCK_TOKENS, blocks_for
from node.runtime.engine.models.decoder import Decoder
from node.runtime.engine.paged import Group, PagedCache, Plan, Span

MOST_ROWS = 256
"""Larger steps keep the device busy without graphs."""
_WARM_UP = 3
"""Runs before a capture: libraries choose their kernels and take their workspaces in them."""


def bucket(count: int) -> int:
    """The power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


class _FixedGroup(Group):
    """Rows whose lengths and blocks are read from buffers at run time."""

    def __init__(self, rows: int, width: int, spare: int, device: torch.device) -> None:
        self.begin, self.end, self.tokens = 0, rows, width * BLOCK_TOKENS
        self.blocks = torch.full((rows * width,), spare, device=device)
        self.ends = torch.ones(rows, 1, dtype=torch.int64, device=device)
        self.even = False
        self._masks = {}

    def forget_masks(self) -> None:
        self._masks.clear()


class _Fixed(Plan):
    """A decode step of `rows` rows that see at most `width` blocks."""

    def __init__(self, rows: int, width: int, spare: int, device: torch.device) -> None:
        self.exact = False
        self.device = device
        self.spare = spare
        self.tokens = rows
        self.width = width
        self.last = width * BLOCK_TOKENS - 1
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.full((rows,), spare * BLOCK_TOKENS, device=device)
        self.begun = torch.empty(0, dtype=torch.int64, device=device)
        self.group = _FixedGroup(rows, width, spare, device)
        self.groups, self.chunks = [self.group], []
        self.token_ids = torch.zeros(rows, dtype=torch.int64, device=device)

    def fill(self, plan: Plan, spans: Sequence[Span], token_ids: Tensor) -> None:
        """Take over a step that `plan` describes."""
        rows, missing = len(spans), self.tokens - len(spans)
        spare = [self.spare]
        blocks: list[int] = []
        for span in spans:
            own = span.table[: blocks_for(span.start + 1)]
            blocks += [*own, *(spare * (self.width - len(own)))]
        self.group.blocks.copy_(torch.tensor(blocks + spare * (missing * self.width)))
        self.group.ends[:rows, 0].copy_(plan.positions + 1)
        self.group.ends[rows:] = 1
        self.positions[:rows].copy_(plan.positions)
        self.positions[rows:] = 0
        self.slots[:rows].copy_(plan.slots)
        self.slots[rows:] = self.spare * BLOCK_TOKENS
        self.token_ids[:rows].copy_(token_ids)
        self.token_ids[rows:] = 0


class DecodeGraphs:
    """The graphs of one model and its cache. The cache must have one block more than the pool hands out."""

    def __init__(self, model: Decoder, cache: PagedCache, *, spare: int, capture: bool = True) -> None:
        """`spare`: the block that belongs to nobody. `capture`: False runs the same steps without a graph."""
        self._model, self._cache, self._spare, self._capture = model, cache, spare, capture
        cache.data.select(3, spare).zero_()  # it is masked wherever it pads, but 0 * NaN is one
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def run(self, spans: Sequence[Span], token_ids: Tensor, plan: Plan) -> Tensor | None:
        """Float32 [rows, vocab] of a step of single tokens; None when it is no such step, or too large a one."""
        if len(spans) > MOST_ROWS or any(span.count > 1 for span in spans):
            return None
        key = bucket(len(spans)), bucket(blocks_for(max(span.start for span in spans) + 1))
        if key not in self._graphs:
            fixed = _Fixed(*key, self._spare, plan.device)
            self._graphs[key] = _Graph(self._model, self._cache, fixed, self._capture)
        graph = self._graphs[key]
        graph.fixed.fill(plan, spans, token_ids)
        self._cache.begin(plan)
        return graph.run()[: len(spans)]


class _Graph:
    def __init__(self, model: Decoder, cache: PagedCache, fixed: _Fixed, capture: bool) -> None:
        self._model, self._cache, self.fixed = model, cache, fixed
        self._graph: torch.cuda.CUDAGraph | None = None
        if not capture:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # its rows are all padding now, so a warm-up harms nobody
            for _ in range(_WARM_UP):
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        self._kept = model.tables()  # they may grow into new tensors; the graph goes on reading these
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._compute()
        self._graph = graph

    def run(self) -> Tensor:
        if self._graph is None:
            return self._compute()
        self._graph.replay()
        return self._logits

    def _compute(self) -> Tensor:
        self.fixed.group.forget_masks()
        return self._model.logits(self._model.forward(self.fixed.token_ids, self.fixed, self._cache))
