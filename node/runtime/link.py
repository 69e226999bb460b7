"""The node's end of the line to one process, from its start to its death.

What is sent leaves at once as far as the line takes it; the rest follows. What is received is decoded strictly, and whatever goes
wrong is the end of the process: `ProcessLost`.
"""

from __future__ import annotations

import socket
from typing import Final, Generic, NoReturn, TypeVar

import trio

from node.codec import Codec, Unreadable

Out = TypeVar("Out")
In = TypeVar("In")
_READ: Final = 1 << 18


class ProcessLost(Exception):
    """The process is gone or was given up, and why."""


class Link(Generic[Out, In]):
    """Messages to and from a process. Run `write` beside whoever sends."""

    def __init__(self, sock: socket.socket, to_process: Codec[Out], to_node: Codec[In]) -> None:
        """`sock` stays its maker's to close."""
        sock.setblocking(False)
        self._sock = sock
        self._codec = to_process
        self._reader = to_node.reader()
        self._out = bytearray()
        self._writable = trio.Event()

    @property
    def unread(self) -> int:
        """Bytes that the line has not taken: they lie in our memory."""
        return len(self._out)

    def send(self, message: Out) -> None:
        """Raises `LocalProtocolError` for a message over the line's limit."""
        self._out += self._codec.frame(message)
        self._flush()
        if self._out:
            self._writable.set()

    async def write(self) -> NoReturn:
        """Send what `send` could not, as the line takes it."""
        while True:
            while self._out:
                await trio.lowlevel.wait_writable(self._sock)
                self._flush()
            self._writable = trio.Event()
            await self._writable.wait()

    async def receive(self) -> list[In]:
        """At least one message. Raises `ProcessLost`."""
        while True:
            try:
                data = self._sock.recv(_READ)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            except OSError as error:
                raise ProcessLost(f"its line broke: {error}") from None
            if not data:
                raise ProcessLost("its line ended")
            try:
                messages = self._reader.feed(data)
            except Unreadable as error:
                raise ProcessLost(f"it sent rubbish: {error}") from None
            await trio.lowlevel.checkpoint()
            if messages:
                return messages

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            return
        except OSError:  # who receives hears of it, and of the reason
            self._out.clear()
