"""Tasks without a model: deterministic, instant, and able to misbehave. Product code: our tests and yours use it.

Vectors, scores and words are made from hashes of the input. Nothing here understands anything, and the names say so.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import trio

from node.errors import InputInvalid, ModelError
from node.ports import ModelInfo, Step, TaskInput
from protocol.ids import ModelId
from protocol.messages import FinishReason, Params
from protocol.tasks import (
    EmbedRequest,
    OcrRequest,
    RerankRequest,
    Task,
    TaskRequest,
    TranscribeRequest,
    shape_of,
    task_of,
)

DIMENSIONS = 8
WORDS_PER_TEXT = 64
"""Context of the fakes that read texts; a word is a token."""
SECOND = 32_000
"""Bytes of audio that make one word."""


def fake_model(task: Task) -> ModelId:
    return ModelId.of_manifest(f"gristmill fake {task.value} model".encode())


@dataclass(slots=True)
class FakeTaskSettings:
    """How the fake behaves; change it while it runs."""

    slots: int = 64
    seconds_per_step: float = 0.0
    fail_after: int | None = None
    """Raise `ModelError` after so many steps."""
    unreadable: bool = False
    """Find that images and audio do not decode."""
    change: Callable[[Step], Step] = lambda step: step
    """What is said instead of each step."""


class FakeTasks:
    """Implements `node.ports.TaskBackend`. Its models are called ``fake-embed``, ``fake-rerank`` and so on."""

    def __init__(self, settings: FakeTaskSettings | None = None, tasks: tuple[Task, ...] = tuple(Task)) -> None:
        self.settings = settings or FakeTaskSettings()
        self.heard = 0
        """Bytes of media pulled since the start."""
        self.aborted = 0
        """Jobs that ended before their last step."""
        self._active = 0
        self._infos = {fake_model(task): _info(task) for task in tasks if task is not Task.CHAT}

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        return self._infos

    @property
    def free_slots(self) -> int:
        return self.settings.slots - self._active

    def prepare(self, model: ModelId, request: TaskRequest) -> TaskInput:
        if model not in self._infos:
            raise ModelError(f"model {model} is not loaded")
        match request:
            case EmbedRequest(texts=texts):
                units = sum(_words(text) for text in texts)
            case RerankRequest(query=query, documents=documents):
                units = sum(_words(f"{query} {document}") for document in documents)
            case _:
                units = shape_of(request).units or 0
        return TaskInput(model, request, units)

    async def run(
        self, prepared: TaskInput, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        settings, count = self.settings, 0
        self._active += 1
        done = False
        try:
            async for step in self._steps(prepared.request, params, media):
                await trio.sleep(settings.seconds_per_step)
                if settings.fail_after is not None and count >= settings.fail_after:
                    raise ModelError("the fake was told to fail")
                count += 1
                done = step.finish_reason is not None
                yield settings.change(step)
        finally:
            self._active -= 1
            self.aborted += not done

    async def _steps(
        self, request: TaskRequest, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncIterator[Step]:
        match request:
            case EmbedRequest(texts=texts):
                for n, text in enumerate(texts):
                    yield _row(vector_of(text), last=n == len(texts) - 1)
            case RerankRequest(query=query, documents=documents):
                for n, document in enumerate(documents):
                    yield _row((score_of(query, document),), last=n == len(documents) - 1)
            case TranscribeRequest():
                async for step in self._transcribe(params, media):
                    yield step
            case OcrRequest():
                data = b"".join([piece async for piece in self._heard(media)])
                text = read_of(data)
                ids = tuple(map(ord, text))[: params.max_tokens]
                whole = len(ids) == len(text)
                yield Step(ids, text[: len(ids)], FinishReason.STOP if whole else FinishReason.LENGTH)
            case _:
                raise ModelError(f"no fake for {task_of(request).value}")

    async def _transcribe(self, params: Params, media: AsyncGenerator[bytes, None]) -> AsyncIterator[Step]:
        held, count = b"", 0
        async for piece in self._heard(media):
            held += piece
            while len(held) >= SECOND:
                count += 1
                if count == params.max_tokens:
                    yield _word(held[:SECOND], FinishReason.LENGTH)
                    return
                yield _word(held[:SECOND])
                held = held[SECOND:]
        if held:
            yield _word(held, FinishReason.STOP)
        else:
            yield Step((), "", FinishReason.STOP)

    async def _heard(self, media: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        async for piece in media:
            self.heard += len(piece)
            yield piece
        if self.settings.unreadable:
            raise InputInvalid("these bytes do not decode")


def vector_of(text: str) -> tuple[float, ...]:
    """The fake's vector of a text, of length 1."""
    raw = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:DIMENSIONS]]
    norm = math.sqrt(sum(x * x for x in raw))
    return tuple(struct.unpack(f"<{DIMENSIONS}f", struct.pack(f"<{DIMENSIONS}f", *(x / norm for x in raw))))


def score_of(query: str, document: str) -> float:
    """Words that both have."""
    return float(len(set(query.split()) & set(document.split())))


def words_of(audio: bytes) -> str:
    """The fake's transcript of these samples."""
    return "".join(_word(audio[n : n + SECOND]).text for n in range(0, len(audio), SECOND))


def read_of(image: bytes) -> str:
    """What the fake reads in these bytes."""
    return f"image {hashlib.sha256(image).hexdigest()[:16]}\n"


def _word(audio: bytes, reason: FinishReason | None = None) -> Step:
    token = int.from_bytes(hashlib.sha256(audio).digest()[:2])
    return Step((token,), f"w{token} ", reason)


def _row(numbers: tuple[float, ...], *, last: bool) -> Step:
    return Step((), "", FinishReason.STOP if last else None, struct.pack(f"<{len(numbers)}f", *numbers))


def _words(text: str) -> int:
    count = len(text.split())
    if count > WORDS_PER_TEXT:
        raise InputInvalid(f"a text of {count} words, at most {WORDS_PER_TEXT}")
    return count


def _info(task: Task) -> ModelInfo:
    media = task in (Task.TRANSCRIBE, Task.OCR)
    return ModelInfo(
        id=fake_model(task),
        name=f"fake-{task.value}",
        context_length=1 << 20 if media else WORDS_PER_TEXT,
        dtype="none",
        numerics_class="fake",
        tasks=(task,),
        dimensions=DIMENSIONS if task is Task.EMBED else 0,
    )
