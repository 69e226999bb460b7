"""Tasks beyond chat, as callers see them: vectors, rankings, transcripts and the text of pictures.

Every one is a `ChatStream` below, so what holds for a chat holds here: journal first, vouchers as it goes, a receipt that was
recomputed. What a caller gets wrong is a `ConfigError` before anything is asked.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import wave
from array import array
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, overload

from node.client.chat import ChatStream
from node.client.feed import once
from node.errors import ConfigError
from protocol.errors import InvalidValue
from protocol.messages import TOKENS_LIMIT, checked
from protocol.selection import Policy
from protocol.tasks import (
    AUDIO_LIMIT,
    PIECE_BYTES,
    SAMPLE_RATE,
    Audio,
    EmbedRequest,
    Image,
    OcrRequest,
    RerankRequest,
    TaskRequest,
    TranscribeRequest,
    shape_of,
)

if TYPE_CHECKING:
    from node.client.client import Client

LIVE_SECONDS: Final = 600.0
"""How much of a live source is transcribed when nobody says."""
TOKENS_PER_SECOND: Final = 8
"""Twice what a fast speaker says: what is set aside for a transcript by default."""
TOKENS_PER_TILE: Final = 256
"""As much small print as fits on 256 x 256 pixels and can be read."""
_LEAST_TOKENS: Final = 64
_SECOND: Final = 2 * SAMPLE_RATE


class Vectors(Sequence["array[float]"]):
    """One row of float32 for each text, in their order."""

    def __init__(self, stream: ChatStream, data: bytes, rows: int) -> None:
        self.stream = stream
        """Ended: `stream.receipt`, `stream.cost`, `stream.usage`, ..."""
        self.dimensions = len(data) // 4 // rows
        self._numbers = _floats(data)

    @overload
    def __getitem__(self, index: int) -> array[float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[array[float]]: ...
    def __getitem__(self, index: int | slice) -> array[float] | list[array[float]]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self.dimensions
        return self._numbers[start : start + self.dimensions]

    def __len__(self) -> int:
        return len(self._numbers) // self.dimensions


@dataclass(frozen=True, slots=True)
class Scored:
    index: int
    """Place of the document in the request."""
    score: float


class Ranking(tuple[Scored, ...]):
    """Documents, best first; `stream` as in `Vectors`. Equal scores stay in the order of the request."""

    stream: ChatStream

    @classmethod
    def of(cls, stream: ChatStream, data: bytes) -> Ranking:
        scores = [Scored(n, score) for n, score in enumerate(_floats(data))]
        made = cls(sorted(scores, key=lambda one: -one.score))
        made.stream = stream
        return made


def _floats(data: bytes) -> array[float]:
    numbers = array("f", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def sound(request: TaskRequest) -> TaskRequest:
    """The request, proved to be one. Raises `ConfigError`."""
    try:
        proved = checked(request)
        shape_of(proved, 1)
    except InvalidValue as error:
        raise ConfigError(f"this cannot be asked: {error}") from None
    return proved


async def embed(client: Client, model: str, texts: Sequence[str], *, policy: Policy | None = None) -> Vectors:
    stream, data = await _numbers(client, model, EmbedRequest(tuple(texts)), policy)
    return Vectors(stream, data, len(texts))


async def rerank(
    client: Client, model: str, query: str, documents: Sequence[str], *, policy: Policy | None = None
) -> Ranking:
    return Ranking.of(*await _numbers(client, model, RerankRequest(query, tuple(documents)), policy))


async def _numbers(client: Client, model: str, request: TaskRequest, policy: Policy | None) -> tuple[ChatStream, bytes]:
    stream = client.run(model, request, policy=policy)
    async with stream:
        data = b"".join([chunk.data async for chunk in stream])
    return stream, data


def transcribe(
    client: Client,
    model: str,
    audio: bytes | AsyncIterable[bytes],
    *,
    max_seconds: float | None = None,
    policy: Policy | None = None,
    max_tokens: int | None = None,
) -> ChatStream:
    if isinstance(audio, bytes | bytearray | memoryview):
        data = samples(bytes(audio))
        given, rest = data[:PIECE_BYTES], data[PIECE_BYTES:]
        request, media = Audio(given, len(data)), once(rest) if rest else None
    else:
        size = math.floor((LIVE_SECONDS if max_seconds is None else max_seconds) * SAMPLE_RATE) * 2
        request, media = Audio(b"", size), audio
    if not 0 < request.size <= AUDIO_LIMIT:
        raise ConfigError(
            f"{request.size / _SECOND:g} s of audio cannot be asked for",
            hint=f"up to {AUDIO_LIMIT // _SECOND} s in one job",
        )
    seconds = request.size / _SECOND
    return client.run(
        model,
        TranscribeRequest(request),
        media,
        policy=policy,
        seconds=seconds,
        max_tokens=max_tokens or _tokens(client, model, TOKENS_PER_SECOND * math.ceil(seconds)),
    )


def ocr(
    client: Client, model: str, image: bytes, *, policy: Policy | None = None, max_tokens: int | None = None
) -> ChatStream:
    given, rest = image[:PIECE_BYTES], image[PIECE_BYTES:]
    kind = "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
    request = sound(OcrRequest(Image(given, len(image), kind)))
    tiles = shape_of(request).units or 0
    return client.run(
        model,
        request,
        once(rest) if rest else None,
        policy=policy,
        max_tokens=max_tokens or _tokens(client, model, TOKENS_PER_TILE * tiles),
    )


def samples(audio: bytes) -> bytes:
    """The samples of a WAV file, or raw samples as they are. Raises `ConfigError` for a file of any other format: its bytes would
    be paid for as noise."""
    if not (audio.startswith(b"RIFF") and audio[8:12] == b"WAVE"):
        for at, mark, name in _CONTAINERS:
            if audio[at : at + len(mark)] == mark:
                raise ConfigError(f"this is a file of the format {name}, not samples and not WAV", hint=_CONVERT)
        return audio
    try:
        with wave.open(io.BytesIO(audio)) as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError, ValueError, ZeroDivisionError, OverflowError, struct.error) as error:
        raise ConfigError(f"the WAV file cannot be read: {error}", hint=_CONVERT) from None
    if form != (1, 2, SAMPLE_RATE):
        channels, width, rate = form
        raise ConfigError(
            f"the WAV file has {channels} channel(s) of {8 * width} bits at {rate} Hz; it takes 1 of 16 bits at {SAMPLE_RATE} Hz",
            hint=_CONVERT,
        )
    return data[: len(data) // 2 * 2]


_CONTAINERS: Final = (
    (0, b"fLaC", "FLAC"),
    (0, b"OggS", "Ogg"),
    (0, b"ID3", "MP3"),
    (4, b"ftyp", "MP4"),
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM"),
    (0, b"FORM", "AIFF"),
    (0, b"caff", "CAF"),
    (0, b"#!AMR", "AMR"),
    (0, b".snd", "AU"),
    (0, b"RF64", "RF64"),
    (0, b"RIFX", "RIFX"),
    (0, b"RIFF", "RIFF other than WAVE"),
)
"""Where the marks of other formats stand, as far as they are too long to be samples by chance. MP3 and AAC without a tag have
none: they are noise to us."""
_CONVERT: Final = "ffmpeg -i FILE -ar 16000 -ac 1 -c:a pcm_s16le OUT.wav"


def _tokens(client: Client, model: str, wanted: int) -> int:
    """What to set aside for text, within what is sold of the model in one job."""
    sold = client.choosing.known(model)
    return min(_LEAST_TOKENS + wanted, TOKENS_LIMIT, sold.max_tokens if sold else TOKENS_LIMIT)
