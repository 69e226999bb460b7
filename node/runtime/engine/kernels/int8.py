"""Activations of int8 layers: to 8 bits and back, row by row, around or instead of torch's integer products.

Two schemes, as `engine.quantize` explains them: *plain*, 255 steps from a row's least number to its largest; *fine*, 15 bits
in two parts, after the inputs were multiplied by `sizes`. Their scales are
kept in `marks`: [rows, 2], least and span, or step and nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import carray
from numba.extending import register_jitable

from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, kernel
from node.runtime.engine.kernels.simd import narrow, pointer, wide

TINY: Final = np.float32(1e-30)
"""Ranges below it count as none: their inverse would be infinite, or close."""
INVERSE_STEP: Final = np.float32(1) / np.float32(1 / 255)
"""As FBGEMM has it from the step that it is told."""


@register_jitable
def _least_and_span(row):  # type: ignore[no-untyped-def]
    """Both NaN when a number of the row is not finite."""
    least, largest, odd = wide(row[0]), wide(row[0]), np.float32(0)
    for i in range(len(row)):
        x = wide(row[i])
        least, largest = min(least, x), max(largest, x)
        odd += x * np.float32(0)
    return least + odd, largest - least + odd


@register_jitable
def _spread(row, into):  # type: ignore[no-untyped-def]
    """From 0 to 1 by least and span, which are returned."""
    least, span = _least_and_span(row)
    factor = np.float32(0) if span < TINY else np.float32(1) / span
    for i in range(len(row)):
        into[i] = (wide(row[i]) - least) * factor
    return least, span


@register_jitable
def _step(row, sizes):  # type: ignore[no-untyped-def]
    """A 127th of the largest magnitude; NaN when a number is not finite."""
    largest, odd = np.float32(0), np.float32(0)
    for i in range(len(row)):
        x = wide(row[i]) * sizes[i]
        largest = max(largest, abs(x))
        odd += x * np.float32(0)
    return largest / np.float32(127) + odd


@cache
def plain_rounded(dtype: Any) -> Callable[..., None]:
    """(rows, width, x, out): x rounded to its 255 steps, as float32."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS)
    def run(rows, width, x_at, out_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), (rows, width), dtype)
        out = carray(pointer(out_at), (rows, width), np.float32)
        for r in range(rows):
            row, into = x[r], out[r]
            least, span = _spread(row, into)
            size = span / np.float32(255)
            for i in range(
                width
            ):  # in a loop of its own: what is rounded are the very numbers that torch's product gets
                into[i] = np.rint(into[i] * INVERSE_STEP) * size + least

    return run


@cache
def plain_spread(dtype: Any) -> Callable[..., None]:
    """(rows, width, x, out, marks): out = (x - least) / span, from 0 to 1."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, x_at, out_at, marks_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), (rows, width), dtype)
        out = carray(pointer(out_at), (rows, width), np.float32)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        for r in range(rows):
            marks[r, 0], marks[r, 1] = _spread(x[r], out[r])

    return run


@cache
def plain_gather(dtype: Any) -> Callable[..., None]:
    """(rows, width, products, marks, sums, bias, out): out = products * span + least * sums + bias."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, products_at, marks_at, sums_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        products = carray(pointer(products_at), (rows, width), np.float32)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        sums = carray(pointer(sums_at), width, np.float32)
        bias = carray(pointer(bias_at), width, np.float32)
        out = carray(pointer(out_at), (rows, width), dtype)
        for r in range(rows):
            row, into, least, span = products[r], out[r], marks[r, 0], marks[r, 1]
            for i in range(width):
                into[i] = narrow(row[i] * span + least * sums[i] + bias[i], into)

    return run


@cache
def fine_rounded(dtype: Any) -> Callable[..., None]:
    """(rows, width, x, sizes, out): x * sizes rounded to the sum of both parts, as float32."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, x_at, sizes_at, out_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), (rows, width), dtype)
        sizes = carray(pointer(sizes_at), width, np.float32)
        out = carray(pointer(out_at), (rows, width), np.float32)
        for r in range(rows):
            row, into = x[r], out[r]
            step = _step(row, sizes)
            factor = np.float32(0) if step < TINY else np.float32(1) / step
            for i in range(width):
                scaled = wide(row[i]) * sizes[i] * factor
                coarse = np.rint(scaled)
                into[i] = (coarse + np.rint((scaled - coarse) * np.float32(254)) / np.float32(254)) * step

    return run


@cache
def fine_spread(dtype: Any) -> Callable[..., None]:
    """(rows, width, x, sizes, out, marks): the coarse parts of all rows, then the fine ones: out [2 * rows, width]."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, x_at, sizes_at, out_at, marks_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), (rows, width), dtype)
        sizes = carray(pointer(sizes_at), width, np.float32)
        out = carray(pointer(out_at), (2, rows, width), np.float32)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        for r in range(rows):
            row, first, second = x[r], out[0, r], out[1, r]
            step = _step(row, sizes)
            factor = np.float32(0) if step < TINY else np.float32(1) / step
            for i in range(width):
                scaled = wide(row[i]) * sizes[i] * factor
                coarse = np.rint(scaled)
                first[i], second[i] = coarse, (scaled - coarse) * np.float32(254)
            marks[r, 0] = step

    return run


@cache
def fine_gather(dtype: Any) -> Callable[..., None]:
    """(rows, width, products, marks, bias, out): out = (coarse + fine / 254) * step + bias; products [2 * rows, width]."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, width, products_at, marks_at, bias_at, out_at):  # type: ignore[no-untyped-def]
        products = carray(pointer(products_at), (2, rows, width), np.float32)
        marks = carray(pointer(marks_at), (rows, 2), np.float32)
        bias = carray(pointer(bias_at), width, np.float32)
        out = carray(pointer(out_at), (rows, width), dtype)
        for r in range(rows):
            coarse, fine, into, step = products[0, r], products[1, r], out[r], marks[r, 0]
            for i in range(width):
                into[i] = narrow((coarse[i] + fine[i] / np.float32(254)) * step + bias[i], into)

    return run
