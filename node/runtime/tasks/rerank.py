"""Documents ranked by a cross-encoder: query and document in one row, a score from a classification head with one output.

A score is the head's logit through the logistic function, 0 to 1. Every document is read with the query, so the query counts as
input once for each.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Final

import torch

from node.errors import ModelError
from node.ports import Step
from node.runtime.engine.models.bert import Bert
from node.runtime.engine.rows import Row
from node.runtime.tasks.embed import TOGETHER, float32
from node.runtime.tasks.prepare import Rows
from node.runtime.tasks.runner import Lane, Memory
from protocol.messages import FinishReason, Params
from protocol.tasks import TEXTS_LIMIT, Task


class RerankRunner:
    """A BERT classifier with one label."""

    def __init__(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> None:
        """Raises `ModelError`, or the engine's `UnsupportedModel`."""
        self._model: Final = Bert.load(folder, device, dtype)
        if self._model.config.labels != 1:
            raise ModelError(f"a classifier of {self._model.config.labels} labels is no reranker")
        self.tasks: tuple[Task, ...] = (Task.RERANK,)
        self.context_length = self._model.config.context_length
        self.dimensions = 0
        job = TEXTS_LIMIT * self.context_length * 2 * 8  # ids and type ids; the integers themselves are few and shared
        self.memory = Memory(self._model.weight_bytes, self._model.config.working_bytes(item=dtype.itemsize), job)
        self._lane: Final = Lane()

    async def run(
        self, content: object, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        if not isinstance(content, Rows):
            raise TypeError("content of another runner")
        for start in range(0, len(content.rows), TOGETHER):
            rows = content.rows[start : start + TOGETHER]
            scores = torch.empty(len(rows))
            async with aclosing(self._lane.each(self._model.classify(rows))) as batches:
                async for indices, logits in batches:
                    scores[indices] = logits[:, 0].sigmoid()
            yield Step((), "", data=float32(scores))
        yield Step((), "", FinishReason.STOP)

    def probe(self) -> bytes:
        ids = [n % self._model.config.vocab_size for n in range(1, min(48, self.context_length))]
        return b"".join(float32(found) for _, found in self._model.classify([Row(ids), Row(ids[:7])]))
