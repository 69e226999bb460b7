"""Activations of int8 layers, from rows of numbers to rows of bytes.

Two schemes, as `engine.quantize` explains them.
- *plain*: 255 steps from a row's least number to its largest; x ~ least + byte * step.
- *fine*: 15 bits, after the inputs were multiplied by `sizes`, in two rows of bytes beside each other;
  x * size ~ ((first - 128) + (second - 128) / 254) * step.

What undoes them is in `marks`, float32 [rows, 2]: step and least; both NaN when a number of the row is not finite, so that its
result is NaN. Rows of bytes are `stride` long, zeros behind the last number.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import carray
from numba.extending import register_jitable

from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, Kernel, family, kernel
from node.runtime.engine.kernels.simd import (
    LANES,
    add,
    fma,
    greater,
    lesser,
    load,
    magnitude,
    mul,
    pointer,
    rounded,
    splat,
    store,
    store_bytes,
    total,
    wide,
    zero,
)

TINY: Final = np.float32(1e-30)
"""Ranges below it count as none: their inverse would be infinite, or close."""


@register_jitable
def _least_and_span(x, at, width):  # type: ignore[no-untyped-def]
    """Of `width` numbers from x[at] on; both NaN when one is not finite."""
    whole = width // LANES * LANES
    low = high = splat(wide(x[at]))
    odd = zero()
    for i in range(at, at + whole, LANES):
        some = load(x, i)
        low, high, odd = lesser(some, low), greater(some, high), fma(some, zero(), odd)
    lows, highs = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    store(lows, 0, low)
    store(highs, 0, high)
    least, largest, bad = lows.min(), highs.max(), total(odd)
    for i in range(at + whole, at + width):
        one = wide(x[i])
        least, largest, bad = min(least, one), max(largest, one), bad + one * np.float32(0)
    return least + bad, largest - least + bad


@register_jitable
def _largest(x, at, width, sizes):  # type: ignore[no-untyped-def]
    """Magnitude of the numbers times the sizes; NaN when one is not finite."""
    whole = width // LANES * LANES
    high = odd = zero()
    for i in range(0, whole, LANES):
        some = mul(load(x, at + i), load(sizes, i))
        high, odd = greater(magnitude(some), high), fma(some, zero(), odd)
    highs = np.empty(LANES, np.float32)
    store(highs, 0, high)
    largest, bad = highs.max(), total(odd)
    for i in range(whole, width):
        one = wide(x[at + i]) * sizes[i]
        largest, bad = max(largest, abs(one)), bad + one * np.float32(0)
    return largest + bad


@register_jitable
def _within(x, low, high):  # type: ignore[no-untyped-def]
    """Rounded to whole numbers from low to high; NaN gives low."""
    return lesser(greater(rounded(x), splat(np.float32(low))), splat(np.float32(high)))


@register_jitable
def _one_within(x, low, high):  # type: ignore[no-untyped-def]
    """The same of one number."""
    x = np.rint(x)
    x = x if x > np.float32(low) else np.float32(low)
    return x if x < np.float32(high) else np.float32(high)


@family
def plain(dtype: Any) -> Kernel:
    """(rows, width, stride, x, out, marks)."""

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, stride, x_at, out_at, marks_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), rows * width, dtype)
        out = carray(pointer(out_at), rows * stride, np.uint8)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        whole = width // LANES * LANES
        for r in range(rows):
            at, into = r * width, r * stride
            least, span = _least_and_span(x, at, width)
            marks[r, 0], marks[r, 1] = span / np.float32(255), least
            factor = (
                np.float32(255) / span if span > TINY else np.float32(0)
            )  # a row that is not finite has a span of NaN
            least = least if least == least else np.float32(0)
            below, times = splat(-least), splat(factor)
            for i in range(0, whole, LANES):
                store_bytes(out, into + i, _within(mul(add(load(x, at + i), below), times), 0, 255))
            for i in range(whole, width):
                out[into + i] = np.uint8(_one_within((wide(x[at + i]) - least) * factor, 0, 255))
            for i in range(width, stride):
                out[into + i] = 0

    return run


@family
def fine(dtype: Any) -> Kernel:
    """(rows, width, stride, x, sizes, out, marks); out has two rows for each."""

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, stride, x_at, sizes_at, out_at, marks_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), rows * width, dtype)
        sizes = carray(pointer(sizes_at), width, np.float32)
        out = carray(pointer(out_at), rows * 2 * stride, np.uint8)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        whole = width // LANES * LANES
        middle, parts = splat(np.float32(128)), splat(np.float32(254))
        for r in range(rows):
            at, first, second = r * width, 2 * r * stride, (2 * r + 1) * stride
            largest = _largest(x, at, width, sizes)
            marks[r, 0] = marks[r, 1] = largest / np.float32(127)
            factor = np.float32(127) / largest if largest > TINY else np.float32(0)
            times, minus = splat(factor), splat(np.float32(-1))
            for i in range(0, whole, LANES):
                scaled = mul(mul(load(x, at + i), load(sizes, i)), times)
                coarse = _within(scaled, -127, 127)
                rest = _within(mul(fma(coarse, minus, scaled), parts), -127, 127)
                store_bytes(out, first + i, add(coarse, middle))
                store_bytes(out, second + i, add(rest, middle))
            for i in range(whole, width):
                scaled_one = wide(x[at + i]) * sizes[i] * factor
                coarse_one = _one_within(scaled_one, -127, 127)
                rest_one = _one_within((scaled_one - coarse_one) * np.float32(254), -127, 127)
                out[first + i] = np.uint8(coarse_one + np.float32(128))
                out[second + i] = np.uint8(rest_one + np.float32(128))
            for i in range(width, stride):
                out[first + i] = out[second + i] = 0

    return run
