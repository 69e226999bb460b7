"""The steps of a client's batch job that are no transaction: send the order, ask, fetch and judge the result, accept.

Rules
- What is signed is journaled first, and signed again whenever it is sent again: the same words give the same signature.
- The worker's word about a job is for showing; what is done about money goes by the contract.
- A result is judged before anything is made of it, kept on our disk before the journal says that it was verified, and accepted
  only after that (B4).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from node.client import job_fetch
from node.client.job_fetch import Told
from node.errors import NodeError, SignerRefused, WorkerFault
from node.ports import Network
from node.store.batch import BatchBook, refresh
from node.store.batch_keeper import JobsChain
from node.store.errors import ResultsFull
from node.store.faults import fault_point
from node.store.results import Results
from protocol.batch import BatchAccepted, BatchResultChecked, BatchResultRefused, BatchState, Step
from protocol.errors import RemoteProtocolError
from protocol.escrow import JobState
from protocol.ids import Hash32, JobId
from protocol.messages import AcceptJob, OpenJob, QueryJob, RequestCancel, amount_to_wire
from protocol.signing import QuotedOrder
from protocol.typed_data import Acceptance, Domain, Order, Struct
from protocol.workload import check_result

log = logging.getLogger(__name__)
KEEP_RESULT_MS: Final = 30 * 24 * 3600 * 1000
"""How long our own copy of a result is kept: a client's disk is its own."""
Sign = Callable[[Struct | QuotedOrder, Domain], Awaitable[bytes]]


class JobSteps:
    """`chain`: of a job; raises `ChainError` when it is not configured."""

    def __init__(
        self,
        *,
        book: BatchBook,
        network: Network,
        results: Results,
        sign: Sign,
        chain: Callable[[BatchState], JobsChain],
        now_ms: Callable[[], int],
    ) -> None:
        self._book = book
        self._network = network
        self._results = results
        self._sign = sign
        self._chain = chain
        self._now_ms = now_ms
        self._reminded: set[JobId] = set()
        self.delivered: set[JobId] = set()
        """Jobs whose worker has our acceptance, as far as this process knows."""
        self.told: dict[JobId, Told] = {}
        self.troubles: dict[JobId, str] = {}
        """Why the last question to a job's worker failed, in words."""
        self.unsigned: dict[JobId, SignerRefused] = {}
        """What our own policy did not let us say about a job, when we last tried."""

    async def act(self, state: BatchState, step: Step) -> None:
        try:
            match step:
                case Step.ORDER:
                    await self._send_order(state)
                case Step.FETCH:
                    await self.fetch(state)
                case Step.ACCEPT:
                    await self._accept(state)
            self.troubles.pop(state.job_id, None)
            self.unsigned.pop(state.job_id, None)
        except NodeError as error:
            self.unsigned.pop(state.job_id, None)
            if isinstance(error, SignerRefused):
                self.unsigned[state.job_id] = error
                self._book.nudge()
            self.troubles[state.job_id] = str(error)
            raise

    async def _send_order(self, state: BatchState) -> None:
        order = await self._sign(QuotedOrder(state.quote, Order(state.job_id)), state.domain)
        fault_point("send.order")
        await self.ask(state, OpenJob(job_id=bytes(state.job_id), order=order))
        # The worker's word is not enough: the contract says whether it is open.
        await refresh(self._book, self._chain(state).jobs, state.job_id)

    async def ask(
        self, state: BatchState, question: OpenJob | QueryJob | RequestCancel | AcceptJob | None = None
    ) -> Told:
        told = await job_fetch.ask(self._network, state, question or QueryJob(job_id=bytes(state.job_id)))
        self.told[state.job_id] = told
        self._book.nudge()
        return told

    async def fetch(self, state: BatchState) -> None:
        """Ask how far it is; when the result is there, fetch, verify and keep it."""
        told = await self.ask(state)
        if state.cancelled and told.result_hash is None:
            told = await self.ask(state, RequestCancel(job_id=bytes(state.job_id)))
        if told.result_hash is None:
            if state.chain is not JobState.OPEN:
                raise WorkerFault(f"{state.peer} has submitted a result and shows none")
            return
        submitted = state.chain is not JobState.OPEN
        wanted = state.submitted_hash if submitted else told.result_hash
        if state.refused is not None and state.refused.result_hash == wanted:
            return
        if state.checked is not None and state.checked.result_hash == wanted:
            return
        raw = await job_fetch.fetch(self._network, state, wanted)
        claimed = told.claimed if state.chain in (JobState.OPEN, JobState.SETTLED) else state.claimed
        await self._judge(self._book.jobs[state.job_id], raw, wanted, claimed)

    async def _judge(self, state: BatchState, raw: bytes, wanted: Hash32, claimed: int) -> None:
        try:
            cost = await trio.to_thread.run_sync(
                lambda: check_result(
                    raw,
                    quote=state.quote,
                    terms=state.terms,
                    result_hash=wanted,
                    claimed=claimed,
                    partial=state.cancelled,
                )
            )
        except RemoteProtocolError as error:
            log.error("job %s: what the worker shows is no result: %s", state.label, error.detail)
            await self._book.change([BatchResultRefused(state.job_id, wanted, error.detail[:500])])
            return
        now = self._now_ms()
        try:
            await self._results.put(bytes(wanted), raw, now + KEEP_RESULT_MS, now_ms=now)
        except ResultsFull as error:
            raise NodeError(
                f"there is no room for the result: {error.message}", hint="results are kept for a month"
            ) from error
        await self._book.change([BatchResultChecked(state.job_id, wanted, claimed, cost, len(raw))])

    async def _accept(self, state: BatchState) -> None:
        """Journal the acceptance, then sign and send it; again for as long as the contract does not show it."""
        if state.checked is None:
            return
        said = state.accepted
        if said is None:
            amount = state.claimed if state.chain is JobState.SUBMITTED else state.quote.amount
            said = BatchAccepted(state.job_id, state.checked.result_hash, amount, b"", self._chain(state).clock.now)
            await self._book.change([said])
        await self._send_acceptance(state, said)

    async def _send_acceptance(self, state: BatchState, said: BatchAccepted) -> None:
        signature = await self._sign(Acceptance(state.job_id, said.result_hash, said.amount), state.domain)
        question = AcceptJob(
            job_id=bytes(state.job_id),
            result_hash=bytes(said.result_hash),
            amount=amount_to_wire(said.amount),
            signature=signature,
        )
        fault_point("send.acceptance")
        await self.ask(state, question)
        self.delivered.add(state.job_id)
        await refresh(self._book, self._chain(state).jobs, state.job_id)

    async def first(self, state: BatchState, step: Step) -> None:
        """Before a transaction of ours. The worker may not have our acceptance yet, if we died before it was sent; and it pays
        the gas of handing it in, where we may have none."""
        if step is Step.SETTLE and state.accepted is not None and state.job_id not in self._reminded:
            self._reminded.add(state.job_id)
            try:
                await self._send_acceptance(state, state.accepted)
            except NodeError as error:
                log.info("job %s: the acceptance did not arrive: %s", state.label, error)
