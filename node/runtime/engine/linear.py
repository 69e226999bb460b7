"""placeholder until the packed formats land"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FORMATS: Final = ("float32", "bfloat16", "float16", "int8", "int4")


def compute_dtype(fmt: str, device: torch.device) -> torch.dtype:
    return torch.float32 if fmt == "float32" else torch.bfloat16


class Linear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.nbytes = weight.nbytes
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def make_linear(weight: Tensor, fmt: str, bias: Tensor | None = None) -> Linear:
    dtype = compute_dtype(fmt, weight.device)
    return Linear(weight.to(dtype), None if bias is None else bias.to(dtype))
