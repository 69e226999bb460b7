"""Batch jobs of one worker, put together: book, quotes, answers, runner, keeper."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from node.network.drive import serve_one
from node.ports import Backend, ByteStream, Chain, ChainEvent
from node.store.batch import BatchBook
from node.store.batch_keeper import BatchKeeper, ChainClock, JobsChain
from node.store.ledger import Ledger
from node.store.results import Results
from node.store.signed import OnRecord
from node.store.writer import Work
from node.worker.batch import BatchDesk, BatchRules, Sign
from node.worker.batch_quotes import BatchAsset, QuoteDesk, QuoteRules, spec_key
from node.worker.batch_run import BatchRunner, RunSettings
from node.worker.desk import Speed
from node.worker.tenants import Tenants
from protocol.batch import BatchState, Step, Timing
from protocol.channel import Role
from protocol.ids import Address, ModelId
from protocol.messages import BATCH_PROTOCOL
from protocol.typed_data import Domain

UPLOAD_S: Final = 60.0
"""From the first byte of a question to its last: a specification may have 3.5 MiB."""


@dataclass(frozen=True, slots=True)
class BatchSettings:
    quotes: QuoteRules = field(default_factory=QuoteRules)
    rules: BatchRules = field(default_factory=BatchRules)
    run: RunSettings = field(default_factory=RunSettings)
    timing: Timing = field(default_factory=Timing)
    poll_s: float = 1.0
    reread_s: float = 30.0


class BatchService:
    """Made by the worker; `run` for as long as it lives."""

    def __init__(
        self,
        *,
        worker: Address,
        sign: Sign,
        ledger: Ledger,
        results: Results,
        chains: Mapping[Domain, Chain],
        assets: Mapping[tuple[Domain, Address], BatchAsset],
        backend: Backend,
        speeds: Mapping[ModelId, Speed],
        settings: BatchSettings,
        places: int,
        streams_live: Callable[[], int],
        chain_age_ms: Callable[[Domain], int],
        now_ms: Callable[[], int],
        tenants: Tenants,
        random16: Callable[[], bytes] = lambda: os.urandom(16),
    ) -> None:
        """`chains`: by the domain of their Jobs contract. `assets`: what jobs are paid in, by that domain and token.
        `chain_age_ms`: since the chain of that domain was last seen."""
        jobs = {
            domain: JobsChain(chain.jobs, ChainClock(chain.head, lambda: now_ms() // 1000))
            for domain, chain in chains.items()
            if chain.jobs is not None
        }

        def leaves(state: BatchState) -> Work[None]:
            """The specification of a void job stays while there is room: should a reorganisation deeper than we wait for
            have it opened after all, it has to be run."""
            key = spec_key(state.job_id)
            return results.releasing(key, now_ms=now_ms()) if state.void else results.forgetting([key])

        self.book = BatchBook.restore(ledger, Role.WORKER, leaves)
        self.quotes = QuoteDesk(
            worker=worker,
            rules=settings.quotes,
            assets=assets,
            chains=jobs,
            backend=backend,
            speeds=speeds,
            results=results,
            now_ms=now_ms,
            random16=random16,
            backlog=self._backlog,
        )
        self.runner = BatchRunner(
            book=self.book,
            results=results,
            backend=backend,
            settings=settings.run,
            now_ms=now_ms,
            chain_now=lambda domain: jobs[domain].clock.now,
            streams_live=streams_live,
            places=places,
            tenants=tenants,
            seconds_per_item=lambda model, tokens: self.quotes.seconds_of(model, (0,), tokens),
            least=self._least,
        )
        self.desk = BatchDesk(
            worker=worker,
            sign=OnRecord(self.book, sign),
            book=self.book,
            results=results,
            chains=chains,
            jobs=jobs,
            quotes=self.quotes,
            progress=self.runner,
            rules=settings.rules,
            timing=settings.timing,
            now_ms=now_ms,
            chain_age_ms=chain_age_ms,
        )
        self.keeper = BatchKeeper(
            book=self.book,
            chains=jobs,
            timing=settings.timing,
            act=self._act,
            leave=frozenset({Step.OPEN}),  # the desk opens, within the allowance for what strangers make us burn
            poll_s=settings.poll_s,
            reread_s=settings.reread_s,
        )

    async def handle(self, stream: ByteStream) -> None:
        """One stream of `/gristmill/batch/1`."""
        await serve_one(stream, BATCH_PROTOCOL, self.desk.answer, timeout_s=600, frame_s=UPLOAD_S)

    async def run(self) -> None:
        """Raises `LedgerError`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.keeper.run)
            nursery.start_soon(self.runner.run)

    def see(self, event: ChainEvent) -> None:
        self.keeper.see(event)

    def report(self) -> list[dict[str, Any]]:
        """For `status`: jobs that are not settled yet."""
        return [
            {
                "job": str(state.job_id),
                "state": state.chain.name.lower(),
                "done": len(state.terms.input_tokens) if state.result else self.runner.done(state.job_id),
                "total": len(state.terms.input_tokens),
                "amount": str(state.quote.amount),
                "token": str(state.quote.token),
                "deadline": state.quote.deadline,
                "failure": state.failure,
            }
            for state in self.book.running
        ]

    async def _act(self, state: BatchState, step: Step) -> None:
        if step is Step.RUN:
            self.runner.want(state)
        await trio.lowlevel.checkpoint()

    def _least(self, state: BatchState) -> int:
        asset = self.quotes.assets.get((state.domain, state.quote.token))
        return asset.min_amount if asset else 0

    def _backlog(self) -> tuple[int, float, int]:
        running = self.book.running
        waiting = [state for state in running if state.result is None and not state.failure]
        ahead = sum(
            self.quotes.seconds_of(ModelId(state.model_id), state.terms.input_tokens, state.terms.max_tokens)
            for state in waiting
            if not self.runner.has(state.job_id)  # ordered a moment ago: it will be opened, and come first
        )
        return len(running), self.runner.backlog_s + ahead, sum(state.terms.room for state in waiting)
