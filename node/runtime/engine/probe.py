"""What a machine makes of a fixed text, bit by bit: the numerics class, and whether exact mode keeps its promise here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from node.runtime.engine.blocks import BlockPool, blocks_for
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
    first = max(start, 1)
    if passes.exact and not torch.equal(_in_company(passes, pool, tokens, first), logits[first - start :]):
        raise EngineError("exact mode cannot be offered: this machine's libraries do not compute rows alike")
    mode = f"exact {TILE}" if passes.exact else f"{passes.chunk}"
    digest = hashlib.sha256(f"{fmt} {mode}".encode())
    digest.update(logits.cpu().numpy().tobytes())
    return digest.digest()


@torch.inference_mode()
def _in_company(passes: Passes, pool: BlockPool, tokens: Sequence[int], start: int) -> Tensor:
    """The logits from `start` on, computed in two passes, each with another sequence beside."""
    table, other = (pool.allocate(blocks_for(len(tokens))) for _ in range(2))
    try:
        begun, rest = tokens[:start], tokens[start:]
        passes.logits([*begun, *rest], passes.plan([Span(table, 0, start), Span(other, 0, len(rest))]), ())
        plan = passes.plan([Span(other, len(rest), 1), Span(table, start, len(rest))])
        return passes.logits([tokens[0], *rest], plan, range(1, 1 + len(rest)))
    finally:
        pool.release(table)
        pool.release(other)
