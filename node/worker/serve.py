"""One job stream, one task: ask -> admission -> the part (`node.worker.part`) -> ack.

The server owns what its streams share: the places, the vouchers of a channel, what is kept for clients that come back. A stream
ends by itself whatever its peer does; only the failure of our own journal or signer is raised.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec
import trio
from msgspec import UnsetType

from node.errors import InputInvalid, ModelError, PromptInvalid
from node.network.drive import JobStream
from node.ports import Backend, ByteStream, Prompt, Signer, StreamClosed, TaskBackend, TaskInput
from node.store.channels import ChannelBook
from node.store.meter import Meter
from node.store.results import Results
from node.worker.accepted import AcceptedAssets
from node.worker.desk import OfferDesk
from node.worker.kept import KeptResult, chunks, result_key
from node.worker.part import ServedPart
from node.worker.tenants import Tenants
from protocol.admission import Checked, Load, Rejected, check_ask, check_prompt
from protocol.channel import ChannelState, VoucherAdded
from protocol.claiming import PATIENCE
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode
from protocol.ids import ChannelId, JobId, ModelId
from protocol.job import JobWorker, Terms, ask_struct
from protocol.keys import require_signer
from protocol.messages import Ack, AskMessage, Refuse, VoucherMessage, amount_from_wire
from protocol.payment import crumb, exposure, needless
from protocol.tasks import ChatRequest, Task, TaskRequest, task_of
from protocol.typed_data import MARKET_DOMAIN, Refusal, Voucher

log = logging.getLogger(__name__)
_CRUMBS = 4
"""Vouchers of less than a quarter tick that one part may add."""


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
    chain_age_limit_ms: int = 60_000


@dataclass(slots=True)
class Stats:
    """Counters for `status`."""

    accepted: int = 0
    finished: int = 0
    output_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    """How parts ended, by finish reason or wire code."""


class Lodger(Protocol):
    """Work that gives way to streams (`node.worker.batch_run`)."""

    @property
    def active(self) -> int:
        """Places it uses now."""

    def step_back(self) -> None:
        """A stream has taken a place."""

    async def make_way(self, fits: Callable[[], bool]) -> bool:
        """Free memory until `fits`."""


class JobServer:
    """Serves `/gristmill/job/3`."""

    def __init__(
        self,
        *,
        key: Signer,
        accepted: AcceptedAssets,
        book: ChannelBook,
        results: Results,
        backend: Backend,
        tasks: TaskBackend | None,
        desk: OfferDesk,
        meter: Meter,
        settings: ServeSettings,
        now_ms: Callable[[], int],
        chain_age_ms: Callable[[ChannelState], int],
        tenants: Tenants,
    ) -> None:
        self.key = key
        self.accepted = accepted
        self.book = book
        self.results = results
        self.backend = backend
        self.tasks = tasks
        self.desk = desk
        self.meter = meter
        self.settings = settings
        self.now_ms = now_ms
        self.chain_age_ms = chain_age_ms
        self.tenants = tenants
        self.stats = Stats()
        self.draining = False
        self.busy = 0
        """Parts under way, those included that only wait for their ack."""
        self._parts: set[tuple[ChannelId, JobId, int]] = set()
        self._serving: set[ServedPart] = set()
        self._compiling = trio.CapacityLimiter(1)
        self._preparing = trio.CapacityLimiter(4)
        """Long prompts at once: what they wait for must not be all threads that there are."""
        self._crumbs: Counter[tuple[ChannelId, JobId, int]] = Counter()
        self.lodger: Lodger | None = None
        """Whoever uses free places until a stream comes."""

    @property
    def live(self) -> int:
        """Parts that have a place now."""
        return len(self._parts)

    @property
    def free_slots(self) -> int:
        if self.draining:
            return 0
        lent = self.lodger.active if self.lodger else 0
        return min(self.settings.max_streams - len(self._parts), self.backend.free_slots + lent)

    @property
    def offered_slots(self) -> int:
        """What the offer says: places for whatever has more of them."""
        other = self.tasks.free_slots if self.tasks and not self.draining else 0
        return max(self.free_slots, min(self.settings.max_streams - len(self._parts), other))

    def _places(self, request: TaskRequest) -> int:
        """Places for a request of this kind: chats and other tasks run in different runtimes."""
        if task_of(request) is Task.CHAT or self.draining:
            return self.free_slots
        return min(self.settings.max_streams - len(self._parts), self.tasks.free_slots if self.tasks else 0)

    def wake(self, channel_id: ChannelId) -> None:
        """What is paid or booked on one stream of a channel may let the others go on."""
        for serving in self._serving:
            if serving.channel_id == channel_id:
                serving.notify()

    async def handle(self, stream: ByteStream) -> None:
        """One stream. Ends normally whatever the peer does; only the failure of our own journal or signer is raised."""
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

    def load(self, asking: ChannelState | None, request: TaskRequest) -> Load:
        """How busy we are for this request, seen from one channel; from one that we do not know there is nothing to see of chain
        and credit."""
        accepted = None if asking is None else self.accepted.of(asking)
        in_use = age = 0
        if asking is not None and accepted is not None:
            credit = self.accepted.credit(asking)
            same = (
                s for s in self.book.at_risk if s.channel_id != asking.channel_id and self.accepted.of(s) is accepted
            )
            in_use = sum(exposure(s, credit) for s in same)
            age = self.chain_age_ms(asking)
        return Load(
            free_slots=self._places(request),
            draining=self.draining,
            credit_in_use=in_use,
            credit_limit=0 if accepted is None else accepted.credit_limit,
            chain_age_ms=age,
            chain_age_limit_ms=self.settings.chain_age_limit_ms,
        )

    def blind(self, channel_id: ChannelId) -> bool:
        """Whether the channel has been out of sight for so long that work under way on it must end.

        New work is refused earlier. What runs was covered when it was last seen, and its money cannot leave before the delay has
        passed: a quarter of it is waited for, so that three are left to claim in.
        """
        state = self.book.channels[channel_id]
        limit = max(self.settings.chain_age_limit_ms, state.config.withdraw_delay * 1000 // PATIENCE)
        return self.chain_age_ms(state) > limit

    async def _answer(self, link: JobStream[JobWorker], ask: AskMessage) -> None:
        self.busy += 1
        try:
            kept = self._kept(ask)
            if kept is not None:
                await self._serve_again(link, ask, kept)
                return
            checked = self._check(ask)
            with self._slot((checked.channel.channel_id, JobId(ask.job_id), ask.part)) as part:
                await self._check_format(ask)
                work = await self._prepare(ask)
                if isinstance(work, Prompt):
                    work = replace(work, salt=self.tenants.salt(checked.channel.config.payer))
                    await self._make_room(work, ask.params.max_tokens)
                serving = ServedPart(self, link, checked, work, self._agree(checked, part, work))
                receipt = await serving.run()
            await serving.conclude(receipt)  # the place is free: who is slow to acknowledge holds up nobody
        except Rejected as no:
            await self._refuse(link, ask, no)
        finally:
            self._crumbs.pop((ChannelId(ask.channel_id), JobId(ask.job_id), ask.part), None)
            self.busy -= 1

    def _check(self, ask: AskMessage) -> Checked:
        channel = self._channel(ask)
        return check_ask(
            ask,
            worker=self.key.address,
            offers=self.desk.valid,
            channel=channel,
            load=self.load(channel, ask.request),
            now_ms=self.now_ms(),
        )

    def _channel(self, ask: AskMessage) -> ChannelState | None:
        channel_id = ChannelId(ask.channel_id)
        if channel_id in self.book.quarantined:
            raise Rejected(RefusalReason.CHANNEL_CLOSING, "what the contract says of the channel breaks a rule")
        if channel_id in self.book.frozen:
            raise Rejected(RefusalReason.CHANNEL_CLOSING, "this worker has lost its books of the channel; open another")
        return self.book.get(channel_id)

    def _agree(self, checked: Checked, part: tuple[ChannelId, JobId, int], work: Prompt | TaskInput) -> Terms:
        if part in self.book.cut_off:
            raise Rejected(RefusalReason.DUPLICATE_JOB, "this part was cut off by a crash and is charged for")
        channel = self.book.channels[checked.channel.channel_id]
        terms = check_prompt(
            replace(checked, channel=channel),
            len(work.token_ids) + len(checked.ask.resume) if isinstance(work, Prompt) else work.units,
            running=self.meter.running(channel.channel_id),
            load=self.load(channel, checked.ask.request),
        )
        if isinstance(work, Prompt) and not self.backend.fits(work, checked.ask.params.max_tokens):
            raise Rejected(RefusalReason.BUSY, "no memory is free for a job of this size")
        return terms

    async def _make_room(self, prompt: Prompt, max_tokens: int) -> None:
        """Before anything makes way for it: what could never fit is not to be asked for again. Raises `Rejected`."""
        count = len(prompt.token_ids)
        if not self.backend.could_fit(prompt.model, count + max_tokens):
            raise Rejected(
                RefusalReason.CONTEXT_EXCEEDED,
                f"{count} prompt tokens and {max_tokens} to generate are more than this worker's memory holds",
            )
        if self.lodger:
            await self.lodger.make_way(lambda: self.backend.fits(prompt, max_tokens))

    async def _check_format(self, ask: AskMessage) -> None:
        wanted = ask.params.response_format
        if isinstance(wanted, UnsetType):
            return
        try:
            check = self.backend.check_format
            await trio.to_thread.run_sync(check, ModelId(ask.model_id), wanted, ask.resume, limiter=self._compiling)
        except PromptInvalid as error:
            raise Rejected(RefusalReason.UNSUPPORTED_PARAM, f"response_format: {error.message}"[:300]) from None
        except ModelError as error:
            log.error("the model runtime cannot take a grammar: %s", error)
            raise Rejected(RefusalReason.INTERNAL, "the model runtime failed") from None

    async def _prepare(self, ask: AskMessage) -> Prompt | TaskInput:
        """Tokenise; what is long, in a thread, and what comes meanwhile too: a template is rendered for one at a time, and the
        loop must not wait for its turn. Raises `Rejected`."""
        model, request = ModelId(ask.model_id), ask.request
        try:
            if isinstance(request, ChatRequest):
                if model not in self.backend.models:  # it was when the offer was signed
                    raise Rejected(RefusalReason.BUSY, "the model is not in service now")
                short = sum(len(m.content) for m in request.messages) < 16_384
                if short and not self._preparing.borrowed_tokens:
                    return self.backend.prepare(model, request.messages)
                prepare = self.backend.prepare
                return await trio.to_thread.run_sync(prepare, model, request.messages, limiter=self._preparing)
            if self.tasks is None:
                raise Rejected(RefusalReason.TASK_UNSUPPORTED, "only chats are served here")
            return await trio.to_thread.run_sync(self.tasks.prepare, model, request)
        except PromptInvalid as error:
            raise Rejected(RefusalReason.PROMPT_INVALID, str(error)[:300]) from None
        except InputInvalid as error:
            raise Rejected(RefusalReason.INPUT_INVALID, str(error)[:300]) from None
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
            if self.lodger:
                self.lodger.step_back()
            yield part
        finally:
            self._parts.discard(part)

    async def _refuse(self, link: JobStream[JobWorker], ask: AskMessage, no: Rejected) -> None:
        self.stats.refused[no.reason.code] += 1
        at = self.now_ms()
        signature = await self.key.sign(Refusal(JobId(ask.job_id), int(no.reason), at), MARKET_DOMAIN)
        offer = None if self.draining else await self.desk.current()
        await link.send(Refuse(reason=no.reason, detail=no.detail[:500], at=at, signature=signature, offer=offer))

    def _kept(self, ask: AskMessage) -> KeptResult | None:
        """The result of this ask. Raises `Rejected` for another ask under the same name: a part is charged for once."""
        raw = self.results.get(result_key(ask.channel_id, ask.job_id, ask.part))
        if raw is None:
            return None
        kept = msgspec.msgpack.decode(raw, type=KeptResult)
        if kept.ask != ask_struct(ask).struct_hash():
            raise Rejected(RefusalReason.DUPLICATE_JOB, "this part was served for another ask")
        if kept.streamed:
            raise Rejected(RefusalReason.DUPLICATE_JOB, "this part was served; what followed its ask is not kept")
        return kept

    async def _serve_again(self, link: JobStream[JobWorker], ask: AskMessage, kept: KeptResult) -> None:
        """The same result for the same ask: nothing runs, nothing is charged twice."""
        await link.send(kept.accept)
        for chunk in chunks(kept):
            await link.send(chunk)
        await link.send(kept.receipt)
        await self.await_ack(link, ask)

    async def await_ack(self, link: JobStream[JobWorker], ask: AskMessage, tick: int | None = None) -> None:
        """After the receipt: take the vouchers that still come; an ack lets the result go. `tick` as in `take_voucher`."""
        with trio.move_on_after(self.settings.ack_ms / 1000):
            while not link.machine.over:
                message = await link.receive()
                if isinstance(message, VoucherMessage | Ack):
                    await self.take_voucher(ask, message, tick)
                if isinstance(message, Ack):
                    key = result_key(ask.channel_id, ask.job_id, ask.part)
                    await self.results.acknowledge(key, now_ms=self.now_ms())

    async def take_voucher(self, ask: AskMessage, message: VoucherMessage | Ack, tick: int | None = None) -> None:
        """Book it if it is the highest so far; on a channel with several streams another one may have been faster.

        The journal only grows, so a stream's vouchers must be worth their records: one that nothing needs is passed over,
        and one that adds a crumb is the client's fault, but for a few (the two sides may count differently for a moment).
        An ack is the last of its stream and may add anything. `tick`: the least of the part, where it is still known.
        Raises `RemoteProtocolError`.
        """
        channel_id = ChannelId(ask.channel_id)
        cumulative = amount_from_wire(message.cumulative)
        state = self.book.channels[channel_id]
        if isinstance(message, VoucherMessage) and state.cumulative < cumulative <= state.ceiling:
            if needless(state):
                return
            tick = self.accepted.tick(state) if tick is None else tick
            if crumb(state, self.meter.running(channel_id), cumulative, tick):
                part = (channel_id, JobId(ask.job_id), ask.part)
                self._crumbs[part] += 1
                if self._crumbs[part] > _CRUMBS:
                    raise RemoteProtocolError(
                        WireCode.BAD_VOUCHER, f"vouchers that add {cumulative - state.cumulative}: pay by the tick"
                    )
        if cumulative > state.cumulative:
            voucher = Voucher(channel_id, cumulative)
            require_signer(voucher.digest(state.home), message.signature, state.config.payer_authorizer, "voucher")
            await self.book.change([VoucherAdded(channel_id, cumulative, message.signature)])
        self.wake(channel_id)
