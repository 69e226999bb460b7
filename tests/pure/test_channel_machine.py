"""The money of one channel under attack: a hypothesis machine for both roles against a small independent oracle.

The oracle keeps plain numbers and its own rules, written from docs/invariants.md and not from the code. After each step the
invariants L1 to L10 are asserted on the real state, and the whole journal is encoded, decoded and folded again. The same
machine is then let loose on mutants of `protocol/channel.py`, each with one rule broken: it must kill every one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import protocol.channel as real
from node.testing.pair import Parties
from protocol.channel import (
    CHANGES,
    AllocationRaised,
    ChainSeen,
    Change,
    ChannelOpened,
    ClaimNow,
    CloseSigned,
    JobEnded,
    JobOpened,
    Part,
    Role,
    VoucherAdded,
)
from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.ids import UINT128_MAX, ChannelId, JobId
from protocol.records import decode_body, encode_body, fold, kind_of

PARTIES = Parties()
CHANNEL = PARTIES.channel_id
JOBS = [JobId(bytes([n]) * 32) for n in range(4)]


@dataclass
class Oracle:
    """What the channel should be, in plain numbers."""

    role: Role
    authorized: int
    allocated: int = 0
    claimed: int = 0
    withdraw_at: int = 0
    closed: bool = False
    cumulative: int = 0
    spent: int = 0
    sequence: int = 0
    final: int | None = None
    open: dict[Part, int] = field(default_factory=dict)

    @property
    def ceiling(self) -> int:
        return self.authorized if self.role is Role.CLIENT else self.allocated

    @property
    def reserved(self) -> int:
        return sum(self.open.values())

    @property
    def leaving(self) -> bool:
        return self.closed or self.withdraw_at > 0 or self.final is not None

    def take(self, change: Change) -> bool:
        """Whether the change may be; when it may, it is done."""
        match change:
            case AllocationRaised():
                if self.leaving or not self.authorized < change.allocated <= UINT128_MAX:
                    return False
                self.authorized = change.allocated
            case ChainSeen():
                if self.role is Role.CLIENT and change.claimed > self.cumulative:
                    return False
                self.allocated, self.claimed = change.allocated, change.claimed
                self.withdraw_at, self.closed = change.withdraw_at, change.closed
            case JobOpened():
                room = self.ceiling - self.spent - self.reserved
                if self.leaving or (change.job_id, change.part) in self.open or not 0 <= change.limit <= max(room, 0):
                    return False
                if self.role is Role.WORKER and change.sequence != self.sequence + 1:
                    return False
                self.open[change.job_id, change.part] = change.limit
                self.sequence = max(self.sequence, change.sequence)
            case VoucherAdded():
                if not self.cumulative < change.cumulative <= self.ceiling or self.final is not None:
                    return False
                if self.role is Role.CLIENT and change.cumulative > self.spent + self.reserved:
                    return False
                self.cumulative = change.cumulative
            case JobEnded():
                limit = self.open.get((change.job_id, change.part), -1)
                if not 0 <= change.spent <= limit:
                    return False
                if self.role is Role.WORKER and change.sequence > self.sequence:
                    return False
                del self.open[change.job_id, change.part]
                self.spent += change.spent
                self.sequence = max(self.sequence, change.sequence)
            case CloseSigned():
                earned = max(self.claimed, min(self.spent, self.cumulative))
                exact = self.role is Role.WORKER and change.final != earned
                if self.open or exact or not self.claimed <= change.final <= earned:
                    return False
                if self.final not in (None, change.final):
                    return False
                self.final = change.final
            case _:
                return False
        return True


ANCHORS = ("zero", "authorized", "allocated", "claimed", "cumulative", "spent", "due", "room", "limit", "final", "most")
near = st.tuples(st.sampled_from(ANCHORS), st.integers(-2, 2))
"""An amount at, just below or just above a number that matters."""
some = st.one_of(near, st.tuples(st.just("zero"), st.integers(0, 60)))
parts = st.tuples(st.sampled_from(JOBS), st.integers(0, 1))


class ChannelMachine(RuleBasedStateMachine):
    """`channel` is the module under test: the real one or a mutant."""

    channel: Any = real
    role: Role

    @initialize(amount=st.sampled_from([1, 50, 1000, UINT128_MAX]), bad=st.sampled_from([0, -1, UINT128_MAX + 1]))
    def open(self, amount: int, bad: int) -> None:
        for allocated in (bad, amount):
            change = ChannelOpened(CHANNEL, PARTIES.config, allocated, 2**40 - 1, bytes(65))
            try:
                self.state = self.channel.opened(self.role, change)
            except ProtocolError:
                assert allocated == bad
                continue
            assert allocated == amount
            self.journal: list[Change] = [change]
        self.oracle = Oracle(self.role, amount)
        self.limits: dict[Part, list[int]] = {}
        self.charges: dict[Part, list[int]] = {}
        self.numbers: list[int] = []
        self.highest_ceiling = 0

    # ------------------------------------------------------------------------------------------------------- attacks

    @rule(amount=some)
    def raise_allocation(self, amount: tuple[str, int]) -> None:
        self.do(AllocationRaised(CHANNEL, self.amount(amount), 2**40 - 1, bytes(65)))

    @rule(
        share=st.integers(0, 100), claimed=some, withdraw_at=st.sampled_from([0, 0, 0, 0, 5]), closed=st.integers(0, 15)
    )
    def see_chain(self, share: int, claimed: tuple[str, int], withdraw_at: int, closed: int) -> None:
        allocated = self.oracle.authorized * share // 100
        amount = min(max(0, self.amount(claimed)), UINT128_MAX)
        self.do(ChainSeen(CHANNEL, allocated, amount, withdraw_at, closed == 0))

    @rule(share=st.integers(50, 100))
    def see_chain_as_it_was(self, share: int) -> None:
        self.do(ChainSeen(CHANNEL, self.oracle.authorized * share // 100, self.oracle.claimed, 0, False))

    @rule(part=parts, limit=some, step=st.sampled_from([1, 1, 1, 1, 0, 2, -1]))
    def open_job(self, part: Part, limit: tuple[str, int], step: int) -> None:
        sequence = 0 if self.role is Role.CLIENT else self.oracle.sequence + step
        change = JobOpened(CHANNEL, *part, sequence=sequence, limit=self.amount(limit, part))
        if self.do(change):
            self.limits.setdefault(part, []).append(change.limit)
            self.numbers.append(sequence)

    @rule(amount=some)
    def add_voucher(self, amount: tuple[str, int]) -> None:
        self.do(VoucherAdded(CHANNEL, self.amount(amount), bytes(65)))

    @rule(part=parts, spent=some, number=st.integers(-1, 1))
    def end_job(self, part: Part, spent: tuple[str, int], number: int) -> None:
        change = JobEnded(CHANNEL, *part, self.amount(spent, part), max(0, self.oracle.sequence + number), b"receipt")
        if self.do(change):
            self.charges.setdefault(part, []).append(change.spent)

    @rule(amount=some)
    def sign_close(self, amount: tuple[str, int]) -> None:
        self.do(CloseSigned(CHANNEL, self.amount(amount), bytes(65)))

    @rule()
    def open_again(self) -> None:
        self.do(ChannelOpened(CHANNEL, PARTIES.config, 10, 2**40 - 1, bytes(65)))

    @rule(amount=some)
    def change_of_another_channel(self, amount: tuple[str, int]) -> None:
        before = self.state
        with pytest.raises(LocalProtocolError):
            self.channel.apply(self.state, VoucherAdded(ChannelId(bytes(32)), self.amount(amount), bytes(65)))
        assert self.state is before

    # --------------------------------------------------------------------------------------------------- how it is run

    def amount(self, what: tuple[str, int], part: Part | None = None) -> int:
        name, offset = what
        oracle = self.oracle
        special = {
            "zero": 0,
            "due": oracle.spent + oracle.reserved,
            "room": oracle.ceiling - oracle.spent - oracle.reserved,
            "limit": oracle.open.get(part, 0) if part else 0,
            "final": oracle.final or 0,
            "most": UINT128_MAX,
        }
        return (special[name] if name in special else int(getattr(oracle, name))) + offset

    def do(self, change: Change) -> bool:
        before, held = self.state, freeze(self.state)
        ceiling, due, leaving = self.oracle.ceiling, self.oracle.spent + self.oracle.reserved, self.oracle.leaving
        final_before, open_before, authorized = self.oracle.final, set(self.oracle.open), self.oracle.authorized
        expected = self.oracle.take(change)
        try:
            after, effects = self.channel.apply(self.state, change)
        except ProtocolError as error:
            assert not expected, f"refused: {error}"
            if self.role is Role.CLIENT and not isinstance(change, CloseSigned):
                assert isinstance(error, LocalProtocolError), "the client decides on its own changes"
            if isinstance(change, ChainSeen):
                assert isinstance(error, LocalProtocolError), "the chain is nobody's message (L8)"
                assert self.role is Role.CLIENT, "a worker takes what the chain says: anybody may claim for it (L8)"
            if self.role is Role.WORKER and isinstance(change, VoucherAdded):
                assert isinstance(error, RemoteProtocolError), "a bad voucher is the client's fault"
            assert freeze(before) == held, "a refused change left a trace (L1)"
            return False
        assert expected, f"taken: {change}"
        assert freeze(before) == held, "the old state was changed in place (L1)"
        self.state = after
        self.journal.append(change)
        self.highest_ceiling = max(self.highest_ceiling, after.ceiling)

        assert after.cumulative >= before.cumulative  # L2
        if isinstance(change, VoucherAdded):
            assert after.cumulative > before.cumulative  # L2
            assert after.cumulative <= ceiling  # L3
            assert final_before is None  # L7
            assert self.role is Role.WORKER or after.cumulative <= due  # L4
        if leaving:
            assert set(after.open_jobs) <= open_before and after.authorized == authorized  # L7
        for effect in effects:
            assert isinstance(effect, ClaimNow) and self.role is Role.WORKER
            assert after.withdraw_at and not after.closed
            assert after.claimed < effect.amount <= min(after.spent, after.cumulative, after.allocated)  # L9
        claims = isinstance(change, ChainSeen) and self.role is Role.WORKER and after.withdraw_at and not after.closed
        assert bool(effects) == bool(claims and min(after.spent, after.cumulative, after.allocated) > after.claimed)
        return True

    @invariant()
    def the_state_is_what_the_oracle_says(self) -> None:
        if not hasattr(self, "oracle"):
            return
        for name in ("authorized", "allocated", "claimed", "withdraw_at", "closed", "cumulative", "spent", "final"):
            assert getattr(self.state, name) == getattr(self.oracle, name), name
        assert dict(self.state.open_jobs) == self.oracle.open
        assert self.state.sequence == self.oracle.sequence
        assert self.state.free == max(0, self.oracle.ceiling - self.oracle.spent - self.oracle.reserved)

    @invariant()
    def invariants_hold(self) -> None:
        if not hasattr(self, "oracle"):
            return
        state = self.state
        if self.role is Role.CLIENT:
            assert state.cumulative <= state.authorized  # L3
            assert state.cumulative <= sum(sum(limits) for limits in self.limits.values())  # L4
        assert state.cumulative <= self.highest_ceiling or state.cumulative == 0  # L3, whatever a reorg took back since
        for part, charges in self.charges.items():
            opened = self.limits[part]
            assert len(charges) + (part in state.open_jobs) == len(opened)  # L5
            assert all(c <= limit for c, limit in zip(charges, opened, strict=False))  # L6
        assert state.spent == sum(sum(c) for c in self.charges.values())  # L5, L6
        assert self.role is Role.WORKER or state.claimed <= state.cumulative  # L8
        assert state.claimable >= 0
        if state.claimable:
            assert state.claimed + state.claimable <= min(state.spent, state.cumulative, state.allocated)  # L9
        if self.role is Role.WORKER:
            assert self.numbers == list(range(1, len(self.numbers) + 1))  # L10
        assert state.owed() == max(0, state.spent - max(state.cumulative, state.claimed))

    def teardown(self) -> None:
        """L1: the journal, through its codec, folds to the state."""
        if not hasattr(self, "oracle"):
            return
        read = [decode_body(kind_of(c), encode_body(c)) for c in self.journal]
        assert read == self.journal
        state = self.channel.opened(self.role, read[0])
        for change in read[1:]:
            state, _ = self.channel.apply(state, change)
        assert freeze(state) == freeze(self.state)
        if self.channel is real:
            states: dict[ChannelId, Any] = {}
            for change in read:
                fold(self.role, states, change)
            assert states == {CHANNEL: self.state}


def freeze(state: Any) -> tuple[Any, ...]:
    values = (getattr(state, name) for name in state.__struct_fields__)
    return tuple(tuple(sorted(v.items())) if hasattr(v, "items") else v for v in values)


EFFORT = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


@pytest.mark.parametrize("role", Role)
def test_the_channel_keeps_its_invariants(role: Role) -> None:
    run_state_machine_as_test(type(f"{role}Machine", (ChannelMachine,), {"role": role}), settings=EFFORT)


# ------------------------------------------------------------------------------------------------------ planted bugs

SOURCE = inspect.getsource(real)
PLANTED: dict[str, tuple[str, str, Role]] = {
    "L2 equal vouchers count": ("change.cumulative <= state.cumulative:", "change.cumulative < state.cumulative:", Role.WORKER),
    "L2 any voucher counts": ("if change.cumulative <= state.cumulative:", "if False:", Role.CLIENT),
    "L3 no ceiling": ("if change.cumulative > state.ceiling:", "if False:", Role.WORKER),
    "L3 ceiling off by one": ("if change.cumulative > state.ceiling:", "if change.cumulative > state.ceiling + 1:", Role.WORKER),
    "L3 worker trusts the signature": ("return self.allocated if self.role", "return self.authorized if self.role", Role.WORKER),
    "L4 client signs ahead": ("state.spent + state.reserved:\n", "state.ceiling:\n", Role.CLIENT),
    "L5 a part stays open": ("if k != key}", "if True}", Role.WORKER),
    "L5 a part opens twice": ("if key in state.open_jobs:", "if False:", Role.CLIENT),
    "L6 cost over the limit": ("if not 0 <= change.spent <= limit:", "if not 0 <= change.spent <= limit + 1:", Role.WORKER),
    "L6 negative cost": ("if not 0 <= change.spent <= limit:", "if change.spent > limit:", Role.CLIENT),
    "L6 reservations are forgotten": ("self.ceiling - self.spent - self.reserved", "self.ceiling - self.spent", Role.WORKER),
    "L7 withdrawal is not leaving": ("self.closed or self.withdraw_at != 0 or", "self.closed or", Role.WORKER),
    "L7 jobs after a close": ("or self.final is not None", "", Role.CLIENT),
    "L7 allocation on a leaving channel": (
        'if state.leaving:\n        raise _blame(state.role, WireCode.BAD_VOUCHER, "the channel is ending; open another one")',
        "",
        Role.WORKER,
    ),
    "L7 vouchers up to the total of a close": (
        "if state.final is not None:  #",
        "if state.final is not None and change.cumulative > state.final:  #",
        Role.WORKER,
    ),
    "L8 any claim is believed": ("if state.role is Role.CLIENT and change.claimed > state.cumulative:", "if False:", Role.CLIENT),
    "L8 a claim for the worker stops it": (
        "if state.role is Role.CLIENT and change.claimed > state.cumulative:",
        "if change.claimed > state.cumulative:",
        Role.WORKER,
    ),
    "L8 what was claimed does not count": ("return max(self.cumulative, self.claimed)", "return self.cumulative", Role.WORKER),
    "L9 unlocked money is claimable": (
        "min(self.spent, self.cumulative, self.allocated)",
        "min(self.spent, self.cumulative)",
        Role.WORKER,
    ),
    "L9 unearned money is claimable": (
        "min(self.spent, self.cumulative, self.allocated)",
        "min(self.cumulative, self.allocated)",
        Role.WORKER,
    ),
    "L9 claimed money is claimable": (" - self.claimed)", ")", Role.WORKER),
    "L10 a number may be skipped": ("change.sequence != state.sequence + 1", "change.sequence <= state.sequence", Role.WORKER),
    "L10 a number never given": ("and change.sequence > state.sequence:", "and False:", Role.WORKER),
    "a close below what is claimed": ("not state.claimed <= change.final <= earned", "change.final > earned", Role.CLIENT),
    "a close above what is owed": ("not state.claimed <= change.final <= earned", "change.final < state.claimed", Role.CLIENT),
    "a close that gives earnings away": ("change.final != earned", "change.final > earned", Role.WORKER),
    "a close with running jobs": ("if state.open_jobs:", "if False:", Role.WORKER),
    "a second close": ("if state.final is not None and state.final != change.final:", "if False:", Role.WORKER),
    "wrong blame": ("if role is Role.CLIENT else", "if role is Role.WORKER else", Role.WORKER),
    "a claim after the close": ("and not state.closed and state.claimable", "and state.claimable", Role.WORKER),
}  # fmt: skip


def planted(old: str, new: str) -> SimpleNamespace:
    """`protocol.channel` with one text replaced; its change classes and roles stay the real ones."""
    assert SOURCE.count(old) == 1, f"the source has changed: {old!r} must be planted anew"
    space: dict[str, Any] = {"__name__": "protocol.channel"}
    exec(compile(SOURCE.replace(old, new), "planted", "exec"), space)  # our own source
    space.update({c.__name__: c for c in (*CHANGES, ClaimNow)}, Role=Role)
    return SimpleNamespace(**space)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str) -> None:
    old, new, role = PLANTED[name]
    machine = type("Mutant", (ChannelMachine,), {"role": role, "channel": planted(old, new)})
    with pytest.raises((AssertionError, ProtocolError)):
        for seed in range(2000):
            stroll(machine(), Random(seed))


@pytest.mark.parametrize("role", Role)
def test_without_a_planted_bug_strolls_end_well(role: Role) -> None:
    unchanged = "return ChannelState("
    for channel in (real, planted(unchanged, unchanged)):
        for seed in range(100):
            stroll(type("Sound", (ChannelMachine,), {"role": role, "channel": channel})(), Random(seed))


def stroll(machine: ChannelMachine, random: Random, steps: int = 40) -> None:
    """The machine's own rules in a random order, without hypothesis around them: fast enough to hunt mutants."""

    def amount(*likely: str) -> tuple[str, int]:
        anchor = random.choice(likely if random.random() < 0.8 else ANCHORS)
        return anchor, random.choice([0, 0, 0, 0, 0, 1, -1, 2, -2]) if random.random() < 0.8 else random.randint(
            -60, 60
        )

    def part() -> Part:
        running = list(machine.oracle.open)
        return (
            random.choice(running) if running and random.random() < 0.8 else (random.choice(JOBS), random.randint(0, 1))
        )

    def fresh() -> Part:
        return random.choice(JOBS), random.randint(0, 1)

    machine.open(random.choice([50, 1000, UINT128_MAX]), random.choice([0, -1, UINT128_MAX + 1]))
    if machine.role is Role.WORKER:
        machine.see_chain(100, ("zero", 0), 0, 1)
    for _ in range(steps):
        match random.randrange(16):
            case 0:
                machine.raise_allocation(amount("authorized"))
            case 1:
                claimed = amount("claimed", "claimed", "cumulative", "spent")
                machine.see_chain(
                    random.choice([0, 50, 90, 100]), claimed, random.choice([0, 0, 5]), random.randrange(8)
                )
            case 2 | 3:
                machine.see_chain_as_it_was(random.choice([50, 100, 100]))
            case 4 | 5 | 6:
                limit = ("zero", random.randint(1, 40)) if random.random() < 0.7 else amount("room", "zero")
                machine.open_job(fresh(), limit, random.choice([1, 1, 1, 1, 1, 0, 2, -1]))
            case 7 | 8 | 9:
                machine.add_voucher(amount("due", "cumulative", "claimed", "authorized", "allocated"))
            case 10 | 11 | 12 | 13:
                machine.end_job(part(), amount("limit"), random.choice([0, 0, -1, 1]))
            case 14:
                if random.random() < (0.9 if machine.oracle.claimed > machine.oracle.cumulative else 0.3):
                    machine.sign_close(amount("cumulative", "spent", "claimed", "final"))
            case _:
                machine.open_again()
        machine.the_state_is_what_the_oracle_says()
        machine.invariants_hold()
    machine.teardown()
