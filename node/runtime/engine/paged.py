"""Keys and values in blocks, and attention over them.

Layout: [layers, 2, kv_heads, blocks, 16, head_dim]. The blocks of a table are then one `index_select` away from dense
[kv_heads, tokens, head_dim], with whole blocks copied at once.

A `Plan` says what one forward pass computes: first *rows*, one new token of one sequence each, longest first and cut into
groups of similar length; then *chunks*, several new tokens of one sequence.
Attention reads whole blocks and masks what is not seen.

Where there are compiled kernels, every token attends for itself by `kernels.attention`, which reads the blocks where they lie.
Rows, groups and chunks are how torch's operators do it.

With `exact` a prompt's tokens are rows, too, and a group holds only rows that see equally many blocks: how a row is computed
then depends on its position alone, not on its company or on how a prompt was cut. That batched products compute each
matrix alike, however many there are, is a property of the libraries below; the engine's probe checks it before it is claimed.

Sources: Kwon et al. 2023, PagedAttention (blocks); Dao et al. 2022 (the fused kernel behind torch's
`scaled_dot_product_attention`, used where it is faster than two matrix products: float32 prompts, and GPUs).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.blocks import BLOCK_TOKENS, blocks_for
from node.runtime.engine.errors import IntegrityError

if TYPE_CHECKING:
    from node.runtime.engine.kernels.calls import Kernels

WASTE = 2
"""Rows of one group differ in length by less than this factor: what is padded costs as much as what is not."""

SMALL_PRODUCT = 16**3
"""A batch of matrix products with fewer multiplications than this may be computed by another kernel than a larger one
(ATen/native/mkldnn/Matmul.cpp)."""


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence: positions `start` to `start + count`, whose blocks are in `table`."""

    table: Sequence[int]
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Attention:
    """How one layer attends. `scale` is applied to the scores before anything else."""

    scale: float
    window: int | None = None
    """A token sees itself and so many minus one before it; None: all before it."""
    softcap: float = 0.0
    """Scores s become cap * tanh(s / cap); 0 is off (Gemma 2)."""


class Group:
    """Tokens `begin` to `end` of the pass, each the last of what it sees."""

    def __init__(self, begin: int, rows: Sequence[Span], device: torch.device, *, exact: bool) -> None:
        self.begin, self.end = begin, begin + len(rows)
        lengths = [row.start + 1 for row in rows]
        width = blocks_for(max(lengths))
        self.tokens = width * BLOCK_TOKENS
        """Whole blocks: dense matrices are multiplied without a copy."""
        self.exact = exact
        self.even = not exact and min(lengths) == self.tokens
        flat: list[int] = []
        for row in rows:
            own = blocks_for(row.start + 1)
            flat += row.table[:own]
            flat += [row.table[0]] * (width - own)  # masked, but numbers: blocks not begun may hold anything
        self.blocks = torch.tensor(flat, device=device)
        self.ends = torch.tensor(lengths, device=device)[:, None]
        """[rows, 1]: how many tokens each sees, were there no window."""
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype, kv_heads: int) -> Tensor | None:
        """[kv_heads * rows, 1, tokens], 0 where a token is seen and -inf where not; None when all are."""
        if window is not None and window >= self.tokens:
            window = None  # it hides nothing
        if self.even and window is None:
            return None
        key = (window, dtype)
        if key not in self._masks:
            device = self.blocks.device
            at = torch.arange(self.tokens, device=device)
            hidden = at >= self.ends
            if window is not None:
                hidden |= at < self.ends - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask[None].expand(kv_heads, -1, -1).reshape(-1, 1, self.tokens)
        return self._masks[key]


class _Chunk:
    """Tokens `begin` to `end` of the pass: a run of one sequence."""

    def __init__(self, begin: int, span: Span, device: torch.device) -> None:
        self.begin, self.end = begin, begin + span.count
        self.start, self.width = span.start, blocks_for(span.start + span.count)
        self.blocks = torch.tensor(span.table[: self.width], device=device)
        self._masks: dict[tuple[int | None, torch.dtype, int], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype, times: int) -> Tensor:
        """[times * count, tokens], 0 where seen and -inf where not, the same again `times` times."""
        key = (window, dtype, times)
        if key not in self._masks:
            device = self.blocks.device
            at = torch.arange(self.width * BLOCK_TOKENS, device=device)
            me = torch.arange(self.start, self.start + self.end - self.begin, device=device)[:, None]
            hidden = at > me
            if window is not None:
                hidden |= at <= me - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._masks[key] = mask.masked_fill_(hidden, float("-inf")).repeat(times, 1)
        return self._masks[key]


class Plan:
    """One forward pass: positions of all its tokens, where their keys go, and what they attend to.

    `spans`: those of one token first, longest sequence first, then the others; tokens of the pass are in that order.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, *, exact: bool = False, width: int = 0) -> None:
        """`width`: heads * head_dim of the model."""
        self.exact = exact
        self._alone = width * BLOCK_TOKENS <= SMALL_PRODUCT
        """In exact mode: rows are too small to be computed together."""
        positions: list[int] = []
        slots: list[int] = []
        begun: list[int] = []
        for span in spans:
            end = span.start + span.count
            if end % BLOCK_TOKENS and span.start <= end - end % BLOCK_TOKENS:
                begun.append(span.table[end // BLOCK_TOKENS])
            for position in range(span.start, span.start + span.count):
                positions.append(position)
                slots.append(span.table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS)
        self.spans, self.last = spans, max(positions)
        """The highest position."""
        self.positions = torch.tensor(positions, device=device)
        self.slots = torch.tensor(slots, device=device)
        self.begun = torch.tensor(begun, device=device, dtype=torch.int64)
        """Blocks that this pass begins and does not fill."""
        self.device = device
        self._singles = len(spans) if exact else sum(1 for _ in takewhile(lambda span: span.count == 1, spans))
        """How many of the spans, the first, are rows."""

    @cached_property
    def groups(self) -> list[Group]:
        """The rows, for attention by torch's operators."""
        rows = [Span(span.table, span.start + n, 1) for span in self.spans[: self._singles] for n in range(span.count)]
        groups: list[Group] = []
        begun = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or not self._alike(rows[begun], rows[end]):
                groups.append(Group(begun, rows[begun:end], self.device, exact=self.exact))
                begun = end
        return groups

    @cached_property
    def chunks(self) -> list[_Chunk]:
        """What follows the rows."""
        begin, chunks = sum(span.count for span in self.spans[: self._singles]), []
        for span in self.spans[self._singles :]:
            chunks.append(_Chunk(begin, span, self.device))
            begin += span.count
        return chunks

    @cached_property
    def tables(self) -> Tensor:
        """For attention by a kernel: int64 [tokens, 1 + most blocks], how many tokens each sees and blocks, the first its own."""
        most = max(blocks_for(span.start + span.count) for span in self.spans)
        lines = []
        for span in self.spans:
            own = span.table[: blocks_for(span.start + span.count)]
            lines.append([0, *own, *([0] * (most - len(own)))])
        tables, counts = torch.tensor(lines, device=self.device), [span.count for span in self.spans]
        if len(self.positions) > len(counts):
            tables = tables.repeat_interleave(torch.tensor(counts, device=self.device), 0)
        tables[:, 0] = self.positions + 1
        return tables

    def _alike(self, one: Span, other: Span) -> bool:
        if self.exact:
            return not self._alone and blocks_for(one.start + 1) == blocks_for(other.start + 1)
        return one.start + 1 <= WASTE * (other.start + 1)


def _memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cache's memory. Raises `RuntimeError` when there is none.

    On a CPU its pages become real only as tokens fill them, and are small ones: of huge ones, the first token in a new one makes
    two megabytes real for each layer and head, and its step waits (measured: 50 ms of SmolLM2-135M).
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise RuntimeError(f"no memory for {size} bytes: {error}") from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class PagedCache:
    """The tensors behind a block pool."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        """`kernels`: what tokens attend with; None: torch's operators."""
        self._kernels = kernels
        self.data = _memory((layers, 2, kv_heads, blocks, BLOCK_TOKENS, head_dim), dtype, device)
        self._shape = (kv_heads, blocks, head_dim)
        self._by_slot = self.data.view(layers, 2 * kv_heads, blocks * BLOCK_TOKENS, head_dim)
        self._by_block = self.data.view(layers, 2 * kv_heads, blocks, BLOCK_TOKENS * head_dim)
        self._fused = device.type != "cpu" or dtype == torch.float32
        """Whether torch's fused attention beats two matrix products for chunks (measured: not in bfloat16 on CPUs)."""

    def begin(self, plan: Plan) -> None:
        """What an earlier holder left in a block must not be a NaN: it is masked, but 0 * NaN is one."""
        if len(plan.begun):
            self.data.index_fill_(3, plan.begun, 0)

    def _check(self, plan: Plan) -> None:
        """Kernels read and write wherever the plan says. Raises `IntegrityError` where the cache has no such place."""
        blocks = self._shape[1]
        for numbers, end in ((plan.slots, blocks * BLOCK_TOKENS), (plan.tables[:, 1:], blocks)):
            low, high = numbers.aminmax()
            if low < 0 or high >= end:
                raise IntegrityError(f"a plan names places from {int(low)} to {int(high)}, the cache has {end}")

    def attend(self, plan: Plan, layer: int, how: Attention, q: Tensor, kv: Tensor) -> Tensor:
        """Store the pass's keys and values, then attend.

        q: [tokens, heads, head_dim]; kv: [tokens, 2 * kv_heads, head_dim], keys first. Returns [tokens, heads * head_dim].
        """
        if layer == 0:
            self.begin(plan)
        kernels, by_slot = self._kernels, self._by_slot[layer]
        if kernels is not None:
            if layer == 0:
                self._check(plan)
            kernels.write(by_slot, plan.slots, kv)
            return kernels.attend(by_slot, plan.tables, q, how.scale, how.window, how.softcap)
        by_slot.index_copy_(1, plan.slots, kv.transpose(0, 1))
        parts = [self._rows(group, layer, how, q[group.begin : group.end]) for group in plan.groups]
        parts += [self._chunk(chunk, layer, how, q[chunk.begin : chunk.end]) for chunk in plan.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _dense(self, layer: int, blocks: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each [kv_heads * rows, whole blocks, head_dim]."""
        both = self._by_block[layer].index_select(1, blocks)
        keys, values = both.view(2, self._shape[0] * rows, -1, self._shape[2])
        return keys, values

    def _rows(self, group: Group, layer: int, how: Attention, q: Tensor) -> Tensor:
        rows, heads, dim = q.shape
        kv_heads = self._shape[0]
        keys, values = self._dense(layer, group.blocks, rows)
        # The queries that share a key head become the rows of one small matrix.
        q = q.reshape(rows, kv_heads, heads // kv_heads, dim).transpose(0, 1).reshape(kv_heads * rows, -1, dim)
        out = _products(q, keys, values, group.mask(how.window, q.dtype, kv_heads), how, exact=group.exact)
        return out.view(kv_heads, rows, -1, dim).transpose(0, 1).reshape(rows, heads * dim)

    def _chunk(self, chunk: _Chunk, layer: int, how: Attention, q: Tensor) -> Tensor:
        count, heads, dim = q.shape
        kv_heads = self._shape[0]
        keys, values = self._dense(layer, chunk.blocks, 1)
        if self._fused and not how.softcap:
            mask = chunk.mask(how.window, q.dtype, 1)
            q = q.transpose(0, 1)[None]
            out = F.scaled_dot_product_attention(
                q, keys[None], values[None], attn_mask=mask, scale=how.scale, enable_gqa=True
            )
            return out[0].transpose(0, 1).reshape(count, heads * dim)
        sharing = heads // kv_heads
        q = q.reshape(count, kv_heads, sharing, dim).permute(1, 2, 0, 3).reshape(kv_heads, sharing * count, dim)
        out = _products(q, keys, values, chunk.mask(how.window, q.dtype, sharing)[None], how)
        return out.view(kv_heads, sharing, count, dim).permute(2, 0, 1, 3).reshape(count, heads * dim)


def _products(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, how: Attention, *, exact: bool = False
) -> Tensor:
    """Attention as two batched matrix products. q [n, rows, dim]; keys, values [n, tokens, dim]; mask broadcasts.

    `exact`: functions of scores see one matrix at a time; what is left over of vectors is rounded otherwise."""
    turned = keys.transpose(1, 2)
    if how.softcap:
        scores = torch.bmm(q, turned) * (how.scale / how.softcap)
        alone = exact and scores.device.type == "cpu"
        scores = torch.stack([torch.tanh(one) for one in scores]) if alone else torch.tanh(scores)
        scores = scores * how.softcap
        if mask is not None:
            scores = scores + mask
    elif mask is None:
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, turned, beta=0, alpha=how.scale)
    else:
        scores = torch.baddbmm(mask, q, turned, alpha=how.scale)
    return torch.bmm(scores.softmax(-1), values)
