"""One worker's part of a chat: ask, read, pay, verify, acknowledge.

The order is the promise: job and first voucher are journaled before the ask leaves, each voucher before it leaves, the
verified receipt before the ack. Nothing unverified is paid; a part that breaks off owes what it delivered and no more.
"""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec
import trio

from node.client import feed
from node.client.values import ChatChunk, PartRecord, Usage
from node.errors import NetworkError, NodeError, Refused, Timeout, VerificationFailed, WorkerFault
from node.groups import plain_errors
from node.network.drive import JobStream
from node.ports import ByteStream, StreamClosed
from node.store.faults import fault_point
from protocol.channel import ChannelState, JobEnded, JobOpened, Role
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.ids import PeerId
from protocol.job import Client, JobClient, Terms
from protocol.messages import (
    Abort,
    Accept,
    Ack,
    AskMessage,
    Chunk,
    FinishReason,
    ReceiptMessage,
    Refuse,
    VoucherMessage,
    amount_to_wire,
    encode,
)
from protocol.payment import first_voucher, last_voucher, next_voucher
from protocol.selection import Candidate
from protocol.tasks import INPUT_WINDOW, Task
from protocol.typed_data import Receipt

if TYPE_CHECKING:
    from node.client.chat import ChatStream

log = logging.getLogger(__name__)


class Part:
    """One worker's part of a chat, from the ask to the ack."""

    def __init__(
        self, chat: ChatStream, candidate: Candidate, terms: Terms, draft: AskMessage, stream: ByteStream
    ) -> None:
        self.chat = chat
        self.client = chat._client
        self.candidate = candidate
        self.terms = terms
        self.draft = draft
        self.peer: PeerId = stream.remote_peer
        self.machine = JobClient(terms, vocabulary=self.client.vocabulary_size(terms.ask.model_id))
        self.channel_id = terms.ask.channel_id
        self.key = (terms.ask.job_id, terms.ask.part)
        self.link = JobStream(stream, self.machine, patience_s=self.client.settings.stall_ms / 1000)
        self._overflow: ChatChunk | None = None
        self._paying = trio.Lock()
        """Vouchers leave in the order of their amounts, whoever asks for them."""
        self._next = 0
        """Bytes of input that are about to be sent: paid for already."""
        self._unfed: NodeError | None = None
        """Why no more input could be sent."""
        self._taken = trio.Event()
        """Set, and replaced, when the worker has taken input."""

    async def begin(self, ask: AskMessage) -> None:
        """Send the journaled ask and wait for the answer; then the rest goes on in a task of its own."""
        chat, client = self.chat, self.client
        try:
            fault_point("send.ask")
            chat.timings.asked = self._elapsed()
            await self.link.send(ask)
            with trio.fail_after(client.settings.first_token_ms / 1000):
                answer = await self.link.receive()
        except (StreamClosed, RemoteProtocolError, trio.TooSlowError) as error:
            await self._broken(error)
            raise self._blame(error) from error
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._broken(None)
            raise
        if isinstance(answer, Refuse):
            await self._refused(answer)
        if not isinstance(answer, Accept):
            error = RemoteProtocolError(WireCode.UNEXPECTED, f"{type(answer).__name__} as an answer to an ask")
            await self._broken(error)
            raise self._blame(error)
        chat.timings.accepted = self._elapsed()
        chat.worker, chat.channel_id, chat._link = self.peer, self.channel_id, self.link
        chat.model_id = self.terms.ask.model_id
        client.spawn(self._run)

    async def journal_ask(self) -> AskMessage:
        """Reserve the job's cost, sign ask and first voucher; both are on disk before one write.

        Reserves before its first checkpoint. Raises `LocalProtocolError` when the channel has too little free, `SignerError`.
        """
        client, terms = self.client, self.terms
        opened = client.book.begin([JobOpened(self.channel_id, *self.key, 0, terms.limit)])
        input_cost = terms.spent(terms.asked_units, 0)

        def target(state: ChannelState) -> int:
            return first_voucher(state, client.meter.running(self.channel_id), input_cost, terms.tick)

        try:
            signed = await client.vouchers.add(self.channel_id, target, beside=[(terms.ask, terms.domain)])
            await opened.durable()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._journal_end(0)
            raise
        return msgspec.structs.replace(
            self.draft,
            signature=signed.beside[0],
            cumulative=amount_to_wire(signed.cumulative),
            voucher_signature=signed.signature,
        )

    # ------------------------------------------------------------------------------------------------- streaming

    async def _run(self) -> None:
        chat, client = self.chat, self.client
        try:
            try:
                with chat._scope, plain_errors():
                    async with trio.open_nursery() as nursery:
                        if self.terms.shape.streamed:
                            nursery.start_soon(self._feed, nursery.cancel_scope)
                        await self._pump()
                        nursery.cancel_scope.cancel()
                    if self._unfed is not None:
                        raise self._unfed
                if chat._scope.cancelled_caught:
                    raise StreamClosed("the caller left")
            except (StreamClosed, RemoteProtocolError, trio.TooSlowError) as error:
                chat._error = chat._error or self._blame(error)
                client.failed(self.peer)
                await self._broken(error)
            except BaseException:
                chat._error = NetworkError("the client was closed while the answer came")
                await self._broken(None)
                raise
        except NodeError as error:  # our own journal: the caller hears of it, and nothing more is signed
            chat._error = error
            with trio.CancelScope(shield=True):
                await self.link.stream.reset()
        finally:
            client.meter.drop(self.channel_id, self.key)
            chat.timings.finished = self._elapsed()
            chat._settled.set()
            chat._send.close()

    async def _pump(self) -> None:
        chat, client, machine = self.chat, self.client, self.machine
        deadline = trio.current_time() + chat.deadline_ms / 1000
        wait_ms = client.settings.first_token_ms
        while True:
            with trio.fail_at(min(deadline, trio.current_time() + wait_ms / 1000)):
                message = await self.link.receive()
            wait_ms = client.settings.stall_ms
            match message:
                case Chunk():
                    said = bool(message.token_ids or message.text or message.data)
                    if said and not chat.timings.first_token:
                        chat.timings.first_token = self._elapsed()
                    chat.usage = Usage(machine.input_tokens or 0, machine.output_tokens)
                    chat.cost = machine.spent
                    client.meter.set(self.channel_id, self.key, machine.due(self._next))
                    self._taken.set()
                    self._taken = trio.Event()
                    if said:
                        self._offer(ChatChunk(message.text, message.token_ids, chat.usage, chat.cost, message.data))
                    await self._pay()
                    await self._room()
                case ReceiptMessage():
                    await self._settle(message)
                    return
                case Abort():
                    raise RemoteProtocolError(message.code, message.detail or "the worker broke off")
                case _:
                    raise RemoteProtocolError(WireCode.UNEXPECTED, f"{type(message).__name__} in a stream")

    def _offer(self, chunk: ChatChunk) -> None:
        """Hand a chunk to the reader; one who has left gets nothing more."""
        self._overflow = None
        try:
            self.chat._send.send_nowait(chunk)
        except trio.WouldBlock:
            self._overflow = chunk
        except trio.BrokenResourceError:
            pass

    async def _room(self) -> None:
        """Wait for a slow reader, after paying: what is not read is not asked for much longer."""
        if self._overflow is not None:
            try:
                await self.chat._send.send(self._overflow)
            except trio.BrokenResourceError:
                pass

    async def _feed(self, scope: trio.CancelScope) -> None:
        """Send what follows the ask: paid for first, and no further ahead of the worker than the window allows."""
        pieces = feed.pieces(self.chat._media, self.terms.shape)
        try:
            async with aclosing(pieces):
                async for data, last in pieces:
                    while self.machine.inputs.untaken + len(data) > INPUT_WINDOW:
                        await self._taken.wait()
                    self._next = len(data)
                    self.client.meter.set(self.channel_id, self.key, self.machine.due(self._next))
                    await self._pay()
                    fault_point("send.input")
                    frame = self.machine.feed(data, last=last)
                    self._next = 0
                    await self.link.send_frame(frame)
        except (LocalProtocolError, StreamClosed):
            pass  # it is over; whoever reads the stream hears why
        except feed.SourceFailed as error:
            self.chat._error = error.__cause__
            await self.chat._say_cancel()
        except NodeError as error:  # our own journal or signer
            self._unfed = error
            scope.cancel()

    async def _pay(self) -> None:
        """Write a voucher when the last one no longer covers half a tick."""
        async with self._paying:
            await self._pay_in_turn()

    async def _pay_in_turn(self) -> None:
        client = self.client

        def target(state: ChannelState) -> int | None:
            return next_voucher(state, client.meter.running(self.channel_id), self.terms.tick)

        before = client.book.channels[self.channel_id]
        if target(before) is None:
            return
        signed = await client.vouchers.add(self.channel_id, target)
        if signed.cumulative <= before.cumulative:
            return
        fault_point("send.voucher")
        try:
            await self.link.send(
                VoucherMessage(cumulative=amount_to_wire(signed.cumulative), signature=signed.signature)
            )
        except LocalProtocolError:
            pass  # the caller cancelled meanwhile; the ack will carry it

    # ---------------------------------------------------------------------------------------------------- ending

    async def _settle(self, message: ReceiptMessage) -> None:
        """The machine has verified the receipt: journal it with the voucher that pays the rest, then acknowledge."""
        chat, client, receipt = self.chat, self.client, self.machine.receipt
        if receipt is None:
            raise LocalProtocolError("a receipt that was not verified")
        wanted = self.machine.states[Role.CLIENT] is Client.ASKED
        ended = JobEnded(self.channel_id, *self.key, receipt.cost, receipt.sequence, encode(message))
        client.meter.drop(self.channel_id, self.key)
        two_faced = await client.evidence.accepted(client.book.channels[self.channel_id], receipt)

        def target(_: ChannelState) -> int | None:
            return last_voucher(client.preview(self.channel_id, ended), client.meter.running(self.channel_id))

        # The voucher goes before the end of the job: its reservation is what covers it.
        signed = await client.vouchers.add(self.channel_id, target, then=[ended])
        chat.receipt, chat.receipt_signature = receipt, message.signature
        chat.finish_reason = FinishReason(receipt.finish_reason)
        chat.usage, chat.cost = Usage(receipt.input_tokens, receipt.output_tokens), receipt.cost
        chat.parts.append(PartRecord(self.peer, self.channel_id, receipt, message.signature, receipt.cost))
        if wanted and receipt.finish_reason == FinishReason.CANCELLED:
            self._cut_short(receipt)
        elif two_faced:  # what was delivered is paid, and nobody is asked again who signs one number twice
            client.failed(self.peer)
        else:
            chatted = self.terms.shape.task is Task.CHAT  # other units say nothing about the speed of the next chat
            tokens = receipt.output_tokens if chatted else 0
            client.succeeded(self.peer, tokens, self._elapsed() - chat.timings.first_token)
        fault_point("send.ack")
        try:
            await self.link.send(Ack(cumulative=amount_to_wire(signed.cumulative), signature=signed.signature))
            await self.link.stream.aclose()
        except StreamClosed:
            log.info("%s was gone before our ack; its voucher is journaled and goes with the next job", self.peer)

    def _cut_short(self, receipt: Receipt) -> None:
        """An honest receipt for half an answer: paid, and never passed off as a whole one."""
        text = f"after {receipt.output_tokens} tokens, which are paid by its receipt"
        if self.client.now_ms() >= self.terms.ask.deadline:
            self.chat._error = Timeout(f"the deadline came {text}", hint="ask with a later deadline")
            return
        self.chat._error = WorkerFault(f"{self.peer} stopped {text}")
        self.client.failed(self.peer)

    async def _refused(self, answer: Refuse) -> None:
        await self._journal_end(0)
        await self.link.stream.aclose()
        if answer.offer is not None:
            try:
                self.client.offers.learn(answer.offer, peer=self.peer)
            except RemoteProtocolError as error:
                log.info("the offer that came with a refusal is no good: %s", error)
        raise Refused(answer.reason, answer.detail)

    async def _broken(self, error: BaseException | None) -> None:
        """The part ended without a receipt: what was delivered is owed and no more."""
        with trio.CancelScope(shield=True):
            if self.chat.parts and self.chat.parts[-1].receipt is not None:
                return  # settled before the stream broke
            # A worker whose runtime failed before the first token charges nothing, and says so; who just vanishes may claim
            # the prompt, which is vouched for.
            unsold = isinstance(error, RemoteProtocolError) and error.code is WireCode.BACKEND
            spent = 0 if unsold and not self.machine.output_tokens else self.machine.spent
            await self._journal_end(spent)
            self.chat.cost = spent
            if self.machine.shown is not None:
                await self.client.evidence.refused(self.client.book.channels[self.channel_id], self.machine.shown)
            self.chat.parts.append(PartRecord(self.peer, self.channel_id, None, b"", spent))
            if isinstance(error, RemoteProtocolError) and not self.machine.over:
                await self.link.abort(error.code, error.detail)
            else:
                await self.link.stream.reset()

    async def _journal_end(self, spent: int) -> None:
        client = self.client
        client.meter.drop(self.channel_id, self.key)
        if self.key in client.book.channels[self.channel_id].open_jobs:
            await client.book.change([JobEnded(self.channel_id, *self.key, spent, 0, b"")])

    def _blame(self, error: BaseException) -> NodeError:
        if isinstance(error, trio.TooSlowError):
            return Timeout(
                f"{self.peer} did not go on in time", hint="another worker may be faster; see `gristmill offers`"
            )
        if isinstance(error, RemoteProtocolError):
            wrong = (WireCode.BAD_RECEIPT, WireCode.BAD_SIGNATURE, WireCode.BAD_OUTPUT)
            if error.code in wrong and self.machine.receipt is None:
                return VerificationFailed(f"{self.peer}: {error.detail}. It is not paid for more.")
            return WorkerFault(f"{self.peer} broke off: {error}")
        return WorkerFault(
            f"{self.peer} stopped after {self.machine.output_tokens} tokens: {error}",
            hint="you keep what was delivered; `gristmill channels close` brings the rest of the channel back",
        )

    def _elapsed(self) -> float:
        return trio.current_time() - self.chat._begun
