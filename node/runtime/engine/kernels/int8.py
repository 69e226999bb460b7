"""Activations of int8 layers, from rows of numbers to rows of bytes.

Two schemes, as `engine.quantize` explains them.
- *plain*: 255 steps from a row's least number to its largest; x ~ least + byte * step.
- *fine*: 15 bits, after the inputs were multiplied by `sizes`, in two rows of bytes beside each other;
  x * size ~ ((first - 128) + (second - 128) / 254) * step.

What undoes them is in `marks`, float32 [rows, 2]: step and least; both NaN when a number of the row is not finite, so that its
result is NaN. Rows of bytes are `stride` long, zeros behind the last number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import carray
from numba.extending import register_jitable

from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, kernel
from node.runtime.engine.kernels.simd import pointer, wide

TINY: Final = np.float32(1e-30)
"""Ranges below it count as none: their inverse would be infinite, or close."""


@register_jitable
def _least_and_span(row):  # type: ignore[no-untyped-def]
    least, largest, odd = wide(row[0]), wide(row[0]), np.float32(0)
    for i in range(len(row)):
        x = wide(row[i])
        least, largest = min(least, x), max(largest, x)
        odd += x * np.float32(0)  # NaN when x is not finite
    return least + odd, largest - least + odd


@register_jitable
def _largest(row, sizes):  # type: ignore[no-untyped-def]
    largest, odd = np.float32(0), np.float32(0)
    for i in range(len(row)):
        x = wide(row[i]) * sizes[i]
        largest = max(largest, abs(x))
        odd += x * np.float32(0)
    return largest + odd


@cache
def plain(dtype: Any) -> Callable[..., None]:
    """(rows, width, stride, x, out, marks)."""

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, stride, x_at, out_at, marks_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), (rows, width), dtype)
        out = carray(pointer(out_at), (rows, stride), np.uint8)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        for r in range(rows):
            row, into = x[r], out[r]
            least, span = _least_and_span(row)
            marks[r, 0], marks[r, 1] = span / np.float32(255), least
            factor = (
                np.float32(255) / span if span > TINY else np.float32(0)
            )  # a row that is not finite has a span of NaN
            least = least if least == least else np.float32(0)
            for i in range(width):
                into[i] = np.uint8(_within((wide(row[i]) - least) * factor, np.float32(0), np.float32(255)))
            for i in range(width, stride):
                into[i] = 0

    return run


@cache
def fine(dtype: Any) -> Callable[..., None]:
    """(rows, width, stride, x, sizes, out, marks); out has two rows for each."""

    @kernel(COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, stride, x_at, sizes_at, out_at, marks_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), (rows, width), dtype)
        sizes = carray(pointer(sizes_at), width, np.float32)
        out = carray(pointer(out_at), (rows, 2, stride), np.uint8)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        for r in range(rows):
            row, first, second = x[r], out[r, 0], out[r, 1]
            largest = _largest(row, sizes)
            marks[r, 0] = marks[r, 1] = largest / np.float32(127)
            factor = np.float32(127) / largest if largest > TINY else np.float32(0)
            for i in range(width):
                scaled = wide(row[i]) * sizes[i] * factor
                coarse = _within(scaled, np.float32(-127), np.float32(127))
                rest = _within((scaled - coarse) * np.float32(254), np.float32(-127), np.float32(127))
                first[i] = np.uint8(coarse + np.float32(128))
                second[i] = np.uint8(rest + np.float32(128))
            for i in range(width, stride):
                first[i] = second[i] = 0

    return run


@register_jitable
def _within(x, low, high):  # type: ignore[no-untyped-def]
    """x rounded to a whole number from low to high; NaN gives low."""
    x = np.rint(x)
    x = x if x > low else low
    return x if x < high else high
