"""Rules 5 and 7 to 10 of the sampler for many rows at once: every token ranked, all noise computed, no branch on a value.

On a GPU for whole rows: slower than `race` is on a CPU, but a GPU would spend its time on the launches and answers of that. On
a CPU for the tokens that `few` found. It is also the plainest form of the rules on tensors, which tests compare the others
with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from node.runtime.engine.philox import LANES, MASK, gumbel, philox
from node.runtime.engine.sequence import Sampling

WEIGHT_UNIT: Final = 1 << 40
"""Of rules 8 and 9."""
CHUNK: Final = 1 << 23
"""Logits at a time: about ten tensors of 64 MiB."""


def pick(scores: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], ids: Tensor | None = None) -> Tensor:
    """Place in its row of each row's token, int64 [rows]; -1 where all is -inf.

    `scores`: float64 [rows, n], rules 0 to 4 applied, and rule 6 to the rows that are not greedy; not changed. `ids`: int64
    [rows, n], ascending, of the tokens they are of; None where the whole vocabulary is there. Where a score is -inf, any.
    """
    rows = max(1, CHUNK // scores.shape[1])
    parts = [
        _pick(
            scores[start : start + rows],
            samplings[start : start + rows],
            positions[start : start + rows],
            None if ids is None else ids[start : start + rows],
        )
        for start in range(0, len(scores), rows)
    ]
    return torch.cat(parts)


def _pick(scores: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], ids: Tensor | None) -> Tensor:
    device, width = scores.device, scores.shape[1]
    number = torch.tensor(
        [(one.top_p, 0.0 if one.greedy else 1.0) for one in samplings],
        dtype=torch.float64,
        device=device,
    )
    whole = torch.tensor(
        [
            (one.top_k or width, math.ceil(one.min_p * float(WEIGHT_UNIT)), position, one.seed & MASK, one.seed >> 32)
            for one, position in zip(samplings, positions, strict=True)
        ],
        device=device,
    )
    top_p, drawn = (column[:, None] for column in number.T)
    top_k, floor, *key = (column[:, None] for column in whole.T)
    top = scores.amax(1, keepdim=True)
    if any(not one.greedy and (one.top_k or one.top_p < 1 or one.min_p > 0) for one in samplings):
        order = scores.sort(dim=1, descending=True, stable=True).indices
        weights = (scores.gather(1, order) - top).exp_().mul_(WEIGHT_UNIT).to(torch.int64)
        kept = torch.arange(width, device=device) < top_k
        weights.mul_(kept)
        threshold = (weights.sum(1, keepdim=True).double() * top_p).ceil().to(torch.int64)
        kept &= (weights.cumsum(1) - weights < threshold) | (top_p == 1)
        kept &= weights >= floor
        kept = torch.zeros_like(kept).scatter_(1, order, kept) | (drawn == 0)
        scores = scores.masked_fill(~kept, -math.inf)
    if any(not one.greedy for one in samplings):
        scores = scores + _noise(ids, width, *key) * drawn
    return torch.where(top[:, 0] > -math.inf, scores.argmax(1), -1)


def _noise(ids: Tensor | None, width: int, position: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Of rule 10: float64 [rows, width]; position and key: int64 [rows, 1]."""
    if ids is not None:
        words = philox(ids >> 2, position, low, high)
        return gumbel(words.gather(2, (ids & 3)[:, :, None])[:, :, 0])
    blocks = torch.arange(-(-width // LANES), device=position.device).expand(len(position), -1)
    words = philox(blocks, position, low, high)
    return gumbel(words.flatten(1)[:, :width])
