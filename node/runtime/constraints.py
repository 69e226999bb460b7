"""Grammars as the engine's process follows them: what the node has found good compiles here once more, without a child.

The node has compiled each of them in time and memory before the job was accepted (`node.runtime.grammar`). One that were to hang
here after all is a hang of the engine, which ends the engine and, the second time, the stream.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from node.runtime.engine.errors import InvalidSequence
from protocol.messages import ResponseFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from node.runtime.grammar import GrammarConstraint

KEPT = 32
"""Compiled grammars that are remembered."""


class Constraints:
    """Makes constraints for one model. Loads nothing before the first one."""

    def __init__(self, folder: Path, eos_ids: Iterable[int]) -> None:
        self._file = folder / "tokenizer.json"
        self._eos_ids = frozenset(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[ResponseFormat, LLMatcher] = OrderedDict()

    def start(self, wanted: ResponseFormat, delivered: Sequence[int]) -> GrammarConstraint:
        """The constraint of an answer that goes on after `delivered`. Raises `InvalidSequence`."""
        from node.runtime.grammar import GrammarConstraint
        from node.runtime.grammar_child import matcher_of, tokenizer_of

        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self._file.read_text("utf-8"), sorted(self._eos_ids))
        matcher = self._compiled.get(wanted)
        if matcher is None:
            try:
                matcher = self._compiled[wanted] = matcher_of(self._tokenizer, wanted.kind, wanted.text)
            except ValueError as error:
                raise InvalidSequence(f"the grammar is refused: {error}"[:300]) from None
        self._compiled.move_to_end(wanted)
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        constraint = GrammarConstraint(matcher.deep_copy(), self._eos_ids)
        for token in delivered:
            constraint.accept(token)
            if constraint.failure or constraint.ended:
                raise InvalidSequence("the tokens delivered so far do not fit the grammar")
        return constraint
