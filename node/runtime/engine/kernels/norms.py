"""What a layer does to each row between its products: norm, gate, turn.

`dtype` is what rows are stored as (`compiled.STORED`); arithmetic is float32, rounded once at the end.

Sources: Zhang and Sennrich 2019 (RMSNorm); Shazeer 2020 (gates); Hendrycks and Gimpel 2016 (GELU, the tanh form);
Su et al. 2021 (rotary positions).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.extending import register_jitable

from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, FLOAT, Kernel, family, kernel
from node.runtime.engine.kernels.simd import exp, narrow, pointer, wide


@family
def rms_norm(dtype: Any) -> Kernel:
    """(rows, width, x, weight, out, eps): out = x / sqrt(mean(x^2) + eps) * weight; weight is float32."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS, FLOAT)
    def run(rows, width, x_at, weight_at, out_at, eps):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), (rows, width), dtype)
        out = carray(pointer(out_at), (rows, width), dtype)
        weight = carray(pointer(weight_at), width, np.float32)
        for r in range(rows):
            row, into = x[r], out[r]
            squares = np.float32(0)
            for i in range(width):
                squares += wide(row[i]) * wide(row[i])
            factor = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
            for i in range(width):
                into[i] = narrow(wide(row[i]) * factor * weight[i], into)

    return run


def _gate(dtype: Any, activation: Any) -> Kernel:
    """(rows, width, x, out): out = activation(gate) * up, where a row of x is gate and up, each `width` numbers."""

    @kernel(COUNT, COUNT, ADDRESS, ADDRESS)
    def run(rows, width, x_at, out_at):  # type: ignore[no-untyped-def]
        x = carray(pointer(x_at), (rows, 2, width), dtype)
        out = carray(pointer(out_at), (rows, width), dtype)
        for r in range(rows):
            gate, up, into = x[r, 0], x[r, 1], out[r]
            for i in range(width):
                into[i] = narrow(activation(wide(gate[i])) * wide(up[i]), into)

    return run


@register_jitable
def _silu(z):  # type: ignore[no-untyped-def]
    return z / (np.float32(1) + exp(-z))


@register_jitable
def _gelu_tanh(z):  # type: ignore[no-untyped-def]
    """z * sigmoid(1.5957691 (z + 0.044715 z^3))."""
    bent = np.float32(1.5957691216) * (z + np.float32(0.044715) * z * z * z)
    return z / (np.float32(1) + exp(-bent))


@family
def silu_gate(dtype: Any) -> Kernel:
    """`_gate` by SiLU."""
    return _gate(dtype, _silu)


@family
def gelu_tanh_gate(dtype: Any) -> Kernel:
    """`_gate` by GELU in the tanh form."""
    return _gate(dtype, _gelu_tanh)


@family
def turn(dtype: Any) -> Kernel:
    """(rows, heads, dim, row_step, head_step, x, cos, sin): the first `dim` numbers of each head turned in place.

    Steps are counted in numbers. cos and sin are [rows, dim], the sines of the first half negative.
    """

    @kernel(COUNT, COUNT, COUNT, COUNT, COUNT, ADDRESS, ADDRESS, ADDRESS)
    def run(rows, heads, dim, row_step, head_step, x_at, cos_at, sin_at):  # type: ignore[no-untyped-def]
        half = dim // 2
        x = carray(pointer(x_at), rows * row_step, dtype)
        cos = carray(pointer(cos_at), (rows, dim), dtype)
        sin = carray(pointer(sin_at), (rows, dim), dtype)
        for r in range(rows):
            c, s = cos[r], sin[r]
            for h in range(heads):
                at = r * row_step + h * head_step
                first, second = x[at : at + half], x[at + half : at + dim]
                for i in range(half):
                    a, b = wide(first[i]), wide(second[i])
                    first[i] = narrow(a * wide(c[i]) + b * wide(s[i]), first)
                    second[i] = narrow(b * wide(c[half + i]) + a * wide(s[half + i]), second)

    return run
