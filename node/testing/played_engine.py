"""Engines that are played in the node's own loop, on real sockets, for tests by a mock clock."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from node.runtime import wire

READY: Final = wire.Ready(100_000, 97, "0" * 32, (96,), 100_000, 100_000, step_tokens=512)


class Actor:
    """Answers pings as an honest engine does, and plays a part beside. One part for each life; the last one again and again. Part
    of a life is what it does with a sequence; a step that is under way holds up every answer, as in an engine."""

    mode = "process"

    def __init__(self, *parts: Callable[[Actor, wire.Submit], Awaitable[None]]) -> None:
        self.parts = parts
        self.lives = 0
        self.submits = 0
        self.read = trio.Event()
        """A reader has taken something."""
        self._stream: trio.SocketStream | None = None
        self._lock = trio.StrictFIFOLock()

    async def say(self, message: wire.ToNode) -> None:
        async with self._lock:
            if self._stream is not None:
                await self._stream.send_all(wire.TO_NODE.frame(message))

    async def step(self, *outputs: wire.Output, prompt_tokens: int = 0) -> None:
        await self.say(wire.Stepped(outputs, 1000, self.submits, 0.1, wire.Stats(1, prompt_tokens=prompt_tokens)))

    async def long_step(self, seconds: float, *outputs: wire.Output, tokens: int = 0) -> None:
        """One that takes so long, and computes so many tokens; nothing is said meanwhile."""
        async with self._lock:
            await trio.sleep(seconds)
            said = wire.Stepped(outputs, 1000, self.submits, seconds, wire.Stats(1, step_tokens=tokens))
            if self._stream is not None:
                await self._stream.send_all(wire.TO_NODE.frame(said))

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Any]:
        part = self.parts[min(self.lives, len(self.parts) - 1)]
        self.lives, self.submits = self.lives + 1, 0
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))

        async def act(nursery: trio.Nursery) -> None:
            stream, reader = self._stream, wire.TO_ENGINE.reader()
            if stream is None:
                return
            try:
                async for data in stream:
                    for message in reader.feed(bytes(data)):
                        match message:
                            case wire.Load():
                                await self.say(READY)
                            case wire.Ping():
                                await self.say(wire.Pong(message.number))
                            case wire.Submit():
                                self.submits += 1
                                nursery.start_soon(part, self, message)
                            case wire.Consumed():
                                self.read.set()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

        class Nobody:
            pid = None

            def kill(self) -> None: ...

            async def epitaph(self) -> str:
                return "an actor"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(act, nursery)
            yield Nobody()
            nursery.cancel_scope.cancel()
        await self._stream.aclose()
