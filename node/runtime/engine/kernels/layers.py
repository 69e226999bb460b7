"""Linear layers on the kernels of `products`.

Each is for any number of rows and holds the weight once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.kernels import products
from node.runtime.engine.kernels.arena import Arena
from node.runtime.engine.kernels.compiled import STORED, demand, shared
from node.runtime.engine.kernels.products import WIDTH


def _to_blocks(values: Tensor) -> Tensor:
    """[out] with zeros behind, to whole blocks of 64."""
    return F.pad(values, (0, -len(values) % WIDTH)).contiguous()


def _interleaved(weight: Tensor, count: int) -> Tensor:
    """[out, in] to [out / 64, in / count, 64, count], zeros behind the last output and the last input."""
    padded = F.pad(weight, (0, -weight.shape[1] % count, 0, -weight.shape[0] % WIDTH))
    return padded.view(-1, WIDTH, padded.shape[1] // count, count).transpose(1, 2).contiguous()


class _Layer:
    def __init__(self, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = shape
        self._dtype = dtype
        self._bias = _to_blocks(torch.zeros(self.out_features) if bias is None else bias.float())

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
        odd = inputs % 2
        if odd:
            x = F.pad(x, (0, 1))
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
        self._held = _interleaved(numbers, 4)
        offsets = numbers.sum(1, dtype=torch.int32) * (1 if sizes is None else 128)
        self._offsets, self._scales = _to_blocks(offsets), _to_blocks(scales)
        self._sizes = None if sizes is None else sizes.float().contiguous()
        self._run = products.product_int8(STORED[dtype], sizes is not None, shared())
        parts = (self._held, self._offsets, self._scales, self._bias, *(() if sizes is None else (sizes,)))
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        x, rows = self._rows(x), x.shape[0]
        out = self._empty(rows)
        sizes = 0 if self._sizes is None else self._sizes.data_ptr()
        weight = (self._held.data_ptr(), self._offsets.data_ptr(), self._scales.data_ptr(), self._bias.data_ptr())
        self._run(rows, self.in_features, self.out_features, x.data_ptr(), sizes, *weight, out.data_ptr())
        return out


class KernelInt4(_Layer):
    """A weight in int4, given as `quantize.quantize_groups` makes it; activations rounded by `activations.grouped`."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """numbers: int32 [out, in] of 0..15; scales: bfloat16 [in / 32, out, 2] of scale and zero, of number - 8."""
        super().__init__(numbers.shape, bias, dtype)
        eights = _interleaved(numbers.to(torch.uint8), 8)  # [out / 64, in / 8, 64, 8]
        self._held = eights[..., :4] | eights[..., 4:] << 4
        spread = F.pad(scales.transpose(1, 2), (0, -self.out_features % WIDTH))  # [in / 32, 2, out]
        self._scales = spread.view(scales.shape[0], 2, -1, WIDTH).permute(2, 0, 1, 3).contiguous()
        self._run = products.product_int4(STORED[dtype], shared())
        self.nbytes = self._held.nbytes + self._scales.nbytes + self._bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x, rows = self._rows(x), x.shape[0]
        out = self._empty(rows)
        weight = (self._held.data_ptr(), self._scales.data_ptr(), self._bias.data_ptr())
        self._run(rows, self.in_features, self.out_features, x.data_ptr(), *weight, out.data_ptr())
        return out
