"""What can be asked for besides a chat, and in which units it is counted and paid.

One table, `UNITS`, says for each task what a unit of input and of output is. Both sides derive everything else from the request
by the functions here, so a price means the same on both: a worker cannot count more audio than there are bytes, nor more of a
picture than its header says.

Media that do not fit into the ask, or that are not there yet, follow it piece by piece (`protocol.messages.Input`). The ask
declares how much may come, because that much money is set aside for it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Final, Literal

import msgspec

from protocol.errors import InvalidValue

TEXT_LIMIT: Final = 512 * 1024
"""Characters in one request, all messages or texts together (a frame is 1 MiB)."""
TEXTS_LIMIT: Final = 1024
"""Texts in one request to embed, documents in one to rerank."""
PIECE_BYTES: Final = 512 * 1024
"""Bytes of media that may come with the ask."""
INPUT_BYTES: Final = 64 * 1024
"""Bytes of media in one `Input`."""
INPUT_WINDOW: Final = 256 * 1024
"""Bytes of media that a client may have sent and the worker not yet taken: what one stream can fill of its memory."""
AUDIO_LIMIT: Final = 4 * 3600 * 32_000
"""Bytes of audio in one job: four hours."""
IMAGE_LIMIT: Final = 8 << 20
"""Bytes of one encoded image."""
SIDE_LIMIT: Final = 8192
PIXEL_LIMIT: Final = 1 << 24
"""Pixels of an image at most, and on one side: a small file must not unpack into all of the worker's memory."""
SAMPLE_RATE: Final = 16_000
FRAME_BYTES: Final = SAMPLE_RATE // 100 * 2
"""10 ms of audio."""
TILE: Final = 256
"""Pixels on a tile's side."""
WIDTH_LIMIT: Final = 8192
"""Numbers in one row of output."""


class Task(StrEnum):
    """What a model does for its clients."""

    CHAT = "chat"
    """Go on with a conversation."""
    EMBED = "embed"
    """A vector for each text."""
    RERANK = "rerank"
    """A score for each document, by how well it answers the query."""
    TRANSCRIBE = "transcribe"
    """Speech to text."""
    OCR = "ocr"
    """The text in a picture."""


@dataclass(frozen=True, slots=True)
class Units:
    """In what a task is counted; prices are per 1,000,000 of each. What is begun counts."""

    input: str
    output: str
    priced_as_tokens: bool
    """Whether a limit on the price of tokens means something for its input."""
    context: str
    """What a model's `context_length` bounds."""
    streamed: bool = False
    """Whether input may be billed as it comes."""


UNITS: Final = MappingProxyType(
    {
        Task.CHAT: Units("prompt token", "generated token", True, "tokens of prompt and answer together"),
        Task.EMBED: Units("token", "vector", True, "tokens of one text"),
        Task.RERANK: Units("token", "score", True, "tokens of the query and one document together"),
        Task.TRANSCRIBE: Units("10 ms of audio", "generated token", False, "units of audio in one job", True),
        Task.OCR: Units("tile of 256 x 256 pixels", "recognised character", False, "tiles of one image"),
    }
)
"""What is billed, by task."""


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value inside messages."""


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="task"):
    """What is asked for; subclasses name their task."""


_Meta = msgspec.Meta
_Text = Annotated[str, _Meta(max_length=TEXT_LIMIT)]


class ChatMessage(_Value, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: _Text


class ChatRequest(_Request, frozen=True, tag="chat"):
    """Go on with this conversation."""

    messages: Annotated[tuple[ChatMessage, ...], _Meta(min_length=1, max_length=1024)]


class EmbedRequest(_Request, frozen=True, tag="embed"):
    """A vector for each of these texts, in their order."""

    texts: Annotated[tuple[_Text, ...], _Meta(min_length=1, max_length=TEXTS_LIMIT)]


class RerankRequest(_Request, frozen=True, tag="rerank"):
    """A score for each of these documents, in their order: the higher, the better it answers the query."""

    query: _Text
    documents: Annotated[tuple[_Text, ...], _Meta(min_length=1, max_length=TEXTS_LIMIT)]


class Audio(_Value, frozen=True):
    """Sound, as far as it comes with the ask."""

    data: Annotated[bytes, _Meta(max_length=PIECE_BYTES)]
    size: Annotated[int, _Meta(ge=0, le=AUDIO_LIMIT)]
    """Bytes in all, at most. More than `data` has: the rest follows in `Input` messages."""
    type: Literal["audio/pcm"] = "audio/pcm"
    """Samples of 16 bits, signed, little-endian, one channel, 16,000 a second."""


class Image(_Value, frozen=True):
    """A picture, as far as it comes with the ask; its header is in there."""

    data: Annotated[bytes, _Meta(min_length=1, max_length=PIECE_BYTES)]
    size: Annotated[int, _Meta(ge=1, le=IMAGE_LIMIT)]
    """As in `Audio`."""
    type: Literal["image/png", "image/jpeg"]


class TranscribeRequest(_Request, frozen=True, tag="transcribe"):
    """What is said in this audio."""

    audio: Audio


class OcrRequest(_Request, frozen=True, tag="ocr"):
    """What is written in this image."""

    image: Image


TaskRequest = ChatRequest | EmbedRequest | RerankRequest | TranscribeRequest | OcrRequest


def media_of(request: TaskRequest) -> bytes:
    """Audio or image bytes, as far as they came with the ask."""
    match request:
        case TranscribeRequest(audio=audio):
            return audio.data
        case OcrRequest(image=image):
            return image.data
    return b""


def task_of(request: TaskRequest) -> Task:
    """Of any request: its tag on the wire."""
    return Task(str(request.__struct_config__.tag))


_DOT: Final = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000200000002001000000005b0147590000000f4944415478da63f80f040c8397"
    "0000dae97f8126f2fa630000000049454e44ae426082"
)
"""A white PNG of 32 x 32 pixels."""


def sample_request(task: Task) -> TaskRequest:
    """A small request that every model of the task must be able to serve: for self-tests and for asking what a job would cost."""
    match task:
        case Task.CHAT:
            return ChatRequest((ChatMessage("user", "Say hello."),))
        case Task.EMBED:
            return EmbedRequest(("Say hello.", "Hello!"))
        case Task.RERANK:
            return RerankRequest("Who says hello?", ("Nobody.", "Ann says hello."))
        case Task.TRANSCRIBE:
            second = bytes(2 * SAMPLE_RATE)
            return TranscribeRequest(Audio(second, len(second)))
        case Task.OCR:
            return OcrRequest(Image(_DOT, len(_DOT), "image/png"))


@dataclass(frozen=True, slots=True)
class Shape:
    """What both sides know of a request before anything is computed."""

    task: Task = Task.CHAT
    units: int | None = None
    """Input units of the media that came with the ask; None where only a tokenizer can tell."""
    most_units: int | None = None
    """Input units of all that may come."""
    rows: int = 0
    """Rows of numbers that a complete answer has; 0: the answer is text."""
    row_bytes: int = 0
    given: int = 0
    """Bytes of media that came with the ask."""
    size: int = 0
    """Bytes of media in all, at most."""

    @property
    def streamed(self) -> bool:
        """Whether media follow the ask."""
        return self.size > self.given

    def units_with(self, taken: int) -> int:
        """Input units once `taken` more bytes have come. Only for tasks that have `units`."""
        return audio_units(self.given + taken) if self.task is Task.TRANSCRIBE else self.units or 0


CHAT_SHAPE: Final = Shape()
"""Text in, text out, counted by a tokenizer."""


def shape_of(request: TaskRequest, dimensions: int = 0) -> Shape:
    """`dimensions`: numbers in one vector of the model. Raises `InvalidValue` for what its type does not rule out."""
    match request:
        case EmbedRequest():
            _bounded(request.texts)
            if not 1 <= dimensions <= WIDTH_LIMIT:
                raise InvalidValue(f"a vector of {dimensions} numbers")
            return Shape(Task.EMBED, rows=len(request.texts), row_bytes=4 * dimensions)
        case RerankRequest():
            _bounded((request.query, *request.documents))
            return Shape(Task.RERANK, rows=len(request.documents), row_bytes=4)
        case TranscribeRequest(audio=audio):
            if len(audio.data) % 2 or audio.size % 2:
                raise InvalidValue("audio ends inside a sample")
            _whole(len(audio.data), audio.size)
            most = audio_units(audio.size)
            return Shape(Task.TRANSCRIBE, audio_units(len(audio.data)), most, given=len(audio.data), size=audio.size)
        case OcrRequest(image=image):
            _whole(len(image.data), image.size)
            units = image_units(*image_size(image))
            return Shape(Task.OCR, units, units, given=len(image.data), size=image.size)
        case ChatRequest():
            return CHAT_SHAPE


def _bounded(texts: tuple[str, ...]) -> None:
    if sum(len(text) for text in texts) > TEXT_LIMIT:
        raise InvalidValue(f"more than {TEXT_LIMIT} characters in one request")


def _whole(given: int, size: int) -> None:
    if size < given or not size:
        raise InvalidValue(f"{given} bytes came with the ask, {size} are declared")


def audio_units(count: int) -> int:
    """Of so many bytes of audio: 10 ms each, the last one begun."""
    return -(-count // FRAME_BYTES)


def image_units(width: int, height: int) -> int:
    """Tiles that it takes to cover an image."""
    return -(-width // TILE) * -(-height // TILE)


def image_size(image: Image) -> tuple[int, int]:
    """Width and height by the header of a PNG or JPEG; nothing is decoded. Raises `InvalidValue`."""
    width, height = _png(image.data) if image.type == "image/png" else _jpeg(image.data)
    if not (0 < width <= SIDE_LIMIT and 0 < height <= SIDE_LIMIT and width * height <= PIXEL_LIMIT):
        raise InvalidValue(
            f"an image of {width} x {height} pixels; at most {SIDE_LIMIT} a side and {PIXEL_LIMIT} in all"
        )
    return width, height


def _png(data: bytes) -> tuple[int, int]:
    """The IHDR chunk comes first (PNG specification, 11.2.2)."""
    if len(data) < 24 or data[:16] != b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR":
        raise InvalidValue("the bytes are no PNG image")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


_SKIPPED: Final = frozenset({0xC4, 0xCC, *range(0xDB, 0xDF), *range(0xE0, 0xF0), 0xFE})
"""JPEG segments that may stand before the frame header: tables, application data, comments."""


def _jpeg(data: bytes) -> tuple[int, int]:
    """The frame header, SOF0 to SOF2, is looked for from segment to segment (ITU-T T.81, B.2.2)."""
    if data[:2] != b"\xff\xd8":
        raise InvalidValue("the bytes are no JPEG image")
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if kind == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= kind <= 0xC2:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        elif kind not in _SKIPPED or length < 2:
            break
        else:
            at += 2 + length
    raise InvalidValue("the JPEG image has no header that says its size, not in the bytes that come with the ask")


def finite(data: bytes) -> bool:
    """Whether float32 little-endian numbers are all numbers. A sum of doubles tells it: float32 cannot make one overflow."""
    return math.isfinite(sum(struct.unpack(f"<{len(data) // 4}f", data)))
