"""The engine's tensor sampler picks what the reference picks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from node.runtime.engine import sampler  # noqa: E402
from protocol import sampling as reference  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

VECTORS = json.loads((Path(__file__).resolve().parents[1] / "vectors/sampler.json").read_text())


def test_philox_known_answers() -> None:
    for case in VECTORS["philox"]:
        counter, key, words = ([int(word, 16) for word in case[part]] for part in ("counter", "key", "words"))
        if counter[3] == reference.DOMAIN:
            raise AssertionError("the published answers use other counters")
        # the tensor version fixes the fourth word, so the rounds are compared with the checked reference instead
        assert list(reference.philox(tuple(counter), tuple(key))) == words  # type: ignore[arg-type]
        seed, position = key[0] | key[1] << 32, counter[1] | counter[2] << 32
        mine = sampler.philox(torch.tensor([counter[0]]), position, seed)[0].tolist()
        assert mine == list(reference.philox((*counter[:3], reference.DOMAIN), tuple(key)))  # type: ignore[arg-type]


def test_gumbel_vectors() -> None:
    for case in VECTORS["gumbel"]:
        seed, position, token = int(case["seed"]), int(case["position"]), case["token"]
        one = float(sampler.gumbel_of(seed, position, torch.tensor([token]))[0])
        assert one == pytest.approx(case["value"], abs=1e-12)
        if token < 100_000:
            assert float(sampler.gumbel(seed, position, token + 1, torch.device("cpu"))[token]) == one


@pytest.mark.parametrize("case", VECTORS["draws"], ids=lambda case: f"v{case['logits']['vocab']}-{case['token']}")
def test_draw_vectors(case: dict[str, Any]) -> None:
    vocab, seed, step = case["logits"]["vocab"], case["logits"]["seed"], case["logits"]["step"]
    words = [reference.philox((i >> 2, 0, 0, 0), (seed, 0))[i & 3] for i in range(vocab)]
    logits = torch.tensor([((word >> 16) / 4096 - 8) * step for word in words])  # exact in float32
    raw = case["params"]
    params = SamplingParams(**{**raw, "seed": int(raw["seed"]), "logit_bias": tuple(map(tuple, raw["logit_bias"]))})
    assert sampler.pick(logits, params, case["prompt"], case["generated"]) == case["token"]


@st.composite
def draws(draw: st.DrawFn) -> tuple[list[float], SamplingParams, list[int], list[int]]:
    """Logits with many ties or none, any parameters, any history."""
    coarse = st.integers(-12, 12).map(lambda n: n / 2)
    fine = st.floats(-30, 30, width=32)
    logits = draw(st.lists(draw(st.sampled_from([coarse, fine])), min_size=1, max_size=300))
    ids = st.integers(0, len(logits) - 1)
    bias = draw(st.dictionaries(ids, st.floats(-100, 100), max_size=4))
    params = SamplingParams(
        temperature=draw(st.one_of(st.just(0.0), st.floats(0.01, 10))),
        top_p=draw(st.one_of(st.just(1.0), st.floats(0.001, 1.0))),
        top_k=draw(st.integers(0, 320)),
        min_p=draw(st.one_of(st.just(0.0), st.floats(0, 1))),
        repetition_penalty=draw(st.one_of(st.just(1.0), st.floats(0.1, 10))),
        frequency_penalty=draw(st.one_of(st.just(0.0), st.floats(-2, 2))),
        presence_penalty=draw(st.one_of(st.just(0.0), st.floats(-2, 2))),
        logit_bias=tuple(sorted(bias.items())),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    return logits, params, draw(st.lists(ids, min_size=1, max_size=20)), draw(st.lists(ids, max_size=20))


@settings(max_examples=400, deadline=None)
@given(draws())
def test_same_token_as_the_reference(case: tuple[list[float], SamplingParams, list[int], list[int]]) -> None:
    """M2."""
    logits, params, prompt, generated = case
    wanted = reference.sample(logits, params, prompt, generated)
    assert sampler.pick(torch.tensor(logits, dtype=torch.float64), params, prompt, generated) == wanted
    adjusted = reference.adjust(logits, params, prompt, generated)
    assert sampler.adjust(torch.tensor(logits, dtype=torch.float64), params, prompt, generated).tolist() == adjusted
    if not params.greedy:
        scores = [x / params.temperature for x in adjusted]
        kept = sampler.survivors(torch.tensor(scores, dtype=torch.float64), params)
        everything = range(len(scores)) if kept is None else kept.tolist()
        assert sorted(everything) == sorted(reference.survivors(scores, params))


def test_the_token_that_reaches_top_p_exactly_is_the_last() -> None:
    kept = sampler.survivors(torch.zeros(4, dtype=torch.float64), SamplingParams(top_p=0.5))
    assert kept is not None and kept.tolist() == [0, 1]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 0.9999999])
def test_nucleus_of_a_flat_vocabulary(top_p: float) -> None:
    """More tokens than the first guess ranks: the search must widen, and ties at the edge must not change the cut."""
    logits = [((i * 7919) % 64) / 64 for i in range(9000)]
    params = SamplingParams(temperature=1.0, top_p=top_p, seed=4)
    kept = sampler.survivors(torch.tensor(logits, dtype=torch.float64), params)
    assert kept is not None and kept.tolist() == reference.survivors(logits, params)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]], ids=str)
def test_unusable_logits(bad: list[float]) -> None:
    with pytest.raises(sampler.UnusableLogits):
        sampler.pick(torch.tensor(bad), SamplingParams(), [0], [])
