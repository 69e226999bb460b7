"""Typed messages on the line between a node and a process of its own: msgpack in length-prefixed frames, read strictly.

A side that reads does not trust the side that writes: a message is decoded into its type, with the type's bounds, or the line is
of no more use.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from protocol.errors import GristmillError
from protocol.frames import FrameReader, encode_frame

M = TypeVar("M")


class Unreadable(Exception):
    """Bytes that are no message of this line. Nothing more can be read from it."""


class Codec(Generic[M]):
    """One direction of a line: which messages there are, and how long one may be."""

    def __init__(self, messages: Any, limit: int) -> None:
        """`messages`: a tagged union of structs. `limit`: bytes of one message."""
        self.limit = limit
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages)

    def frame(self, message: M) -> bytes:
        """Raises `LocalProtocolError` for a message over the limit."""
        return encode_frame(self._encoder.encode(message), self.limit)

    def read(self, payload: bytes) -> M:
        """One frame's content. Raises `msgspec.DecodeError`."""
        message: M = self._decoder.decode(payload)
        return message

    def reader(self) -> Reader[M]:
        return Reader(self)


class Reader(Generic[M]):
    """Bytes in, messages out, at any split."""

    def __init__(self, codec: Codec[M]) -> None:
        self._codec = codec
        self._frames = FrameReader(codec.limit)

    def feed(self, data: bytes) -> list[M]:
        """The messages that are complete now. Raises `Unreadable`."""
        try:
            return [self._codec.read(payload) for payload in self._frames.feed(data)]
        except (msgspec.DecodeError, GristmillError) as error:
            raise Unreadable(str(error)[:300]) from None
