"""Counts round trips instead of timing them: how often a client has to hear from the worker before the worker computes.

A client that says something, hears an answer and then says something that depended on it has spent one round trip. So on one
shared timeline of what the client sent, what it received and when the engine was given the prompt, the round trips of a job are
the separate runs of sends before the prompt: one for an ask that goes out at once, one more for every answer that was waited for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import trio

from node.ports import ByteStream, Network, Step
from protocol.ids import PeerId


class RoundTrips:
    """A timeline. Only what the watched task does counts: other tasks of the client may talk at the same time."""

    def __init__(self) -> None:
        self.events: list[str] = []
        """`send`, `receive` and `prompt`, in the order in which they happened."""

    @property
    def before_prompt(self) -> int:
        """Raises `ValueError` when the engine was given no prompt."""
        early = self.events[: self.events.index("prompt")]
        return sum(event == "send" and (i == 0 or early[i - 1] != "send") for i, event in enumerate(early))

    @contextmanager
    def watch(self, network: Network, backend: Any) -> Iterator[RoundTrips]:
        """Record what the calling task does on `network`, and when the worker's `backend` gets a prompt."""
        task = trio.lowlevel.current_task()
        opened, generated = network.open_stream, backend.generate

        async def open_stream(peer: PeerId, protocol: str) -> ByteStream:
            if trio.lowlevel.current_task() is not task:
                return await opened(peer, protocol)
            stats = getattr(network, "stats", None)
            before = stats.negotiation_round_trips if stats else 0
            stream = await opened(peer, protocol)
            for _ in range(stats.negotiation_round_trips - before if stats else 0):
                self.events += ["send", "receive"]
            return _Watched(stream, self.events)

        async def generate(*args: Any, **options: Any) -> AsyncGenerator[Step, None]:
            self.events.append("prompt")
            async with aclosing(generated(*args, **options)) as steps:
                async for step in steps:
                    yield step

        network.open_stream, backend.generate = open_stream, generate  # type: ignore[method-assign]
        try:
            yield self
        finally:
            network.open_stream, backend.generate = opened, generated  # type: ignore[method-assign]


class _Watched:
    """A `ByteStream` that notes what passes."""

    def __init__(self, stream: ByteStream, events: list[str]) -> None:
        self._stream = stream
        self._events = events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def send_all(self, data: bytes) -> None:
        self._events.append("send")
        await self._stream.send_all(data)

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        data = await self._stream.receive_some(max_bytes)
        if data:
            self._events.append("receive")
        return data
