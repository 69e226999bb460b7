"""Rules 7 to 9 of the sampler, for one row at a time, without ever sorting a vocabulary.

Filters keep a prefix of the ranking, so only the ranking around its end matters. Everything else falls into buckets of equal
score range, whose integer sums are exact whatever their order (`_cut`).
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from node.runtime.engine.sequence import Sampling

WEIGHT_UNIT: Final = 1 << 40
GROUP: Final = 64
"""Tokens whose largest score is looked at first; rows are padded to a multiple of it."""
FEW: Final = 2048
"""So many tokens are sorted, and get their noise one by one, sooner than anything cleverer is done."""
_HEAD: Final = 256
"""Groups at most from whose maxima a threshold for the best tokens is read."""
_BUCKETS: Final = 4096
_PER_NAT: Final = 64
"""Buckets per unit of score."""


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
        weights = weights_of(scores if ids is None else scores[ids], top)
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
        ids = ids[weights_of(scores[ids], top) >= floor]
    return ids


def weights_of(scores: Tensor, top: float) -> Tensor:
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
    if len(scores) <= FEW:
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
