"""Length-prefixed frames: 4 bytes big-endian length, then that many bytes of msgpack.

The limit is checked when the header is read, before a byte of the body is kept, so a peer can make us hold one frame of
the kind it may send and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode

CONTROL_LIMIT: Final = 1 << 20
"""Bytes: offers, asks, vouchers, receipts."""
DATA_LIMIT: Final = 4 << 20
"""Bytes: model chunks and results of batch jobs."""
_HEADER: Final = 4


def encode_frame(payload: bytes, limit: int = CONTROL_LIMIT) -> bytes:
    if not payload:
        raise LocalProtocolError("an empty frame says nothing")
    if len(payload) > limit:
        raise LocalProtocolError(f"frame of {len(payload)} bytes is over the limit of {limit}")
    return len(payload).to_bytes(_HEADER) + payload


class FrameReader:
    """Bytes in, payloads out, at any split. After an error the reader is dead: the stream has lost its framing."""

    def __init__(self, limit: int = CONTROL_LIMIT) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._wanted: int | None = None
        self._dead = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take some bytes; yield each payload that is now complete.

        Raises `RemoteProtocolError`: TOO_LARGE or MALFORMED. Payloads before the bad header are yielded first.
        """
        if self._dead:
            raise LocalProtocolError("the reader has failed; nothing more can be read from this stream")
        self._buffer += data
        while True:
            if self._wanted is None:
                if len(self._buffer) < _HEADER:
                    return
                self._wanted = int.from_bytes(self._buffer[:_HEADER])
                del self._buffer[:_HEADER]
                if self._wanted > self._limit:
                    self._fail(WireCode.TOO_LARGE, f"frame of {self._wanted} bytes, limit {self._limit}")
                if self._wanted == 0:
                    self._fail(WireCode.MALFORMED, "empty frame")
            if len(self._buffer) < self._wanted:
                return
            payload = bytes(self._buffer[: self._wanted])
            del self._buffer[: self._wanted]
            self._wanted = None
            yield payload

    def end(self) -> None:
        """The peer closed its side. Raises `RemoteProtocolError(MALFORMED)` when that cut a frame in two."""
        if self._wanted is not None or self._buffer:
            raise RemoteProtocolError(WireCode.MALFORMED, "the stream ended inside a frame")

    def _fail(self, code: WireCode, message: str) -> None:
        self._dead = True
        self._buffer.clear()
        raise RemoteProtocolError(code, message)
