"""Quantized linear layers: int8 weights and activations, int4 weights.

Rules:
- int8: one scale per output, symmetric. On a CPU activations are quantized as they come, over the range of each row from least
  to largest: a few numbers far from all others, on one side, are the rule in language models, and a symmetric range would waste
  half its steps (measured: 5 % of perplexity against 1 %). Sums are integers, so a row's result has the same bits in any
  company, at any number of rows and threads.
- What 8 bits hurt most, layers that read the widest or the last activations, has them in 15 bits (*fine*): what rounding to 8
  left over is a second row. Columns of the weight are brought closer to one size before they are rounded, and the activations
  are multiplied to match.
- int4: groups of 32 along `in`, each with a scale and a zero in bfloat16. On a CPU activations are quantized to 8 bits, a step
  for each of these groups, so what lies far out coarsens its neighbours only; a group's sums are integers.
- A weight that is not finite is refused; a weight whose shape the int4 kernel cannot take is held in int8, which is more.

Sources: Dettmers et al. 2022 (LLM.int8(): vector-wise scales); Dettmers and Zettlemoyer 2023 (four bits, small groups).
The CUDA operators have never run here: a CUDA device takes them if they pass the same trial as all others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.errors import UnsupportedModel
from node.runtime.engine.kernels import importable
from node.runtime.engine.linear import Linear, nbytes_of, works

GROUP: Final = 32
MOST_INPUTS: Final = (2**31 - 1) // (255 * 127)
"""Sums of so many products of bytes cannot overflow 32 bits: 66,311, more than any model has."""
_TOLERANCE: Final = {"int8": 3e-2, "fine": 2e-2, "int4": 0.2}


def int8_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, fine: bool = False) -> Linear:
    """`weight` [out, in] in int8, to compute in `dtype`. Raises `UnsupportedModel` when it is not finite.

    `fine`: activations in 15 bits where they are quantized at all; layers that narrow (`in` > `out`) have them anyway.
    """
    device = weight.device.type
    if device == "cpu" and weight.shape[1] <= MOST_INPUTS and importable():
        scheme = "fine" if fine or weight.shape[1] > weight.shape[0] else "int8"
        kind = _kernel(scheme, dtype)
        if works(kind, "cpu", dtype, _TOLERANCE[scheme]):
            return kind(weight, bias)
    if device == "cuda" and works(Int8PackLinear, "cuda", dtype):
        return Int8PackLinear(weight, bias)
    return Int8PlainLinear(weight, bias)


def int4_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """`weight` [out, in] in int4, to compute in `dtype`, or in int8 where the kernel has no such shape or is missing."""
    out_features, in_features = weight.shape
    device = weight.device.type
    if device == "cpu" and in_features % GROUP == 0 and importable():
        kind = _kernel("int4", dtype)
        if works(kind, "cpu", dtype, _TOLERANCE["int4"]):
            return kind(weight, bias)
    fits = in_features % 128 == 0 and out_features % 8 == 0
    if fits and device == "cuda" and works(Int4CudaLinear, "cuda", dtype):
        return Int4CudaLinear(weight, bias)
    return int8_linear(weight, bias, dtype)


@cache
def _kernel(scheme: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Linear]:
    """What makes a layer of compiled kernels from a weight and a bias; one object for each case, so that one trial is enough."""

    def make(weight: Tensor, bias: Tensor | None) -> Linear:
        from node.runtime.engine.kernels.layers import KernelInt4, KernelInt8

        if scheme == "int4":
            return KernelInt4(*quantize_groups(weight), bias, dtype)
        sizes = column_sizes(weight) if scheme == "fine" else None
        numbers, scales = quantize_rows(weight if sizes is None else weight.float() / sizes)
        return KernelInt8(numbers, scales, bias, dtype, sizes)

    make.__name__ = "KernelInt4" if scheme == "int4" else "KernelInt8"  # for the log
    return make


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 [out, in] within +-127 and float32 scales [out]: weight ~ int8 * scale. Raises `UnsupportedModel`."""
    weight = weight.float()
    largest = weight.abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise UnsupportedModel("a weight is not finite")
    scales = torch.where(largest > 0, largest, 1.0) / 127
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def column_sizes(weight: Tensor) -> Tensor:
    """Float32 [in]: the roots of the columns' largest magnitudes, by which the fine scheme brings them closer."""
    sizes = weight.float().abs().amax(0).sqrt_()
    return torch.where(sizes > 0, sizes, 1.0)


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int32 [out, in] of 0..15, and bfloat16 [in / GROUP, out, 2] of scales and zeros: weight ~ (q - 8) * scale + zero.

    Both are rounded before the numbers are, so that these make up for it. Raises `UnsupportedModel`.
    """
    out_features, in_features = weight.shape
    groups = weight.float().view(out_features, in_features // GROUP, GROUP)
    low, high = groups.aminmax(dim=2)
    if not bool((high - low).isfinite().all()):
        raise UnsupportedModel("a weight is not finite")
    scales = ((high - low) / 15).bfloat16()
    flat = scales == 0  # all alike: the zero says it, since beside a step of 1 it would be lost
    scales[flat] = 1.0
    zeros = torch.where(flat, low, low + 8 * scales.float()).bfloat16()
    numbers = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
    return numbers.to(torch.int32).view(out_features, in_features), torch.stack((scales, zeros), -1).transpose(
        0, 1
    ).contiguous()


class Int8PlainLinear:
    """int8 weights in ordinary torch operators, activations as they are: any device, not fast."""

    tolerance = 3e-2

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._numbers, self._scales = quantize_rows(weight)
        self._bias = bias
        self.nbytes = self._numbers.nbytes + self._scales.nbytes + nbytes_of(bias)

    def __call__(self, x: Tensor) -> Tensor:
        out = (F.linear(x, self._numbers.to(x.dtype)).float() * self._scales).to(x.dtype)
        return out if self._bias is None else out + self._bias


class Int8PackLinear(Int8PlainLinear):
    """int8 weights through torch's fused operator, where the device has it."""

    def __call__(self, x: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(x, self._numbers, self._scales.to(x.dtype))
        return out if self._bias is None else out + self._bias


class Int4CudaLinear:
    """int4 weights on CUDA, tensor-core layout with 8 inner tiles. Untested: no GPU was at hand."""

    tolerance = 0.2

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        numbers, self._scales = quantize_groups(weight)
        nibbles = ((numbers[:, ::2] << 4) | numbers[:, 1::2]).to(torch.uint8)
        self._packed = torch._convert_weight_to_int4pack(nibbles, 8)
        self._bias = bias
        self.nbytes = self._packed.nbytes + self._scales.nbytes + nbytes_of(bias)

    def __call__(self, x: Tensor) -> Tensor:
        out = torch._weight_int4pack_mm(x, self._packed, GROUP, self._scales)
        return out if self._bias is None else out + self._bias
