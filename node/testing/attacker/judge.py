"""One deployment beside its model: does a call on both, compares, and asks the invariants.

A step is accepted by both, or refused by both with one error name; afterwards every number is equal. The model is the
oracle of what must be accepted; `invariants.py` does not trust it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from node.testing.attacker import abi, invariants, invariants_stake
from node.testing.attacker.crowd import CROWD, GUARD, JURORS, MALLORY, NAMES, OWNERS, PAYOUT, WORKERS, Voices
from node.testing.attacker.reads import Name, Numbers, Words
from node.testing.attacker.seen import Seen
from node.testing.contracts import NATIVE, Deployment
from node.testing.evm import Contract, Reverted
from protocol.escrow import BURNT, Capability, Escrow, EscrowError, JobState, SeatState, SlashState, locked_stake
from protocol.escrow.vault import COINS_REFUSED
from protocol.ids import Address, JobId, keccak256
from protocol.typed_data import ChannelConfig, Quote

HURRIED = {
    "seat_bond": 100,
    "seats": 4,
    "quorum": 2,
    "commit_window": 3600,
    "reveal_window": 1800,
    "leave_delay": 8 * 86400,
}
"""A committee whose cases are over before everything else is."""
NEVER = 2**62
PURSE = 10**9
"""Coins that each of the crowd has outside the vault."""
TOKEN_ERRORS = ("ERC20", "ERC2612", "ERC3009", "ECDSA")
STARVED = frozenset({"", "Halt", "Disputes_NotEnoughGas", "FailedCall"})
"""How a call may end when its sender gave it too little gas."""


ROLE_CALLS: Final[dict[str, Callable[[set[Address], set[Address]], set[Address]]]] = {
    "Vault.grantRole": set.union,
    "Vault.revokeRole": set.difference,
}
"""What a call about GUARDIAN, the only role that is attacked, does to those who hold it."""


class Step(NamedTuple):
    """One call as it went, for people."""

    at: int
    who: Address
    call: str
    args: tuple[Any, ...]
    outcome: str

    def __str__(self) -> str:
        return f"{named(self.who):<8} {self.call}{named(self.args)} -> {self.outcome}"


class Disagreement(Exception):
    """Contract and model differ, or an invariant is broken: what the tests look for."""

    trace: Sequence[Step] = ()
    """The calls up to it."""

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))

    @property
    def what(self) -> str:
        """Without values: the same for the same fault."""
        return str(self.args[0])


def _int(value: bytes) -> int:
    return int.from_bytes(value)


_NO_CAPABILITY = Capability()

MODEL: dict[str, tuple[tuple[str, ...], Callable[[Escrow, int, Any], Words]]] = {
    "balance": (("balances",), lambda s, now, k: (s.balances.get(k, 0),)),
    "liabilities": (("balances", "locked"), lambda s, now, k: (s.liabilities(k),)),
    "locked": (("locked",), lambda s, now, k: (s.locked.get(k, 0),)),
    "paused": (("paused",), lambda s, now, k: (s.paused,)),
    "owed": (("owed",), lambda s, now, k: (s.owed.get(k, 0),)),
    "channel": (("channels",), lambda s, now, k: _channel(s, k)),
    "worker": (("workers",), lambda s, now, k: _worker(s, k)),
    "convicted": (("convicted",), lambda s, now, k: (k in s.convicted,)),
    "capability": (("capabilities",), lambda s, now, k: _capability(s, k)),
    "stake": (("stakes",), lambda s, now, k: _stake(s, k)),
    "locked stake": (("stakes", "earnings"), lambda s, now, k: (locked_stake(s, now, *k),)),
    "slash": (("slashes",), lambda s, now, k: _slash(s, k)),
    "job": (("jobs",), lambda s, now, k: _job(s, k)),
    "dispute": (("disputes",), lambda s, now, k: _dispute(s, k)),
    "juror": (("jurors",), lambda s, now, k: _juror(s, k)),
    "case": (("cases",), lambda s, now, k: _case(s, k)),
    "seat": (("seats",), lambda s, now, k: (_int(s.seat(*k).commitment), s.seat(*k).state)),
    "attestation": (("attestations",), lambda s, now, k: _attestation(s, k)),
}
"""kind -> (what of the state it comes from, the words that the contract must show)"""


def _channel(s: Escrow, k: Any) -> Words:
    c = s.channel(k)
    return c.allocated, c.claimed, c.withdraw_at, c.closed


def _worker(s: Escrow, k: Address) -> Words:
    w = s.workers.get(k)
    return (_int(w.owner), w.active, _int(w.payout), w.nonce) if w else (0, 0, 0, 0)


def _capability(s: Escrow, k: Address) -> Words:
    c = s.capabilities.get(k, _NO_CAPABILITY)
    return _int(c.capability), c.version, c.valid_until


def _stake(s: Escrow, k: Any) -> Words:
    found = s.stake_of(*k)
    return found.active, found.unbonding, found.held, found.exposure, found.free_at


def _slash(s: Escrow, k: int) -> Words:
    f = s.slashes.get(k)
    if f is None:
        return (0,) * 8
    return _int(f.owner), _int(f.token), f.amount, _int(f.victim), _int(f.reporter), f.moves_at, f.state, _int(f.cause)


def _job(s: Escrow, k: JobId) -> Words:
    job = s.job(k)
    return job.state, job.window_end, job.claimed, _int(job.result_hash)


def _dispute(s: Escrow, k: JobId) -> Words:
    d = s.dispute(k)
    return d.bond, d.resolve_by, d.ended, d.outcome, d.fee


def _juror(s: Escrow, k: Address) -> Words:
    j = s.juror(k)
    return j.tickets, j.leaving, j.free_at


def _case(s: Escrow, k: JobId) -> Words:
    c = s.case(k)
    counts = (c.commits, c.accepts, c.rejects, c.paid)
    hashes = (_int(c.seed), _int(c.spec_hash), _int(c.result_hash), _int(c.evidence))
    return c.snapshot, c.seed_block, c.commit_ends, c.reveal_ends, *counts, *hashes


def _attestation(s: Escrow, k: Any) -> Words:
    a = s.attestations.get(k)
    return (_int(a.data), a.issued_at, a.valid_until, a.revoked, a.version) if a else (0, 0, 0, 0, 0)


class Judge:
    """One market: the contracts, the model, and what was seen and said in it."""

    def __init__(self, artifacts: Path, outcomes: Counter[tuple[str, str]], *, trusts_model: bool = True) -> None:
        """`trusts_model`: False judges by the invariants alone, to see what they are worth without it."""
        self.trusts_model = trusts_model
        self.world = world = Deployment(artifacts, committee=HURRIED)
        self.evm = world.evm
        self.contracts: dict[str, Contract] = {
            "Vault": world.vault,
            "Workers": world.workers,
            "Channels": world.channels,
            "Jobs": world.jobs,
            "Disputes": world.disputes,
            "Committee": world.committee,
            "Attestations": world.attestations,
            "TestToken": world.token,
        }
        self.outcomes = outcomes
        """(call, "accepted" or error name) -> count, so that a branch never reached is seen."""
        self.trace: list[Step] = []
        self.tokens = (world.token.address, NATIVE)
        self.voices = Voices(world.vault.address)
        self.configs: dict[bytes, ChannelConfig] = {}
        self.quotes: dict[JobId, Quote] = {}
        self.seen: dict[tuple[str, Any], int] = {}
        """When something was seen to happen, by our own clock: (what, key) -> time."""
        self.state = world.first_state()
        for person in CROWD:
            world.purse(person, PURSE)
        self.accounts = (*CROWD, PAYOUT, BURNT, world.committee.address)
        self.numbers = Numbers(self.evm, world.admin)
        self.count = 0
        """Calls so far."""
        self.guardians = {world.admin}
        self.earned: dict[tuple[Address, Address], list[tuple[int, int]]] = {}
        """(owner, token) -> (when, how much stake a payment locked)"""
        self.tickets: dict[Address, list[tuple[int, int]]] = {}
        """juror -> (block, tickets from then on)"""
        self._watch_all()

    @property
    def now(self) -> int:
        return self.evm.now

    @property
    def block(self) -> int:
        return self.evm.block

    def wait_until(self, when: int) -> None:
        """One block a second: what waits for blocks and what waits for time can be in each other's way."""
        passed = max(when - self.now, 0)
        if passed:
            self.evm.set_block(self.block + passed, self.now + passed)

    # ------------------------------------------------------------------------------------------------- what is looked at

    def encode(self, call: str, *args: Any) -> bytes:
        """The data of "Contract.function"."""
        name, function = call.split(".")
        selector, kinds, _ = self.contracts[name].signature(function)
        return selector + abi.arguments(kinds, args)

    def watch(self, kind: str, key: Any, words: int, view: str, *args: Any) -> None:
        if (kind, key) not in self.numbers.values:
            self.numbers.plan(kind, key, words, self.contracts[view.split(".")[0]], self.encode(view, *args))

    def _watch_all(self) -> None:
        for token in self.tokens:
            for account in self.accounts:
                self.watch("balance", (token, account), 1, "Vault.balanceOf", token, account)
            self.watch("liabilities", token, 1, "Vault.liabilities", token)
            for module, contract in self.world.modules.items():
                self.watch("locked", (module, token), 1, "Vault.lockedBy", contract.address, token)
            for worker in WORKERS:
                self.watch("owed", (worker, token), 1, "Channels.owed", worker, token)
            for owner in (*OWNERS, MALLORY):
                self.watch("stake", (owner, token), 5, "Workers.stakeOf", owner, token)
                self.watch("locked stake", (owner, token), 1, "Workers.lockedStake", owner, token)
        for worker in WORKERS:
            self.watch("worker", worker, 4, "Workers.worker", worker)
            self.watch("convicted", worker, 1, "Workers.isConvicted", worker)
            self.watch("capability", worker, 3, "Workers.capabilityOf", worker)
        for juror in (*JURORS, MALLORY):
            self.watch("juror", juror, 3, "Committee.jurorOf", juror)
        self.watch("paused", None, 1, "Vault.paused")
        self.watch("coins", self.tokens[0], 1, "TestToken.balanceOf", self.world.vault.address)
        self.watch("slash", 1, 8, "Workers.slash", 1)

    def watch_account(self, account: Address) -> None:
        """A resolver, whose fees are in the ledger too."""
        self.accounts = (*self.accounts, account)
        for token in self.tokens:
            self.watch("balance", (token, account), 1, "Vault.balanceOf", token, account)

    def watch_config(self, config: ChannelConfig) -> None:
        channel_id = config.channel_id(self.world.domain)
        self.configs[channel_id] = config
        self.watch("channel", channel_id, 4, "Channels.channel", channel_id)

    def add_quote(self, quote: Quote) -> JobId:
        job_id = quote.job_id(self.world.jobs_domain)
        self.quotes[job_id] = quote
        return job_id

    def _watch_new(self) -> None:
        """What came into being in this step; the slash after the last one too, so that none is booked unseen."""
        state, known = self.state, self.numbers
        for job_id in state.jobs.keys() - known.of("job").keys():
            self.watch("job", job_id, 4, "Jobs.job", job_id)
            self.watch("dispute", job_id, 5, "Disputes.disputeOf", job_id)
        for job_id in state.cases.keys() - known.of("case").keys():
            self.watch("case", job_id, 12, "Committee.caseOf", job_id)
        for seat in state.seats.keys() - known.of("seat").keys():
            self.watch("seat", seat, 2, "Committee.seatOf", *seat)
        for key in state.attestations.keys() - known.of("attestation").keys():
            self.watch("attestation", key, 5, "Attestations.attestation", *key)
        self.watch("slash", len(state.slashes) + 1, 8, "Workers.slash", len(state.slashes) + 1)

    def _put_aside(self, changed: dict[Name, tuple[Words, Words]]) -> None:
        """What is over for good need not be read each time."""
        for (kind, key), (_, now) in changed.items():
            if kind == "job" and now[0] in (JobState.SETTLED, JobState.REFUNDED):
                self.numbers.put_aside("job", key)
                self.numbers.put_aside("dispute", key)
            elif (kind == "slash" and now[6] in (SlashState.MOVED, SlashState.CANCELLED)) or (
                kind == "seat" and now[1] in (SeatState.FORFEITED, SeatState.PAID)
            ):
                self.numbers.put_aside(kind, key)

    # -------------------------------------------------------------------------------------------------------- the steps

    def step(
        self,
        sender: Address,
        call: str,
        args: tuple[Any, ...],
        model: Callable[[Escrow], Escrow],
        *,
        value: int = 0,
        gas: int | None = None,
        consent: Collection[Address] = (),
    ) -> list[Any] | None:
        """Do it on both sides and compare. `consent`: whose vault balance may fall. Raises `Disagreement`.

        Gives the logs of an accepted call, None of a refused one.
        """
        expected = actual = "accepted"
        logs, after = None, self.state
        try:
            after = model(self.state)
        except EscrowError as error:
            expected = error.name
        usual, self.evm.gas_limit = self.evm.gas_limit, gas or self.evm.gas_limit
        try:
            where = self.contracts[call.split(".")[0]].address
            _, logs = self.evm.transact(sender, where, self.encode(call, *args), value)
        except Reverted as reverted:
            actual = reverted.name
            if actual.startswith(TOKEN_ERRORS):
                actual = COINS_REFUSED
        finally:
            self.evm.gas_limit = usual
        self.outcomes[call, actual] += 1
        self.trace.append(Step(self.now, sender, call, args, actual))
        if actual != expected and self.trusts_model and not (gas is not None and actual in STARVED):
            raise Disagreement(f"{call} is {actual}, the model says {expected}")
        self.count += 1
        if logs is not None:
            before, self.state = self.state, after
            if call in ROLE_CALLS:  # here and not in `guard`: a replay makes the call too
                self.guardians = ROLE_CALLS[call](self.guardians, {args[1]})
            self._look(before, sender, call, args, consent)
        elif self.count % 16 == 0:
            changed = {kind for kind, _ in self.numbers.read()} - {"locked stake"}  # which time alone changes
            self.require(not changed, "a refused call changed something", str(sorted(changed)))
        return logs

    def require(self, holds: bool, what: str, detail: str = "") -> None:
        if not holds:
            raise Disagreement(what, detail) if detail else Disagreement(what)

    def _look(
        self, before: Escrow, sender: Address, call: str, args: tuple[Any, ...], consent: Collection[Address]
    ) -> None:
        self._watch_new()
        changed = self.numbers.read()
        if self.trusts_model:
            self._compare(before, changed, call)
        invariants.check(self, Seen(sender, call, args, changed, frozenset(consent)))
        self._put_aside(changed)

    def look(self) -> None:
        """At what time alone changes: the locks of payments."""
        changed = self.numbers.read()
        if self.trusts_model:
            self._compare(self.state, changed, "time")
        invariants_stake.locks(self)

    def _compare(self, before: Escrow, changed: dict[Name, tuple[Words, Words]], call: str) -> None:
        """All that changed on either side is equal on both."""
        state, now, values = self.state, self.now, self.numbers.values
        names = [name for name in changed if name[0] in MODEL]
        for kind, (sources, _) in MODEL.items():
            if kind == "locked stake" or any(getattr(state, s) is not getattr(before, s) for s in sources):
                names += [(kind, key) for key in self.numbers.of(kind)]
        for name in names:
            says = MODEL[name[0]][1](state, now, name[1])
            if values[name] != says:
                detail = f"of {named(name[1])} is {values[name]}, the model says {says}"
                raise Disagreement(f"{call}: {name[0]} differs", detail)

    def coins(self, token: Address) -> int:
        if token == NATIVE:
            return self.evm.native_balance(self.world.vault.address)
        return self.numbers.values["coins", token][0]

    def when(self, what: str, key: Any) -> int:
        """The time noted for something; what was never noted never comes."""
        return self.seen.get((what, key), NEVER)

    def guard(self, yes: bool) -> None:
        """The admin makes the guard a guardian, or takes it back."""
        function = "grantRole" if yes else "revokeRole"
        change = ROLE_CALLS[f"Vault.{function}"]
        role = (keccak256(b"GUARDIAN"), GUARD)
        model = lambda s: replace(s, guardians=frozenset(change(set(s.guardians), {GUARD})))  # noqa: E731
        self.step(self.world.admin, f"Vault.{function}", role, model)


def named(value: Any) -> str:
    """As people read it: names for addresses, the first digits of hashes."""
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(named, value)) + ")"
    if isinstance(value, bytes):
        name = NAMES.get(Address(value)) if len(value) == 20 else None
        return name or "0x" + value[:4].hex()
    return str(value)
