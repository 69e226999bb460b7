"""Quantized linear layers: int8 weights and activations, int4 weights.

Rules:
- int8: one scale per output, symmetric; activations are quantized as they come, one range per row, so a row is rounded alike
  in any company. Sums are integers (`Int8Linear`), or float32 for few rows (`kernels.layers`).
- int4: groups of 32 along `in`, each with a scale and a zero in bfloat16; activations stay in bfloat16.
- A weight that is not finite is refused; a weight whose shape the int4 kernel cannot take is held in int8, which is more.

Sources: Dettmers et al. 2022 (LLM.int8(): vector-wise scales); Dettmers and Zettlemoyer 2023 (four bits, small groups).
The CUDA operators have never run here: a CUDA device takes them if they pass the same trial as all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.errors import UnsupportedModel
from node.runtime.engine.kernels import importable
from node.runtime.engine.linear import Linear, fbgemm_padded, nbytes_of, two_copies, works

if TYPE_CHECKING:
    from node.runtime.engine.kernels.layers import Activations

GROUP: Final = 32
UNPACK_ROWS: Final = 48
"""From so many rows on it is faster to unpack an int4 weight to bfloat16 first (measured: even at 40)."""


def int8_linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, fine: bool = False, few_rows: bool = False
) -> Linear:
    """`weight` [out, in] in int8, to compute in `dtype`. Raises `UnsupportedModel` when it is not finite.

    `fine`: activations in 15 bits where they are quantized at all; layers that narrow (`in` > `out`) have them anyway.
    `few_rows`: see `make_linear`.
    """
    if weight.device.type == "cpu":
        kind = Int8FineLinear if weight.shape[1] > weight.shape[0] or fine else Int8Linear
        if works(kind, "cpu", dtype):
            many = kind(weight, bias)
            few = _few_int8(kind is Int8FineLinear, dtype)
            return two_copies(few, weight, bias, dtype, many, kind.tolerance) if few_rows else many
    if weight.device.type == "cuda" and works(Int8PackLinear, "cuda", dtype):
        return Int8PackLinear(weight, bias)
    return Int8PlainLinear(weight, bias)


def int4_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, few_rows: bool = False) -> Linear:
    """`weight` [out, in] in int4, to compute in `dtype`, or in int8 where the kernel has no such shape or is missing."""
    out_features, in_features = weight.shape
    if (
        in_features % GROUP == 0
        and weight.device.type == "cpu"
        and out_features % 16 == 0
        and works(Int4Linear, "cpu", dtype)
    ):
        many = Int4Linear(weight, bias)
        return two_copies(_few_int4(dtype), weight, bias, dtype, many, many.tolerance) if few_rows else many
    fits = in_features % 128 == 0 and out_features % 8 == 0
    if fits and weight.device.type == "cuda" and works(Int4CudaLinear, "cuda", dtype):
        return Int4CudaLinear(weight, bias)
    return int8_linear(weight, bias, dtype, few_rows=few_rows)


@cache
def _few_int8(fine: bool, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Linear]:
    def few(weight: Tensor, bias: Tensor | None) -> Linear:
        from node.runtime.engine.kernels.layers import FewInt8

        sizes = column_sizes(weight) if fine else None
        numbers, scales = quantize_rows(weight if sizes is None else weight.float() / sizes)
        return FewInt8(numbers, scales, bias, dtype, sizes)

    return few


@cache
def _few_int4(dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Linear]:
    def few(weight: Tensor, bias: Tensor | None) -> Linear:
        from node.runtime.engine.kernels.layers import FewInt4

        return FewInt4(*quantize_groups(weight), bias, dtype)

    return few


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
    scales = torch.where(high > low, (high - low) / 15, 1.0).bfloat16()
    zeros = (low + 8 * scales.float()).bfloat16()
    numbers = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
    return numbers.to(torch.int32).view(out_features, in_features), torch.stack((scales, zeros), -1).transpose(
        0, 1
    ).contiguous()


def _activations(sizes: Tensor | None) -> Activations | None:
    if not importable():
        return None
    from node.runtime.engine.kernels.layers import Activations

    return Activations(sizes)


class Int8Linear:
    """int8 on a CPU: FBGEMM, float32 or bfloat16 in and out.

    Activations are quantized row by row, over the range from least to largest: a few numbers far from all others, on one
    side, are the rule in language models, and a symmetric range would waste half its steps (measured: 5 % of perplexity
    against 1 %). FBGEMM's own dynamic kernel has one range for all rows: a row would depend on its company.
    """

    tolerance = 3e-2
    _steps = (1 / 255, 0)
    """What the kernel takes for a step of the activations, and for their zero."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        ops = torch.ops.quantized
        self.out_features, self.in_features = weight.shape
        numbers, scales = quantize_rows(weight)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch calls its quantized tensors deprecated, not the kernels that read them
            zeros = torch.zeros(self.out_features, dtype=torch.int64)
            packable = torch._make_per_channel_quantized_tensor(numbers, scales.double(), zeros, 0)
            self._packed = ops.linear_prepack(packable, None)
        self._linear = ops.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._sums = numbers.sum(1) * scales
        self._fused = _activations(None)
        self._bias = torch.zeros(self.out_features) if bias is None else bias.float()
        # FBGEMM keeps a scale, a zero point and a sum for each output.
        padded = fbgemm_padded(self.out_features, self.in_features, 48)
        self.nbytes = padded + 12 * self.out_features + self._sums.nbytes + self._bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self._fused is not None:
            spread, marks = self._fused.spread(x)
            products = self._linear(spread, *self._steps, self._packed)
            return self._fused.gather(products, marks, self._sums, self._bias, x.dtype)
        out = self._product(x if x.dtype is torch.float32 else x.float())
        out += self._bias
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        low = x.amin(1, True)
        span = x.amax(1, True).sub_(low)
        # A row of equal numbers is 0/0 here and 0 * span below; the kernel takes what is not a number for some integer.
        out = self._linear((x - low).div_(span), *self._steps, self._packed)
        return out.mul_(span).addcmul_(low, self._sums)


class Int8FineLinear(Int8Linear):
    """The same with activations in 15 bits: what rounding to 8 left over is a second row, in the same product.

    For what reads the widest or the last activations, which 8 bits hurt most; reading the weights once, it costs little
    until a batch makes arithmetic the limit. Columns of the weight are brought closer to one size before they are rounded,
    and the activations are multiplied to match.
    """

    tolerance = 2e-2
    _steps = (1.0, 128)

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._sizes = column_sizes(weight)
        super().__init__(weight.float() / self._sizes, bias)
        self._fused = _activations(self._sizes)
        self.nbytes += self._sizes.nbytes

    def _product(self, x: Tensor) -> Tensor:
        x = x * self._sizes
        steps = x.abs().amax(1, True).div_(127)
        scaled = x.div_(steps)
        coarse = scaled.round()
        fine = scaled.sub_(coarse).mul_(254)
        first, second = self._linear(torch.cat((coarse, fine)), *self._steps, self._packed).chunk(2)
        return first.add_(second, alpha=1 / 254).mul_(steps)


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


class Int4Linear:
    """int4 weights on a CPU. From `UNPACK_ROWS` rows on the weight is unpacked for the call, where its layout is known."""

    tolerance = 0.2

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        numbers, self._scales = quantize_groups(weight)
        self._packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
        self._linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self._bias = bias
        self._unpackable = self.out_features % 64 == 0 and bool((_unpack(self._packed) == numbers.t()).all())
        self.nbytes = self._packed.nbytes + self._scales.nbytes + nbytes_of(bias)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.bfloat16()
        if self._unpackable and x.shape[0] >= UNPACK_ROWS:
            out = torch.mm(rows, self._weight())
        else:
            out = self._linear(rows, self._packed, GROUP, self._scales)
        if self._bias is not None:
            out = out + self._bias
        return out.to(x.dtype)

    def _weight(self) -> Tensor:
        """Bfloat16 [in, out]."""
        scales = self._scales[..., 0].contiguous()
        zeros = self._scales[..., 1] - 8 * scales
        numbers = _unpack(self._packed).view(-1, GROUP, self.out_features)
        return torch.addcmul(zeros[:, None], numbers, scales[:, None]).view(self.in_features, self.out_features)


def _unpack(packed: Tensor) -> Tensor:
    """Bfloat16 [in, out] of 0..15, from blocks of 64 outputs: the low halves of the bytes are the first 32 of them."""
    blocks = packed.view(packed.shape[0] // 64, -1, 32)
    count, in_features, _ = blocks.shape
    numbers = torch.empty(in_features, count, 2, 32, dtype=torch.bfloat16)
    numbers[:, :, 0] = (blocks & 15).transpose(0, 1)
    numbers[:, :, 1] = (blocks >> 4).transpose(0, 1)
    return numbers.view(in_features, count * 64)


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
