"""Layers on compiled products: against float64 with the weights as they are held; bits that do not depend on company, place
or threads; what is not a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from node.runtime.engine import quantize  # noqa: E402
from node.runtime.engine.kernels import compiled, layers, products, simd  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 2, 3, 4, 5, 7, 16, 33]
SHAPES = [(64, 32), (1, 32), (63, 64), (65, 96), (100, 33), (130, 577), (1000, 160), (48, 320), (70, 4131)]
"""[out, in]: outputs that fill blocks of 64 and that do not; inputs that are a multiple of 16, that are not, and several runs."""
INT4_SHAPES = [(64, 32), (16, 64), (17, 64), (80, 96), (99, 64), (144, 576), (1008, 160), (80, 4128)]
KINDS = ["bfloat16", "plain", "fine", "int4"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 1, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(one: Any, other: Any) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def make(kind: str, weight: Any, bias: Any, dtype: Any) -> Any:
    if kind == "bfloat16":
        if dtype is not torch.bfloat16:
            pytest.skip("rows of this layer are bfloat16")
        return layers.KernelBFloat16(weight.to(dtype), bias)
    return quantize._kernel({"plain": "int8"}.get(kind, kind), dtype)(weight, bias)


def held(kind: str, weight: Any) -> Any:
    """The weight as the format holds it, float64."""
    if kind == "bfloat16":
        return weight.bfloat16().double()
    if kind == "int4":
        numbers, scales = quantize.quantize_groups(weight)
        scale, zero = scales.double().transpose(0, 1).unbind(-1)
        groups = (numbers.view(len(weight), -1, quantize.GROUP) - 8) * scale[..., None] + zero[..., None]
        return groups.view(weight.shape)
    sizes = quantize.column_sizes(weight) if kind == "fine" else torch.ones(weight.shape[1])
    numbers, scales = quantize.quantize_rows(weight / sizes)
    return numbers.double() * scales.double()[:, None] * sizes.double()


def error(got: Any, wanted: Any) -> float:
    assert got.shape == wanted.shape
    if not got.numel():
        return 0.0
    return float(((got.double() - wanted).abs().amax(1) / wanted.abs().amax(1).clamp(min=1e-30)).amax())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_is_the_product_of_what_is_held(dtype: Any, shape: tuple[int, int], biased: bool) -> None:
    weight, bias = normal(*shape), normal(shape[0], seed=2) if biased else None
    layer = make("bfloat16", weight, bias, dtype)
    for rows in ROWS:
        x = normal(rows, shape[1], seed=rows, dtype=dtype)
        wanted = x.double() @ held("bfloat16", weight).t() + (0 if bias is None else bias.double())
        limit = 2**-8 if dtype is torch.bfloat16 else 2e-6
        if shape[0] == 1:  # one sum, which may be near 0
            limit *= 100
        assert error(layer(x), wanted) <= limit, rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INT4_SHAPES)
def test_int4_is_off_by_half_a_step_of_each_activation_at_most(dtype: Any, shape: tuple[int, int]) -> None:
    weight, bias = normal(*shape), normal(shape[0], seed=2)
    layer, exact = make("int4", weight, bias, dtype), held("int4", weight)
    numbers, scales = quantize.quantize_groups(weight)
    packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 1) if shape[0] % 16 == 0 else None
    reach = exact.abs().view(shape[0], -1, quantize.GROUP).sum(2)
    for rows in ROWS:
        x = normal(rows, shape[1], seed=rows, dtype=dtype) * 10.0 ** (rows % 5 - 2)
        x[:, 3] *= 100  # far out: it coarsens its group alone
        got, wanted = layer(x), x.double() @ exact.t() + bias.double()
        assert got.dtype == dtype and got.shape == wanted.shape
        steps = x.double().abs().view(rows, shape[1] // quantize.GROUP, quantize.GROUP).amax(2) / 127
        terms = x.double().abs() @ exact.abs().t() + bias.double().abs()
        limit = 0.5001 * steps @ reach.t() + 2e-6 * terms
        if dtype is torch.bfloat16:
            limit += 2**-8 * wanted.abs()
        assert bool(((got.double() - wanted).abs() <= limit).all()), rows
        if rows and packed is not None:  # torch's operator takes activations as they are
            theirs = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, quantize.GROUP, scales).double()
            assert error(layer(x), theirs + bias) <= 2**-5, rows


@pytest.mark.parametrize("value", [0.3, 0.01, -0.02, 1e-6, -3e4, 1e-38, 1e-44, 0.0])
def test_int4_holds_groups_of_equal_numbers(value: float) -> None:
    weight = torch.full((64, 64), value)
    weight[:, 32:] = normal(64, 32)
    numbers, _ = quantize.quantize_groups(weight)
    assert 0 <= int(numbers.min()) <= int(numbers.max()) <= 15
    off = (held("int4", weight)[:, :32] - value).abs().max()
    assert float(off) <= 2**-7 * abs(value) + 1e-40


def step(kind: str, x: Any, sizes: Any) -> Any:
    """What activations are rounded to multiples of, before the columns' sizes; [rows, 1]."""
    if kind == "plain":
        return (x.amax(1, True) - x.amin(1, True)) / 255
    return (x * sizes).abs().amax(1, True) / 127 / 254


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "fine"])
def test_int8_is_off_by_half_a_step_of_each_activation_at_most(dtype: Any, shape: tuple[int, int], kind: str) -> None:
    weight, bias = normal(*shape), normal(shape[0], seed=2)
    layer, exact = make(kind, weight, bias, dtype), held(kind, weight)
    sizes = quantize.column_sizes(weight).double()
    reach = (exact / (sizes if kind == "fine" else 1)).abs().sum(1)
    for rows in ROWS:
        x = normal(rows, shape[1], seed=rows, dtype=dtype) * 10.0 ** (rows % 5 - 2)
        got, wanted = layer(x), x.double() @ exact.t() + bias.double()
        assert got.dtype == dtype and got.shape == wanted.shape
        terms = x.double().abs() @ exact.abs().t() + bias.double().abs()
        limit = 0.5001 * step(kind, x.double(), sizes) * reach + 2e-6 * terms
        if dtype is torch.bfloat16:
            limit += 2**-8 * wanted.abs()
        assert bool(((got.double() - wanted).abs() <= limit).all()), rows


@pytest.mark.parametrize("kind", ["plain", "fine"])
def test_int8_rounds_to_the_nearest_step(kind: str) -> None:
    """Through a weight that is one: what comes out is what activations were rounded to."""
    x = normal(9, 200)
    got = make(kind, torch.eye(200), None, torch.float32)(x).double()
    off = (got - x.double()).abs() / step(kind, x.double(), torch.ones(200))
    assert 0.4 < float(off.amax()) < 0.51


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_bytes_are_multiplied_alike_without_the_instruction(
    dtype: Any, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Largest bytes and numbers among them: what saturates would show."""
    x, stored = normal(6, 100, dtype=dtype), compiled.STORED[dtype]
    weight = normal(130, 100)
    weight[5], weight[6], x[1], x[2, ::2] = 1.0, -1.0, 3.0, 9.0
    layer = make("fine" if twice else "plain", weight, normal(130), dtype)
    with_it = layer(x)
    monkeypatch.setattr(simd, "HAS_BYTES", False)
    layer._run = products.product_int8.__wrapped__(stored, twice, False)
    assert same_bits(layer(x), with_it)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_bytes_are_multiplied_alike_without_the_instruction(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = normal(6, 96, dtype=dtype), normal(130, 96)
    weight[5], weight[6], weight[7, ::2], x[1], x[2, ::2], x[3] = 1.0, -1.0, 9.0, 3.0, 9.0, -3.0
    layer = make("int4", weight, normal(130), dtype)
    with_it = layer(x)
    monkeypatch.setattr(simd, "HAS_BYTES", False)
    layer._run = products.product_int4.__wrapped__(compiled.STORED[dtype], False)
    assert same_bits(layer(x), with_it)


def test_sums_of_bytes_that_could_overflow_are_not_taken() -> None:
    most = quantize.MOST_INPUTS
    weight = torch.ones(2, most)
    x = torch.zeros(1, most)
    x[0, 1:] = 1.0
    assert type(quantize.int8_linear(torch.ones(2, most + 1), None, torch.float32)) is quantize.Int8PlainLinear
    got = make("plain", weight, None, torch.float32)(x)  # 255 * 127 * 66,310
    torch.testing.assert_close(got, torch.full((1, 2), float(most - 1)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "seeds"), [(576, 12), (products.RUN + 64, 2)], ids=["one run", "two runs"])
def test_a_row_has_the_same_bits_in_any_company_at_any_place_by_any_threads(
    dtype: Any, kind: str, inputs: int, seeds: int
) -> None:
    weight, bias = normal(144, inputs), normal(144, seed=2)
    one = make(kind, weight, bias, dtype)
    torch.set_num_threads(2)
    threaded = make(kind, weight, bias, dtype) if compiled.shared() else one
    torch.set_num_threads(1)
    for seed in range(seeds):
        x = normal(1, inputs, seed=seed, dtype=dtype)
        alone = one(x)[0]
        assert same_bits(threaded(x)[0], alone)
        for rows in (2, 3, 4, 5, 8, 16, 33):
            at = seed % rows
            company = (normal(rows, inputs, seed=rows) * 10.0 ** (torch.arange(rows)[:, None] % 7 - 3)).to(dtype)
            company[at] = x[0]
            for layer in (one, threaded):
                assert same_bits(layer(company)[at], alone), (rows, at)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_rows(dtype: Any, kind: str) -> None:
    weight, bias = normal(80, 96), normal(80, seed=2)
    layer = make(kind, weight, bias, dtype)
    for rows in (1, 2, 3, 4, 6, 18):
        for value in (0.0, 7.0, -7.0, 1e-20, 1e-37, 1e-44, 1e30):  # rows of equal numbers
            x = normal(rows, 96, dtype=dtype)
            x[0] = value
            wanted = x.double() @ held(kind, weight).t() + bias.double()
            got = layer(x).double()
            scale = float((x.double().abs() @ held(kind, weight).abs().t())[0].amax()) + 3
            assert float((got - wanted)[0].abs().amax()) <= 1e-2 * scale, (rows, value)
        for value in (1e-30, 1e-37, 1e-44):  # nearly equal: their range has no inverse in float32
            x = normal(rows, 96, dtype=dtype)
            x[0] *= value
            torch.testing.assert_close(layer(x)[0], bias.to(dtype), rtol=2**-8, atol=1e-6)
        clean = layer(normal(rows, 96, dtype=dtype))
        for value in (NAN, INF, -INF):
            for row in range(rows):
                x = normal(rows, 96, dtype=dtype)
                x[row, 17] = value
                got = layer(x)
                assert not bool(got[row].isfinite().any()), (rows, row, value)
                others = [n for n in range(rows) if n != row]
                assert same_bits(got[others], clean[others])
        x = normal(rows, 96, dtype=dtype)
        x[0] = torch.where(torch.arange(96) % 2 == 0, 3e38, -3e38).to(dtype)  # a range beyond float32
        got = layer(x)
        assert kind != "plain" or not bool(got[0].isfinite().all())
        assert bool(got[1:].isfinite().all())
