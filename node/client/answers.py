"""Several answers to one request: as many jobs side by side, paid as one sum.

Rules
- Each answer is a job of its own with a receipt of its own, and each pays for the prompt; what a worker saves by its prefix
  cache is time. They differ in their seeds by `protocol.sampling.seed_of`, so at temperature 0 they are all the same.
- Room for all of them is on one channel before the first is asked: where there is too little money for all, nothing is owed.
  All are paid in that channel's token, whoever serves them, so there is one sum.
- What befalls one answer is that answer's, the others go on; what it delivered is paid as of any chat.
- The first is asked alone, the others once something of it has come: by then a worker that caches prefixes has the prompt.
- No more are under way than the worker has places for by its offer; one that finds no place waits for another of ours to end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from node.client.chat import ChatStream
from node.client.values import ChatChunk, Usage
from node.errors import NodeError, NoWorker, Refused
from node.network.discovery import fetch_offer
from node.ports import StreamClosed
from protocol.errors import RefusalReason, RemoteProtocolError
from protocol.offers import Asset, VerifiedOffer
from protocol.selection import Candidate, Exclusion

if TYPE_CHECKING:
    from node.client.client import Client
    from protocol.channel import ChannelState

log = logging.getLogger(__name__)
_PASSING = frozenset({Exclusion.BUSY.value, Exclusion.RECENT_FAILURE.value})
"""Why a worker is not asked now, and is again once one of ours has ended there: to have no place counts as a failure."""


@dataclass(eq=False, slots=True)
class Answer:
    """One of them, and what became of it."""

    index: int
    """From 0."""
    stream: ChatStream
    error: NodeError | None = None
    """Why it is not whole. What was delivered of it has come all the same."""


class Answers:
    """An async context manager, and an iterator over (answer, chunk) as the chunks come. Made by `Client.answers`."""

    def __init__(
        self,
        client: Client,
        model: str,
        select: Callable[[], list[Candidate]],
        stream: Callable[[int, Callable[[], list[Candidate]]], ChatStream],
        n: int,
    ) -> None:
        """`select`: workers for one of them. `stream`: the chat of an answer by its index, choosing by the function given."""
        self._client = client
        self._model = model
        self._select = select
        self.answers = tuple(Answer(index, stream(index, self._choose)) for index in range(n))
        self.opened: tuple[ChannelState, bytes] | None = None
        """The channel with room for all, and the hash of the worker's transaction; as of `Client.open_channel`."""
        self._worker: VerifiedOffer | None = None
        self._send, self._receive = trio.open_memory_channel[tuple[Answer, ChatChunk]](0)
        self._places = trio.Semaphore(1)
        self._first_began = trio.Event()
        self._running = 0
        self._one_ended = trio.Event()
        self._scope = trio.CancelScope()
        self._settled = trio.Event()

    @property
    def cost(self) -> int:
        """Of all together so far, in the smallest unit of the channel's token."""
        return sum(answer.stream.cost for answer in self.answers)

    @property
    def usage(self) -> Usage:
        """Of all together so far."""
        used = [answer.stream.usage for answer in self.answers]
        return Usage(sum(one.input_tokens for one in used), sum(one.output_tokens for one in used))

    @property
    def errors(self) -> list[tuple[int, NodeError]]:
        """Index and reason of those that failed."""
        return [(answer.index, answer.error) for answer in self.answers if answer.error is not None]

    async def __aenter__(self) -> Answers:
        """Makes room for all. Raises as `Client.open_channel`."""
        self.opened = await self._client.open_one(self._model, self._select, jobs=len(self.answers))
        receiver = self.opened[0].config.receiver
        self._worker = next((one for one in self._client.offers.current() if one.worker == receiver), None)
        free = self._worker.document.free_slots if self._worker else 1
        self._places = trio.Semaphore(max(1, min(len(self.answers), free)))
        self._client.spawn(self._run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaving early cancels what is under way; what was delivered is paid."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._settled.wait()

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> tuple[Answer, ChatChunk]:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    # ------------------------------------------------------------------------------------------------------ running

    def _choose(self) -> list[Candidate]:
        """Who is paid in the token of the channel: else there would be no one sum. Raises `NoWorker`, `InsufficientFunds`."""
        state = self.opened[0] if self.opened else None
        asset = None if state is None else Asset.of(state.home, state.config.token)
        found = self._select()
        same = [one for one in found if asset in (None, one.payment.asset)]
        if not same:
            reasons = {str(one.offer.peer_id): (Exclusion.TOKEN_NOT_HELD.value,) for one in found}
            raise NoWorker("nobody else is paid in the token that the other answers are paid in", reasons)
        return same

    async def _run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for answer in self.answers:
                        nursery.start_soon(self._one, answer)
        finally:
            self._settled.set()
            self._send.close()

    async def _one(self, answer: Answer) -> None:
        if answer.index:
            await self._first_began.wait()
        async with self._places:
            while await self._try(answer):
                self._first_began.set()
                if not await self._place_may_be_free():
                    break
        self._first_began.set()

    async def _try(self, answer: Answer) -> bool:
        """Ask, and read to the end. True when all that was wrong is that there was no place for it."""
        self._running += 1
        answer.error = None
        try:
            async with answer.stream as stream:
                async for chunk in stream:
                    self._first_began.set()
                    await self._send.send((answer, chunk))
            return False
        except NodeError as error:
            answer.error = error
            return _busy(error)
        finally:
            self._running -= 1
            self._one_ended.set()
            self._one_ended = trio.Event()

    async def _place_may_be_free(self) -> bool:
        """Wait for one of ours to end, then ask the worker how many places it has. False when none of ours is under way: then
        it is others that keep it busy."""
        if not self._running:
            return False
        await self._one_ended.wait()
        if self._worker is not None:
            try:
                await fetch_offer(self._client.network, self._client.offers, self._worker.peer_id)
            except (NodeError, RemoteProtocolError, StreamClosed) as error:
                log.info("%s does not say how many places it has: %s", self._worker.peer_id, error)
        return True


def _busy(error: NodeError) -> bool:
    if isinstance(error, Refused):
        return error.reason is RefusalReason.BUSY
    return isinstance(error, NoWorker) and any(_PASSING.issuperset(why) for why in error.reasons.values())
