"""Steps that only decode, replayed as CUDA graphs: one launch instead of a thousand.

A graph fixes every shape and address, so a step is padded to a bucket of rows and of blocks, and its inputs are copied into
buffers that stay. Rows that are padding write into a block that belongs to nobody and see only that one. What the graph
computes is `Decoder.forward` with a `_Fixed` plan; without a GPU the same code runs uncaptured, which is how it is tested.

Memory: all graphs take theirs from one pool of the allocator, up to `budget` bytes. Before a capture stands an estimate of what
it will add, after it what it did add; what would pass the budget is not captured, and its steps run as they would without.

Not measured on a GPU yet: docs/measurements.md says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
        self.even = self.exact = False
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

    def __init__(
        self,
        model: Decoder,
        cache: PagedCache,
        *,
        spare: int,
        budget: int,
        capture: bool = True,
        reserved: Callable[[], int] | None = None,
    ) -> None:
        """`spare`: the block that belongs to nobody. `budget`: bytes of device memory for all graphs. `capture`: False runs the
        same steps without a graph. `reserved`: bytes that the allocator has taken of the device, torch's own count by default."""
        self._model, self._cache, self._spare, self._capture = model, cache, spare, capture
        cache.data.select(3, spare).zero_()  # it is masked wherever it pads, but 0 * NaN is one
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._budget = budget
        device = cache.data.device
        self._reserved = reserved or (partial(torch.cuda.memory_reserved, device) if capture else lambda: 0)
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self.nbytes = 0
        """What the graphs have added to the allocator's memory."""

    def run(self, spans: Sequence[Span], token_ids: Tensor, plan: Plan) -> Tensor | None:
        """Float32 [rows, vocab] of a step of single tokens; None when it is no such step, too large a one, or one for whose graph
        there is no memory."""
        if len(spans) > MOST_ROWS or any(span.count > 1 for span in spans):
            return None
        key = bucket(len(spans)), bucket(blocks_for(max(span.start for span in spans) + 1))
        graph = self._graphs.get(key) or self._make(*key, plan.device)
        if graph is None:
            return None
        graph.fixed.fill(plan, spans, token_ids)
        self._cache.begin(plan)
        return graph.run()[: len(spans)]

    def expected(self, rows: int, width: int) -> int:
        """An upper bound of bytes for a graph: the dense keys and values of a layer and those of the one before, the logits as
        they are and as float32, and their inputs."""
        config, item = self._model.config, self._model.dtype.itemsize
        dense = 2 * config.kv_heads * config.head_dim * rows * width * BLOCK_TOKENS * item
        widest = max(2 * config.intermediate_size, (config.heads + 2 * config.kv_heads) * config.head_dim)
        return 2 * dense + rows * (12 * config.vocab_size + 16 * widest + 8 * width)

    def _make(self, rows: int, width: int, device: torch.device) -> _Graph | None:
        if self.nbytes + self.expected(rows, width) > self._budget:
            return None
        before = self._reserved()
        fixed = _Fixed(rows, width, self._spare, device)
        graph = self._graphs[rows, width] = _Graph(self._model, self._cache, fixed, self._pool)
        self.nbytes += max(self._reserved() - before, 0)
        return graph


class _Graph:
    def __init__(self, model: Decoder, cache: PagedCache, fixed: _Fixed, pool: tuple[int, int] | None) -> None:
        """`pool`: shared by all graphs, which may be replayed in any order: each one's logits stay its own while it lives, and
        what it needs besides is over when it ends. None: no capture."""
        self._model, self._cache, self.fixed = model, cache, fixed
        self._graph: torch.cuda.CUDAGraph | None = None
        if pool is None:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # its rows are all padding now, so a warm-up harms nobody
            for _ in range(_WARM_UP):
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        self._kept = model.tables()  # they may grow into new tensors; the graph goes on reading these
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
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
