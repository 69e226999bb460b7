"""The audit of batch jobs: refold the journal, check what others signed in it, compare it with the contract.

What must hold: every job is its quote's digest, quoted by its worker and ordered by its client; nothing was accepted that was not
verified; the contract paid once, no more than the quote, and what the acceptance or the submission said; and nothing is left
open when its time is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from node.ports import Jobs
from node.store.records import Record
from protocol.batch import BatchAccepted, BatchResultChecked, BatchState, Change, fold
from protocol.channel import Role
from protocol.errors import GristmillError, RemoteProtocolError
from protocol.escrow import JobState
from protocol.ids import JobId
from protocol.keys import recover
from protocol.records import BATCH_KINDS, decode_batch
from protocol.typed_data import Acceptance, Order

GRACE_S = 300
"""How long after a deadline or a window a job may still wait for its transaction."""


def fold_jobs(records: Iterable[Record], role: Role) -> tuple[dict[JobId, BatchState], list[str]]:
    """Where the records lead, and whose words in them do not hold. A record that breaks a rule leads nowhere: no states then."""
    states: dict[JobId, BatchState] = {}
    changes: list[Change] = []
    for record in records:
        if record.kind not in BATCH_KINDS:
            continue
        try:
            change = decode_batch(record.kind, record.body)
            fold(role, states, change)
            changes.append(change)
        except GristmillError as error:
            return {}, [f"record {record.seq} ({record.kind}) breaks a rule: {error}"]
    return states, check_words(changes, states)


def check_words(changes: Iterable[Change], states: Mapping[JobId, BatchState]) -> list[str]:
    """Quotes by their workers, orders and acceptances by their clients; each acceptance of a result that was checked."""
    findings = []
    checked: set[tuple[JobId, bytes]] = set()
    for state in states.values():
        name, quote = f"job {state.job_id}", state.quote
        if quote.job_id(state.domain) != state.job_id:
            findings.append(f"{name}: its id does not follow from its quote")
        if _signer(quote.digest(state.domain), state.quote_signature) != quote.worker:
            findings.append(f"{name}: its quote is not signed by the worker")
        order = Order(state.job_id).digest(state.domain)
        if state.role is Role.WORKER and _signer(order, state.order_signature) != quote.client:
            findings.append(f"{name}: its order is not signed by the client")
    for change in changes:
        state = states[change.job_id]
        if isinstance(change, BatchResultChecked):
            checked.add((change.job_id, change.result_hash))
        elif isinstance(change, BatchAccepted):
            said = Acceptance(change.job_id, change.result_hash, change.amount).digest(state.domain)
            if state.role is Role.WORKER and _signer(said, change.signature) != state.quote.client:
                findings.append(f"job {change.job_id}: the acceptance is not signed by the client")
            if state.role is Role.CLIENT and (change.job_id, change.result_hash) not in checked:
                findings.append(f"job {change.job_id}: a result was accepted that was not verified")
    return findings


async def compare_job(state: BatchState, jobs: Jobs, now: int) -> list[str]:
    """One job with the contract that it is on; `now`: chain seconds of the last block that counts. Raises `ChainError`."""
    name, quote = f"job {state.job_id}", state.quote
    seen = await jobs.job(state.job_id)
    findings = []
    if seen.state is not state.chain:
        findings.append(f"{name}: the journal has seen it {state.chain.name.lower()}, it is {seen.state.name.lower()}")
    if state.void and seen.state is not JobState.NONE:
        findings.append(f"{name}: void in the journal, {seen.state.name.lower()} on chain")
    if seen.state is JobState.SETTLED:
        findings += _paid(state, await jobs.paid(quote), bytes(seen.result_hash))
    if seen.state is JobState.OPEN and now >= quote.deadline + GRACE_S:
        findings.append(f"{name}: still open {now - quote.deadline} s after its deadline")
    if seen.state is JobState.SUBMITTED and now >= seen.window_end + GRACE_S:
        findings.append(f"{name}: not finalized {now - seen.window_end} s after its window")
    if seen.state is JobState.DISPUTED and state.resolve_by and now >= state.resolve_by + GRACE_S:
        findings.append(f"{name}: its dispute is open {now - state.resolve_by} s after its time")
    if seen.state is JobState.NONE and not state.void and now >= quote.valid_before + GRACE_S:
        findings.append(f"{name}: neither opened nor void {now - quote.valid_before} s after its quote's time")
    return findings


def _paid(state: BatchState, told: int | None, result_hash: bytes) -> list[str]:
    """A settled job: one payment, and the one that was agreed."""
    name, findings = f"job {state.job_id}", []
    if told is not None and told != state.paid:
        findings.append(f"{name}: {told} was paid, the journal says {state.paid}")
    if state.paid > state.quote.amount:
        findings.append(f"{name}: {state.paid} was paid, the quote says at most {state.quote.amount}")
    if state.result is not None and result_hash != state.result.result_hash:
        findings.append(f"{name}: it was settled for another result than ours")
    if state.accepted is not None and not state.resolve_by:
        if result_hash != state.accepted.result_hash:
            findings.append(f"{name}: it was settled for another result than was accepted")
        if state.paid > state.accepted.amount:
            findings.append(f"{name}: {state.paid} was paid, {state.accepted.amount} was accepted")
    return findings


def _signer(digest: bytes, signature: bytes) -> bytes | None:
    try:
        return recover(digest, signature)
    except RemoteProtocolError:
        return None
