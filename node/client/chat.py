"""One chat, or any other task: choose, ask, stream, verify.

A `ChatStream` is used as ``async with client.chat(...) as stream: async for chunk in stream``. A task of its own reads the
network and pays (`node.client.part`), so that a slow reader of chunks delays nobody's money; what is buffered is bounded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterable, Callable
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from node.client.part import Part
from node.client.settings import ClientSettings
from node.client.values import ChatChunk, PartRecord, Timings, Usage
from node.errors import (
    InsufficientFunds,
    NetworkError,
    NodeError,
    NoWorker,
    Refused,
    Timeout,
    VerificationFailed,
    WorkerFault,
)
from node.network.drive import JobStream
from node.ports import ByteStream, StreamClosed
from protocol import pricing
from protocol.channel import ChannelState
from protocol.errors import LocalProtocolError, RefusalReason
from protocol.ids import ChannelId, JobId, ModelId, PeerId
from protocol.job import JobClient, Terms, ask_struct
from protocol.messages import JOB_PROTOCOL, AskMessage, Cancel, FinishReason, Params
from protocol.selection import Candidate
from protocol.tasks import Shape, Task, TaskRequest, shape_of, task_of
from protocol.typed_data import Receipt

if TYPE_CHECKING:
    from node.client.client import Client

log = logging.getLogger(__name__)

RETRY_ELSEWHERE = frozenset(
    {
        RefusalReason.BUSY,
        RefusalReason.DRAINING,
        RefusalReason.OFFER_EXPIRED,
        RefusalReason.OFFER_UNKNOWN,
        RefusalReason.CREDIT_EXHAUSTED,
        RefusalReason.VOUCHER_INSUFFICIENT,
        RefusalReason.CHAIN_STALE,
        RefusalReason.MODEL_UNKNOWN,
        RefusalReason.INTERNAL,
    }
)
"""Reasons that may not hold at another worker. The rest is about the request itself: asking again changes nothing."""

STALE_OFFER = frozenset({RefusalReason.OFFER_EXPIRED, RefusalReason.OFFER_UNKNOWN})
"""The refusal brought the current offer: the same worker is asked again under it, unless it has become dearer."""


ROOM_ATTEMPTS = 64
"""How often one chat looks for room on a channel: at each look at least one other chat has got its own."""


def _tick_tokens(candidate: Candidate, settings: ClientSettings, shape: Shape) -> int:
    """How much output to pay ahead: what the worker delivers in its `tick_ms`, and no more than its tick or ours.

    To pay a slow worker 64 tokens ahead is to lend it the price of many seconds of nothing.
    """
    document, speed = candidate.offer.document, candidate.tokens_per_second
    most = min(document.tick_tokens, settings.tick_tokens)
    if not speed or shape.task is not Task.CHAT:  # a speed in tokens says nothing of rows, nor of audio
        return most
    return min(most, max(settings.min_tick_tokens, math.ceil(speed * document.tick_ms / 1000)))


class ChatStream:
    """A paid, streamed answer. `receipt` and `parts` are there once the stream has ended."""

    def __init__(
        self,
        client: Client,
        model: str,
        request: TaskRequest,
        params: Params,
        choose: Callable[[], list[Candidate]],
        *,
        media: AsyncIterable[bytes] | None = None,
        extra_s: float = 0.0,
    ) -> None:
        """`media`: what follows the ask, for a request that declares more than it carries. `extra_s`: seconds beyond the usual
        deadline."""
        self._client = client
        self._model = model
        self._request = request
        self._media = media
        self._extra_ms = int(extra_s * 1000)
        self._params = params
        self._choose = choose
        self._send, self._receive = trio.open_memory_channel[ChatChunk](256)
        self._settled = trio.Event()
        self._error: BaseException | None = None
        self._scope = trio.CancelScope()
        self._link: JobStream[JobClient] | None = None
        self._begun = 0.0
        self.job_id = JobId(client.random32())
        self.worker: PeerId | None = None
        self.model_id: ModelId | None = None
        """Of the model that the worker has been asked for."""
        self.channel_id: ChannelId | None = None
        self.allocation_transaction = b""
        """Hash of the transaction by which the worker submitted our allocation, when this chat opened a channel."""
        self.receipt: Receipt | None = None
        self.receipt_signature = b""
        self.parts: list[PartRecord] = []
        self.usage = Usage(0, 0)
        self.cost = 0
        self.timings = Timings()
        self.finish_reason: FinishReason | None = None

    # ---------------------------------------------------------------------------------------------------- caller

    async def __aenter__(self) -> ChatStream:
        self._begun = trio.current_time()
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaving early cancels the job; the worker is paid for what it delivered, by its receipt."""
        with trio.CancelScope(shield=True):
            if not self._settled.is_set():
                await self._cancel()
                with trio.move_on_after(5):
                    await self._settled.wait()
            self._scope.cancel()
            await self._settled.wait()

    def __aiter__(self) -> ChatStream:
        return self

    async def __anext__(self) -> ChatChunk:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            await self._settled.wait()
            if self._error is not None:
                raise self._error from None
            raise StopAsyncIteration from None

    async def open_channel(self) -> tuple[ChannelState, bytes]:
        """Open the channel that this will need, before it is entered. See `Client.open_channel`."""
        return await self._client.open_one(self._model, self._choose)

    async def text(self) -> str:
        """The whole answer."""
        return "".join([chunk.text async for chunk in self])

    async def _cancel(self) -> None:
        await self._say_cancel()
        self._receive.close()

    async def _say_cancel(self) -> None:
        if self._link is not None:
            try:
                await self._link.send(Cancel())
            except (LocalProtocolError, StreamClosed):
                pass  # it is over already

    @property
    def task(self) -> Task:
        """What was asked for."""
        return task_of(self._request)

    @property
    def params(self) -> Params:
        return self._params

    @property
    def deadline_ms(self) -> int:
        """From the ask on."""
        return self._client.settings.deadline_ms + self._extra_ms

    # --------------------------------------------------------------------------------------------------- asking

    async def _start(self) -> None:
        """Ask the best candidates until one accepts. Raises `Refused`, `NoWorker`, `InsufficientFunds`, `WorkerFault`, ..."""
        last: NodeError | None = None
        given_up: set[PeerId] = set()
        for candidate in await self._client.funded(self._choose):
            if candidate.offer.peer_id in given_up:
                continue
            if len(given_up) >= self._client.settings.attempts:
                break
            try:
                await self._ask_renewed(candidate)
                return
            except (
                InsufficientFunds
            ) as error:  # nothing was asked; there may be more of what it can be paid with otherwise
                last = last or error
                continue
            except Refused as no:
                if no.reason not in RETRY_ELSEWHERE:
                    raise
                last = no
                if no.reason is RefusalReason.CHAIN_STALE:
                    continue  # its view of another chain may be fresh
            except (WorkerFault, VerificationFailed, Timeout, NetworkError) as error:
                last = error
            if not (isinstance(last, Refused) and last.reason in STALE_OFFER):
                self._client.failed(candidate.offer.peer_id)
            given_up.add(candidate.offer.peer_id)
            log.info("%s did not take the job: %s", candidate.offer.peer_id, last)
        raise last if last is not None else WorkerFault("no worker was asked")

    async def _ask_renewed(self, candidate: Candidate) -> None:
        """Ask, and once more when only the offer was out of date."""
        try:
            await self._ask(candidate)
        except Refused as no:
            if no.reason not in STALE_OFFER:
                raise
            peer, cost = candidate.offer.peer_id, candidate.cost
            asset = candidate.payment.asset
            again = next(
                (
                    c
                    for c in self._choose_again()
                    if c.offer.peer_id == peer and c.payment.asset == asset and c.cost <= cost
                ),
                None,
            )
            if again is None or again.offer.hash == candidate.offer.hash:
                raise
            await self._ask(again)

    def _choose_again(self) -> list[Candidate]:
        try:
            return self._choose()
        except (NoWorker, InsufficientFunds):
            return []

    async def _ask(self, candidate: Candidate) -> None:
        client, offer = self._client, candidate.offer
        price, params = candidate.price, self._params
        input_limit = client.choosing.input_units(candidate.model, self._request, params.max_tokens)
        shape = shape_of(self._request, candidate.model.dimensions)
        needed = pricing.cost(price, input_limit, shape.rows or params.max_tokens)
        peer = await client.reach(offer)
        stream = await client.network.open_stream(peer, JOB_PROTOCOL)
        try:
            channel = await self._room_for(candidate, needed)
            part = self._part(candidate, channel, input_limit, shape, stream)
            # Nothing waits between the look at what is free and its reservation: another chat cannot come between.
            ask = await part.journal_ask()
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise
        await part.begin(ask)

    async def _room_for(self, candidate: Candidate, needed: int) -> ChannelState:
        """A channel that has `needed` free right now. While one is opened or raised for us, others may take what is free:
        then there is more to raise, as often as there are others."""
        client, offer = self._client, candidate.offer
        for _ in range(ROOM_ATTEMPTS):
            channel, transaction = await client.wallet.ensure_channel(offer, candidate.payment, needed)
            self.allocation_transaction = transaction or self.allocation_transaction
            state = client.book.channels[channel.channel_id]
            if state.free >= needed and not state.leaving:
                return state
        raise InsufficientFunds(
            f"other chats took what was free on the channel to {offer.peer_id}, {ROOM_ATTEMPTS} times",
            hint="raise client.allocation, or run fewer chats at once",
        )

    def _part(
        self, candidate: Candidate, channel: ChannelState, input_limit: int, shape: Shape, stream: ByteStream
    ) -> Part:
        client, offer, params = self._client, candidate.offer, self._params
        deadline = client.now_ms() + self.deadline_ms
        draft = AskMessage(
            job_id=bytes(self.job_id),
            part=0,
            channel_id=bytes(channel.channel_id),
            worker=bytes(offer.worker),
            model_id=candidate.model.model_id,
            offer_hash=bytes(offer.hash),
            deadline=deadline,
            request=self._request,
            params=params,
            signature=bytes(65),
            cumulative=bytes(16),
            voucher_signature=bytes(65),
        )
        ask = ask_struct(draft)
        terms = Terms(
            domain=channel.home,
            ask=ask,
            params=params,
            price=candidate.price,
            input_limit=input_limit,
            receiver_authorizer=channel.config.receiver_authorizer,
            payer_authorizer=channel.config.payer_authorizer,
            tick_tokens=_tick_tokens(candidate, client.settings, shape),
            credit_tokens=offer.document.credit_tokens,
            shape=shape,
        )
        return Part(self, candidate, terms, draft, stream)
