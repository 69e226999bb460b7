"""One batch job in escrow: `apply(state, change)` for what has happened, `plan(state, ...)` for what is to be done now.

Rules of this file:

1. `apply` is deterministic, does no I/O and knows no clock: the fold of the journal *is* the state (B1). A change that breaks a
   rule raises and leaves the state as it was: Remote when the other side is to blame for it, Local when we are.
   What we sign is journaled before it is signed: the same words again give the same signature, so a journal needs none of ours.
2. What the contract says enters as `BatchSeen`, absolute values, so a reorganisation is just another sight.
3. What to do is never remembered, always computed: `plan` looks at state and time and names one step. So a crash forgets no
   step, a step that failed is taken again, and a step that a reorganisation undid is taken again with the same bytes.
4. Every state that is not final has a step now or a time at which it will have one: no silence of the other side lasts (B7).

Two clocks: `now` is the best guess at chain time and decides when to *try*; a try that is too early reverts in simulation and
costs nothing. `head` is the time of the last block that counts (with confirmations, one further back) and decides what cannot be
taken back: that a quote can never be opened any more, that a submission is too late. Invariants B1 to B10: docs/invariants.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never

import msgspec
from msgspec.structs import replace

from protocol.channel import Role
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.escrow import JobState, Outcome
from protocol.ids import ZERO_ADDRESS, ZERO_HASH, Address, Hash32, JobId
from protocol.messages import QuoteWire, decode_value, quote_from_wire
from protocol.typed_data import Domain, Quote
from protocol.workload import Terms, decode_terms, terms_hash

_ENDED: Final = (JobState.SETTLED, JobState.REFUNDED)
_SUBMITTED_ONCE: Final = (JobState.SUBMITTED, JobState.DISPUTED)

QUOTE_LIFE: Final = 3600
"""Seconds that a quote stands at most: a client takes none that stands longer, by its guess at chain time. Whoever takes from
this that a job was not opened before some moment allows for a wrong guess, by as much as a mistake would cost there."""

# ----------------------------------------------------------------------------------------------------------- changes


class BatchOrdered(msgspec.Struct, frozen=True):
    """The client will sign an order for the quote (client), or sent one (worker). From here on the contract may hold money."""

    job_id: JobId
    chain_id: int
    contract: Address
    """The Jobs contract."""
    label: str
    """Client: the caller's own name of the job, which makes posting idempotent. Worker: empty."""
    peer: str
    """PeerId of the other side: the worker's, or that of the client who may ask and fetch."""
    address: str
    """Client: where the worker was reached. Worker: empty."""
    model_id: Hash32
    quote: bytes
    """msgpack of `messages.QuoteWire`."""
    quote_signature: bytes
    terms: bytes
    """msgpack of `workload.Terms`."""
    order_signature: bytes
    """Worker: the client's. Client: empty."""


class BatchSeen(msgspec.Struct, frozen=True):
    """What the contracts say now."""

    job_id: JobId
    state: int
    window_end: int
    claimed: int
    result_hash: Hash32
    resolve_by: int
    """Of the dispute; 0 when there is none."""
    outcome: int
    """What the resolver has found, `escrow.Outcome`; 0 while it has found nothing."""
    paid: int
    """What the worker got; 0 unless it is settled. (The contract forgets it and tells it in its event.)"""


class BatchResultKept(msgspec.Struct, frozen=True):
    """Worker: the result is durable, and this is the submission to be signed for it. There is never another."""

    job_id: JobId
    result_hash: Hash32
    claimed: int
    size: int
    at: int
    """Chain seconds, as far as the worker knew."""


class BatchResultChecked(msgspec.Struct, frozen=True):
    """Client: the result is verified and durable here."""

    job_id: JobId
    result_hash: Hash32
    claimed: int
    """What the worker asked for it when it was fetched; the contract may say otherwise."""
    cost: int
    """What it is worth by the terms and its token ids."""
    size: int


class BatchResultRefused(msgspec.Struct, frozen=True):
    """Client: these bytes, or their absence, are no result. Nothing with this hash will be accepted."""

    job_id: JobId
    result_hash: Hash32
    reason: str


class BatchAccepted(msgspec.Struct, frozen=True):
    """The client will sign this acceptance (client), or sent it (worker)."""

    job_id: JobId
    result_hash: Hash32
    amount: int
    signature: bytes
    """Worker: the client's. Client: empty."""
    at: int
    """Chain seconds, as far as the owner of this journal knew."""


class BatchCancelled(msgspec.Struct, frozen=True):
    """The client no longer wants what is not finished."""

    job_id: JobId


class BatchGivenUp(msgspec.Struct, frozen=True):
    """Worker: it will not be done, and the contract is to be told."""

    job_id: JobId
    reason: str


class BatchDisputed(msgspec.Struct, frozen=True):
    """Client: challenge the submission, with what it has to say under this hash."""

    job_id: JobId
    evidence: Hash32


class BatchVoided(msgspec.Struct, frozen=True):
    """The quote was not opened in time and cannot be any more."""

    job_id: JobId
    head: int
    """Time of the block that shows it."""


Change = (
    BatchOrdered
    | BatchSeen
    | BatchResultKept
    | BatchResultChecked
    | BatchResultRefused
    | BatchAccepted
    | BatchCancelled
    | BatchGivenUp
    | BatchDisputed
    | BatchVoided
)
CHANGES: Final = (
    BatchOrdered,
    BatchSeen,
    BatchResultKept,
    BatchResultChecked,
    BatchResultRefused,
    BatchAccepted,
    BatchCancelled,
    BatchGivenUp,
    BatchDisputed,
    BatchVoided,
)


# ------------------------------------------------------------------------------------------------------------- state


class BatchState(msgspec.Struct, frozen=True):
    role: Role
    job_id: JobId
    domain: Domain
    """Of the Jobs contract: chain and address."""
    label: str
    peer: str
    address: str
    model_id: Hash32
    quote: Quote
    quote_signature: bytes
    terms: Terms
    order_signature: bytes
    chain: JobState = JobState.NONE
    window_end: int = 0
    claimed: int = 0
    """On chain."""
    submitted_hash: Hash32 = ZERO_HASH
    """On chain."""
    resolve_by: int = 0
    outcome: Outcome = Outcome.NONE
    paid: int = 0
    """What the worker got; 0 unless it is settled."""
    result: BatchResultKept | None = None
    checked: BatchResultChecked | None = None
    refused: BatchResultRefused | None = None
    accepted: BatchAccepted | None = None
    cancelled: bool = False
    failure: str = ""
    """Why the worker has given it up; empty while it has not."""
    evidence: Hash32 | None = None
    """Set once the client wants to dispute."""
    void: bool = False

    @property
    def ended(self) -> bool:
        """No money is locked, and none can come to be."""
        return self.void or self.chain in _ENDED

    @property
    def direct(self) -> bool:
        """Worker: the whole amount is due, so an acceptance can settle it without a submission."""
        return self.result is not None and self.result.claimed == self.quote.amount


def ordered(role: Role, change: BatchOrdered) -> BatchState:
    """The first state of a job. What it rests on must hang together, whoever signed what."""
    quote = quote_from_wire(decode_value(QuoteWire, change.quote))
    terms = decode_terms(change.terms)
    domain = Domain(change.chain_id, change.contract)
    if quote.job_id(domain) != change.job_id:
        raise LocalProtocolError(f"{change.job_id} is not the id of its quote")
    if quote.salt != terms_hash(change.terms) or quote.amount != terms.amount:
        raise _blame(role, WireCode.MALFORMED, "the quote does not follow from its terms")
    if (role is Role.CLIENT) != bool(change.label):
        raise LocalProtocolError("a client names its jobs, a worker does not")
    return BatchState(
        role=role,
        job_id=change.job_id,
        domain=domain,
        label=change.label,
        peer=change.peer,
        address=change.address,
        model_id=change.model_id,
        quote=quote,
        quote_signature=change.quote_signature,
        terms=terms,
        order_signature=change.order_signature,
    )


def sight_of(state: BatchState) -> BatchSeen:
    """The last sight: a driver journals the next one only when it differs."""
    return BatchSeen(
        job_id=state.job_id,
        state=int(state.chain),
        window_end=state.window_end,
        claimed=state.claimed,
        result_hash=state.submitted_hash,
        resolve_by=state.resolve_by,
        outcome=int(state.outcome),
        paid=state.paid,
    )


def apply(state: BatchState, change: Change) -> BatchState:
    """The next state. Raises `ProtocolError` by blame; then nothing has changed."""
    if change.job_id != state.job_id:
        raise LocalProtocolError(f"change for job {change.job_id} applied to {state.job_id}")
    match change:
        case BatchOrdered():
            raise LocalProtocolError("a job is ordered once")
        case BatchSeen():
            return _seen(state, change)
        case BatchResultKept():
            return _result_kept(state, change)
        case BatchResultChecked():
            return _result_checked(state, change)
        case BatchResultRefused():
            return _result_refused(state, change)
        case BatchAccepted():
            return _accepted(state, change)
        case BatchCancelled():
            return replace(state, cancelled=True)
        case BatchGivenUp():
            return _given_up(state, change)
        case BatchDisputed():
            return _disputed(state, change)
        case BatchVoided():
            return _voided(state, change)
        case _:
            assert_never(change)


def _seen(state: BatchState, change: BatchSeen) -> BatchState:
    # Void by a block's time, and the contract has it: the chain was undone deeper than we waited for. There is money in it, so
    # it is followed to its end.
    void = state.void and change.state == JobState.NONE
    return replace(
        state,
        void=void,
        chain=JobState(change.state),
        window_end=change.window_end,
        claimed=change.claimed,
        submitted_hash=change.result_hash,
        resolve_by=change.resolve_by,
        outcome=Outcome(change.outcome),
        paid=change.paid,
    )


def _result_kept(state: BatchState, change: BatchResultKept) -> BatchState:
    _only(state, Role.WORKER)
    if state.result is not None:  # B2
        raise LocalProtocolError(f"job {state.job_id} has its result; another submission is never signed")
    if state.failure:  # B10
        raise LocalProtocolError(f"job {state.job_id} was given up")
    if state.chain in _SUBMITTED_ONCE and state.submitted_hash != change.result_hash:
        # B2: only our key signs submissions. One that this journal does not know means that it is an old copy.
        raise LocalProtocolError(f"job {state.job_id}: the contract has another submission by our key")
    if not 0 <= change.claimed <= state.quote.amount:
        raise LocalProtocolError(f"{change.claimed} is claimed, the quote says at most {state.quote.amount}")
    return replace(state, result=change)


def _result_checked(state: BatchState, change: BatchResultChecked) -> BatchState:
    _only(state, Role.CLIENT)
    if not 0 <= change.claimed <= change.cost <= state.quote.amount:
        raise LocalProtocolError(
            f"{change.claimed} claimed for a result of {change.cost} in a job of at most {state.quote.amount}"
        )
    if state.accepted is not None and state.accepted.result_hash != change.result_hash:
        raise LocalProtocolError(f"job {state.job_id}: another result was accepted")
    return replace(state, checked=change)


def _result_refused(state: BatchState, change: BatchResultRefused) -> BatchState:
    _only(state, Role.CLIENT)
    if state.accepted is not None and state.accepted.result_hash == change.result_hash:
        raise LocalProtocolError(f"job {state.job_id}: this result was accepted")
    return replace(state, refused=change)


def _accepted(state: BatchState, change: BatchAccepted) -> BatchState:
    if state.accepted is not None:  # B3
        if (state.accepted.result_hash, state.accepted.amount) == (change.result_hash, change.amount):
            return state
        raise _blame(state.role, WireCode.BAD_RECEIPT, "another result or amount was accepted before")
    if state.role is Role.CLIENT:
        if state.checked is None or state.checked.result_hash != change.result_hash:  # B4
            raise LocalProtocolError("a result is accepted only after it was verified")
        if change.amount > state.checked.cost:
            raise LocalProtocolError(f"{change.amount} for a result that costs {state.checked.cost}")
        if state.evidence is not None:
            raise LocalProtocolError("the submission is being disputed")
        least = state.claimed if state.chain is JobState.SUBMITTED else state.quote.amount
    else:
        if state.result is None or state.result.result_hash != change.result_hash:
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, "this is not the result of the job")
        least = state.result.claimed
    if not least <= change.amount <= state.quote.amount:
        raise _blame(state.role, WireCode.BAD_RECEIPT, f"an acceptance of {change.amount}, at least {least} is due")
    return replace(state, accepted=change)


def _given_up(state: BatchState, change: BatchGivenUp) -> BatchState:
    _only(state, Role.WORKER)
    if not change.reason:
        raise LocalProtocolError("giving up needs a reason")
    if state.result is not None:  # B10
        raise LocalProtocolError(f"job {state.job_id} has its result")
    return replace(state, failure=change.reason)


def _disputed(state: BatchState, change: BatchDisputed) -> BatchState:
    _only(state, Role.CLIENT)
    if state.chain is not JobState.SUBMITTED:
        raise LocalProtocolError(f"a {state.chain.name.lower()} job cannot be disputed")
    if state.accepted is not None:
        raise LocalProtocolError("the result was accepted")
    if state.quote.resolver == ZERO_ADDRESS:
        raise LocalProtocolError("the quote names nobody who could judge a dispute")
    return replace(state, evidence=change.evidence)


def _voided(state: BatchState, change: BatchVoided) -> BatchState:
    if state.chain is not JobState.NONE:
        raise LocalProtocolError(f"a {state.chain.name.lower()} job is not void")
    if change.head < state.quote.valid_before:  # B9
        raise LocalProtocolError("the quote can still be opened")
    return replace(state, void=True)


def _only(state: BatchState, role: Role) -> None:
    if state.role is not role:
        raise LocalProtocolError(f"only a {role.value} does that")


def _blame(role: Role, code: WireCode, message: str) -> LocalProtocolError | RemoteProtocolError:
    """The client decides on these changes itself; the worker applies what the client sent."""
    return LocalProtocolError(message) if role is Role.CLIENT else RemoteProtocolError(code, message)


# ---------------------------------------------------------------------------------------------------- all jobs of a role


def check_label(states: Mapping[JobId, BatchState], change: BatchOrdered) -> None:
    """Client: one name, one job. Only a job that can never be opened leaves its name free. Raises `LocalProtocolError`."""
    for state in states.values():
        if change.label and state.label == change.label and not state.void:
            raise LocalProtocolError(f"job {change.label!r} was ordered before, as {state.job_id}")


def fold(role: Role, states: dict[JobId, BatchState], change: Change) -> BatchState:
    """One step of the replay: put the next state of the change's job into `states`, return it."""
    if isinstance(change, BatchOrdered):
        if change.job_id in states:
            raise LocalProtocolError(f"job {change.job_id} ordered twice")
        check_label(states, change)
        state = ordered(role, change)
    elif change.job_id in states:
        state = apply(states[change.job_id], change)
    else:
        raise LocalProtocolError(f"change for unknown job {change.job_id}")
    states[change.job_id] = state
    return state


# -------------------------------------------------------------------------------------------------------------- plan


class Step(StrEnum):
    """What is to be done. All but the last four are transactions; their data is in the state."""

    OPEN = "open"
    """Worker: lock the client's money by quote and order."""
    SUBMIT = "submit"
    FAIL = "fail"
    """Worker, before the deadline: say that it will not be done, which costs less than silence."""
    SETTLE = "settle"
    """Hand in the client's acceptance."""
    FINALIZE = "finalize"
    """The window is over: pay what was claimed."""
    REFUND = "refund"
    """The deadline is over and nothing was submitted: take it back."""
    DISPUTE = "dispute"
    RESOLVE = "resolve"
    """The resolver has decided, or its time is over."""
    ORDER = "order"
    """Client: send the order to the worker (again)."""
    RUN = "run"
    """Worker: compute."""
    FETCH = "fetch"
    """Client: ask the worker, and verify what is there."""
    ACCEPT = "accept"
    """Client: sign the acceptance and send it (again)."""
    VOID = "void"
    """Journal that the quote can never be opened any more."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    submit_margin: int = 120
    """Worker: before the deadline by which the submission is sent at the latest."""
    accept_grace: int = 20
    """Worker: how long a result whose whole amount is due waits for the client's acceptance before it is submitted."""
    settle_patience: int = 60
    """Client: how long the worker may take to hand in our acceptance before we do."""
    dispute_margin: int = 180
    """Client: before the end of the window by which a result that nobody shows is disputed."""
    finalize_patience: int = 60
    """Client: how long after the window the worker may take to finalize before we do."""


@dataclass(frozen=True, slots=True)
class Plan:
    step: Step | None
    """To be done now; None: nothing, wait."""
    wake: int
    """Chain seconds at which to look again at the latest, whatever happens until then; 0 when the job has ended."""


def plan(state: BatchState, now: int, head: int, timing: Timing) -> Plan:
    """The next step. See the rules of this file for the two clocks."""
    if state.ended:
        return Plan(None, 0)
    if state.chain is JobState.NONE:
        return _plan_none(state, now, head)
    if state.chain is JobState.DISPUTED:
        due = state.outcome is not Outcome.NONE or now >= state.resolve_by
        return Plan(Step.RESOLVE if due else None, state.resolve_by)
    if state.role is Role.WORKER:
        return _plan_worker(state, now, head, timing)
    return _plan_client(state, now, timing)


def _plan_none(state: BatchState, now: int, head: int) -> Plan:
    until = state.quote.valid_before
    if head >= until:
        return Plan(Step.VOID, until)
    if now >= until:
        return Plan(None, until)
    return Plan(Step.OPEN if state.role is Role.WORKER else Step.ORDER, until)


def _plan_worker(state: BatchState, now: int, head: int, timing: Timing) -> Plan:
    deadline = state.quote.deadline
    if _settles(state):
        return Plan(Step.SETTLE, state.window_end or deadline)
    if state.chain is JobState.SUBMITTED:
        return Plan(Step.FINALIZE if now >= state.window_end else None, state.window_end)
    if head >= deadline:  # too late for everything; if the client does not end it, our stake is not to be held for ever
        last = deadline + timing.finalize_patience
        return Plan(Step.REFUND if now >= last else None, last)
    if state.failure:
        return Plan(Step.FAIL, deadline)
    if state.result is None:
        return Plan(Step.RUN, deadline - timing.submit_margin)
    if state.direct:
        latest = min(state.result.at + timing.accept_grace, deadline - timing.submit_margin)
        if now < latest:
            return Plan(None, latest)
    return Plan(Step.SUBMIT, deadline)


def _settles(state: BatchState) -> bool:
    """Whether the contract would take the acceptance in hand."""
    if state.accepted is None:
        return False
    if state.chain is JobState.OPEN:
        return state.accepted.amount == state.quote.amount
    return state.accepted.result_hash == state.submitted_hash and state.accepted.amount >= state.claimed


def _plan_client(state: BatchState, now: int, timing: Timing) -> Plan:
    if _settles(state) and state.accepted is not None:  # who has accepted does not take the money back
        ours = state.accepted.at + timing.settle_patience
        return Plan(Step.SETTLE if now >= ours else Step.ACCEPT, ours)
    if state.chain is JobState.OPEN:
        if now >= state.quote.deadline:
            return Plan(Step.REFUND, state.quote.deadline)
        if state.checked is not None and state.checked.claimed == state.quote.amount:
            return Plan(Step.ACCEPT, state.quote.deadline)
        return Plan(Step.FETCH, state.quote.deadline)
    last = state.window_end + timing.finalize_patience
    if now >= last:
        return Plan(Step.FINALIZE, last)
    if state.evidence is not None:
        return Plan(Step.DISPUTE if now < state.window_end else None, last)
    if refuses(state):
        return Plan(None, last)
    if state.checked is None or state.checked.result_hash != state.submitted_hash:
        return Plan(Step.FETCH, last)
    return Plan(Step.ACCEPT, last)


def refuses(state: BatchState) -> bool:
    """Client: whether what the worker has submitted was found not to be what is owed."""
    if state.chain is JobState.SUBMITTED:
        if state.checked is not None and state.checked.result_hash == state.submitted_hash:
            return state.claimed > state.checked.cost
        return state.refused is not None and state.refused.result_hash == state.submitted_hash
    return False


def doubts(state: BatchState, now: int, timing: Timing) -> bool:
    """Client: whether there is reason to dispute now: the submission is wrong, or nobody has shown it and time runs out."""
    if state.chain is not JobState.SUBMITTED or state.accepted is not None or state.evidence is not None:
        return False
    unseen = state.checked is None or state.checked.result_hash != state.submitted_hash
    return refuses(state) or (unseen and now >= state.window_end - timing.dispute_margin)
