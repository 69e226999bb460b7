"""Linear layers on the kernels of `products`.

Each is for any number of rows and holds the weight once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.kernels import int8, products
from node.runtime.engine.kernels.arena import Arena
from node.runtime.engine.kernels.compiled import STORED, demand, shared
from node.runtime.engine.kernels.products import WIDTH

UNPACK_ROWS: Final = 17
"""From so many rows on an int4 weight is unpacked to bfloat16 and multiplied by torch (measured: even at 16)."""


def _blocks(weight: Tensor) -> Tensor:
    """[out, in] to [out / 64, in, 64], zeros behind the last output."""
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % WIDTH))
    return padded.view(-1, WIDTH, weight.shape[1]).transpose(1, 2).contiguous()


def _to_blocks(values: Tensor) -> Tensor:
    """[out] with zeros behind, to whole blocks of 64."""
    return F.pad(values, (0, -len(values) % WIDTH)).contiguous()


def _interleaved(weight: Tensor, count: int) -> Tensor:
    """[out, in] to [out / 64, in / count, 64, count], zeros behind the last output and the last input."""
    padded = F.pad(weight, (0, -weight.shape[1] % count, 0, -weight.shape[0] % WIDTH))
    return padded.view(-1, WIDTH, padded.shape[1] // count, count).transpose(1, 2).contiguous()


def _in_groups(multiply: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """The kernel takes one row, or whole groups of `size`."""
    rows = x.shape[0]
    if rows == 1 or rows % size == 0:
        return multiply(x.contiguous())
    return multiply(F.pad(x, (0, 0, 0, -rows % size)))[:rows]


class _Layer:
    def __init__(self, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = shape
        self._dtype = dtype
        self._bias = torch.zeros(self.out_features) if bias is None else bias.float().contiguous()

    _held: Tensor
    """The weight, packed."""

    def hold(self, arena: Arena) -> None:
        """Move the weight to where its neighbours are."""
        self._held = arena.keep(self._held)

    def _rows(self, x: Tensor) -> Tensor:
        """x, its rows beside each other; `RuntimeError` when they are none of this layer."""
        demand(x.dim() == 2 and x.shape[1] == self.in_features and x.dtype is self._dtype, type(self).__name__, x)
        return x.contiguous()

    def _empty(self, rows: int) -> Tensor:
        return torch.empty(rows, self.out_features, dtype=self._dtype)


class KernelBFloat16(_Layer):
    """A weight in bfloat16; rows of bfloat16."""

    tolerance = 1e-2

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape, bias, torch.bfloat16)
        self._held = _interleaved(weight.bfloat16(), 2)
        self._run = products.product_bfloat16(shared())
        self.nbytes = self._held.nbytes + self._bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x = self._rows(x)
        rows, inputs = x.shape
        missing, odd = -rows % 4, inputs % 2
        if missing or odd:
            x = F.pad(x, (0, odd, 0, missing))
        out = self._empty(rows)
        addresses = (x.data_ptr(), self._held.data_ptr(), self._bias.data_ptr(), out.data_ptr())
        self._run(rows, inputs + odd, self.out_features, *addresses)
        return out


class KernelInt8(_Layer):
    """A weight in int8, given as numbers and scales; activations rounded by `int8`, fine with `sizes`, else plain."""

    def __init__(
        self, numbers: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype, sizes: Tensor | None = None
    ) -> None:
        """numbers: int8 [out, in]; scales: float32 [out]; sizes: float32 [in] for the fine scheme."""
        super().__init__(numbers.shape, bias, dtype)
        self._stride = -(-self.in_features // 4) * 4
        self._held = _interleaved(numbers, 4)
        offsets = numbers.sum(1, dtype=torch.int32) * (1 if sizes is None else 128)
        self._offsets, self._scales, self._bias = (_to_blocks(part) for part in (offsets, scales, self._bias))
        self._sizes, self._each = None if sizes is None else sizes.float().contiguous(), 1 if sizes is None else 2
        stored = STORED[dtype]
        self._round = int8.plain(stored) if sizes is None else int8.fine(stored)
        self._run = products.product_int8(stored, sizes is not None, shared())
        parts = (self._held, self._offsets, self._scales, self._bias, *(() if sizes is None else (sizes,)))
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        x, rows = self._rows(x), x.shape[0]
        marks = torch.empty(rows, 2)
        bytes_ = torch.empty(-(-rows * self._each // 4) * 4, self._stride, dtype=torch.uint8)
        sizes = () if self._sizes is None else (self._sizes.data_ptr(),)
        self._round(rows, self.in_features, self._stride, x.data_ptr(), *sizes, bytes_.data_ptr(), marks.data_ptr())
        out = self._empty(rows)
        weight = (self._held.data_ptr(), self._offsets.data_ptr(), self._scales.data_ptr(), self._bias.data_ptr())
        addresses = (bytes_.data_ptr(), marks.data_ptr(), *weight, out.data_ptr())
        self._run(rows, self._stride, self.out_features, *addresses)
        return out


class KernelInt4(_Layer):
    """A weight in int4, given as `quantize.quantize_groups` makes it; activations in bfloat16."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """numbers: int32 [out, in] of 0..15; scales: bfloat16 [in / 32, out, 2] of scale and zero, of number - 8."""
        super().__init__(numbers.shape, bias, dtype)
        pairs = _blocks(numbers.to(torch.uint8)).view(-1, self.in_features // 2, 2, WIDTH)
        self._held = (pairs[:, :, 0] | pairs[:, :, 1] << 4).contiguous()
        spread = F.pad(scales.transpose(1, 2), (0, -self.out_features % WIDTH))  # [in / 32, 2, out]
        self._scales = spread.view(scales.shape[0], 2, -1, WIDTH).permute(2, 0, 1, 3).contiguous()
        self._run = products.product_int4(STORED[dtype], shared())
        self._unpack = products.unpack_int4(shared())
        self.nbytes = self._held.nbytes + self._scales.nbytes + self._bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        rows = self._rows(x).bfloat16()
        if x.shape[0] < UNPACK_ROWS:
            return _in_groups(self._multiply, rows, 2)
        return (torch.mm(rows, self._weight()) + self._bias).to(self._dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        x, out = x.float(), self._empty(x.shape[0])
        weight = (self._held.data_ptr(), self._scales.data_ptr(), self._bias.data_ptr())
        self._run(x.shape[0], self.in_features, self.out_features, x.data_ptr(), *weight, out.data_ptr())
        return out

    def _weight(self) -> Tensor:
        """Bfloat16 [in, out]."""
        padded = self._held.shape[0] * WIDTH
        out = torch.empty(self.in_features, padded, dtype=torch.bfloat16)
        self._unpack(self.in_features, padded, self._held.data_ptr(), self._scales.data_ptr(), out.data_ptr())
        return out[:, : self.out_features]
