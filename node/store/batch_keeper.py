"""Brings batch jobs forward: for each job what `protocol.batch.plan` says, as soon as it says it. The same loop for both roles.

Rules
- A step is never remembered: after a restart, a refusal or a reorganisation the plan names it again.
- Before a transaction the contract is looked at once more, so nothing is sent for a state that is gone.
- `leave`: steps that this role's keeper does not take, because somebody else answers for what they cost.
- One job's trouble is its own: each step runs in a task of its own, and what failed is tried again with a growing pause.
- `now`, which decides when to try, is the later of our clock and the chain's; what cannot be taken back goes by the chain's last
  block (`protocol.batch`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from node.errors import ChainError, LedgerError, NodeError
from node.ports import ChainEvent, Head, Jobs
from node.store.batch import TRANSACTIONS, BatchBook, refresh, transact
from node.store.errors import LedgerClosed, LedgerFailed
from protocol.batch import BatchState, BatchVoided, Step, Timing, plan
from protocol.errors import ProtocolError
from protocol.ids import JobId
from protocol.typed_data import Domain

log = logging.getLogger(__name__)
PAUSE_MOST_S: Final = 15.0
"""Longest pause before a step that failed is tried again: less than any margin."""
Act = Callable[[BatchState, Step], Awaitable[None]]


async def nothing(_: BatchState, __: Step) -> None:
    """Nobody has anything to do first."""


class ChainClock:
    """The best guess at chain time: our own clock, or the chain's where that is ahead."""

    def __init__(self, head: Callable[[], Awaitable[Head]], now_s: Callable[[], int]) -> None:
        self._head = head
        self._now_s = now_s
        self._ahead = 0

    @property
    def now(self) -> int:
        """Chain seconds."""
        return self._now_s() + self._ahead

    async def look(self) -> int:
        """Time of the last block. Raises `ChainError`."""
        timestamp = (await self._head()).timestamp
        self._ahead = max(0, timestamp - self._now_s())
        return timestamp


@dataclass(frozen=True, slots=True)
class JobsChain:
    """A chain as far as batch jobs need it."""

    jobs: Jobs
    clock: ChainClock


@dataclass(slots=True)
class _Memory:
    """What is known of one job beside its state; lost at a restart without harm."""

    busy: bool = False
    looked: float = -1e9
    """When the contract was last asked, by trio's clock."""
    stale: bool = True
    """It was not looked at since the start, or an event spoke of it."""
    pause: float = 0.0
    again: float = -1e9
    """Not before ..."""
    rest: BatchState | None = None
    """... unless the job is not this any more. None: whatever it is."""


class BatchKeeper:
    """`act` does the steps that are no transaction; `first` is done before each transaction."""

    def __init__(
        self,
        *,
        book: BatchBook,
        chains: Mapping[Domain, JobsChain],
        timing: Timing,
        act: Act,
        first: Act = nothing,
        leave: frozenset[Step] = frozenset(),
        poll_s: float = 1.0,
        reread_s: float = 30.0,
    ) -> None:
        self._book = book
        self._chains = chains
        self._timing = timing
        self._act = act
        self._first = first
        self._leave = leave
        self._poll_s = poll_s
        self._reread_s = reread_s
        self._memory: dict[JobId, _Memory] = {}
        self._heads: dict[Domain, tuple[float, int]] = {}
        self._ledger_error: LedgerError | None = None

    def see(self, event: ChainEvent) -> None:
        """An event of the chain, done or undone: a job that it names is looked at, ended or not."""
        raw = event.args.get("jobId")
        if isinstance(raw, bytes) and self._book.get(raw) is not None:
            self._of(JobId(raw)).stale = True
            self._book.nudge()

    async def run(self) -> None:
        """For as long as the node lives. Raises `LedgerError`: nothing is signed after that."""
        async with trio.open_nursery() as nursery:
            while self._ledger_error is None:
                for state in list(self._book.jobs.values()):
                    memory = self._of(state.job_id)
                    if self._due(state, memory):
                        memory.busy = True
                        nursery.start_soon(self._guarded, state.job_id, memory)
                await self._book.changed(self._poll_s)
            nursery.cancel_scope.cancel()
        raise self._ledger_error

    def _due(self, state: BatchState, memory: _Memory) -> bool:
        if memory.busy or (state.ended and not memory.stale):
            return False
        news = memory.rest is not None and (memory.stale or state is not memory.rest)
        return news or trio.current_time() >= memory.again

    async def _guarded(self, job_id: JobId, memory: _Memory) -> None:
        before, memory.rest = self._book.jobs[job_id], None
        try:
            if not await self.step(job_id):
                memory.pause = min(PAUSE_MOST_S, max(self._poll_s, memory.pause * 2))
            elif (
                self._book.jobs[job_id] is before
            ):  # a worker that is still at work is asked now and then, not all the time
                memory.pause, memory.rest = self._poll_s, before
            else:
                memory.pause = 0.0
        except (LedgerFailed, LedgerClosed) as error:
            self._ledger_error = error
            self._book.nudge()
        except (NodeError, ProtocolError) as error:
            log.warning("job %s: %s", job_id, error)
            memory.pause = min(PAUSE_MOST_S, max(self._poll_s, memory.pause * 2))
        finally:
            memory.again = trio.current_time() + memory.pause
            memory.busy = False

    async def step(self, job_id: JobId) -> bool:
        """One look at one job, and what is due. False when it was tried in vain. Raises `ChainError` and what `act` raises."""
        memory, state = self._of(job_id), self._book.jobs[job_id]
        chain = self._chains.get(state.domain)
        if chain is None:
            raise ChainError(f"the job is on chain {state.domain.chain_id}, which is not configured")
        if memory.stale or trio.current_time() >= memory.looked + self._reread_s:
            state = await self._look(chain, job_id)
        now, head = await self._clocks(chain, state.domain)

        def planned(state: BatchState) -> Step | None:
            step = plan(state, now, head, self._timing).step
            return None if step in self._leave else step

        step = planned(state)
        if step in TRANSACTIONS and step is not None:
            await self._first(state, step)
            result = await transact(self._book, chain.jobs, job_id, planned)
            memory.looked = trio.current_time()
            return result is None or result.ok
        if step is Step.VOID:
            if planned(await self._look(chain, job_id)) is Step.VOID:
                await self._book.change([BatchVoided(job_id, head)])
        elif step is not None:
            await self._act(state, step)
        return True

    async def _look(self, chain: JobsChain, job_id: JobId) -> BatchState:
        memory = self._of(job_id)
        memory.stale = False
        try:
            state = await refresh(self._book, chain.jobs, job_id)
        except BaseException:
            memory.stale = True
            raise
        memory.looked = trio.current_time()
        return state

    async def _clocks(self, chain: JobsChain, domain: Domain) -> tuple[int, int]:
        """`now` and `head` of the plan."""
        head = await self._head(chain, domain)
        return chain.clock.now, head

    async def _head(self, chain: JobsChain, domain: Domain) -> int:
        """Time of the last block that counts: a job that is opened and not confirmed yet must not seem void. One question for
        all jobs of a round."""
        asked, timestamp = self._heads.get(domain, (-1e9, 0))
        if trio.current_time() >= asked + self._poll_s / 2:
            latest, confirmed = await chain.clock.look(), await chain.jobs.confirmed_time()
            timestamp = latest if confirmed is None else confirmed
            self._heads[domain] = (trio.current_time(), timestamp)
        return timestamp

    def _of(self, job_id: JobId) -> _Memory:
        memory = self._memory.get(job_id)
        if memory is None:
            memory = self._memory[job_id] = _Memory(stale=not self._book.jobs[job_id].ended)
        return memory
