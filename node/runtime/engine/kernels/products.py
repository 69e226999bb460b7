"""Products with weights that are laid out for reading.

Layout: the outputs in blocks of 64, zeros behind the last; in a block input after input, 64 numbers side by side. One input
is then one number for all sixteen lanes, and an output's sum stays in its lane: nothing is summed across a vector.

- bfloat16: two inputs side by side for each output ([out / 64, in / 2, 64, 2]). Sums are float32.
- int8: four inputs side by side ([out / 64, in / 4, 64, 4]). Sums are integers.
- int4: eight inputs side by side in four bytes ([out / 64, in / 8, 64, 4]), the first four in the lower halves; groups of 32
  inputs, each with a scale and a zero in bfloat16 ([out / 64, in / 32, 2, 64]): weight = (number - 8) * scale + zero. A
  group's sums are integers, a row's are float32.

Rows of int8 and int4 are made bytes first (`activations`). `bias` is float32, for whole blocks of 64. Results are rounded to
`dtype` once. Rows are computed by fours, what is left of them by twos or by itself, each input after the other: a row's result
has the same bits in any company. Inputs are in runs of `RUN`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import carray, prange
from numba.extending import register_jitable

from node.runtime.engine.kernels.activations import GROUP, fine, grouped, plain
from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, Kernel, family, kernel
from node.runtime.engine.kernels.simd import (
    LANES,
    add,
    dot_fours,
    dot_pairs,
    fma,
    load,
    load_lanes,
    lower_halves,
    mul,
    narrow,
    no_ints,
    pointer,
    splat,
    splat_int,
    splat_lane,
    store,
    store_ints,
    sub_ints,
    to_floats,
    upper_halves,
    zero,
)

WIDTH: Final = 64
"""Outputs of a block: four vectors, so that four sums run beside each other."""
RUN: Final = 2048
"""Inputs of a block that are read for all rows before the next are: they stay in the processor's cache meanwhile. A multiple of
`GROUP`."""


def _lanes(each: int) -> Callable[..., Any]:
    """What reads a block's four vectors of weights of `each` numbers a lane."""

    @register_jitable
    def read(weight, w):  # type: ignore[no-untyped-def]
        return (
            load_lanes(weight, w),
            load_lanes(weight, w + LANES * each),
            load_lanes(weight, w + 2 * LANES * each),
            load_lanes(weight, w + 3 * LANES * each),
        )

    return read


def _product(
    dot: Callable[..., Any], begun: Callable[..., Any], keep: Callable[..., Any], each: int
) -> Callable[..., Any]:
    """What adds up a block for all rows: sums [rows, 64] of x [rows, inputs] and weight[at :], `each` inputs a lane."""
    read = _lanes(each)

    @register_jitable
    def plus(sums, x, k, w):  # type: ignore[no-untyped-def]
        y = splat_lane(x, k)
        return dot(sums[0], y, w[0]), dot(sums[1], y, w[1]), dot(sums[2], y, w[2]), dot(sums[3], y, w[3])

    @register_jitable
    def run(rows, inputs, x, weight, at, sums):  # type: ignore[no-untyped-def]
        for begin in range(0, inputs, RUN):
            end = min(begin + RUN, inputs)
            for r in range(0, rows - 3, 4):
                a, b = begun(sums, r, begin), begun(sums, r + 1, begin)
                c, d = begun(sums, r + 2, begin), begun(sums, r + 3, begin)
                w = at + begin * WIDTH
                for k in range(r * inputs + begin, r * inputs + end, each):
                    four = read(weight, w)
                    a, b = plus(a, x, k, four), plus(b, x, k + inputs, four)
                    c, d = plus(c, x, k + 2 * inputs, four), plus(d, x, k + 3 * inputs, four)
                    w += WIDTH * each
                keep(sums, r, a)
                keep(sums, r + 1, b)
                keep(sums, r + 2, c)
                keep(sums, r + 3, d)
            for r in range(rows - rows % 4, rows - 1, 2):
                a, b, w = begun(sums, r, begin), begun(sums, r + 1, begin), at + begin * WIDTH
                for k in range(r * inputs + begin, r * inputs + end, each):
                    four = read(weight, w)
                    a, b = plus(a, x, k, four), plus(b, x, k + inputs, four)
                    w += WIDTH * each
                keep(sums, r, a)
                keep(sums, r + 1, b)
            for r in range(rows - rows % 2, rows):
                a, w = begun(sums, r, begin), at + begin * WIDTH
                for k in range(r * inputs + begin, r * inputs + end, each):
                    a = plus(a, x, k, read(weight, w))
                    w += WIDTH * each
                keep(sums, r, a)

    return run


def _sums_of(none: Callable[..., Any], read: Callable[..., Any], write: Callable[..., Any]) -> tuple[Any, Any]:
    """What takes up a row's four vectors of sums, none at the first input, and what keeps them."""

    @register_jitable
    def begun(sums, row, begin):  # type: ignore[no-untyped-def]
        at = row * WIDTH
        if begin == 0:
            return none(), none(), none(), none()
        return read(sums, at), read(sums, at + LANES), read(sums, at + 2 * LANES), read(sums, at + 3 * LANES)

    @register_jitable
    def keep(sums, row, four):  # type: ignore[no-untyped-def]
        at = row * WIDTH
        write(sums, at, four[0])
        write(sums, at + LANES, four[1])
        write(sums, at + 2 * LANES, four[2])
        write(sums, at + 3 * LANES, four[3])

    return begun, keep


_begun, _keep = _sums_of(zero, load, store)
_begun_ints, _keep_ints = _sums_of(no_ints, load_lanes, store_ints)


@register_jitable
def _write(sums, row, bias, first, outputs, out, at):  # type: ignore[no-untyped-def]
    """A block's outputs, as many as there are, to a row of results that begins at out[at]."""
    if first + WIDTH <= outputs:
        for lane in range(0, WIDTH, LANES):
            store(out, at + first + lane, add(load(sums, row * WIDTH + lane), load(bias, first + lane)))
    else:
        for o in range(first, outputs):
            out[at + o] = narrow(sums[row * WIDTH + o - first] + bias[o], out)


@family
def product_bfloat16(parallel: bool) -> Kernel:
    """(rows, inputs, outputs, x, weight, bias, out): inputs even; x and out of bfloat16."""
    sums_of = _product(dot_pairs, _begun, _keep, 2)

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, parallel=parallel)
    def run(rows, inputs, outputs, x_at, weight_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks = (outputs + WIDTH - 1) // WIDTH
        x = carray(pointer(x_at), rows * inputs, np.uint16)
        weight = carray(pointer(weight_at), blocks * WIDTH * inputs, np.uint16)
        bias = carray(pointer(bias_at), blocks * WIDTH, np.float32)
        out = carray(pointer(out_at), rows * outputs, np.uint16)
        for block in prange(blocks):
            sums = np.empty(rows * WIDTH, np.float32)
            sums_of(rows, inputs, x, weight, block * WIDTH * inputs, sums)
            for r in range(rows):
                _write(sums, r, bias, block * WIDTH, outputs, out, r * outputs)

    return run


@family
def product_int8(dtype: Any, twice: bool, parallel: bool) -> Kernel:
    """(rows, inputs, outputs, x, sizes, weight, offsets, scales, bias, out).

    twice: x is rounded by `activations.fine`, else by `activations.plain`, and `sizes` is not looked at. weight: of a multiple of
    four inputs, zeros behind the last. offsets: int32, the sum of an output's numbers, 128 times with `twice`; scales: float32.
    These two are for whole blocks of 64 outputs.
    """
    each, sums_of = 2 if twice else 1, _product(dot_fours, _begun_ints, _keep_ints, 4)

    @kernel(*(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS), parallel=parallel)
    def run(rows, inputs, outputs, x_at, sizes_at, weight_at, offsets_at, scales_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks, stride = (outputs + WIDTH - 1) // WIDTH, (inputs + 3) // 4 * 4
        x = carray(pointer(x_at), rows * inputs, dtype)
        weight = carray(pointer(weight_at), blocks * WIDTH * stride, np.int8)
        offsets = carray(pointer(offsets_at), blocks * WIDTH, np.int32)
        scales = carray(pointer(scales_at), blocks * WIDTH, np.float32)
        bias = carray(pointer(bias_at), blocks * WIDTH, np.float32)
        out = carray(pointer(out_at), rows * outputs, dtype)
        y, marks = np.empty(rows * each * stride, np.uint8), np.empty((rows, 2), np.float32)
        if twice:
            fine(x, rows, inputs, stride, carray(pointer(sizes_at), inputs, np.float32), y, marks)
        else:
            plain(x, rows, inputs, stride, y, marks)
        for block in prange(blocks):
            sums = np.empty(rows * each * WIDTH, np.int32)
            sums_of(rows * each, stride, y, weight, block * WIDTH * stride, sums)
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
    """(rows, inputs, outputs, x, weight, scales, bias, out): inputs a multiple of 32."""
    read = _lanes(4)

    @register_jitable
    def begun(total):  # type: ignore[no-untyped-def]
        """A group's sums, 8 less for each number."""
        eights = splat_int(np.int32(-8 * total))
        return eights, eights, eights, eights

    @register_jitable
    def plus(sums, y, k, lower, upper):  # type: ignore[no-untyped-def]
        one, other = splat_lane(y, k), splat_lane(y, k + 4)
        return (
            dot_fours(dot_fours(sums[0], lower[0], one), upper[0], other),
            dot_fours(dot_fours(sums[1], lower[1], one), upper[1], other),
            dot_fours(dot_fours(sums[2], lower[2], one), upper[2], other),
            dot_fours(dot_fours(sums[3], lower[3], one), upper[3], other),
        )

    @register_jitable
    def halves(four):  # type: ignore[no-untyped-def]
        return (
            (lower_halves(four[0]), lower_halves(four[1]), lower_halves(four[2]), lower_halves(four[3])),
            (upper_halves(four[0]), upper_halves(four[1]), upper_halves(four[2]), upper_halves(four[3])),
        )

    @register_jitable
    def floats(scales, at):  # type: ignore[no-untyped-def]
        return load(scales, at), load(scales, at + LANES), load(scales, at + 2 * LANES), load(scales, at + 3 * LANES)

    @register_jitable
    def keep(sums, row, group, scale, shift, step, total):  # type: ignore[no-untyped-def]
        """A group's sums, and its zeros times the sum of its inputs, both times the inputs' step, added to a row's."""
        at, step, total = row * WIDTH, splat(step), splat(np.float32(total))
        a = fma(fma(to_floats(group[0]), scale[0], mul(total, shift[0])), step, load(sums, at))
        b = fma(fma(to_floats(group[1]), scale[1], mul(total, shift[1])), step, load(sums, at + LANES))
        c = fma(fma(to_floats(group[2]), scale[2], mul(total, shift[2])), step, load(sums, at + 2 * LANES))
        d = fma(fma(to_floats(group[3]), scale[3], mul(total, shift[3])), step, load(sums, at + 3 * LANES))
        _keep(sums, row, (a, b, c, d))

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, parallel=parallel)
    def run(rows, inputs, outputs, x_at, weight_at, scales_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        blocks, groups = (outputs + WIDTH - 1) // WIDTH, inputs // GROUP
        x = carray(pointer(x_at), rows * inputs, dtype)
        weight = carray(pointer(weight_at), blocks * WIDTH * inputs // 2, np.uint8)
        scales = carray(pointer(scales_at), blocks * groups * 2 * WIDTH, np.uint16)
        bias = carray(pointer(bias_at), blocks * WIDTH, np.float32)
        out = carray(pointer(out_at), rows * outputs, dtype)
        y = np.empty(rows * inputs, np.int8)
        steps, totals = np.empty(rows * groups, np.float32), np.empty(rows * groups, np.int32)
        grouped(x, y, steps, totals)
        for block in prange(blocks):
            sums = np.zeros(rows * WIDTH, np.float32)
            for begin in range(0, groups, RUN // GROUP):
                end = min(begin + RUN // GROUP, groups)
                for r in range(0, rows - 3, 4):
                    for g in range(begin, end):
                        i, w = r * groups + g, (block * groups + g) * GROUP // 2 * WIDTH
                        a, b = begun(totals[i]), begun(totals[i + groups])
                        c, d = begun(totals[i + 2 * groups]), begun(totals[i + 3 * groups])
                        for k in range(i * GROUP, (i + 1) * GROUP, 8):
                            lower, upper = halves(read(weight, w))
                            a, b = plus(a, y, k, lower, upper), plus(b, y, k + inputs, lower, upper)
                            c, d = plus(c, y, k + 2 * inputs, lower, upper), plus(d, y, k + 3 * inputs, lower, upper)
                            w += 4 * WIDTH
                        s = (block * groups + g) * 2 * WIDTH
                        scale, shift = floats(scales, s), floats(scales, s + WIDTH)
                        keep(sums, r, a, scale, shift, steps[i], totals[i])
                        keep(sums, r + 1, b, scale, shift, steps[i + groups], totals[i + groups])
                        keep(sums, r + 2, c, scale, shift, steps[i + 2 * groups], totals[i + 2 * groups])
                        keep(sums, r + 3, d, scale, shift, steps[i + 3 * groups], totals[i + 3 * groups])
                for r in range(rows - rows % 4, rows):
                    for g in range(begin, end):
                        i, w = r * groups + g, (block * groups + g) * GROUP // 2 * WIDTH
                        a = begun(totals[i])
                        for k in range(i * GROUP, (i + 1) * GROUP, 8):
                            lower, upper = halves(read(weight, w))
                            a = plus(a, y, k, lower, upper)
                            w += 4 * WIDTH
                        s = (block * groups + g) * 2 * WIDTH
                        keep(sums, r, a, floats(scales, s), floats(scales, s + WIDTH), steps[i], totals[i])
            for r in range(rows):
                _write(sums, r, bias, block * WIDTH, outputs, out, r * outputs)

    return run
