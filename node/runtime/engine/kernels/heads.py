"""A head's numbers as one vector: as many lanes as the head is wide, a multiple of 16. LLVM makes as many registers of it as the
processor needs.

`Stored` is as the numbers lie in memory, `Wide` is floats. bfloat16 is multiplied as it is stored, by pairs, where the processor
can; products by pairs lose nothing but denormal numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_jitable, register_model

from node.runtime.engine.kernels.simd import HAS_PAIRS, LANES, floats

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_LINE: Final = 64
"""Bytes that a processor brings at once."""
_FUSED: Final = ("contract",)


class _Vector(types.Type):  # type: ignore[misc]
    def __init__(self, element: str, dim: int) -> None:
        self.element, self.dim = element, dim
        super().__init__(name=f"{element}x{dim}")

    @property
    def kind(self) -> ir.VectorType:
        return ir.VectorType(_F32 if self.element == "float32" else _I16, self.dim)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.kind)


def _part(b: Any, value: Any, first: int, count: int) -> Any:
    """Lanes from `first` on."""
    lanes = ir.Constant(ir.VectorType(_I32, count), list(range(first, first + count)))
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes)


def _widened(b: Any, value: Any) -> Any:
    """bfloat16 as floats."""
    wide = ir.VectorType(_I32, value.type.count)
    bits = b.shl(b.zext(value, wide), ir.Constant(wide, [16] * value.type.count))
    return b.bitcast(bits, ir.VectorType(_F32, value.type.count))


def _spread(b: Any, value: Any, dim: int) -> Any:
    """One float in all lanes."""
    nothing = ir.Constant(ir.VectorType(_F32, dim), ir.Undefined)
    lanes = ir.Constant(ir.VectorType(_I32, dim), [0] * dim)
    return b.shuffle_vector(b.insert_element(nothing, value, _I32(0)), nothing, lanes)


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    return b.fadd(b.fmul(x, y, flags=_FUSED), z, flags=_FUSED)


@cache
def reader(dim: int) -> Callable[..., Any]:
    """What reads array[index : index + dim] of a flat array as it is stored."""

    @intrinsic
    def read(context, array, index):  # type: ignore[no-untyped-def]
        stored = _Vector(str(array.dtype), dim)

        def code(c, b, s, a):  # type: ignore[no-untyped-def]
            array = c.make_array(s.args[0])(c, b, a[0])
            value = b.load(b.bitcast(b.gep(array.data, [a[1]]), stored.kind.as_pointer()))
            value.align = s.args[0].dtype.bitwidth // 8
            return value

        return stored(array, types.int64), code

    return read


@cache
def ahead(dim: int) -> Callable[..., Any]:
    """What has the processor bring array[index : index + dim] near before it is read: to the second cache, whose queue is longer
    than the first one's (measured: 60 ms where that took 82)."""

    @intrinsic
    def fetch(context, array, index):  # type: ignore[no-untyped-def]
        def code(c, b, s, a):  # type: ignore[no-untyped-def]
            text = ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [text, _I32, _I32, _I32])
            run = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
            array = c.make_array(s.args[0])(c, b, a[0])
            start = b.bitcast(b.gep(array.data, [a[1]]), text)
            for line in range(0, dim * s.args[0].dtype.bitwidth // 8, _LINE):
                b.call(run, [b.gep(start, [_I32(line)]), _I32(0), _I32(2), _I32(1)])  # to read; second; data
            return c.get_dummy_value()

        return types.void(array, types.int64), code

    return fetch


@cache
def nothing(dim: int) -> Callable[..., Any]:
    """What makes a `Wide` of zeros."""

    @intrinsic
    def zeros(context):  # type: ignore[no-untyped-def]
        wide = _Vector("float32", dim)
        return wide(), lambda c, b, s, a: ir.Constant(wide.kind, [0.0] * dim)

    return zeros


@intrinsic
def widened(context, x):  # type: ignore[no-untyped-def]
    """Stored to wide."""
    return _Vector("float32", x.dim)(x), lambda c, b, s, a: a[0] if x.element == "float32" else _widened(b, a[0])


@intrinsic
def products(context, x, y):  # type: ignore[no-untyped-def]
    """Sixteen floats whose sum is the inner product of two stored vectors."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        sums: Any = ir.Constant(ir.VectorType(_F32, LANES), [0.0] * LANES)
        first = 0
        if x.element != "float32" and HAS_PAIRS:
            pairs = ir.VectorType(_I32, LANES)
            kind = ir.FunctionType(sums.type, [sums.type, pairs, pairs])
            run = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
            for first in range(0, x.dim - LANES, 2 * LANES):
                sums = b.call(run, [sums, *(b.bitcast(_part(b, v, first, 2 * LANES), pairs) for v in a)])
            first = x.dim // (2 * LANES) * 2 * LANES
        for at in range(first, x.dim, LANES):
            parts = [_part(b, value, at, LANES) for value in a]
            sums = _fused(b, *(parts if x.element == "float32" else [_widened(b, part) for part in parts]), sums)
        return sums

    return floats(x, y), code


@intrinsic
def weighed(context, weight, x, sums):  # type: ignore[no-untyped-def]
    """sums + weight * x, of wide vectors."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        same = b.insert_element(ir.Constant(a[1].type, ir.Undefined), a[0], _I32(0))
        spread = b.shuffle_vector(
            same, ir.Constant(a[1].type, ir.Undefined), ir.Constant(ir.VectorType(_I32, x.dim), [0] * x.dim)
        )
        return _fused(b, spread, a[1], a[2])

    return sums(types.float32, x, sums), code


@intrinsic
def totals(context, array, index):  # type: ignore[no-untyped-def]
    """Sixteen sums of sixteen floats each, which stand one after another from array[index] on."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        array = c.make_array(s.args[0])(c, b, a[0])
        lanes = ir.VectorType(_F32, LANES)
        start, found = b.bitcast(b.gep(array.data, [a[1]]), lanes.as_pointer()), []
        for n in range(LANES):
            found.append(b.load(b.gep(start, [_I32(n)])))
            found[-1].align = 4
        width = LANES // 2
        while (
            width
        ):  # each vector holds groups of 2 * width parts of one sum; two vectors become one, of groups half as wide
            half = len(found) // 2
            found = [_joined(b, found[n], found[n + half], width) for n in range(half)]
            width //= 2
        return found[0]

    return floats(array, types.int64), code


def _joined(b: Any, x: Any, y: Any, width: int) -> Any:
    """The halves of x's and y's groups of 2 * `width` added, a group of x before one of y."""
    starts = [at for group in range(0, LANES, 2 * width) for at in (group, LANES + group)]
    lower, upper = (
        ir.Constant(ir.VectorType(_I32, LANES), [at + shift + n for at in starts for n in range(width)])
        for shift in (0, width)
    )
    return b.fadd(b.shuffle_vector(x, y, lower), b.shuffle_vector(x, y, upper), flags=_FUSED)


@intrinsic
def store_wide(context, array, index, x, factor):  # type: ignore[no-untyped-def]
    """array[index : index + dim] = x * factor, of float32."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        array = c.make_array(s.args[0])(c, b, a[0])
        b.store(
            b.fmul(a[2], _spread(b, a[3], x.dim)), b.bitcast(b.gep(array.data, [a[1]]), a[2].type.as_pointer())
        ).align = 4
        return c.get_dummy_value()

    return types.void(array, types.int64, x, types.float32), code


def each(count: int, one: Callable[..., Any]) -> Callable[..., Any]:
    """What makes the tuple of one(0, ...) to one(count - 1, ...), written out."""
    last = count - 1
    if last == 0:

        @register_jitable
        def single(*given):  # type: ignore[no-untyped-def]
            return (one(0, *given),)

        return single
    before = each(last, one)

    @register_jitable
    def run(*given):  # type: ignore[no-untyped-def]
        return (*before(*given), one(last, *given))

    return run
