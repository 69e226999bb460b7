"""Bytes of a stream <-> messages of a conversation. No decisions here: a branch on protocol state belongs in `protocol`.

`JobStream` drives one job machine. `converse` and `serve_one` are the two halves of a question with one answer. A peer that
breaks a rule gets an `Abort` with the wire code, and its stream is reset; the process and the other streams go on.

Patience is for silence only: a stream may be open for long before its first byte, and then has seconds to complete a message.
What unfinished messages hold, over all streams of the process, is bounded by `HELD`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, TypeVar

import msgspec
import trio

from node.errors import NetworkError, Timeout
from node.ports import ByteStream, Network, StreamClosed
from protocol.errors import GristmillError, RemoteProtocolError, WireCode
from protocol.frames import CONTROL_LIMIT, DATA_LIMIT, FrameReader, encode_frame
from protocol.ids import PeerId
from protocol.job import JobClient, JobWorker
from protocol.messages import BATCH_PROTOCOL, Abort, JobConversation, decode, encode

log = logging.getLogger(__name__)
M = TypeVar("M", JobClient, JobWorker)
Answer = Callable[[PeerId, Any], Awaitable[msgspec.Struct]]


FRAME_S: Final = 10.0
"""Seconds from the first byte of a question to its last."""
LIMITS: Final = {BATCH_PROTOCOL: DATA_LIMIT}
"""Largest frame of a conversation; `CONTROL_LIMIT` where none is named."""


class Held:
    """Bytes of unfinished messages in memory, over all streams of the process: what it takes no signature to fill.

    A message's first `free` bytes do not count, so that ordinary questions pass even when others have filled the rest; their
    number is bounded by the host's limits on connections and streams. One peer gets an eighth of the whole at most.
    """

    def __init__(self, limit: int = 64 << 20, free: int = 4096) -> None:
        self.limit = limit
        self.free = free
        self.total = 0
        self.by_peer: Counter[PeerId] = Counter()

    def change(self, peer: PeerId, by: int) -> None:
        """Raises `RemoteProtocolError` (TOO_LARGE), and counts nothing, when there is no room for that many more."""
        if by > 0 and (self.total + by > self.limit or self.by_peer[peer] + by > max(self.limit // 8, CONTROL_LIMIT)):
            raise RemoteProtocolError(WireCode.TOO_LARGE, "unfinished messages fill the memory set aside for them")
        self.total += by
        self.by_peer[peer] += by
        if self.by_peer[peer] <= 0:
            del self.by_peer[peer]


HELD: Final = Held()
"""The account of this process: what one peer leaves unfinished is memory that no other has, whichever node it talks to."""


class _Share:
    """One stream's part of the account. It goes when the message is complete, or else with the stream's buffer."""

    def __init__(self, peer: PeerId, account: Held) -> None:
        self._peer = peer
        self._account = account
        self._bytes = 0
        self._counted = 0

    def add(self, count: int) -> None:
        """Raises `RemoteProtocolError` (TOO_LARGE)."""
        self._bytes += count
        counted = max(self._bytes - self._account.free, 0)
        self._account.change(self._peer, counted - self._counted)
        self._counted = counted

    def clear(self) -> None:
        self._account.change(self._peer, -self._counted)
        self._bytes = self._counted = 0

    def __del__(self) -> None:
        self.clear()


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
        self._share = _Share(stream.remote_peer, HELD)

    async def first(self, *, idle_s: float, frame_s: float = FRAME_S) -> JobConversation | None:
        """The peer's first message, or None when it is too slow: `idle_s` to its first byte, `frame_s` from there to its last.

        Raises as `receive` does.
        """
        with trio.move_on_after(idle_s) as scope:
            await self._more()
            scope.deadline = trio.current_time() + frame_s
            return await self.receive()
        self._share.clear()
        return None

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
                self._share.clear()  # what follows in the buffer came with one read; the rest is asked for later
                return message
            if self._ended:
                raise StreamClosed("the peer has closed the stream")
            await self._more()

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        self._ended = not data
        self._share.add(len(data))
        self.machine.receive_data(data)

    async def abort(self, code: WireCode, detail: str = "") -> None:
        """Tell the peer why, as far as it still listens, and end the stream."""
        self._share.clear()
        try:
            frame = self.machine.send(Abort(code=code, detail=detail[:500]))
        except GristmillError:
            frame = b""
        await end_with(self.stream, frame)


async def end_with(stream: ByteStream, frame: bytes) -> None:
    """Last words, bounded in time by what they weigh (64 KiB a second is slow enough), then close; reset when that fails."""
    with trio.move_on_after(2 + len(frame) / 65_536) as scope:
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
            await stream.send_all(encode_frame(encode(question), LIMITS.get(protocol, CONTROL_LIMIT)))
            reply = await _read_one(stream, protocol, frame_s=timeout_s)
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


async def serve_one(
    stream: ByteStream, protocol: str, answer: Answer, *, timeout_s: float, frame_s: float = FRAME_S
) -> None:
    """Read one question, write one answer. Every failure ends this stream only.

    `timeout_s`: for all of it. `frame_s`: from the first byte of the question to its last.
    """
    with trio.move_on_after(timeout_s) as scope:
        try:
            question = await _read_one(stream, protocol, frame_s=frame_s)
            reply = await answer(stream.remote_peer, question)
        except RemoteProtocolError as error:
            log.info("%s on %s: %s", stream.remote_peer, protocol, error)
            reply = Abort(code=error.code, detail=error.detail[:500])
        except (StreamClosed, trio.TooSlowError):
            await stream.reset()
            return
        await end_with(stream, encode_frame(encode(reply), LIMITS.get(protocol, CONTROL_LIMIT)))
    if scope.cancelled_caught:
        await stream.reset()


async def _read_one(stream: ByteStream, protocol: str, *, frame_s: float) -> Any:
    """Raises `trio.TooSlowError` when the message takes longer than `frame_s` from its first byte on."""
    reader, share = FrameReader(LIMITS.get(protocol, CONTROL_LIMIT)), _Share(stream.remote_peer, HELD)
    data = await stream.receive_some()
    try:
        with trio.fail_after(frame_s):
            while data:
                share.add(len(data))
                for payload in reader.feed(data):
                    return decode(protocol, payload)
                data = await stream.receive_some()
    finally:
        share.clear()
    reader.end()
    raise StreamClosed("closed without a message")
