"""Batch jobs of a client: order one, follow it, get its result verified and paid for.

    job = await client.post_job("smollm2-135m-instruct", lines, messages=[...], max_tokens=64, reward=500_000, id="summaries")
    texts = [item.text for item in await job.result()]

Rules
- A job has the caller's own name. Posting the same name again is the same job: it is ordered, run and paid at most once (B9).
- Nothing is accepted that was not verified: bytes by hash, items by count, cost by the terms and the token ids (B4).
- What is not done by the deadline is refunded by itself, whenever this client lives (B6).
- What a worker owes for a broken word is moved to us by itself, when its delay is over (`node.client.slashes`).
- The keeper does all of it step by step; a restart goes on where the journal ends.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import trio

from node.client import job_quotes
from node.client.job_fetch import Told
from node.client.job_quotes import JobWish, Quoted
from node.client.job_steps import JobSteps, Sign
from node.client.slashes import ClientSlashes
from node.errors import (
    ChainError,
    ConfigError,
    InsufficientFunds,
    JobFailed,
    LedgerError,
    NetworkError,
    NodeError,
    Refused,
    SignerFailed,
    Timeout,
    WorkerFault,
)
from node.ports import Chain, Network
from node.store.batch import BatchBook, refresh
from node.store.batch_keeper import BatchKeeper, ChainClock, JobsChain
from node.store.errors import LedgerClosed, LedgerFailed
from node.store.results import Results
from node.store.signed import OnRecord
from protocol.batch import (
    BatchCancelled,
    BatchDisputed,
    BatchOrdered,
    BatchState,
    Timing,
    refuses,
)
from protocol.errors import InvalidValue, ProtocolError
from protocol.escrow import JobState
from protocol.ids import Hash32, JobId
from protocol.messages import (
    ChatMessage,
    Params,
    RequestCancel,
    encode,
    quote_to_wire,
)
from protocol.selection import Policy
from protocol.signing import QuotedOrder
from protocol.typed_data import Domain, Order
from protocol.workload import PLACE, BatchSpec, ResultItem, content_hash, encode_spec, read_result

if TYPE_CHECKING:
    from node.client.client import Client

log = logging.getLogger(__name__)
LABEL_MOST: Final = 128
Confirm = Callable[[Quoted], Awaitable[None]]
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
        """As the contracts and the worker have it now, as far as they can be asked."""
        await self._jobs.look(self.job_id)
        return self.state

    async def result(self, timeout_s: float | None = None) -> tuple[ResultItem, ...]:
        """Wait for the result; it is verified, kept and accepted when this returns.

        Raises `JobFailed` when there will be none, `Timeout` after `timeout_s`; the job goes on then.
        """
        return await self._jobs.result(self.job_id, timeout_s)

    async def cancel(self) -> None:
        """Ask the worker to stop: what is finished by then is the result, and all that is paid. Raises `NodeError`."""
        await self._jobs.cancel(self.job_id)

    async def dispute(self, evidence: Hash32) -> None:
        """Challenge what was submitted; locks a bond. Raises `ConfigError` when that cannot be, `ChainError`."""
        await self._jobs.dispute(self.job_id, evidence)


class ClientJobs:
    """All jobs of one client. `run` for as long as it lives."""

    def __init__(
        self,
        *,
        client: Client,
        network: Network,
        results: Results,
        book: BatchBook,
        sign: Sign,
        timing: Timing,
        now_ms: Callable[[], int],
        poll_s: float = 2.0,
        reread_s: float = 5.0,
        slash_min: int = 1,
        slash_look_s: float = 60.0,
    ) -> None:
        self._client = client
        self._results = results
        self._poll_s = poll_s
        self.book = book
        self._posting = trio.Lock()
        self._vaults = {chain.jobs.domain: chain for chain in client.wallet.chains if chain.jobs}
        self._chains = {
            domain: JobsChain(chain.jobs, ChainClock(chain.head, lambda: now_ms() // 1000))
            for domain, chain in self._vaults.items()
            if chain.jobs
        }
        self.steps = JobSteps(
            book=book,
            network=network,
            results=results,
            sign=OnRecord(book, sign),
            chain=self._chain,
            now_ms=now_ms,
        )
        self.keeper = BatchKeeper(
            book=book,
            chains=self._chains,
            timing=timing,
            act=self.steps.act,
            first=self.steps.first,
            poll_s=poll_s,
            reread_s=reread_s,
        )
        self.slashes = ClientSlashes(book=book, chains=self._vaults, least=slash_min, look_s=slash_look_s)

    async def run(self) -> None:
        """Bring all jobs forward. Raises `LedgerError`."""
        failed: list[LedgerError] = []
        async with trio.open_nursery() as nursery:

            async def guarded(work: Callable[[], Awaitable[None]]) -> None:
                try:
                    await work()
                except LedgerError as error:
                    failed.append(error)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(guarded, self.keeper.run)
            nursery.start_soon(guarded, self.slashes.run)
        if failed:
            raise failed[0]

    async def tend(self, say: Callable[[str], None] = log.info) -> list[str]:
        """One look at every job whose money is not settled, and what is due: for a client that does not stay. Returns what
        failed, in words; what moves money by itself is told to `say` before it does. No job's trouble keeps another's refund.
        Raises `LedgerError` and `SignerFailed`."""
        failed = []
        for state in self.book.running:
            try:
                await self.keeper.step(state.job_id)
            except (NetworkError, Timeout, Refused, WorkerFault) as error:
                log.info("job %s: %s", state.label, error)  # the worker is not needed for the money
            except (LedgerFailed, LedgerClosed, SignerFailed):  # nothing more is recorded or signed, for no job
                raise
            except (NodeError, ProtocolError) as error:
                failed.append(f"job {state.label}: {error}")
        return failed + await self.slashes.tend(say)

    def chain_of(self, channels: Domain) -> JobsChain | None:
        """The jobs of the chain with this Channels contract; None when that has none, or is not configured."""
        chain = self._client.wallet.chains.get(channels)
        return self._chains.get(chain.jobs.domain) if chain is not None and chain.jobs is not None else None

    def vault_of(self, domain: Domain) -> Chain | None:
        """The chain of jobs in this domain; None when it is not configured."""
        return self._vaults.get(domain)

    async def bond(self, job_id: JobId) -> int:
        """What a dispute of this job locks. Raises `ChainError`."""
        state = self.book.jobs[job_id]
        return await self._chain(state).jobs.dispute_bond(state.quote)

    def _chain(self, state: BatchState) -> JobsChain:
        """Raises `ChainError`."""
        if state.domain not in self._chains:
            raise ChainError(
                f"job {state.label!r} is on chain {state.domain.chain_id}, which is not configured",
                hint="write a [chains.NAME] with its rpc_urls and deployment",
            )
        return self._chains[state.domain]

    def all(self) -> list[Job]:
        return [Job(self, job_id) for job_id in self.book.jobs]

    def get(self, name: str) -> Job:
        """By the caller's name or by the job id. Raises `ConfigError`."""
        state = self.book.named(name)
        if state is None:
            try:
                state = self.book.get(Hash32(name))
            except InvalidValue:
                state = None
        if state is None:
            raise ConfigError(f"{name!r} is no job of this client", hint="gristmill job list")
        return Job(self, state.job_id)

    # --------------------------------------------------------------------------------------------------------- posting

    async def post(
        self,
        model: str,
        inputs: Sequence[str],
        *,
        id: str,  # noqa: A002 (the word that callers use)
        messages: Sequence[Mapping[str, str] | ChatMessage] = ({"role": "user", "content": PLACE},),
        wish: JobWish | None = None,
        policy: Policy | None = None,
        confirm: Confirm | None = None,
        **params: object,
    ) -> Job:
        """Order a job, or go on with the one of that name. Returns when the contract has locked its amount.

        `confirm` sees the quote before it is ordered; when it raises, nothing is ordered.

        Raises `ConfigError` for what cannot be asked, `NoWorker` (with every worker's reason), `InsufficientFunds`, `Refused`,
        `SignerRefused` (over the day's limit, say), `ChainError`, `NetworkError` or `Timeout`. After an error
        the same call with the same `id` goes on where it stopped.
        """
        if not 1 <= len(id) <= LABEL_MOST or not id.isprintable():
            raise ConfigError(f"a job's id has 1 to {LABEL_MOST} printable characters")
        wish = wish or JobWish()
        async with self._posting:
            state = self.book.named(id)
            spec, raw = self._spec(model, inputs, messages, params, state)
            if state is not None and not state.void:
                if state.quote.spec_hash != content_hash(raw):
                    raise ConfigError(
                        f"the id {id!r} is that of another job, {state.job_id}", hint="choose another --id"
                    )
                other = wish.against(state.quote, state.domain)
                if other:
                    raise ConfigError(
                        f"job {id!r} was ordered on other terms: {'; '.join(other)}",
                        hint=f"gristmill job show {id}; what is asked for on these terms needs another --id",
                    )
            else:
                state = await self._order(id, model, spec, raw, wish, policy or Policy(), confirm)
        return await self._opened(state, wish)

    def _spec(
        self,
        model: str,
        inputs: Sequence[str],
        messages: Sequence[Mapping[str, str] | ChatMessage],
        params: Mapping[str, object],
        known: BatchState | None,
    ) -> tuple[BatchSpec, bytes]:
        model_id: Hash32 = self._client.model_id(model)
        if known is not None and not any(model_id):
            model_id = known.model_id  # nobody offers it now; the job of that name says which it was
        try:
            spec = BatchSpec(
                model_id=bytes(model_id),
                params=Params(**params),  # type: ignore[arg-type]
                messages=tuple(m if isinstance(m, ChatMessage) else ChatMessage(**m) for m in messages),  # type: ignore[arg-type]
                inputs=tuple(inputs),
            )
            return spec, encode_spec(spec)
        except (TypeError, InvalidValue) as error:
            raise ConfigError(f"this job cannot be posted: {error}") from None

    async def _order(
        self,
        label: str,
        model: str,
        spec: BatchSpec,
        raw: bytes,
        wish: JobWish,
        policy: Policy,
        confirm: Confirm | None,
    ) -> BatchState:
        """The best quote, journaled as ordered. Nothing is signed yet."""
        if not self._chains:
            raise ChainError("no chain here has a Jobs contract", hint="use `gristmill chat`, or another network")
        quoted = await job_quotes.best(self._client, model, spec, raw, wish, policy)
        quote, domain = quoted.quote, quoted.domain
        # What the day's limit does not let us order is no job, and keeps no name.
        await self._client.wallet.payer.weigh(QuotedOrder(quote, Order(quote.job_id(domain))), domain)
        if confirm is not None:
            await confirm(quoted)
        change = BatchOrdered(
            job_id=quote.job_id(domain),
            chain_id=domain.chain_id,
            contract=domain.verifying_contract,
            label=label,
            peer=str(quoted.peer),
            address=quoted.address,
            model_id=Hash32(spec.model_id),
            quote=encode(quote_to_wire(quote)),
            quote_signature=quoted.signature,
            terms=quoted.raw_terms,
            order_signature=b"",
        )
        await self.book.change([change])
        return self.book.jobs[change.job_id]

    async def _opened(self, state: BatchState, wish: JobWish) -> Job:
        """Wait until the contract has locked the amount. The keeper sends the order. Raises `SignerRefused` as soon as it cannot,
        besides what `post` raises of a worker that does not open it."""
        job, until = Job(self, state.job_id), trio.current_time() + wish.open_s
        while True:
            state = self.book.jobs[job.job_id]
            if state.chain is not JobState.NONE:
                return job
            if job.job_id in self.steps.unsigned and not state.void:
                raise self.steps.unsigned[job.job_id]
            trouble = self.steps.troubles.get(job.job_id, "")
            if state.void:
                raise JobFailed(
                    f"job {state.label!r} was not opened in time" + (f": {trouble}" if trouble else ""),
                    hint="nothing was paid; post it again",
                )
            if trio.current_time() >= until:
                raise Timeout(
                    f"the worker has not opened job {state.label!r}" + (f": {trouble}" if trouble else ""),
                    hint="post it again with the same --id; nothing is paid twice",
                )
            await self.book.changed(min(1.0, self._poll_s))

    # --------------------------------------------------------------------------------------------------------- following

    async def look(self, job_id: JobId) -> None:
        """See one job as it is now. What cannot be asked is left as it was."""
        state = await refresh(self.book, self._chain(self.book.jobs[job_id]).jobs, job_id)
        if state.chain not in (JobState.NONE, JobState.REFUNDED) and state.checked is None:
            try:
                await self.steps.ask(state)
            except NodeError as error:
                log.info("job %s: %s", state.label, error)

    async def result(self, job_id: JobId, timeout_s: float | None) -> tuple[ResultItem, ...]:
        until = float("inf") if timeout_s is None else trio.current_time() + timeout_s
        patience = float("inf")
        while True:
            state = self.book.jobs[job_id]
            if state.accepted is not None:  # a moment for the acceptance to arrive, since our caller may go now
                patience = min(patience, trio.current_time() + DELIVERY_S)
            sent = job_id in self.steps.delivered or trio.current_time() >= patience
            if state.checked is not None and (state.ended or (state.accepted is not None and sent)):
                return self.kept(state)
            if state.void or state.chain is JobState.REFUNDED:
                told = self.steps.told.get(job_id)
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
                await self.steps.fetch(state)
                continue
            if trio.current_time() >= until:
                raise Timeout(f"job {state.label!r} is not done after {timeout_s:g} s", hint="it goes on; ask again")
            await self.book.changed(min(self._poll_s, max(0.0, until - trio.current_time())))

    def kept(self, state: BatchState) -> tuple[ResultItem, ...]:
        """The verified result from this client's disk. Raises `JobFailed` when it was kept too long ago."""
        raw = self._results.get(bytes(state.checked.result_hash)) if state.checked else None
        if raw is None:
            raise JobFailed(f"the result of job {state.label!r} is not kept any more")
        return read_result(raw).items

    async def cancel(self, job_id: JobId) -> None:
        state = self.book.jobs[job_id]
        if state.ended or state.accepted is not None:
            raise ConfigError(f"job {state.label!r} has ended", hint=f"gristmill job show {state.label}")
        if not state.cancelled:
            await self.book.change([BatchCancelled(job_id)])
        await self.steps.ask(state, RequestCancel(job_id=bytes(job_id)))

    async def dispute(self, job_id: JobId, evidence: Hash32) -> None:
        state = await refresh(self.book, self._chain(self.book.jobs[job_id]).jobs, job_id)
        if state.evidence is None:
            bond = await self.bond(job_id)
            held = await self._vaults[state.domain].vault_balance(state.quote.token, state.quote.client)
            if held < bond:
                raise InsufficientFunds(
                    f"a dispute locks a bond of {bond}, the vault holds {held} (smallest units)",
                    hint="gristmill deposit AMOUNT",
                )
            await self.book.change([BatchDisputed(job_id, evidence)])
        await self.keeper.step(job_id)
        state = self.book.jobs[job_id]
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
