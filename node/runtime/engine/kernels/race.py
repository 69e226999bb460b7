"""What drawing from a whole vocabulary looks at, as kernels: one pass each over a row. See `engine.race`.

`groups` are the row's maxima, always in float64; `values` the row.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11, section 3.3 (philox4x32-10).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import carray, types

from node.runtime.engine.kernels.compiled import ADDRESS, COUNT, FLOAT, Kernel, family, kernel
from node.runtime.engine.kernels.simd import exp, pointer
from node.runtime.engine.maxima import GROUP
from node.runtime.engine.philox import DOMAIN, FACTOR_0, FACTOR_1, LANES, MASK, ROUNDS, STEP_0, STEP_1
from node.runtime.engine.race import ROOM

_DOUBLE: Final = types.float64
_FACTOR_0, _FACTOR_1 = np.uint64(FACTOR_0), np.uint64(FACTOR_1)
_STEP_0, _STEP_1 = np.uint64(STEP_0), np.uint64(STEP_1)
_LOW, _HALF, _DOMAIN = np.uint64(MASK), np.uint64(32), np.uint64(DOMAIN)


@family
def contenders() -> Kernel:
    """(vocab, narrow, wide, groups, top, inverse, limit, token, lower, low, high, position, room, out).

    narrow, wide: the row in float32 or float64, the other's address 0. limit, token: a place. low, high: the seed.
    out: float64 [2 + 3 * room]: the sum of the maxima, how many hits there are, and so many of them as there is room for.
    """

    @kernel(
        *(COUNT, ADDRESS, ADDRESS, ADDRESS, _DOUBLE, FLOAT, _DOUBLE, COUNT),
        *(_DOUBLE, COUNT, COUNT, COUNT, COUNT, ADDRESS),
    )
    def run(  # type: ignore[no-untyped-def]
        vocab, narrow_at, wide_at, groups_at, top, inverse, limit, limit_token, lower, low, high, position, room, out_at
    ):
        narrow, wide = carray(pointer(narrow_at), vocab, np.float32), carray(pointer(wide_at), vocab, np.float64)
        groups = carray(pointer(groups_at), -(-vocab // GROUP), np.float64)
        out = carray(pointer(out_at), 2 + 3 * room, np.float64)
        mass = 0.0
        for g in range(len(groups)):
            if groups[g] >= limit:
                mass += exp(np.float32(groups[g] - top) * inverse)
        factor = np.float32(math.exp(lower) / mass * 4294967296.0 * ROOM)
        near, far = np.uint64(position) & _LOW, np.uint64(position) >> _HALF
        words = np.empty(GROUP, np.uint32)  # 2^32 - 1 - the words of a group
        found = 0
        for g in range(len(groups)):
            most = exp(np.float32(groups[g] - top) * inverse) * factor
            if groups[g] < limit or most < np.float32(0.4):  # the least noise is half a unit
                continue
            first, least = np.uint64(g * (GROUP // LANES)), _LOW
            for n in range(GROUP // LANES):  # in place, or LLVM makes no vectors of it
                a, b, c, d = first + np.uint64(n), near, far, _DOMAIN
                k0, k1 = np.uint64(low), np.uint64(high)
                for _ in range(ROUNDS):
                    left, right = a * _FACTOR_0, c * _FACTOR_1
                    a, b = (right >> _HALF) ^ b ^ k0, right & _LOW
                    c, d = (left >> _HALF) ^ d ^ k1, left & _LOW
                    k0, k1 = (k0 + _STEP_0) & _LOW, (k1 + _STEP_1) & _LOW
                a, b, c, d = a ^ _LOW, b ^ _LOW, c ^ _LOW, d ^ _LOW
                words[4 * n], words[4 * n + 1], words[4 * n + 2], words[4 * n + 3] = a, b, c, d
                least = min(least, min(min(a, b), min(c, d)))
            if np.float32(least) > most:
                continue
            for token in range(GROUP * g, min(GROUP * g + GROUP, vocab)):
                value = wide[token] if wide_at else np.float64(narrow[token])
                word = words[token - GROUP * g]
                likely = exp(np.float32(value - top) * inverse) * factor
                if np.float32(word) <= likely and (value > limit or (value == limit and token < limit_token)):
                    if found < room:
                        out[2 + 3 * found], out[3 + 3 * found], out[4 + 3 * found] = token, word, value
                    found += 1
        out[0], out[1] = mass, found

    return run


@family
def mass(dtype: Any) -> Kernel:
    """(vocab, values, groups, top, inverse, limit, token, above, out): the sum of exp((value - top) * inverse) of what is ranked
    before a place, into out: float64 [1].

    limit, token: the place; above: the least value above the limit.
    """

    @kernel(COUNT, ADDRESS, ADDRESS, _DOUBLE, FLOAT, _DOUBLE, COUNT, _DOUBLE, ADDRESS)
    def run(vocab, values_at, groups_at, top, inverse, limit, limit_token, above, out_at):  # type: ignore[no-untyped-def]
        values = carray(pointer(values_at), vocab, dtype)
        groups = carray(pointer(groups_at), -(-vocab // GROUP), np.float64)
        out = carray(pointer(out_at), 1, np.float64)
        total = 0.0
        for g in range(len(groups)):
            if groups[g] >= limit:
                begin, end = GROUP * g, min(GROUP * g + GROUP, vocab)
                part = np.float32(0)
                for token in range(begin, end):
                    likely = exp(np.float32(values[token] - dtype(top)) * inverse)
                    least = limit if token < limit_token else above
                    part += likely if values[token] >= dtype(least) else np.float32(0)
                total += part
        out[0] = total

    return run
