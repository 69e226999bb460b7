"""The engine's tensor sampler picks what the reference picks."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from node.runtime.engine import dense, kernels, philox, race, sampler  # noqa: E402
from node.runtime.engine.history import History  # noqa: E402
from node.runtime.engine.maxima import maxima  # noqa: E402
from node.runtime.engine.sampler import Draw, Scratch, pick_rows  # noqa: E402
from node.testing.sampler_vectors import allowed_of, logits_of, params_of, prompt_of  # noqa: E402
from protocol import sampling as reference  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

VECTORS = json.loads((Path(__file__).resolve().parents[1] / "vectors/sampler.json").read_text())
CPU = torch.device("cpu")


def column(*values: int) -> Any:
    return torch.tensor(values) if len(values) == 1 else torch.tensor(values)[:, None]


def mask_of(allowed: Collection[int] | None, size: int) -> Any:
    return None if allowed is None else torch.tensor([i in allowed for i in range(size)], dtype=torch.bool)


def test_philox_known_answers() -> None:
    for case in VECTORS["philox"]:
        counter, key, words = ([int(word, 16) for word in case[part]] for part in ("counter", "key", "words"))
        # the tensor version fixes the fourth word, so the rounds are compared with the checked reference instead
        assert list(reference.philox(tuple(counter), tuple(key))) == words  # type: ignore[arg-type]
        position = counter[1] | counter[2] << 32
        position -= (position >> 63) << 64  # positions live in int64; the published counters use every bit
        mine = philox.philox(column(counter[0]), column(position), column(key[0]), column(key[1]))[0].tolist()
        low, high = position & philox.MASK, position >> 32 & philox.MASK
        wanted = reference.philox((counter[0], low, high, reference.DOMAIN), tuple(key))  # type: ignore[arg-type]
        assert mine == list(wanted)


def test_gumbel_vectors() -> None:
    for case in VECTORS["gumbel"]:
        seed, position, token = int(case["seed"]), int(case["position"]), case["token"]
        seeds = torch.tensor([[seed & philox.MASK], [seed >> 32]])
        one = float(philox.gumbel_of(seeds, column(position), column(token))[0])
        assert one == pytest.approx(case["value"], abs=1e-12)
        if token < 100_000:
            noise = philox.Complements(token // 4 + 1, CPU)
            rounded = noise.draw(seed, position)
            assert float(philox.gumbel(philox.MASK - noise.of(column(token)))[0]) == one
            words = (0xFFFFFFFF - rounded[token].double() + 0.5) / 2**32
            assert -math.log(-math.log(float(words))) == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("case", VECTORS["draws"], ids=lambda case: f"v{case['logits']['vocab']}-{case['token']}")
def test_draw_vectors(case: dict[str, Any]) -> None:
    """M2."""
    logits = torch.tensor(logits_of(case))  # exact in float32
    mask = mask_of(allowed_of(case), len(logits))
    assert sampler.pick(logits, params_of(case), prompt_of(case), case["generated"], mask) == case["token"]


def on_a_gpu(logits: Any, draws: list[Draw], scratch: Scratch | None = None) -> list[sampler.Picked]:
    """`pick_rows` by the code for GPUs, which runs anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_choose", sampler._choose_dense)
        return pick_rows(logits, draws, scratch)


def without_kernels(logits: Any, draws: list[Draw], scratch: Scratch | None = None) -> list[sampler.Picked]:
    """`pick_rows` where Numba is missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "importable", lambda: False)
        plain = Scratch.of(logits)
    assert isinstance(plain.field, race.TorchField)
    return pick_rows(logits, draws, plain)


WAYS = [pick_rows, without_kernels, on_a_gpu]


@pytest.mark.parametrize("pick", WAYS)
def test_all_vectors_of_one_size_in_one_batch(pick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not see each other, whatever their parameters, and the logits stay as they were."""
    monkeypatch.setattr(dense, "CHUNK", 3 * 257)  # so that a batch is several chunks
    for size in (16, 257, 4099):
        cases = [case for case in VECTORS["draws"] if case["logits"]["vocab"] == size]
        logits = torch.tensor([logits_of(case) for case in cases])
        before, scratch = logits.clone(), Scratch.of(logits)
        draws = [
            Draw(params_of(case), prompt_of(case), case["generated"], mask_of(allowed_of(case), size)) for case in cases
        ]
        for _ in range(2):  # the second time with used scratch memory
            picked = pick(logits, draws, scratch)
            assert [one.token for one in picked] == [case["token"] for case in cases]
        assert torch.equal(logits, before)


@st.composite
def draws(draw: st.DrawFn) -> tuple[list[float], SamplingParams, list[int], list[int], list[int] | None]:
    """Logits with many ties or none, any parameters, any history, any constraint."""
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
    allowed = draw(st.one_of(st.none(), st.lists(ids, min_size=1, max_size=300)))
    return logits, params, draw(st.lists(ids, min_size=1, max_size=20)), draw(st.lists(ids, max_size=20)), allowed


def fields_of(vocab: int) -> list[Any]:
    """Both where there are two."""
    plain = race.TorchField(vocab, CPU)
    return list({type(one): one for one in (race.field_for(vocab, CPU), plain)}.values())


def row_of(values: Any, temperature: float = 1.0, seed: int = 0, position: int = 0) -> race.Row:
    values = torch.as_tensor(values)
    return race.Row(values, maxima(values[None])[0], float(values.max()), temperature, seed, position)


def survivors_of(scores: Any, params: SamplingParams, ids: Collection[int] | None = None) -> list[int]:
    """Those of `ids`, or of all, that `race` would let win if they were drawn."""
    row = row_of(torch.as_tensor(scores, dtype=torch.float64))
    field, kept = fields_of(len(scores))[0], []
    for token in range(len(scores)) if ids is None else ids:
        drawn = [race.Place(float(row.values[token]), token)]

        def winner(row: Any, limit: race.Place, field: Any, drawn: Any = drawn) -> tuple[race.Place, float]:
            one = drawn.pop()  # only once: that raises
            if not before(one, limit):
                raise IndexError
            return one, 0.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(race, "_winner", winner)
            try:
                kept.append(race.pick(row, params, field))
            except IndexError:
                pass
    return kept


def before(one: race.Place, other: race.Place) -> bool:
    return (one.value, -one.token) > (other.value, -other.token)


def noise_of(seed: int, position: int, size: int) -> Any:
    """Of the first tokens, float64."""
    ids = torch.arange(size)
    return philox.gumbel_of(column(seed & philox.MASK, seed >> 32).expand(2, size), column(position).expand(size), ids)


Case = tuple[list[float], SamplingParams, list[int], list[int], list[int] | None]


@settings(max_examples=400, deadline=None)
@given(draws())
def test_same_token_as_the_reference(case: Case) -> None:
    """M2."""
    logits, params, prompt, generated, allowed = case
    wanted = reference.sample(logits, params, prompt, generated, allowed)
    row, mask = torch.tensor(logits, dtype=torch.float64), mask_of(allowed, len(logits))
    draws = [Draw(params, prompt, generated, mask)] * 2
    for rows in (torch.stack((row, row)), torch.stack((row, row)).float()):
        for pick in WAYS:
            assert [one.token for one in pick(rows, draws)] == [wanted] * 2
    adjusted = row if mask is None else row.masked_fill(~mask, -math.inf)
    History(params, prompt, generated, CPU).adjust_(adjusted)
    assert adjusted.tolist() == reference.adjust(logits, params, prompt, generated, allowed)
    if not params.greedy:
        scores = adjusted / params.temperature
        finite = [i for i in reference.survivors(scores.tolist(), params) if scores[i] > -math.inf]
        assert [i for i in survivors_of(scores, params) if scores[i] > -math.inf] == sorted(finite)


@settings(max_examples=100, deadline=None)
@given(draws(), st.lists(st.integers(0, 10_000), max_size=80), st.integers(0, 80))
def test_a_history_that_is_extended_equals_one_made_anew(case: Case, tokens: list[int], at: int) -> None:
    """Resumed = unbroken: whatever part of the answer was there at the start."""
    logits, params, prompt, _, _ = case
    tokens = [token % len(logits) for token in tokens]
    grown = History(params, prompt, tokens[:at], CPU)
    one, other, guessed = (torch.tensor(logits, dtype=torch.float64) for _ in range(3))
    ahead = grown.ahead(tokens[at:])
    ahead.adjust_(guessed)
    for token in tokens[at:]:
        grown.extend(token)
    grown.adjust_(one)
    History(params, prompt, tokens, CPU).adjust_(other)
    assert one.tolist() == other.tolist() == guessed.tolist() == reference.adjust(logits, params, prompt, tokens)


class _Elements(TorchDispatchMode):
    """Counts the elements that operators make."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.made += found.numel()
        return found


class _Slots(dict[int, int]):
    """Counts what is read of it."""

    read = 0

    def __iter__(self) -> Any:
        for key in super().__iter__():
            self.read += 1
            yield key

    def get(self, *args: Any) -> Any:
        self.read += 1
        return super().get(*args)


@pytest.mark.parametrize("size", [100, 60_000])
def test_looking_ahead_costs_as_much_as_is_guessed(size: int) -> None:
    """However long the prompt: what is beyond the row itself, which rules 1 to 4 look at anyway, follows from the guesses."""
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, logit_bias=((3, 2.0),))
    history = History(params, range(size), [5, 6], CPU)
    history._slots = _Slots(history._slots)
    with _Elements() as elements:
        ahead = [history.ahead([7] * n) for n in range(1, 9)]
    assert elements.made == history._slots.read == 0
    with _Elements() as elements:
        for one in ahead:
            history._state_after(one._more)
    assert 0 < elements.made < 300 and history._slots.read == 8


def test_looking_ahead_holds_until_the_history_goes_on() -> None:
    history = History(SamplingParams(repetition_penalty=1.3), [1, 2], [], CPU)
    ahead = history.ahead([3])
    history.extend(4)
    with pytest.raises(ValueError, match="gone on"):
        ahead.adjust_(torch.zeros(8, dtype=torch.float64))


def test_the_token_that_reaches_top_p_exactly_is_the_last() -> None:
    assert survivors_of([0.0] * 4, SamplingParams(top_p=0.5)) == [0, 1]


@pytest.mark.parametrize("pick", WAYS)
def test_top_p_is_of_what_top_k_leaves(pick: Any) -> None:
    """1/2, 1/4, 1/4: of the two that are left the first has 2/3."""
    logits = torch.tensor([[math.log(2), 0.0, 0.0]]).repeat(60, 1)
    params = [SamplingParams(top_k=2, top_p=0.66, seed=seed) for seed in range(60)]
    assert {one.token for one in pick(logits, [Draw(one, [0], []) for one in params])} == {0}
    params = [SamplingParams(top_k=2, top_p=0.67, seed=seed) for seed in range(60)]
    assert {one.token for one in pick(logits, [Draw(one, [0], []) for one in params])} == {0, 1}


FLAT = [((i * 7919) % 64) / 64 for i in range(9000)]
STEEP = [-((i * 7919) % 9000) / 40 for i in range(9000)]


@pytest.mark.parametrize("logits", [FLAT, STEEP, [0.0] * 9000, [0.0] * 300 + [-1000.0] * 6000], ids=range(4))
@pytest.mark.parametrize(
    "filters",
    [
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"top_p": 0.9999999},
        {"top_p": 1 - 2**-53},
        {"top_k": 64},
        {"top_k": 3000},
        {"top_k": 8999, "top_p": 0.7},
        {"top_k": 2500, "min_p": 0.6},
        {"min_p": 0.5},
        {"min_p": math.exp(-10 / 64) * (1 - 1e-9)},  # just under the weight of some
        {"min_p": 1.0, "top_p": 0.4},
    ],
    ids=str,
)
def test_filters_of_a_large_vocabulary(logits: list[float], filters: dict[str, Any]) -> None:
    """More tokens than are ever ranked at once, ties at every edge, all in one bucket, most in the last."""
    params = SamplingParams(temperature=1.0, seed=4, **filters)
    ranking = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = reference.survivors(logits, params)
    assert kept == ranking[: len(kept)]
    asked = [*ranking[max(0, len(kept) - 20) : len(kept) + 20], *ranking[:: len(ranking) // 40]]
    wanted = set(kept)
    assert survivors_of(logits, params, asked) == [i for i in asked if i in wanted]


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 10.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.999999}, {"min_p": 1e-9}, {"top_k": 2500}], ids=str)
def test_draws_over_a_whole_vocabulary(temperature: float, filters: dict[str, Any]) -> None:
    """The noise that is not computed could not have won: 40 positions, logits of three widths."""
    for position in range(40):
        spread = (1, 10, 60)[position % 3]
        logits = [((i * 7919 + position * 31) % 4999) / 4999 * spread for i in range(4999)]
        params = SamplingParams(temperature=temperature, seed=position << 40 | 5, **filters)
        scores = [x / temperature for x in logits]
        every = torch.tensor(scores, dtype=torch.float64) + noise_of(params.seed, position, 4999)
        kept = torch.tensor(sorted(reference.survivors(scores, params)))
        wanted = int(kept[every[kept].argmax()])
        row = torch.tensor(logits, dtype=torch.float64)[None]
        for pick in (pick_rows, without_kernels):
            assert pick(row, [Draw(params, range(position), [])])[0].token == wanted


@pytest.mark.parametrize("below", [-30.0, -3.0, -1.0, 0.0, 0.5, 2.0, 9.0])
def test_the_winner_is_found_wherever_it_is_looked_for_first(below: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too high, and candidates come up that lose to others further down; too low, and there are many."""
    monkeypatch.setattr(race, "_BELOW", below)
    fields = fields_of(403)
    for position in range(150):
        logits = torch.tensor([0.0, -0.3, -2.0, *[-6.0 - i % 7 for i in range(400)]])
        params = SamplingParams(temperature=1.0, seed=77)
        wanted = int((logits.double() + noise_of(77, position, 403)).argmax())
        for field in fields:
            assert race.pick(row_of(logits, 1.0, 77, position), params, field) == wanted


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 128, 200])
def test_greedy_takes_the_first_of_the_largest_wherever_it_is(vocab: int) -> None:
    greedy = SamplingParams(temperature=0)
    for place in range(vocab):
        logits = torch.full((2, vocab), -3.0)
        logits[0, place:] = 1.5
        logits[1, place] = -math.inf
        picked = pick_rows(logits, [Draw(greedy, [0], [])] * 2)
        assert picked[0].token == place
        assert picked[1].token == (-1 if vocab == 1 else int(place == 0)) and picked[1].unusable == (vocab == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_widened_exactly(dtype: Any) -> None:
    logits = torch.randn((4, 700), generator=torch.Generator().manual_seed(3)).to(dtype)
    params = [SamplingParams(temperature=t, top_p=0.9, seed=8) for t in (0.0, 0.5, 1.0, 2.0)]
    picked = pick_rows(logits, [Draw(one, [0], []) for one in params])
    wanted = [reference.sample(row, one, [0], []) for row, one in zip(logits.double().tolist(), params, strict=True)]
    assert [one.token for one in picked] == wanted


def test_a_row_that_is_unusable_ends_alone() -> None:
    logits = torch.randn((8, 200), generator=torch.Generator().manual_seed(1))
    logits[1, 150], logits[3, 199], logits[5] = math.nan, math.inf, -math.inf
    sampled, greedy = SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0)
    nothing = torch.zeros(200, dtype=torch.bool)
    draws = [Draw(sampled if row % 2 else greedy, [0], []) for row in range(7)] + [Draw(greedy, [0], [], nothing)]
    picked = pick_rows(logits, draws)
    assert [one.unusable for one in picked] == [False, True, False, True, False, True, False, True]
    assert [one.token == -1 for one in picked] == [one.unusable for one in picked]


def test_a_mask_may_be_shorter_than_the_vocabulary() -> None:
    """Models have rows that no token of the tokenizer has: what the mask does not reach is forbidden."""
    logits = torch.zeros(100)
    logits[90] = 5.0
    logits[40:] += 1
    mask = torch.ones(42, dtype=torch.bool)
    assert sampler.pick(logits, SamplingParams(temperature=0), [0], [], mask) == 40
    for seed in range(30):
        assert sampler.pick(logits, SamplingParams(temperature=5.0, seed=seed), [0], [], mask) < 42
    assert sampler.pick(logits, SamplingParams(temperature=0), [0], [], torch.ones(400, dtype=torch.bool)) == 90


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    biased = SamplingParams(temperature=0, logit_bias=((3, 50.0),))
    first, second = pick_rows(logits, [Draw(biased, [0], [], None, 3), Draw(biased, [0], [])])
    own = torch.log_softmax(logits[0].double(), 0).tolist()
    assert first.token == 3 and first.logprob == pytest.approx(own[3], abs=1e-6)
    assert [token for token, _ in first.top_logprobs] == [1, 2, 0]
    assert [value for _, value in first.top_logprobs] == pytest.approx([own[1], own[2], own[0]], abs=1e-6)
    assert second.logprob is None and second.top_logprobs == ()


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]], ids=str)
def test_unusable_logits(bad: list[float]) -> None:
    with pytest.raises(sampler.UnusableLogits):
        sampler.pick(torch.tensor(bad), SamplingParams(), [0], [])
