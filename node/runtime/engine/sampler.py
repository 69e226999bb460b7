"""The normative sampler on tensors. The definition is the reference in the protocol package; rule numbers are its.

It must pick the same token as the reference. What is not float64 or int64 only excludes tokens that provably cannot win:

- Greedy without adjustments is the first largest of the raw logits, whatever their width: widening keeps order and ties.
  So does division by a temperature, of what was float32: rows that nothing adjusts are never widened.
- On a CPU rows of which top_k leaves few tokens are narrowed to these together (`few`); in others a token is drawn from the
  whole vocabulary, and filters are asked about it alone (`race`).
- On a GPU all rows go through the plain form of the rules together (`dense`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from node.runtime.engine import dense, few, race
from node.runtime.engine.history import History, Past
from node.runtime.engine.maxima import GROUP, first_largest, maxima
from node.runtime.engine.sequence import Sampling

_WIDENED: Final = 1 << 20
"""Logits at a time, or one row: 8 MiB."""


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

    @property
    def position(self) -> int:
        """Of the token that is chosen."""
        return len(self.prompt) + len(self.generated)


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
    """What one call at a time needs, made once for a vocabulary on a device."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self.vocab = vocab
        self.widened = torch.empty((max(1, _WIDENED // vocab), vocab), dtype=torch.float64, device=device)
        """Rows at hand that are adjusted."""
        self.field = race.field_for(vocab, device)

    @classmethod
    def of(cls, logits: Tensor) -> Scratch:
        return cls(logits.shape[-1], logits.device)


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
    groups = maxima(logits)
    best, largest = first_largest(logits, groups)
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
        choose = _choose_dense if logits.device.type == "cuda" else _choose
        for row, token in choose(logits, groups, draws, open_rows, scratch):
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


def _choose_dense(
    logits: Tensor, _: Tensor, draws: Sequence[Draw], rows: Sequence[tuple[int, Past]], scratch: Scratch | None
) -> list[tuple[int, int]]:
    """(row, token) on a GPU; -1 where the constraint leaves nothing."""
    numbers = [row for row, _ in rows]
    samplings = [draws[row].sampling for row in numbers]
    scores = logits[numbers].double()
    for (row, history), own in zip(rows, scores, strict=True):
        _adjust(own, draws[row].mask, history)
    temperatures = [[1.0 if one.greedy else one.temperature] for one in samplings]
    scores /= torch.tensor(temperatures, dtype=torch.float64, device=scores.device)
    found = dense.pick(scores, samplings, [draws[row].position for row in numbers])
    return list(zip(numbers, found.tolist(), strict=True))


def _choose(
    logits: Tensor, groups: Tensor, draws: Sequence[Draw], rows: Sequence[tuple[int, Past]], scratch: Scratch | None
) -> list[tuple[int, int]]:
    """(row, token) on a CPU; -1 where the constraint leaves nothing. `groups`: the logits' maxima."""
    scratch = scratch or Scratch.of(logits)
    exact = logits.dtype is torch.float32  # numbers of float64 may become equal by division
    free = [row for row, history in rows if exact and draws[row].mask is None and not history.adjusts]
    found = list(zip(free, _draw(logits, groups, free, [draws[row] for row in free], scratch.field), strict=True))
    others = [one for one in rows if one[0] not in {*free}]
    step = len(scratch.widened)
    for start in range(0, len(others), step):
        found += _choose_adjusted(logits, draws, others[start : start + step], scratch)
    return found


def _choose_adjusted(
    logits: Tensor, draws: Sequence[Draw], rows: Sequence[tuple[int, Past]], scratch: Scratch
) -> list[tuple[int, int]]:
    scores = scratch.widened[: len(rows)]
    each = []
    for own, (row, history) in zip(scores, rows, strict=True):  # one by one, so that a row stays in the cache
        own.copy_(logits[row])
        _adjust(own, draws[row].mask, history)
        if not draws[row].sampling.greedy:
            own.div_(draws[row].sampling.temperature)
        each.append(maxima(own[None]))
    groups = torch.cat(each)
    best, largest = first_largest(scores, groups)
    tokens = [token if top > -math.inf else -1 for token, top in zip(best.tolist(), largest.tolist(), strict=True)]
    drawn = [at for at, (row, _) in enumerate(rows) if tokens[at] >= 0 and not draws[row].sampling.greedy]
    asked = [draws[rows[at][0]] for at in drawn]
    for at, token in zip(drawn, _draw(scores, groups, drawn, asked, scratch.field, divided=True), strict=True):
        tokens[at] = token
    return [(row, token) for (row, _), token in zip(rows, tokens, strict=True)]


def _draw(
    values: Tensor,
    groups: Tensor,
    rows: Sequence[int],
    draws: Sequence[Draw],
    field: race.Field,
    *,
    divided: bool = False,
) -> list[int]:
    """Rules 6 to 10 on some rows of float32 or float64 [rows, vocab]; rules 7 to 10 where they are `divided`."""
    temperatures = [1.0 if divided else draw.sampling.temperature for draw in draws]
    tokens = [-1] * len(rows)
    narrow = [at for at, draw in enumerate(draws) if few.leaves_few(draw.sampling, groups.shape[1])]
    if narrow:
        where = [rows[at] for at in narrow]
        found = few.pick(
            values if len(where) == len(values) else values[where],
            groups if len(where) == len(values) else groups[where],
            [temperatures[at] for at in narrow],
            [draws[at].sampling for at in narrow],
            [draws[at].position for at in narrow],
        )
        for at, token in zip(narrow, found, strict=True):
            tokens[at] = token
    tops = groups.amax(1).tolist() if len(narrow) < len(rows) else []
    for at, (row, draw) in enumerate(zip(rows, draws, strict=True)):
        if tokens[at] < 0:
            one = race.Row(values[row], groups[row], tops[row], temperatures[at], draw.sampling.seed, draw.position)
            tokens[at] = race.pick(one, draw.sampling, field)
    return tokens


def _adjust(row: Tensor, mask: Tensor | None, history: Past) -> None:
    """Rules 0 to 4 on float64 [vocab], in place."""
    if mask is not None:
        allowed = mask[: len(row)].to(row.device, non_blocking=True)
        row[: len(allowed)].masked_fill_(~allowed, -math.inf)
        row[len(allowed) :] = -math.inf
    history.adjust_(row)


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
    blocks = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP), value=-math.inf).view(len(rows), -1, GROUP)
    tops = blocks.amax(2)
    edges = tops.topk(min(max(counts), tops.shape[1]), 1).values
    for row, count in enumerate(counts):
        near = (tops[row] >= edges[row, min(count, edges.shape[1]) - 1]).nonzero()[:, 0]
        values, order = blocks[row, near].flatten().sort(descending=True, stable=True)
        order = order[:count]
        yield near[order // GROUP] * GROUP + order % GROUP, values[:count]
