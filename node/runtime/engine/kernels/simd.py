"""Sixteen floats at a time, as a Numba type: kernels say what is a vector instead of hoping that the compiler sees it.

`load` reads sixteen neighbours of a flat array, whatever they are stored as, and widens them; `store` rounds them back.
bfloat16 is held in uint16 arrays, which Numba has; rounding is to nearest, ties to even, and keeps NaN. LLVM splits the
vectors where registers are shorter.

Sources: Numba's extending API (docs: "Low-level extension API"); LLVM language reference (vector operations).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_jitable, register_model

LANES: Final = 16
_FEATURES: Final = {} if config.CPU_NAME or config.CPU_FEATURES else get_host_cpu_features()
"""None where Numba was told to compile for another processor: LLVM ends the process over an instruction that it has not."""
HAS_BYTES: Final = bool(_FEATURES.get("avx512vnni"))
"""The processor multiplies bytes by fours in one instruction."""
HAS_PAIRS: Final = bool(_FEATURES.get("avx512bf16"))
"""The processor multiplies bfloat16 by pairs in one instruction."""
HAS_TILES: Final = bool(_FEATURES.get("amx-bf16"))
"""The processor multiplies whole tiles of bfloat16, which torch's libraries use and these kernels do not."""
_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_FUSED: Final = ("contract",)


class _Floats(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Floats16")


class _Ints(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Ints16")


floats: Final = _Floats()
ints: Final = _Ints()
"""Sixteen of 32 bits: sums, or four bytes each."""


def _lanes(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _same(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(_lanes(element), [value] * LANES)


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _lanes(_F32))


@register_model(_Ints)
class _IntsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _lanes(_I32))


def _address(context: Any, builder: Any, signature: Any, args: Any, element: ir.Type) -> Any:
    """Of element args[1] of the flat array args[0], as a pointer to sixteen of `element`."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.bitcast(builder.gep(array.data, [args[1]]), _lanes(element).as_pointer())


def _read(builder: Any, pointer: Any, alignment: int) -> Any:
    value = builder.load(pointer)
    value.align = alignment
    return value


@intrinsic
def pointer(context, address):  # type: ignore[no-untyped-def]
    """An address as what `carray` takes."""
    return types.voidptr(address), lambda c, b, s, a: b.inttoptr(a[0], cgutils.voidptr_t)


@intrinsic
def zero(context):  # type: ignore[no-untyped-def]
    """Sixteen zeros."""
    return floats(), lambda c, b, s, a: _same(_F32, 0.0)


def _spread(builder: Any, value: Any, element: ir.Type) -> Any:
    nothing = ir.Constant(_lanes(element), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, value, _I32(0)), nothing, _same(_I32, 0))


@intrinsic
def splat(context, x):  # type: ignore[no-untyped-def]
    """One float sixteen times."""
    return floats(types.float32), lambda c, b, s, a: _spread(b, a[0], _F32)


@intrinsic
def load(context, array, index):  # type: ignore[no-untyped-def]
    """array[index : index + 16] of float32, uint16 (bfloat16) or int8."""
    dtype = array.dtype

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        element = {types.float32: _F32, types.uint16: _I16, types.int8: _I8}[dtype]
        value = _read(b, _address(c, b, s, a, element), dtype.bitwidth // 8)
        if dtype == types.uint16:
            return b.bitcast(b.shl(b.zext(value, _lanes(_I32)), _same(_I32, 16)), _lanes(_F32))
        return value if dtype == types.float32 else b.sitofp(b.sext(value, _lanes(_I32)), _lanes(_F32))

    return floats(array, types.int64), code


@intrinsic
def store(context, array, index, value):  # type: ignore[no-untyped-def]
    """array[index : index + 16] = value, of float32 or uint16 (bfloat16)."""
    dtype = array.dtype

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        value = a[2] if dtype == types.float32 else _rounded(b, a[2], _same, _lanes)
        element = _F32 if dtype == types.float32 else _I16
        b.store(value, _address(c, b, s, a, element)).align = dtype.bitwidth // 8
        return c.get_dummy_value()

    return types.void(array, types.int64, floats), code


def _rounded(b: Any, value: Any, same: Callable[..., Any], shape: Callable[..., Any]) -> Any:
    """Float bits to the upper half of them, to nearest, ties to even; NaN stays NaN."""
    bits = b.bitcast(value, shape(_I32))
    odd = b.and_(b.lshr(bits, same(_I32, 16)), same(_I32, 1))
    upper = b.lshr(b.add(b.add(bits, same(_I32, 0x7FFF)), odd), same(_I32, 16))
    return b.trunc(b.select(b.fcmp_unordered("uno", value, value), same(_I32, 0x7FC0), upper), shape(_I16))


@intrinsic
def mul(context, x, y):  # type: ignore[no-untyped-def]
    """x * y."""
    return floats(floats, floats), lambda c, b, s, a: b.fmul(a[0], a[1], flags=_FUSED)


@intrinsic
def fma(context, x, y, z):  # type: ignore[no-untyped-def]
    """x * y + z, rounded once where the processor can."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        return b.fadd(b.fmul(a[0], a[1], flags=_FUSED), a[2], flags=_FUSED)

    return floats(floats, floats, floats), code


@intrinsic
def add(context, x, y):  # type: ignore[no-untyped-def]
    """x + y."""
    return floats(floats, floats), lambda c, b, s, a: b.fadd(a[0], a[1], flags=_FUSED)


@intrinsic
def lesser(context, x, y):  # type: ignore[no-untyped-def]
    """The lesser of each two; y where one is NaN."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        return b.select(b.fcmp_ordered("<", a[0], a[1]), a[0], a[1])

    return floats(floats, floats), code


@intrinsic
def greater(context, x, y):  # type: ignore[no-untyped-def]
    """The greater of each two; y where one is NaN."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        return b.select(b.fcmp_ordered(">", a[0], a[1]), a[0], a[1])

    return floats(floats, floats), code


@intrinsic
def magnitude(context, x):  # type: ignore[no-untyped-def]
    """Without its sign."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        bits = b.and_(b.bitcast(a[0], _lanes(_I32)), _same(_I32, 0x7FFFFFFF))
        return b.bitcast(bits, _lanes(_F32))

    return floats(floats), code


@intrinsic
def rounded(context, x):  # type: ignore[no-untyped-def]
    """To the nearest whole number, ties to even."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_lanes(_F32), [_lanes(_F32)])
        return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.rint.v{LANES}f32"), a)

    return floats(floats), code


@intrinsic
def store_bytes(context, array, index, value):  # type: ignore[no-untyped-def]
    """array[index : index + 16] = value, whole numbers that fit, of uint8 or int8."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        value = b.trunc(b.fptosi(a[2], _lanes(_I32)), _lanes(_I8))
        b.store(value, _address(c, b, s, a, _I8)).align = 1
        return c.get_dummy_value()

    return types.void(array, types.int64, floats), code


def _folded(join: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    @intrinsic
    def fold(context, x):  # type: ignore[no-untyped-def]
        def code(c, b, s, a):  # type: ignore[no-untyped-def]
            value, width = a[0], LANES
            while width > 1:
                width //= 2
                nothing = ir.Constant(value.type, ir.Undefined)
                halves = [
                    b.shuffle_vector(
                        value, nothing, ir.Constant(ir.VectorType(_I32, width), list(range(at, at + width)))
                    )
                    for at in (0, width)
                ]
                value = join(b, *halves)
            return b.extract_element(value, _I32(0))

        return types.float32(floats), code

    return fold


total: Final = _folded(lambda b, x, y: b.fadd(x, y))
"""The sum of the sixteen."""
largest: Final = _folded(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
"""The largest of the sixteen, none of which is NaN."""


# -------------------------------------------------------------------------------------------------- products of parts of lanes


@intrinsic
def no_ints(context):  # type: ignore[no-untyped-def]
    """Sixteen zeros."""
    return ints(), lambda c, b, s, a: _same(_I32, 0)


@intrinsic
def load_lanes(context, array, index):  # type: ignore[no-untyped-def]
    """Sixteen lanes of 32 bits from array[index] on: four bytes, two bfloat16 or one int32 each."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        return _read(b, _address(c, b, s, a, _I32), 1)

    return ints(array, types.int64), code


@intrinsic
def splat_lane(context, array, index):  # type: ignore[no-untyped-def]
    """The 32 bits from array[index] on, four bytes or two bfloat16, in every lane."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        array = c.make_array(s.args[0])(c, b, a[0])
        four = _read(b, b.bitcast(b.gep(array.data, [a[1]]), _I32.as_pointer()), 1)
        return _spread(b, four, _I32)

    return ints(array, types.int64), code


@intrinsic
def splat_int(context, x):  # type: ignore[no-untyped-def]
    """One int32 sixteen times."""
    return ints(types.int32), lambda c, b, s, a: _spread(b, a[0], _I32)


def _halves(upper: bool) -> Callable[..., Any]:
    @intrinsic
    def half(context, x):  # type: ignore[no-untyped-def]
        def code(c, b, s, a):  # type: ignore[no-untyped-def]
            return b.and_(b.lshr(a[0], _same(_I32, 4)) if upper else a[0], _same(_I32, 0x0F0F0F0F))

        return ints(ints), code

    return half


lower_halves: Final = _halves(False)
"""The lower four bits of each byte, as bytes from 0 to 15."""
upper_halves: Final = _halves(True)
"""The upper four bits."""


@intrinsic
def sub_ints(context, x, y):  # type: ignore[no-untyped-def]
    """x - y."""
    return ints(ints, ints), lambda c, b, s, a: b.sub(a[0], a[1])


@intrinsic
def to_floats(context, x):  # type: ignore[no-untyped-def]
    """Sixteen int32 as floats, rounded to the nearest."""
    return floats(ints), lambda c, b, s, a: b.sitofp(a[0], _lanes(_F32))


@intrinsic
def dot_fours(context, sums, x, weights):  # type: ignore[no-untyped-def]
    """sums + the products of each lane's four bytes, of x without sign and of weights with sign; exact.

    One instruction where the processor has AVX-512 VNNI, else shifts and products of 32 bits.
    """

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        if HAS_BYTES:
            bytes_ = ir.VectorType(_I8, 4 * LANES)
            kind = ir.FunctionType(_lanes(_I32), [_lanes(_I32), bytes_, bytes_])
            run = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.vpdpbusd.512")
            return b.call(run, [a[0], b.bitcast(a[1], bytes_), b.bitcast(a[2], bytes_)])
        total = a[0]
        for n in range(4):
            one = b.and_(b.lshr(a[1], _same(_I32, 8 * n)), _same(_I32, 255))
            other = b.ashr(b.shl(a[2], _same(_I32, 24 - 8 * n)), _same(_I32, 24))
            total = b.add(total, b.mul(one, other))
        return total

    return ints(ints, ints, ints), code


@intrinsic
def dot_pairs(context, sums, x, weights):  # type: ignore[no-untyped-def]
    """sums + the products of each lane's two bfloat16, as floats.

    One instruction where the processor has AVX-512 BF16, else two products of floats.
    """

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        if HAS_PAIRS:
            kind = ir.FunctionType(_lanes(_F32), [_lanes(_F32), _lanes(_I32), _lanes(_I32)])
            return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512"), a)
        total = a[0]
        upper = _same(_I32, 0xFFFF0000)
        for half in (lambda v: b.shl(v, _same(_I32, 16)), lambda v: b.and_(v, upper)):
            one, other = (b.bitcast(half(v), _lanes(_F32)) for v in (a[1], a[2]))
            total = b.fadd(b.fmul(one, other, flags=_FUSED), total, flags=_FUSED)
        return total

    return floats(floats, ints, ints), code


@intrinsic
def store_ints(context, array, index, value):  # type: ignore[no-untyped-def]
    """array[index : index + 16] = value, of int32."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        b.store(a[2], _address(c, b, s, a, _I32)).align = 4
        return c.get_dummy_value()

    return types.void(array, types.int64, ints), code


# ------------------------------------------------------------------------------------------------------ one at a time


@intrinsic
def wide(context, x):  # type: ignore[no-untyped-def]
    """One number as float32, from float32 or uint16 (bfloat16). LLVM makes vectors of loops over it."""
    if x == types.uint16:
        return types.float32(x), lambda c, b, s, a: b.bitcast(b.shl(b.zext(a[0], _I32), _I32(16)), _F32)
    return types.float32(types.float32), lambda c, b, s, a: a[0]


@intrinsic
def narrow(context, x, array):  # type: ignore[no-untyped-def]
    """One float32 as what `array` holds."""
    if array.dtype == types.uint16:
        return types.uint16(types.float32, array), lambda c, b, s, a: _rounded(
            b, a[0], lambda kind, n: kind(n), lambda kind: kind
        )
    return types.float32(types.float32, array), lambda c, b, s, a: a[0]


@intrinsic
def _power_of_two(context, x):  # type: ignore[no-untyped-def]
    """2^x of a whole x within a float's exponents; NaN gives some number."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        # Added to 1.5 * 2^23, a whole number stands in the lowest bits. Unlike a conversion, LLVM makes vectors of it.
        whole = b.bitcast(b.fadd(a[0], ir.Constant(_F32, 12582912.0)), _I32)
        return b.bitcast(b.add(b.shl(whole, _I32(23)), _I32(127 << 23)), _F32)

    return types.float32(types.float32), code


@register_jitable
def exp(x):  # type: ignore[no-untyped-def]
    """e^x within two units in the last place, from -87 to 88, and as at these ends beyond them. NaN gives NaN.

    Source: Cephes, expf (Moshier 1989): range reduction by powers of two, a polynomial for the rest.
    """
    x = np.float32(-87) if x < np.float32(-87) else x
    x = np.float32(88) if x > np.float32(88) else x
    power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    return (series * rest * rest + rest + np.float32(1)) * _power_of_two(power)


@intrinsic
def _powers_of_two(context, x):  # type: ignore[no-untyped-def]
    """`_power_of_two` of each."""

    def code(c, b, s, a):  # type: ignore[no-untyped-def]
        whole = b.bitcast(b.fadd(a[0], _same(_F32, 12582912.0)), _lanes(_I32))
        return b.bitcast(b.add(b.shl(whole, _same(_I32, 23)), _same(_I32, 127 << 23)), _lanes(_F32))

    return floats(floats), code


@register_jitable
def exps(x):  # type: ignore[no-untyped-def]
    """`exp` of each of the sixteen."""
    x = lesser(splat(np.float32(88)), greater(splat(np.float32(-87)), x))  # NaN stays
    power = rounded(mul(x, splat(np.float32(1.44269504))))
    rest = fma(power, splat(np.float32(2.12194440e-4)), fma(power, splat(np.float32(-0.693359375)), x))
    series = fma(splat(np.float32(1.9875691500e-4)), rest, splat(np.float32(1.3981999507e-3)))
    series = fma(series, rest, splat(np.float32(8.3334519073e-3)))
    series = fma(series, rest, splat(np.float32(4.1665795894e-2)))
    series = fma(series, rest, splat(np.float32(1.6666665459e-1)))
    series = fma(series, rest, splat(np.float32(5.0000001201e-1)))
    return mul(fma(mul(series, rest), rest, add(rest, splat(np.float32(1)))), _powers_of_two(power))


@register_jitable
def tanh(x):  # type: ignore[no-untyped-def]
    """Within a few units in the last place. NaN gives NaN.

    Source: Cephes, tanhf: a polynomial near 0, where the other form would cancel.
    """
    square = x * x
    series = np.float32(-5.70498872745e-3)
    series = series * square + np.float32(2.06390887954e-2)
    series = series * square + np.float32(-5.37397155531e-2)
    series = series * square + np.float32(1.33314422036e-1)
    series = series * square + np.float32(-3.33332819422e-1)
    near = series * square * x + x
    far = np.float32(1) - np.float32(2) / (exp(np.float32(2) * x) + np.float32(1))
    return near if square < np.float32(0.390625) else far
