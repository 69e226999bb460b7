"""Attention of single tokens over keys and values in blocks, read where they lie.

Layout of a layer's cache: [2 * kv_heads, blocks, 16, dim], keys first. Torch would copy a sequence's blocks together first
and pad all sequences of a batch to one length; that copy costs more than attending.

Source: Kwon et al. 2023 (PagedAttention).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import carray, prange

from node.runtime.engine.blocks import BLOCK_TOKENS
from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, FLOAT, kernel
from node.runtime.engine.kernels.simd import LANES, exp, fma, load, mul, pointer, splat, store, tanh, total, zero


@cache
def write(dtype: Any) -> Callable[..., None]:
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


@cache
def attend(dtype: Any, dim: int, parallel: bool) -> Callable[..., None]:
    """(rows, kv_heads, sharing, row_step, q, tables, width, blocks, cache, window, scale, cap, out).

    q and out: [rows, kv_heads * sharing, dim], rows of q `row_step` numbers apart. tables: int64 [rows, 1 + width]: how many
    tokens a row sees, then its blocks. window: 0, or how many of the last tokens are seen. cap: 0, or scores s become
    cap * tanh(s / cap). `dim` is a multiple of 16.
    """
    parts = dim // LANES

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
            r, head = job // kv_heads, job % kv_heads
            table = tables[r, 1:]
            seen = tables[r, 0]
            first = max(seen - window, 0) if window > 0 else 0
            begin, end = first // BLOCK_TOKENS, (seen + BLOCK_TOKENS - 1) // BLOCK_TOKENS
            q, acc = np.empty(dim, np.float32), np.empty(dim, np.float32)
            scores = np.empty(end * BLOCK_TOKENS, np.float32)
            for n in range(head * sharing, (head + 1) * sharing):
                for c in range(parts):
                    store(q, c * LANES, mul(load(queries, r * row_step + n * dim + c * LANES), splat(scale)))
                    store(acc, c * LANES, zero())
                for b in range(begin, end):
                    keys = (head * blocks + table[b]) * BLOCK_TOKENS * dim
                    for t in range(BLOCK_TOKENS):
                        products = zero()
                        for c in range(parts):
                            products = fma(load(q, c * LANES), load(cache, keys + t * dim + c * LANES), products)
                        scores[b * BLOCK_TOKENS + t] = total(products)
                if cap > 0:
                    for t in range(first, seen):
                        scores[t] = cap * tanh(scores[t] / cap)
                highest = scores[first]
                for t in range(first, seen):
                    highest = max(highest, scores[t])
                sum_ = np.float32(0)
                for t in range(first, seen):
                    weight = exp(scores[t] - highest)
                    scores[t] = weight
                    sum_ += weight
                for t in range(begin * BLOCK_TOKENS, first):
                    scores[t] = np.float32(0)
                for t in range(seen, end * BLOCK_TOKENS):
                    scores[t] = np.float32(0)
                for b in range(begin, end):
                    values = ((kv_heads + head) * blocks + table[b]) * BLOCK_TOKENS * dim
                    for c in range(parts):
                        part = load(acc, c * LANES)
                        for t in range(BLOCK_TOKENS):
                            seen_value = load(cache, values + t * dim + c * LANES)
                            part = fma(splat(scores[b * BLOCK_TOKENS + t]), seen_value, part)
                        store(acc, c * LANES, part)
                for c in range(parts):
                    into = (r * kv_heads * sharing + n) * dim + c * LANES
                    store(out, into, mul(load(acc, c * LANES), splat(np.float32(1) / sum_)))

    return run
