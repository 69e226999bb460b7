"""Answers `/gristmill/batch/1`: quote, open, status, result, acceptance, cancellation.

Rules
- Who may ask about a job: the peer that asked for its quote, and the client's own key. Ids are public, results are not.
- The worker submits the client's order itself, so a client needs no transaction. That gas is ours, so what strangers can make us
  burn is bounded (B11): only what we quoted, only when the vault holds the amount, so many a day for one client and so many an
  hour in all.
- A question sent again changes nothing: it gets the same answer.
- Nothing here computes or waits for a deadline: that is the runner's and the keeper's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from node.errors import ChainError
from node.ports import Chain, TxResult
from node.store.batch import BatchBook, transact
from node.store.batch_keeper import JobsChain
from node.store.faults import fault_point
from node.store.results import KEEP_MS, Results
from node.worker.allowance import Allowance, Limits
from node.worker.batch_quotes import HeldQuote, QuoteDesk, message_of, parts_of, spec_key
from protocol.admission import Rejected
from protocol.batch import BatchAccepted, BatchCancelled, BatchOrdered, BatchState, Step, Timing, plan
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode
from protocol.escrow import JobState
from protocol.ids import Address, Hash32, JobId, ModelId, PeerId
from protocol.keys import require_signer
from protocol.messages import (
    PIECE_LIMIT,
    AcceptJob,
    BatchRefusal,
    GetResult,
    JobStatus,
    OpenJob,
    QueryJob,
    RequestCancel,
    RequestQuote,
    ResultChunk,
    amount_from_wire,
    amount_to_wire,
    encode,
)
from protocol.typed_data import Acceptance, Domain, Order, Quote, Submission
from protocol.typed_data import Struct as Signable

log = logging.getLogger(__name__)
Sign = Callable[[Signable, Domain], Awaitable[bytes]]


class Progress(Protocol):
    """What the runner knows of one job."""

    def done(self, job_id: JobId) -> int: ...

    def look(self, job_id: JobId) -> None:
        """Something about this job has changed."""


@dataclass(frozen=True, slots=True)
class BatchRules:
    opens: Limits = field(default_factory=lambda: Limits(20, 86_400, 300, 3600, "jobs to be opened"))
    chain_age_limit_ms: int = 60_000


class BatchDesk:
    def __init__(
        self,
        *,
        worker: Address,
        sign: Sign,
        book: BatchBook,
        results: Results,
        chains: Mapping[Domain, Chain],
        jobs: Mapping[Domain, JobsChain],
        quotes: QuoteDesk,
        progress: Progress,
        rules: BatchRules,
        timing: Timing,
        now_ms: Callable[[], int],
        chain_age_ms: Callable[[Domain], int],
    ) -> None:
        """`chains` and `jobs`: by the domain of the Jobs contract."""
        self._worker = worker
        self._sign = sign
        self._book = book
        self._results = results
        self._chains = chains
        self._jobs = jobs
        self._quotes = quotes
        self._progress = progress
        self._rules = rules
        self._timing = timing
        self._now_ms = now_ms
        self._chain_age_ms = chain_age_ms
        self._opens = Allowance(rules.opens)
        self._submissions: dict[JobId, bytes] = {}
        self.draining = False

    async def answer(self, peer: PeerId, question: msgspec.Struct) -> msgspec.Struct:
        """One question, one answer. Raises `RemoteProtocolError` for what the client did wrong."""
        try:
            match question:
                case RequestQuote():
                    return await self._quote(peer, question)
                case OpenJob():
                    return await self._open(peer, question)
                case QueryJob():
                    return await self._status(self._known(peer, question.job_id))
                case GetResult():
                    return self._piece(peer, question)
                case AcceptJob():
                    return await self._accept(peer, question)
                case RequestCancel():
                    return await self._cancel(peer, question)
                case _:
                    raise RemoteProtocolError(WireCode.UNEXPECTED, f"{type(question).__name__} is no question")
        except Rejected as no:
            return BatchRefusal(reason=no.reason, detail=no.detail[:500])
        except ChainError as error:
            log.warning("batch question of %s failed on the chain: %s", peer, error)
            return BatchRefusal(reason=RefusalReason.CHAIN_STALE, detail="the worker cannot reach its chain now")

    # -------------------------------------------------------------------------------------------------------- ordering

    async def _quote(self, peer: PeerId, question: RequestQuote) -> msgspec.Struct:
        self._check_ready()
        self._check_fresh(Domain(question.chain_id, Address(question.contract)))
        quote, terms, domain = await self._quotes.quote(peer, question)
        signature = await self._sign(quote, domain)
        fault_point("send.quote")
        return message_of(quote, terms, signature)

    def _check_ready(self) -> None:
        if self.draining:
            raise Rejected(RefusalReason.DRAINING, "the worker is shutting down")

    def _check_fresh(self, domain: Domain) -> None:
        """A chain that is away stops new jobs on it and on no other."""
        age = self._chain_age_ms(domain) if domain in self._jobs else 0
        if age > self._rules.chain_age_limit_ms:
            raise Rejected(RefusalReason.CHAIN_STALE, f"the chain was last seen {age} ms ago")

    async def _open(self, peer: PeerId, question: OpenJob) -> JobStatus:
        job_id = JobId(question.job_id)
        state, transaction = self._book.get(job_id), b""
        if state is None:
            self._check_ready()
            state = await self._order(peer, job_id, question.order)
        else:
            state = self._known(peer, job_id)
            if state.chain is JobState.NONE:
                self._opens.take(state.quote.client, self._now_ms() // 1000)
        if state.chain is JobState.NONE:
            result = await self._transact(state, Step.OPEN)
            state = self._book.jobs[job_id]
            if state.chain is JobState.NONE:
                error = result.error if result else ""
                raise Rejected(_why(error), error or "the job is not open, and it is too late to open it")
            transaction = result.hash if result else b""
        await self._book.change([])  # what another task applied a moment ago is durable before it is told
        return await self._status(state, transaction)

    async def _order(self, peer: PeerId, job_id: JobId, order: bytes) -> BatchState:
        """Journal an order for a quote that we hold. Raises `Rejected` or `RemoteProtocolError`."""
        found = self._quotes.held(job_id)
        if found is None:
            raise Rejected(RefusalReason.JOB_UNKNOWN, "no such quote, or it is forgotten")
        held, raw = found
        quote, terms, spec = parts_of(held)
        domain = held.domain
        if str(peer) != held.peer and peer.address != quote.client:
            raise Rejected(RefusalReason.JOB_UNKNOWN, "no such quote for this peer")
        chain = self._chains.get(domain)
        if chain is None or domain not in self._jobs:
            raise Rejected(RefusalReason.NO_BATCH, "the chain of this quote is not served any more")
        self._check_fresh(domain)
        await self._jobs[domain].clock.look()
        if quote.valid_before <= self._jobs[domain].clock.now:
            raise Rejected(RefusalReason.JOB_UNKNOWN, "the quote is past its time")
        require_signer(Order(job_id).digest(domain), order, quote.client, "order")
        balance = await chain.vault_balance(quote.token, quote.client)
        if balance < quote.amount:
            raise Rejected(RefusalReason.FUNDS_INSUFFICIENT, f"the vault holds {balance}, the job needs {quote.amount}")
        signature = await self._sign(quote, domain)  # the same words give the same signature as before
        if self._book.get(job_id) is None:
            # Nothing waits from here until the book has the job: of many orders at once each sees those before it.
            if len(self._book.running) >= self._quotes.rules.max_jobs:
                raise Rejected(RefusalReason.BUSY, f"{self._quotes.rules.max_jobs} batch jobs are open")
            # Each quote counts on the time that was left when it was made, and many may have been made at once.
            self._quotes.latest_start(ModelId(spec.model_id), terms, quote.deadline, self._jobs[domain].clock.now)
            self._opens.take(quote.client, self._now_ms() // 1000)
            await self._journal(job_id, held, raw, quote, signature, order, Hash32(spec.model_id))
        return self._book.jobs[job_id]

    async def _journal(
        self,
        job_id: JobId,
        held: HeldQuote,
        raw: bytes,
        quote: Quote,
        signature: bytes,
        order: bytes,
        model_id: Hash32,
    ) -> None:
        change = BatchOrdered(
            job_id=job_id,
            chain_id=held.chain_id,
            contract=Address(held.contract),
            label="",
            peer=held.peer,
            address="",
            model_id=model_id,
            quote=encode(held.quote),
            quote_signature=signature,
            terms=held.terms,
            order_signature=order,
        )
        now = self._now_ms()
        # Not for longer while nothing is locked: whoever opens the job on chain makes the runner keep it until its end.
        until = now + (quote.valid_before - self._jobs[held.domain].clock.now) * 1000 + KEEP_MS
        self._quotes.ordered(job_id)
        # The bytes are there already: keeping them longer cannot fail.
        await self._book.change([change], also=self._results.keeping(spec_key(job_id), raw, until, now_ms=now))

    async def _transact(self, state: BatchState, wanted: Step) -> TxResult | None:
        """The wanted step, if it is due."""
        chain = self._jobs[state.domain]

        def planned(state: BatchState) -> Step | None:
            return wanted if plan(state, chain.clock.now, 0, self._timing).step is wanted else None

        return await transact(self._book, chain.jobs, state.job_id, planned)

    # --------------------------------------------------------------------------------------------------------- serving

    def _known(self, peer: PeerId, job_id: bytes) -> BatchState:
        state = self._book.get(job_id)
        if state is None or (str(peer) != state.peer and peer.address != state.quote.client):
            raise Rejected(RefusalReason.JOB_UNKNOWN, "no such job for this peer")
        return state

    async def _status(self, state: BatchState, transaction: bytes = b"") -> JobStatus:
        kept = state.result
        return JobStatus(
            job_id=bytes(state.job_id),
            state=int(state.chain),
            done=len(state.terms.input_tokens) if kept else self._progress.done(state.job_id),
            total=len(state.terms.input_tokens),
            result_hash=bytes(kept.result_hash) if kept else b"",
            size=kept.size if kept else 0,
            claimed=amount_to_wire(kept.claimed if kept else 0),
            submission=await self._submission(state),
            window_end=state.window_end,
            failure=state.failure[:200],
            transaction=transaction,
        )

    async def _submission(self, state: BatchState) -> bytes:
        """Our word for what we claim: a client can hold us to it before the contract has it."""
        if state.result is None:
            return b""
        if state.job_id not in self._submissions:
            said = Submission(state.job_id, state.result.result_hash, state.result.claimed)
            self._submissions[state.job_id] = await self._sign(said, state.domain)
            fault_point("send.submission")
        return self._submissions[state.job_id]

    def _piece(self, peer: PeerId, question: GetResult) -> ResultChunk:
        state = self._known(peer, question.job_id)
        if state.result is None:
            raise Rejected(RefusalReason.RESULT_NOT_READY, "there is no result yet")
        data = self._results.piece(bytes(state.job_id), question.offset, PIECE_LIMIT)
        if data is None:
            raise Rejected(RefusalReason.JOB_UNKNOWN, "the result was acknowledged, or its time was over")
        return ResultChunk(job_id=bytes(state.job_id), offset=question.offset, data=data)

    # ---------------------------------------------------------------------------------------------------------- ending

    async def _accept(self, peer: PeerId, question: AcceptJob) -> JobStatus:
        """Journal the acceptance; the keeper hands it in. The client has the result, so ours may go when room is needed."""
        state = self._known(peer, question.job_id)
        result_hash, amount = Hash32(question.result_hash), amount_from_wire(question.amount)
        said = Acceptance(state.job_id, result_hash, amount)
        require_signer(said.digest(state.domain), question.signature, state.quote.client, "acceptance")
        now = self._now_ms()
        if state.accepted is None and not state.ended:
            await self._book.change([BatchAccepted(state.job_id, result_hash, amount, question.signature, now // 1000)])
        await self._results.acknowledge(bytes(state.job_id), now_ms=now)
        result = await self._transact(state, Step.SETTLE)
        return await self._status(self._book.jobs[state.job_id], result.hash if result else b"")

    async def _cancel(self, peer: PeerId, question: RequestCancel) -> JobStatus:
        state = self._known(peer, question.job_id)
        if not state.cancelled and state.result is None and not state.failure and not state.ended:
            await self._book.change([BatchCancelled(state.job_id)])
            self._progress.look(state.job_id)
        return await self._status(self._book.jobs[state.job_id])


def _why(error: str) -> RefusalReason:
    """The refusal that fits a contract's error."""
    return {
        "Vault_Insufficient": RefusalReason.FUNDS_INSUFFICIENT,
        "Vault_Paused": RefusalReason.NO_BATCH,
        "Jobs_Expired": RefusalReason.JOB_UNKNOWN,
    }.get(error, RefusalReason.INTERNAL)
