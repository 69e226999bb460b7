"""Compiled kernels against float64: norm, gate, turn, write, attend, and the functions they are made of.

Also that a row has the same bits in any company, at any place, and shared by two threads or not.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

import numpy as np  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from numba import carray  # noqa: E402

from node.runtime.engine.blocks import BLOCK_TOKENS, blocks_for  # noqa: E402
from node.runtime.engine.kernels import calls, compiled, simd  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 2, 3, 5, 16, 33]
WIDTHS = [1, 15, 16, 17, 48, 80, 576, 1000]
NAN, INF = float("nan"), float("inf")


def normal(*shape: int, seed: int = 1, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def kernels(dtype: Any, dim: int = 16, parallel: bool = False, sharing: int = 1) -> calls.Kernels:
    return calls.Kernels(dtype, dim, sharing, parallel=parallel)


def close(got: Any, wanted: Any, least: float = 1e-30) -> None:
    """Each row within a few roundings of its largest number, or of `least`."""
    assert got.shape == wanted.shape
    if got.numel():
        limit = 4e-6 if got.dtype == torch.float32 else 2**-8
        wanted = wanted.reshape(-1, wanted.shape[-1])
        error = (got.reshape(wanted.shape).double() - wanted).abs().amax(1) / wanted.abs().amax(1).clamp(min=least)
        assert float(error.amax()) <= limit


def same_bits(one: Any, other: Any) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------------------- functions


@compiled.family
def _mapped(name: str) -> compiled.Kernel:
    function = getattr(simd, name)

    @compiled.kernel(compiled.COUNT, compiled.ADDRESS, compiled.ADDRESS)
    def run(count, x_at, out_at):  # type: ignore[no-untyped-def]
        x = carray(simd.pointer(x_at), count, np.float32)
        out = carray(simd.pointer(out_at), count, np.float32)
        for i in range(count):
            out[i] = function(x[i])

    return run


def mapped(name: str, x: Any) -> Any:
    out = torch.empty_like(x)
    _mapped(name)(len(x), x.data_ptr(), out.data_ptr())
    return out


def test_exp() -> None:
    x = torch.cat((torch.linspace(-87, 88, 1_000_003), torch.tensor([0.0, -0.0, 1e-30, -1e-8])))
    wanted = x.double().exp()
    assert float(((mapped("exp", x).double() - wanted) / wanted).abs().amax()) < 2 * 2**-23
    low, high, *rest = mapped("exp", torch.tensor([-INF, INF, NAN, -3e38, 3e38])).tolist()
    assert 0 <= low < 1e-37 and high > 1e38
    assert math.isnan(rest[0]) and rest[1:] == [low, high]


def test_tanh() -> None:
    x = torch.cat((torch.linspace(-20, 20, 1_000_003), torch.logspace(-30, 0, 1001), torch.tensor([-1e-3, 1e30])))
    wanted = x.double().tanh()
    assert float(((mapped("tanh", x).double() - wanted) / wanted).abs().nan_to_num().amax()) < 4 * 2**-23
    got = mapped("tanh", torch.tensor([NAN, INF, -INF, 0.0])).tolist()
    assert math.isnan(got[0]) and got[1:] == [1.0, -1.0, 0.0]


# ------------------------------------------------------------------------------------------------- row by row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_and_gates(dtype: Any, width: int) -> None:
    some = kernels(dtype)
    weight = 1 + normal(width, seed=2)
    for rows in ROWS:
        x = normal(rows, width, seed=rows, dtype=dtype) * torch.logspace(-3, 3, max(rows, 1))[:rows, None].to(dtype)
        wide = x.double()
        close(some.norm(x, weight, 1e-5), wide / (wide.square().mean(1, True) + 1e-5).sqrt() * weight.double())
        both = normal(rows, 2 * width, seed=rows + 1, dtype=dtype) * 4
        gate, up = both.double().chunk(2, 1)
        for name, plain in (("silu", F.silu), ("gelu_tanh", lambda z: F.gelu(z, approximate="tanh"))):
            run = some.gate(name)
            assert run is not None
            close(run(both), plain(gate) * up, 1e-2)  # far below 0 GELU is what cancelling leaves, here and in torch
    assert some.gate("gelu") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_heads_that_are_not_beside_each_other(dtype: Any) -> None:
    x, weight = normal(5, 9, 48, dtype=dtype), 1 + normal(48, seed=2)
    before = x.clone()
    got = kernels(dtype).norm(x[:, 2:6], weight, 1e-6)
    close(got, F.rms_norm(x[:, 2:6].double(), (48,), weight.double(), 1e-6))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "turned"), [(16, 16), (64, 64), (80, 32), (80, 80), (96, 48), (256, 256), (32, 2)])
def test_turn(dtype: Any, dim: int, turned: int) -> None:
    for rows in ROWS:
        x = normal(rows, 7, dim, seed=rows, dtype=dtype)
        cos, sin = (normal(rows, 1, turned, seed=seed, dtype=dtype) for seed in (3, 4))
        before = x.clone()
        part = x[:, :5, :turned].double()
        kernels(dtype).turn(x[:, :5, :turned], cos, sin)
        close(x[:, :5, :turned], part * cos.double() + part.roll(turned // 2, -1) * sin.double())
        assert torch.equal(x[:, 5:], before[:, 5:]) and torch.equal(x[:, :5, turned:], before[:, :5, turned:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_write(dtype: Any, dim: int) -> None:
    for rows in ROWS:
        cache = normal(4, 6 * BLOCK_TOKENS, dim, seed=9, dtype=dtype)
        slots = torch.randperm(6 * BLOCK_TOKENS, generator=torch.Generator().manual_seed(rows))[:rows]
        kv = normal(rows, 7, dim, seed=rows, dtype=dtype)[:, 3:]
        wanted = cache.clone()
        wanted[:, slots] = kv.transpose(0, 1)
        kernels(dtype).write(cache, slots, kv)
        assert same_bits(cache, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays_so_in_its_row_alone(dtype: Any) -> None:
    some = kernels(dtype)
    for value in (NAN, INF, -INF):
        for row in range(5):
            x = normal(5, 96, dtype=dtype)
            clean = some.norm(x, torch.ones(96), 1e-5)
            x[row, 37] = value
            got = some.norm(x, torch.ones(96), 1e-5)
            assert not bool(got[row].isfinite().all())
            others = [n for n in range(5) if n != row]
            assert same_bits(got[others], clean[others])
            for name in calls.GATES:
                run = some.gate(name)
                assert run is not None
                out = run(x)
                assert not bool(out[row, 37].isfinite())
                assert int((~out.isfinite()).sum()) == 1
    assert bool(some.norm(torch.full((2, 96), NAN, dtype=dtype), torch.ones(96), 1e-5).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_and_huge_rows(dtype: Any) -> None:
    some = kernels(dtype)
    x = torch.zeros(3, 48, dtype=dtype)
    x[1], x[2] = 1e18, -1e18
    assert some.norm(x, torch.ones(48), 1e-5)[0].tolist() == [0.0] * 48
    close(some.norm(x, torch.ones(48), 1e-5), F.rms_norm(x.double(), (48,), None, 1e-5))
    x = torch.tensor([[100.0, -100.0, 1e30, -1e30, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    for name, wanted in (("silu", F.silu), ("gelu_tanh", lambda z: F.gelu(z, approximate="tanh"))):
        run = some.gate(name)
        assert run is not None
        got = run(x)[0].double()
        torch.testing.assert_close(got, wanted(x[0, :5].double()), rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(dtype: Any) -> None:
    some, width = kernels(dtype), 577
    weight = 1 + normal(width, seed=2)
    x, gates = normal(1, width, seed=3, dtype=dtype), normal(1, 2 * width, seed=4, dtype=dtype)
    for rows in (2, 3, 5, 16, 33):
        for at in {0, 1, rows // 2, rows - 1}:
            many, both = normal(rows, width, seed=rows, dtype=dtype), normal(rows, 2 * width, seed=rows, dtype=dtype)
            many[at], both[at] = x[0], gates[0]
            assert same_bits(some.norm(many, weight, 1e-5)[at], some.norm(x, weight, 1e-5)[0])
            for name in calls.GATES:
                run = some.gate(name)
                assert run is not None
                assert same_bits(run(both)[at], run(gates)[0])
            heads = normal(rows, 3, 80, seed=rows, dtype=dtype)
            cos, sin = normal(rows, 1, 80, seed=5, dtype=dtype), normal(rows, 1, 80, seed=6, dtype=dtype)
            alone = heads[at : at + 1].clone()
            some.turn(heads, cos, sin)
            some.turn(alone, cos[at : at + 1], sin[at : at + 1])
            assert same_bits(heads[at], alone[0])


# ----------------------------------------------------------------------------------------------------- attention


class Case:
    """Sequences of these lengths in scattered blocks; what nobody may read is NaN."""

    def __init__(self, dtype: Any, dim: int, kv_heads: int, sharing: int, lengths: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        counts = [blocks_for(length) for length in lengths]
        blocks = sum(counts) + 3
        order = torch.randperm(blocks, generator=generator).tolist()
        self.cache = torch.full((2 * kv_heads, blocks * BLOCK_TOKENS, dim), NAN, dtype=dtype)
        self.lengths, self.slots = lengths, []
        lines = []
        for length, count in zip(lengths, counts, strict=True):
            table, order = order[:count], order[count:]
            lines.append([length, *table, *([0] * (max(counts) - count))])
            at = torch.cat([torch.arange(BLOCK_TOKENS) + BLOCK_TOKENS * block for block in table])
            self.cache[:, at] = torch.randn(2 * kv_heads, len(at), dim, generator=generator).to(dtype)
            self.cache[:, at[length:]] = 0  # as `PagedCache.begin` leaves them
            self.slots.append(at[:length])
        self.tables = torch.tensor(lines, dtype=torch.int64).view(len(lines), -1 if lines else 1)
        self.q = normal(len(lengths), kv_heads * sharing + 2, dim, seed=seed, dtype=dtype)[:, : kv_heads * sharing]
        self.scale = 1.5 / math.sqrt(dim)

    def run(self, *, window: int | None = None, cap: float = 0.0, parallel: bool = False) -> Any:
        sharing = self.q.shape[1] // (len(self.cache) // 2)
        if self.q.shape[2] != 64 and sharing > 1:
            sharing = min(sharing, 3) - 1  # fewer than there are: each is compiled
        some = kernels(self.q.dtype, self.q.shape[2], parallel, sharing)
        return some.attend(self.cache, self.tables, self.q, self.scale, window, cap)

    def wanted(self, *, window: int | None = None, cap: float = 0.0) -> Any:
        rows, heads, dim = self.q.shape
        kv_heads = len(self.cache) // 2
        out = []
        for row, slots in enumerate(self.slots):
            seen = slots[-window:] if window else slots
            keys, values = self.cache[:, seen].double().chunk(2)
            scores = self.scale * self.q[row].double().view(kv_heads, -1, dim) @ keys.transpose(1, 2)
            if cap:
                scores = cap * torch.tanh(scores / cap)
            out.append((scores.softmax(-1) @ values).view(heads * dim))
        return torch.stack(out) if out else torch.empty(rows, heads * dim, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128, 256])
def test_attend(dtype: Any, dim: int) -> None:
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 100, 170]
    for sharing in range(1, 9):
        case = Case(dtype, dim, 2 if sharing % 2 else 1, sharing, lengths, seed=sharing)
        close(case.run(), case.wanted())
    for rows in ROWS:
        case = Case(dtype, dim, 3, 2, [1 + 7 * n for n in range(rows)][::-1], seed=rows)
        close(case.run(), case.wanted())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 5, 15, 16, 17, 20, 64, 169, 170, 171, 5000])
@pytest.mark.parametrize("cap", [0.0, 2.0, 50.0])
def test_attend_in_a_window_and_capped(dtype: Any, window: int, cap: float) -> None:
    case = Case(dtype, 64, 3, 3, [1, 5, 16, 17, 33, 64, 65, 170])
    close(case.run(window=window, cap=cap), case.wanted(window=window, cap=cap))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_over_long_sequences(dtype: Any) -> None:
    case = Case(dtype, 64, 2, 4, [5000, 4999, 4096, 1025, 1])
    for window in (None, 1000):
        close(case.run(window=window), case.wanted(window=window))


def test_large_scores_do_not_overflow() -> None:
    case = Case(torch.float32, 64, 1, 2, [40, 3])
    case.q *= 1000
    close(case.run(), case.wanted())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_passes_on_what_is_not_a_number(dtype: Any) -> None:
    case = Case(dtype, 64, 2, 2, [40, 33, 17])
    clean = case.run()
    case.q[1, 0, 5] = NAN
    got = case.run().view(3, 4, 64)
    assert bool(got[1, 0].isnan().all()) and bool(got[1, 1:].isfinite().all())
    assert same_bits(got[[0, 2]], clean.view(3, 4, 64)[[0, 2]])
    case = Case(dtype, 64, 2, 2, [40, 33, 17])
    case.cache[1, case.slots[2][4], 0] = NAN  # a key of the second head
    got = case.run().view(3, 4, 64)
    assert bool(got[2, 2:].isnan().all()) and bool(got[2, :2].isfinite().all()) and bool(got[:2].isfinite().all())
    case = Case(dtype, 64, 2, 2, [40, 33, 17])
    case.cache[2, case.slots[0][39], 7] = NAN  # a value of the first head
    got = case.run().view(3, 4, 64)
    assert bool(got[0, :2, 7].isnan().all()) and int(got.isnan().sum()) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80])
def test_attention_of_a_row_has_the_same_bits_in_any_company_and_by_two_threads(dtype: Any, dim: int) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        if not compiled.shared():
            pytest.skip("this machine lacks numba's library of threads")
        for window, cap in ((None, 0.0), (20, 0.0), (None, 30.0)):
            case = Case(dtype, dim, 3, 3, [170, 100, 33, 17, 16, 2, 1])
            together = case.run(window=window, cap=cap)
            assert same_bits(case.run(window=window, cap=cap, parallel=True), together)
            tables, q = case.tables, case.q
            for order in ([3], [0, 3], [6, 5, 4, 3, 2, 1, 0], [2, 2, 2]):
                case.tables, case.q = tables[order].contiguous(), q[order].contiguous()
                for parallel in (False, True):
                    assert same_bits(case.run(window=window, cap=cap, parallel=parallel), together[order])
    finally:
        torch.set_num_threads(threads)
