"""Rules 5 to 10 of the sampler for many rows at once, on a GPU: every token ranked, all noise computed, no branch on a value.

Slower per row than `sampler` is on a CPU, but a GPU would spend its time on the launches and answers of that. It is also the
plainest form of the rules on tensors, which tests compare the other with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from node.runtime.engine.filters import WEIGHT_UNIT
from node.runtime.engine.philox import LANES, MASK, gumbel, philox
from node.runtime.engine.sequence import Sampling

CHUNK: Final = 1 << 23
"""Logits at a time: about ten tensors of 64 MiB."""


def pick(adjusted: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    """Token of each row, int64 [rows]; -1 where all is -inf. `adjusted`: float64 [rows, vocab], rules 0 to 4 applied."""
    rows = max(1, CHUNK // adjusted.shape[1])
    parts = [
        _pick(adjusted[start : start + rows], samplings[start : start + rows], positions[start : start + rows])
        for start in range(0, len(adjusted), rows)
    ]
    return torch.cat(parts)


def _pick(adjusted: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    device, vocab = adjusted.device, adjusted.shape[1]
    number = torch.tensor(
        [(1.0 if one.greedy else one.temperature, one.top_p, 0.0 if one.greedy else 1.0) for one in samplings],
        dtype=torch.float64,
        device=device,
    )
    whole = torch.tensor(
        [
            (one.top_k or vocab, math.ceil(one.min_p * float(WEIGHT_UNIT)), position, one.seed & MASK, one.seed >> 32)
            for one, position in zip(samplings, positions, strict=True)
        ],
        device=device,
    )
    temperature, top_p, drawn = (column[:, None] for column in number.T)
    top_k, floor, *key = (column[:, None] for column in whole.T)
    scores = adjusted / temperature
    top = scores.amax(1, keepdim=True)
    if any(not one.greedy and (one.top_k or one.top_p < 1 or one.min_p > 0) for one in samplings):
        order = scores.sort(dim=1, descending=True, stable=True).indices
        weights = (scores.gather(1, order) - top).exp_().mul_(WEIGHT_UNIT).to(torch.int64)
        kept = torch.arange(vocab, device=device) < top_k
        weights.mul_(kept)
        threshold = (weights.sum(1, keepdim=True).double() * top_p).ceil().to(torch.int64)
        kept &= (weights.cumsum(1) - weights < threshold) | (top_p == 1)
        kept &= weights >= floor
        kept = torch.zeros_like(kept).scatter_(1, order, kept) | (drawn == 0)
        scores = scores.masked_fill(~kept, -math.inf)
    if any(not one.greedy for one in samplings):
        blocks = torch.arange(-(-vocab // LANES), device=device)[None]
        position, low, high = (part.expand(len(samplings), blocks.shape[1]) for part in key)
        noise = gumbel(philox(blocks.expand_as(position), position, low, high).flatten(1)[:, :vocab])
        scores = scores + noise * drawn
    return torch.where(top[:, 0] > -math.inf, scores.argmax(1), -1)
