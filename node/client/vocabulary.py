"""What a client knows of a model's tokens when it has the model: how many it has, how they are written, how many a prompt is.

A client needs no model to buy its answers. Where the local store has it, prompts are counted exactly, ids that the model has not
are noticed, and tokens have a text; elsewhere none of that is known, and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from node import nesting
from node.errors import ModelError, NodeError
from protocol.errors import RemoteProtocolError
from protocol.ids import ModelId
from protocol.logprobs import ID_LIMIT, TokenLogprobs
from protocol.messages import ChatMessage

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from node.models.tokenizer import Tokenizer

NOTHING = -9999.0
"""What stands for the logarithm of 0 in JSON, which has no infinities: OpenAI's figure."""


class Vocabulary(Protocol):
    """The tokens of one model."""

    @property
    def size(self) -> int:
        """Ids from here on are none of the model's."""

    def bytes_of(self, token_id: int) -> bytes: ...

    def name_of(self, token_id: int) -> str: ...


class LocalVocabulary:
    """Of a model in the local store, by its own tokenizer."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.bytes_of, self.name_of = tokenizer.bytes_of, tokenizer.name_of


class LocalModels:
    """The models of a local store, each looked for when it is first asked about."""

    def __init__(self, folder: Path, stack: ExitStack | AsyncExitStack) -> None:
        """`folder`: of the store. `stack` closes what was opened."""
        self._folder = folder
        self._stack = stack
        self._found: dict[ModelId, LocalVocabulary | None] = {}

    def get(self, model: ModelId) -> LocalVocabulary | None:
        """None where the model is not in the store, or the tokenizer library is not installed."""
        if model not in self._found:
            self._found[model] = self._load(model)
        return self._found[model]

    def count(self, model: ModelId, messages: Sequence[ChatMessage]) -> int | None:
        """Tokens of a prompt; None where they cannot be counted here."""
        found = self.get(model)
        if found is None:
            return None
        try:
            return len(found.tokenizer.chat([{"role": m.role, "content": m.content} for m in messages]))
        except (NodeError, RemoteProtocolError):
            return None

    def _load(self, model: ModelId) -> LocalVocabulary | None:
        try:
            from node.models.store import ModelStore
            from node.models.tokenizer import Tokenizer

            folder = ModelStore(self._folder).path(model)
            tokenizer = Tokenizer(folder)
        except (ImportError, ModelError, OSError):
            return None
        self._stack.callback(tokenizer.close)
        tokenizer.warm()
        return LocalVocabulary(tokenizer, _size(folder))


def _size(folder: Path) -> int:
    """Rows of the model's output by its configuration: more than the tokenizer has texts for, in some models."""
    try:
        config: Any = nesting.loads((folder / "config.json").read_bytes())
        found = config.get("text_config", config).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return ID_LIMIT
    return found if isinstance(found, int) and 0 < found < ID_LIMIT else ID_LIMIT


def openai_logprobs(found: Iterable[TokenLogprobs], vocabulary: Vocabulary | None) -> list[dict[str, Any]]:
    """In the form of OpenAI's `logprobs.content`. Where the tokens' texts are not at hand a token is written ``token_id:N``, as
    vLLM writes it, and its bytes are null."""

    def written(token: int, logprob: float) -> dict[str, Any]:
        known = None if vocabulary is None else vocabulary.bytes_of(token)
        return {
            "token": f"token_id:{token}" if vocabulary is None else vocabulary.name_of(token),
            "logprob": max(logprob, NOTHING),
            "bytes": None if known is None else list(known),
        }

    return [
        {**written(one.token_id, one.logprob), "top_logprobs": [written(*pair) for pair in one.top]} for one in found
    ]
