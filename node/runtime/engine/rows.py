"""What an encoder reads. Apart from the models, because who makes rows of texts need not load torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One text, or one pair of texts, ready for the encoder."""

    token_ids: Sequence[int]
    """With the model's special tokens."""
    type_ids: Sequence[int] = ()
    """0 for the first text of a pair, 1 for the second; empty means all 0."""
