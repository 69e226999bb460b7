"""One batch job that was posted: how it stands, what came of it, and how it is cancelled or disputed.

Rules
- The contract says how a job stands; the worker's word is for showing.
- `result` returns nothing that was not verified and kept (B4), and says why there will be none, as soon as that is certain.
- Whoever waits here only waits: the keeper brings the job forward, whether anybody asks for its result or not.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from node.client.job_fetch import Told
from node.errors import ChainError, ConfigError, InsufficientFunds, JobFailed, NodeError, Timeout
from node.store.batch import refresh
from protocol.batch import BatchCancelled, BatchDisputed, BatchState, refuses
from protocol.escrow import JobState
from protocol.ids import Hash32, JobId
from protocol.messages import RequestCancel
from protocol.workload import ResultItem, read_result

if TYPE_CHECKING:
    from node.client.jobs import ClientJobs

log = logging.getLogger(__name__)
DELIVERY_S: Final = 10.0
"""How long `result` waits for an acceptance to reach the worker."""


class Job:
    """One batch job of this client."""

    def __init__(self, jobs: ClientJobs, job_id: JobId) -> None:
        self._jobs = jobs
        self.job_id = job_id

    @property
    def id(self) -> str:
        """The caller's name of it."""
        return self.state.label

    @property
    def state(self) -> BatchState:
        return self._jobs.book.jobs[self.job_id]

    @property
    def told(self) -> Told | None:
        """What the worker last said, in this process."""
        return self._jobs.steps.told.get(self.job_id)

    async def status(self) -> BatchState:
        """As the contracts and the worker have it now, as far as they can be asked: what cannot be is left as it was."""
        state = await refresh(self._jobs.book, self._jobs.chain(self.state).jobs, self.job_id)
        if state.chain not in (JobState.NONE, JobState.REFUNDED) and state.checked is None:
            try:
                await self._jobs.steps.ask(state)
            except NodeError as error:
                log.info("job %s: %s", state.label, error)
        return self.state

    async def result(self, timeout_s: float | None = None) -> tuple[ResultItem, ...]:
        """Wait for the result; it is verified, kept and accepted when this returns.

        Raises `JobFailed` when there will be none, `Timeout` after `timeout_s`; the job goes on then.
        """
        steps = self._jobs.steps
        until = float("inf") if timeout_s is None else trio.current_time() + timeout_s
        patience = float("inf")
        while True:
            state = self.state
            if state.accepted is not None:  # a moment for the acceptance to arrive, since our caller may go now
                patience = min(patience, trio.current_time() + DELIVERY_S)
            sent = self.job_id in steps.delivered or trio.current_time() >= patience
            if state.checked is not None and (state.ended or (state.accepted is not None and sent)):
                return self._kept(state)
            if state.void or state.chain is JobState.REFUNDED:
                told = self.told
                why = told.failure if told and told.failure else "nothing was submitted in time"
                raise JobFailed(f"job {state.label!r} has no result: {why}", hint="its amount is back in the vault")
            if refuses(state):
                raise JobFailed(
                    f"what was submitted for job {state.label!r} is not its result: "
                    + (state.refused.reason if state.refused else "more is claimed than it is worth"),
                    hint=f"gristmill job dispute {state.label} before {state.window_end} (chain seconds)"
                    if any(state.quote.resolver)
                    else "the job names no resolver: it is paid when its window ends",
                )
            if state.chain is JobState.SETTLED:
                if state.refused is not None and state.refused.result_hash == state.submitted_hash:
                    raise _paid_for_nothing(state, state.refused.reason)
                await steps.fetch(state)
                continue
            if trio.current_time() >= until:
                raise Timeout(f"job {state.label!r} is not done after {timeout_s:g} s", hint="it goes on; ask again")
            await self._jobs.book.changed(min(self._jobs.poll_s, max(0.0, until - trio.current_time())))

    def _kept(self, state: BatchState) -> tuple[ResultItem, ...]:
        """The verified result from this client's disk. Raises `JobFailed` when it was kept too long ago."""
        raw = self._jobs.results.get(bytes(state.checked.result_hash)) if state.checked else None
        if raw is None:
            raise JobFailed(f"the result of job {state.label!r} is not kept any more")
        return read_result(raw).items

    async def cancel(self) -> None:
        """Ask the worker to stop: what is finished by then is the result, and all that is paid. Raises `NodeError`."""
        state = self.state
        if state.ended or state.accepted is not None:
            raise ConfigError(f"job {state.label!r} has ended", hint=f"gristmill job show {state.label}")
        if not state.cancelled:
            await self._jobs.book.change([BatchCancelled(self.job_id)])
        await self._jobs.steps.ask(state, RequestCancel(job_id=bytes(self.job_id)))

    async def bond(self) -> int:
        """What a dispute of this job locks. Raises `ChainError`."""
        state = self.state
        return await self._jobs.chain(state).jobs.dispute_bond(state.quote)

    async def dispute(self, evidence: Hash32) -> None:
        """Challenge what was submitted; locks a bond. Raises `ConfigError` when that cannot be, `ChainError`."""
        state = await refresh(self._jobs.book, self._jobs.chain(self.state).jobs, self.job_id)
        if state.evidence is None:
            bond = await self.bond()
            held = await self._jobs.vaults[state.domain].vault_balance(state.quote.token, state.quote.client)
            if held < bond:
                raise InsufficientFunds(
                    f"a dispute locks a bond of {bond}, the vault holds {held} (smallest units)",
                    hint="gristmill deposit AMOUNT",
                )
            await self._jobs.book.change([BatchDisputed(self.job_id, evidence)])
        await self._jobs.keeper.step(self.job_id)
        state = self.state
        if state.chain is not JobState.DISPUTED and not state.ended:
            raise ChainError(f"the contract does not take the dispute of job {state.label!r} now")


def _paid_for_nothing(state: BatchState, reason: str) -> JobFailed:
    """A wrong result whose job has ended all the same: there is nothing to wait for, and what was paid is gone."""
    how = "by the end of its dispute" if state.resolve_by else "by silence"
    money = f"was paid {state.paid} (smallest units) {how}" if state.paid else "has ended, and nothing was paid"
    return JobFailed(
        f"job {state.label!r} {money}; what was submitted is not its result: {reason}",
        hint="a job that names a resolver can be disputed before its window ends"
        if not any(state.quote.resolver)
        else "",
    )
