"""Linear layers of few rows, and the activations of int8 layers.

A layer for few rows holds the weight a second time, in the layout of `products`; the one for many rows stays beside it
(`linear.TwoCopies`). Both hold the same numbers, and round activations to the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.kernels import int8, products
from node.runtime.engine.kernels.compiled import STORED, demand, shared
from node.runtime.engine.kernels.products import WIDTH


class _FewRows:
    """What the layers have in common: a product of float32 rows with a weight in blocks."""

    def __init__(self, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = shape
        self._dtype = dtype
        self._bias = torch.zeros(self.out_features) if bias is None else bias.float().contiguous()

    def _multiply(self, run: Callable[..., None], x: Tensor, held: Tensor, scales: Tensor) -> Tensor:
        rows = x.shape[0]
        demand(x.dtype is torch.float32 and x.is_contiguous() and x.shape == (rows, self.in_features), "product", x)
        out = torch.empty(rows, self.out_features, dtype=self._dtype)
        addresses = (held.data_ptr(), scales.data_ptr(), self._bias.data_ptr(), out.data_ptr())
        run(rows, self.in_features, self.out_features, x.data_ptr(), *addresses)
        return out


class FewBFloat16(_FewRows):
    """A weight in bfloat16 as it is; float32 or bfloat16 in and out."""

    tolerance = 1e-2

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape, bias, weight.dtype)
        self._held, self._ones = _blocks(weight.bfloat16()), torch.ones(self.out_features)
        self._run = products.product(STORED[torch.bfloat16], STORED[self._dtype], shared())
        self.nbytes = self._held.nbytes + self._ones.nbytes + self._bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return _in_groups(lambda x: self._multiply(self._run, x.float(), self._held, self._ones), x, 4)


class FewInt8(_FewRows):
    """A weight in int8, given as numbers and scales; activations rounded by `Activations`."""

    def __init__(
        self, numbers: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype, sizes: Tensor | None = None
    ) -> None:
        """numbers: int8 [out, in]; scales: float32 [out]; sizes: float32 [in] for the fine scheme."""
        super().__init__(numbers.shape, bias, dtype)
        self._held, self._scales = _blocks(numbers), scales.contiguous()
        self._round = Activations(sizes)
        self._run = products.product(np.int8, STORED[dtype], shared())
        self.nbytes = self._held.nbytes + self._scales.nbytes + self._bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return _in_groups(lambda x: self._multiply(self._run, self._round.rounded(x), self._held, self._scales), x, 4)


class FewInt4(_FewRows):
    """A weight in int4, given as `quantize.quantize_groups` makes it."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """numbers: int32 [out, in] of 0..15; scales: bfloat16 [in / 32, out, 2] of scale and zero, of number - 8."""
        super().__init__(numbers.shape, bias, dtype)
        blocks = _blocks(numbers.to(torch.uint8))  # [out / 64, in, 64]
        pairs = blocks.view(blocks.shape[0], -1, 2, WIDTH)
        self._held = (pairs[:, :, 0] | pairs[:, :, 1] << 4).contiguous()
        spread = F.pad(scales.transpose(1, 2), (0, -self.out_features % WIDTH))  # [in / 32, 2, out]
        self._scales = spread.view(scales.shape[0], 2, -1, WIDTH).permute(2, 0, 1, 3).contiguous()
        self._run = products.product_int4(STORED[dtype], shared())
        self.nbytes = self._held.nbytes + self._scales.nbytes + self._bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return _in_groups(lambda x: self._multiply(self._run, x.bfloat16().float(), self._held, self._scales), x, 2)


class Activations:
    """Rows [rows, width] of float32 or bfloat16 on their way into int8 products and back: fine with `sizes`, else plain."""

    def __init__(self, sizes: Tensor | None = None) -> None:
        """sizes: float32 [width]."""
        self._sizes = None if sizes is None else sizes.float().contiguous()

    def rounded(self, x: Tensor) -> Tensor:
        """x with the precision that the products see, times the sizes: float32."""
        x, stored = self._checked(x)
        out = torch.empty(x.shape)
        if self._sizes is None:
            int8.plain_rounded(stored)(*x.shape, x.data_ptr(), out.data_ptr())
        else:
            int8.fine_rounded(stored)(*x.shape, x.data_ptr(), self._sizes.data_ptr(), out.data_ptr())
        return out

    def spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied, float32 [rows, width] (fine: twice the rows), and the marks that `gather` wants."""
        x, stored = self._checked(x)
        rows, width = x.shape
        marks = torch.empty(rows, 2)
        if self._sizes is None:
            out = torch.empty(rows, width)
            int8.plain_spread(stored)(rows, width, x.data_ptr(), out.data_ptr(), marks.data_ptr())
        else:
            out = torch.empty(2 * rows, width)
            sizes = self._sizes.data_ptr()
            int8.fine_spread(stored)(rows, width, x.data_ptr(), sizes, out.data_ptr(), marks.data_ptr())
        return out, marks

    def _checked(self, x: Tensor) -> tuple[Tensor, Any]:
        """The rows beside each other, and what a number of theirs is to a kernel."""
        demand(x.dtype in STORED and x.dim() == 2 and x.shape[1] > 0, "rounding", x)
        if self._sizes is not None:
            demand(self._sizes.shape == x.shape[1:], "rounding", x, self._sizes)
        return x.contiguous(), STORED[x.dtype]

    def gather(self, products: Tensor, marks: Tensor, sums: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's result [rows, out] in `dtype` from the products; sums, bias: float32 [out]."""
        rows, width, stored = marks.shape[0], products.shape[1], STORED[dtype]
        fits = products.shape[0] == rows * (1 if self._sizes is None else 2) and marks.shape == (rows, 2)
        demand(fits and bias.shape == sums.shape == (width,), "gather", products, marks, sums, bias)
        for one in (products, marks, sums, bias):
            demand(one.dtype is torch.float32 and one.is_contiguous(), "gather", one)
        out = torch.empty(rows, width, dtype=dtype)
        if self._sizes is None:
            addresses = (products.data_ptr(), marks.data_ptr(), sums.data_ptr(), bias.data_ptr(), out.data_ptr())
            int8.plain_gather(stored)(rows, width, *addresses)
        else:
            addresses = (products.data_ptr(), marks.data_ptr(), bias.data_ptr(), out.data_ptr())
            int8.fine_gather(stored)(rows, width, *addresses)
        return out


def _blocks(weight: Tensor) -> Tensor:
    """[out, in] to [out / 64, in, 64], zeros behind the last output."""
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % WIDTH))
    return padded.view(-1, WIDTH, weight.shape[1]).transpose(1, 2).contiguous()


def _in_groups(multiply: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """The kernels take one row, or whole groups of `size`."""
    rows = x.shape[0]
    if rows == 1 or rows % size == 0:
        return multiply(x.contiguous())
    return multiply(F.pad(x, (0, 0, 0, -rows % size)))[:rows]
