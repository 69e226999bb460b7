"""The book of batch jobs: every job's state, journaled before anyone hears of it; and the one way in for what the contract says.

`change` applies in memory and queues the record in one synchronous step, so the journal's order is the order of application; it
returns when the record is durable, and only then may the caller sign or send. At start the book is the fold of the journal (B1).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import trio

from node.errors import ChainError
from node.ports import Jobs, TxResult
from node.store.ledger import Entry, Ledger
from node.store.signed import SIGNED, read_word
from node.store.writer import Work
from protocol.batch import (
    BatchOrdered,
    BatchSeen,
    BatchState,
    Change,
    Step,
    apply,
    check_label,
    fold,
    ordered,
    sight_of,
)
from protocol.channel import Role
from protocol.errors import LocalProtocolError
from protocol.escrow import JobState
from protocol.ids import JobId
from protocol.records import BATCH_KINDS, decode_batch, kind_of, to_body
from protocol.signing import MarkKey

log = logging.getLogger(__name__)
Leaves = Callable[[BatchState], Work[object]]


class BatchBook:
    """All batch jobs of one role in one journal."""

    def __init__(self, ledger: Ledger, role: Role, leaves: Leaves | None = None) -> None:
        """`leaves`: what a job that has ended leaves behind and is to go with the record of its end."""
        self.ledger = ledger
        self._leaves = leaves
        self.role = role
        self._states: dict[JobId, BatchState] = {}
        self._sights: dict[JobId, trio.Lock] = {}
        self._turns: dict[JobId, trio.Lock] = {}
        self.quarantined: dict[JobId, str] = {}
        """Jobs whose last sight of the contract breaks a rule, and why: nothing is done for them until one can be taken."""
        self.signed: set[MarkKey] = set()
        """What we have signed about them, as far as the journal has it on record."""
        self._news = trio.Event()

    @classmethod
    def restore(cls, ledger: Ledger, role: Role, leaves: Leaves | None = None) -> BatchBook:
        """Fold the journal. Raises `LocalProtocolError` when it breaks a rule: then nothing is signed."""
        book = cls(ledger, role, leaves)
        for record in ledger.records(prefix="batch_"):
            if record.kind in BATCH_KINDS:
                fold(role, book._states, decode_batch(record.kind, record.body))
            elif record.kind == SIGNED:
                book.signed.add(read_word(record.subject, record.body).key)
        return book

    @property
    def jobs(self) -> Mapping[JobId, BatchState]:
        return self._states

    @property
    def running(self) -> list[BatchState]:
        """Jobs whose money is not settled yet."""
        return [state for state in self._states.values() if not state.ended]

    def get(self, job_id: bytes) -> BatchState | None:
        return self._states.get(JobId(job_id))

    def named(self, label: str) -> BatchState | None:
        """Client: the last job of that name."""
        found = None
        for state in self._states.values():
            if state.label == label and (found is None or not state.void):
                found = state
        return found

    async def change(self, changes: Sequence[Change], *, also: Work[object] | None = None) -> None:
        """Apply and journal, all or none. Raises `ProtocolError` (nothing changed) or `LedgerError` (nothing is to be said).

        `also` may not refuse: what is applied here cannot be taken back, so it has to reach the journal.
        """
        staged: dict[JobId, BatchState] = {}
        for change in changes:
            held = staged.get(change.job_id) or self._states.get(change.job_id)
            if isinstance(change, BatchOrdered):
                if held is not None:
                    raise LocalProtocolError(f"job {change.job_id} is ordered already")
                check_label({**self._states, **staged}, change)
                staged[change.job_id] = ordered(self.role, change)
                continue
            if held is None:
                raise LocalProtocolError(f"job {change.job_id} is not in this journal")
            staged[change.job_id] = apply(held, change)
        entries = [Entry(kind_of(c), bytes(c.job_id), to_body(c)) for c in changes]
        if self._leaves:
            ended = (state for job_id, state in staged.items() if state.ended and not self._ended(job_id))
            also = _both([*([also] if also else []), *map(self._leaves, ended)])
        with trio.CancelScope(shield=True):
            self._states.update(staged)
            self.nudge()
            await self.ledger.append(entries, also=also)

    def _ended(self, job_id: JobId) -> bool:
        held = self._states.get(job_id)
        return held is not None and held.ended

    def turn(self, job_id: JobId) -> trio.Lock:
        """Held by whoever sends a transaction about this job."""
        return self._turns.setdefault(job_id, trio.Lock())

    def nudge(self) -> None:
        """Something is new: whoever waits looks again."""
        self._news.set()
        self._news = trio.Event()

    async def changed(self, seconds: float) -> None:
        """Until something is new, for so long at most."""
        with trio.move_on_after(seconds):
            await self._news.wait()


def _both(works: Sequence[Work[object]]) -> Work[object] | None:
    def work(connection: sqlite3.Connection) -> None:
        for one in works:
            one(connection)

    return work if works else None


async def refresh(book: BatchBook, jobs: Jobs, job_id: JobId) -> BatchState:
    """Bring one job up to what the contracts say now. Asking and applying are one step, so that an answer that was slow on
    its way is never applied after a newer one.

    Raises `ChainError`, or `LocalProtocolError` when the sight breaks a rule; then the job is quarantined.
    """
    async with book._sights.setdefault(job_id, trio.Lock()):
        state = book.jobs[job_id]
        sight = await _look(jobs, state)
        if sight != sight_of(book.jobs[job_id]):
            try:
                await book.change([sight])
            except LocalProtocolError as error:
                book.quarantined[job_id] = str(error)
                raise
        book.quarantined.pop(job_id, None)
        return book.jobs[job_id]


async def _look(jobs: Jobs, state: BatchState) -> BatchSeen:
    job = await jobs.job(state.job_id)
    resolve_by, outcome = state.resolve_by, int(state.outcome)
    if job.state is JobState.DISPUTED or (job.state is JobState.SETTLED and state.resolve_by):
        dispute = await jobs.dispute(state.quote)
        resolve_by, outcome = dispute.resolve_by, int(dispute.outcome)
    paid = state.paid
    if job.state is not JobState.SETTLED:
        paid = 0
    elif state.chain is not JobState.SETTLED:
        paid = _believed(state, await jobs.paid(state.quote))
    return BatchSeen(
        state.job_id, int(job.state), job.window_end, job.claimed, job.result_hash, resolve_by, outcome, paid
    )


def _believed(state: BatchState, told: int | None) -> int:
    """What a settlement paid, by its event; where none is told, what it must have paid. It goes into the journal for good, so
    what no settlement can have paid is not believed: raises `ChainError`, and it is asked again."""
    accepted = 0 if state.accepted is None else state.accepted.amount
    if told is None:
        return accepted or state.claimed
    if told > state.quote.amount:
        raise ChainError(
            f"job {state.job_id}: an event says that {told} was paid, the contract had {state.quote.amount}",
            hint="the JSON-RPC server lies, or is broken; compare several: chain.rpc_urls",
        )
    submitted = state.chain in (JobState.SUBMITTED, JobState.DISPUTED)
    if state.role is Role.CLIENT and submitted and told > max(state.claimed, accepted):
        # No reason to wait for ever: after a reorganisation a worker that cheats may have claimed another amount.
        log.warning("job %s: %d was paid, %d was claimed and %d accepted", state.job_id, told, state.claimed, accepted)
    return told


async def send(jobs: Jobs, state: BatchState, step: Step) -> TxResult:
    """The transaction of a step. Raises `ChainError`; a revert is a result with ``ok=False``."""
    quote = state.quote
    match step:
        case Step.OPEN:
            return await jobs.open(quote, state.quote_signature, state.order_signature)
        case Step.SUBMIT if state.result is not None:
            return await jobs.submit(quote, state.result.result_hash, state.result.claimed, b"")
        case Step.SETTLE if state.accepted is not None:
            accepted = state.accepted
            return await jobs.settle(quote, accepted.result_hash, accepted.amount, accepted.signature)
        case Step.FINALIZE:
            return await jobs.finalize(quote)
        case Step.REFUND:
            return await jobs.refund(quote)
        case Step.FAIL:
            return await jobs.fail(quote)
        case Step.RESOLVE:
            return await jobs.resolve_dispute(quote)
        case Step.DISPUTE if state.evidence is not None:
            return await jobs.open_dispute(quote, state.evidence)
        case _:
            raise ChainError(f"{step.value} is no transaction of a {state.chain.name.lower()} job")


TRANSACTIONS: Final = (
    Step.OPEN,
    Step.SUBMIT,
    Step.SETTLE,
    Step.FINALIZE,
    Step.REFUND,
    Step.FAIL,
    Step.RESOLVE,
    Step.DISPUTE,
)


async def transact(
    book: BatchBook, jobs: Jobs, job_id: JobId, planned: Callable[[BatchState], Step | None]
) -> TxResult | None:
    """Look, send the transaction that is due if one is, and look what came of it; one at a time for each job.

    None when none is due. Raises `ChainError`. What the contract refuses is logged and harmless: it was simulated first, and the
    next look says where the job stands.
    """
    async with book.turn(job_id):
        step = planned(await refresh(book, jobs, job_id))
        if step not in TRANSACTIONS or step is None:
            return None
        result = await send(jobs, book.jobs[job_id], step)
        if not result.ok:
            log.info("job %s: %s is refused for now: %s", job_id, step.value, result.error)
        await refresh(book, jobs, job_id)
        return result
