"""Forward passes of one model over one cache: tokens and where they stand in, hidden states or logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from node.runtime.engine.blocks import BlockPool, blocks_for
from node.runtime.engine.models.decoder import Decoder
from node.runtime.engine.paged import PagedCache, Plan, Span

TILE = 16
"""Rows of every linear layer in exact mode."""


class Passes:
    """Called by the engine's thread alone."""

    def __init__(self, model: Decoder, cache: PagedCache, device: torch.device, *, exact: bool, chunk: int) -> None:
        """`chunk`: tokens that one pass computes of a text whose every position is wanted."""
        self.exact, self.chunk = exact, chunk
        self.vocab_size = model.config.vocab_size
        self._model, self._cache, self._device = model, cache, device

    def plan(self, spans: Sequence[Span]) -> Plan:
        """Spans of one token first, longest sequence first; with `exact` in any order."""
        config = self._model.config
        return Plan(spans, self._device, exact=self.exact, width=config.heads * config.head_dim)

    def logits(self, tokens: Sequence[int], plan: Plan, rows: Sequence[int]) -> Tensor:
        """Float32 [rows, vocab]: one pass, and what the model says after these of its tokens."""
        wanted = torch.tensor(rows, device=self._device, dtype=torch.int64) if len(rows) < len(tokens) else None
        hidden = self._model.forward(torch.tensor(tokens, device=self._device), plan, self._cache, wanted)
        return self._model.logits(hidden) if rows else hidden.new_empty(0, self.vocab_size)

    @torch.inference_mode()
    def all_logits(self, tokens: Sequence[int], start: int, pool: BlockPool) -> Tensor:
        """Logits at every position of a text from `start` on: float32 [len(tokens) - start, vocab]. Raises `CacheFull`."""
        return torch.cat(list(self._by_chunks(tokens, start, pool)))

    def _by_chunks(self, tokens: Sequence[int], start: int, pool: BlockPool) -> Iterator[Tensor]:
        table = pool.allocate(blocks_for(len(tokens)))
        try:
            for begin in range(0, len(tokens), self.chunk):
                chunk = tokens[begin : begin + self.chunk]
                rows = range(min(max(start - begin, 0), len(chunk)), len(chunk))
                made = self.logits(chunk, self.plan([Span(table, begin, len(chunk))]), rows)
                if len(rows):
                    yield made
        finally:
            pool.release(table)
