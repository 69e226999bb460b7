"""Bytes of a stream <-> messages of a conversation. No decisions here: a branch on protocol state belongs in `protocol`.

`JobStream` drives one job machine. `converse` and `serve_one` are the two halves of a question with one answer. A peer that
breaks a rule gets an `Abort` with the wire code, and its stream is reset; the process and the other streams go on.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec
import trio

from node.errors import NetworkError, Timeout
from node.ports import ByteStream, Network, StreamClosed
from protocol.errors import GristmillError, RemoteProtocolError, WireCode
from protocol.frames import FrameReader, encode_frame
from protocol.ids import PeerId
from protocol.job import JobClient, JobWorker
from protocol.messages import Abort, JobConversation, decode, encode

log = logging.getLogger(__name__)
M = TypeVar("M", JobClient, JobWorker)
Answer = Callable[[PeerId, Any], Awaitable[msgspec.Struct]]


class JobStream(Generic[M]):
    """A machine on a stream. One task receives; whoever sends waits for its turn, so messages leave in the machine's order.

    `patience_s`: how long a peer that reads nothing may hold a write up; then the stream is broken.
    """

    def __init__(self, stream: ByteStream, machine: M, *, patience_s: float = 30) -> None:
        self.stream = stream
        self.machine = machine
        self._patience_s = patience_s
        self._turn = trio.Lock()
        self._ended = False

    async def send(self, message: JobConversation) -> None:
        """Raises `LocalProtocolError` (then nothing was sent) or `StreamClosed`."""
        async with self._turn:
            await self._write(self.machine.send(message))

    async def send_frame(self, frame: bytes) -> None:
        """Send what the machine has already framed (`JobWorker.agree`, `JobWorker.deliver`)."""
        async with self._turn:
            await self._write(frame)

    async def _write(self, frame: bytes) -> None:
        with trio.move_on_after(self._patience_s):
            await self.stream.send_all(frame)
            return
        raise StreamClosed(f"the peer has read nothing for {self._patience_s:g} s")

    async def receive(self) -> JobConversation:
        """The peer's next message. Raises `RemoteProtocolError`, or `StreamClosed` at the end of what it has to say."""
        while True:
            message = self.machine.next_message()
            if message is not None:
                return message
            if self._ended:
                raise StreamClosed("the peer has closed the stream")
            data = await self.stream.receive_some()
            self._ended = not data
            self.machine.receive_data(data)

    async def abort(self, code: WireCode, detail: str = "") -> None:
        """Tell the peer why, as far as it still listens, and end the stream."""
        try:
            frame = self.machine.send(Abort(code=code, detail=detail[:500]))
        except GristmillError:
            frame = b""
        await end_with(self.stream, frame)


async def end_with(stream: ByteStream, frame: bytes) -> None:
    """Last words, bounded in time, then close; reset when that fails."""
    with trio.move_on_after(2) as scope:
        scope.shield = True
        try:
            if frame:
                await stream.send_all(frame)
            await stream.aclose()
            return
        except StreamClosed:
            return
    await stream.reset()


async def converse(network: Network, peer: PeerId, protocol: str, question: msgspec.Struct, *, timeout_s: float) -> Any:
    """Ask one question, return the one answer.

    Raises `NetworkError`, `Timeout`, or `RemoteProtocolError`: the peer's fault, or its own `Abort` with its code.
    """
    with trio.move_on_after(timeout_s):
        stream = await network.open_stream(peer, protocol)
        try:
            await stream.send_all(encode_frame(encode(question)))
            reply = await _read_one(stream, protocol)
            await stream.aclose()
        except StreamClosed as error:
            raise NetworkError(f"{peer} closed the stream before it answered", hint=str(error)) from error
        finally:
            if not stream_is_done(stream):
                with trio.CancelScope(shield=True):
                    await stream.reset()
        if isinstance(reply, Abort):
            raise RemoteProtocolError(reply.code, reply.detail or "the peer gave no detail")
        return reply
    raise Timeout(f"{peer} did not answer on {protocol} within {timeout_s:g} s")


def stream_is_done(stream: ByteStream) -> bool:
    """Whether the stream was closed or reset here; a stream that cannot tell is treated as open and reset."""
    return bool(getattr(stream, "done", False))


async def serve_one(stream: ByteStream, protocol: str, answer: Answer, *, timeout_s: float) -> None:
    """Read one question, write one answer. Every failure ends this stream only."""
    with trio.move_on_after(timeout_s) as scope:
        try:
            question = await _read_one(stream, protocol)
            reply = await answer(stream.remote_peer, question)
        except RemoteProtocolError as error:
            log.info("%s on %s: %s", stream.remote_peer, protocol, error)
            reply = Abort(code=error.code, detail=error.detail[:500])
        except StreamClosed:
            return
        await end_with(stream, encode_frame(encode(reply)))
    if scope.cancelled_caught:
        await stream.reset()


async def _read_one(stream: ByteStream, protocol: str) -> Any:
    reader = FrameReader()
    while True:
        data = await stream.receive_some()
        if not data:
            reader.end()
            raise StreamClosed("closed without a message")
        for payload in reader.feed(data):
            return decode(protocol, payload)
