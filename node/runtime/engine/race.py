"""Rules 7 to 10 of the sampler for one row of a whole vocabulary, without ranking it.

What filters keep is a prefix of the ranking. So a token is drawn as if there were no filter, and looked at: if filters keep it,
it is the winner among what they keep, too; if not, they drop everything that is ranked after it as well, and the next draw is
among what is ranked before it. Each draw halves what is left, about.

What is not float64 or an integer here only leaves out what cannot win, or is asked again:

- A token wins a draw with a value of about ln(sum exp s) + one standard Gumbel. Only tokens whose noise could lift them above a
  bound somewhat below that are looked at exactly (`Field.contenders`). If none passes the bound, it is lowered. The token
  with the largest score passes any bound 3.15 below its score, and no filter drops it: so there is always an answer.
- Whether top_p keeps a token follows from sums in float32 (`Field.mass`), but for those that are close to the threshold: there
  the sums are taken as the rule says.

Sources: as in the definition; Maddison et al. 2014 (the value of the winner).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from node.runtime.engine import dense
from node.runtime.engine.dense import WEIGHT_UNIT
from node.runtime.engine.philox import LANES, MASK, Complements
from node.runtime.engine.sequence import Sampling

_BELOW: Final = 2.0
"""How far under the winner's expected value the bound is at first: the winner lies lower once in 1,600 draws."""
_LOWER: Final = 4.0
ROOM: Final = 1.001
"""Bounds on noise are that much wider than follows from the scores; float32 is off by less than a hundredth of it. Scores that
differ by more than 30 do not matter."""
_DOUBT: Final = 1e-4
"""Where float32 sums come that close to top_p's threshold, as a part of all, they decide nothing. They are off by about 1e-5."""
_ABSORBS: Final = 1e9
"""Scores beyond it swallow some of the noise, so that tokens tie: there the plain form of the rules decides."""


class Place(NamedTuple):
    """Of the ranking: before it are the larger values, and of those as large the ones of lower ids."""

    value: float
    token: int


class Hit(NamedTuple):
    token: int
    complement: int
    """2^32 - 1 - word of its noise."""
    value: float


@dataclass(slots=True)
class Row:
    values: Tensor
    """Float32 or float64 [vocab], beside each other; rules 0 to 4 are applied."""
    groups: Tensor
    """Of the same type: the largest of each `maxima.GROUP` values."""
    top: float
    """The largest of all. Finite."""
    temperature: float
    """What values are divided by; 1 where they were before."""
    seed: int
    position: int


class Field(Protocol):
    """What looks at a whole row. Sums are of float32, relative to the largest score."""

    def contenders(self, row: Row, limit: Place, lower: float) -> tuple[float, Sequence[Hit]]:
        """The sum of exp(score) of the groups' largest that are not below the limit; and all tokens ranked before the limit
        that, with their noise, may come to `lower` below the logarithm of that."""
        ...

    def mass(self, row: Row, place: Place) -> float:
        """Sum of exp(score) of what is ranked before the place."""
        ...


def field_for(vocab: int, device: torch.device) -> Field:
    """Compiled where that can be used, else of torch's operators: some fifteen times as slow."""
    from node.runtime.engine.kernels import importable

    if device.type == "cpu" and importable():
        from node.runtime.engine.kernels import field

        if field.tried():
            return field.CompiledField()
    return TorchField(vocab, device)


def pick(row: Row, sampling: Sampling, field: Field) -> int:
    """The token that is drawn."""
    if abs(row.top / row.temperature) > _ABSORBS:
        return int(dense.pick((row.values.double() / row.temperature)[None], [sampling], [row.position]))
    floor = math.ceil(sampling.min_p * float(WEIGHT_UNIT))
    end = Place(-math.inf, len(row.values))
    kept = _after_top_k(row.values, sampling.top_k) or end
    limit = max(kept, _after_min_p(row, floor) or end, key=lambda place: (place.value, -place.token))
    while True:
        won, maxima = _winner(row, limit, field)
        weight = math.floor(math.exp(won.value / row.temperature - row.top / row.temperature) * WEIGHT_UNIT)
        at_least = maxima if kept == end else 0.0
        if weight >= floor and (sampling.top_p == 1 or _within_top_p(row, sampling.top_p, won, kept, at_least, field)):
            return won.token
        limit = won


def _winner(row: Row, limit: Place, field: Field) -> tuple[Place, float]:
    """Rule 10 among what is ranked before the limit; and the sum of the groups' largest there."""
    lower, top = _BELOW, row.top / row.temperature
    while True:
        maxima, hits = field.contenders(row, limit, lower)
        best = max(((hit.value / row.temperature + _gumbel(hit), -hit.token, hit.value) for hit in hits), default=None)
        if best is not None and best[0] >= top + math.log(maxima) - lower:
            return Place(best[2], -best[1]), maxima
        lower += _LOWER


def _gumbel(hit: Hit) -> float:
    return -math.log(-math.log((MASK - hit.complement + 0.5) / 4294967296.0))


def _after_top_k(values: Tensor, k: int) -> Place | None:
    """The first that rule 7 drops."""
    vocab = len(values)
    if not 0 < k < vocab:
        return None
    value = values.kthvalue(vocab - k).values
    ties = (values == value).nonzero()[:, 0]
    return Place(float(value), int(ties[k - int((values > value).sum())]))


def _after_min_p(row: Row, floor: int) -> Place | None:
    """Somewhat after the last that rule 9 keeps."""
    if not floor:
        return None
    least = row.top + row.temperature * (math.log(floor / WEIGHT_UNIT) - 1e-6)
    return Place(least - 1e-12 * abs(row.top), len(row.values))


def _within_top_p(row: Row, top_p: float, token: Place, kept: Place, at_least: float, field: Field) -> bool:
    """Whether rule 8 keeps a token, of what is ranked before `kept`, which weighs `at_least` that."""
    before = field.mass(row, token)
    if before < (1 - _DOUBT) * top_p * at_least:
        return True
    total = field.mass(row, kept)
    if abs(before - top_p * total) > _DOUBT * total:
        return before < top_p * total
    return _exactly_within_top_p(row, top_p, token, kept)


def _exactly_within_top_p(row: Row, top_p: float, token: Place, kept: Place) -> bool:
    scores = row.values.double() / row.temperature
    weights = (scores - row.top / row.temperature).exp_().mul_(WEIGHT_UNIT).to(torch.int64)  # towards zero, so down
    before, total = (int(weights[_ranked_before(row.values, place)].sum()) for place in (token, kept))
    return before < math.ceil(top_p * float(total))


def _ranked_before(values: Tensor, place: Place) -> Tensor:
    """Bool [vocab]."""
    before = values > place.value
    before[: place.token] |= values[: place.token] == place.value
    return before


class TorchField:
    """In torch's operators; the reference of the compiled one."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._complements = Complements(-(-vocab // LANES), device)
        self._noise = torch.empty(0)
        self._drawn = (-1, -1)
        """Seed and position of `_noise`."""

    def contenders(self, row: Row, limit: Place, lower: float) -> tuple[float, list[Hit]]:
        near = row.groups[row.groups >= limit.value]
        maxima = float(((near - row.top) / row.temperature).exp_().sum())
        if self._drawn != (row.seed, row.position):
            self._drawn, self._noise = (row.seed, row.position), self._complements.draw(row.seed, row.position)
        likely = self._likely(row).mul_(math.exp(lower) / maxima * 4294967296.0 * ROOM)
        hits = (self._noise[: len(likely)] <= likely).nonzero()[:, 0]
        found = zip(hits.tolist(), self._complements.of(hits).tolist(), row.values[hits].tolist(), strict=True)
        return maxima, [
            Hit(token, word, value) for token, word, value in found if (value, -token) > (limit.value, -limit.token)
        ]

    def mass(self, row: Row, place: Place) -> float:
        before = _ranked_before(row.values, place)
        return float(self._likely(row).masked_fill_(~before, 0.0).sum(dtype=torch.float64))

    def _likely(self, row: Row) -> Tensor:
        return (row.values - row.top).float().div_(row.temperature).exp_()
