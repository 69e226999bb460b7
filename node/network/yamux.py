"""Yamux 1.0.0 for the host: many streams over one secured connection, bounded and cancel-safe.

Ours instead of py-libp2p's because of what that one does under pressure: it buffers without limit for a peer that ignores
flow control, tears a frame (and so the connection) when a writer is cancelled, polls for window every 10 ms and gives up after
5 s, and leaks a stream when opening is cancelled. The wire format is the same: github.com/hashicorp/yamux/blob/master/spec.md.

The rules:
- One task reads the connection and one writes it; nobody else touches it. Everything else is synchronous state, so a
  cancelled caller leaves no half-done work: opening, closing and resetting never wait.
- What a peer may make us hold is counted before it is kept: unread bytes per stream and per connection, streams it has open,
  bytes waiting to be sent. A stream that passes its bound is reset, a connection that breaks the protocol is closed.
- Bytes that arrived are delivered before the news that the stream or the connection ended.

A stream and its connection are one state machine, so they share this file.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final

import trio
from libp2p.abc import ConnectionType, IMuxedConn, IMuxedStream, ISecureConn
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from node.network.guards import NetworkLimits

log = logging.getLogger(__name__)

PROTOCOL: Final = "/yamux/1.0.0"

_HEADER: Final = struct.Struct("!BBHII")  # version, type, flags, stream id, length or window delta
_DATA, _WINDOW, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_INITIAL_WINDOW: Final = 256 * 1024
"""Both sides' credit on a new stream, by the specification."""
_NOISE_PLAINTEXT: Final = 65519
"""One Noise message carries so much: frames queued together leave in one message and one system call."""
_FRAME: Final = 32 * 1024
"""Largest frame that we send, so that streams take turns."""
_CONTROL_BACKLOG: Final = 1024 * 1024
"""Unsent control frames beyond the send buffer after which the peer is not reading at all."""

_LAST_WORDS: Final = 0.5
"""Seconds that a connection which can no longer be written to is still read."""


class StreamLimit(Exception):
    """We have as many streams open on this connection as we allow ourselves."""


class _Violation(Exception):
    """The peer broke the Yamux protocol; the connection cannot go on."""


class _Goodbye(Exception):
    """The peer ended the connection in good order."""


class MuxStream(IMuxedStream):
    """One stream. Reads and writes wait; everything else is immediate."""

    def __init__(self, conn: Mux, stream_id: int) -> None:
        self.muxed_conn: Mux = conn
        self.stream_id = stream_id
        self.finished_writing = False
        self.far_finished = False
        self.broken = ""
        """Why the stream ended before its time; empty while it has not."""
        self.closed_at: float | None = None
        self._buffer = bytearray()
        self._credit = _INITIAL_WINDOW
        self._window = _INITIAL_WINDOW
        self._granted = _INITIAL_WINDOW
        self._consumed = 0
        self._detached = False
        self._aborted = False
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    # --- for the side that uses the stream

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, at most `n`. Raises `MuxedStreamEOF` at the far end's close, `MuxedStreamReset` after a reset."""
        await trio.lowlevel.checkpoint()
        await self._until(1)
        return self._take(n if n is not None and n >= 0 else len(self._buffer))

    async def peek(self, n: int) -> bytes:
        """The next `n` bytes, left where they are, or the exceptions of `read`."""
        await self._until(n)
        return bytes(self._buffer[:n])

    async def read_exactly(self, n: int) -> bytes:
        """`n` bytes, or the exceptions of `read`; cancelled, nothing is lost."""
        await self._until(n)
        return self._take(n)

    async def write(self, data: bytes) -> None:
        """Queue all of `data` for sending, waiting for window and room. Raises `MuxedStreamClosed` or `MuxedStreamReset`."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            if self.broken:
                raise MuxedStreamReset(self.broken)
            if self.finished_writing:
                raise MuxedStreamClosed("the stream is closed for writing")
            if self._credit == 0:
                await self._writers.park()
            elif not await self.muxed_conn.room():
                n = min(self._credit, _FRAME, len(view))
                self._credit -= n
                self.muxed_conn.send(_DATA, 0, self.stream_id, n, view[:n])
                view = view[n:]

    async def close_write(self) -> None:
        """A half-close: reading goes on until the far end closes too."""
        self.finish()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        self.leave()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def finish(self) -> None:
        """Say that we write no more."""
        if not self.finished_writing and not self.broken:
            self.finished_writing = True
            self.muxed_conn.send(_WINDOW, _FIN, self.stream_id, 0)
            self._writers.unpark_all()
            self._forget_when_done()

    def leave(self) -> None:
        """We are done with the stream in both directions: finish, drop what is unread, and wait `linger` for the far end."""
        self.finish()
        self._drop_unread()
        if self.closed_at is None:
            self.closed_at = trio.current_time()

    def abort(self, reason: str = "the stream was reset here") -> None:
        """End both directions at once and tell the far end."""
        if not self.broken and not (self.finished_writing and self.far_finished):
            self.muxed_conn.send(_WINDOW, _RST, self.stream_id, 0)
            self.end(reason)
        self._aborted = True
        self._drop_unread()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("deadlines belong to trio's cancel scopes")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.get_remote_address()

    @property
    def done(self) -> bool:
        """Whether this side has closed or reset the stream."""
        return self.closed_at is not None or self._aborted

    async def __aenter__(self) -> MuxStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    # --- for the connection

    def end(self, reason: str) -> None:
        """The stream is no more; what arrived stays readable."""
        self.broken = self.broken or reason
        self.muxed_conn.forget(self)
        self._wake()

    def grant(self, delta: int) -> None:
        self._credit = min(self._credit + delta, 2**32)
        self._writers.unpark_all()

    def announce(self, length: int) -> bool:
        """The peer begins a frame of `length` bytes: was it granted so much, and do we still want it?"""
        self._window -= length
        return self._window >= 0 and self.closed_at is None and not self.far_finished

    def arrive(self, data: memoryview) -> None:
        self._buffer += data
        self.muxed_conn.unread += len(data)
        self._readers.unpark_all()

    def far_end_finished(self) -> None:
        self.far_finished = True
        self._readers.unpark_all()
        self._forget_when_done()

    # --- inside

    async def _until(self, n: int) -> None:
        while len(self._buffer) < n:
            if self.far_finished:
                raise MuxedStreamEOF("the far end has closed the stream")
            if self.broken:
                raise MuxedStreamReset(self.broken)
            await self._readers.park()

    def _take(self, n: int) -> bytes:
        data = bytes(self._buffer[:n])
        del self._buffer[:n]
        if not self._detached:
            self.muxed_conn.unread -= len(data)
        self._consumed += len(data)
        if self._consumed >= self._granted // 2 and not self.far_finished and not self.broken:
            # A reader that keeps up is given twice as much, up to our bound: the window covers longer and longer paths.
            wider = min(self._granted * 2, self.muxed_conn.limits.stream_receive_buffer)
            delta = self._consumed + max(wider - self._granted, 0)
            self._granted = max(wider, self._granted)
            self._consumed = 0
            self._window += delta
            self.muxed_conn.send(_WINDOW, 0, self.stream_id, delta)
        return data

    def detach(self) -> None:
        """The connection forgets the stream; unread bytes are its holder's now."""
        if not self._detached:
            self._detached = True
            self.muxed_conn.unread -= len(self._buffer)

    def _drop_unread(self) -> None:
        if not self._detached:
            self.muxed_conn.unread -= len(self._buffer)
        self._buffer.clear()

    def _forget_when_done(self) -> None:
        if self.finished_writing and self.far_finished:
            self.muxed_conn.forget(self)

    def _wake(self) -> None:
        self._readers.unpark_all()
        self._writers.unpark_all()


class Mux(IMuxedConn):
    """One connection's streams. `start` runs until the connection ends and never raises for what the peer does."""

    def __init__(
        self,
        conn: ISecureConn,
        peer_id: ID,
        limits: NetworkLimits | None = None,
        on_stream: Callable[[MuxStream], None] | None = None,
    ) -> None:
        self.secured_conn = conn
        self.peer_id = peer_id
        self.limits = limits or NetworkLimits()
        self.on_stream = on_stream
        """Takes the peer's new streams; without it they wait for `accept_stream`."""
        self.streams: dict[int, MuxStream] = {}
        self.unread = 0
        """Bytes that arrived and nobody has read, over all streams."""
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.ended = ""
        """Why the connection ended; empty while it lives."""
        self._next_id = 1 if conn.is_initiator else 2
        self._opened = 0
        self._accepted = 0
        self._accept_send, self._accept_receive = trio.open_memory_channel[MuxStream](
            self.limits.streams_per_connection
        )
        self._outbox = bytearray()
        self._outbox_filled = trio.lowlevel.ParkingLot()
        self._outbox_emptied = trio.lowlevel.ParkingLot()
        self._body: tuple[MuxStream | None, int, bool] = (None, 0, False)
        """The data frame being received: its stream (None when nobody wants it), bytes to come, and whether FIN follows."""
        self._rest = b""
        self._pong = trio.Event()
        self._scope = trio.CancelScope()

    # --- what libp2p's swarm asks

    @property
    def is_initiator(self) -> bool:
        return bool(self.secured_conn.is_initiator)

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.ended

    @property
    def is_closed(self) -> bool:
        return bool(self.ended)

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.secured_conn.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        remote = self.get_remote_address()
        if remote is None:
            return []
        host, port = remote[0], remote[1]
        return [Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT

    async def start(self) -> None:
        """Run the connection. Returns when it has ended, for whatever reason."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._read_loop)
                    nursery.start_soon(self._guard, self._write_loop)
                    nursery.start_soon(self._guard, self._keep_alive)
                    self.event_started.set()
        finally:
            self._end("the connection was closed here")
            with trio.move_on_after(1, shield=True):
                await self._close_socket()
            self.event_closed.set()
            self.event_started.set()

    async def close(self) -> None:
        """Say good-bye, give queued bytes a second to leave, and close."""
        if not self.ended:
            self.send(_GO_AWAY, 0, 0, 0)
            self._end("the connection was closed here")
        if not self.event_started.is_set():
            await self._close_socket()
            self.event_closed.set()
        with trio.move_on_after(1, shield=True):
            await self.event_closed.wait()
        self._scope.cancel()
        await trio.lowlevel.checkpoint()

    def open(self) -> MuxStream:
        """A new stream, at once. Raises `StreamLimit`, or `MuxedConnUnavailable` when the connection has ended."""
        if self.ended:
            raise MuxedConnUnavailable(self.ended)
        if self._opened >= self.limits.streams_per_connection:
            raise StreamLimit(f"{self._opened} streams are open already")
        stream = MuxStream(self, self._next_id)
        self._next_id += 2
        self._opened += 1
        self.streams[stream.stream_id] = stream
        self.send(_WINDOW, _SYN, stream.stream_id, 0)
        return stream

    async def open_stream(self) -> MuxStream:
        await trio.lowlevel.checkpoint()
        return self.open()

    async def accept_stream(self) -> MuxStream:
        try:
            return await self._accept_receive.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable(self.ended) from None

    # --- for our streams

    def send(self, kind: int, flags: int, stream_id: int, length: int, body: bytes | memoryview = b"") -> None:
        """Queue one frame; it is written whole or the connection ends."""
        if self.ended:
            return
        self._outbox += _HEADER.pack(0, kind, flags, stream_id, length)
        self._outbox += body
        self._outbox_filled.unpark_all()
        if len(self._outbox) > self.limits.connection_send_buffer + _CONTROL_BACKLOG:
            self._end("the peer does not read")
            self._scope.cancel()

    async def room(self) -> bool:
        """False at once when there is room to queue data; True after having waited for it."""
        if len(self._outbox) < self.limits.connection_send_buffer:
            return False
        await self._outbox_emptied.park()
        return True

    def forget(self, stream: MuxStream) -> None:
        if self.streams.pop(stream.stream_id, None) is not None:
            if stream.stream_id % 2 == self._next_id % 2:
                self._opened -= 1
            else:
                self._accepted -= 1
            stream.detach()

    # --- tasks

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except _Goodbye:
            self._end("the peer closed the connection")
        except _Violation as violation:
            log.info("connection to %s closed: %s", self.peer_id, violation)
            self._end(str(violation))
        except (
            Exception
        ) as error:  # the boundary to py-libp2p and the socket: whatever it raises ends this connection only
            log.debug("connection to %s ended: %r", self.peer_id, error)
            self._end(f"the connection was lost ({type(error).__name__})")
        self._scope.cancel()

    async def _read_loop(self) -> None:
        while True:
            data = await self.secured_conn.read()
            if not data:
                raise _Goodbye
            if not self.ended:  # else we are closing, and the write loop still has its last words to send
                self._receive(self._rest + data if self._rest else data)

    async def _write_loop(self) -> None:
        while True:
            if self._outbox:
                chunk = bytes(self._outbox[:_NOISE_PLAINTEXT])
                try:
                    with trio.fail_after(self.limits.write_timeout):
                        await self.secured_conn.write(chunk)
                except (IOException, RawConnError, trio.BrokenResourceError):
                    await trio.sleep(_LAST_WORDS)  # the peer is gone, but what it said before is still to be read
                    raise
                del self._outbox[: len(chunk)]
                if len(self._outbox) < self.limits.connection_send_buffer:
                    self._outbox_emptied.unpark_all()
            elif self.ended:
                return
            else:
                await self._outbox_filled.park()

    async def _keep_alive(self) -> None:
        while not self.ended:
            await trio.sleep(self.limits.keepalive)
            now = trio.current_time()
            for stream in list(self.streams.values()):
                if stream.closed_at is not None and now - stream.closed_at >= self.limits.linger:
                    stream.abort("the far end did not close in time")
            self._pong = trio.Event()
            self.send(_PING, _SYN, 0, 0)
            with trio.move_on_after(self.limits.keepalive):
                await self._pong.wait()
            if not self._pong.is_set():
                self._end("the peer no longer answers")

    # --- incoming frames

    def _receive(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            stream, left, fin = self._body
            if left:
                part = view[:left]
                view = view[left:]
                left -= len(part)
                self._body = (stream, left, fin)
                if stream is not None:
                    self._deliver(stream, part, fin and not left)
                continue
            if len(view) < _HEADER.size:
                break
            version, kind, flags, stream_id, length = _HEADER.unpack_from(view)
            view = view[_HEADER.size :]
            if version != 0:
                raise _Violation(f"Yamux version {version}")
            if kind in (_DATA, _WINDOW):
                self._on_frame(kind, flags, stream_id, length)
            elif kind == _PING:
                if flags & _SYN:
                    self.send(_PING, _ACK, 0, length)
                else:
                    self._pong.set()
            elif kind == _GO_AWAY:
                raise _Goodbye
            else:
                raise _Violation(f"unknown frame type {kind}")
        self._rest = bytes(view)

    def _on_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if flags & _SYN:
            self._on_syn(stream_id)
        stream = self.streams.get(stream_id)
        if kind == _DATA:
            if length > 2 * max(self.limits.stream_receive_buffer, _INITIAL_WINDOW):
                raise _Violation(f"a data frame of {length} bytes, more than any window")
            if stream is not None and length and not stream.announce(length):
                stream.abort("the far end sent more than it was granted, or to a closed stream")
                stream = None
            self._body = (stream, length, bool(flags & _FIN))
        elif stream is not None:
            stream.grant(length)
        if stream is not None and flags & _RST:
            stream.end("the far end reset the stream")
            self._body = (None, self._body[1], False)
        elif stream is not None and flags & _FIN and not (kind == _DATA and length):
            stream.far_end_finished()

    def _on_syn(self, stream_id: int) -> None:
        if stream_id == 0 or stream_id % 2 == self._next_id % 2 or stream_id in self.streams:
            raise _Violation(f"a new stream with the used or foreign number {stream_id}")
        if self._accepted >= self.limits.streams_per_connection:
            self.send(_WINDOW, _RST, stream_id, 0)
            return
        stream = MuxStream(self, stream_id)
        self._accepted += 1
        self.streams[stream_id] = stream
        self.send(_WINDOW, _ACK, stream_id, 0)
        if self.on_stream is not None:
            self.on_stream(stream)
            return
        try:
            self._accept_send.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            stream.abort("nobody accepts streams")

    def _deliver(self, stream: MuxStream, part: memoryview, last: bool) -> None:
        if stream.broken or stream.closed_at is not None:
            return
        stream.arrive(part)
        if last:
            stream.far_end_finished()
        if self.unread > self.limits.connection_receive_buffer:
            stream.abort("too many unread bytes on the connection")

    # --- the end

    def _end(self, reason: str) -> None:
        """Mark the end and wake everybody. Frames already queued may still leave."""
        if self.ended:
            return
        self.ended = reason
        self._accept_send.close()
        for stream in list(self.streams.values()):
            stream.end(reason)
        self._outbox_filled.unpark_all()
        self._outbox_emptied.unpark_all()

    async def _close_socket(self) -> None:
        try:
            await self.secured_conn.close()
        except Exception as error:  # the socket may be broken in any way; it is closed all the same
            log.debug("closing the connection to %s: %r", self.peer_id, error)
