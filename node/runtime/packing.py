"""How many bytes the engine's linear layers take once they are packed, by the rules of `node.runtime.engine.linear`,
`quantize` and `kernels.layers`, without torch and without a weight.

The same formulas as there, so the two change together; a test holds every architecture and format against what an engine
says of itself. They assume that every kernel works that the format can have. Where one does not, the engine's own figure
differs, and that one counts from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Final

from node.runtime.hal import processor

_COMPUTED: Final = {"float32": 4, "bfloat16": 2, "float16": 4, "int8": 4, "int4": 2}
"""Bytes of a number that a CPU computes with, by format (`linear.compute_dtype`)."""
_ELSEWHERE: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "int4": 2}
_MAKING: Final = {"float32": 4, "bfloat16": 8, "float16": 8, "int8": 16, "int4": 16}
"""Bytes of a number while its layer is packed, besides what is packed: copies in float32, rounded ones."""
_GROUP: Final = 32
_BLOCK: Final = 64
"""Outputs that the compiled kernels read together."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Of one engine."""

    fmt: str
    """One of `linear.FORMATS`."""
    cpu: bool = True
    few_rows: bool = True
    """A bfloat16 layer on a CPU may have a second copy for few rows (not in exact mode)."""

    @property
    def item(self) -> int:
        """Bytes of one number of embeddings, keys and values."""
        return (_COMPUTED if self.cpu else _ELSEWHERE)[self.fmt]

    @property
    def making(self) -> int:
        """Bytes that each number of a layer takes for a moment, while the layer is packed."""
        return _MAKING[self.fmt]

    def linear(self, out: int, inputs: int, *, bias: bool, head: bool = False) -> int:
        """Bytes of a layer with a weight [out, inputs]."""
        if self.fmt == "int4" and not head and self._int4_fits(out, inputs):
            if not self.cpu:
                return out * inputs // 2 + 4 * out * inputs // _GROUP + self._added(out, bias)
            # numbers; a scale and a zero for each group; a bias, or zeros
            return _up(out, _BLOCK) * (inputs // 2 + 4 * inputs // _GROUP + 4)
        if self.fmt in ("int8", "int4"):
            return self._int8(out, inputs, bias, fine=head or inputs > out)
        if not self.cpu:
            return out * inputs * self.item + self._added(out, bias)
        if self.fmt == "float16":
            return 2 * fbgemm_padded(out, inputs, 16) + (4 * out if bias else 0)
        many = self.item * _blocked(out, inputs, self.item) + self._added(out, bias)
        if self.fmt != "bfloat16" or not _compiled() or not (self.few_rows or _alone()):
            return many
        return _up(out, _BLOCK) * (2 * _up(inputs, 2) + 4) + (0 if _alone() else many)

    def _added(self, out: int, bias: bool) -> int:
        return out * self.item if bias else 0

    def _int8(self, out: int, inputs: int, bias: bool, *, fine: bool) -> int:
        if not self.cpu or not _compiled():
            return out * inputs + 4 * out + self._added(out, bias)
        # numbers; their sums, a scale, a bias or zeros; sizes of columns
        return _up(out, _BLOCK) * (_up(inputs, 4) + 12) + (4 * inputs if fine else 0)

    def _int4_fits(self, out: int, inputs: int) -> bool:
        if self.cpu:
            return inputs % _GROUP == 0 and _compiled()
        return out % 8 == 0 and inputs % 128 == 0


@cache
def _compiled() -> bool:
    """Whether the engine has its compiled kernels (`kernels.importable`)."""
    return find_spec("numba") is not None


@cache
def _alone() -> bool:
    """`linear.compiled_alone`."""
    has = processor.flags()
    return "avx512_bf16" in has and "amx_bf16" not in has


def fbgemm_padded(out: int, inputs: int, columns: int) -> int:
    """`linear.fbgemm_padded`."""
    return _up(inputs, 512) * _up(out, columns)


def _blocked(out: int, inputs: int, item: int) -> int:
    """Numbers in oneDNN's blocked layout for AVX-512: blocks of 64 outputs, of 64 bytes of inputs."""
    return _up(out, 64) * _up(inputs, 64 // item)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
