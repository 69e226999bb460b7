"""Layers of few rows, and int8 activations: against float64 with the weights as they are held, and against the layers of
many rows; bits that do not depend on company, place or threads; what is not a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from node.runtime.engine import quantize  # noqa: E402
from node.runtime.engine.kernels import compiled, layers  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 2, 3, 4, 5, 7, 16, 33]
SHAPES = [(64, 32), (1, 32), (63, 64), (65, 96), (100, 33), (130, 577), (1000, 160), (48, 320)]
"""[out, in]: outputs that fill blocks of 64 and that do not, inputs that are a multiple of 16 and that are not."""
INT4_SHAPES = [(64, 32), (16, 64), (80, 96), (144, 576), (1008, 160)]
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


def few(kind: str, weight: Any, bias: Any, dtype: Any) -> Callable[[Any], Any]:
    if kind == "bfloat16":
        return layers.FewBFloat16(weight.to(dtype), bias)
    if kind == "int4":
        return quantize._few_int4(dtype)(weight, bias)
    return quantize._few_int8(kind == "fine", dtype)(weight, bias)


def many(kind: str, weight: Any, bias: Any) -> Any:
    return {"plain": quantize.Int8Linear, "fine": quantize.Int8FineLinear, "int4": quantize.Int4Linear}[kind](
        weight, bias
    )


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


def rounded(kind: str, x: Any) -> Any:
    """Activations as the kernels see them but for the sizes; float64. For what is exact by definition, not by layer."""
    return x.bfloat16().double() if kind == "int4" else x.double()


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
    layer = few("bfloat16", weight, bias, dtype)
    for rows in ROWS:
        x = normal(rows, shape[1], seed=rows, dtype=dtype)
        wanted = x.double() @ held("bfloat16", weight).t() + (0 if bias is None else bias.double())
        limit = 2**-8 if dtype is torch.bfloat16 else 2e-6
        if shape[0] == 1:  # one sum, which may be near 0
            limit *= 100
        assert error(layer(x), wanted) <= limit, rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INT4_SHAPES)
def test_int4_is_the_product_of_what_is_held(dtype: Any, shape: tuple[int, int]) -> None:
    weight, bias = normal(*shape), normal(shape[0], seed=2)
    layer, other = few("int4", weight, bias, dtype), many("int4", weight, bias.to(dtype))
    for rows in ROWS:
        x = normal(rows, shape[1], seed=rows, dtype=dtype)
        wanted = x.bfloat16().double() @ held("int4", weight).t() + bias.double()
        assert error(layer(x), wanted) <= (2**-8 if dtype is torch.bfloat16 else 2e-6), rows
        if rows:
            assert error(layer(x), other(x).double()) <= 2**-6, rows  # torch's operator rounds its sums to bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "fine"])
def test_int8_of_few_rows_is_int8_of_many(dtype: Any, shape: tuple[int, int], kind: str) -> None:
    """Both round activations to the same steps: what is left is float32's rounding of sums."""
    weight, bias = normal(*shape), normal(shape[0], seed=2)
    layer, other = few(kind, weight, bias, dtype), many(kind, weight, bias)
    for rows in ROWS[1:]:
        x = normal(rows, shape[1], seed=rows, dtype=dtype) * 10.0 ** (rows % 5 - 2)
        got, wanted = layer(x), other(x)
        assert got.dtype == wanted.dtype == dtype
        scale = (x.double().abs() @ held(kind, weight).abs().t()).amax(1, True)  # of the terms, which may cancel
        assert float(((got.double() - wanted.double()).abs() / scale).amax()) < (
            2**-8 if dtype != torch.float32 else 1e-6
        )
        assert error(got, x.double() @ held(kind, weight).t() + bias.double()) < (0.5 if shape[0] == 1 else 3e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company_at_any_place_by_any_threads(dtype: Any, kind: str) -> None:
    weight, bias = normal(144, 576), normal(144, seed=2)
    one = few(kind, weight, bias, dtype)
    torch.set_num_threads(2)
    threaded = few(kind, weight, bias, dtype) if compiled.shared() else one
    torch.set_num_threads(1)
    for seed in range(20):
        x = normal(1, 576, seed=seed, dtype=dtype)
        alone = one(x)[0]
        assert same_bits(threaded(x)[0], alone)
        for rows in (2, 3, 4, 5, 8, 9):
            at = seed % rows
            company = (normal(rows, 576, seed=rows) * 10.0 ** (torch.arange(rows)[:, None] % 7 - 3)).to(dtype)
            company[at] = x[0]
            for layer in (one, threaded):
                assert same_bits(layer(company)[at], alone), (rows, at)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "fine"])
def test_activations_have_the_same_bits_in_any_company(dtype: Any, kind: str) -> None:
    weight, bias = normal(144, 576), normal(144, seed=2)
    layer = many(kind, weight, bias)
    x = normal(33, 576, seed=3, dtype=dtype)
    together = layer(x)
    for row in (0, 1, 17, 32):
        assert same_bits(layer(x[row : row + 1])[0], together[row])
        assert same_bits(layer(x[row:])[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_rows(dtype: Any, kind: str) -> None:
    weight, bias = normal(80, 96), normal(80, seed=2)
    pair = [few(kind, weight, bias, dtype)] + ([many(kind, weight, bias.to(dtype))] if kind != "bfloat16" else [])
    for layer in pair:
        for rows in (1, 2, 3, 4, 6):
            for value in (0.0, 7.0, -7.0, 1e-20, 1e-37, 1e-44, 1e30):  # rows of equal numbers
                x = normal(rows, 96, dtype=dtype)
                x[0] = value
                wanted = x.double() @ held(kind, weight).t() + bias.double()
                got = layer(x).double()
                limit = 1e-1 if kind == "int4" else 3e-2
                scale = float((x.double().abs() @ held(kind, weight).abs().t())[0].amax()) + 3
                assert float((got - wanted)[0].abs().amax()) <= limit * scale, (rows, value)
            for value in (1e-30, 1e-37, 1e-44):  # nearly equal: their range has no inverse in float32
                x = normal(rows, 96, dtype=dtype)
                x[0] *= value
                assert bool(layer(x).isfinite().all()), (rows, value)
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
            assert kind in ("bfloat16", "int4") or not bool(got[0].isfinite().all())
            assert bool(got[1:].isfinite().all())


@pytest.mark.parametrize("kind", ["plain", "fine"])
def test_rounding_is_to_the_nearest_step(kind: str) -> None:
    x = normal(9, 200)
    sizes = normal(200, seed=5).abs() + 0.1 if kind == "fine" else None
    got = layers.Activations(sizes).rounded(x).double()
    scaled = x.double() if sizes is None else x.double() * sizes.double()
    if sizes is None:
        step = (scaled.amax(1, True) - scaled.amin(1, True)) / 255
    else:
        step = scaled.abs().amax(1, True) / 127 / 254
    assert float(((got - scaled).abs() / step).amax()) < 0.51
    assert float(((got - scaled).abs() / step).amax()) > 0.4  # it does round


def test_few_rows_and_many_round_a_number_to_one_step() -> None:
    """Not only nearly so: numbers half-way between two steps go the same way."""
    for seed in range(40):
        x = normal(4, 512, seed=seed)
        x[:, 0], x[:, 1] = 0.0, 255.0
        x[:, 2:] = (x[:, 2:] * 100).abs().clamp(max=254).round() + 0.5
        weight = torch.eye(512)
        one, other = few("plain", weight, None, torch.float32)(x), many("plain", weight, None)(x)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
