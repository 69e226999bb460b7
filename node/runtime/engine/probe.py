"""What a machine makes of a fixed text, bit by bit: the numerics class, and whether exact mode keeps its promise here.

Exact mode rests on libraries that compute a row, or one matrix of many, alike in any company. Some do not, for some shapes and
numbers of threads, so each engine tries it on its own model before it is offered: rows alone, first, last and among others,
several at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from node.runtime.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from node.runtime.engine.errors import EngineError
from node.runtime.engine.paged import Span
from node.runtime.engine.passes import TILE, Passes

TOKENS = 40
"""Of the text, where the context has room for them."""
ROWS = 8
"""Positions whose logits are hashed and compared, the last."""


def numerics(passes: Passes, pool: BlockPool, *, fmt: str, context: int) -> bytes:
    """sha256 of the exact logits of a fixed text: equal on machines that compute bit for bit alike.

    `fmt`: of the linear layers. Raises `CacheFull`, and in exact mode `EngineError` when this machine's libraries do not keep
    its promise.
    """
    tokens = [(7 * n * n + 3) % passes.vocab_size for n in range(min(context, TOKENS))]
    start = max(len(tokens) - ROWS, 0)
    logits = passes.all_logits(tokens, start, pool)
    if passes.exact:
        first = max(start, 1)
        for position, found in enumerate(_in_companies(passes, pool, tokens, first), first):
            if not torch.equal(found, logits[position - start]):
                raise EngineError("exact mode cannot be offered: this machine's libraries do not compute rows alike")
    mode = f"exact {TILE}" if passes.exact else f"{passes.chunk}"
    digest = hashlib.sha256(f"{fmt} {mode}".encode())
    digest.update(logits.cpu().numpy().tobytes())
    return digest.digest()


@torch.inference_mode()
def _in_companies(passes: Passes, pool: BlockPool, tokens: Sequence[int], start: int) -> Iterator[Tensor]:
    """The logits at each position from `start` on, [vocab], computed in other passes and companies than one prefill."""
    table, other = (pool.allocate(blocks_for(len(tokens))) for _ in range(2))

    def step(begin: int, count: int, before: Sequence[Span] = (), after: Sequence[Span] = ()) -> Tensor:
        """So many rows of the text, between spans of another sequence, which has the same tokens."""
        spans = [*before, Span(table, begin, count), *after]
        given = [token for span in spans for token in tokens[span.start : span.start + span.count]]
        skipped = sum(span.count for span in before)
        return passes.logits(given, passes.plan(spans), range(skipped, skipped + count))

    try:
        last = len(tokens) - 1
        step(0, 1)
        if start > 1:
            step(1, start - 1, [Span(other, 0, len(tokens))])
        else:
            passes.logits(tokens, passes.plan([Span(other, 0, len(tokens))]), ())
        alike = last - last % BLOCK_TOKENS
        crowd = Span(other, alike, last + 1 - alike)
        """Rows that see as many blocks as the text's last do."""
        whole = Span(other, 0, last + 1)
        companies: list[tuple[list[Span], list[Span]]] = [
            ([], []),
            ([], [Span(other, last, 1)]),
            ([crowd], []),
            ([whole], [crowd]),
        ]
        for position, (before, after) in zip(range(start, last + 1), companies, strict=False):
            yield step(position, 1, before, after)[0]
        begin = start + len(companies)
        if begin <= last:
            yield from step(begin, last + 1 - begin, [Span(other, 0, 1)])
    finally:
        pool.release(table)
        pool.release(other)
