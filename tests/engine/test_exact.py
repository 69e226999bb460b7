"""Exact mode: the same bits in any company, with compiled kernels and without, and refused where libraries do not keep to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine import linear, paged, quantize  # noqa: E402
from node.runtime.engine.engine import Engine  # noqa: E402
from node.runtime.engine.errors import EngineError  # noqa: E402
from node.runtime.engine.models import decoder  # noqa: E402
from node.runtime.engine.sequence import Sequence  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

SHARED = tuple(3 + (11 * n * n + 5 * n) % 90 for n in range(80))
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of this process, after engines that had two."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without Numba."""
    monkeypatch.setattr(decoder, "kernels_for", lambda *_: None)
    for module in (linear, quantize):
        monkeypatch.setattr(module, "importable", lambda: False)


def job(name: int, prompt: tuple[int, ...], tokens: int) -> Sequence:
    return Sequence(name, prompt, SamplingParams(temperature=0), tokens, eos_ids=frozenset())


def rows_of(engine: Engine, *jobs: Sequence) -> dict[Any, list[torch.Tensor]]:
    """The logits behind every token."""
    rows: dict[Any, list[torch.Tensor]] = {one.id: [] for one in jobs}
    inner = engine._draw

    def draw(work: Any, logits: torch.Tensor) -> Any:
        given = [(item.running.sequence.id, item.rows) for item in work]
        outputs = inner(work, logits)
        for name, count in given:
            own, logits = logits[:count], logits[count:]
            rows[name] += [row.clone() for row in own[: sum(output.id == name for output in outputs)]]
        return outputs

    engine._draw = draw  # type: ignore[method-assign]
    for one in jobs:
        engine.submit(one)
    while not engine.idle:
        engine.step()
    engine.check_integrity()
    return rows


def alike(folder: Path, jobs: list[Sequence], crowds: list[dict[str, Any]], **options: Any) -> bool:
    """Whether each sequence has the same bits alone, in each of these crowds, and in one prefill."""
    options |= {"exact": True, "cache_bytes": 1 << 26}
    alone: dict[Any, list[torch.Tensor]] = {}
    for one in jobs:
        alone |= rows_of(Engine(folder, **options), one)
    found = []
    for n, crowd in enumerate(crowds):
        found.append(rows_of(Engine(folder, **options | crowd), *(reversed(jobs) if n % 2 else jobs)))
    for one in jobs:
        tokens = [int(row.argmax()) for row in alone[one.id]]
        text, start = [*one.prompt_ids, *tokens[:-1]], len(one.prompt_ids) - 1
        found.append({one.id: list(Engine(folder, **options).prefill_logits(text, start))})
    return all(
        torch.equal(row, alone[name][n])
        for crowd in found
        for name, rows in crowd.items()
        for n, row in enumerate(rows)
    )


def offered(folder: Path, **options: Any) -> bool:
    engine = Engine(folder, exact=True, cache_bytes=1 << 26, **options)
    try:
        engine.numerics_probe()
    except EngineError as error:
        assert "do not compute rows alike" in str(error)
        return False
    finally:
        engine.check_integrity()
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", [True, False])
def test_exact_logits_are_the_same_bits_in_any_company(
    make_model: Make, dtype: str, kernels: bool, request: pytest.FixtureRequest
) -> None:
    """Heads of 16, as compiled kernels want them."""
    if not kernels:
        request.getfixturevalue("plain")
    folder = make_model(head_dim=16)
    jobs = [job(n, (SHARED * 2)[n : n + 7 + 13 * n], 20) for n in range(9)]
    crowds: list[dict[str, Any]] = [
        {},
        {"prefill_chunk": 11, "token_budget": 29},
        {"prefix_cache": False, "threads": 2},
    ]
    assert offered(folder, dtype=dtype)
    assert alike(folder, jobs, crowds, dtype=dtype)


# ------------------------------------------------------------------------------------------- shapes that were not alike

SHAPES: dict[str, dict[str, Any]] = {
    "heads of 16": {"head_dim": 16, "hidden_size": 96},
    "heads of 16, each with keys of its own": {"head_dim": 16, "num_key_value_heads": 6},
    "heads of 64 that share one": {"head_dim": 64, "num_attention_heads": 7, "num_key_value_heads": 1},
    "rows that fill no vector": {"head_dim": 16, "hidden_size": 50, "intermediate_size": 100},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_offered_without_kernels_holds(plain: None, make_model: Make, shape: str, threads: int) -> None:
    """Found by trial: libraries multiply one matrix otherwise than several, and threads cut rows in the middle."""
    folder = make_model(**SHAPES[shape])
    jobs = [job(n, (SHARED * 2)[n : n + 7 + 21 * n], 14) for n in range(6)]
    crowds: list[dict[str, Any]] = [{}, {"prefill_chunk": 11, "token_budget": 29}]
    if not offered(folder, threads=threads):
        assert shape == "heads of 64 that share one" and threads == 2, "nothing else was seen to be refused"
        return
    assert alike(folder, jobs, crowds, threads=threads)


# ------------------------------------------------------------------------------------------------- libraries that are not


def attention(wrong: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[Engine, pytest.MonkeyPatch], None]:
    """`wrong` is given what heads [kv_heads, rows, ...] attend to, and the number of rows."""

    def plant(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        inner, kv_heads = paged._products, engine._model.config.kv_heads

        def products(*args: Any, **options: Any) -> torch.Tensor:
            out = inner(*args, **options)
            return wrong(out.view(kv_heads, -1, *out.shape[1:]).clone(), len(out) // kv_heads).view(out.shape)

        patch.setattr(paged, "_products", products)

    return plant


def linear_layer(wrong: Callable[[torch.Tensor], torch.Tensor], *, tiled: bool) -> Callable[..., None]:
    """`wrong` is given the rows of one layer, a tile or all that there are."""

    def plant(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        layer = engine._model.layers[1]
        place, name = (layer.output, "_inner") if tiled else (layer, "output")
        inner = getattr(place, name)
        patch.setattr(place, name, lambda x: wrong(inner(x)))

    return plant


def nudged(x: torch.Tensor, *at: Any) -> torch.Tensor:
    x[at] *= 1 + 1e-6
    return x


PLANTED: dict[str, Callable[[Engine, pytest.MonkeyPatch], None]] = {
    "by the number of rows": linear_layer(lambda x: x * (1 + 1e-6 * (len(x) % 3)), tiled=False),
    "the sixth row of a tile": linear_layer(lambda x: nudged(x, 5), tiled=True),
    "a row alone": attention(lambda x, rows: nudged(x, ...) if rows == 1 else x),
    "few rows": attention(lambda x, rows: nudged(x, ...) if rows == 2 else x),
    "many rows": attention(lambda x, rows: nudged(x, ...) if rows > 8 else x),
    "the first row": attention(lambda x, rows: nudged(x, slice(None), 0)),
    "the last row": attention(lambda x, rows: nudged(x, slice(None), -1)),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_exact_is_not_claimed_where_it_does_not_hold(
    plain: None, make_model: Make, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(make_model(head_dim=16, hidden_size=96, num_attention_heads=18), exact=True, cache_bytes=1 << 24)
    engine.numerics_probe()
    PLANTED[planted](engine, monkeypatch)
    with pytest.raises(EngineError, match="do not compute rows alike"):
        engine.numerics_probe()
    engine.check_integrity()


def test_the_class_tells_modes_apart(make_model: Make) -> None:
    folder = make_model(head_dim=16)
    probes = [Engine(folder, exact=exact, cache_bytes=1 << 24).numerics_probe() for exact in (True, True, False)]
    assert probes[0] == probes[1] != probes[2]


@pytest.mark.parametrize("context", [1, 2, 9, 17, 48])
def test_a_context_may_be_shorter_than_the_probe(make_model: Make, context: int) -> None:
    assert offered(make_model(head_dim=16, max_position_embeddings=context))
