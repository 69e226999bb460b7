"""The normative sampler on tensors. The definition is the reference in the protocol package; rule numbers are its.

It must pick the same token as the reference. What is not float64 or int64 here only excludes tokens that provably cannot
win, by margins far above its rounding:

- Greedy without adjustments is the first largest of the raw logits, whatever their width: widening keeps order and ties.
- Filters (rules 7 to 9) rank only what stands around the end of the prefix that they keep (`filters`).
- A draw over many tokens computes noise as integers, and logarithms only for tokens whose noise could suffice: the winner of
  a Gumbel draw is about ln(sum exp s) + one standard Gumbel, which is almost never more than 2 below its centre.
- On a GPU all rows go through the plain form of the rules together (`dense`).

Sources: as in the definition; "the winner is lse + Gumbel": Maddison et al. 2014.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from node.runtime.engine import dense
from node.runtime.engine.filters import FEW, GROUP, survivors
from node.runtime.engine.history import History, Past
from node.runtime.engine.philox import LANES, MASK, Complements, gumbel_of
from node.runtime.engine.sequence import Sampling

_BELOW: Final = 2.0
"""How far under ln(sum exp s) the winner is looked for at first: it lies lower once in 1,600 draws."""

_BLOCK: Final = 64
"""Tokens whose largest logit stands for them in the search for the likeliest."""


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
    history: Past | None = None
    """Of prompt + generated, kept up by the caller; None makes it anew, in time proportional to the tokens."""


@dataclass(slots=True)
class Picked:
    token: int
    """-1 when `unusable`."""
    unusable: bool = False
    """The model computed NaN, +inf or nothing finite that is allowed. Ends this row alone."""
    logprob: float | None = None
    """ln of the model's own probability, rounded to float32: before constraint, bias, penalties, temperature and filters."""
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


def home(device: torch.device) -> torch.device:
    """Where rows of logits on this device are sampled, and where their `History` and `Scratch` belong: beside the model on CUDA
    and ROCm, elsewhere on the CPU, because not every accelerator has float64."""
    return device if device.type == "cuda" else torch.device("cpu")


@torch.inference_mode()
def pick_rows(logits: Tensor, draws: Sequence[Draw], scratch: Scratch | None = None) -> list[Picked]:
    """The token that follows each sequence. `logits`: [rows, vocab] of any float type, row i for draws[i]; not changed."""
    if logits.shape[0] != len(draws):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(draws)} draws")
    if not draws:
        return []
    logits = logits.to(home(logits.device))
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    best, largest = _first_largest(logits)
    tops, firsts = largest.tolist(), best.tolist()
    tokens = [-1] * len(draws)
    open_rows: list[tuple[int, Past]] = []
    for row, draw in enumerate(draws):
        if not -math.inf < tops[row] < math.inf:  # the largest is NaN when any is
            continue
        history = draw.history or History(draw.sampling, draw.prompt, draw.generated, logits.device)
        if draw.sampling.greedy and not history.adjusts and _allows(draw.mask, firsts[row]):
            tokens[row] = firsts[row]  # the best of all is the best of those allowed
        else:
            open_rows.append((row, history))
    if open_rows:
        choose = _choose_many if logits.device.type == "cuda" else _choose
        for row, token in choose(logits, draws, open_rows, scratch):
            tokens[row] = token
    picked = [Picked(token, unusable=token < 0) for token in tokens]
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


def _allows(mask: Tensor | None, token: int) -> bool:
    return mask is None or (token < len(mask) and bool(mask[token]))


def _choose_many(
    logits: Tensor, draws: Sequence[Draw], rows: Sequence[tuple[int, Past]], _: Scratch | None
) -> list[tuple[int, int]]:
    """(row, token) on a GPU; -1 where the constraint leaves nothing."""
    numbers = [row for row, _ in rows]
    adjusted = logits[numbers].double()
    for (row, history), own in zip(rows, adjusted, strict=True):
        _adjust(own, draws[row].mask, history)
    positions = [len(draws[row].prompt) + len(draws[row].generated) for row in numbers]
    found = dense.pick(adjusted, [draws[row].sampling for row in numbers], positions)
    return list(zip(numbers, found.tolist(), strict=True))


def _choose(
    logits: Tensor, draws: Sequence[Draw], rows: Sequence[tuple[int, Past]], scratch: Scratch | None
) -> list[tuple[int, int]]:
    """(row, token) on a CPU, row by row, so that what a row needs stays in the cache."""
    scratch = scratch or Scratch.of(logits)
    found: list[tuple[int, int]] = []
    few: list[_Few] = []
    for row, history in rows:
        one = _choose_one(logits[row], draws[row], history, scratch)
        if isinstance(one, int):
            found.append((row, one))
        else:
            few.append(_Few(row, *one))
    return found + _draw_few(few, draws)


def _choose_one(logits: Tensor, draw: Draw, history: Past, scratch: Scratch) -> int | tuple[Tensor, Tensor]:
    """The token; or, for `_draw_few`, ids and scores of those to draw from."""
    sampling, scores = draw.sampling, scratch.scores
    scores[: scratch.vocab] = logits
    _adjust(scores[: scratch.vocab], draw.mask, history)
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
    if ids is None or len(ids) > FEW:
        position = len(draw.prompt) + len(draw.generated)
        return _draw_many(scores, ids, top, sampling.seed, position, scratch)
    return ids, scores[ids]


def _adjust(row: Tensor, mask: Tensor | None, history: Past) -> None:
    """Rules 0 to 4 on float64 [vocab], in place."""
    if mask is not None:
        allowed = mask[: len(row)].to(row.device, non_blocking=True)
        row[: len(allowed)].masked_fill_(~allowed, -math.inf)
        row[len(allowed) :] = -math.inf
    history.adjust_(row)


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
    chosen = logits if len(rows) == len(draws) else logits[rows]
    largest = chosen.amax(1, keepdim=True)
    # The sum is in float64, so that a figure, rounded to float32, is the same alone and in company.
    totals = largest.double() + (chosen - largest).exp_().sum(1, keepdim=True, dtype=torch.float64).log_()
    tokens = torch.tensor([[picked[row].token] for row in rows], device=logits.device)
    own = (chosen.gather(1, tokens).double() - totals)[:, 0].float().tolist()
    counts = [min(int(draws[row].logprobs), logits.shape[1]) for row in rows]
    for at, (row, (ids, values)) in enumerate(zip(rows, _likeliest(chosen, counts), strict=True)):
        figures = (values.double() - totals[at]).float().tolist()
        picked[row].logprob = own[at]
        picked[row].top_logprobs = tuple(zip(ids.tolist(), figures, strict=True))


def _likeliest(rows: Tensor, counts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and values of each row's largest, so many of them, largest first, equals by id.

    A block of a row that holds one of its n largest has one of the n largest maxima of blocks, so few blocks are sorted.
    """
    blocks = torch.nn.functional.pad(rows, (0, -rows.shape[1] % _BLOCK), value=-math.inf).view(len(rows), -1, _BLOCK)
    tops = blocks.amax(2)
    edges = tops.topk(min(max(counts), tops.shape[1]), 1).values
    for row, count in enumerate(counts):
        near = (tops[row] >= edges[row, min(count, edges.shape[1]) - 1]).nonzero()[:, 0]
        values, order = blocks[row, near].flatten().sort(descending=True, stable=True)
        order = order[:count]
        yield near[order // _BLOCK] * _BLOCK + order % _BLOCK, values[:count]
