"""Kernels on tensors: what is allocated, and shapes as counts, before addresses are handed over.

What would make a kernel read or write past a tensor is refused with `RuntimeError`, as torch's operators refuse it. What is
*in* the tables of blocks is not looked at here but once a step, by who made them (`paged.PagedCache`).

Each kernel is compiled when it is first asked for, some tenths of a second, once in a process for each way it is asked for;
or taken from `book`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.blocks import BLOCK_TOKENS
from node.runtime.engine.kernels import attention, norms
from node.runtime.engine.kernels.compiled import STORED, demand
from node.runtime.engine.kernels.simd import LANES

log = logging.getLogger(__name__)

GATES: Final = {"silu": norms.silu_gate, "gelu_tanh": norms.gelu_tanh_gate}


class Kernels:
    """The kernels of a decoder whose activations, keys and values are `dtype`."""

    def __init__(self, dtype: torch.dtype, head_dim: int, sharing: int = 1, *, parallel: bool) -> None:
        """`head_dim`: a multiple of 16. `sharing`: queries at least that share a head of keys. `parallel`: attention is shared by
        all threads."""
        self.dtype, self._dim, self._together = dtype, head_dim, min(sharing, attention.TOGETHER)
        stored = STORED[dtype]
        self._norm, self._turn = norms.rms_norm(stored), norms.turn(stored)
        self._write, self._attend = (
            attention.write(stored),
            attention.attend(stored, head_dim, self._together, parallel),
        )

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of the last dimension. x: of `dtype`; weight: float32 [width]."""
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        demand(x.dtype is self.dtype and weight.dtype is torch.float32 and weight.shape == (width,), "norm", x, weight)
        demand(weight.is_contiguous(), "norm", weight)
        self._norm(x.numel() // width, width, x.data_ptr(), weight.data_ptr(), out.data_ptr(), eps)
        return out

    def gate(self, activation: str) -> Callable[[Tensor], Tensor] | None:
        """[rows, 2 * width] of gates and ups to [rows, width]; None when there is no kernel of that name."""
        if activation not in GATES:
            return None
        run = GATES[activation](STORED[self.dtype])

        def gate(x: Tensor) -> Tensor:
            x = x.contiguous()
            demand(x.dtype is self.dtype and x.dim() == 2 and x.shape[1] % 2 == 0, "gate", x)
            rows, width = x.shape[0], x.shape[1] // 2
            out = torch.empty(rows, width, dtype=x.dtype)
            run(rows, width, x.data_ptr(), out.data_ptr())
            return out

        return gate

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Turn heads [rows, heads, dim] in place; cos and sin: [rows, 1, dim]."""
        rows, heads, dim = x.shape
        steps = x.stride()
        demand(x.dtype is self.dtype and steps[2] == 1 and min(steps) >= 0 and dim % 2 == 0, "turn", x)
        for part in (cos, sin):
            demand(part.dtype is self.dtype and part.shape == (rows, 1, dim) and part.is_contiguous(), "turn", x, part)
        self._turn(rows, heads, dim, steps[0], steps[1], x.data_ptr(), cos.data_ptr(), sin.data_ptr())

    def write(self, cache: Tensor, slots: Tensor, kv: Tensor) -> None:
        """kv [rows, heads, dim], heads beside each other, to the places `slots` of cache [heads, tokens, dim]."""
        rows, heads, dim = kv.shape
        demand(kv.dtype is self.dtype and kv.stride()[1:] == (dim, 1) and kv.stride(0) >= 0, "write", kv)
        demand(slots.dtype is torch.int64 and slots.shape == (rows,) and slots.is_contiguous(), "write", kv, slots)
        fits = cache.dtype is self.dtype and cache.shape == (heads, cache.shape[1], dim) and cache.is_contiguous()
        demand(fits, "write", kv, cache)
        self._write(rows, heads, dim, kv.stride(0), kv.data_ptr(), slots.data_ptr(), cache.shape[1], cache.data_ptr())

    def attend(
        self, cache: Tensor, tables: Tensor, q: Tensor, scale: float, window: int | None, softcap: float
    ) -> Tensor:
        """[rows, heads * dim] of queries [rows, heads, dim], heads beside each other; see `attention.attend`.

        cache: one layer's [2 * kv_heads, tokens, dim].
        """
        rows, heads, dim = q.shape
        kv_heads, tokens = cache.shape[0] // 2, cache.shape[1]
        demand(q.dtype is self.dtype and q.stride()[1:] == (dim, 1) and q.stride(0) >= 0, "attend", q)
        demand(dim == self._dim and kv_heads > 0 and heads % kv_heads == 0, "attend", q, cache)
        demand(heads // kv_heads >= self._together, "attend", q, cache)
        fits = cache.shape == (2 * kv_heads, tokens, dim) and tokens % BLOCK_TOKENS == 0
        demand(fits and cache.dtype is self.dtype and cache.is_contiguous(), "attend", cache)
        fits = tables.dim() == 2 and tables.shape[0] == rows and tables.is_contiguous()
        demand(fits and tables.dtype is torch.int64, "attend", q, tables)
        out = torch.empty(rows, heads * dim, dtype=self.dtype)
        self._attend(
            rows,
            kv_heads,
            heads // kv_heads,
            q.stride(0),
            q.data_ptr(),
            tables.data_ptr(),
            tables.shape[1] - 1,
            tokens // BLOCK_TOKENS,
            cache.data_ptr(),
            window or 0,
            scale,
            softcap,
            out.data_ptr(),
        )
        return out


@cache
def tried(dtype: torch.dtype, head_dim: int, sharing: int, parallel: bool) -> Kernels | None:
    """Kernels that agree with torch on this machine; None, and a line in the log, when they do not or cannot be."""
    if dtype not in STORED or head_dim % LANES:
        log.info("no compiled kernels for %s and heads of %d", dtype, head_dim)
        return None
    try:
        kernels = Kernels(dtype, head_dim, sharing, parallel=parallel)
        _compare(kernels, head_dim, sharing)
    except (ArithmeticError, RuntimeError, OSError) as error:
        log.warning("compiled kernels are not used for %s: %s", dtype, str(error).partition("\n")[0][:200])
        return None
    return kernels


def _compare(kernels: Kernels, dim: int, sharing: int) -> None:
    """Raises `ArithmeticError` when a kernel disagrees with torch on a small case."""
    generator = torch.Generator().manual_seed(7)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kernels.dtype)

    x, weight = numbers(3, 80), torch.rand(80, generator=generator)
    _same("norm", kernels.norm(x, weight, 1e-5), F.rms_norm(x.float(), (80,), weight, 1e-5))
    for name, plain in (("silu", F.silu), ("gelu_tanh", lambda z: F.gelu(z, approximate="tanh"))):
        gate = kernels.gate(name)
        up = 4 * numbers(3, 160)
        if gate is not None:
            _same(name, gate(up), plain(up[:, :80].float()) * up[:, 80:].float())
    queries = 2 * sharing
    heads, cos, sin = numbers(3, queries + 4, dim), numbers(3, 1, dim), numbers(3, 1, dim)
    q, kv = heads[:, :queries], heads[:, queries:]
    turned = q.float() * cos.float() + q.float().roll(dim // 2, -1) * sin.float()
    kernels.turn(q, cos, sin)
    _same("turn", q, turned)
    cache, seen = numbers(4, 6 * BLOCK_TOKENS, dim), [37, 16, 1]
    tables = torch.tensor([[37, 4, 0, 2], [16, 1, 1, 1], [1, 5, 5, 5]])
    kernels.write(cache, torch.tensor([2 * 16 + 4, 31, 80]), kv)
    for row, length in enumerate(seen):
        at = torch.cat([torch.arange(16) + 16 * block for block in tables[row, 1:].tolist()])[:length]
        _same("write", cache[:, at[-1]], kv[row].float())
    out = kernels.attend(cache, tables, q, 0.2, None, 0.0).view(3, 2, sharing, dim)
    for row, length in enumerate(seen):
        at = torch.cat([torch.arange(16) + 16 * block for block in tables[row, 1:].tolist()])[:length]
        keys, values = cache[:, at].float().chunk(2)
        scores = 0.2 * q[row].float().view(2, sharing, dim) @ keys.transpose(1, 2)
        _same("attend", out[row], scores.softmax(-1) @ values)


def _same(what: str, got: Tensor, wanted: Tensor) -> None:
    tolerance = 1e-5 if got.dtype == torch.float32 else 1.6e-2
    error = float((got.float() - wanted).abs().max() / wanted.abs().max())
    if not error <= tolerance:
        raise ArithmeticError(f"{what} is off by {error:.2g}")
