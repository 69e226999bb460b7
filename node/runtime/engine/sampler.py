"""The normative sampler on tensors. The definition is the reference in the protocol package; rule numbers are its.

It must pick the same token as the reference. What is not float64 or int64 here only excludes tokens that provably cannot
win, by margins far above its rounding:

- Greedy without adjustments is the first largest of the raw logits, whatever their width: widening keeps order and ties.
- Filters (rules 7 to 9) keep a prefix of the ranking, so only the ranking around its end is ever sorted. Everything else
  falls into buckets of equal score range whose integer sums are exact (`_cut`).
- A draw over many tokens computes noise as integers, and logarithms only for tokens whose noise could suffice: the winner of
  a Gumbel draw is about ln(sum exp s) + one standard Gumbel, which is almost never more than 2 below its centre.

Sources: as in the definition; "the winner is lse + Gumbel": Maddison et al. 2014.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from node.runtime.engine.history import History
from node.runtime.engine.philox import LANES, MASK, Complements, gumbel_of
from node.runtime.engine.sequence import Sampling

WEIGHT_UNIT: Final = 1 << 40
GROUP: Final = 64
"""Tokens whose largest score is looked at first. Scratch rows are padded to a multiple of it."""
_HEAD: Final = 256
"""Groups at most from whose maxima a threshold for the best tokens is read."""
_FEW: Final = 2048
"""So many candidates get their noise one by one; of more, all noise of the vocabulary is cheaper."""
_BUCKETS: Final = 4096
_PER_NAT: Final = 64
"""Buckets per unit of score."""
_BELOW: Final = 2.0
"""How far under ln(sum exp s) the winner is looked for at first: it lies lower once in 1,600 draws."""


class UnusableLogits(ValueError):
    """NaN, +inf, or nothing finite that is allowed: no token follows from these logits."""


@dataclass(slots=True)
class Draw:
    """One row's part of the sampler's input."""

    sampling: Sampling
    prompt: Sequence[int]
    generated: Sequence[int]
    mask: Tensor | None = None
    """Rule 0, from a `Constraint`: bool [n], true where a token is allowed; ids from n on are not."""
    logprobs: int = 0
    """0: none; n: the chosen token's, and the n largest."""
    history: History | None = None
    """Of prompt + generated, kept up by the caller; None makes it anew, which costs time in proportion to the tokens."""


@dataclass(slots=True)
class Picked:
    token: int
    """-1 when `unusable`."""
    unusable: bool = False
    """The model computed NaN, +inf or nothing finite that is allowed. Ends this row alone."""
    logprob: float | None = None
    """ln of the model's own probability: before constraint, bias, penalties, temperature and filters."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the likeliest tokens, likeliest first, equals by id."""


class Scratch:
    """Memory for one call at a time, made once for a vocabulary on a device."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        size = -(-vocab // GROUP) * GROUP
        self.vocab = vocab
        self.device = device
        self.scores = torch.full((size,), -math.inf, dtype=torch.float64, device=device)
        """The row at hand, widened; what lies past the vocabulary stays -inf."""
        self.likely = torch.empty(size, dtype=torch.float32, device=device)
        self.noise = Complements(size // LANES, device)

    @classmethod
    def of(cls, logits: Tensor) -> Scratch:
        return cls(logits.shape[-1], logits.device)


@dataclass(slots=True)
class _Few:
    """A row whose draw is between few tokens."""

    row: int
    ids: Tensor
    """Ascending."""
    scores: Tensor


@torch.inference_mode()
def pick_rows(logits: Tensor, draws: Sequence[Draw], scratch: Scratch | None = None) -> list[Picked]:
    """The token that follows each sequence. `logits`: [rows, vocab] of any float type, row i for draws[i]; not changed."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if logits.shape[0] != len(draws):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(draws)} draws")
    if not draws:
        return []
    scratch = scratch or Scratch.of(logits)
    best, largest = _first_largest(logits)
    tops, firsts = largest.tolist(), best.tolist()
    picked: list[Picked] = []
    few: list[_Few] = []
    for row, draw in enumerate(draws):
        token = -1
        if -math.inf < tops[row] < math.inf:  # the largest is NaN when any is
            found = _pick_row(logits[row], draw, firsts[row], scratch)
            if isinstance(found, int):
                token = found
            else:
                few.append(_Few(row, *found))
        picked.append(Picked(token, unusable=token < 0))
    for row, token in _draw_few(few, draws):
        picked[row] = Picked(token)
    _add_logprobs(logits, draws, picked)
    return picked


def pick(
    logits: Tensor,
    sampling: Sampling,
    prompt: Sequence[int],
    generated: Sequence[int],
    mask: Tensor | None = None,
) -> int:
    """`pick_rows` for one row [vocab]. Raises `UnusableLogits`."""
    picked = pick_rows(logits[None], [Draw(sampling, prompt, generated, mask)])[0]
    if picked.unusable:
        raise UnusableLogits("logits must be numbers below +inf, and one of those allowed finite")
    return picked.token


def _pick_row(logits: Tensor, draw: Draw, first: int, scratch: Scratch) -> int | tuple[Tensor, Tensor]:
    """The token; -1 when the constraint leaves nothing; or, for `_draw_few`, ids and scores of those to draw from."""
    sampling, mask = draw.sampling, draw.mask
    history = draw.history or History(sampling, draw.prompt, draw.generated, logits.device)
    if sampling.greedy and not history.adjusts and (mask is None or (first < len(mask) and bool(mask[first]))):
        return first  # the best of all is the best of those allowed
    scores = _adjusted(logits, history, mask, scratch)
    groups = scores.view(-1, GROUP).amax(1)
    top = float(groups.max())
    if top == -math.inf:
        return -1
    if sampling.greedy:
        return int(_first_largest(scores[None])[0])
    scores.div_(sampling.temperature)
    groups.div_(sampling.temperature)
    top /= sampling.temperature
    ids = survivors(scores, groups, top, sampling)
    if ids is None or len(ids) > _FEW:
        position = len(draw.prompt) + len(draw.generated)
        return _draw_many(scores, ids, top, sampling.seed, position, scratch)
    return ids, scores[ids]


def _adjusted(logits: Tensor, history: History, mask: Tensor | None, scratch: Scratch) -> Tensor:
    """Rules 0 to 4: float64 in the scratch row."""
    scores = scratch.scores
    row = scores[: scratch.vocab]
    row.copy_(logits)
    if mask is not None:
        allowed = mask.to(scores.device, non_blocking=True)
        row[: len(allowed)].masked_fill_(~allowed[: len(row)], -math.inf)
        row[len(allowed) :] = -math.inf
    history.adjust_(row)
    return scores


def _first_largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [rows] of the largest values, of equals the first, and the values; a NaN counts as the largest.

    Six times as fast on a CPU as argmax over the vocabulary, which compares one by one.
    """
    whole = rows.shape[1] // GROUP * GROUP
    if whole == 0:
        found = rows.argmax(1)
        return found, rows.gather(1, found[:, None])[:, 0]
    grouped = rows[:, :whole].unflatten(1, (-1, GROUP))
    largest = grouped.amax(2)
    group = largest.argmax(1)
    at = torch.arange(len(rows), device=rows.device)
    found = group * GROUP + grouped[at, group].argmax(1)
    values = largest[at, group]
    if whole == rows.shape[1]:
        return found, values
    rest, tail = rows[:, whole:].max(1)[0], rows[:, whole:].argmax(1) + whole
    later = (rest > values) | (rest.isnan() & ~values.isnan())
    return torch.where(later, tail, found), torch.where(later, rest, values)


# ------------------------------------------------------------------------------------------------------- rules 7 to 9


def survivors(scores: Tensor, groups: Tensor, top: float, sampling: Sampling) -> Tensor | None:
    """Ids that may be drawn, ascending; None when no filter is on, or none that excludes anything.

    `scores`: float64, a multiple of GROUP long; `groups`: the largest of each GROUP of them; `top`: of all. Tokens of score
    -inf may be left out: they cannot win.
    """
    ids: Tensor | None = None
    if 0 < sampling.top_k < len(scores):
        if sampling.top_k <= min(_HEAD, len(groups)):
            ids = _at_least(scores, groups, groups.topk(sampling.top_k).values[-1])
            ids = ids[_cut(scores[ids], torch.ones_like(ids), top, torch.tensor(sampling.top_k, device=ids.device))]
        else:
            ones = torch.ones(len(scores), dtype=torch.int64, device=scores.device)
            ids = _cut(scores, ones, top, torch.tensor(sampling.top_k, device=scores.device))
    if sampling.top_p < 1:
        weights = _weights(scores if ids is None else scores[ids], top)
        threshold = (weights.sum().double() * sampling.top_p).ceil().long()
        if ids is not None:
            ids = ids[_cut(scores[ids], weights, top, threshold)]
        else:
            head = _at_least(scores, groups, groups.topk(min(_HEAD, len(groups))).values[-1])
            inside = weights[head]
            if bool(inside.sum() >= threshold):  # the nucleus lies within the head
                ids = head[_cut(scores[head], inside, top, threshold)]
            else:
                ids = _cut(scores, weights, top, threshold)
    if sampling.min_p > 0:
        floor = math.ceil(sampling.min_p * float(WEIGHT_UNIT))
        if ids is None:
            lowest = top + math.log(floor / WEIGHT_UNIT) - 1e-6
            ids = _at_least(scores, groups, torch.tensor(lowest, dtype=scores.dtype, device=scores.device))
        ids = ids[_weights(scores[ids], top) >= floor]
    return ids


def _weights(scores: Tensor, top: float) -> Tensor:
    """q of rules 8 and 9."""
    return (scores - top).exp_().mul_(WEIGHT_UNIT).to(torch.int64)  # towards zero, so down


def _at_least(scores: Tensor, groups: Tensor, threshold: Tensor) -> Tensor:
    """Ids whose score is not below the threshold, ascending. Of `groups` at least those of the ids are looked into."""
    chosen = (groups >= threshold).nonzero()[:, 0]
    where = (scores.view(-1, GROUP)[chosen] >= threshold).nonzero()
    return chosen[where[:, 0]] * GROUP + where[:, 1]


def _cut(scores: Tensor, measure: Tensor, top: float, threshold: Tensor) -> Tensor:
    """Indices, ascending, of those before which the ranking holds less than `threshold` of `measure` (int64, exact).

    With counts it is rule 7, with weights rule 8.
    """
    if len(scores) <= _FEW:
        order = scores.sort(descending=True, stable=True).indices
        ranked = measure[order]
        return order[ranked.cumsum(0) - ranked < threshold].sort().values
    bucket = (top - scores).mul_(_PER_NAT).clamp_(max=_BUCKETS - 1).to(torch.int64)
    sums = torch.zeros(_BUCKETS, dtype=torch.int64, device=scores.device).scatter_add_(0, bucket, measure)
    before = sums.cumsum(0) - sums
    edge = (before < threshold).sum() - 1
    at_edge = (bucket == edge).nonzero()[:, 0]
    order = at_edge[scores[at_edge].sort(descending=True, stable=True).indices]
    ranked = measure[order]
    inside = bucket < edge
    inside[order[before[edge] + ranked.cumsum(0) - ranked < threshold]] = True
    return inside.nonzero()[:, 0]


# ------------------------------------------------------------------------------------------------------------ rule 10


def _draw_few(rows: Sequence[_Few], draws: Sequence[Draw]) -> list[tuple[int, int]]:
    """(row, token) of all rows that have few candidates, with one computation of noise."""
    if not rows:
        return []
    sizes = [len(few.ids) for few in rows]
    device = rows[0].ids.device
    keys = torch.tensor(
        [
            (draw.sampling.seed & MASK, draw.sampling.seed >> 32, len(draw.prompt) + len(draw.generated))
            for draw in (draws[few.row] for few in rows)
        ],
        device=device,
    )
    each = keys.repeat_interleave(torch.tensor(sizes, device=device), 0, output_size=sum(sizes)).T.contiguous()
    ids = torch.cat([few.ids for few in rows])
    totals = torch.cat([few.scores for few in rows]) + gumbel_of(each[:2], each[2], ids)
    winners = torch.stack([part.argmax() for part in totals.split(sizes)])  # ascending ids: the first of equals
    starts = torch.tensor([sum(sizes[:n]) for n in range(len(sizes))], device=device)
    return list(zip((few.row for few in rows), ids[starts + winners].tolist(), strict=True))


def _draw_many(scores: Tensor, ids: Tensor | None, top: float, seed: int, position: int, scratch: Scratch) -> int:
    """The token that wins among `ids`, or among all.

    With y = 1 - u a token reaches the value B only if y <= -ln u <= exp(s - B). So noise is compared with exp(s - B) for a B
    that the winner most likely passes; whoever is in by that is computed exactly, and B is lowered if nobody passed it.
    """
    likely = torch.sub(scores, top, out=scratch.likely).exp_()
    if ids is not None:
        kept = likely[ids]
        likely.zero_()[ids] = kept
    noise = scratch.noise.draw(seed, position)  # 2^32 y - 0.5
    below = math.log(float(likely.sum())) - _BELOW  # B - top
    likely.mul_(math.exp(-below) * 4294967296.0 * 1.001)  # room for the rounding of float32
    while True:
        hits = (noise <= likely).view(torch.int64).nonzero()[:, 0]  # eight at a time
        near = (hits[:, None] * 8 + torch.arange(8, device=hits.device)).view(-1)
        near = near[noise[near] <= likely[near]]
        near = near[scores[near] > -math.inf]
        if len(near):
            totals = scores[near] + scratch.noise.gumbel_of(near)
            winner = totals.argmax()
            if float(totals[winner]) >= top + below:
                return int(near[winner])
        below -= 4.0
        likely.mul_(math.exp(4.0))


# ----------------------------------------------------------------------------------------------------------- logprobs


def _add_logprobs(logits: Tensor, draws: Sequence[Draw], picked: list[Picked]) -> None:
    rows = [row for row, draw in enumerate(draws) if draw.logprobs and not picked[row].unusable]
    if not rows:
        return
    chosen = logits[rows]
    totals = chosen.logsumexp(1, keepdim=True)
    own = (chosen.gather(1, torch.tensor([[picked[row].token] for row in rows], device=logits.device)) - totals)[:, 0]
    most = min(max(draws[row].logprobs for row in rows), logits.shape[1])
    values, ids = chosen.topk(most, 1)
    ranked = (values - totals).tolist(), ids.tolist()
    for at, (row, logprob) in enumerate(zip(rows, own.tolist(), strict=True)):
        picked[row].logprob = logprob
        pairs = sorted(zip(ranked[1][at], ranked[0][at], strict=True), key=lambda pair: (-pair[1], pair[0]))
        picked[row].top_logprobs = tuple(pairs[: draws[row].logprobs])
