"""Runs the inputs of batch jobs through the model: the job with the nearest deadline first, live streams before any.

Rules
- Only what the contract has locked is computed (B8): the keeper says so, look by look, by `want`.
- Finished items are on disk in pieces, so a restart goes on where they end; progress is not money, so it is not in the journal.
- The result is durable before the journal has its hash and claim, and that before anything is signed. There is one, ever (B2).
- Live streams come first: a batch item never takes a place that a stream could have, steps back when one comes, and pauses while
  any runs, unless its own deadline presses.
- A small part of the time is the batch jobs' all the same (`share`), so that streams without end do not make them wait for their
  deadlines: one item at once, one more than there are places where streams have them all. Memory stays the streams'.
- What an item has said when it steps back is not computed again: it goes on from there, as a stream would elsewhere.
- A job that cannot be done is given up while that still can be said (`batch_pace.hopeless`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import trio

from node.errors import ModelError, PromptInvalid
from node.ports import Backend, Prompt
from node.store.batch import BatchBook
from node.store.errors import ResultConflict, ResultsFull
from node.store.results import KEEP_MS, Results
from node.worker.batch_job import Begun, Piece, RunningJob, piece_key, pieces_of
from node.worker.batch_pace import Pace, Share, hopeless, pressed
from node.worker.batch_quotes import HeldQuote, parts_of, spec_key
from node.worker.tenants import Tenants
from protocol.batch import BatchGivenUp, BatchResultKept, BatchState
from protocol.errors import InvalidValue, ProtocolError
from protocol.escrow import JobState
from protocol.ids import JobId, ModelId
from protocol.typed_data import Domain
from protocol.workload import (
    NOT_BEGUN,
    BatchResult,
    ResultItem,
    claim_of,
    content_hash,
    encode_result,
    read_result,
)

log = logging.getLogger(__name__)
TRIES: Final = 3
"""How often an item may fail in the runtime before the job is given up."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    streams: int = 2
    """Items at once, over all jobs."""
    share: float = 0.1
    """Part of the time, 0 to 1, in which an item goes on although live streams run."""
    margin_s: int = 120
    """Before the deadline by which the result must be there."""
    piece_items: int = 16
    """Finished items that make a piece on disk ..."""
    piece_s: float = 5.0
    """... or those that have waited so long."""
    pause_s: float = 0.25
    """How often a paused item looks whether it may go on."""
    quiet_s: float = 0.5
    """How long nothing begins after memory was freed for a live stream."""


class BatchRunner:
    """`chain_now`: chain seconds, by Jobs contract. `streams_live`: live streams being served. `places`: how many the model
    runtime has in all. `least`: what a job like this has to bring."""

    def __init__(
        self,
        *,
        book: BatchBook,
        results: Results,
        backend: Backend,
        settings: RunSettings,
        now_ms: Callable[[], int],
        chain_now: Callable[[Domain], int],
        streams_live: Callable[[], int],
        places: int,
        tenants: Tenants,
        seconds_per_item: Callable[[ModelId, int], float] = lambda model, tokens: 0.0,
        least: Callable[[BatchState], int] = lambda state: 0,
    ) -> None:
        self._book = book
        self._results = results
        self._backend = backend
        self._settings = settings
        self._now_ms = now_ms
        self._chain_now = chain_now
        self._streams_live = streams_live
        self._places = places
        self._tenants = tenants
        self._seconds_per_item = seconds_per_item
        self._least = least
        self._jobs: dict[JobId, RunningJob] = {}
        self._broken: dict[JobId, str] = {}
        """Jobs that cannot even begin, and why."""
        self._quiet_until = -1e9
        """No item begins before: memory that was freed for a stream is not to be taken back at once."""
        self._share = Share(settings.share)
        self._wake = trio.Event()

    # ------------------------------------------------------------------------------------------------------- for others

    def want(self, state: BatchState) -> None:
        """The contract has locked this job's amount and there is no result yet: compute. Said again at each look."""
        if state.job_id in self._jobs or state.job_id in self._broken or state.result is not None or state.failure:
            return
        try:
            self._jobs[state.job_id] = self._take_up(state)
        except (ModelError, ProtocolError, msgspec.MsgspecError) as error:
            self._broken[state.job_id] = f"it cannot be taken up: {error}"
        self.notify()

    def look(self, job_id: JobId) -> None:
        """Something about a job has changed."""
        self.notify()

    def done(self, job_id: JobId) -> int:
        """Items that are finished."""
        job = self._jobs.get(job_id)
        return len(job.items) if job else 0

    def has(self, job_id: JobId) -> bool:
        """Whether the job is taken up: then it is in `backlog_s`."""
        return job_id in self._jobs

    @property
    def active(self) -> int:
        """Items being computed now."""
        return sum(len(job.running) for job in self._jobs.values())

    @property
    def backlog_s(self) -> float:
        """Seconds of work that the jobs taken up still mean, as far as one can tell."""
        return sum(self._pace(job).needed_s for job in self._jobs.values())

    def notify(self) -> None:
        self._wake.set()
        self._wake = trio.Event()

    def step_back(self) -> None:
        """A live stream has taken a place: give up those that are not ours any more."""
        while self.active > self._allowed and self._drop_one():
            pass
        self.notify()

    async def make_way(self, fits: Callable[[], bool]) -> bool:
        """Free memory for a live stream, item by item, the newest of the least urgent job first. False when that was not
        enough."""
        while not fits():
            self._quiet_until = trio.current_time() + self._settings.quiet_s
            if not self._drop_one():
                return fits()
            with trio.move_on_after(1):
                while not fits():
                    await trio.sleep(0.005)
        return True

    # ---------------------------------------------------------------------------------------------------------- the loop

    async def run(self) -> None:
        """For as long as the worker lives. Raises `LedgerError`."""
        async with trio.open_nursery() as nursery:
            while True:
                wake = self._wake  # before we look, so that news in between is not missed
                for job_id, reason in list(self._broken.items()):
                    await self._give_up(job_id, reason)
                for job in sorted(self._jobs.values(), key=lambda job: job.deadline):
                    await self._advance(job, nursery)
                with trio.move_on_after(1.0):
                    await wake.wait()

    async def _advance(self, job: RunningJob, nursery: trio.Nursery) -> None:
        state = self._book.jobs[job.job_id]
        open_still = state.chain in (JobState.OPEN, JobState.NONE) and not state.void
        if not open_still or state.result is not None or state.failure:
            self._drop(job)  # settled, refunded or done while we computed
            await self._book.change([], also=self._results.forgetting(pieces_of(job)))
            return
        hindrance = self._hindrance(job)
        try:
            if len(job.items) == job.total or (state.cancelled and job.items and (hindrance or self._pays(job, state))):
                await self._conclude(job)
            elif hindrance:
                await self._give_up(job.job_id, hindrance)
            elif state.chain is JobState.OPEN:
                await self._keep(job)
                await self._save(job)
                # A cancelled job goes on, one by one, until it is worth its transactions.
                while job.waiting and self.active < self._allowed and not (state.cancelled and job.running):
                    self._start(job, nursery)
        except (ResultsFull, ResultConflict, InvalidValue) as error:
            await self._give_up(job.job_id, f"the result cannot be kept: {error}")

    def _hindrance(self, job: RunningJob) -> str:
        """Why the job will never be done; empty as long as it may."""
        if job.failures >= TRIES:
            return "the model runtime failed"
        if hopeless(self._pace(job), self._time_left(job)):
            return f"{len(job.items)} of {job.total} inputs are done, time is too short"
        return ""

    def _pays(self, job: RunningJob, state: BatchState) -> bool:
        """Whether what is done of a cancelled job brings what the least job has to: its gas is spent, whoever cancels it."""
        return claim_of(state.terms, self._items(job)) >= self._least(state)

    def _items(self, job: RunningJob) -> tuple[ResultItem, ...]:
        return tuple(job.items.get(index, NOT_BEGUN) for index in range(job.total))

    @property
    def _allowed(self) -> int:
        """Items that may run now. One place stays free for the next stream, where there is more than one; the item that goes on
        in the share of streams' time needs none."""
        if trio.current_time() < self._quiet_until:
            return 0
        free = self._places - self._streams_live() - (1 if self._places > 1 else 0)
        return max(1 if self._settings.share else 0, min(self._settings.streams, free))

    def _start(self, job: RunningJob, nursery: trio.Nursery) -> None:
        index = job.waiting.popleft()
        scope = job.running[index] = trio.CancelScope()
        nursery.start_soon(self._item, job, index, scope)

    async def _item(self, job: RunningJob, index: int, scope: trio.CancelScope) -> None:
        item: ResultItem | None = None
        try:
            with scope:
                item = await self._compute(job, index)
        except (ModelError, PromptInvalid) as error:
            log.error("input %d of batch job %s failed: %s", index, job.job_id, error)
            job.failures += 1
            job.begun.pop(index, None)  # from its beginning: what it had said may be what it failed of
        finally:
            job.running.pop(index, None)
        if item is None:
            job.waiting.appendleft(index)
        else:
            job.items[index] = item
            begun = job.begun.pop(index)
            job.finished += 1 - begun.lent / max(begun.steps, 1)
            if not job.unsaved:
                job.unsaved_since = trio.current_time()
            job.unsaved.append(index)
        self.notify()

    async def _compute(self, job: RunningJob, index: int) -> ResultItem | None:
        """None when there is no memory for it now."""
        prompt = await trio.to_thread.run_sync(self._prepare, job, index)
        begun = job.begun.setdefault(index, Begun())
        async with aclosing(self._backend.generate(prompt, job.spec.params, tuple(begun.ids))) as steps:
            fits = False
            while True:
                async with self._turn(job) as lent:
                    fits = fits or self._backend.fits(prompt, job.spec.params.max_tokens)
                    step = await anext(steps, None) if fits else None
                if not fits:
                    await trio.sleep(self._settings.pause_s)
                    return None
                if step is None:
                    raise ModelError("the runtime ended without a reason of the model's")
                begun.ids.extend(step.token_ids)
                begun.text.append(step.text)
                begun.steps, begun.lent = begun.steps + 1, begun.lent + lent
                if step.finish_reason is not None:
                    return ResultItem(tuple(begun.ids), "".join(begun.text), step.finish_reason)

    @asynccontextmanager
    async def _turn(self, job: RunningJob) -> AsyncIterator[bool]:
        """Around each step. While live streams run, this item waits, unless its deadline presses: the engine goes on without it.
        True: it is a step in the share of the streams' time."""
        lent, pause = False, self._settings.pause_s
        while self._streams_live() and not pressed(self._pace(job), self._time_left(job)):
            now = trio.current_time()
            if lent := self._share.take(now):
                break
            await trio.sleep(min(pause, self._share.rest(now) or pause))
        if not lent:
            job.computes(+1)
        try:
            yield lent
        finally:
            if lent:
                self._share.give(trio.current_time())
            else:
                job.computes(-1)

    def _prepare(self, job: RunningJob, index: int) -> Prompt:
        prompt = self._backend.prepare(ModelId(job.spec.model_id), job.spec.prompt(index))
        return replace(prompt, salt=job.salt)

    # ------------------------------------------------------------------------------------------------------ on the disk

    def _take_up(self, state: BatchState) -> RunningJob:
        """A job from its specification and what is on disk of its result. Raises `ModelError`, or what reading raises."""
        raw = self._results.get(spec_key(state.job_id))
        if raw is None:
            raise ModelError("its specification is not on disk")
        _, _, spec = parts_of(msgspec.msgpack.decode(raw, type=HeldQuote))
        ends_in = state.quote.deadline + state.quote.window - self._chain_now(state.domain)
        until_ms = self._now_ms() + ends_in * 1000 + KEEP_MS
        guess_s = self._seconds_per_item(ModelId(spec.model_id), spec.params.max_tokens)
        salt = self._tenants.salt(state.quote.client)
        job = RunningJob(state.job_id, state.domain, spec, state.quote.deadline, until_ms, guess_s, salt)
        whole = self._results.get(bytes(state.job_id))
        if whole is not None:  # we died between the bytes and the journal: these bytes are the result, no others
            job.items.update(enumerate(read_result(whole).items))
            return job
        while (piece := self._results.get(piece_key(state.job_id, job.pieces))) is not None:
            job.items.update(msgspec.msgpack.decode(piece, type=Piece))
            job.pieces += 1
        job.waiting.extend(index for index in range(job.total) if index not in job.items)
        if job.items:
            log.info("batch job %s goes on: %d of %d inputs are done", job.job_id, len(job.items), job.total)
        return job

    async def _keep(self, job: RunningJob) -> None:
        """Once the contract has locked its amount, a specification is kept until the job's end. Raises `LedgerError`."""
        if not job.kept:
            await self._results.extend(spec_key(job.job_id), job.until_ms)
            job.kept = True

    async def _save(self, job: RunningJob) -> None:
        """Put finished items on disk, some at a time. Raises `LedgerError`."""
        old = job.unsaved and trio.current_time() >= job.unsaved_since + self._settings.piece_s
        if len(job.unsaved) < self._settings.piece_items and not old:
            return
        indexes, job.unsaved = job.unsaved, []
        piece: Piece = tuple((index, job.items[index]) for index in indexes)
        key, number = piece_key(job.job_id, job.pieces), job.pieces
        job.pieces = number + 1
        await self._results.put(key, msgspec.msgpack.encode(piece), job.until_ms, now_ms=self._now_ms())

    async def _conclude(self, job: RunningJob) -> None:
        """The result becomes durable, then what the journal says of it; the pieces go with that. Raises `LedgerError`."""
        for scope in list(job.running.values()):
            scope.cancel()
        state = self._book.jobs[job.job_id]
        items = self._items(job)
        raw = encode_result(BatchResult(spec_hash=bytes(state.quote.spec_hash), items=items))
        now = self._now_ms()
        kept = BatchResultKept(
            job.job_id, content_hash(raw), claim_of(state.terms, items), len(raw), self._chain_now(job.domain)
        )
        # First the bytes, because a full store may refuse them; a journaled result must not be refused any more.
        await self._results.put(bytes(job.job_id), raw, job.until_ms, now_ms=now)
        forget = self._results.forgetting(pieces_of(job))
        await self._book.change([kept], also=forget)
        log.info("batch job %s is done: %d inputs, %d bytes", job.job_id, job.total, len(raw))
        self._drop(job)

    async def _give_up(self, job_id: JobId, reason: str) -> None:
        log.error("batch job %s is given up: %s", job_id, reason)
        job = self._jobs.get(job_id)
        if job:
            self._drop(job)
        self._broken.pop(job_id, None)
        leaves = [spec_key(job_id), *(pieces_of(job) if job else ())]
        await self._book.change([BatchGivenUp(job_id, reason[:200])], also=self._results.forgetting(leaves))

    # ------------------------------------------------------------------------------------------------------------ pieces

    def _drop(self, job: RunningJob) -> None:
        for scope in list(job.running.values()):
            scope.cancel()
        self._jobs.pop(job.job_id, None)

    def _drop_one(self) -> bool:
        """Stop the newest item of the least urgent job; False when none runs."""
        for job in sorted(self._jobs.values(), key=lambda job: -job.deadline):
            for index in reversed(job.running):
                if not job.running[index].cancel_called:
                    job.running[index].cancel()
                    del job.running[index]
                    return True
        return False

    def _time_left(self, job: RunningJob) -> float:
        return job.deadline - self._settings.margin_s - self._chain_now(job.domain)

    def _pace(self, job: RunningJob) -> Pace:
        busy = job.busy_s + (trio.current_time() - job.busy_since if job.busy else 0.0)
        return Pace(job.total - len(job.items), job.finished, busy, job.guess_s)
