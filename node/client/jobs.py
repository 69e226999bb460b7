"""Batch jobs of a client: all of them, brought forward together. `job_posting.py` orders one, `job.py` follows one.

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
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from node.client.job import Job
from node.client.job_posting import JobPosting
from node.client.job_steps import JobSteps, Sign
from node.client.slashes import ClientSlashes
from node.errors import (
    ChainError,
    ConfigError,
    LedgerError,
    NetworkError,
    NodeError,
    Refused,
    SignerFailed,
    Timeout,
    WorkerFault,
)
from node.ports import Chain, Network
from node.store.batch import BatchBook
from node.store.batch_keeper import BatchKeeper, ChainClock, JobsChain
from node.store.errors import LedgerClosed, LedgerFailed
from node.store.results import Results
from node.store.signed import OnRecord
from protocol.batch import BatchState, Timing
from protocol.errors import InvalidValue, ProtocolError
from protocol.ids import Hash32
from protocol.typed_data import Domain

if TYPE_CHECKING:
    from node.client.client import Client

log = logging.getLogger(__name__)


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
        self.results = results
        self.poll_s = poll_s
        self.book = book
        self.vaults = {chain.jobs.domain: chain for chain in client.wallet.chains if chain.jobs}
        """Our chains that have batch jobs, by the domain of their Jobs contract."""
        self._chains = {
            domain: JobsChain(chain.jobs, ChainClock(chain.head, lambda: now_ms() // 1000))
            for domain, chain in self.vaults.items()
            if chain.jobs
        }
        self.steps = JobSteps(
            book=book,
            network=network,
            results=results,
            sign=OnRecord(book, sign),
            chain=self.chain,
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
        self.posting = JobPosting(
            client=client, book=book, steps=self.steps, has_chains=bool(self._chains), poll_s=poll_s
        )
        self.slashes = ClientSlashes(book=book, chains=self.vaults, least=slash_min, look_s=slash_look_s)

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
        return self.vaults.get(domain)

    def chain(self, state: BatchState) -> JobsChain:
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
