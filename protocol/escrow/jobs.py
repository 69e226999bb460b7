"""Jobs: escrow for batch jobs. A quote's digest is its job; every silence has an end.

    None -- open --> Open -- submit --> Submitted -- settle | finalize --> Settled
                      |                     |
                      |                     +-- dispute --> Disputed -- resolve --> Settled
                      +-- settle --> Settled
                      +-- refund | fail --> Refunded        Submitted -- fail --> Refunded

Signers are recovered by the caller, as in `channels.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocol.escrow import vault, workers
from protocol.escrow.state import Escrow, Job, JobState, Module, put, require
from protocol.ids import ZERO_ADDRESS, ZERO_HASH, Address, Hash32, JobId
from protocol.typed_data import Quote

MIN_WINDOW: Final = 15 * 60
MAX_WINDOW: Final = 7 * 24 * 3600
MAX_DURATION: Final = 30 * 24 * 3600
"""From opening to deadline."""
FAIL_DIVISOR: Final = 4
"""An honest "I failed" before the deadline costs this part of the penalty."""
NO_RESULTS: Final = (ZERO_HASH, Hash32((1).to_bytes(32)))
"""What a result can not be: the contract stores these for "none"."""
TAG: Final = 10
"""Bytes of a result's hash that an acceptance is compared by: the chain reads one slot less, and a client that signed for
another result with this beginning has signed for as much all the same."""


def open_job(
    state: Escrow, now: int, caller: Address, quote: Quote, worker_signer: Address | None, client_signer: Address | None
) -> Escrow:
    """Jobs.open. `worker_signer` of the quote; `client_signer` of Order, not read when the client itself calls."""
    require(ZERO_ADDRESS not in (quote.client, quote.worker), "Jobs_ZeroAddress")
    require(quote.amount > 0, "Jobs_ZeroAmount")
    require(now < quote.valid_before, "Jobs_Expired")
    require(now < quote.deadline <= now + MAX_DURATION, "Jobs_DeadlineOutOfRange")
    require(MIN_WINDOW <= quote.window <= MAX_WINDOW, "Jobs_WindowOutOfRange")
    job_id = quote.job_id(state.jobs_domain)
    require(state.job(job_id).state is JobState.NONE, "Jobs_WrongState")
    require(not workers.is_retired(state, quote.worker), "Jobs_WorkerRetired")
    require(not quote.penalty or _is_worker(state, quote, caller), "Jobs_NotWorker")
    require(worker_signer == quote.worker, "Jobs_BadSignature")
    require(caller == quote.client or client_signer == quote.client, "Jobs_BadSignature")
    state = _put(state, job_id, Job(JobState.OPEN))
    state = vault.lock(state, Module.JOBS, quote.token, quote.client, quote.amount)
    if quote.penalty:
        state = workers.hold(state, now, quote.worker, quote.token, quote.penalty)
    return state


def submit(
    state: Escrow,
    now: int,
    caller: Address,
    quote: Quote,
    result_hash: Hash32,
    claimed: int,
    signer: Address | None,
) -> Escrow:
    """The result is there; the window begins. `signer` of Submission, not read when the worker itself calls."""
    job_id, _ = _in(state, quote, JobState.OPEN)
    require(now < quote.deadline, "Jobs_TooLate")
    require(claimed <= quote.amount, "Jobs_OverAmount")
    require(result_hash not in NO_RESULTS, "Jobs_NoResult")
    require(caller == quote.worker or signer == quote.worker, "Jobs_BadSignature")
    return _put(state, job_id, Job(JobState.SUBMITTED, now + quote.window, claimed, result_hash))


def settle_job(
    state: Escrow,
    now: int,
    caller: Address,
    quote: Quote,
    result_hash: Hash32,
    amount: int,
    signer: Address | None,
) -> Escrow:
    """Jobs.settle: the client accepts. `signer` of Acceptance, not read when the client itself calls."""
    job_id, job = _in(state, quote, JobState.OPEN, JobState.SUBMITTED)
    require(amount <= quote.amount, "Jobs_OverAmount")
    if job.state is JobState.OPEN:
        require(amount == quote.amount, "Jobs_BelowClaimed")
        require(result_hash not in NO_RESULTS, "Jobs_NoResult")
    else:
        require(amount >= job.claimed, "Jobs_BelowClaimed")
        require(result_hash[:TAG] == job.result_hash[:TAG], "Jobs_WrongResult")
    require(caller == quote.client or signer == quote.client, "Jobs_BadSignature")
    result = result_hash if job.state is JobState.OPEN else job.result_hash
    return _end(state, now, quote, job_id, replace(job, result_hash=result), amount)


def finalize(state: Escrow, now: int, quote: Quote) -> Escrow:
    """The window went by in silence: pay what was claimed."""
    job_id, job = _in(state, quote, JobState.SUBMITTED)
    require(now >= job.window_end, "Jobs_TooEarly")
    return _end(state, now, quote, job_id, job, job.claimed)


def refund(state: Escrow, now: int, caller: Address, quote: Quote) -> Escrow:
    """The deadline went by in silence: return everything, slash the penalty; `caller` is the reporter."""
    job_id, _ = _in(state, quote, JobState.OPEN)
    require(now >= quote.deadline, "Jobs_TooEarly")
    return _give_back(state, now, quote, job_id, quote.penalty, caller)


def fail(state: Escrow, now: int, caller: Address, quote: Quote) -> Escrow:
    """The worker gives up: return everything. Before the deadline a part of the penalty is slashed; whoever takes a
    submission back loses all of it, as in a dispute that is lost."""
    job_id, job = _in(state, quote, JobState.OPEN, JobState.SUBMITTED)
    require(job.state is JobState.SUBMITTED or now < quote.deadline, "Jobs_TooLate")
    require(_is_worker(state, quote, caller), "Jobs_NotWorker")
    penalty = quote.penalty // FAIL_DIVISOR if job.state is JobState.OPEN else quote.penalty
    return _give_back(state, now, quote, job_id, penalty, ZERO_ADDRESS)


# ------------------------------------------------------------------------------------------------------ modules only


def dispute(state: Escrow, now: int, quote: Quote) -> Escrow:
    """Stop the window."""
    job_id, job = _in(state, quote, JobState.SUBMITTED)
    require(now < job.window_end, "Jobs_TooLate")
    return _put(state, job_id, replace(job, state=JobState.DISPUTED))


def resolve_job(state: Escrow, now: int, quote: Quote, to_worker: int, penalize: bool) -> Escrow:
    """Jobs.resolve: pay `to_worker`, return the rest, slash the penalty or let it go."""
    job_id, job = _in(state, quote, JobState.DISPUTED)
    require(to_worker <= job.claimed, "Jobs_OverAmount")
    state = _end(state, now, quote, job_id, job, to_worker)
    if penalize:
        state = _slash(state, now, quote, job_id, quote.penalty, quote.client)
    return state


# -------------------------------------------------------------------------------------------------------------- pieces


def _in(state: Escrow, quote: Quote, *allowed: JobState) -> tuple[JobId, Job]:
    job_id = quote.job_id(state.jobs_domain)
    job = state.job(job_id)
    require(job.state in allowed, "Jobs_WrongState")
    return job_id, job


def _is_worker(state: Escrow, quote: Quote, account: Address) -> bool:
    return account in (quote.worker, state.owner_of(quote.worker))


def _put(state: Escrow, job_id: JobId, job: Job) -> Escrow:
    return replace(state, jobs=put(state.jobs, job_id, job))


def _let_go(state: Escrow, quote: Quote) -> Escrow:
    return workers.let_go(state, quote.worker, quote.token, quote.penalty) if quote.penalty else state


def _slash(state: Escrow, now: int, quote: Quote, job_id: JobId, amount: int, reporter: Address) -> Escrow:
    return workers.book_slash(state, now, quote.worker, quote.token, amount, quote.client, reporter, job_id)


def _end(state: Escrow, now: int, quote: Quote, job_id: JobId, job: Job, paid: int) -> Escrow:
    """Settled: `paid` to the worker, the rest to the client."""
    state = _put(state, job_id, Job(JobState.SETTLED, result_hash=job.result_hash))
    state = _let_go(state, quote)
    state = vault.release(state, Module.JOBS, quote.token, state.payout_of(quote.worker), paid)
    return vault.release(state, Module.JOBS, quote.token, quote.client, quote.amount - paid)


def _give_back(state: Escrow, now: int, quote: Quote, job_id: JobId, penalty: int, reporter: Address) -> Escrow:
    """Refunded: everything to the client, and `penalty` out of the stake."""
    state = _put(state, job_id, Job(JobState.REFUNDED))
    state = _let_go(state, quote)
    state = _slash(state, now, quote, job_id, penalty, reporter)
    return vault.release(state, Module.JOBS, quote.token, quote.client, quote.amount)
