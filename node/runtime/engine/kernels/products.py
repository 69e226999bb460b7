"""Products with weights that are laid out for reading.

Layout: the outputs in blocks of 64, zeros behind the last; in a block input after input, 64 numbers side by side. One input
is then one number for all sixteen lanes, and an output's sum stays in its lane: nothing is summed across a vector.

- bfloat16, for few rows: limited by how fast the weight can be read. Rows are float32, sums too.
- int8: four inputs side by side for each output ([out / 64, in / 4, 64, 4]), rows as `int8` makes bytes of them. Sums are
  integers, so a row's result has the same bits in any company.
- int4, for few rows: two inputs a byte, the first in the lower half; groups of 32 inputs, each with a scale and a zero in
  bfloat16 ([out / 64, in / 32, 2, 64]): weight = (number - 8) * scale + zero. Rows are float32, sums too. For many rows `unpack_int4`.

`bias` is float32 [out]. Results are rounded to `dtype` once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import carray, prange
from numba.extending import register_jitable

from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, kernel
from node.runtime.engine.kernels.simd import (
    LANES,
    dot_fours,
    fma,
    load,
    load_fours,
    lower_half,
    narrow,
    no_ints,
    pointer,
    splat,
    splat_four,
    store,
    store_ints,
    upper_half,
    zero,
)

WIDTH: Final = 64
"""Outputs of a block: four vectors, so that four sums run beside each other."""
GROUP: Final = 32


@cache
def product_bfloat16(dtype: Any, parallel: bool) -> Callable[..., None]:
    """(rows, inputs, outputs, x, weight, bias, out): one row, or a multiple of four."""

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, parallel=parallel)
    def run(rows, inputs, outputs, x_at, weight_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks = (outputs + WIDTH - 1) // WIDTH
        x = carray(pointer(x_at), rows * inputs, np.float32)
        weight = carray(pointer(weight_at), blocks * WIDTH * inputs, np.uint16)
        bias = carray(pointer(bias_at), outputs, np.float32)
        out = carray(pointer(out_at), (rows, outputs), dtype)
        for block in prange(blocks):
            at, first = block * WIDTH * inputs, block * WIDTH
            sums = np.empty(4 * WIDTH, np.float32)
            if rows == 1:
                a0, a1, a2, a3 = zero(), zero(), zero(), zero()
                for k in range(inputs):
                    one, w = splat(x[k]), at + k * WIDTH
                    a0 = fma(load(weight, w), one, a0)
                    a1 = fma(load(weight, w + LANES), one, a1)
                    a2 = fma(load(weight, w + 2 * LANES), one, a2)
                    a3 = fma(load(weight, w + 3 * LANES), one, a3)
                _keep(sums, 0, a0, a1, a2, a3)
                _write(sums, 0, bias, first, out[0])
            for r in range(0, rows - 3, 4):
                x0, x1, x2, x3 = r * inputs, (r + 1) * inputs, (r + 2) * inputs, (r + 3) * inputs
                a0, a1, a2, a3 = zero(), zero(), zero(), zero()
                b0, b1, b2, b3 = zero(), zero(), zero(), zero()
                c0, c1, c2, c3 = zero(), zero(), zero(), zero()
                d0, d1, d2, d3 = zero(), zero(), zero(), zero()
                for k in range(inputs):
                    w = at + k * WIDTH
                    w0, w1 = load(weight, w), load(weight, w + LANES)
                    w2, w3 = load(weight, w + 2 * LANES), load(weight, w + 3 * LANES)
                    one = splat(x[x0 + k])
                    a0, a1, a2, a3 = fma(w0, one, a0), fma(w1, one, a1), fma(w2, one, a2), fma(w3, one, a3)
                    one = splat(x[x1 + k])
                    b0, b1, b2, b3 = fma(w0, one, b0), fma(w1, one, b1), fma(w2, one, b2), fma(w3, one, b3)
                    one = splat(x[x2 + k])
                    c0, c1, c2, c3 = fma(w0, one, c0), fma(w1, one, c1), fma(w2, one, c2), fma(w3, one, c3)
                    one = splat(x[x3 + k])
                    d0, d1, d2, d3 = fma(w0, one, d0), fma(w1, one, d1), fma(w2, one, d2), fma(w3, one, d3)
                _keep(sums, 0, a0, a1, a2, a3)
                _keep(sums, 1, b0, b1, b2, b3)
                _keep(sums, 2, c0, c1, c2, c3)
                _keep(sums, 3, d0, d1, d2, d3)
                for n in range(4):
                    _write(sums, n, bias, first, out[r + n])

    return run


@cache
def product_int8(dtype: Any, twice: bool, parallel: bool) -> Callable[..., None]:
    """(rows, inputs, outputs, x, marks, weight, sums, scales, bias, out).

    inputs: a multiple of four, as wide as rows of bytes. twice: rows of bytes are in pairs (`int8.fine`). x: as many rows
    of bytes as make whole fours. sums: int32 [out], of a weight's numbers; scales: float32 [out].
    """
    each = 2 if twice else 1

    @kernel(*(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS), parallel=parallel)
    def run(rows, inputs, outputs, x_at, marks_at, weight_at, sums_at, scales_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks, fours = (outputs + WIDTH - 1) // WIDTH, (rows * each + 3) // 4
        x = carray(pointer(x_at), fours * 4 * inputs, np.uint8)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        weight = carray(pointer(weight_at), blocks * WIDTH * inputs, np.int8)
        sums = carray(pointer(sums_at), outputs, np.int32)
        scales = carray(pointer(scales_at), outputs, np.float32)
        bias = carray(pointer(bias_at), outputs, np.float32)
        out = carray(pointer(out_at), (rows, outputs), dtype)
        for block in prange(blocks):
            first = block * WIDTH
            last = min(first + WIDTH, outputs)
            found = np.empty(4 * WIDTH, np.int32)
            for four in range(fours):
                at, w = four * 4 * inputs, first * inputs
                a0 = a1 = a2 = a3 = no_ints()
                b0 = b1 = b2 = b3 = no_ints()
                c0 = c1 = c2 = c3 = no_ints()
                d0 = d1 = d2 = d3 = no_ints()
                for k in range(at, at + inputs, 4):
                    w0, w1 = load_fours(weight, w), load_fours(weight, w + 64)
                    w2, w3 = load_fours(weight, w + 128), load_fours(weight, w + 192)
                    y = splat_four(x, k)
                    a0, a1, a2, a3 = (
                        dot_fours(a0, y, w0),
                        dot_fours(a1, y, w1),
                        dot_fours(a2, y, w2),
                        dot_fours(a3, y, w3),
                    )
                    y = splat_four(x, k + inputs)
                    b0, b1, b2, b3 = (
                        dot_fours(b0, y, w0),
                        dot_fours(b1, y, w1),
                        dot_fours(b2, y, w2),
                        dot_fours(b3, y, w3),
                    )
                    y = splat_four(x, k + 2 * inputs)
                    c0, c1, c2, c3 = (
                        dot_fours(c0, y, w0),
                        dot_fours(c1, y, w1),
                        dot_fours(c2, y, w2),
                        dot_fours(c3, y, w3),
                    )
                    y = splat_four(x, k + 3 * inputs)
                    d0, d1, d2, d3 = (
                        dot_fours(d0, y, w0),
                        dot_fours(d1, y, w1),
                        dot_fours(d2, y, w2),
                        dot_fours(d3, y, w3),
                    )
                    w += 256
                _keep_ints(found, 0, a0, a1, a2, a3)
                _keep_ints(found, 1, b0, b1, b2, b3)
                _keep_ints(found, 2, c0, c1, c2, c3)
                _keep_ints(found, 3, d0, d1, d2, d3)
                for n in range(4 // each):
                    r = four * (4 // each) + n
                    if r >= rows:
                        break
                    step, least, into = marks[r, 0], marks[r, 1], out[r]
                    for o in range(first, last):
                        total = np.float32(sums[o])
                        here = found[n * each * WIDTH + o - first]
                        if twice:
                            beside = found[(n * each + 1) * WIDTH + o - first]
                            coarse, rest = np.float32(here - 128 * sums[o]), np.float32(beside - 128 * sums[o])
                            value = (coarse + rest / np.float32(254)) * step * scales[o]
                        else:
                            value = (np.float32(here) * step + least * total) * scales[o]
                        into[o] = narrow(value + bias[o], into)

    return run


@cache
def product_int4(dtype: Any, parallel: bool) -> Callable[..., None]:
    """(rows, inputs, outputs, x, weight, scales, bias, out): one row, or an even number; inputs a multiple of 32."""

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, parallel=parallel)
    def run(rows, inputs, outputs, x_at, weight_at, scales_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks, groups = (outputs + WIDTH - 1) // WIDTH, inputs // GROUP
        x = carray(pointer(x_at), rows * inputs, np.float32)
        weight = carray(pointer(weight_at), blocks * WIDTH * inputs // 2, np.int8)
        scales = carray(pointer(scales_at), blocks * groups * 2 * WIDTH, np.uint16)
        bias = carray(pointer(bias_at), outputs, np.float32)
        out = carray(pointer(out_at), (rows, outputs), dtype)
        totals = np.zeros(rows * groups, np.float32)  # of a group's inputs: what its zero is multiplied by
        for g in range(rows * groups):
            for k in range(GROUP):
                totals[g] += x[g * GROUP + k]
        for block in prange(blocks):
            first = block * WIDTH
            sums = np.empty(2 * WIDTH, np.float32)
            if rows == 1:
                s0, s1, s2, s3 = zero(), zero(), zero(), zero()
                for g in range(groups):
                    all_ = totals[g]
                    a0 = a1 = a2 = a3 = splat(np.float32(-8) * all_)
                    w = (block * groups + g) * GROUP // 2 * WIDTH
                    for k in range(g * GROUP, (g + 1) * GROUP, 2):
                        one, other = splat(x[k]), splat(x[k + 1])
                        a0 = fma(upper_half(weight, w), other, fma(lower_half(weight, w), one, a0))
                        a1 = fma(upper_half(weight, w + 16), other, fma(lower_half(weight, w + 16), one, a1))
                        a2 = fma(upper_half(weight, w + 32), other, fma(lower_half(weight, w + 32), one, a2))
                        a3 = fma(upper_half(weight, w + 48), other, fma(lower_half(weight, w + 48), one, a3))
                        w += WIDTH
                    s0, s1, s2, s3 = _scaled(scales, (block * groups + g) * 2, all_, a0, a1, a2, a3, s0, s1, s2, s3)
                _keep(sums, 0, s0, s1, s2, s3)
                _write(sums, 0, bias, first, out[0])
            for r in range(0, rows - 1, 2):
                s0, s1, s2, s3 = zero(), zero(), zero(), zero()
                t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                for g in range(groups):
                    all_, each = totals[r * groups + g], totals[(r + 1) * groups + g]
                    a0 = a1 = a2 = a3 = splat(np.float32(-8) * all_)
                    b0 = b1 = b2 = b3 = splat(np.float32(-8) * each)
                    w = (block * groups + g) * GROUP // 2 * WIDTH
                    for k in range(r * inputs + g * GROUP, r * inputs + (g + 1) * GROUP, 2):
                        one, other = splat(x[k]), splat(x[k + inputs])
                        w0, w1 = lower_half(weight, w), lower_half(weight, w + 16)
                        w2, w3 = lower_half(weight, w + 32), lower_half(weight, w + 48)
                        a0, a1, a2, a3 = fma(w0, one, a0), fma(w1, one, a1), fma(w2, one, a2), fma(w3, one, a3)
                        b0, b1, b2, b3 = fma(w0, other, b0), fma(w1, other, b1), fma(w2, other, b2), fma(w3, other, b3)
                        one, other = splat(x[k + 1]), splat(x[k + 1 + inputs])
                        w0, w1 = upper_half(weight, w), upper_half(weight, w + 16)
                        w2, w3 = upper_half(weight, w + 32), upper_half(weight, w + 48)
                        a0, a1, a2, a3 = fma(w0, one, a0), fma(w1, one, a1), fma(w2, one, a2), fma(w3, one, a3)
                        b0, b1, b2, b3 = fma(w0, other, b0), fma(w1, other, b1), fma(w2, other, b2), fma(w3, other, b3)
                        w += WIDTH
                    at = (block * groups + g) * 2
                    s0, s1, s2, s3 = _scaled(scales, at, all_, a0, a1, a2, a3, s0, s1, s2, s3)
                    t0, t1, t2, t3 = _scaled(scales, at, each, b0, b1, b2, b3, t0, t1, t2, t3)
                _keep(sums, 0, s0, s1, s2, s3)
                _keep(sums, 1, t0, t1, t2, t3)
                _write(sums, 0, bias, first, out[r])
                _write(sums, 1, bias, first, out[r + 1])

    return run


@register_jitable
def _scaled(scales, group, all_, a, b, c, d, s, t, u, v):  # type: ignore[no-untyped-def]
    """The group's sums times their scales, and the sum of its inputs times the zeros, added to s, t, u, v."""
    at, whole = group * WIDTH, splat(all_)
    s = fma(a, load(scales, at), fma(whole, load(scales, at + WIDTH), s))
    t = fma(b, load(scales, at + 16), fma(whole, load(scales, at + 16 + WIDTH), t))
    u = fma(c, load(scales, at + 32), fma(whole, load(scales, at + 32 + WIDTH), u))
    v = fma(d, load(scales, at + 48), fma(whole, load(scales, at + 48 + WIDTH), v))
    return s, t, u, v


@cache
def unpack_int4(parallel: bool) -> Callable[..., None]:
    """(inputs, outputs, weight, scales, out): the weight in bfloat16 [in, outputs], outputs a multiple of 64."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, parallel=parallel)
    def run(inputs, outputs, weight_at, scales_at, out_at):  # type: ignore[no-untyped-def]
        groups = inputs // GROUP
        weight = carray(pointer(weight_at), outputs * inputs // 2, np.int8)
        scales = carray(pointer(scales_at), outputs * groups * 2, np.uint16)
        out = carray(pointer(out_at), inputs * outputs, np.uint16)
        eight = splat(np.float32(-8))
        for block in prange(outputs // WIDTH):
            for g in range(groups):
                for lane in range(0, WIDTH, LANES):
                    s = (block * groups + g) * 2 * WIDTH + lane
                    scale, shift = load(scales, s), load(scales, s + WIDTH)
                    shift = fma(eight, scale, shift)
                    w = (block * groups + g) * GROUP // 2 * WIDTH + lane
                    for k in range(g * GROUP, (g + 1) * GROUP, 2):
                        into = k * outputs + block * WIDTH + lane
                        store(out, into, fma(lower_half(weight, w), scale, shift))
                        store(out, into + outputs, fma(upper_half(weight, w), scale, shift))
                        w += WIDTH

    return run


@register_jitable
def _keep(sums, row, a, b, c, d):  # type: ignore[no-untyped-def]
    at = row * WIDTH
    store(sums, at, a)
    store(sums, at + LANES, b)
    store(sums, at + 2 * LANES, c)
    store(sums, at + 3 * LANES, d)


@register_jitable
def _keep_ints(sums, row, a, b, c, d):  # type: ignore[no-untyped-def]
    at = row * WIDTH
    store_ints(sums, at, a)
    store_ints(sums, at + LANES, b)
    store_ints(sums, at + 2 * LANES, c)
    store_ints(sums, at + 3 * LANES, d)


@register_jitable
def _write(sums, row, bias, first, out):  # type: ignore[no-untyped-def]
    """A block's outputs, as many as there are."""
    for o in range(first, min(first + WIDTH, len(out))):
        out[o] = narrow(sums[row * WIDTH + o - first] + bias[o], out)
