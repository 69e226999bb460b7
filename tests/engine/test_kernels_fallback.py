"""Without compiled kernels the engine computes the same: no Numba, a kernel that is wrong, no library of threads, heads of a
size that none is made for. What is planted is found by the trial."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine import kernels, linear, quantize  # noqa: E402
from node.runtime.engine.engine import Engine  # noqa: E402
from node.runtime.engine.linear import FORMATS, compute_dtype, make_linear  # noqa: E402
from node.runtime.engine.models import decoder  # noqa: E402
from node.runtime.engine.sequence import Sequence  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

CPU = torch.device("cpu")


def tokens(folder: Path | str, fmt: str = "float32", threads: int = 1) -> list[list[int]]:
    """Of six greedy answers at once, prompts of 1 to 76 tokens."""
    engine = Engine(folder, dtype=fmt, threads=threads, prefill_chunk=16)
    made: dict[Any, list[int]] = {n: [] for n in range(6)}
    for n in made:
        prompt = tuple(3 + (5 * k * k + k + n) % 90 for k in range(1 + 15 * n))
        engine.submit(Sequence(n, prompt, SamplingParams(temperature=0), 24, eos_ids=frozenset()))
    while not engine.idle:
        for output in engine.step():
            made[output.id].append(output.token_id)
    return list(made.values())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was found out about this machine is forgotten, before and after."""

    def forget() -> None:
        kernels.importable.cache_clear()
        linear.works.cache_clear()
        if "node.runtime.engine.kernels.calls" in sys.modules:
            from node.runtime.engine.kernels import calls, compiled

            calls.tried.cache_clear()
            compiled._threads_at_hand.cache_clear()

    threads = torch.get_num_threads()
    forget()
    yield
    forget()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def wide(make_model: Callable[..., Path]) -> Path:
    return make_model(head_dim=16, hidden_size=96, num_attention_heads=6, num_key_value_heads=2)


@pytest.fixture
def plain(wide: Path) -> list[list[int]]:
    """What torch's operators say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "kernels_for", lambda *_: None)
        return tokens(wide)


# ------------------------------------------------------------------------------------------------------ no Numba


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_without_numba_the_tokens_are_the_same(wide: Path, missing: str, plain: list[list[int]]) -> None:
    """In a process where it cannot be imported at all."""
    code = (
        f"import sys, logging; sys.modules[{missing!r}] = None; logging.basicConfig(); "
        f"import test_kernels_fallback as t; print(t.tokens({str(wide)!r}))"
    )
    done = child(code)
    assert done.stdout.strip() == str(plain)
    assert done.stderr.count("compiled kernels are not used") == 1


def child(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AttributeError])
def test_a_numba_that_breaks_on_import_is_none(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "node.runtime.engine.kernels.simd":
                raise error("the shared library is of another version")

    monkeypatch.delitem(sys.modules, "node.runtime.engine.kernels.simd", raising=False)
    monkeypatch.delattr(kernels, "simd", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with caplog.at_level(logging.WARNING):
        assert kernels.kernels_for(CPU, torch.float32, 64) is None
        assert kernels.kernels_for(CPU, torch.bfloat16, 64) is None
    assert [r.getMessage().count("of another version") for r in caplog.records] == [1]


def test_every_format_is_right_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, quantize):
        monkeypatch.setattr(module, "importable", lambda: False)
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(64, 96, generator=generator), torch.randn(3, 96, generator=generator)
    for fmt in FORMATS:
        layer = make_linear(weight, fmt, few_rows=True)
        assert not type(layer).__module__.endswith("kernels.layers") and type(layer).__name__ != "_TwoCopies"
        wanted = x.double() @ weight.double().t()
        got = layer(x.to(compute_dtype(fmt, "cpu"))).double()
        assert float((got - wanted).abs().amax() / wanted.abs().amax()) < 0.15


# ------------------------------------------------------------------------------------------------ a kernel that is wrong


PLANTED = ["norm", "silu", "gelu_tanh", "turn", "write", "attend"]


@pytest.mark.parametrize("which", PLANTED)
@pytest.mark.parametrize("how", ["wrong", "raises", "nan", "not compiled"])
def test_a_kernel_that_disagrees_is_not_used(
    which: str,
    how: str,
    wide: Path,
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("numba")
    from node.runtime.engine.kernels import attention, calls, compiled, norms

    homes: dict[str, tuple[Any, str]] = {
        "norm": (norms, "rms_norm"),
        "turn": (norms, "turn"),
        "write": (attention, "write"),
        "attend": (attention, "attend"),
    }

    def planted(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Callable[..., None]:
            if how == "not compiled":
                compiled._compiled("broken", compiled.kernel(compiled.COUNT)(lambda x: x.no_such_thing))
            run = make(*args)

            def spoiled(*given: Any) -> None:
                run(*given)
                if how == "raises":
                    raise OSError("no memory for code")

            return spoiled

        return made

    def spoil(tensor: Any) -> None:
        tensor.mul_(1.05 if how == "wrong" else float("nan"))

    monkeypatch.setattr(compiled.BOOK, "compiled", [])
    if how in ("raises", "not compiled"):
        if which in calls.GATES:
            monkeypatch.setitem(calls.GATES, which, planted(calls.GATES[which]))  # type: ignore[arg-type]
        else:
            monkeypatch.setattr(*homes[which], planted(getattr(*homes[which])))
    elif which in calls.GATES:
        original = calls.Kernels.gate

        def gate(self: Any, name: str) -> Any:
            run = original(self, name)

            def wrong(x: Any) -> Any:
                out = run(x)  # type: ignore[misc]
                spoil(out)
                return out

            return wrong if name == which else run

        monkeypatch.setattr(calls.Kernels, "gate", gate)
    else:
        method = getattr(calls.Kernels, which)

        def wrong(self: Any, first: Any, *args: Any) -> Any:
            out = method(self, first, *args)
            spoil(first if out is None else out)
            return out

        monkeypatch.setattr(calls.Kernels, which, wrong)
    with caplog.at_level(logging.WARNING):
        assert kernels.kernels_for(CPU, torch.float32, 16) is None
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and said[0].startswith("compiled kernels are not used for torch.float32")
    assert tokens(wide) == plain


@pytest.mark.parametrize("fmt", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("how", ["raises", "wrong"])
def test_a_product_that_is_wrong_is_not_used(fmt: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from node.runtime.engine.kernels import products

    def planted(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Callable[..., None]:
            if how == "raises":
                raise RuntimeError("a kernel cannot be compiled")
            run = make(*args)
            return lambda rows, inputs, *rest: run(rows, inputs // 2, *rest)

        return made

    name = f"product_{fmt}"
    monkeypatch.setattr(products, name, planted(getattr(products, name)))
    layer = make_linear(torch.randn(64, 96), fmt, few_rows=True)
    assert type(layer).__name__ not in ("KernelInt4", "_TwoCopies")
    assert type(layer).__name__ != "KernelInt8" or fmt == "int4"  # the next best


# ---------------------------------------------------------------------------------------------------- what is missing


def test_without_a_library_of_threads_kernels_use_one(wide: Path, plain: list[list[int]]) -> None:
    """A machine without libgomp, told by a threading layer that is not installed here."""
    pytest.importorskip("numba")
    if child("import importlib.util as u; print(u.find_spec('tbb') is not None)").stdout.strip() == "True":
        pytest.skip("TBB is installed")
    code = (
        "import logging; logging.basicConfig(); import numba, test_kernels_fallback as t; "
        "from node.runtime.engine.kernels import compiled; numba.config.THREADING_LAYER = 'tbb'; "
        f"print(t.tokens({str(wide)!r}, threads=2)); print(t.kernels.kernels_for(t.CPU, t.torch.float32, 16) is not None)"
    )
    done = child(code)
    assert done.stdout.splitlines() == [str(plain), "True"]
    assert done.stderr.count("compiled kernels use one thread") == 1


@pytest.mark.parametrize("dim", [2, 8, 24, 40, 100])
def test_heads_that_no_kernel_is_made_for(dim: int, make_model: Callable[..., Path]) -> None:
    assert kernels.kernels_for(CPU, torch.float32, dim) is None
    assert all(len(made) == 24 for made in tokens(make_model(head_dim=dim)))


def test_dtypes_and_devices_that_no_kernel_is_made_for() -> None:
    assert kernels.kernels_for(CPU, torch.float16, 64) is None
    assert kernels.kernels_for(torch.device("meta"), torch.float32, 64) is None


# ---------------------------------------------------------------------------------------------------- with and without


@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_with_kernels_are_those_without(wide: Path, threads: int, plain: list[list[int]]) -> None:
    if not kernels.importable():
        pytest.skip("numba is not installed")
    assert kernels.kernels_for(CPU, torch.float32, 16) is not None
    assert tokens(wide, threads=threads) == plain


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8", "int4"])
def test_one_thread_and_two_give_the_same_tokens(wide: Path, fmt: str) -> None:
    assert tokens(wide, fmt, threads=2) == tokens(wide, fmt, threads=1)
