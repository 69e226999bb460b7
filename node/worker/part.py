"""One accepted part, from the journal entry that opens it to the one that ends it.

The order is the promise:
- what is accepted is journaled before `Accept` leaves; what is signed is journaled before the receipt leaves;
- prefill starts while the journal syncs, because computing is not speaking;
- tokens leave only while what is owed stays inside the credit window, and the engine is not pulled further than one tick
  ahead of that, so a client that stops paying gets no more work;
- whatever happens to the stream, the part ends in the journal with what was delivered.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec
import trio

from node.errors import InputInvalid, ModelError, SignerError, SignerRefused
from node.groups import plain_errors
from node.network.drive import JobStream
from node.ports import Prompt, Step, StreamClosed, TaskInput
from node.store.faults import fault_point
from node.store.results import KEEP_MS
from node.worker.intake import Intake
from node.worker.kept import CHUNK_TEXT, CHUNK_TOKENS, KeptResult, if_it_fits, result_key
from node.worker.output import sellable, with_logprobs
from protocol.admission import Checked
from protocol.channel import Change, JobEnded, JobOpened, Part, VoucherAdded
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import JobId
from protocol.job import JobWorker, Terms, ask_struct, receipt_to_wire
from protocol.messages import (
    DATA_PER_CHUNK,
    Abort,
    Accept,
    Cancel,
    FinishReason,
    Input,
    ReceiptMessage,
    VoucherMessage,
    encode,
)
from protocol.payment import unsecured
from protocol.typed_data import Receipt

if TYPE_CHECKING:
    from node.worker.serve import JobServer

log = logging.getLogger(__name__)


class ServedPart:
    """One accepted part, from the journal entry that opens it to the one that ends it."""

    def __init__(
        self, server: JobServer, link: JobStream[JobWorker], checked: Checked, work: Prompt | TaskInput, terms: Terms
    ) -> None:
        self.server = server
        self.link = link
        self.machine = link.machine
        self.checked = checked
        self.ask = checked.ask
        self.channel_id = checked.channel.channel_id
        self.key: Part = (JobId(self.ask.job_id), self.ask.part)
        self.work = work
        self.terms = terms
        self.pending: deque[Step] = deque()
        self.pending_units = 0
        self.sent_ids: list[int] = []
        self.sent_text: list[str] = []
        self.sent_data: list[bytes] = []
        self.finish: FinishReason | None = None
        """Set by whoever ends the part first."""
        self.produced = False
        self.fault: RemoteProtocolError | None = None
        """What the client did, or did not do, that ended the part."""
        self.failure = ""
        """What our runtime did."""
        self.accept = b""
        self.opened = trio.Event()
        """The acceptance is journaled, and the machine has agreed."""
        self.intake = Intake(self)
        self._wake = trio.Event()

    async def run(self) -> ReceiptMessage | None:
        """Serve the part to its end in the journal; returns the receipt, still to be sent, if there is one."""
        self.server.stats.accepted += 1
        self.server._serving.add(self)
        try:
            return await self._run()
        finally:
            self.server._serving.discard(self)
            self.server.meter.drop(self.channel_id, self.key)

    async def _run(self) -> ReceiptMessage | None:
        with plain_errors():
            return await self._serve()

    async def _serve(self) -> ReceiptMessage | None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._produce)
            await self._open()
            try:
                fault_point("send.accept")
                await self.link.send_frame(self.accept)
                nursery.start_soon(self._listen)
                await self._deliver()
            except StreamClosed:
                self.end(FinishReason.CANCELLED)
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    message = await self._close()
        return message

    def end(self, reason: FinishReason) -> None:
        self.finish = self.finish or reason
        self.notify()

    async def _open(self) -> None:
        """Journal the acceptance. No checkpoint lies between the admission check and the change, so both see one state."""
        server, book = self.server, self.server.book
        state = book.channels[self.channel_id]
        sequence = state.sequence + 1
        changes: list[Change] = [JobOpened(self.channel_id, *self.key, sequence, self.terms.limit)]
        if self.checked.cumulative > state.cumulative:
            changes.append(VoucherAdded(self.channel_id, self.checked.cumulative, self.ask.voucher_signature))
        units = self.terms.asked_units
        server.meter.set(self.channel_id, self.key, self.terms.spent(units, 0))
        await book.change(changes)
        self.accept = self.machine.agree(
            self.terms,
            input_tokens=units,
            sequence=sequence,
            started=server.now_ms(),
            cumulative=self.checked.cumulative,
        )
        self.opened.set()

    # ------------------------------------------------------------------------------------------------- producing

    async def _produce(self) -> None:
        """Pull the engine; stop pulling when a tick's worth waits to be delivered."""
        limit = self.terms.tick_tokens
        try:
            async with aclosing(self.intake.media()) as media, aclosing(self._steps(media)) as steps:
                async for step in steps:
                    self.pending.append(step)
                    self.pending_units += self._units(step)
                    self.notify()
                    while self.pending_units >= limit:
                        await self.changed()
        except InputInvalid as error:
            self.fault = RemoteProtocolError(WireCode.BAD_INPUT, str(error))
            self.end(FinishReason.CANCELLED)
        except ModelError as error:
            log.error("the model runtime failed: %s", error)
            self.failure = str(error)
        self.produced = True
        self.notify()

    async def _steps(self, media: AsyncGenerator[bytes, None]) -> AsyncGenerator[Step, None]:
        """What the runtime gives for the request, whichever it is."""
        server, params = self.server, self.ask.params
        if isinstance(self.work, Prompt):
            raw = server.backend.generate(self.work, params, self.ask.resume)
            async with aclosing(raw), aclosing(with_logprobs(raw, params.likeliest)) as steps:
                async for step in steps:
                    yield step
        elif server.tasks is not None:
            raw = server.tasks.run(self.work, params, media)
            async with aclosing(raw), aclosing(sellable(raw, self.terms, lambda: self.intake.exhausted)) as steps:
                async for step in steps:
                    yield step

    def _units(self, step: Step) -> int:
        """Output units: rows, or tokens."""
        shape = self.terms.shape
        return len(step.data) // shape.row_bytes if shape.rows else len(step.token_ids)

    # ------------------------------------------------------------------------------------------------ delivering

    async def _deliver(self) -> None:
        """Send chunks while the credit window allows it, until the output, the client or the deadline ends it."""
        server = self.server
        last = stalled = -1.0
        deadline = trio.current_time() + max(0, self.ask.deadline - server.now_ms()) / 1000
        while self.finish is None:
            await self.intake.tell()
            if self.finish is not None:  # told while we sent: nobody tells it again
                break
            over = trio.current_time() >= deadline or server.book.channels[self.channel_id].leaving
            if over or server.blind(self.channel_id):
                self.end(FinishReason.CANCELLED)  # nobody wants more of it, or nobody may be able to pay for it
                continue
            if not self.pending:
                if self.produced:
                    if not self.machine.output_tokens:
                        self.failure = self.failure or "the model ended before its first token"
                    self.end(FinishReason.CANCELLED)  # the runtime stopped without a reason of the model's
                else:
                    await self.changed(until=deadline)
                continue
            wait = last + server.settings.coalesce_ms / 1000 - trio.current_time()
            if wait > 0:
                await trio.sleep(wait)
            await self.intake.tell()
            if self.finish is not None:
                break
            batch = self._affordable()
            if batch:
                await self._send(batch)
                last, stalled = trio.current_time(), -1.0
                continue
            if stalled < 0:
                stalled = trio.current_time() + server.settings.stall_ms / 1000
            if not await self.changed(until=min(stalled, deadline)) and stalled <= trio.current_time():
                log.info("job %s: no voucher in time, ending unpaid", self.key[0])
                self.fault = RemoteProtocolError(WireCode.UNPAID, "no voucher came in time")
                self.end(FinishReason.CANCELLED)
        await self.intake.tell()

    def _affordable(self) -> list[Step]:
        """The waiting steps that fit into the credit window and into one chunk, in order."""
        state = self.server.book.channels[self.channel_id]
        others = self.server.meter.running(self.channel_id, without=self.key)
        count = before = self.machine.output_tokens
        batch: list[Step] = []
        text = size = 0
        for step in self.pending:
            count, text, size = count + self._units(step), text + len(step.text), size + len(step.data)
            if batch and (count - before > CHUNK_TOKENS or text > CHUNK_TEXT or size > DATA_PER_CHUNK):
                break
            cost = self.terms.spent(self.machine.input_tokens, count)
            if unsecured(state, others + cost) > self.terms.credit:
                break
            batch.append(step)
        return batch

    async def _send(self, batch: list[Step]) -> None:
        ids = tuple(token for step in batch for token in step.token_ids)
        text = "".join(step.text for step in batch)
        data = b"".join(step.data for step in batch)
        for step in batch:
            self.pending.popleft()
            self.pending_units -= self._units(step)
        if ids or text or data:
            frame = self.machine.deliver(ids, text, data)
            self.sent_ids.extend(ids)
            self.sent_text.append(text)
            self.sent_data.append(data)
            self.server.meter.set(self.channel_id, self.key, self.machine.spent)
            fault_point("send.chunk")
            await self.link.send_frame(frame)
        if batch[-1].finish_reason is not None:
            self.finish = self.finish or batch[-1].finish_reason
        self.notify()

    # ------------------------------------------------------------------------------------------------- listening

    async def _listen(self) -> None:
        """Vouchers, input, cancel, abort, or silence."""
        try:
            while True:
                message = await self.link.receive()
                if isinstance(message, VoucherMessage):
                    await self.server.vouchers.take(self.ask, message, self.terms.least_tick)
                elif isinstance(message, Input):
                    self.notify()
                elif isinstance(message, Cancel | Abort):
                    break
        except StreamClosed:
            pass
        except RemoteProtocolError as error:
            self.fault = error
        self.end(FinishReason.CANCELLED)

    # --------------------------------------------------------------------------------------------------- closing

    async def _close(self) -> ReceiptMessage | None:
        """Sign and journal the end, whatever the stream is doing. The result is kept with it.

        When our runtime failed before the first token, nothing was sold: it costs nothing, and there is no receipt, since
        every receipt charges the prompt.
        """
        # A client that hung up is booked all that was sent, also what no voucher covers. Booking only what is covered would keep
        # both sides' counts closer after an honest break, but it would forgive a tick at each break: ask, read a tick for
        # nothing, hang up, and again on the same channel. As it is, the debt stands and the next ask must pay it.
        server, machine = self.server, self.machine
        self.finish = self.finish or FinishReason.CANCELLED
        if self.failure and not self.fault and not machine.output_tokens:
            server.meter.drop(self.channel_id, self.key)
            await server.book.change([JobEnded(self.channel_id, *self.key, 0, 0, b"")])
            server.wake(self.channel_id)
            server.stats.finished += 1
            return None
        receipt = machine.make_receipt(self.finish, server.now_ms())
        try:
            signature = await server.key.sign(receipt, self.terms.domain)
        except SignerError as error:
            await self._end_unsigned(receipt, error)
            return None
        message = ReceiptMessage(receipt=receipt_to_wire(receipt), signature=signature)
        ended = JobEnded(self.channel_id, *self.key, receipt.cost, receipt.sequence, encode(message))
        streamed = self.terms.shape.streamed
        kept = KeptResult(
            ask=ask_struct(self.ask).struct_hash(),
            accept=Accept(input_tokens=machine.input_tokens, sequence=machine.sequence, started=machine.started),
            token_ids=() if streamed else tuple(self.sent_ids),
            text="" if streamed else "".join(self.sent_text),
            receipt=message,
            data=b"".join(self.sent_data),
            streamed=streamed,
        )
        now = server.now_ms()
        key = result_key(self.channel_id, *self.key)
        keeping = if_it_fits(server.results.keeping(key, msgspec.msgpack.encode(kept), now + KEEP_MS, now_ms=now))
        server.meter.drop(self.channel_id, self.key)  # from here on it is spent, not running: no moment counts it twice
        await server.book.change([ended], also=keeping)
        server.wake(self.channel_id)
        server.stats.finished += 1
        server.stats.output_tokens += receipt.output_tokens
        server.stats.ended[self.finish.code] += 1
        return message

    async def _end_unsigned(self, receipt: Receipt, error: SignerError) -> None:
        """No receipt can be had: what was delivered is booked all the same. Raises `SignerFailed` again: the worker must stop."""
        log.error("no receipt for part %d of job %s: %s", self.key[1], self.key[0], error)
        self.server.meter.drop(self.channel_id, self.key)
        await self.server.book.change([JobEnded(self.channel_id, *self.key, receipt.cost, 0, b"")])
        self.server.wake(self.channel_id)
        self.server.stats.finished += 1
        self.failure = "the worker could not sign a receipt"
        if not isinstance(error, SignerRefused):
            raise error

    async def conclude(self, message: ReceiptMessage | None) -> None:
        """Say how it ended, and wait for the ack."""
        fault_point("send.receipt")
        if message is None or self.failure or self.fault:
            code = self.fault.code if self.fault else WireCode.BACKEND
            self.server.stats.ended[code.name.lower()] += 1
            await self.link.abort(code, self.fault.detail if self.fault else self.failure)
            return
        await self.link.send(message)
        await self.server.vouchers.until_ack(self.link, self.ask, self.terms.least_tick)

    # --------------------------------------------------------------------------------------------------- waiting

    def notify(self) -> None:
        self._wake.set()
        self._wake = trio.Event()

    async def changed(self, until: float | None = None) -> bool:
        """Wait for news; False when `until` (trio time) came first."""
        wake = self._wake
        with trio.move_on_at(float("inf") if until is None else until):
            await wake.wait()
            return True
        return False
