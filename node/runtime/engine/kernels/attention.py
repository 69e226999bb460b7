"""Attention of single tokens over keys and values in blocks, read where they lie.

Layout of a layer's cache: [2 * kv_heads, blocks, 16, dim], keys first. Torch would copy a sequence's blocks together first
and pad all sequences of a batch to one length; that copy costs more than attending.

Source: Kwon et al. 2023 (PagedAttention).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import carray, prange
from numba.extending import register_jitable

from node.runtime.engine.blocks import BLOCK_TOKENS
from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, FLOAT, Kernel, family, kernel
from node.runtime.engine.kernels.heads import (
    ahead,
    each,
    nothing,
    products,
    reader,
    store_wide,
    totals,
    weighed,
    widened,
)
from node.runtime.engine.kernels.simd import (
    LANES,
    add,
    exps,
    greater,
    largest,
    load,
    mul,
    pointer,
    splat,
    store,
    tanh,
    total,
    zero,
)

TOGETHER: Final = 4
"""Queries that are computed together, at most: their sums are in registers, four each for heads of 64."""
AHEAD: Final = 2
"""Blocks are wanted so many before they are read: they lie anywhere, so no processor foresees them."""


@family
def write(dtype: Any) -> Kernel:
    """(rows, heads, dim, row_step, kv, slots, tokens, cache): kv [rows, heads, dim] into cache [heads, tokens, dim]."""

    @kernel(COUNT, COUNT, COUNT, COUNT, ADDRESS, ADDRESS, COUNT, ADDRESS)
    def run(rows, heads, dim, row_step, kv_at, slots_at, tokens, cache_at):  # type: ignore[no-untyped-def]
        kv = carray(pointer(kv_at), rows * row_step, dtype)
        slots = carray(pointer(slots_at), rows, np.int64)
        cache = carray(pointer(cache_at), (heads, tokens, dim), dtype)
        for r in range(rows):
            for h in range(heads):
                into, at = cache[h, slots[r]], r * row_step + h * dim
                for i in range(dim):
                    into[i] = kv[at + i]

    return run


@family
def attend(dtype: Any, dim: int, together: int, parallel: bool) -> Kernel:
    """(rows, kv_heads, sharing, row_step, q, tables, width, blocks, cache, window, scale, cap, out).

    q and out: [rows, kv_heads * sharing, dim], rows of q `row_step` numbers apart. tables: int64 [rows, 1 + width]: how many
    tokens a row sees, then its blocks. window: 0, or how many of the last tokens are seen. cap: 0, or scores s become
    cap * tanh(s / cap). `dim` is a multiple of 16; `together` of the `sharing` queries look at a key before the next is read.
    """
    if not 1 <= together <= TOGETHER:
        raise ValueError(f"{together} queries together")
    read, fetch, zeros = reader(dim), ahead(dim), nothing(dim)

    @register_jitable
    def begun(n):  # type: ignore[no-untyped-def]
        return zeros()

    @register_jitable
    def query(n, queries, at):  # type: ignore[no-untyped-def]
        return read(queries, at + n * dim)

    @register_jitable
    def score(n, qs, key, parts, at):  # type: ignore[no-untyped-def]
        store(parts, at + n * BLOCK_TOKENS * LANES, products(qs[n], key))
        return 0

    @register_jitable
    def add(n, sums, weights, at, step, value):  # type: ignore[no-untyped-def]
        return weighed(weights[at + n * step], value, sums[n])

    @register_jitable
    def write(n, sums, out, at, totals_):  # type: ignore[no-untyped-def]
        store_wide(out, at + n * dim, sums[n], np.float32(1) / totals_[n])
        return 0

    queries_of, score_all, nothings, add_all, write_all = (
        each(together, one) for one in (query, score, begun, add, write)
    )

    @kernel(
        *(COUNT, COUNT, COUNT, COUNT, ADDRESS, ADDRESS, COUNT, COUNT, ADDRESS, COUNT, FLOAT, FLOAT, ADDRESS),
        parallel=parallel,
    )
    def run(rows, kv_heads, sharing, row_step, q_at, tables_at, width, blocks, cache_at, window, scale, cap, out_at):  # type: ignore[no-untyped-def]
        queries = carray(pointer(q_at), rows * row_step, dtype)
        tables = carray(pointer(tables_at), (rows, 1 + width), np.int64)
        cache = carray(pointer(cache_at), 2 * kv_heads * blocks * BLOCK_TOKENS * dim, dtype)
        out = carray(pointer(out_at), rows * kv_heads * sharing * dim, dtype)
        for job in prange(rows * kv_heads):
            head, r = job // rows, job % rows  # rows of one sequence find its keys near
            table, seen = tables[r, 1:], tables[r, 0]
            first = max(seen - window, 0) if window > 0 else 0
            begin, end = first // BLOCK_TOKENS, (seen + BLOCK_TOKENS - 1) // BLOCK_TOKENS
            step = end * BLOCK_TOKENS
            scores = np.empty(together * step, np.float32)
            parts = np.empty(together * BLOCK_TOKENS * LANES, np.float32)
            sums, done = np.empty(together, np.float32), np.empty(together * dim, np.float32)
            for n in range(0, sharing, together):
                n = min(n, sharing - together)  # the last ones again, rather than fewer
                heads = head * sharing + n
                qs = queries_of(queries, r * row_step + heads * dim)
                for b in range(begin, end):
                    at = (head * blocks + table[b]) * BLOCK_TOKENS * dim
                    later = _later(tables, r, r, b, begin, end, head, kv_heads + head, blocks) * BLOCK_TOKENS * dim
                    for t in range(BLOCK_TOKENS):
                        fetch(cache, later + t * dim)
                        score_all(qs, read(cache, at + t * dim), parts, t * LANES)
                    for i in range(together):
                        store(
                            scores,
                            i * step + b * BLOCK_TOKENS,
                            mul(totals(parts, i * BLOCK_TOKENS * LANES), splat(scale)),
                        )
                for i in range(together):
                    sums[i] = _shares(scores, i * step, begin * BLOCK_TOKENS, first, seen, step, cap)
                values = nothings()
                for b in range(begin, end):
                    at = ((kv_heads + head) * blocks + table[b]) * BLOCK_TOKENS * dim
                    later = (
                        _later(tables, r, min(r + 1, rows - 1), b, begin, end, kv_heads + head, head, blocks)
                        * BLOCK_TOKENS
                        * dim
                    )
                    for t in range(BLOCK_TOKENS):
                        fetch(cache, later + t * dim)
                        value = widened(read(cache, at + t * dim))
                        values = add_all(values, scores, b * BLOCK_TOKENS + t, step, value)
                write_all(values, done, 0, sums)
                into = (r * kv_heads * sharing + heads) * dim
                for i in range(0, together * dim, LANES):
                    store(out, into + i, load(done, i))

    return run


@register_jitable
def _later(tables, row, next_row, b, begin, end, here, next_, blocks):  # type: ignore[no-untyped-def]
    """Which block of the cache is needed `AHEAD` blocks after b: one more of these, or one of `next_row` and `next_`."""
    b += AHEAD
    if b < end:
        return here * blocks + tables[row, 1 + b]
    last = (tables[next_row, 0] - 1) // BLOCK_TOKENS
    return next_ * blocks + tables[next_row, 1 + min(begin + b - end, last)]


@register_jitable
def _shares(scores, at, begin, first, seen, end, cap):  # type: ignore[no-untyped-def]
    """Scores of `first` to `seen` to shares of their sum, which is returned; others from `begin` to `end` to 0. begin and end are
    ends of blocks."""
    if cap > 0:
        for t in range(at + first, at + seen):
            scores[t] = cap * tanh(scores[t] / cap)
    for t in range(at + begin, at + first):
        scores[t] = -np.inf
    for t in range(at + seen, at + end):
        scores[t] = -np.inf
    highest = splat(np.float32(-np.inf))
    for t in range(at + begin, at + end, LANES):
        highest = greater(load(scores, t), highest)  # without NaN, of which the sum will have heard
    less, sums = splat(-largest(highest)), zero()
    for t in range(at + begin, at + end, LANES):
        share = exps(add(load(scores, t), less))
        store(scores, t, share)
        sums = add(sums, share)  # what is not seen adds 1e-38, or nothing
    for t in range(at + begin, at + first):
        scores[t] = np.float32(0)
    for t in range(at + seen, at + end):
        scores[t] = np.float32(0)
    return total(sums)
