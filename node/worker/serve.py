"""One job stream, one task: ask -> admission -> the part (`node.worker.part`) -> ack.

Rules
- The server owns what its streams share: the places, what is kept for clients that come back, the vouchers of a channel
  (`vouchers.py`), the runtime's attention (`preparing.py`).
- A part has its place from before its prompt is looked at to its receipt; it is served once at a time, and charged for once.
- A stream ends by itself whatever its peer does; only the failure of our own journal or signer is raised.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from node.network.drive import JobStream
from node.ports import Backend, ByteStream, Prompt, Signer, StreamClosed, TaskBackend, TaskInput
from node.store.channels import ChannelBook
from node.store.meter import Meter
from node.store.results import Results
from node.worker.accepted import AcceptedAssets
from node.worker.desk import OfferDesk
from node.worker.kept import KeptResult, chunks, result_key
from node.worker.part import ServedPart
from node.worker.preparing import Preparing
from node.worker.tenants import Tenants
from node.worker.vouchers import Vouchers
from protocol.admission import Checked, Load, Rejected, check_ask, check_prompt
from protocol.channel import ChannelState
from protocol.claiming import PATIENCE
from protocol.errors import RefusalReason, RemoteProtocolError
from protocol.ids import ChannelId, JobId
from protocol.job import JobWorker, Terms, ask_struct
from protocol.messages import (
    AskMessage,
    Refuse,
)
from protocol.payment import exposure
from protocol.tasks import Task, TaskRequest, task_of
from protocol.typed_data import MARKET_DOMAIN, Refusal

log = logging.getLogger(__name__)


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
        self._preparing = Preparing(backend, tasks)
        self.vouchers = Vouchers(
            accepted=accepted,
            book=book,
            meter=meter,
            results=results,
            wake=self.wake,
            ack_ms=settings.ack_ms,
            now_ms=now_ms,
        )
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
                await self._preparing.check_format(ask)
                work = await self._preparing.prepare(ask)
                if isinstance(work, Prompt):
                    work = replace(work, salt=self.tenants.salt(checked.channel.config.payer))
                    await self._make_room(work, ask.params.max_tokens)
                serving = ServedPart(self, link, checked, work, self._agree(checked, part, work))
                receipt = await serving.run()
            await serving.conclude(receipt)  # the place is free: who is slow to acknowledge holds up nobody
        except Rejected as no:
            await self._refuse(link, ask, no)
        finally:
            self.vouchers.forget(ask)
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
        await self.vouchers.until_ack(link, ask)
