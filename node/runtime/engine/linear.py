"""Linear layers: y = x W^T + b, the weight held in one of `FORMATS` and packed once for the device it lives on.

Rules:
- A format says what weights are stored and multiplied in, and is part of the offer; which operator multiplies is this
  module's business. An operator that torch does not promise (private, or its name has changed before) is tried on a small
  case first and compared with float64; where it is missing or wrong the layer falls back to `F.linear` and the log says why.
- A row of the result depends on that row of the input alone. Where activations are quantized, each row has its own scale.
- `nbytes` is what the packed weight occupies, padding included. The weight given is never changed and may be dropped.
- Nothing is chosen by timing: the same machine, shape and number of rows take the same path in every run.

Measured on AVX-512 with BF16 and VNNI, without AMX, one thread, for all products of a step of SmolLM2-135M, milliseconds at 4,
16 and 256 rows: bfloat16 by the compiled kernel 10.6, 26.0, 319, by oneDNN 19.1, 34.0, 357; int8 by the compiled kernel 5.4,
12.9, 164, by FBGEMM 9.6, 18.6, 241. oneDNN's packed kernels cost less at four rows than at one or two (they keep few
accumulators busy), so one and two rows are repeated to four.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.errors import UnsupportedModel
from node.runtime.engine.kernels import importable
from node.runtime.engine.kernels.arena import Arena

FORMATS: Final = ("float32", "bfloat16", "float16", "int8", "int4")
FEW_ROWS: Final = 4
"""Up to so many rows the copy for few rows is used: what the kernel computes together. Not measured on a processor with tiles."""

log = logging.getLogger(__name__)


class Linear(Protocol):
    """A linear layer, its weight packed."""

    out_features: int
    in_features: int
    nbytes: int
    """Bytes of the packed weight, its scales and its bias."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] of the compute dtype to [rows, out] of the same."""
        ...


def compute_dtype(fmt: str, device: torch.device | str) -> torch.dtype:
    """Of activations, norms and what the layers of `fmt` take and give.

    On a CPU float16 and int8 compute in float32: their kernels take and give it, and half precision would only add
    conversions. Nothing is ever computed in float16 on a CPU: it has no fast kernels there.
    """
    _check_format(fmt)
    cpu = torch.device(device).type == "cpu"
    if fmt == "float32" or (cpu and fmt in ("float16", "int8")):
        return torch.float32
    return torch.float16 if fmt == "float16" else torch.bfloat16


def make_linear(
    weight: Tensor, fmt: str, bias: Tensor | None = None, *, head: bool = False, few_rows: bool = False
) -> Linear:
    """The layer of a weight [out, in] and bias [out], of any floating-point dtype, on the device where they are.

    `head`: it is the output head, which bears quantization worst: int4 keeps it in int8, and its activations in 15 bits.
    `few_rows` (bfloat16 on a CPU whose many rows torch multiplies faster, else ignored): keep a second copy for calls with up
    to `FEW_ROWS` rows; it holds the same weights and takes as many bytes again. Raises `UnsupportedModel` for what is no
    weight.
    """
    _check_format(fmt)
    _check_shapes(weight, bias)
    from node.runtime.engine import quantize  # it builds on this module

    device = weight.device.type
    dtype = compute_dtype(fmt, device)
    bias = None if bias is None else bias.to(dtype)
    if fmt == "int8" or (fmt == "int4" and head):
        return quantize.int8_linear(weight, bias, dtype, fine=head)
    if fmt == "int4":
        return quantize.int4_linear(weight, bias, dtype)
    if device != "cpu":
        return PlainLinear(weight.to(dtype), bias)
    if fmt == "float16":
        return _float16(weight, bias)
    weight = weight.to(dtype)
    if fmt == "bfloat16" and importable() and (few_rows or compiled_alone()) and works(_compiled, "cpu", dtype):
        compiled = _compiled(weight, bias)
        return compiled if compiled_alone() else _TwoCopies(compiled, _packed(weight, bias, dtype))
    return _packed(weight, bias, dtype)


def compiled_alone() -> bool:
    """Whether the compiled product of bfloat16 is the faster one at any number of rows: where the processor multiplies pairs,
    and has no tiles."""
    from node.runtime.engine.kernels.simd import HAS_PAIRS, HAS_TILES

    return HAS_PAIRS and not HAS_TILES


def _compiled(weight: Tensor, bias: Tensor | None) -> Linear:
    from node.runtime.engine.kernels.layers import KernelBFloat16

    return KernelBFloat16(weight, bias)


_compiled.__name__ = "KernelBFloat16"  # for the log


def _packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    return OneDnnLinear(weight, bias) if works(OneDnnLinear, "cpu", dtype) else PlainLinear(weight, bias)


def _check_format(fmt: str) -> None:
    if fmt not in FORMATS:
        raise UnsupportedModel(f"format {fmt!r} is not supported; choose one of {', '.join(FORMATS)}")


def _check_shapes(weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise UnsupportedModel(f"no weight of a linear layer: {weight.dtype} {list(weight.shape)}")
    if bias is not None and (tuple(bias.shape) != weight.shape[:1] or not bias.is_floating_point()):
        raise UnsupportedModel(f"bias {bias.dtype} {list(bias.shape)} does not fit a weight of {list(weight.shape)}")
    if bias is not None and bias.device != weight.device:
        raise UnsupportedModel(f"weight on {weight.device} and bias on {bias.device}")


class PlainLinear:
    """`F.linear`: every device, every dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight, bias
        self.nbytes = weight.nbytes + nbytes_of(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class OneDnnLinear:
    """float32 or bfloat16 on a CPU, the weight in the blocked layout of oneDNN's matmul kernels.

    Results do not depend on the number of rows, on any CPU measured so far: the kernels sum over `in` in one order.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        ops = torch.ops.mkldnn
        self.out_features, self.in_features = weight.shape
        self._packed = ops._reorder_linear_weight(weight.contiguous(), 16)
        self._bias = bias
        self._linear = ops._linear_pointwise.default
        self.nbytes = ops._nbytes(self._packed) + nbytes_of(bias)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows in (1, 2):
            return self._linear(torch.cat((x,) * (4 // rows)), self._packed, self._bias, "none", [], "")[:rows]
        return self._linear(x, self._packed, self._bias, "none", [], "")


class Float16Linear:
    """float16 weights times float32 activations on a CPU, summed in float32: FBGEMM, about as exact as float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        ops = torch.ops.quantized
        self.out_features, self.in_features = weight.shape
        self._packed = ops.linear_prepack_fp16(weight.float().contiguous(), None if bias is None else bias.float())
        self._linear = ops.linear_dynamic_fp16.default
        self.nbytes = 2 * fbgemm_padded(self.out_features, self.in_features, 16) + 4 * (
            0 if bias is None else self.out_features
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self._packed)


class _TwoCopies:
    """A layer for up to `FEW_ROWS` rows and one for more."""

    def __init__(self, few: Linear, many: Linear) -> None:
        self.out_features, self.in_features = many.out_features, many.in_features
        self._few, self._many = few, many
        self.nbytes = few.nbytes + many.nbytes

    def hold(self, arena: Arena) -> None:
        hold(self._few, arena)

    def __call__(self, x: Tensor) -> Tensor:
        return self._few(x) if x.shape[0] <= FEW_ROWS else self._many(x)


def hold(layer: Linear, arena: Arena) -> None:
    """Move the weight of a compiled layer beside those of others; others stay."""
    move = getattr(layer, "hold", None)
    if move is not None:
        move(arena)


def _fits_float16(weight: Tensor) -> bool:
    return bool(weight.abs().amax() <= torch.finfo(torch.float16).max)


def _float16(weight: Tensor, bias: Tensor | None) -> Linear:
    if not _fits_float16(weight):
        raise UnsupportedModel("a weight is not finite or too large for float16")
    if works(Float16Linear, "cpu", torch.float32):
        return Float16Linear(weight, bias)
    # Rounded as the format says, multiplied in float32 as compute_dtype says; twice the bytes, which nbytes tells.
    rounded = weight.to(torch.float16).float()
    return OneDnnLinear(rounded, bias) if works(OneDnnLinear, "cpu", torch.float32) else PlainLinear(rounded, bias)


def nbytes_of(tensor: Tensor | None) -> int:
    """Bytes of a tensor that may be absent."""
    return 0 if tensor is None else tensor.nbytes


def fbgemm_padded(out_features: int, in_features: int, columns: int) -> int:
    """Numbers in a weight as FBGEMM packs it for AVX-512: `in` in whole blocks of 512, `out` in whole `columns`."""
    return -(-in_features // 512) * 512 * -(-out_features // columns) * columns


@cache
def works(kind: Callable[..., Any], device: str, dtype: torch.dtype, tolerance: float | None = None) -> bool:
    """Whether a kind of layer can be built here and agrees with float64 on a small case; the log says why it does not.

    `kind(weight, bias)` is called with tensors of `dtype` on `device`. `tolerance`: the error allowed, in units of the largest
    result, rounding of weights to the format included; by default the kind's attribute of that name, or 1 %.
    """
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(128, 96, generator=generator), torch.randn(128, generator=generator)
    weight, bias = weight.to(dtype), bias.to(dtype)
    tolerance = getattr(kind, "tolerance", 1e-2) if tolerance is None else tolerance
    try:
        layer = kind(weight.to(device), bias.to(device))
        for rows in (1, 2, 5, 80):
            x = torch.randn(rows, 96, generator=generator)
            x[0] = 1e3 * x[0].sign()  # as large as they come: a kernel that saturates shows itself
            x = x.to(dtype)
            wanted = x.double() @ weight.double().t() + bias.double()
            got = layer(x.to(device)).cpu()
            error = float(((got.double() - wanted).abs().amax(1) / wanted.abs().amax(1)).amax())
            if got.dtype != dtype or got.shape != wanted.shape or not error <= tolerance:
                raise ArithmeticError(f"{rows} rows gave {got.dtype} {list(got.shape)}, off by {error:.2g}")
    except (AttributeError, RuntimeError, ArithmeticError, TypeError) as error:
        reason = str(error).partition("\n")[0][:200]
        log.warning("%s is not used for %s on %s: %s", getattr(kind, "__name__", kind), dtype, device, reason)
        return False
    return True
