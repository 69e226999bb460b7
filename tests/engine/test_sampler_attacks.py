"""What the tensor sampler leaves out could not have won: rows made to prove it wrong, beside the reference.

Rows are float32 unless it says otherwise, for those are never widened.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine import dense, kernels, philox, race, sampler  # noqa: E402
from node.runtime.engine.maxima import maxima  # noqa: E402
from node.runtime.engine.sampler import Draw, Scratch, pick_rows  # noqa: E402
from protocol import sampling as reference  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

CPU = torch.device("cpu")


def fields(vocab: int) -> list[Any]:
    """Compiled, where it can be, and torch's."""
    plain = race.TorchField(vocab, CPU)
    return list({type(one): one for one in (race.field_for(vocab, CPU), plain)}.values())


def row_of(values: Any, temperature: float = 1.0, seed: int = 0, position: int = 0) -> race.Row:
    return race.Row(values, maxima(values[None])[0], float(values.max()), temperature, seed, position)


def numbers(size: int, seed: int = 1, scale: float = 3.0) -> Any:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def hard_rows(vocab: int) -> dict[str, Any]:
    ids = torch.arange(vocab)
    rows = {
        "coarse": ((ids * 7919) % 17).float() / 4,
        "bfloat16": numbers(vocab).bfloat16().float(),
        "steep": -((ids * 7919) % vocab).float() / 8,
        "equal": torch.zeros(vocab),
        "a plateau over a group's border": torch.where((ids >= 50) & (ids < 111), 3.0, -5.0),
        "five are finite": torch.where(ids % 811 == 63, numbers(vocab), -math.inf),
        "one is finite": torch.where(ids == vocab - 1, 2.0, -math.inf),
        "neighbours in float32": torch.nextafter(torch.ones(vocab), torch.tensor(math.inf)).where(ids % 3 == 1, 1.0),
        "as large as can be": torch.where(ids % 5 == 0, 3.4e38, -3.4e38) * (ids % 7 < 6),
        "as small as can be": 1.4e-45 * (ids % 4).float(),
    }
    rows["one in each group"] = torch.full((vocab,), -3.0)
    rows["one in each group"][::64] = 2.0
    rows["the last ones"] = numbers(vocab, 2)
    rows["the last ones"][-3:] = 9.0
    return rows


HARD: list[dict[str, float]] = [
    {},
    {"temperature": 0.001},
    {"temperature": 10.0},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.95, "temperature": 0.8},
    {"top_k": 40, "temperature": 10.0, "min_p": 0.5},
    {"top_k": 61},
    {"top_k": 300, "top_p": 0.5},
    {"top_k": 4000, "top_p": 0.9, "min_p": 0.2, "temperature": 2.0},
    {"top_p": 0.95, "temperature": 0.8},
    {"top_p": 0.01},
    {"top_p": 1e-12},
    {"top_p": 1 - 2**-53},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-13, "top_p": 0.9},
]


@pytest.mark.parametrize("vocab", [4096, 4097, 4159])
def test_hard_rows_in_one_batch_and_alone(vocab: int) -> None:
    """With and without kernels; every third row is adjusted, every fifth masked, every seventh greedy."""
    cases: list[tuple[Any, Draw]] = []
    for n, (row, given) in enumerate((row, given) for row in hard_rows(vocab).values() for given in HARD):
        more: dict[str, Any] = {"seed": n << 33 | n}
        if n % 3 == 1:
            more |= {"repetition_penalty": 1.3, "frequency_penalty": 0.25, "logit_bias": ((51, 2.0), (vocab - 1, -1.0))}
        if n % 7 == 3:
            more["temperature"] = 0.0
        mask = (torch.arange(vocab) % 3 < 2) if n % 5 == 2 else None
        prompt, generated = [7, 63, 64, vocab - 1], [50, 51, 51][: n % 4]
        cases.append((row, Draw(SamplingParams(**{"temperature": 1.0, **given, **more}), prompt, generated, mask)))
    logits, draws = torch.stack([row for row, _ in cases]), [draw for _, draw in cases]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "importable", lambda: False)
        plain = Scratch.of(logits)
    together, without = pick_rows(logits, draws), pick_rows(logits, draws, plain)
    unusable = 0
    for n, (row, draw) in enumerate(cases):
        allowed = None if draw.mask is None else set(draw.mask.nonzero()[:, 0].tolist())
        alone = pick_rows(row[None], [draw])[0].token
        assert together[n].token == without[n].token == alone, n
        if alone < 0:
            unusable += 1
            assert not set((row > -math.inf).nonzero()[:, 0].tolist()) & allowed  # type: ignore[operator]
        else:
            assert alone == reference.sample(row.tolist(), draw.sampling, draw.prompt, draw.generated, allowed), n  # type: ignore[arg-type]
    assert unusable < 5


def test_a_row_that_is_unusable_ends_alone_among_drawn_ones() -> None:
    logits = torch.stack([numbers(4099, n) for n in range(6)])
    draws = [Draw(SamplingParams(temperature=0.9, seed=n, top_k=(0, 40)[n % 2]), [0], []) for n in range(6)]
    alone = [one.token for one in pick_rows(logits, draws)]
    logits[1, 4098], logits[2, 5], logits[4] = math.nan, math.inf, -math.inf
    assert [one.token for one in pick_rows(logits, draws)] == [alone[0], -1, -1, alone[3], -1, alone[5]]


def test_numbers_of_float64_that_division_makes_equal() -> None:
    """The lower id is the less likely one before temperature, and as likely after it."""
    for n in range(1, 200):
        low, temperature = 1 + n / 64, 0.3 + n / 100
        high = math.nextafter(low, math.inf)
        if low / temperature == high / temperature:
            row = torch.full((4096,), -9.0, dtype=torch.float64)
            row[100], row[900] = low, high
            for given in ({"top_k": 1}, {"top_k": 300, "min_p": 1.0, "top_p": 1e-9}):
                params = SamplingParams(temperature=temperature, **given)  # type: ignore[arg-type]
                assert pick_rows(row[None], [Draw(params, [0], [])])[0].token == 100
            return
    pytest.fail("no such numbers")


# --------------------------------------------------------------------------------------------------------- the field


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 0.8, 10.0])
def test_who_just_reaches_the_bound_is_a_contender(temperature: float, dtype: Any) -> None:
    """However float32 rounds noise, scores and the bound."""
    vocab = 2049
    values = numbers(vocab).to(dtype)
    ids = torch.arange(vocab)
    seeds = torch.tensor([[9], [0]]).expand(2, vocab)
    totals = values.double() / temperature + philox.gumbel_of(seeds, torch.full_like(ids, 5), ids)
    row, end = row_of(values, temperature, 9, 5), race.Place(-math.inf, vocab)
    for field in fields(vocab):
        maxima_sum, _ = field.contenders(row, end, 0.0)
        for token in range(0, vocab, 3):
            above = float(totals[token]) - row.top / temperature
            if above > -8:  # the row's largest passes every bound before that
                hits = field.contenders(row, end, math.log(maxima_sum) - above)[1]
                assert token in [hit.token for hit in hits]


def test_nor_does_rounding_lose_those_whose_noise_leaves_no_room() -> None:
    """Noise is compared as a whole number, and as 1 - u instead of -ln u: about 1 - u = 2^-16 both leave next to nothing."""
    vocab, end = 2048, race.Place(-math.inf, 2048)
    complements, values, tried = philox.Complements(vocab // 4, CPU), numbers(vocab), 0
    for position in range(400):
        noise = complements.draw(9, position)
        for token in ((noise > 3e4) & (noise < 1.5e5)).nonzero()[:, 0].tolist():
            for temperature in (0.3, 0.7, 1.1):
                row = row_of(values, temperature, 9, position)
                score = float(values[token]) / temperature - row.top / temperature
                above = score + reference.gumbel(9, position, token)
                for field in fields(vocab) if above > -8 else ():
                    maxima_sum, _ = field.contenders(row, end, 0.0)
                    assert token in [hit.token for hit in field.contenders(row, end, math.log(maxima_sum) - above)[1]]
                    tried += 1
    assert tried > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_what_is_ranked_before_a_place_counts(dtype: Any) -> None:
    """Ties before and after it, in its group and in others."""
    vocab = 1025
    values = ((torch.arange(vocab) * 37) % 11).to(dtype) / 4
    row = row_of(values, 0.7, 3, 4)
    likely = ((values.double() - row.top) / 0.7).exp()
    for field in fields(vocab):
        for token in (0, 1, 63, 64, 500, 1023, 1024):
            place = race.Place(float(values[token]), token)
            before = (values > place.value) | ((values == place.value) & (torch.arange(vocab) < token))
            assert field.mass(row, place) == pytest.approx(float(likely[before].sum()), rel=1e-5)
            hits = field.contenders(row, place, 30.0)[1]  # a bound that all pass
            assert [hit.token for hit in hits] == before.nonzero()[:, 0].tolist()
            assert all(hit.value == float(values[hit.token]) for hit in hits)


@pytest.mark.parametrize("top_k", [0, 3500])
def test_a_threshold_that_falls_between_two_sums_of_float32(top_k: int) -> None:
    """top_p is the share before a token, as exactly as it can be said, and a little more: out it is, and in."""
    vocab = 4099
    values = numbers(vocab, scale=1.0)
    scores = values.double().tolist()
    ranking = sorted(range(vocab), key=lambda i: (-scores[i], i))
    weights = [reference._weight(scores[i], scores[ranking[0]]) for i in ranking]
    total = sum(weights[: top_k or vocab])
    row = row_of(values)
    kept = race._after_top_k(values, top_k) or race.Place(-math.inf, vocab)
    for rank in range(50, 3000, 97):
        token = race.Place(scores[ranking[rank]], ranking[rank])
        share = sum(weights[:rank]) / total
        for field in fields(vocab):
            for top_p in (share * (1 - 1e-11), share * (1 + 1e-11)):
                wanted = sum(weights[:rank]) < math.ceil(top_p * float(total))
                assert wanted == (top_p > share)
                assert race._within_top_p(row, top_p, token, kept, 0.0, field) is wanted


def test_what_the_maxima_weigh_says_nothing_of_what_top_k_leaves() -> None:
    """300 of 64,000 equals are kept, half of which is 150; the maxima alone weigh 1,000."""
    values = torch.zeros(64_000)
    for seed in range(20):
        params = SamplingParams(temperature=1.0, top_k=300, top_p=0.5, seed=seed)
        assert pick_rows(values[None], [Draw(params, [0], [])])[0].token < 150


def test_more_hits_than_there_is_room_for_at_first() -> None:
    field, *_ = fields(20_000)
    values = torch.zeros(20_000)
    row = row_of(values, 1.0, 4, 5)
    assert len(field.contenders(row, race.Place(-math.inf, 20_000), 2.0)[1]) > 300
    assert len(field.contenders(row, race.Place(-math.inf, 20_000), 20.0)[1]) == 20_000
    ids = torch.arange(20_000)
    noise = philox.gumbel_of(torch.tensor([[4], [0]]).expand(2, 20_000), torch.full_like(ids, 5), ids)
    assert race.pick(row, SamplingParams(), field) == int(noise.argmax())


def test_what_is_forbidden_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that leaves less than top_k: the plain form sees no more than that, not a vocabulary of -inf."""
    widths, pick = [], dense.pick

    def watched(scores: Any, *rest: Any) -> Any:
        widths.append(scores.shape[1])
        return pick(scores, *rest)

    monkeypatch.setattr(dense, "pick", watched)
    mask = torch.arange(4096) % 1000 == 7
    pick_rows(numbers(4096)[None], [Draw(SamplingParams(top_k=40), [0], [], mask)])
    assert widths == [5]


# ------------------------------------------------------------------------------------------------- kernels that are wrong


@pytest.mark.parametrize("which", ["contenders", "mass"])
@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_a_kernel_that_disagrees_is_not_used(
    which: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("numba")
    from node.runtime.engine.kernels import field as compiled

    right = getattr(compiled.CompiledField, which)

    def spoiled(self: Any, *args: Any) -> Any:
        if how == "raises":
            raise RuntimeError("no memory for code")
        found = right(self, *args)
        return 1.001 * found if which == "mass" else (found[0], found[1][1:])

    monkeypatch.setattr(compiled.CompiledField, which, spoiled)
    compiled.tried.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            logits = numbers(5000)[None]
            draw = Draw(SamplingParams(temperature=0.9, top_p=0.9, seed=3), [0], [])
            scratch = Scratch.of(logits)
            assert isinstance(scratch.field, race.TorchField)
            assert sampler.pick_rows(logits, [draw], scratch)[0].token == reference.sample(
                logits[0].tolist(), SamplingParams(temperature=0.9, top_p=0.9, seed=3), [0], []
            )
        assert [r.getMessage().startswith("tokens are drawn without") for r in caplog.records] == [True]
    finally:
        compiled.tried.cache_clear()


def test_a_kernel_refuses_what_it_would_read_past() -> None:
    pytest.importorskip("numba")
    from node.runtime.engine.kernels.field import CompiledField

    field = race.field_for(4096, CPU)
    assert isinstance(field, CompiledField)  # its trial has found nothing
    row, end = row_of(numbers(4096)), race.Place(-math.inf, 4096)
    every_second = race.Row(numbers(8192)[::2], row.groups, row.top, 1.0, 0, 0)
    few_groups = race.Row(row.values, row.groups[:-1], row.top, 1.0, 0, 0)
    halves = race.Row(row.values.half(), row.groups, row.top, 1.0, 0, 0)
    for wrong in (every_second, few_groups, halves):
        for ask in (lambda wrong=wrong: field.mass(wrong, end), lambda wrong=wrong: field.contenders(wrong, end, 2.0)):
            with pytest.raises(RuntimeError, match="cannot be computed"):
                ask()
