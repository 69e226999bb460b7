"""One batch job under attack: both drivers and the model of the contracts, with crashes, lost messages, reorganisations, and a
side that is silent or lies. Whatever happens, it ends, with the money where the table in docs/spec/batch.md says.

The same world is then let loose on mutants of `protocol/batch.py`, each with one rule broken: it must kill every one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import protocol.batch as real
from node.testing.batch_world import (
    DURATION,
    FUNDS,
    OWNER,
    PENALTY,
    RESOLVER,
    START,
    TICK_MOST,
    TOKEN,
    WORKER,
    BatchWorld,
    ClientKind,
    WorkerKind,
)
from protocol.channel import Role
from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, WireCode
from protocol.escrow import JobState, Module, Outcome, SlashState
from protocol.escrow.disputes import bond_for
from protocol.ids import ZERO_ADDRESS, Hash32
from protocol.records import decode_batch, encode_body, kind_of
from protocol.workload import claim_of, read_result


def slashed(world: BatchWorld) -> int:
    return sum(s.amount for s in world.state.slashes.values() if s.state is SlashState.BOOKED)


def worth(world: BatchWorld) -> int:
    return claim_of(world.terms, read_result(world.result()[0]).items)


def check_step(world: BatchWorld) -> None:
    """What holds at every moment."""
    mine, theirs = world.client_state, world.worker_state
    assert len(world.signed) <= 1  # B2
    kept = [c for c in world.worker.journal if isinstance(c, real.BatchResultKept)]
    assert len(kept) <= 1  # B2
    for side in (world.client, world.worker):
        said = {(c.result_hash, c.amount) for c in side.journal if isinstance(c, real.BatchAccepted)}
        assert len(said) <= 1  # B3
    if mine.accepted is not None:
        checked = [c for c in world.client.journal if isinstance(c, real.BatchResultChecked)]
        assert mine.accepted.result_hash in {c.result_hash for c in checked}  # B4
        assert mine.accepted.amount <= min(worth(world), mine.quote.amount)  # B4
        assert world.worker_kind not in (WorkerKind.LIAR, WorkerKind.HIDER)  # B4
    if theirs is not None and theirs.failure:
        assert theirs.result is None  # B10
    client, worker = world.balances
    bond = bond_for(world.quote) if world.state.dispute(world.job_id).ended else 0
    assert 0 <= worker <= world.quote.amount + bond  # paid at most once
    assert client <= FUNDS
    if not world.reorged:
        assert world.transactions.count("open") <= 1
        assert sum(world.transactions.count(name) for name in ("settle", "finalize", "refund", "fail", "resolve")) <= 1


def check_end(world: BatchWorld) -> None:
    """Where the money is when it is over."""
    state, quote = world.state, world.quote
    job = state.job(world.job_id)
    assert job.state in (JobState.NONE, JobState.SETTLED, JobState.REFUNDED)  # B7
    assert state.locked_by(Module.JOBS, TOKEN) == state.locked_by(Module.DISPUTES, TOKEN) == 0  # B7
    assert state.stake_of(OWNER.address, TOKEN).held == 0
    client, worker = world.balances
    dispute = state.dispute(world.job_id)
    if job.state is not JobState.SETTLED:
        assert (client, worker) == (FUNDS, 0)
    elif not dispute.ended:
        paid = quote.amount if world.claimed is None else world.claimed
        assert (client, worker) == (FUNDS - paid, paid)
        assert slashed(world) == 0
        if world.worker_kind is WorkerKind.HONEST:
            assert paid == worth(world)
    else:
        bond, claimed = bond_for(quote), world.claimed or 0
        half_bond = bond // 2
        to_worker, bond_back, penalty = {
            Outcome.ACCEPT: (0, bond - half_bond, PENALTY),
            Outcome.REJECT: (claimed, 0, 0),
            Outcome.DRAW: (claimed // 2, bond - half_bond, 0),
            Outcome.NONE: (claimed // 2, bond, 0),
        }[dispute.outcome]
        to_worker += bond - half_bond if dispute.outcome is Outcome.REJECT else 0
        pay = claimed if dispute.outcome is Outcome.REJECT else to_worker
        assert (client, worker) == (FUNDS - pay - bond + bond_back, to_worker)
        assert slashed(world) == penalty
    if world.client_lives:
        assert world.client_state.ended
        assert world.client_state.paid == (world.paid if job.state is JobState.SETTLED else 0)
    if job.state is JobState.REFUNDED and not world.reorged:
        if world.worker_kind is WorkerKind.DEAD:
            assert slashed(world) == PENALTY
        else:
            assert slashed(world) <= PENALTY // 4 or world.late, "a worker that lives is never silent (B5)"
            assert world.worker_kind is WorkerKind.SLOW or world.late, "a result in time is submitted in time (B5)"
    for side in (world.client, world.worker):
        check_journal(side, world)


def check_journal(side: Any, world: BatchWorld) -> None:
    """B1: the journal, through its codec, folds to the state."""
    read = [decode_batch(kind_of(c), encode_body(c)) for c in side.journal]
    assert read == side.journal
    states: dict[Any, Any] = {}
    for change in read:
        side.module.fold(side.role, states, change)
    assert states == side.states


class Watched(BatchWorld):
    """Counts how long things stand still."""

    late = False
    """The result came when there was hardly time left to submit it."""

    def pass_time(self, seconds: int, crash: Role | None = None, lost: bool = False, guess: int = 0) -> None:
        """Both drivers look after each step of time; at most one of them dies at it, and then lives at the next."""
        self.now += seconds
        for role in (Role.WORKER, Role.CLIENT):
            before = self.worker_state.result if self.worker_state else None
            self.tick(role, crash=role is crash, lost=lost, guess=guess)
            after = self.worker_state.result if self.worker_state else None
            if before is None and after is not None and self.now > self.quote.deadline - 3 * TICK_MOST:
                self.late = True
        check_step(self)
        # B6: nobody who lives leaves the money there when the deadline is over.
        overdue = self.now >= self.quote.deadline + 2 * TICK_MOST + 5 and self.client_lives and crash is not Role.CLIENT
        if overdue and not self.reorged and self.state.job(self.job_id).state is JobState.OPEN:
            assert self.client_state.accepted is not None


def worlds() -> list[tuple[WorkerKind, ClientKind]]:
    """All but those where both die: then nobody acts, and anybody who came by could."""
    dying = (WorkerKind.DEAD, WorkerKind.LEAVER)
    return [(w, c) for w, c in product(WorkerKind, ClientKind) if w not in dying or c is not ClientKind.DEAD]


class BatchMachine(RuleBasedStateMachine):
    module: Any = real

    @initialize(
        kinds=st.sampled_from(worlds()),
        whole=st.booleans(),
        resolver=st.sampled_from([RESOLVER, RESOLVER, ZERO_ADDRESS]),
    )
    def begin(self, kinds: tuple[WorkerKind, ClientKind], whole: bool, resolver: Any) -> None:
        self.world = Watched(kinds[0], kinds[1], whole, resolver, self.module)
        self.crashed: Role | None = None

    @rule(
        seconds=st.integers(0, TICK_MOST),
        crash=st.sampled_from([None, None, None, *Role]),
        lost=st.sampled_from([False, False, False, True]),
        guess=st.integers(-5, 5),
    )
    def pass_time(self, seconds: int, crash: Role | None, lost: bool, guess: int) -> None:
        crash = None if crash is self.crashed else crash
        self.world.pass_time(seconds, crash, lost, guess)
        self.crashed = crash

    @rule()
    def mine(self) -> None:
        self.world.mine()

    @rule(depth=st.integers(1, 2), really=st.integers(0, 9))
    def reorg(self, depth: int, really: int) -> None:
        if really == 0:
            self.world.reorg(depth)

    @precondition(lambda self: self.world.state.job(self.world.job_id).state is JobState.DISPUTED)
    @rule(outcome=st.sampled_from(Outcome))
    def the_resolver_says(self, outcome: Outcome) -> None:
        if self.world.outcome is Outcome.NONE:
            self.world.outcome = outcome

    @rule(which=st.sampled_from(["kept", "accepted", "given up", "voided", "disputed", "ordered", "checked"]))
    def attack(self, which: str) -> None:
        attack(self.world, which)

    @invariant()
    def every_moment(self) -> None:
        if hasattr(self, "world"):
            check_step(self.world)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()
            check_end(self.world)


def attack(world: BatchWorld, which: str) -> None:
    """A change that must be refused, and must leave no trace (B1). What may be by chance is left alone."""
    mine, theirs = world.client_state, world.worker_state
    other = Hash32(b"\x77" * 32)
    side, change = world.client, None
    match which:
        case "kept" if theirs is not None and (theirs.result is not None or theirs.failure):
            side, change = (
                world.worker,
                real.BatchResultKept(world.job_id, other, 1, 1, world.now),
            )  # B2, B10
        case "accepted" if theirs is not None and theirs.accepted is not None:
            more = theirs.accepted.amount + 1
            side, change = (
                world.worker,
                real.BatchAccepted(world.job_id, theirs.accepted.result_hash, more, b"", 0),
            )  # B3
        case "accepted" if mine.accepted is not None:
            change = real.BatchAccepted(world.job_id, mine.accepted.result_hash, mine.accepted.amount - 1, b"", 0)  # B3
        case "accepted":
            amount = mine.claimed if mine.chain is JobState.SUBMITTED else mine.quote.amount
            change = real.BatchAccepted(world.job_id, other, amount, bytes(65), world.now)  # B4
        case "given up" if theirs is not None and theirs.result is not None:
            side, change = world.worker, real.BatchGivenUp(world.job_id, "no")  # B10
        case "voided" if mine.chain is not JobState.NONE or world.head < mine.quote.valid_before:
            late = mine.quote.valid_before - (mine.chain is JobState.NONE)
            change = real.BatchVoided(world.job_id, late)  # B9
        case "disputed" if mine.chain is not JobState.SUBMITTED or mine.accepted is not None:
            change = real.BatchDisputed(world.job_id, other)
        case "ordered" if not mine.void:
            change = world.order(Role.CLIENT, b"another order..."[:16])  # B9
        case "checked" if mine.accepted is not None:
            change = real.BatchResultChecked(world.job_id, other, 1, 1, 1)  # B3
    if change is None:
        return
    before, journal = dict(side.states), list(side.journal)
    with pytest.raises(ProtocolError):
        side.note(change)
    assert (side.states, side.journal) == (before, journal)


EFFORT = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


def test_a_batch_job_always_ends_with_the_money_where_the_table_says() -> None:
    run_state_machine_as_test(BatchMachine, settings=EFFORT)


# ------------------------------------------------------------------------------------------------- each way, by name


def until(world: Watched, reached: Callable[[], bool], seconds: int = 10, **how: Any) -> None:
    """Raises `AssertionError` when that does not come."""
    for _ in range(300):
        if reached():
            return
        world.mine()
        world.pass_time(seconds, **how)
    raise AssertionError("it never came")


def run_to_end(world: Watched, seconds: int = 20) -> Watched:
    for _ in range(120):
        world.mine()
        world.pass_time(seconds)
    world.finish()
    check_end(world)
    return world


def test_an_honest_pair_is_done_by_submission_and_acceptance() -> None:
    world = run_to_end(Watched())
    assert world.transactions == ["open", "submit", "settle"]
    assert world.balances == (FUNDS - worth(world), worth(world))
    assert world.client_state.paid == worth(world) < world.quote.amount
    assert world.now < START + DURATION * 4


def test_a_claim_below_the_amount_is_submitted_at_once() -> None:
    world = Watched()
    until(world, lambda: world.worker_state is not None and world.worker_state.result is not None)
    world.pass_time(1)
    assert world.transactions == ["open", "submit"]


def test_a_result_worth_the_whole_amount_needs_no_submission() -> None:
    world = run_to_end(Watched(whole=True), seconds=5)
    assert world.transactions == ["open", "settle"]
    assert world.balances == (FUNDS - world.quote.amount, world.quote.amount)


@pytest.mark.parametrize("whole", [False, True])
def test_a_client_that_is_silent_after_the_order_pays_by_the_window(whole: bool) -> None:
    world = run_to_end(Watched(client_kind=ClientKind.DEAD, whole=whole))
    assert world.transactions == ["open", "submit", "finalize"]
    assert world.balances[1] == worth(world)


def test_a_worker_that_is_silent_is_refunded_and_slashed_in_full() -> None:
    world = Watched(worker_kind=WorkerKind.DEAD)
    until(world, lambda: world.now >= START + DURATION + TICK_MOST)
    assert world.transactions == ["open", "refund"]
    assert world.balances == (FUNDS, 0)
    assert slashed(world) == PENALTY
    check_end(world)


def test_a_worker_that_fails_honestly_loses_a_quarter_and_says_so_before_the_deadline() -> None:
    world = Watched(worker_kind=WorkerKind.SLOW)
    until(world, lambda: bool(world.state.slashes))
    assert world.now < START + DURATION
    assert world.transactions == ["open", "fail"]
    assert slashed(world) == PENALTY // 4
    run_to_end(world)


@pytest.mark.parametrize("worker", [WorkerKind.LIAR, WorkerKind.GREEDY, WorkerKind.HIDER])
@pytest.mark.parametrize("outcome", Outcome)
def test_what_cannot_be_verified_is_never_accepted_and_a_dispute_ends_by_the_table(
    worker: WorkerKind, outcome: Outcome
) -> None:
    world = Watched(worker_kind=worker, client_kind=ClientKind.DISPUTER)
    until(world, lambda: world.state.job(world.job_id).state is JobState.DISPUTED)
    world.outcome = outcome
    run_to_end(world)
    assert world.transactions == ["open", "submit", "dispute", "resolve"]
    assert world.client_state.accepted is None
    assert world.client_state.outcome is outcome
    claimed = world.claimed or 0
    assert world.client_state.paid == {Outcome.ACCEPT: 0, Outcome.REJECT: claimed}.get(outcome, claimed // 2)


def test_without_a_resolver_a_bad_result_is_not_accepted_either_but_silence_pays_it() -> None:
    world = run_to_end(Watched(worker_kind=WorkerKind.LIAR, client_kind=ClientKind.DISPUTER, resolver=ZERO_ADDRESS))
    assert world.transactions == ["open", "submit", "finalize"]
    assert world.client_state.accepted is None


def test_an_order_that_never_arrives_costs_nothing_and_frees_its_name() -> None:
    world = Watched()
    until(world, lambda: world.client_state.void, lost=True)
    assert world.balances == (FUNDS, 0)
    check_end(world)
    again = Watched()
    again.client.journal.clear()
    again.client.states = dict(world.client.states)
    again.client.states[Hash32(b"\x01" * 32)] = again.client.states.pop(world.job_id)  # type: ignore[index]
    again.client.note(again.order(Role.CLIENT))  # the same name, another order: the first can never be opened


def test_a_name_is_taken_until_its_order_can_never_be_opened() -> None:
    world = run_to_end(Watched())
    taken = {Hash32(b"\x01" * 32): world.client_state}
    with pytest.raises(LocalProtocolError, match="ordered before"):
        real.check_label(taken, world.order(Role.CLIENT))  # type: ignore[arg-type]


def test_an_acceptance_that_gets_lost_is_handed_in_by_the_client() -> None:
    world = Watched()
    until(world, lambda: world.client_state.checked is not None)
    until(world, lambda: world.client_state.accepted is not None, lost=True)
    assert world.worker_state is not None and world.worker_state.accepted is None
    run_to_end(world)
    assert world.transactions == ["open", "submit", "settle"]


def test_a_reorganisation_takes_back_a_submission_and_it_is_sent_again_with_the_same_bytes() -> None:
    world = Watched(client_kind=ClientKind.DEAD)
    until(world, lambda: world.state.job(world.job_id).state is JobState.SUBMITTED)
    first = world.state.job(world.job_id)
    world.reorg(1)
    assert world.state.job(world.job_id).state is JobState.OPEN
    world.pass_time(10)
    second = world.state.job(world.job_id)
    assert (second.claimed, second.result_hash) == (first.claimed, first.result_hash)
    run_to_end(world)


def test_a_worker_does_not_sign_beside_a_submission_that_its_journal_does_not_know() -> None:
    world = Watched(client_kind=ClientKind.DEAD)
    until(world, lambda: world.state.job(world.job_id).state is JobState.SUBMITTED)
    old = [c for c in world.worker.journal if isinstance(c, real.BatchOrdered)]
    world.worker.journal[:] = old
    world.worker.restart()
    world.pass_time(10)
    with pytest.raises(LocalProtocolError, match="another submission by our key"):
        world.worker.note(real.BatchResultKept(world.job_id, Hash32(b"\x09" * 32), 1, 1, world.now))
    run_to_end(world)


def test_who_is_to_blame() -> None:
    world = Watched()
    order = world.order(Role.WORKER)
    forged = real.BatchOrdered(**{**{f: getattr(order, f) for f in order.__struct_fields__}, "terms": order.terms[:-1]})
    with pytest.raises(RemoteProtocolError) as caught:
        real.ordered(Role.WORKER, forged)
    assert caught.value.code is WireCode.MALFORMED
    until(world, lambda: world.worker_state is not None and world.worker_state.result is not None)
    if world.worker_state is None or world.worker_state.result is None:
        raise AssertionError
    for hash_, amount in ((Hash32(bytes(32)), 10), (world.worker_state.result.result_hash, 1)):
        with pytest.raises(RemoteProtocolError) as caught:
            real.apply(world.worker_state, real.BatchAccepted(world.job_id, hash_, amount, bytes(65), 0))
        assert caught.value.code is WireCode.BAD_RECEIPT
    for wrong in (real.BatchResultKept, real.BatchGivenUp):
        values = [world.job_id, "x"] if wrong is real.BatchGivenUp else [world.job_id, Hash32(bytes(32)), 1, 1, 0]
        with pytest.raises(LocalProtocolError, match="only a worker"):
            world.client.note(wrong(*values))
    assert WORKER.address == world.quote.worker


# ------------------------------------------------------------------------------------------------------ planted bugs

SOURCE = inspect.getsource(real)
PLANTED: dict[str, tuple[str, str]] = {
    "B2 a second submission is signed": ("if state.result is not None:  # B2", "if False:"),
    "B3 a second acceptance": ("if state.accepted is not None:  # B3", "if False:"),
    "B3 another amount counts as the same": (
        "if (state.accepted.result_hash, state.accepted.amount) == (change.result_hash, change.amount):",
        "if state.accepted.result_hash == change.result_hash:",
    ),
    "B4 unverified is accepted": (
        "state.checked is None or state.checked.result_hash != change.result_hash:  # B4",
        "state.checked is None:",
    ),
    "B4 greed is accepted": ("return state.claimed > state.checked.cost", "return False"),
    "B4 after an acceptance another result is taken": (
        "if state.accepted is not None and state.accepted.result_hash != change.result_hash:",
        "if False:",
    ),
    "B5 a whole claim waits for ever": (
        "latest = min(state.result.at + timing.accept_grace, deadline - timing.submit_margin)",
        "latest = deadline",
    ),
    "B5 the worker waits for the client": ("if state.direct:", "if True:"),
    "B5 a result is not submitted": ("return Plan(Step.SUBMIT, deadline)", "return Plan(None, deadline)"),
    "B6 the client waits with its refund": (
        "if now >= state.quote.deadline:\n            return Plan(Step.REFUND",
        "if now >= state.quote.deadline + 200:\n            return Plan(Step.REFUND",
    ),
    "B6 the client never takes it back": ("return Plan(Step.REFUND, state.quote.deadline)", "return Plan(None, 0)"),
    "B7 nobody finalizes": ("Plan(Step.FINALIZE if now >= state.window_end else None", "Plan(None"),
    "B7 the client does not finalize": ("return Plan(Step.FINALIZE, last)", "return Plan(None, last)"),
    "B7 a dispute is left open": ("Plan(Step.RESOLVE if due else None", "Plan(None"),
    "B7 a silent resolver is waited for": (
        "due = state.outcome is not Outcome.NONE or now >= state.resolve_by",
        "due = state.outcome is not Outcome.NONE",
    ),
    "B7 the client keeps an acceptance to itself": ("Plan(Step.SETTLE if now >= ours else Step.ACCEPT, ", "Plan(None, "),
    "B7 a challenge is not sent": ("Plan(Step.DISPUTE if now < state.window_end else None, last)", "Plan(None, last)"),
    "B8 computing before the money is locked": ("Step.OPEN if state.role is", "Step.RUN if state.role is"),
    "B9 void while it can be opened": ("if change.head < state.quote.valid_before:  # B9", "if False:"),
    "B9 void by the guess": ("if head >= until:", "if now >= until:"),
    "B9 void while it is open": ("if state.chain is not JobState.NONE:\n        raise", "if False:\n        raise"),
    "B9 a name twice": ("if change.label and state.label == change.label and not state.void:", "if False:"),
    "B10 given up with a result": ("if state.result is not None:  # B10", "if False:"),
    "B10 a result after giving up": ("if state.failure:  # B10", "if False:"),
    "silence instead of an honest failure": (
        "return Plan(Step.FAIL, deadline)",
        "return Plan(None, deadline)",
    ),
    "an accepted result is disputed": (
        'if state.accepted is not None:\n        raise LocalProtocolError("the result was accepted")',
        "",
    ),
    "a dispute before the submission": ("if state.chain is not JobState.SUBMITTED:\n        raise", "if False:\n        raise"),
    "an old journal signs": ("if state.chain in _SUBMITTED_ONCE and state.submitted_hash != change.result_hash:", "if False:"),
"what was paid is forgotten": ("paid=change.paid,\n    )\n\n\ndef _result_kept", "    )\n\n\ndef _result_kept"),
}  # fmt: skip


def planted(old: str, new: str) -> SimpleNamespace:
    """`protocol.batch` with one text replaced; its change classes stay the real ones."""
    assert SOURCE.count(old) == 1, f"the source has changed: {old!r} must be planted anew ({SOURCE.count(old)})"
    space: dict[str, Any] = {"__name__": "protocol.batch"}
    exec(compile(SOURCE.replace(old, new), "planted", "exec"), space)  # our own source
    space.update({c.__name__: c for c in real.CHANGES})
    return SimpleNamespace(**space)


def stroll(module: Any, random: Random) -> None:
    """The machine's own moves in a random order, without hypothesis around them: fast enough to hunt mutants."""
    worker, client = random.choice(worlds())
    world = Watched(worker, client, random.random() < 0.4, RESOLVER if random.random() < 0.8 else ZERO_ADDRESS, module)
    crashed: Role | None = None
    for _ in range(random.randint(5, 120)):
        world.mine()
        crash = random.choice([None, None, None, *Role])
        crash = None if crash is crashed else crash
        world.pass_time(random.randint(0, TICK_MOST), crash, random.random() < 0.2, random.randint(-5, 5))
        crashed = crash
        if random.random() < 0.02:
            world.reorg(random.randint(1, 2))
        if world.state.job(world.job_id).state is JobState.DISPUTED and world.outcome is Outcome.NONE:
            world.outcome = random.choice(list(Outcome))
        attack(world, random.choice(["kept", "accepted", "given up", "voided", "disputed", "ordered", "checked"]))
    world.finish()
    check_end(world)


SCENARIOS = [
    test_an_honest_pair_is_done_by_submission_and_acceptance,
    test_a_result_worth_the_whole_amount_needs_no_submission,
    test_a_claim_below_the_amount_is_submitted_at_once,
    test_a_worker_does_not_sign_beside_a_submission_that_its_journal_does_not_know,
    lambda: test_what_cannot_be_verified_is_never_accepted_and_a_dispute_ends_by_the_table(
        WorkerKind.HIDER, Outcome.DRAW
    ),
]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = planted(*PLANTED[name])
    monkeypatch.setattr(Watched, "__init__", _with(module))
    with pytest.raises((AssertionError, ProtocolError, pytest.fail.Exception)):
        for scenario in SCENARIOS:
            scenario()
        for seed in range(1000):
            stroll(module, Random(seed))


def _with(module: Any) -> Any:
    honest = Watched.__init__

    def init(self: Watched, *args: Any, **given: Any) -> None:
        if len(args) < 5:
            given["module"] = module
        honest(self, *args, **given)

    return init


def test_without_a_planted_bug_strolls_end_well() -> None:
    unchanged = "return BatchState("
    for module in (real, planted(unchanged, unchanged)):
        for seed in range(150):
            stroll(module, Random(seed))
