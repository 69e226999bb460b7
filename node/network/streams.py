"""From a Yamux stream to a `ByteStream`: protocol negotiation and one exception.

multistream-select costs two round trips before the first byte as py-libp2p does it. Here the opener writes greeting, protocol
and its first bytes together. When it knows that the peer speaks the protocol (identify said so, or an earlier stream proved it)
it does not wait at all: the two confirmations are checked in front of the first bytes that it reads, so an ask and its first
answer are one round trip. Otherwise it waits for the confirmations once: one round trip more, and a clear error.
(github.com/multiformats/multistream-select; go-libp2p calls the first form lazy negotiation.)
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Final

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from node.network.yamux import MuxStream
from node.ports import StreamClosed
from protocol.ids import PeerId

_GREETING: Final = "/multistream/1.0.0"
_REFUSAL: Final = "na"
_LONGEST_LINE: Final = 1024
_MOST_PROPOSALS: Final = 8


class NegotiationFailed(Exception):
    """The two sides did not agree on a protocol."""


class HostStream:
    """A `node.ports.ByteStream` on one Yamux stream."""

    __slots__ = ("_awaited", "_mux", "_on_refusal", "remote_peer")

    def __init__(
        self,
        mux: MuxStream,
        remote_peer: PeerId,
        awaited: tuple[str, ...] = (),
        on_refusal: Callable[[], None] | None = None,
    ) -> None:
        self.remote_peer = remote_peer
        self._mux = mux
        self._awaited = awaited
        """Confirmations that the far end still owes us, in order."""
        self._on_refusal = on_refusal

    async def send_all(self, data: bytes) -> None:
        try:
            await self._mux.write(data)
        except (MuxedStreamClosed, MuxedStreamReset) as error:
            raise StreamClosed(str(error)) from error
        except trio.Cancelled:
            self._mux.abort("a write was cancelled")
            raise

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if max_bytes < 1:
            raise ValueError("max_bytes is at least 1")
        if self._mux.closed_at is not None:
            raise StreamClosed("the stream was closed here")
        try:
            while self._awaited:
                await expect_line(self._mux, self._awaited[0])
                self._awaited = self._awaited[1:]
            return await self._mux.read(max_bytes)
        except MuxedStreamEOF as error:
            if self._awaited or self._mux.closed_at is not None:
                raise StreamClosed(str(error)) from error
            return b""
        except MuxedStreamReset as error:
            raise StreamClosed(str(error)) from error
        except NegotiationFailed as error:
            if self._on_refusal is not None:
                self._on_refusal()
            self._mux.abort()
            raise StreamClosed(str(error)) from error

    @property
    def done(self) -> bool:
        """Whether this side has closed or reset the stream."""
        return self._mux.done

    async def aclose(self) -> None:
        """Bytes already sent still leave; unread ones are dropped. The far end reads them and then ``b""``."""
        self._mux.leave()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self._mux.abort()
        await trio.lowlevel.checkpoint()


def encode_line(text: str) -> bytes:
    """One multistream-select message: varint length, text, newline."""
    body = text.encode() + b"\n"
    if len(body) < 0x80:
        return bytes((len(body),)) + body
    return bytes((len(body) & 0x7F | 0x80, len(body) >> 7)) + body


async def read_line(stream: MuxStream) -> str:
    """Next message. Raises `NegotiationFailed` for one that is malformed or longer than 1 KiB."""
    prefix = await stream.peek(1)
    length = prefix[0]
    if length & 0x80:
        prefix = await stream.peek(2)
        length = (length & 0x7F) | prefix[1] << 7
    if not 0 < length <= _LONGEST_LINE:  # a third varint byte makes it too long as well
        raise NegotiationFailed(f"a negotiation line of {length} bytes")
    # Taken in one piece, so that a cancelled reader can begin again.
    body = (await stream.read_exactly(len(prefix) + length))[len(prefix) :]
    if not body.endswith(b"\n"):
        raise NegotiationFailed("a negotiation line without its newline")
    return body[:-1].decode(errors="replace")


async def expect_line(stream: MuxStream, expected: str) -> None:
    line = await read_line(stream)
    if line == _REFUSAL:
        raise NegotiationFailed(f"the peer does not speak {expected}")
    if line != expected:
        raise NegotiationFailed(f"the peer answered {line[:80]!r} to {expected}")


async def propose(stream: MuxStream, protocol: str) -> tuple[str, ...]:
    """Write the opening; what the far end owes us in return."""
    await stream.write(encode_line(_GREETING) + encode_line(protocol))
    return (_GREETING, protocol)


async def agree(stream: MuxStream, spoken: Container[object]) -> str:
    """The answering side: returns the first proposed protocol that is `spoken`. Raises `NegotiationFailed`."""
    await stream.write(encode_line(_GREETING))
    line = await read_line(stream)
    if line != _GREETING:
        raise NegotiationFailed(f"expected {_GREETING}, got {line[:80]!r}")
    for _ in range(_MOST_PROPOSALS):
        line = await read_line(stream)
        if line in spoken:
            await stream.write(encode_line(line))
            return line
        await stream.write(encode_line(_REFUSAL))
    raise NegotiationFailed("no common protocol")
