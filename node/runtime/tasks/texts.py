"""Texts and pairs of texts to token ids, for encoders: with the model's special tokens, never cut off.

Unlike `node.models.tokenizer`, which is for decoders, it takes any tokenizer that the library reads: nothing is turned back into
text. A text that is too long is refused by its number, because half of it would give a vector of something else.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from node.errors import InputInvalid, ModelError
from node.runtime.engine.rows import Row


class Texts:
    """The tokenizer of a model folder. Safe to use from any thread."""

    def __init__(self, folder: Path, context_length: int) -> None:
        """Raises `ModelError` when the tokenizer is damaged."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ModelError(f"tokenizer.json cannot be read: {error}"[:300]) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._most = context_length

    def row(self, text: str, what: str) -> Row:
        """Raises `InputInvalid`; `what` is how the message calls the text."""
        ids = self._tokenizer.encode(text).ids
        self._check(len(ids), what)
        return Row(ids)

    def pair(self, first: str, second: str, what: str) -> Row:
        """Both in one row, apart by their type ids."""
        encoded = self._tokenizer.encode(first, second)
        self._check(len(encoded.ids), what)
        return Row(encoded.ids, encoded.type_ids)

    def _check(self, count: int, what: str) -> None:
        if not 1 <= count <= self._most:
            raise InputInvalid(f"{what} has {count} tokens; the model takes 1 to {self._most}", hint="send it in parts")
