"""Requests made ready in the node: texts to token ids, input counted. Loads no torch, since another process may compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from node.errors import ModelError
from node.runtime.engine.rows import Row
from node.runtime.tasks.texts import Texts
from protocol.tasks import EmbedRequest, OcrRequest, RerankRequest, Task, TaskRequest, TranscribeRequest, shape_of


@dataclass(frozen=True, slots=True)
class Rows:
    """What an encoder is to read. Media have no content: they come piece by piece."""

    rows: Sequence[Row]
    """One for each text, or for each pair of query and document."""
    query: Row | None = None
    """Where it is compared with each row."""


class Preparer:
    """For one model. Safe to use from any thread."""

    def __init__(self, folder: Path, tasks: tuple[Task, ...], context_length: int) -> None:
        """Raises `ModelError` when the tokenizer is damaged."""
        self._tasks = tasks
        self._texts = Texts(folder, context_length) if Task.RERANK in tasks else None

    def __call__(self, request: TaskRequest) -> tuple[int, Rows | None]:
        """Input units, and the content. Raises `InputInvalid`, and `ModelError` for a task that the model does not serve."""
        match request:
            case EmbedRequest(texts=texts) if self._texts and Task.EMBED in self._tasks:
                rows = [self._texts.row(text, f"text {n}") for n, text in enumerate(texts)]
                return _tokens(rows), Rows(rows)
            case RerankRequest(query=query, documents=documents) if self._texts and Task.EMBED in self._tasks:
                asked = self._texts.row(query, "the query")
                rows = [self._texts.row(text, f"document {n}") for n, text in enumerate(documents)]
                return _tokens([asked, *rows]), Rows(rows, asked)
            case RerankRequest(query=query, documents=documents) if self._texts:
                numbered = enumerate(documents)
                rows = [self._texts.pair(query, text, f"the query with document {n}") for n, text in numbered]
                return _tokens(rows), Rows(rows)
            case TranscribeRequest() if Task.TRANSCRIBE in self._tasks:
                return shape_of(request).units or 0, None
            case OcrRequest() if Task.OCR in self._tasks:
                return shape_of(request).units or 0, None
        raise ModelError(f"this model does not serve {type(request).__name__}")


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.token_ids) for row in rows)
