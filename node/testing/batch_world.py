"""One batch job between two drivers that keep to `protocol.batch`, over `protocol.escrow` as the chain. Pure, and seeded.

Both sides journal before they act and can die between the two; messages can be lost; blocks can be undone. A side can also be
dishonest in one way. Nothing here decides what is right: it asks `plan`, and does what it says. The tests judge.

The module under test is handed in, so that tests can hand in one with a bug planted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from msgspec import structs

from node.testing.pair import key
from protocol import batch as real
from protocol import escrow
from protocol.channel import Role
from protocol.errors import RemoteProtocolError
from protocol.escrow import Escrow, EscrowError, JobState, Outcome
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId
from protocol.messages import ChatMessage, FinishReason, Params, encode, quote_to_wire
from protocol.pricing import Price
from protocol.typed_data import Domain, Order, Quote, Submission
from protocol.workload import (
    NOT_BEGUN,
    BatchResult,
    BatchSpec,
    ResultItem,
    Terms,
    check_result,
    claim_of,
    content_hash,
    encode_result,
    encode_spec,
    encode_terms,
    terms_hash,
)

START = 1_800_000_000
DURATION = 900
WINDOW = 900
PENALTY = 400
TOKEN = Address(b"\x07" * 20)
RESOLVER = Address(b"\x08" * 20)
CLIENT, WORKER, OWNER = key("payer"), key("worker"), key("owner")
DOMAIN = Domain(31337, Address(bytes(range(20))))
FUNDS = 10_000
INPUTS = ("one", "two", "three")
TICK_MOST = 50
"""Seconds between two looks of a driver that lives, at most."""


class WorkerKind(StrEnum):
    HONEST = "honest"
    SLOW = "slow"
    """Cannot make the deadline, and says so."""
    DEAD = "dead"
    """From the moment the job is open."""
    LIAR = "liar"
    """Submits bytes that are no result."""
    GREEDY = "greedy"
    """Tells the client what the result is worth, and the contract a little more."""
    LEAVER = "leaver"
    """Dies for ever when the submission is in."""
    HIDER = "hider"
    """Submits, and shows nobody the result."""


class ClientKind(StrEnum):
    HONEST = "honest"
    DEAD = "dead"
    """From the moment its order is sent."""
    DISPUTER = "disputer"
    """Disputes what it cannot verify."""


class Side:
    """A journal and the state that it folds to."""

    def __init__(self, role: Role, module: Any) -> None:
        self.role = role
        self.module = module
        self.journal: list[real.Change] = []
        self.states: dict[JobId, real.BatchState] = {}

    def note(self, change: real.Change) -> None:
        """Raises `ProtocolError`; then nothing is journaled."""
        self.module.fold(self.role, self.states, change)
        self.journal.append(change)

    def restart(self) -> None:
        """Forget everything that is not journaled."""
        self.states = {}
        for change in self.journal:
            self.module.fold(self.role, self.states, change)


@dataclass
class BatchWorld:
    worker_kind: WorkerKind = WorkerKind.HONEST
    client_kind: ClientKind = ClientKind.HONEST
    whole: bool = False
    """Every input gives all the tokens that were asked for, so that the claim is the whole amount."""
    resolver: Address = RESOLVER
    module: Any = real
    now: int = START
    head: int = START
    state: Escrow = field(init=False)
    history: list[Escrow] = field(default_factory=list)
    progress: int = 0
    reorged: bool = False
    transactions: list[str] = field(default_factory=list)
    """Names of what the contract took, in order, reorganisations aside."""
    paid: int = 0
    """What the contract told of at the last settlement."""
    claimed: int | None = None
    """Of the last submission."""
    signed: set[tuple[Hash32, int]] = field(default_factory=set)
    """Submissions that the worker's key signed."""

    def __post_init__(self) -> None:
        self.spec = BatchSpec(
            model_id=bytes(32),
            params=Params(max_tokens=4),
            messages=(ChatMessage(role="user", content="{input}"),),
            inputs=INPUTS,
        )
        self.terms = Terms(
            price=Price(request=10, input=1_000_000, output=20_000_000),
            input_tokens=(3, 4, 5),
            max_tokens=4,
            nonce=bytes(16),
        )
        self.quote = Quote(
            spec_hash=content_hash(encode_spec(self.spec)),
            client=CLIENT.address,
            worker=WORKER.address,
            token=TOKEN,
            amount=self.terms.amount,
            penalty=PENALTY,
            valid_before=START + 120,
            deadline=START + DURATION,
            window=WINDOW,
            resolver=self.resolver,
            salt=terms_hash(encode_terms(self.terms)),
        )
        self.job_id = self.quote.job_id(DOMAIN)
        self.timing = self.module.Timing()
        self.client, self.worker = Side(Role.CLIENT, self.module), Side(Role.WORKER, self.module)
        self.outcome = Outcome.NONE
        state = Escrow(
            Domain(31337, Address(b"\x01" * 20)), Address(b"\x02" * 20), frozenset({TOKEN}), jobs_domain=DOMAIN
        )
        for who in (CLIENT.address, OWNER.address):
            state = escrow.deposit(state, TOKEN, FUNDS, who)
        state = escrow.register(state, START, OWNER.address, WORKER.address, WORKER.address, START + 1, WORKER.address)
        state = escrow.stake(state, OWNER.address, TOKEN, 2_000)
        self.state = escrow.set_exposure(state, OWNER.address, TOKEN, 2_000)
        self.client.note(self.order(Role.CLIENT))

    def order(self, role: Role, nonce: bytes = bytes(16)) -> real.BatchOrdered:
        """The job's order; with another nonce one for an equal job."""
        terms = encode_terms(structs.replace(self.terms, nonce=nonce))
        quote = replace(self.quote, salt=terms_hash(terms))
        job_id = quote.job_id(DOMAIN)
        return real.BatchOrdered(
            job_id=job_id,
            chain_id=DOMAIN.chain_id,
            contract=DOMAIN.verifying_contract,
            label="job" if role is Role.CLIENT else "",
            peer=str(WORKER.peer_id),
            address="",
            model_id=Hash32(bytes(32)),
            quote=encode(quote_to_wire(quote)),
            quote_signature=WORKER.sign(quote.digest(DOMAIN)),
            terms=terms,
            order_signature=CLIENT.sign(Order(job_id).digest(DOMAIN)),
        )

    # ------------------------------------------------------------------------------------------------------ what is seen

    @property
    def client_state(self) -> real.BatchState:
        return self.client.states[self.job_id]

    @property
    def worker_state(self) -> real.BatchState | None:
        return self.worker.states.get(self.job_id)

    @property
    def worker_lives(self) -> bool:
        reached = self.state.job(self.job_id).state
        if self.worker_kind is WorkerKind.DEAD:
            return reached is JobState.NONE
        return self.worker_kind is not WorkerKind.LEAVER or reached in (JobState.NONE, JobState.OPEN)

    @property
    def client_lives(self) -> bool:
        return self.client_kind is not ClientKind.DEAD or self.worker_state is None

    @property
    def balances(self) -> tuple[int, int]:
        """Free in the vault: the client's, and what the worker has earned."""
        return self.state.balance_of(TOKEN, CLIENT.address), self.state.balance_of(TOKEN, WORKER.address)

    def result(self) -> tuple[bytes, int]:
        """The worker's result and what it asks for it."""
        count = 4 if self.whole else 2
        reason = FinishReason.LENGTH if self.whole else FinishReason.STOP
        items: list[ResultItem] = [ResultItem(tuple(range(count)), "text", reason) for _ in INPUTS]
        if self.worker_kind is WorkerKind.LIAR:
            items[1] = NOT_BEGUN
        raw = encode_result(BatchResult(spec_hash=bytes(self.quote.spec_hash), items=tuple(items)))
        worth = claim_of(self.terms, items)
        greed = self.worker_kind is WorkerKind.GREEDY
        return raw, min(worth + 1, self.quote.amount) if greed else worth

    def see(self, side: Side) -> None:
        job, dispute = self.state.job(self.job_id), self.state.dispute(self.job_id)
        sight = real.BatchSeen(
            job_id=self.job_id,
            state=int(job.state),
            window_end=job.window_end,
            claimed=job.claimed,
            result_hash=job.result_hash,
            resolve_by=dispute.resolve_by,
            outcome=int(dispute.outcome if dispute.ended else self.outcome),
            paid=self.paid if job.state is JobState.SETTLED else 0,
        )
        if real.sight_of(side.states[self.job_id]) != sight:
            side.note(sight)

    # ------------------------------------------------------------------------------------------------------ what happens

    def transact(self, name: str, after: Any) -> bool:
        """One transaction: a revert costs nothing here, because it is simulated first."""
        try:
            state = after(self.state)
        except EscrowError:
            return False
        self.history.append(self.state)
        before, self.state, self.head = self.state, state, max(self.head, self.now)
        claimed = before.job(self.job_id).claimed
        match name:  # what the Settled event tells
            case "settle":
                self.paid = state.balance_of(TOKEN, WORKER.address)
            case "finalize":
                self.paid = claimed
            case "resolve":
                self.paid = {Outcome.ACCEPT: 0, Outcome.REJECT: claimed}.get(self.outcome, claimed // 2)
        if state.job(self.job_id).state is JobState.SUBMITTED:
            self.claimed = state.job(self.job_id).claimed
        self.transactions.append(name)
        return True

    def mine(self) -> None:
        self.head = max(self.head, self.now)

    def reorg(self, depth: int) -> None:
        """Undo the last transactions; what was sent is not sent again by itself."""
        for _ in range(min(depth, len(self.history))):
            self.state = self.history.pop()
            self.reorged = True

    def tick(self, role: Role, *, crash: bool = False, lost: bool = False, guess: int = 0) -> None:
        """One look of one driver. `crash`: it dies after it journaled and before it acts. `lost`: the network delivers
        nothing. `guess`: how far off its idea of chain time is."""
        side = self.client if role is Role.CLIENT else self.worker
        if not (self.client_lives if role is Role.CLIENT else self.worker_lives) or self.job_id not in side.states:
            return
        self.see(side)
        disputes = self.client_kind is ClientKind.DISPUTER and self.quote.resolver != ZERO_ADDRESS
        if disputes and role is Role.CLIENT and self.module.doubts(self.client_state, self.now, self.timing):
            side.note(real.BatchDisputed(self.job_id, Hash32(b"\x05" * 32)))
        plan = self.module.plan(side.states[self.job_id], self.now + guess, self.head, self.timing)
        if plan.step is not None:
            self._act(role, plan.step.value, crash, lost)
        if crash:
            side.restart()

    def _act(self, role: Role, step: str, crash: bool, lost: bool) -> None:
        quote, now = self.quote, self.now
        me = CLIENT.address if role is Role.CLIENT else WORKER.address
        side = self.client if role is Role.CLIENT else self.worker
        held = side.states[self.job_id]
        match step:
            case "void":
                side.note(real.BatchVoided(self.job_id, self.head))
            case "run":
                self._run(crash)
            case "fetch":
                self._fetch(lost)
            case "accept":
                self._accept(held, crash, lost)
            case "order" if not crash and not lost and self.worker_lives and self.worker_state is None:
                self.worker.note(self.order(Role.WORKER))
            case "open" if not crash:
                self.transact(step, lambda s: escrow.open_job(s, now, me, quote, quote.worker, quote.client))
            case "submit" if not crash and held.result is not None:
                kept = held.result
                self.transact(
                    step, lambda s: escrow.submit(s, now, me, quote, kept.result_hash, kept.claimed, quote.worker)
                )
            case "settle" if not crash and held.accepted is not None:
                said = held.accepted
                self.transact(
                    step, lambda s: escrow.settle_job(s, now, me, quote, said.result_hash, said.amount, quote.client)
                )
            case "finalize" if not crash:
                self.transact(step, lambda s: escrow.finalize(s, now, quote))
            case "refund" if not crash:
                self.transact(step, lambda s: escrow.refund(s, now, me, quote))
            case "fail" if not crash:
                self.transact(step, lambda s: escrow.fail(s, now, me, quote))
            case "dispute" if not crash and held.evidence is not None:
                said_hash = held.evidence
                self.transact(step, lambda s: escrow.open_dispute(s, now, 1, me, quote, said_hash))
            case "resolve" if not crash:
                self.transact(step, lambda s: escrow.resolve_dispute(s, now, quote, self.outcome))

    def _run(self, crash: bool) -> None:
        if self.state.job(self.job_id).state is not JobState.OPEN and not self.reorged:
            raise AssertionError("the worker computes for what is not locked (B8)")
        if crash:
            return
        if self.worker_kind is WorkerKind.SLOW:
            if self.now >= self.quote.deadline - self.timing.submit_margin:
                self.worker.note(real.BatchGivenUp(self.job_id, "too slow"))
            return
        self.progress += 1
        if self.progress >= len(INPUTS):
            raw, claimed = self.result()
            digest = Submission(self.job_id, content_hash(raw), claimed)
            self.signed.add((digest.result_hash, digest.claimed))
            self.worker.note(real.BatchResultKept(self.job_id, digest.result_hash, claimed, len(raw), self.now))

    def _fetch(self, lost: bool) -> None:
        worker = self.worker_state
        if (
            lost
            or not self.worker_lives
            or worker is None
            or worker.result is None
            or self.worker_kind is WorkerKind.HIDER
        ):
            return
        raw, kept = self.result()[0], worker.result
        mine = self.client_state
        told = kept.claimed - (self.worker_kind is WorkerKind.GREEDY)
        claimed = mine.claimed if mine.chain is JobState.SUBMITTED else told
        try:
            cost = check_result(
                raw,
                quote=self.quote,
                terms=self.terms,
                result_hash=kept.result_hash,
                claimed=claimed,
                partial=mine.cancelled,
            )
        except RemoteProtocolError as error:
            if mine.refused is None:
                self.client.note(real.BatchResultRefused(self.job_id, kept.result_hash, str(error)))
            return
        if mine.checked is None or mine.checked.result_hash != kept.result_hash:
            self.client.note(real.BatchResultChecked(self.job_id, kept.result_hash, claimed, cost, len(raw)))

    def _accept(self, held: real.BatchState, crash: bool, lost: bool) -> None:
        if held.checked is None:
            raise AssertionError("what was not verified is to be accepted (B4)")
        change = held.accepted
        if change is None:
            amount = held.claimed if held.chain is JobState.SUBMITTED else held.quote.amount
            change = real.BatchAccepted(self.job_id, held.checked.result_hash, amount, bytes(65), self.now)
            self.client.note(change)
        worker = self.worker_state
        if not crash and not lost and self.worker_lives and worker is not None and worker.accepted is None:
            try:
                self.worker.note(change)
            except RemoteProtocolError:
                pass

    # ------------------------------------------------------------------------------------------------------------ the end

    def finish(self) -> None:
        """Let time pass until whoever lives has nothing left to do. Raises `AssertionError` when that never comes."""
        for _ in range(200):
            if self.state.job(self.job_id).state in (JobState.SETTLED, JobState.REFUNDED) or self.idle():
                break
            disputed = self.state.job(self.job_id).state is JobState.DISPUTED
            self.now += 14 * 24 * 3600 if disputed else TICK_MOST
            self.mine()
            self.tick(Role.WORKER)
            self.tick(Role.CLIENT)
        for role in Role:
            self.tick(role)

    def idle(self) -> bool:
        """Nothing is locked, and the quote's time is over."""
        return self.state.job(self.job_id).state is JobState.NONE and self.head >= self.quote.valid_before
