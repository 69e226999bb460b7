"""Grammars that bind an answer: a client's JSON schema, regular expression or Lark grammar, compiled for one tokenizer.

Rules:
- Whatever is wrong with a grammar is the client's fault and said before the job is accepted, as `PromptInvalid`.
- A grammar compiles in a child process first, where time and memory end it (`grammar_child`); here only what did so in time.
- An answer's state follows from the grammar and the tokens alone, so a stream that goes on elsewhere replays them.
- A grammar that passes a limit in the midst of an answer ends that answer alone: its constraint then allows nothing.

Source: llguidance (docs/adr/0034-grammars.md).
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from node import nesting
from node.errors import ModelError, PromptInvalid
from node.models.child import Child
from node.runtime.grammar_child import error_of, matcher_of, tokenizer_of
from protocol.messages import ResponseFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

COMPILE_SECONDS: Final = 1.0
MAX_DEPTH: Final = 50
"""Of a JSON schema's brackets."""
FIRST_SECONDS: Final = 0.5
TOKEN_SECONDS: Final = 0.005
"""Processor time that one answer's grammar may take: so much to begin with, and so much for each token. All streams wait for it,
and llguidance's limits, which a schema of 150 optional properties needs, let an ambiguous grammar take ten times as much."""
KEPT: Final = 32
"""Compiled grammars that are remembered, for clients that ask often."""

_CHILD: Final = Path(__file__).with_name("grammar_child.py")


class GrammarConstraint:
    """`node.runtime.engine.constraint.Constraint` of one answer."""

    def __init__(self, matcher: LLMatcher, eos_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self.ended = False
        self._left = FIRST_SECONDS
        """Seconds of processor time."""
        self.failure = ""
        """Why the grammar cannot be followed any further; nothing is allowed then."""

    def mask(self) -> Tensor:
        """Which tokens may follow."""
        import torch  # in the engine's process; the node compiles grammars too, and needs no torch for that

        if not self.failure:
            began = time.thread_time()
            allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
            self._spend(began)
            if not self._failed():
                return allowed
        return torch.zeros(1, dtype=torch.bool)

    def accept(self, token: int) -> None:
        """The token that followed."""
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._left += TOKEN_SECONDS
        self._spend(began)
        self.ended = not self._failed() and token in self._eos_ids

    def _spend(self, began: float) -> None:
        self._left -= time.thread_time() - began
        if self._left < 0 and not self.failure:
            self.failure = "it takes too much time"

    def _failed(self) -> bool:
        if not self.failure and self._matcher.is_error():
            self.failure = error_of(self._matcher)
        return bool(self.failure)


class Grammars:
    """Compiles grammars for one model. Callable from any thread; close it when the model is unloaded."""

    def __init__(self, folder: Path, eos_ids: Iterable[int], *, seconds: float = COMPILE_SECONDS) -> None:
        """`eos_ids`: the tokens that end an answer. `seconds`: limit of one grammar. Loads nothing before the first use."""
        self._file = folder / "tokenizer.json"
        self._eos_ids = frozenset(eos_ids)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._child: Child | None = None
        self._compiled: OrderedDict[ResponseFormat, LLMatcher] = OrderedDict()

    def start(self, wanted: ResponseFormat, delivered: Sequence[int] = ()) -> GrammarConstraint:
        """The constraint of an answer that goes on after `delivered`.

        Raises `PromptInvalid` for a grammar that is no good, takes too long or too much, or that the delivered tokens break;
        `ModelError` when this model cannot be bound at all. The first call takes about a second, one with a known grammar none.
        """
        matcher = self._known(wanted)
        if matcher is None:
            with self._compiling:  # one at a time; who asks for a known grammar does not wait for it
                matcher = self._known(wanted) or self._remember(wanted, self._compile(wanted))
        constraint = GrammarConstraint(matcher, self._eos_ids)
        for token in delivered:
            constraint.accept(token)
            if constraint.failure or constraint.ended:
                raise PromptInvalid(f"the tokens delivered so far do not fit the client's {_NAMES[wanted.kind]}")
        return constraint

    def close(self) -> None:
        """End the child. The object can be used again."""
        with self._compiling:
            self._end_child()

    def _known(self, wanted: ResponseFormat) -> LLMatcher | None:
        """A copy that nothing was fed to, when this grammar has been compiled."""
        with self._lock:
            matcher = self._compiled.get(wanted)
            if matcher is None:
                return None
            self._compiled.move_to_end(wanted)
            return matcher.deep_copy()

    def _remember(self, wanted: ResponseFormat, matcher: LLMatcher) -> LLMatcher:
        with self._lock:
            self._compiled[wanted] = matcher
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def _compile(self, wanted: ResponseFormat) -> LLMatcher:
        name = _NAMES[wanted.kind]
        if not self._eos_ids:
            raise ModelError("this model has no end-of-sequence token, which a grammar needs to end an answer")
        try:
            line = json.dumps({"kind": wanted.kind, "text": wanted.text}).encode() + b"\n"
            if wanted.kind == "json_schema":
                nesting.check_depth(wanted.text.encode(), MAX_DEPTH)
        except (ValueError, UnicodeEncodeError) as error:
            raise PromptInvalid(f"the client's {name} is refused: {error}"[:300]) from None
        answer = self._started().call(line, self._seconds)
        if answer is None:
            raise PromptInvalid(
                f"the client's {name} is refused: it takes more than {self._seconds:g} s or too much memory"
            )
        if "ok" not in answer:
            raise PromptInvalid(f"the client's {name} is refused: {answer['error']}"[:300])
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self._file.read_text("utf-8"), sorted(self._eos_ids))
        try:
            return matcher_of(self._tokenizer, wanted.kind, wanted.text)
        except ValueError as error:
            raise PromptInvalid(f"the client's {name} is refused: {error}"[:300]) from None

    def _started(self) -> Child:
        if self._child is None or self._child.poll() is not None:
            self._end_child()
            child = Child(_CHILD, str(self._file), *map(str, sorted(self._eos_ids)))
            if not child.ready():
                raise ModelError("the grammar process did not start", hint="is llguidance installed?")
            self._child = child
        return self._child

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self._end_child()


_NAMES: Final = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "Lark grammar"}
