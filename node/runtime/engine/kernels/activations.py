"""Activations of int8 and int4 layers, from rows of numbers to rows of bytes.

Three schemes, as `engine.quantize` explains them.
- *plain*: 255 steps from a row's least number to its largest; x ~ least + byte * step.
- *fine*: 15 bits, after the inputs were multiplied by `sizes`, in two rows of bytes beside each other;
  x * size ~ ((first - 128) + (second - 128) / 254) * step.
- *grouped*, for int4: each 32 inputs have 127 steps to both sides of zero, up to their largest magnitude; x ~ byte * step, with
  sign.

What undoes the first two is in `marks`, float32 [rows, 2]: step and least; both NaN when a number of the row is not finite, so
that its result is NaN. Rows of bytes are `stride` long, zeros behind the last number.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba.extending import register_jitable

from node.runtime.engine.kernels.simd import (
    LANES,
    add,
    fma,
    greater,
    largest,
    lesser,
    load,
    magnitude,
    mul,
    rounded,
    splat,
    store,
    store_bytes,
    total,
    wide,
    zero,
)

GROUP: Final = 32
"""Inputs of an int4 weight that share a scale and a zero."""
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
    least, most, bad = lows.min(), highs.max(), total(odd)
    for i in range(at + whole, at + width):
        one = wide(x[i])
        least, most, bad = min(least, one), max(most, one), bad + one * np.float32(0)
    return least + bad, most - least + bad


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
    most, bad = highs.max(), total(odd)
    for i in range(whole, width):
        one = wide(x[at + i]) * sizes[i]
        most, bad = max(most, abs(one)), bad + one * np.float32(0)
    return most + bad


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


@register_jitable
def plain(x, rows, width, stride, out, marks):  # type: ignore[no-untyped-def]
    whole = width // LANES * LANES
    for r in range(rows):
        at, into = r * width, r * stride
        least, span = _least_and_span(x, at, width)
        marks[r, 0], marks[r, 1] = span / np.float32(255), least
        # A row that is not finite has a span of NaN.
        factor = np.float32(255) / span if span > TINY else np.float32(0)
        least = least if least == least else np.float32(0)
        below, times = splat(-least), splat(factor)
        for i in range(0, whole, LANES):
            store_bytes(out, into + i, _within(mul(add(load(x, at + i), below), times), 0, 255))
        for i in range(whole, width):
            out[into + i] = np.uint8(_one_within((wide(x[at + i]) - least) * factor, 0, 255))
        for i in range(width, stride):
            out[into + i] = 0


@register_jitable
def fine(x, rows, width, stride, sizes, out, marks):  # type: ignore[no-untyped-def]
    """out has two rows for each."""
    whole = width // LANES * LANES
    middle, parts, minus = splat(np.float32(128)), splat(np.float32(254)), splat(np.float32(-1))
    for r in range(rows):
        at, first, second = r * width, 2 * r * stride, (2 * r + 1) * stride
        most = _largest(x, at, width, sizes)
        marks[r, 0] = marks[r, 1] = most / np.float32(127)
        factor = np.float32(127) / most if most > TINY else np.float32(0)
        times = splat(factor)
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


@register_jitable
def grouped(x, out, steps, totals):  # type: ignore[no-untyped-def]
    """Of all rows, whose width is whole groups. steps: float32, one a group, NaN where a number of it is not finite; totals:
    int32, the sums of the groups' bytes."""
    for g in range(len(steps)):
        one, other = load(x, g * GROUP), load(x, g * GROUP + LANES)
        bad = total(fma(one, zero(), mul(other, zero())))
        most = largest(greater(magnitude(one), magnitude(other)))
        times = splat(np.float32(127) / most if most > TINY else np.float32(0))
        one, other = _within(mul(one, times), -127, 127), _within(mul(other, times), -127, 127)
        steps[g] = most / np.float32(127) + bad
        totals[g] = np.int32(total(add(one, other)))
        store_bytes(out, g * GROUP, one)
        store_bytes(out, g * GROUP + LANES, other)
