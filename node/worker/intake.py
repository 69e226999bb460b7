"""Media of one part on their way from the client to the runtime: taken when they are asked for and covered, never before.

What is pulled here is billed. One task writes to the stream, the one that delivers (`node.worker.part`): a write that is
cancelled would cost the stream, so what was taken is noted here and told by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

import trio

from node.store.faults import fault_point
from protocol.errors import RemoteProtocolError, WireCode
from protocol.messages import FinishReason
from protocol.payment import unsecured
from protocol.tasks import media_of

if TYPE_CHECKING:
    from node.worker.part import ServedPart

SLOWEST: Final = 16_000
"""Bytes a second below which streamed input holds a place for nothing: audio comes at twice that."""


class Intake:
    def __init__(self, part: ServedPart) -> None:
        self._part = part
        self._waited = 0.0
        """Seconds that the runtime has waited for input in all."""
        self._news: deque[bytes] = deque()
        """Frames that say what was taken, not yet sent."""

    @property
    def exhausted(self) -> bool:
        """Whether the runtime has had all of the input."""
        part = self._part
        return not part.terms.shape.streamed or (part.opened.is_set() and part.machine.inputs.exhausted)

    async def media(self) -> AsyncGenerator[bytes, None]:
        """Audio or image, from the ask and what follows it, as the runtime asks for it."""
        given = media_of(self._part.ask.request)
        if given:
            yield given
        if self._part.terms.shape.streamed:
            await self._part.opened.wait()
        while not self.exhausted:
            data = await self._take()
            if data:
                yield data

    async def tell(self) -> None:
        """Say what was taken, before anything that is said of the stream after it."""
        while self._news:
            fault_point("send.taken")
            await self._part.link.send_frame(self._news.popleft())

    async def _take(self) -> bytes:
        """Input that is there and paid for, taken and noted. Whoever sends none, or too slowly, loses the place."""
        part, inputs, began = self._part, self._part.machine.inputs, trio.current_time()
        stall = part.server.settings.stall_ms / 1000
        patience = min(stall, stall + inputs.taken_bytes / SLOWEST - self._waited)
        while part.finish is None and (until := self._payable()) == inputs.taken:
            if await part.changed(until=began + patience) or self._payable() > inputs.taken:
                continue  # the second: it came in the very turn in which time was up
            if part.finish is None:
                unpaid = inputs.untaken > 0
                code = WireCode.UNPAID if unpaid else WireCode.BAD_INPUT
                part.fault = RemoteProtocolError(code, "no voucher came in time" if unpaid else "input came too slowly")
                part.end(FinishReason.CANCELLED)
        if part.finish is not None:
            await trio.sleep_forever()  # until the part is closed: nothing more is taken
        self._waited += trio.current_time() - began
        data, frame = part.machine.take(until)
        part.server.meter.set(part.channel_id, part.key, part.machine.spent)
        self._news.append(frame)
        part.notify()
        return data

    def _payable(self) -> int:
        """Up to which message the input that waits fits into the credit window."""
        part, inputs = self._part, self._part.machine.inputs
        state = part.server.book.channels[part.channel_id]
        others = part.server.meter.running(part.channel_id, without=part.key)
        until, size = inputs.taken, inputs.taken_bytes
        for data in inputs.waiting:
            size += len(data)
            cost = part.terms.spent(part.terms.shape.units_with(size), part.machine.output_tokens)
            if unsecured(state, others + cost) > part.terms.credit:
                break
            until += 1
        return until
