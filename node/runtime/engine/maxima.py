"""The largest of each group of neighbours in a row: found by vectors, where a search one by one is six times as slow on a CPU.

Whatever is then wanted of the largest of a row is looked for in few groups only.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

GROUP: Final = 64


def maxima(rows: Tensor) -> Tensor:
    """[rows, groups] of [rows, vocab], the last group of what is left; a NaN counts as the largest."""
    whole = rows.shape[1] // GROUP
    largest = rows[:, : whole * GROUP].unflatten(1, (whole, GROUP)).amax(2)
    if whole * GROUP == rows.shape[1]:
        return largest
    return torch.cat((largest, rows[:, whole * GROUP :].amax(1, keepdim=True)), 1)


def first_largest(rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [rows] of the largest values, of equals the first, and the values. `groups`: the rows' `maxima`."""
    values, group = groups.max(1, keepdim=True)
    near = group * GROUP + torch.arange(GROUP, device=rows.device)
    near.clamp_(max=rows.shape[1] - 1)  # what comes twice comes first where it belongs
    found = rows.gather(1, near).argmax(1, keepdim=True)
    return near.gather(1, found)[:, 0], values[:, 0]
