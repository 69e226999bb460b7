"""The reference sampler: known answers, the declared rules one by one, and the distribution it draws from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.testing.sampler_vectors import allowed_of, logits_of, params_of, prompt_of
from protocol.errors import InvalidValue
from protocol.sampling import SamplingParams, adjust, gumbel, philox, sample, seed_of, survivors

ROOT = Path(__file__).resolve().parents[2]
VECTORS = json.loads((ROOT / "tests/vectors/sampler.json").read_text())

logits_lists = st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=1, max_size=40)


def test_philox_known_answers() -> None:
    for case in VECTORS["philox"]:
        counter, key, words = ([int(word, 16) for word in case[part]] for part in ("counter", "key", "words"))
        assert list(philox(tuple(counter), tuple(key))) == words  # type: ignore[arg-type]


def test_gumbel_vectors() -> None:
    for case in VECTORS["gumbel"]:
        value = gumbel(int(case["seed"]), int(case["position"]), case["token"])
        assert value == pytest.approx(case["value"], abs=1e-12)


@pytest.mark.parametrize("case", VECTORS["draws"], ids=lambda case: f"v{case['logits']['vocab']}-{case['token']}")
def test_draw_vectors(case: dict[str, Any]) -> None:
    """M2."""
    params, logits, prompt, allowed = params_of(case), logits_of(case), prompt_of(case), allowed_of(case)
    assert sample(logits, params, prompt, case["generated"], allowed) == case["token"]
    if not params.greedy:
        scores = [x / params.temperature for x in adjust(logits, params, prompt, case["generated"], allowed)]
        assert len(survivors(scores, params)) == case["survivors"]


def test_seed_vectors() -> None:
    for case in VECTORS["seeds"]:
        assert seed_of(int(case["seed"]), case["index"]) == int(case["value"])


def test_answers_of_one_request_have_their_own_seeds() -> None:
    """The first is the signed one; every bit of seed and index matters, and what comes out fits the wire."""
    assert seed_of(2**64 - 1, 0) == 2**64 - 1
    made = (
        [seed_of(5, 1 << bit) for bit in range(32)] + [seed_of(5 ^ 1 << bit, 1) for bit in range(64)] + [seed_of(5, 0)]
    )
    assert len(set(made)) == 97 and max(made) < 2**63
    with pytest.raises(InvalidValue):
        seed_of(0, -1)
    with pytest.raises(InvalidValue):
        seed_of(0, 2**32)


def test_a_constraint_comes_before_everything_else() -> None:
    greedy = SamplingParams(temperature=0, logit_bias=((0, 100.0),))
    assert sample([9, 1, 2, 2], greedy, [0], [], {1, 2, 3}) == 2  # a bias does not bring back what the grammar forbids
    kept = SamplingParams(temperature=1, top_p=0.5)
    # relative to what is allowed: token 0, forbidden, has nearly all of the weight
    assert survivors(adjust([30, 1, 1, 1], kept, [0], [], [1, 2, 3]), kept) == [1, 2]


def test_a_constraint_that_leaves_nothing_is_refused() -> None:
    for allowed in ([], [1]):
        with pytest.raises(InvalidValue):
            sample([1.0, -math.inf], SamplingParams(), [0], [], allowed)
    with pytest.raises(InvalidValue):  # a model that computes NaN is broken wherever the NaN is
        sample([1.0, math.nan], SamplingParams(), [0], [], [0])


def test_vectors_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/gen-vectors-sampler", "--check"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_every_part_of_seed_and_counter_matters() -> None:
    """Seeds, positions and tokens that differ in one bit, low or high, give other noise."""
    base = gumbel(0, 0, 0)
    others = [gumbel(1 << bit, 0, 0) for bit in range(64)]
    others += [gumbel(0, 1 << bit, 0) for bit in range(64)]
    others += [gumbel(0, 0, 1 << bit) for bit in range(22)]
    assert len({base, *others}) == 1 + 64 + 64 + 22


def test_greedy_takes_the_lowest_of_equals() -> None:
    greedy = SamplingParams(temperature=0)
    assert sample([1, 3, 3, 2], greedy, [0], []) == 1
    assert sample([-math.inf, -5], greedy, [0], []) == 1
    assert sample([2, 1], SamplingParams(temperature=0.0009), [0], []) == 0


def test_penalties_count_what_they_declare() -> None:
    params = SamplingParams(repetition_penalty=2, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((3, 1.0),))
    adjusted = adjust([4, 4, -4, 3, 0], params, prompt=[0, 0, 2], generated=[1, 1, 3])
    # bias first, then repetition (prompt and generated, once each), then what was generated, by count and by presence
    assert adjusted == [2.0, 2.0 - 1.0 - 0.25, -8.0, 2.0 - 0.5 - 0.25, 0.0]


def test_ties_are_ranked_by_id() -> None:
    assert survivors([1, 2, 2, 2], SamplingParams(top_k=2)) == [1, 2]
    assert survivors([0, 0, 0, 0], SamplingParams(top_p=0.5)) == [0, 1]  # 0.5 is reached exactly by the second


def test_top_p_includes_the_token_that_reaches_it() -> None:
    half = [math.log(2), 0.0, 0.0]  # 1/2, 1/4, 1/4
    assert survivors(half, SamplingParams(top_p=0.51)) == [0, 1]
    assert survivors(half, SamplingParams(top_p=0.49)) == [0]
    assert survivors(half, SamplingParams(top_p=0.76)) == [0, 1, 2]
    # top_k comes first: of the two that are left the first has 2/3
    assert survivors(half, SamplingParams(top_k=2, top_p=0.66)) == [0]


def test_min_p_is_inclusive_and_relative_to_the_best() -> None:
    assert survivors([0.0, 0.0, -5.0], SamplingParams(min_p=1.0)) == [0, 1]
    assert survivors([math.log(4), 0.0], SamplingParams(min_p=0.26)) == [0]
    assert survivors([math.log(4), 0.0], SamplingParams(min_p=0.24)) == [0, 1]


@given(logits_lists, st.integers(0, 2**64 - 1), st.floats(0.01, 1), st.integers(0, 50), st.floats(0, 1))
def test_filters_keep_a_prefix_that_is_never_empty(
    scores: list[float], seed: int, top_p: float, top_k: int, min_p: float
) -> None:
    kept = survivors(scores, SamplingParams(top_p=top_p, top_k=top_k, min_p=min_p, seed=seed))
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert kept and kept == ranking[: len(kept)]
    assert not top_k or len(kept) <= top_k


@given(logits_lists, st.integers(0, 2**64 - 1), st.integers(0, 5), st.integers(1, 30))
def test_the_draw_depends_on_the_position_and_not_on_where_the_prompt_ends(
    logits: list[float], seed: int, made: int, length: int
) -> None:
    tokens = [n % len(logits) for n in range(length + made)]
    params = SamplingParams(temperature=1.1, top_p=0.97, seed=seed)
    assert sample(logits, params, tokens, []) == sample(logits, params, tokens[:length], tokens[length:])


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}]
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square of 6,000 draws at consecutive positions against the softmax of what survives; the seed is fixed."""
    logits, count = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5], 6000
    sampling = SamplingParams(**{"temperature": 1.0, "seed": 20, **params})
    scores = [x / sampling.temperature for x in logits]
    kept = survivors(scores, sampling)
    total = sum(math.exp(scores[i]) for i in kept)
    seen = [0] * len(logits)
    for position in range(count):
        seen[max(kept, key=lambda i: scores[i] + gumbel(sampling.seed, position, i))] += 1
    assert sample(logits, sampling, [0] * 7, []) == max(kept, key=lambda i: scores[i] + gumbel(sampling.seed, 7, i))
    expected = {i: count * math.exp(scores[i]) / total for i in kept}
    chi_square = sum((seen[i] - expected[i]) ** 2 / expected[i] for i in kept)
    # 99.9 % quantiles of chi-square with 0 to 5 degrees of freedom
    assert chi_square <= [0.0, 10.83, 13.82, 16.27, 18.47, 20.52][len(kept) - 1] + 1e-9
    assert all(seen[i] == 0 for i in range(len(logits)) if i not in kept)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": 10.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": 2.1},
        {"presence_penalty": math.inf},
        {"seed": -1},
        {"seed": 2**64},
        {"logit_bias": ((1, 0.0), (1, 0.0))},
        {"logit_bias": ((-1, 0.0),)},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": tuple((i, 0.0) for i in range(1025))},
    ],
    ids=str,
)
def test_out_of_range_values_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        SamplingParams(**bad)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]], ids=str)
def test_unusable_logits_are_refused(bad: list[float]) -> None:
    with pytest.raises(InvalidValue):
        sample(bad, SamplingParams(), [0], [])


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidValue):
        sample([0.0, 1.0], SamplingParams(logit_bias=((2, 1.0),)), [0], [])
