"""How many bytes the engine's linear layers take once they are packed, by the rules of `node.runtime.engine.linear` and
`quantize`, without torch and without a weight.

The same formulas as there, so the two change together; a test holds every architecture and format against what an engine
says of itself. They assume that every kernel works that the format can have. Where one does not, the engine's own figure
differs, and that one counts from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_COMPUTED: Final = {"float32": 4, "bfloat16": 2, "float16": 4, "int8": 4, "int4": 2}
"""Bytes of a number that a CPU computes with, by format (`linear.compute_dtype`)."""
_ELSEWHERE: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "int4": 2}
_MAKING: Final = {"float32": 4, "bfloat16": 8, "float16": 8, "int8": 16, "int4": 16}
"""Bytes of a number while its layer is packed, besides what is packed: copies in float32, rounded ones."""
_GROUP: Final = 32


@dataclass(frozen=True, slots=True)
class Packing:
    """Of one engine."""

    fmt: str
    """One of `linear.FORMATS`."""
    cpu: bool = True
    few_rows: bool = True
    """A bfloat16 layer on a CPU has a second copy for few rows (not in exact mode)."""

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
        added = out * self.item if bias else 0
        if self.fmt == "int4" and not head:
            packed = self._int4(out, inputs)
            if packed:
                return packed + added
        if self.fmt in ("int8", "int4"):
            return self._int8(out, inputs, fine=head or inputs > out) + added
        if not self.cpu:
            return out * inputs * self.item + added
        if self.fmt == "float16":
            return _float16(out, inputs, bias)
        packed = self.item * _blocked(out, inputs, self.item) + added
        return packed + (_float16(out, inputs, bias) if self.fmt == "bfloat16" and self.few_rows else 0)

    def _int8(self, out: int, inputs: int, *, fine: bool) -> int:
        if not self.cpu:
            return out * inputs + 4 * out
        # numbers; a scale, a zero point and a sum that the library keeps; our own sums; sizes of columns
        return fbgemm_padded(out, inputs, 48) + 12 * out + 4 * out + (4 * inputs if fine else 0)

    def _int4(self, out: int, inputs: int) -> int:
        """0 where the kernel has no such shape."""
        rows, columns = (16, _GROUP) if self.cpu else (8, 128)
        if out % rows or inputs % columns:
            return 0
        return out * inputs // 2 + 4 * out * inputs // _GROUP


def fbgemm_padded(out: int, inputs: int, columns: int) -> int:
    """`linear.fbgemm_padded`."""
    return _up(inputs, 512) * _up(out, columns)


def _float16(out: int, inputs: int, bias: bool) -> int:
    return 2 * fbgemm_padded(out, inputs, 16) + (4 * out if bias else 0)


def _blocked(out: int, inputs: int, item: int) -> int:
    """Numbers in oneDNN's blocked layout for AVX-512: blocks of 64 outputs, of 64 bytes of inputs."""
    return _up(out, 64) * _up(inputs, 64 // item)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
