"""What drawing asks of a whole row, by kernels: `engine.race.Field` on tensors. Tried against torch's before it is used."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from node.runtime.engine.kernels.compiled import demand
from node.runtime.engine.kernels.race import contenders, mass
from node.runtime.engine.maxima import GROUP, maxima
from node.runtime.engine.philox import MASK
from node.runtime.engine.race import Hit, Place, Row, TorchField

log = logging.getLogger(__name__)

_HITS: Final = 64
"""Hits that there is room for at first. Usual are eight."""


class CompiledField:
    """`race.Field` by kernels, for rows of any vocabulary."""

    def __init__(self) -> None:
        kinds = {torch.float32: np.float32, torch.float64: np.float64}
        self._contenders = contenders()
        self._mass = {dtype: (mass(kind), kind) for dtype, kind in kinds.items()}
        self._out = torch.empty(2 + 3 * _HITS, dtype=torch.float64)

    def contenders(self, row: Row, limit: Place, lower: float) -> tuple[float, Sequence[Hit]]:
        groups = _checked(row)
        out, room, address = self._out, _HITS, row.values.data_ptr()
        wide = row.values.dtype is torch.float64
        while True:
            self._contenders(
                *(len(row.values), 0 if wide else address, address if wide else 0, groups.data_ptr()),
                *(row.top, 1 / row.temperature),
                *(limit.value, limit.token, lower),
                *(row.seed & MASK, row.seed >> 32, row.position, room, out.data_ptr()),
            )
            maxima, found, *hits = out.tolist()
            if found <= room:
                break
            room = int(found)
            out = torch.empty(2 + 3 * room, dtype=torch.float64)
        parts = (hits[part : 3 * int(found) : 3] for part in range(3))
        return maxima, [Hit(int(token), int(word), value) for token, word, value in zip(*parts, strict=True)]

    def mass(self, row: Row, place: Place) -> float:
        groups = _checked(row)
        run, kind = self._mass[row.values.dtype]
        run(
            *(len(row.values), row.values.data_ptr(), groups.data_ptr(), row.top, 1 / row.temperature),
            *(place.value, place.token, float(np.nextafter(kind(place.value), kind(math.inf))), self._out.data_ptr()),
        )
        return float(self._out[0])


def _checked(row: Row) -> Tensor:
    """Its maxima, in float64."""
    values, groups = row.values, row.groups.double()
    fits = values.dim() == 1 and values.is_contiguous() and values.dtype in (torch.float32, torch.float64)
    demand(fits and values.device.type == "cpu", "a draw", values)
    demand(groups.shape == (-(-len(values) // GROUP),) and groups.is_contiguous(), "a draw", values, groups)
    return groups


# ---------------------------------------------------------------------------------------------------------------- trial


@cache
def tried() -> bool:
    """Whether the kernels say here what torch says of a small case; the log says when not."""
    try:
        _compare()
    except (ArithmeticError, RuntimeError, OSError) as error:
        log.warning("tokens are drawn without compiled kernels: %s", str(error).partition("\n")[0][:200])
        return False
    return True


def _compare() -> None:
    """Raises `ArithmeticError` when a kernel disagrees with torch."""
    vocab = 1000
    values = (3 * torch.randn(vocab, generator=torch.Generator().manual_seed(7))).round_(decimals=1)
    place = Place(float(values[500]), 500)
    for dtype in (torch.float32, torch.float64):
        some = values.to(dtype)
        row = Row(some, maxima(some[None])[0], float(some.max()), 0.8, 1 << 63 | 5, 1 << 32 | 3)
        mine, torchs = CompiledField(), TorchField(vocab, torch.device("cpu"))
        for limit, lower in ((Place(-math.inf, vocab), 2.0), (place, 7.0)):
            maxima_sum, hits = mine.contenders(row, limit, lower)
            wanted_sum, wanted = torchs.contenders(row, limit, lower)
            if list(hits) != wanted or not hits:
                raise ArithmeticError("other tokens might be drawn")
            sums = ((maxima_sum, wanted_sum), (mine.mass(row, limit), torchs.mass(row, limit)))
            if not all(abs(one - other) <= 1e-5 * other for one, other in sums):
                raise ArithmeticError("sums are off")
