"""Vectors of texts, and documents ranked by how near their vectors lie to the query's, with one sentence encoder.

Ranking by such vectors (a bi-encoder) reads query and document apart from each other: fast, and coarser than a cross-encoder
(`node.runtime.tasks.rerank`), which reads both together. A score is the cosine, -1 to 1; the query counts as input once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from node.ports import Step
from node.runtime.engine.models.bert import Bert
from node.runtime.engine.rows import Row
from node.runtime.tasks.prepare import Rows
from node.runtime.tasks.runner import Lane, Memory
from protocol.messages import FinishReason, Params
from protocol.tasks import TEXT_LIMIT, Task

TOGETHER: Final = 64
"""Texts that are sorted by length and answered together: rows leave in the order in which they were asked for."""


class EmbedRunner:
    """A BERT encoder without a head."""

    def __init__(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> None:
        """Raises `ModelError`, or the engine's `UnsupportedModel`."""
        self._model: Final = Bert.load(folder, device, dtype)
        self.tasks: tuple[Task, ...] = (Task.EMBED, Task.RERANK)
        self.context_length = self._model.config.context_length
        self.dimensions = self._model.config.hidden_size
        self.memory = Memory(self._model.weight_bytes, self._model.config.working_bytes(item=dtype.itemsize), _JOB)
        self._lane: Final = Lane()

    async def run(
        self, content: object, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        if not isinstance(content, Rows):
            raise TypeError("content of another runner")
        query: Tensor | None = None
        if content.query is not None:
            query = await self._lane.run(lambda row: next(self._model.embed([row]))[1][0], content.query)
        for start in range(0, len(content.rows), TOGETHER):
            rows = content.rows[start : start + TOGETHER]
            vectors = torch.empty(len(rows), self.dimensions)
            async with aclosing(self._lane.each(self._model.embed(rows))) as batches:
                async for indices, found in batches:
                    vectors[indices] = found
            yield Step((), "", data=float32(vectors if query is None else vectors @ query))
        yield Step((), "", FinishReason.STOP)

    def probe(self) -> bytes:
        ids = [n % self._model.config.vocab_size for n in range(1, min(48, self.context_length))]
        return b"".join(float32(found) for _, found in self._model.embed([Row(ids), Row(ids[:7])]))


_JOB: Final = TEXT_LIMIT * 8 * 5
"""A token id is 8 bytes in a list and 32 as an object, and no character makes more than one token."""


def float32(numbers: Tensor) -> bytes:
    """Little-endian, row after row."""
    return numbers.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()
