"""Linear layers: right in every format, each row for itself, honest about memory, and falling back when an operator fails."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine import linear, quantize  # noqa: E402
from node.runtime.engine.errors import UnsupportedModel  # noqa: E402
from node.runtime.engine.kernels.layers import KernelBFloat16, KernelInt4, KernelInt8  # noqa: E402
from node.runtime.engine.linear import FORMATS, compute_dtype, make_linear  # noqa: E402

SMOLLM = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]
"""Fused qkv, o, fused gate and up, down, head of SmolLM2-135M."""

# Largest error of a row over its largest result, weights and activations drawn from a normal distribution. Rounding alone
# gives 2^-9 (bfloat16), 2^-12 (float16), 1/255 twice (int8) and 1/15 of a group's range (int4) for each factor.
BOUND = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3, "int8": 3e-2, "int4": 0.15}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What an earlier test found out about this machine's operators is forgotten, before and after."""
    linear.works.cache_clear()
    threads = torch.get_num_threads()
    yield
    linear.works.cache_clear()
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 1) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(layer: Any, weight: Any, bias: Any, x: Any) -> float:
    wanted = x.double() @ weight.double().t()
    if bias is not None:
        wanted += bias.double()
    got = layer(x)
    assert got.shape == wanted.shape and got.dtype == x.dtype
    return float(((got.double() - wanted).abs().amax(1) / wanted.abs().amax(1)).amax())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (64, 512), (17, 33)])
@pytest.mark.parametrize("biased", [False, True])
def test_close_to_float64(fmt: str, shape: tuple[int, int], biased: bool) -> None:
    weight, bias = normal(*shape), normal(shape[0], seed=2) if biased else None
    for head in (False, True):
        layer = make_linear(weight, fmt, bias, head=head)
        assert (layer.out_features, layer.in_features) == shape
        for rows in (1, 2, 3, 5, 16, 47, 48, 64):
            x = normal(rows, shape[1], seed=rows).to(compute_dtype(fmt, "cpu"))
            assert error(layer, weight, bias, x) < BOUND[fmt], (rows, head)


def test_few_rows_copy_holds_the_same_weights() -> None:
    weight, bias = normal(960, 576).bfloat16(), normal(960).bfloat16()
    layer, plain = make_linear(weight, "bfloat16", bias, few_rows=True), make_linear(weight, "bfloat16", bias)
    assert layer.nbytes > 2 * plain.nbytes or linear.compiled_alone()
    for rows in (1, linear.FEW_ROWS, linear.FEW_ROWS + 1):
        assert error(layer, weight, bias, normal(rows, 576).bfloat16()) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_stored_dtype(dtype: Any) -> None:
    weight = normal(64, 64).to(dtype)
    for fmt in FORMATS:
        x = normal(4, 64).to(compute_dtype(fmt, "cpu"))
        assert error(make_linear(weight, fmt), weight, None, x) < BOUND[fmt]


def company(x: Any, rows: int, at: int, seed: int) -> Any:
    """`x` [1, in] as row `at` of `rows`, the others a thousandth or a thousand times as large."""
    others = normal(rows, x.shape[1], seed=seed) * 10.0 ** ((torch.arange(rows)[:, None] + seed) % 7 - 3)
    others[at] = x[0]
    return others.to(x.dtype)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SMOLLM)
def test_tiles_of_16_rows_are_exact(fmt: str, shape: tuple[int, int]) -> None:
    """What exact mode rests on: any row of 16, any company, one thread or two, the same bits."""
    head = shape == SMOLLM[-1]
    layer = make_linear(0.05 * normal(*shape), fmt, head=head)
    x = normal(1, shape[1], seed=3).to(compute_dtype(fmt, "cpu"))
    wanted = None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for at in (0, 1, 7, 15):
            got = layer(company(x, 16, at, seed=at + threads))[at]
            wanted = got if wanted is None else wanted
            assert torch.equal(got, wanted), (threads, at)


@pytest.mark.parametrize("shape", SMOLLM[:-1])
@pytest.mark.parametrize("head", [False, True])
def test_int8_is_exact_at_any_number_of_rows(shape: tuple[int, int], head: bool) -> None:
    layer = make_linear(0.05 * normal(*shape), "int8", normal(shape[0]), head=head)
    x = normal(1, shape[1], seed=3)
    alone = layer(x)[0]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (2, 3, 8, 16, 31, 130):
            assert torch.equal(layer(company(x, rows, rows // 2, seed=rows))[rows // 2], alone), (threads, rows)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_odd_rows(fmt: str, head: bool, rows: int) -> None:
    """Zeros and equal numbers are ordinary; what is not a number stays so, in its row alone, for the sampler to see."""
    weight = normal(64, 64)
    layer, dtype = make_linear(weight, fmt, head=head), compute_dtype(fmt, "cpu")
    for value in (0.0, 7.0, 1e-20):
        x = normal(rows, 64).to(dtype)
        x[0] = value
        wanted = x.double() @ weight.double().t()
        assert float((layer(x).double() - wanted)[0].abs().amax()) <= BOUND[fmt] * 64 * value
    for value in (float("nan"), float("inf"), -float("inf")):
        x = normal(rows, 64).to(dtype)
        x[0, 5] = value
        got = layer(x)
        assert not bool(got[0].isfinite().any()) and bool(got[1:].isfinite().all())


OPERATORS = [
    ("float32", torch.ops.mkldnn, "_linear_pointwise"),
    ("float32", torch.ops.mkldnn, "_reorder_linear_weight"),
    ("bfloat16", KernelBFloat16, "__call__"),
    ("float16", torch.ops.quantized, "linear_dynamic_fp16"),
    ("float16", torch.ops.quantized, "linear_prepack_fp16"),
    ("int8", KernelInt8, "__call__"),
    ("int4", KernelInt4, "__call__"),
]


def _missing(original: Any) -> Any:
    return SimpleNamespace()


def _raising(original: Any) -> Any:
    def refuse(*args: Any) -> Any:
        raise NotImplementedError("not on this CPU")

    refuse.default = refuse  # type: ignore[attr-defined]
    return refuse


def _wrong(original: Any) -> Any:
    def nearly(*args: Any) -> Any:
        result = original(*args)
        return result * 1.3 if isinstance(result, torch.Tensor) and result.layout == torch.strided else result

    nearly.default = nearly  # type: ignore[attr-defined]
    return nearly


@pytest.mark.parametrize(("fmt", "space", "name"), OPERATORS)
@pytest.mark.parametrize("broken", [_missing, _raising, _wrong])
def test_falls_back_and_says_why(
    fmt: str,
    space: Any,
    name: str,
    broken: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if broken is _wrong and ("prepack" in name or "reorder" in name):
        pytest.skip("what these return has no number to be wrong")
    weight = normal(128, 128)
    fast = type(make_linear(weight, fmt))
    linear.works.cache_clear()
    monkeypatch.setattr(space, name, broken(getattr(space, name)))
    with caplog.at_level(logging.WARNING):
        layer = make_linear(weight, fmt)
    assert type(layer) is not fast
    assert any(f"{fast.__name__} is not used" in record.getMessage() for record in caplog.records)
    for rows in (1, 2, 16, 64):
        x = normal(rows, 128).to(compute_dtype(fmt, "cpu"))
        assert error(layer, weight, None, x) < BOUND[fmt]


def test_without_any_private_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has none of them: each format is still right, and float16 still rounds."""
    monkeypatch.setattr(linear, "works", lambda *args: False)
    monkeypatch.setattr(quantize, "works", lambda *args: False)
    weight = normal(64, 64)
    for fmt in FORMATS:
        layer = make_linear(weight, fmt)
        assert type(layer) in (linear.PlainLinear, quantize.Int8PlainLinear)
        assert error(layer, weight, None, normal(5, 64).to(compute_dtype(fmt, "cpu"))) < BOUND[fmt]
    exact = weight.to(torch.float16).float()
    assert error(make_linear(weight, "float16"), exact, None, normal(5, 64)) < BOUND["float32"]


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def allocated() -> int:
    """Bytes that the C library has handed out."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        pytest.skip("this C library counts nothing (no mallinfo2)")
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def count_layers() -> None:
    """Print, for each format, shape and place, the bytes of a layer as allocated and as it says itself."""
    for fmt in FORMATS:
        for shape in ((960, 576), (576, 1536), (64, 1000)):
            weight, bias = normal(*shape), normal(shape[0])
            for head in (False, True):
                make_linear(weight, fmt, bias, head=head)  # the trial runs, and whatever torch makes once
                gc.collect()
                before = allocated()
                layers = [make_linear(weight.clone(), fmt, bias.clone(), head=head) for _ in range(8)]
                gc.collect()
                print(fmt, *shape, head, (allocated() - before) / len(layers), layers[0].nbytes)
                del layers


def test_nbytes_is_what_the_allocator_gave() -> None:
    """Within what allocators and objects add, counted by the C library in a process that does nothing else."""
    allocated()
    done = subprocess.run(
        [sys.executable, "-c", "import test_linear; test_linear.count_layers()"],
        env={
            **os.environ,
            "THP_MEM_ALLOC_ENABLE": "0",
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(FORMATS) * 3 * 2
    for line in lines:
        counted, told = map(float, line.split()[-2:])
        assert -64 <= counted - told <= 8192, line


def test_nbytes_of_plain_tensors() -> None:
    weight, bias = normal(128, 64), normal(128)
    assert linear.PlainLinear(weight, bias).nbytes == 4 * 128 * 64 + 4 * 128
    assert make_linear(weight, "float16", bias).nbytes > 2 * 128 * 64 + 2 * 128
    # Half a byte for each number; a scale and a zero of 2 bytes for each group; a bias that is always there.
    assert make_linear(weight, "int4").nbytes == 128 * 64 // 2 + 4 * 128 * 64 // quantize.GROUP + 4 * 128


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (normal(64), None),
        (normal(4, 8, 8), None),
        (normal(0, 8), None),
        (normal(8, 0), None),
        (normal(8, 8).to(torch.int8), None),
        (normal(8, 8), normal(7)),
        (normal(8, 8), normal(8, 1)),
        (normal(8, 8), torch.zeros(8, dtype=torch.int64)),
        (normal(8, 8), torch.zeros(8, device="meta")),
    ],
)
def test_what_is_no_weight_is_refused(weight: Any, bias: Any) -> None:
    for fmt in FORMATS:
        with pytest.raises(UnsupportedModel):
            make_linear(weight, fmt, bias)


def test_what_a_format_cannot_hold_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="choose one of"):
        make_linear(normal(8, 8), "int3")
    with pytest.raises(UnsupportedModel, match="choose one of"):
        compute_dtype("fp8", "cpu")
    for value in (float("nan"), float("inf")):
        weight = normal(64, 64)
        weight[3, 3] = value
        for fmt in ("float16", "int8", "int4"):
            with pytest.raises(UnsupportedModel, match="not finite"):
                make_linear(weight, fmt)
            with pytest.raises(UnsupportedModel, match="not finite"):
                make_linear(weight, fmt, head=True)
    with pytest.raises(UnsupportedModel, match="too large"):
        make_linear(normal(64, 64) + 1e5, "float16")


def test_int8_rounds_to_the_nearest_of_255() -> None:
    weight = normal(32, 64)
    weight[5] = 0.0
    numbers, scales = quantize.quantize_rows(weight)
    assert numbers.dtype == torch.int8 and int(numbers.min()) == -127
    assert bool(((numbers * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all())


def test_int4_rounds_to_the_nearest_of_16() -> None:
    weight = normal(64, 96)
    weight[0, :32], weight[1, :32] = 0.25, 0.0
    numbers, scales = quantize.quantize_groups(weight)
    assert (int(numbers.min()), int(numbers.max())) == (0, 15)
    scale, zero = scales.float().transpose(0, 1).unbind(-1)
    held = (numbers.view(64, 3, 32) - 8) * scale[..., None] + zero[..., None]
    # Half a step, and what rounding scale and zero to bfloat16 leaves at a range's ends.
    assert bool(((held - weight.view(64, 3, 32)).abs() <= scale[..., None] * 0.6).all())


def test_int4_holds_groups_of_equal_numbers() -> None:
    """Which have no range to make steps of; beside steps of 1, 0.02 would be nothing."""
    values = torch.tensor([0.02, -0.25, 1e-6, -3.3, 1000.7, 0.0])
    weight = values[:, None].expand(6, 64)
    numbers, scales = quantize.quantize_groups(weight)
    scale, zero = scales.float().transpose(0, 1).unbind(-1)
    held = (numbers.view(6, 2, 32) - 8) * scale[..., None] + zero[..., None]
    assert bool(((held.view(6, 64) - weight).abs() <= weight.abs() * 2**-8).all())
    x = normal(3, 64, seed=2)
    got = make_linear(weight.contiguous(), "int4")(x.bfloat16()).float()
    wanted = x.bfloat16().float() @ weight.t()
    assert bool(((got - wanted).abs() <= 0.02 * (x.abs() @ weight.abs().t())).all())
