"""The normative sampler on tensors. The definition is the reference in the protocol package; rule numbers are its.

It must pick the same token as the reference, so everything is float64 and int64: no float32 shortcut, no library
sampler, no order-dependent sum. The vectors and the property tests hold the two together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from node.runtime.engine.sequence import Sampling

DOMAIN = 0x474D5331
WEIGHT_UNIT = 1 << 40
_MASK = 0xFFFFFFFF
_START = 256


class UnusableLogits(ValueError):
    """NaN, +inf, or nothing finite: no token follows from these logits."""


def pick(logits: Tensor, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int]) -> int:
    """The token that follows prompt + generated; `logits` is [vocab]. Raises `UnusableLogits`."""
    adjusted = adjust(logits, sampling, prompt, generated)
    if sampling.greedy:
        return int(adjusted.argmax())  # the first of equals, as rule 5 asks
    scores = adjusted / sampling.temperature
    position = len(prompt) + len(generated)
    allowed = survivors(scores, sampling)
    if allowed is None:
        return int((scores + gumbel(sampling.seed, position, len(scores), scores.device)).argmax())
    allowed = allowed.sort().values
    return int(allowed[(scores[allowed] + gumbel_of(sampling.seed, position, allowed)).argmax()])


def adjust(logits: Tensor, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """Rules 1 to 4: float64 [vocab]."""
    out = logits.to(torch.float64, copy=True)
    if not float(out.max()) < math.inf or float(out.max()) == -math.inf:  # max is NaN when any is
        raise UnusableLogits("logits must be numbers below +inf, and one of them finite")
    device = out.device
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        out[torch.tensor(ids, device=device)] += torch.tensor(biases, dtype=torch.float64, device=device)
    if sampling.repetition_penalty != 1:
        ids_seen = torch.tensor(sorted({*prompt, *generated}), device=device)
        values = out[ids_seen]
        r = sampling.repetition_penalty
        out[ids_seen] = torch.where(values > 0, values / r, values * r)
    if generated and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = Counter(generated)
        ids_made = torch.tensor(list(counts), device=device)
        numbers = torch.tensor(list(counts.values()), dtype=torch.float64, device=device)
        out[ids_made] = out[ids_made] - sampling.frequency_penalty * numbers - sampling.presence_penalty
    return out


def survivors(scores: Tensor, sampling: Sampling) -> Tensor | None:
    """Rules 7 to 9: ids that may be drawn, in any order; None when no filter is on."""
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0):
        return None
    top = scores.max()
    ranked = _first(scores, sampling.top_k) if sampling.top_k else None
    if sampling.top_p < 1:
        ranked = _nucleus(scores, top, ranked, sampling.top_p)
    if sampling.min_p > 0:
        if ranked is None:
            ranked = torch.arange(len(scores), device=scores.device)
        ranked = ranked[_weights(scores[ranked], top) >= math.ceil(sampling.min_p * float(WEIGHT_UNIT))]
    return ranked


def _nucleus(scores: Tensor, top: Tensor, ranked: Tensor | None, top_p: float) -> Tensor:
    """Rule 8 on the ranked ids, or on the whole vocabulary when `ranked` is None."""
    total = int(_weights(scores if ranked is None else scores[ranked], top).sum())
    threshold = math.ceil(top_p * float(total))
    size = _START
    while True:  # most of the weight is in few tokens: rank those, and more only when they do not suffice
        head = _first(scores, size) if ranked is None else ranked
        reached = _weights(scores[head], top).cumsum(0)
        if int(reached[-1]) >= threshold or ranked is not None or size >= len(scores):
            return head[: int((reached < threshold).sum()) + 1]
        size *= 16


def _first(scores: Tensor, count: int) -> Tensor:
    """The first `count` ids of the ranking: by score descending, then by id ascending."""
    if count < len(scores) // 8:  # far cheaper than sorting a whole vocabulary; all ties at the edge are candidates
        candidates = (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
        return candidates[scores[candidates].sort(descending=True, stable=True).indices][:count]
    return scores.sort(descending=True, stable=True).indices[:count]


def _weights(scores: Tensor, top: Tensor) -> Tensor:
    return ((scores - top).exp() * WEIGHT_UNIT).floor().to(torch.int64)


def philox(blocks: Tensor, position: int, seed: int) -> Tensor:
    """philox4x32-10 with counter (block, position, DOMAIN): int64 [blocks, 4] of 32-bit words.

    Products of two 32-bit words wrap around int64; masking after the shift gives their true high word all the same.
    """
    a = blocks
    b = torch.full_like(a, position & _MASK)
    c = torch.full_like(a, position >> 32)
    d = torch.full_like(a, DOMAIN)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((right >> 32) & _MASK) ^ b ^ k0, right & _MASK
        c, d = ((left >> 32) & _MASK) ^ d ^ k1, left & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((a, b, c, d), dim=-1)


def gumbel(seed: int, position: int, vocab: int, device: torch.device) -> Tensor:
    """Noise of every token: float64 [vocab]."""
    blocks = torch.arange((vocab + 3) // 4, device=device)
    return _noise(philox(blocks, position, seed).view(-1)[:vocab])


def gumbel_of(seed: int, position: int, ids: Tensor) -> Tensor:
    """Noise of some tokens: float64, in the order of `ids`."""
    words = philox(ids >> 2, position, seed)
    return _noise(words.gather(1, (ids & 3)[:, None])[:, 0])


def _noise(words: Tensor) -> Tensor:
    return -torch.log(-torch.log((words.double() + 0.5) / 4294967296.0))
