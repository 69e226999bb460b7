"""Speech to text while the sound still comes: voice activity cuts it into segments, and each finished one is transcribed.

Sound is pulled only when what came before is done, so a job holds one window of it and no more. Text and tokens follow from the
sound alone, never from the pieces in which it came. A token is given as soon as it is decoded.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from node.errors import InputInvalid
from node.models.tokenizer import Tokenizer
from node.ports import Step
from node.runtime.engine import log_mel
from node.runtime.engine.models.silero import SileroVad
from node.runtime.engine.models.whisper import Whisper
from node.runtime.engine.speech import Segmenter
from node.runtime.tasks.runner import Lane, Memory
from protocol.messages import FinishReason, Params
from protocol.tasks import AUDIO_LIMIT, SAMPLE_RATE, Task, audio_units

VAD: Final = "vad.safetensors"
"""Voice activity weights in a model folder."""
_PULL: Final = SAMPLE_RATE
"""Bytes of sound, half a second, that are listened to in one turn."""


class TranscribeRunner:
    """A Whisper model with its voice activity weights."""

    def __init__(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> None:
        """Raises `ModelError`, or the engine's `UnsupportedModel`."""
        self._model: Final = Whisper.load(folder, device, dtype)
        self._vad: Final = SileroVad.load(folder / VAD)
        self._tokenizer: Final = Tokenizer(folder)
        self.tasks: tuple[Task, ...] = (Task.TRANSCRIBE,)
        self.context_length = audio_units(AUDIO_LIMIT)
        self.dimensions = 0
        weights = self._model.weight_bytes + self._vad.weight_bytes
        config = self._model.config
        caches = 2 * config.decoder_layers * (config.frames + config.positions) * config.width * dtype.itemsize
        self.memory = Memory(weights, config.working_bytes(dtype.itemsize), caches + 4 * 4 * log_mel.WINDOW)
        self._lane: Final = Lane()

    async def run(
        self, content: object, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        left = params.max_tokens
        async with aclosing(self._segments(media)) as segments:
            async for segment in segments:
                detokenizer = self._tokenizer.detokenizer()
                async with aclosing(self._lane.each(self._model.transcribe(segment))) as tokens:
                    async for token in tokens:
                        left -= 1
                        yield Step((token,), detokenizer.push((token,)), None if left else FinishReason.LENGTH)
                        if not left:
                            return
                if rest := detokenizer.finish():
                    yield Step((), rest)
        yield Step((), "", FinishReason.STOP)

    async def _segments(self, media: AsyncGenerator[bytes, None]) -> AsyncGenerator[Tensor, None]:
        segmenter = Segmenter(self._vad.listener())
        waiting = bytearray()
        async for piece in media:
            waiting += piece
            while len(waiting) >= _PULL:
                sound = bytes(waiting[:_PULL])
                del waiting[:_PULL]
                async with aclosing(self._lane.each(_heard(segmenter, sound))) as found:
                    async for segment in found:
                        yield segment
        if len(waiting) % 2:
            raise InputInvalid("the sound ends inside a sample")
        async with aclosing(self._lane.each(_heard(segmenter, bytes(waiting), last=True))) as found:
            async for segment in found:
                yield segment

    def probe(self) -> bytes:
        """A rising tone: no speech, but every layer is computed."""
        time = torch.arange(SAMPLE_RATE, dtype=torch.float64) / SAMPLE_RATE
        sound = (0.1 * torch.sin(2000.0 * time * (1.0 + time))).float()
        heard = self._vad.listener()(sound[:512])
        tokens = list(self._model.transcribe(sound, max_tokens=4))
        encoded = self._model.encode(sound)[:4].float().cpu().contiguous().numpy().astype("<f4").tobytes()
        return np.array([heard], "<f4").tobytes() + np.array(tokens, "<i8").tobytes() + encoded


def _heard(segmenter: Segmenter, sound: bytes, last: bool = False) -> Iterator[Tensor]:
    samples = np.frombuffer(sound, "<i2").astype(np.float32) / 32768.0
    yield from segmenter.push(torch.from_numpy(samples))
    if last:
        yield from segmenter.finish()
