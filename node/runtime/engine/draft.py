"""A draft model: a smaller model of the same vocabulary guesses, the model itself decides (Leviathan et al. 2023).

Guesses are greedy. As with prompt lookup, a guess is checked in the step that computes the next token anyway, by the sampler
as it would draw there: the answer is the same with and without, at any temperature.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from node.runtime.engine import weights
from node.runtime.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from node.runtime.engine.errors import CacheFull, UnsupportedModel
from node.runtime.engine.lookup import Trust
from node.runtime.engine.paged import PagedCache, Plan, Span
from node.runtime.engine.scheduler import Running


@dataclass(slots=True)
class _Known:
    """What the draft model has computed of one sequence."""

    table: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Guessed ones among them: where they differ from what came, they are computed again."""
    settled: int = 0
    """So many of them are known to be the sequence's own."""
    trust: Trust = field(default_factory=Trust)

    def settle(self, tokens: list[int]) -> None:
        """Forget what differs from the sequence, and its last token: that is always computed. Looks at what is new only."""
        most = min(len(self.tokens), len(tokens) - 1)
        while self.settled < most and self.tokens[self.settled] == tokens[self.settled]:
            self.settled += 1
        del self.tokens[self.settled :]


class DraftModel:
    """Belongs to one engine and its thread. Raises `UnsupportedModel` when it does not fit the model that it guesses for."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: str, *, vocab_size: int, cache_bytes: int, chunk: int
    ) -> None:
        self._model, _ = weights.load(folder, device, dtype)
        config = self._model.config
        if config.vocab_size != vocab_size:
            raise UnsupportedModel(f"the draft model has {config.vocab_size} tokens, the model {vocab_size}")
        self._device, self._chunk = device, chunk
        size = 2 * config.layers * config.kv_heads * config.head_dim * BLOCK_TOKENS * self._model.dtype.itemsize
        self._pool = BlockPool(cache_bytes // size, prefix_cache=False)
        self._cache = PagedCache(
            config.layers,
            config.kv_heads,
            config.head_dim,
            self._pool.total,
            self._model.dtype,
            device,
            self._model.kernels,
        )
        self.cache_bytes = self._pool.total * size
        """Bytes of its keys and values."""
        self._known: dict[Hashable, _Known] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights as they are held."""
        return self._model.nbytes

    def propose(self, ones: Sequence[Running]) -> None:
        """Give each of these answers a draft; none where guesses do not pay, or the room is too small."""
        open_: list[tuple[Running, _Known, int]] = []
        for one in ones:
            known = self._known.setdefault(one.sequence.id, _Known())
            known.settle(one.tokens)
            wanted = known.trust.length(one.room - len(one.tokens))
            if wanted and self._catch_up(one, known) and self._grow(known, len(one.tokens) + wanted):
                open_.append((one, known, wanted))
        while open_:
            spans = [Span(known.table, len(known.tokens), 1) for _, known, _ in open_]
            inputs = [_token(one, len(known.tokens)) for one, known, _ in open_]
            order = sorted(range(len(open_)), key=lambda n: -spans[n].start)
            plan = Plan([spans[n] for n in order], self._device)
            fed = torch.tensor([inputs[n] for n in order], device=self._device)
            guesses = self._model.logits(self._model.forward(fed, plan, self._cache)).argmax(-1).tolist()
            for n, guess in zip(order, guesses, strict=True):
                one, known, _ = open_[n]
                known.tokens.append(inputs[n])
                one.draft.append(guess)
            open_ = [item for item in open_ if len(item[0].draft) < item[2]]

    def learn(self, sequence_id: Hashable, guessed: int, right: int) -> None:
        known = self._known.get(sequence_id)
        if known is not None:
            known.trust.learn(guessed, right)

    def forget(self, sequence_id: Hashable) -> None:
        """The sequence has ended, or lost its place."""
        known = self._known.pop(sequence_id, None)
        if known is not None:
            self._pool.release(known.table)

    def _catch_up(self, one: Running, known: _Known) -> bool:
        """Compute what is missing before the last token, one chunk at most; True when nothing is missing any more."""
        begin = len(known.tokens)
        missing = one.tokens[begin : min(begin + self._chunk, len(one.tokens) - 1)]
        if not self._grow(known, len(known.tokens) + len(missing)):
            return False
        if missing:
            plan = Plan([Span(known.table, len(known.tokens), len(missing))], self._device)
            nothing = torch.empty(0, dtype=torch.int64, device=self._device)
            self._model.forward(torch.tensor(missing, device=self._device), plan, self._cache, nothing)
            known.tokens += missing
        return len(known.tokens) == len(one.tokens) - 1

    def _grow(self, known: _Known, tokens: int) -> bool:
        try:
            known.table += self._pool.allocate(max(blocks_for(tokens) - len(known.table), 0))
        except CacheFull:
            return False
        return True

    def check_integrity(self, running: Sequence[Hashable]) -> None:
        """Raises `IntegrityError` unless it holds blocks of running sequences only."""
        self._pool.check_integrity([self._known[name].table for name in running if name in self._known])


def _token(one: Running, at: int) -> int:
    """Of the sequence with its draft."""
    return one.tokens[at] if at < len(one.tokens) else one.draft[at - len(one.tokens)]
