"""One job stream, one task: ask -> admission -> journal -> engine -> chunks -> receipt -> ack.

The order is the promise:
- what is accepted is journaled before `Accept` leaves; what is signed is journaled before the receipt leaves;
- prefill starts while the journal syncs, because computing is not speaking;
- tokens leave only while what is owed stays inside the credit window, and the engine is not pulled further than one tick
  ahead of that, so a client that stops paying gets no more work;
- whatever happens to the stream, the part ends in the journal with what was delivered.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

import msgspec
import trio

from node.errors import ModelError, PromptInvalid
from node.network.drive import JobStream
from node.network.groups import plain_errors
from node.ports import Backend, ByteStream, Prompt, Step, StreamClosed
from node.store.channels import ChannelBook
from node.store.errors import ResultConflict, ResultsFull
from node.store.faults import fault_point
from node.store.meter import Meter
from node.store.results import KEEP_MS, Results
from node.store.writer import Work
from node.worker.desk import OfferDesk
from protocol.admission import Checked, Load, Rejected, check_ask, check_prompt
from protocol.channel import Change, ChannelState, JobEnded, JobOpened, Part, VoucherAdded
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode
from protocol.ids import ChannelId, Hash32, JobId, ModelId, keccak256
from protocol.job import JobWorker, Terms, ask_struct, receipt_to_wire
from protocol.keys import PrivateKey, require_signer
from protocol.messages import (
    Abort,
    Accept,
    Ack,
    AskMessage,
    Cancel,
    Chunk,
    FinishReason,
    ReceiptMessage,
    Refuse,
    VoucherMessage,
    amount_from_wire,
    encode,
)
from protocol.payment import crumb, exposure, needless, unsecured
from protocol.typed_data import Domain, Refusal, Voucher

log = logging.getLogger(__name__)
_CHUNK_TOKENS = 1024
_CRUMBS = 4
"""Vouchers of less than a quarter tick that one part may add."""
_CHUNK_TEXT = 32 * 1024
"""Characters; a chunk's bound on the wire is twice this."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """All times in milliseconds."""

    coalesce_ms: int = 15
    stall_ms: int = 10_000
    """How long an overdue voucher is waited for."""
    first_byte_ms: int = 600_000
    """How long an opened stream may wait for its ask: clients keep one open so that an ask needs no round trip."""
    frame_ms: int = 10_000
    """From the first byte of an ask to its last: nobody holds our memory with half a message for long."""
    ack_ms: int = 10_000
    max_streams: int = 4
    credit_limit: int = 0
    chain_age_limit_ms: int = 60_000


class KeptResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished part, as it is served again to the same ask."""

    ask: bytes
    accept: Accept
    token_ids: tuple[int, ...]
    text: str
    receipt: ReceiptMessage


@dataclass(slots=True)
class Stats:
    """Counters for `status`."""

    accepted: int = 0
    finished: int = 0
    output_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    """How parts ended, by finish reason or wire code."""


class JobServer:
    """Serves `/gristmill/job/1`."""

    def __init__(
        self,
        *,
        key: PrivateKey,
        domain: Domain,
        book: ChannelBook,
        results: Results,
        backend: Backend,
        desk: OfferDesk,
        meter: Meter,
        settings: ServeSettings,
        now_ms: Callable[[], int],
        chain_age_ms: Callable[[], int],
    ) -> None:
        self.key = key
        self.domain = domain
        self.book = book
        self.results = results
        self.backend = backend
        self.desk = desk
        self.meter = meter
        self.settings = settings
        self.now_ms = now_ms
        self.chain_age_ms = chain_age_ms
        self.stats = Stats()
        self.draining = False
        self.busy = 0
        """Parts under way, those included that only wait for their ack."""
        self._parts: set[tuple[ChannelId, JobId, int]] = set()
        self._serving: set[_Serving] = set()
        self._crumbs: Counter[tuple[ChannelId, JobId, int]] = Counter()

    @property
    def free_slots(self) -> int:
        return 0 if self.draining else min(self.settings.max_streams - len(self._parts), self.backend.free_slots)

    def wake(self, channel_id: ChannelId) -> None:
        """What is paid or booked on one stream of a channel may let the others go on."""
        for serving in self._serving:
            if serving.channel_id == channel_id:
                serving.notify()

    async def handle(self, stream: ByteStream) -> None:
        """One stream. Ends normally whatever the peer does; only our own ledger's failure is raised."""
        link: JobStream[JobWorker] = JobStream(stream, JobWorker(), patience_s=self.settings.stall_ms / 1000)
        try:
            ask = await link.first(idle_s=self.settings.first_byte_ms / 1000, frame_s=self.settings.frame_ms / 1000)
            if ask is None:
                await stream.reset()
                return
            if isinstance(ask, AskMessage):
                await self._answer(link, ask)
            await stream.aclose()
        except RemoteProtocolError as error:
            log.info("stream of %s ended: %s", stream.remote_peer, error)
            self.stats.ended[error.code.name.lower()] += 1
            await link.abort(error.code, error.detail)
        except StreamClosed:
            pass

    def load(self, asking: ChannelId) -> Load:
        """How busy we are, seen from one channel."""
        credit = self.desk.credit
        return Load(
            free_slots=self.free_slots,
            draining=self.draining,
            credit_in_use=sum(exposure(s, credit) for s in self.book.at_risk if s.channel_id != asking),
            credit_limit=self.settings.credit_limit,
            chain_age_ms=self.chain_age_ms(),
            chain_age_limit_ms=self.settings.chain_age_limit_ms,
        )

    async def _answer(self, link: JobStream[JobWorker], ask: AskMessage) -> None:
        self.busy += 1
        try:
            kept = self._kept(ask)
            if kept is not None:
                await self._serve_again(link, ask, kept)
                return
            checked = self._check(ask)
            with self._slot((checked.channel.channel_id, JobId(ask.job_id), ask.part)) as part:
                prompt = await self._prepare(ask)
                terms = self._agree(checked, part, prompt)
                serving = _Serving(self, link, checked, prompt, terms)
                receipt = await serving.run()
            await serving.conclude(receipt)  # the place is free: who is slow to acknowledge holds up nobody
        except Rejected as no:
            await self._refuse(link, ask, no)
        finally:
            self._crumbs.pop((ChannelId(ask.channel_id), JobId(ask.job_id), ask.part), None)
            self.busy -= 1

    def _check(self, ask: AskMessage) -> Checked:
        return check_ask(
            ask,
            worker=self.key.address,
            domain=self.domain,
            offers=self.desk.valid,
            channel=self._channel(ask),
            load=self.load(ChannelId(ask.channel_id)),
            now_ms=self.now_ms(),
        )

    def _channel(self, ask: AskMessage) -> ChannelState | None:
        channel_id = ChannelId(ask.channel_id)
        if channel_id in self.book.quarantined:
            raise Rejected(RefusalReason.CHANNEL_CLOSING, "what the contract says of the channel breaks a rule")
        return self.book.get(channel_id)

    def _agree(self, checked: Checked, part: tuple[ChannelId, JobId, int], prompt: Prompt) -> Terms:
        if part in self.book.cut_off:
            raise Rejected(RefusalReason.DUPLICATE_JOB, "this part was cut off by a crash and is charged for")
        channel = self.book.channels[checked.channel.channel_id]
        terms = check_prompt(
            Checked(checked.ask, checked.offer, checked.model, channel, checked.cumulative),
            len(prompt.token_ids) + len(checked.ask.resume),
            domain=self.domain,
            running=self.meter.running(channel.channel_id),
            load=self.load(channel.channel_id),
        )
        if not self.backend.fits(prompt, checked.ask.params.max_tokens):
            raise Rejected(RefusalReason.BUSY, "no memory is free for a job of this size")
        return terms

    async def _prepare(self, ask: AskMessage) -> Prompt:
        model, messages = ModelId(ask.model_id), ask.messages
        try:
            if sum(len(m.content) for m in messages) < 16_384:
                return self.backend.prepare(model, messages)
            return await trio.to_thread.run_sync(self.backend.prepare, model, messages)
        except PromptInvalid as error:
            raise Rejected(RefusalReason.PROMPT_INVALID, str(error)[:300]) from None
        except ModelError as error:
            log.error("the model runtime cannot take a prompt: %s", error)
            raise Rejected(RefusalReason.INTERNAL, "the model runtime failed") from None

    @contextmanager
    def _slot(self, part: tuple[ChannelId, JobId, int]) -> Iterator[tuple[ChannelId, JobId, int]]:
        """A place for a part that nobody else is being served, from before its prompt is tokenised to its end."""
        if part in self._parts:
            raise Rejected(RefusalReason.DUPLICATE_JOB, "this part is being served")
        self._parts.add(part)
        try:
            yield part
        finally:
            self._parts.discard(part)

    async def _refuse(self, link: JobStream[JobWorker], ask: AskMessage, no: Rejected) -> None:
        self.stats.refused[no.reason.code] += 1
        at = self.now_ms()
        signature = self.key.sign(Refusal(JobId(ask.job_id), int(no.reason), at).digest(self.domain))
        offer = None if self.draining else self.desk.current()
        await link.send(Refuse(reason=no.reason, detail=no.detail[:500], at=at, signature=signature, offer=offer))

    def _kept(self, ask: AskMessage) -> KeptResult | None:
        """The result of this ask. Raises `Rejected` for another ask under the same name: a part is charged for once."""
        raw = self.results.get(result_key(ask.channel_id, ask.job_id, ask.part))
        if raw is None:
            return None
        kept = msgspec.msgpack.decode(raw, type=KeptResult)
        if kept.ask != ask_struct(ask).struct_hash():
            raise Rejected(RefusalReason.DUPLICATE_JOB, "this part was served for another ask")
        return kept

    async def _serve_again(self, link: JobStream[JobWorker], ask: AskMessage, kept: KeptResult) -> None:
        """The same result for the same ask: nothing runs, nothing is charged twice."""
        await link.send(kept.accept)
        for start in range(0, len(kept.token_ids), _CHUNK_TOKENS):
            await link.send(Chunk(token_ids=kept.token_ids[start : start + _CHUNK_TOKENS], text=""))
        for start in range(0, len(kept.text), _CHUNK_TEXT):
            await link.send(Chunk(token_ids=(), text=kept.text[start : start + _CHUNK_TEXT]))
        await link.send(kept.receipt)
        await self.await_ack(link, ask)

    async def await_ack(self, link: JobStream[JobWorker], ask: AskMessage) -> None:
        """After the receipt: take the vouchers that still come; an ack lets the result go."""
        with trio.move_on_after(self.settings.ack_ms / 1000):
            while not link.machine.over:
                message = await link.receive()
                if isinstance(message, VoucherMessage | Ack):
                    await self.take_voucher(ask, message)
                if isinstance(message, Ack):
                    key = result_key(ask.channel_id, ask.job_id, ask.part)
                    await self.results.acknowledge(key, now_ms=self.now_ms())

    async def take_voucher(self, ask: AskMessage, message: VoucherMessage | Ack) -> None:
        """Book it if it is the highest so far; on a channel with several streams another one may have been faster.

        The journal only grows, so a stream's vouchers must be worth their records: one that nothing needs is passed over,
        and one that adds a crumb is the client's fault, but for a few (the two sides may count differently for a moment).
        An ack is the last of its stream and may add anything. Raises `RemoteProtocolError`.
        """
        channel_id = ChannelId(ask.channel_id)
        cumulative = amount_from_wire(message.cumulative)
        state = self.book.channels[channel_id]
        if isinstance(message, VoucherMessage) and state.cumulative < cumulative <= state.ceiling:
            if needless(state):
                return
            if crumb(state, self.meter.running(channel_id), cumulative, self.desk.tick):
                part = (channel_id, JobId(ask.job_id), ask.part)
                self._crumbs[part] += 1
                if self._crumbs[part] > _CRUMBS:
                    raise RemoteProtocolError(
                        WireCode.BAD_VOUCHER, f"vouchers that add {cumulative - state.cumulative}: pay by the tick"
                    )
        if cumulative > state.cumulative:
            voucher = Voucher(channel_id, cumulative)
            require_signer(voucher.digest(self.domain), message.signature, state.config.payer_authorizer, "voucher")
            await self.book.change([VoucherAdded(channel_id, cumulative, message.signature)])
        self.wake(channel_id)


class _Serving:
    """One accepted part, from the journal entry that opens it to the one that ends it."""

    def __init__(
        self, server: JobServer, link: JobStream[JobWorker], checked: Checked, prompt: Prompt, terms: Terms
    ) -> None:
        self.server = server
        self.link = link
        self.machine = link.machine
        self.checked = checked
        self.ask = checked.ask
        self.channel_id = checked.channel.channel_id
        self.key: Part = (JobId(self.ask.job_id), self.ask.part)
        self.prompt = prompt
        self.terms = terms
        self.pending: deque[Step] = deque()
        self.pending_tokens = 0
        self.sent_ids: list[int] = []
        self.sent_text: list[str] = []
        self.finish: FinishReason | None = None
        """Set by whoever ends the part first."""
        self.produced = False
        self.fault: RemoteProtocolError | None = None
        """What the client did, or did not do, that ended the part."""
        self.failure = ""
        """What our runtime did."""
        self.accept = b""
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
                self._end(FinishReason.CANCELLED)
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    message = await self._close()
        return message

    def _end(self, reason: FinishReason) -> None:
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
        server.meter.set(self.channel_id, self.key, self.terms.spent(self.terms.input_limit, 0))
        await book.change(changes)
        self.accept = self.machine.agree(
            self.terms,
            input_tokens=self.terms.input_limit,
            sequence=sequence,
            started=server.now_ms(),
            cumulative=self.checked.cumulative,
        )

    # ------------------------------------------------------------------------------------------------- producing

    async def _produce(self) -> None:
        """Pull the engine; stop pulling when a tick's worth waits to be delivered."""
        limit = self.terms.tick_tokens
        try:
            async with aclosing(self.server.backend.generate(self.prompt, self.ask.params, self.ask.resume)) as steps:
                async for step in steps:
                    self.pending.append(step)
                    self.pending_tokens += len(step.token_ids)
                    self.notify()
                    while self.pending_tokens >= limit:
                        await self._changed()
        except ModelError as error:
            log.error("the model runtime failed: %s", error)
            self.failure = str(error)
        self.produced = True
        self.notify()

    # ------------------------------------------------------------------------------------------------ delivering

    async def _deliver(self) -> None:
        """Send chunks while the credit window allows it, until the output, the client or the deadline ends it."""
        server = self.server
        last = stalled = -1.0
        deadline = trio.current_time() + max(0, self.ask.deadline - server.now_ms()) / 1000
        while self.finish is None:
            if trio.current_time() >= deadline or server.book.channels[self.channel_id].leaving:
                self._end(FinishReason.CANCELLED)  # nobody wants more of it, or nobody will be able to pay for it
                continue
            if not self.pending:
                if self.produced:
                    if not self.sent_ids:
                        self.failure = self.failure or "the model ended before its first token"
                    self._end(FinishReason.CANCELLED)  # the runtime stopped without a reason of the model's
                else:
                    await self._changed(until=deadline)
                continue
            wait = last + server.settings.coalesce_ms / 1000 - trio.current_time()
            if wait > 0:
                await trio.sleep(wait)
            batch = self._affordable()
            if batch:
                await self._send(batch)
                last, stalled = trio.current_time(), -1.0
                continue
            if stalled < 0:
                stalled = trio.current_time() + server.settings.stall_ms / 1000
            if not await self._changed(until=min(stalled, deadline)) and stalled <= trio.current_time():
                log.info("job %s: no voucher in time, ending unpaid", self.key[0])
                self.fault = RemoteProtocolError(WireCode.UNPAID, "no voucher came in time")
                self._end(FinishReason.CANCELLED)

    def _affordable(self) -> list[Step]:
        """The waiting steps that fit into the credit window and into one chunk, in order."""
        state = self.server.book.channels[self.channel_id]
        others = self.server.meter.running(self.channel_id, without=self.key)
        count = before = self.machine.digest.count
        batch: list[Step] = []
        text = 0
        for step in self.pending:
            count, text = count + len(step.token_ids), text + len(step.text)
            if batch and (count - before > _CHUNK_TOKENS or text > _CHUNK_TEXT):
                break
            cost = self.terms.spent(self.terms.input_limit, count)
            if unsecured(state, others + cost) > self.terms.credit:
                break
            batch.append(step)
        return batch

    async def _send(self, batch: list[Step]) -> None:
        ids = tuple(token for step in batch for token in step.token_ids)
        text = "".join(step.text for step in batch)
        for _ in batch:
            self.pending.popleft()
        self.pending_tokens -= len(ids)
        if ids or text:
            frame = self.machine.deliver(ids, text)
            self.sent_ids.extend(ids)
            self.sent_text.append(text)
            self.server.meter.set(self.channel_id, self.key, self.machine.spent)
            fault_point("send.chunk")
            await self.link.send_frame(frame)
        if batch[-1].finish_reason is not None:
            self.finish = self.finish or batch[-1].finish_reason
        self.notify()

    # ------------------------------------------------------------------------------------------------- listening

    async def _listen(self) -> None:
        """Vouchers, cancel, abort, or silence."""
        try:
            while True:
                message = await self.link.receive()
                if isinstance(message, VoucherMessage):
                    await self.server.take_voucher(self.ask, message)
                elif isinstance(message, Cancel | Abort):
                    break
        except StreamClosed:
            pass
        except RemoteProtocolError as error:
            self.fault = error
        self._end(FinishReason.CANCELLED)

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
        if self.failure and not self.fault and not self.sent_ids:
            server.meter.drop(self.channel_id, self.key)
            await server.book.change([JobEnded(self.channel_id, *self.key, 0, 0, b"")])
            server.wake(self.channel_id)
            server.stats.finished += 1
            return None
        receipt = machine.make_receipt(self.finish, server.now_ms())
        message = ReceiptMessage(
            receipt=receipt_to_wire(receipt), signature=server.key.sign(receipt.digest(server.domain))
        )
        ended = JobEnded(self.channel_id, *self.key, receipt.cost, receipt.sequence, encode(message))
        kept = KeptResult(
            ask=ask_struct(self.ask).struct_hash(),
            accept=Accept(input_tokens=machine.input_tokens, sequence=machine.sequence, started=machine.started),
            token_ids=tuple(self.sent_ids),
            text="".join(self.sent_text),
            receipt=message,
        )
        now = server.now_ms()
        key = result_key(self.channel_id, *self.key)
        keeping = _if_it_fits(server.results.keeping(key, msgspec.msgpack.encode(kept), now + KEEP_MS, now_ms=now))
        server.meter.drop(self.channel_id, self.key)  # from here on it is spent, not running: no moment counts it twice
        await server.book.change([ended], also=keeping)
        server.wake(self.channel_id)
        server.stats.finished += 1
        server.stats.output_tokens += receipt.output_tokens
        server.stats.ended[self.finish.code] += 1
        return message

    async def conclude(self, message: ReceiptMessage | None) -> None:
        """Say how it ended, and wait for the ack."""
        fault_point("send.receipt")
        if message is None or self.failure or self.fault:
            code = self.fault.code if self.fault else WireCode.BACKEND
            self.server.stats.ended[code.name.lower()] += 1
            await self.link.abort(code, self.fault.detail if self.fault else self.failure)
            return
        await self.link.send(message)
        await self.server.await_ack(self.link, self.ask)

    # --------------------------------------------------------------------------------------------------- waiting

    def notify(self) -> None:
        self._wake.set()
        self._wake = trio.Event()

    async def _changed(self, until: float | None = None) -> bool:
        """Wait for news; False when `until` (trio time) came first."""
        wake = self._wake
        with trio.move_on_at(float("inf") if until is None else until):
            await wake.wait()
            return True
        return False


def result_key(channel_id: bytes, job_id: bytes, part: int) -> Hash32:
    """Key of a kept result. Job ids are the clients' choice, so the channel is in it: nobody can take another's name."""
    return Hash32(keccak256(bytes(channel_id) + bytes(job_id) + part.to_bytes(4)))


def _if_it_fits(keeping: Work[None]) -> Work[None]:
    """Keeping a result is a courtesy; the receipt that is journaled with it is not to be lost over it."""

    def work(connection: sqlite3.Connection) -> None:
        try:
            keeping(connection)
        except (ResultsFull, ResultConflict) as error:
            log.error("a result is not kept: %s", error)

    return work


__all__ = ["JobServer", "KeptResult", "ServeSettings", "Stats", "result_key"]
