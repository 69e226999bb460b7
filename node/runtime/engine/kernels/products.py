"""Products with weights that are laid out for reading.

Layout: the outputs in blocks of 64, zeros behind the last; in a block input after input, 64 numbers side by side. One input
is then one number for all sixteen lanes, and an output's sum stays in its lane: nothing is summed across a vector.

- bfloat16: two inputs side by side for each output ([out / 64, in / 2, 64, 2]). Rows are bfloat16, sums float32.
- int8: four inputs side by side ([out / 64, in / 4, 64, 4]), rows as `int8` makes bytes of them. Sums are integers.
- int4, for few rows: two inputs a byte, the first in the lower half; groups of 32 inputs, each with a scale and a zero in
  bfloat16 ([out / 64, in / 32, 2, 64]): weight = (number - 8) * scale + zero. Rows are float32,
  sums too. For many rows `unpack_int4`.

`bias` is float32 [out]. Results are rounded to `dtype` once. bfloat16 and int8 are computed four rows at a time, always, and
inputs in runs of `RUN`: a row's result has the same bits in any company.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import carray, prange
from numba.extending import register_jitable

from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, Kernel, family, kernel
from node.runtime.engine.kernels.simd import (
    LANES,
    add,
    dot_fours,
    dot_pairs,
    fma,
    load,
    load_lanes,
    lower_half,
    mul,
    narrow,
    no_ints,
    pointer,
    splat,
    splat_lane,
    store,
    store_ints,
    sub_ints,
    to_floats,
    upper_half,
    zero,
)

WIDTH: Final = 64
"""Outputs of a block: four vectors, so that four sums run beside each other."""
GROUP: Final = 32
RUN: Final = 2048
"""Inputs of a block that are read for all rows before the next are: they stay in the processor's cache meanwhile."""


@family
def product_bfloat16(parallel: bool) -> Kernel:
    """(rows, inputs, outputs, x, weight, bias, out): inputs even; x has whole fours of rows, of bfloat16 like out."""

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, parallel=parallel)
    def run(rows, inputs, outputs, x_at, weight_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks, fours = (outputs + WIDTH - 1) // WIDTH, (rows + 3) // 4
        x = carray(pointer(x_at), fours * 4 * inputs, np.uint16)
        weight = carray(pointer(weight_at), blocks * WIDTH * inputs, np.uint16)
        bias = carray(pointer(bias_at), outputs, np.float32)
        out = carray(pointer(out_at), rows * outputs, np.uint16)
        for block in prange(blocks):
            sums = np.empty(fours * 4 * WIDTH, np.float32)
            for begin in range(0, inputs, RUN):
                end = min(begin + RUN, inputs)
                for four in range(fours):
                    at, w = four * 4 * inputs, (block * inputs + begin) * WIDTH
                    a0, a1, a2, a3 = _begun(sums, four * 4, begin)
                    b0, b1, b2, b3 = _begun(sums, four * 4 + 1, begin)
                    c0, c1, c2, c3 = _begun(sums, four * 4 + 2, begin)
                    d0, d1, d2, d3 = _begun(sums, four * 4 + 3, begin)
                    for k in range(at + begin, at + end, 2):
                        w0, w1 = load_lanes(weight, w), load_lanes(weight, w + 32)
                        w2, w3 = load_lanes(weight, w + 64), load_lanes(weight, w + 96)
                        y = splat_lane(x, k)
                        a0, a1, a2, a3 = (
                            dot_pairs(a0, y, w0),
                            dot_pairs(a1, y, w1),
                            dot_pairs(a2, y, w2),
                            dot_pairs(a3, y, w3),
                        )
                        y = splat_lane(x, k + inputs)
                        b0, b1, b2, b3 = (
                            dot_pairs(b0, y, w0),
                            dot_pairs(b1, y, w1),
                            dot_pairs(b2, y, w2),
                            dot_pairs(b3, y, w3),
                        )
                        y = splat_lane(x, k + 2 * inputs)
                        c0, c1, c2, c3 = (
                            dot_pairs(c0, y, w0),
                            dot_pairs(c1, y, w1),
                            dot_pairs(c2, y, w2),
                            dot_pairs(c3, y, w3),
                        )
                        y = splat_lane(x, k + 3 * inputs)
                        d0, d1, d2, d3 = (
                            dot_pairs(d0, y, w0),
                            dot_pairs(d1, y, w1),
                            dot_pairs(d2, y, w2),
                            dot_pairs(d3, y, w3),
                        )
                        w += 128
                    _keep(sums, four * 4, a0, a1, a2, a3)
                    _keep(sums, four * 4 + 1, b0, b1, b2, b3)
                    _keep(sums, four * 4 + 2, c0, c1, c2, c3)
                    _keep(sums, four * 4 + 3, d0, d1, d2, d3)
            for r in range(rows):
                _write(sums, r, bias, block * WIDTH, outputs, out, r * outputs)

    return run


@family
def product_int8(dtype: Any, twice: bool, parallel: bool) -> Kernel:
    """(rows, inputs, outputs, x, marks, weight, offsets, scales, bias, out).

    inputs: a multiple of four, as wide as rows of bytes. twice: rows of bytes are in pairs (`int8.fine`). x: whole fours of rows
    of bytes. offsets: int32, the sum of an output's numbers, 128 times with `twice`; scales: float32. These two and bias are for
    whole blocks of 64 outputs.
    """
    each = 2 if twice else 1

    @kernel(*(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS), parallel=parallel)
    def run(rows, inputs, outputs, x_at, marks_at, weight_at, offsets_at, scales_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks, fours = (outputs + WIDTH - 1) // WIDTH, (rows * each + 3) // 4
        x = carray(pointer(x_at), fours * 4 * inputs, np.uint8)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        weight = carray(pointer(weight_at), blocks * WIDTH * inputs, np.int8)
        offsets = carray(pointer(offsets_at), blocks * WIDTH, np.int32)
        scales = carray(pointer(scales_at), blocks * WIDTH, np.float32)
        bias = carray(pointer(bias_at), blocks * WIDTH, np.float32)
        out = carray(pointer(out_at), rows * outputs, dtype)
        for block in prange(blocks):
            sums = np.empty(fours * 4 * WIDTH, np.int32)
            for begin in range(0, inputs, RUN):
                end = min(begin + RUN, inputs)
                for four in range(fours):
                    at, w = four * 4 * inputs, (block * inputs + begin) * WIDTH
                    a0, a1, a2, a3 = _begun_ints(sums, four * 4, begin)
                    b0, b1, b2, b3 = _begun_ints(sums, four * 4 + 1, begin)
                    c0, c1, c2, c3 = _begun_ints(sums, four * 4 + 2, begin)
                    d0, d1, d2, d3 = _begun_ints(sums, four * 4 + 3, begin)
                    for k in range(at + begin, at + end, 4):
                        w0, w1 = load_lanes(weight, w), load_lanes(weight, w + 64)
                        w2, w3 = load_lanes(weight, w + 128), load_lanes(weight, w + 192)
                        y = splat_lane(x, k)
                        a0, a1, a2, a3 = (
                            dot_fours(a0, y, w0),
                            dot_fours(a1, y, w1),
                            dot_fours(a2, y, w2),
                            dot_fours(a3, y, w3),
                        )
                        y = splat_lane(x, k + inputs)
                        b0, b1, b2, b3 = (
                            dot_fours(b0, y, w0),
                            dot_fours(b1, y, w1),
                            dot_fours(b2, y, w2),
                            dot_fours(b3, y, w3),
                        )
                        y = splat_lane(x, k + 2 * inputs)
                        c0, c1, c2, c3 = (
                            dot_fours(c0, y, w0),
                            dot_fours(c1, y, w1),
                            dot_fours(c2, y, w2),
                            dot_fours(c3, y, w3),
                        )
                        y = splat_lane(x, k + 3 * inputs)
                        d0, d1, d2, d3 = (
                            dot_fours(d0, y, w0),
                            dot_fours(d1, y, w1),
                            dot_fours(d2, y, w2),
                            dot_fours(d3, y, w3),
                        )
                        w += 256
                    _keep_ints(sums, four * 4, a0, a1, a2, a3)
                    _keep_ints(sums, four * 4 + 1, b0, b1, b2, b3)
                    _keep_ints(sums, four * 4 + 2, c0, c1, c2, c3)
                    _keep_ints(sums, four * 4 + 3, d0, d1, d2, d3)
            first, done = block * WIDTH, np.empty(WIDTH, np.float32)
            for r in range(rows):
                step, least = splat(marks[r, 0]), splat(marks[r, 1])
                for lane in range(0, WIDTH, LANES):
                    o, here = first + lane, r * each * WIDTH + lane
                    if twice:  # both rows of bytes are 128 more than what they stand for
                        more = load_lanes(offsets, o)
                        coarse = to_floats(sub_ints(load_lanes(sums, here), more))
                        rest = to_floats(sub_ints(load_lanes(sums, here + WIDTH), more))
                        value = mul(fma(rest, splat(np.float32(1 / 254)), coarse), step)
                    else:
                        value = mul(to_floats(load_lanes(offsets, o)), least)
                        value = fma(to_floats(load_lanes(sums, here)), step, value)
                    store(done, lane, mul(value, load(scales, o)))
                _write(done, 0, bias, first, outputs, out, r * outputs)

    return run


@family
def product_int4(dtype: Any, parallel: bool) -> Kernel:
    """(rows, inputs, outputs, x, weight, scales, bias, out): one row, or an even number; inputs a multiple of 32."""

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, parallel=parallel)
    def run(rows, inputs, outputs, x_at, weight_at, scales_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks, groups = (outputs + WIDTH - 1) // WIDTH, inputs // GROUP
        x = carray(pointer(x_at), rows * inputs, np.float32)
        weight = carray(pointer(weight_at), blocks * WIDTH * inputs // 2, np.int8)
        scales = carray(pointer(scales_at), blocks * groups * 2 * WIDTH, np.uint16)
        bias = carray(pointer(bias_at), outputs, np.float32)
        out = carray(pointer(out_at), rows * outputs, dtype)
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
                _write(sums, 0, bias, first, outputs, out, 0)
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
                _write(sums, 0, bias, first, outputs, out, r * outputs)
                _write(sums, 1, bias, first, outputs, out, (r + 1) * outputs)

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


@family
def unpack_int4(parallel: bool) -> Kernel:
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
def _begun(sums, row, begin):  # type: ignore[no-untyped-def]
    """A row's sums so far: none at the first input."""
    at = row * WIDTH
    if begin == 0:
        return zero(), zero(), zero(), zero()
    return load(sums, at), load(sums, at + LANES), load(sums, at + 2 * LANES), load(sums, at + 3 * LANES)


@register_jitable
def _begun_ints(sums, row, begin):  # type: ignore[no-untyped-def]
    at = row * WIDTH
    if begin == 0:
        return no_ints(), no_ints(), no_ints(), no_ints()
    return (
        load_lanes(sums, at),
        load_lanes(sums, at + LANES),
        load_lanes(sums, at + 2 * LANES),
        load_lanes(sums, at + 3 * LANES),
    )


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
def _write(sums, row, bias, first, outputs, out, at):  # type: ignore[no-untyped-def]
    """A block's outputs, as many as there are, to a row of results that begins at out[at]."""
    if first + WIDTH <= outputs:
        for lane in range(0, WIDTH, LANES):
            store(out, at + first + lane, add(load(sums, row * WIDTH + lane), load(bias, first + lane)))
    else:
        for o in range(first, outputs):
            out[at + o] = narrow(sums[row * WIDTH + o - first] + bias[o], out)
