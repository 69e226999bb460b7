"""What rules 1 to 4 need of a sequence's tokens, kept up token by token instead of counted anew at every step.

Looking ahead, for guesses that may be wrong, costs as much as the guesses are long, however long the prompt is.

It follows from sampling parameters, prompt and generated tokens alone: made anew from them it is the same, which is why a
stream that goes on elsewhere draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from node.runtime.engine.sequence import Sampling


class History:
    """One slot for each token id that bias or penalties touch."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int], device: torch.device
    ) -> None:
        self._repetition = sampling.repetition_penalty
        self._frequency = sampling.frequency_penalty
        self._presence = sampling.presence_penalty
        self._counts = bool(self._frequency or self._presence)
        self._watches = self._counts or self._repetition != 1
        """Whether tokens matter at all; bias alone asks nothing of them."""
        self._slots: dict[int, int] = {}
        self._used = self._extended = 0
        if self._watches or sampling.logit_bias:
            self._fill(sampling, prompt, generated, device)

    def _fill(self, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int], device: torch.device) -> None:
        biases = dict(sampling.logit_bias)
        seen = dict.fromkeys(prompt) if self._repetition != 1 else {}
        made: dict[int, int] = {}
        for token in generated if self._watches else ():
            made[token] = made.get(token, 0) + 1
        ids = list(dict.fromkeys((*biases, *seen, *made)))
        self._slots = {token: slot for slot, token in enumerate(ids)}
        self._used = len(ids)
        room = max(64, 2 * len(ids))
        self._ids = torch.zeros(room, dtype=torch.int64, device=device)
        self._state = torch.zeros((3, room), dtype=torch.float64, device=device)
        """Bias, times generated, and above 0 where in prompt or generated."""
        self._ids[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        self._state[:, : len(ids)] = torch.tensor(
            [
                [biases.get(token, 0.0) for token in ids],
                [float(made.get(token, 0)) for token in ids],
                [float(token in seen or token in made) for token in ids],
            ],
            dtype=torch.float64,
        )

    @property
    def adjusts(self) -> bool:
        """False when rules 1 to 4 leave every logit as it is."""
        return self._used > 0

    def extend(self, token: int) -> None:
        """One more generated token."""
        if not self._watches:
            return
        slot = self._slots.get(token)
        if slot is None:
            slot = self._used
            if slot == len(self._ids):
                self._ids = torch.cat((self._ids, torch.zeros_like(self._ids)))
                self._state = torch.cat((self._state, torch.zeros_like(self._state)), dim=1)
            self._ids[slot] = token
            self._slots[token] = slot
            self._used += 1
        self._state[1:, slot] += 1
        self._extended += 1

    def _state_after(self, more: Mapping[int, int]) -> Tensor:
        """Float64 [3, len(more)]: of each of these tokens, once it has come so many times more."""
        slots = [self._slots.get(token, -1) for token in more]
        known = torch.tensor([slot >= 0 for slot in slots], device=self._state.device)
        state = torch.where(known, self._state[:, [max(slot, 0) for slot in slots]], 0.0)
        state[1:] += torch.tensor(list(more.values()), dtype=torch.float64, device=state.device)
        return state

    def ahead(self, tokens: Sequence[int]) -> History | Ahead:
        """As it would be after these tokens, at the cost of these tokens alone. Holds until this one is extended."""
        return Ahead(self, tokens) if tokens and self._watches else self

    def adjust_(self, row: Tensor) -> None:
        """Rules 1 to 4 on float64 logits [vocab], in place."""
        if self._used:
            ids = self._ids[: self._used]
            row[ids] = self._adjusted(row[ids], self._state[:, : self._used])

    def _adjusted(self, values: Tensor, state: Tensor) -> Tensor:
        bias, count, seen = state
        values = values.add(bias)
        if self._repetition != 1:
            penalised = torch.where(values > 0, values / self._repetition, values * self._repetition)
            values = torch.where(seen > 0, penalised, values)
        if self._counts:
            values = values - self._frequency * count
            values = torch.where(count > 0, values - self._presence, values)
        return values


class Ahead:
    """A history with some tokens after it that may never come. Made by `History.ahead`."""

    adjusts = True

    def __init__(self, base: History, tokens: Sequence[int]) -> None:
        self._base, self._extended = base, base._extended
        self._more: dict[int, int] = {}
        for token in tokens:
            self._more[token] = self._more.get(token, 0) + 1

    def adjust_(self, row: Tensor) -> None:
        """As `History.adjust_`. Raises `ValueError` when its base has gone on meanwhile."""
        if self._base._extended != self._extended:
            raise ValueError("the history has gone on since it was looked ahead from")
        ids = torch.tensor(list(self._more), dtype=torch.int64, device=row.device)
        values = row[ids]
        self._base.adjust_(row)
        row[ids] = self._base._adjusted(values, self._base._state_after(self._more))


Past = History | Ahead
"""What the sampler asks: whether logits change, and to change them."""
