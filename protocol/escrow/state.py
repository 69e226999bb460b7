"""All money and all rights at one moment, as one frozen value. Absent keys mean zero, as in Solidity.

Rules. A function of this package takes a state and gives the next one; nothing is changed in place, so an older state
stays good. Only `vault.py` changes `balances` and `locked`. Amounts are in the smallest unit of their token, times are
Unix seconds of the block; the native coin is the zero address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeVar

from protocol.errors import ProtocolError
from protocol.ids import ZERO_ADDRESS, ZERO_HASH, Address, ChannelId, Hash32, JobId
from protocol.typed_data import Domain

BURNT: Final = Address(bytes(18) + b"\xde\xad")
"""Account of the vault that nobody can draw on."""
PPM: Final = 1_000_000
NO_DOMAIN: Final = Domain(0, ZERO_ADDRESS)


class EscrowError(ProtocolError):
    """The contract would revert. `name` is the Solidity error's name, the state is unchanged."""

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(f"{name}: {detail}" if detail else name)
        self.name = name


class Module(IntEnum):
    """What the vault is sealed with: each has locks of its own."""

    CHANNELS = 0
    WORKERS = 1
    JOBS = 2
    DISPUTES = 3
    COMMITTEE = 4


class SlashState(IntEnum):
    """Numbers as in Solidity."""

    NONE = 0
    BOOKED = 1
    MOVED = 2
    CANCELLED = 3


class JobState(IntEnum):
    """Numbers as in Solidity."""

    NONE = 0
    OPEN = 1
    SUBMITTED = 2
    DISPUTED = 3
    SETTLED = 4
    REFUNDED = 5


class Outcome(IntEnum):
    """What a resolver found about a client's challenge; numbers as in Solidity."""

    NONE = 0
    ACCEPT = 1
    REJECT = 2
    DRAW = 3


class SeatState(IntEnum):
    """Numbers as in Solidity."""

    NONE = 0
    COMMITTED = 1
    ACCEPTED = 2
    REJECTED = 3
    FORFEITED = 4
    PAID = 5


@dataclass(frozen=True, slots=True)
class Channel:
    """What the chain stores of a channel; the config is only in its id."""

    allocated: int = 0
    """Total ever allocated; from closing on, what was claimed of it."""
    claimed: int = 0
    """Total ever claimed: never above `allocated`, never falls."""
    withdraw_at: int = 0
    """From when the payer's withdrawal may be finalized; 0 when none has begun."""
    closed: bool = False
    """Final: no money is in it and none can come."""

    @property
    def remainder(self) -> int:
        """Money still in the channel."""
        return self.allocated - self.claimed


@dataclass(frozen=True, slots=True)
class Worker:
    """A hot key ever registered."""

    owner: Address
    payout: Address
    active: bool
    nonce: int
    """Consents used; the next one carries it."""
    retired_at: int = 0
    """When its owner retired it; 0 while active."""


@dataclass(frozen=True, slots=True)
class Stake:
    """What answers for all hot keys of one owner, in one token."""

    active: int = 0
    unbonding: int = 0
    """On its way out; can still be slashed."""
    held: int = 0
    """Penalties of open jobs."""
    exposure: int = 0
    """The most that may be held; set by the owner."""
    free_at: int = 0
    """From when the unbonding part may leave."""

    @property
    def total(self) -> int:
        return self.active + self.unbonding


@dataclass(frozen=True, slots=True)
class Slash:
    """A verdict's price: booked first, moved after a delay."""

    owner: Address
    token: Address
    amount: int
    victim: Address
    reporter: Address
    moves_at: int
    state: SlashState
    cause: Hash32


@dataclass(frozen=True, slots=True)
class Capability:
    """A hot key's commitment to a benchmark document."""

    capability: Hash32 = ZERO_HASH
    version: int = 0
    valid_until: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """What the chain stores of a batch job; the quote is only in its id."""

    state: JobState = JobState.NONE
    window_end: int = 0
    """From the submission on: the first moment at which silence has accepted it."""
    claimed: int = 0
    """What the worker asked for, at most the quote's amount."""
    result_hash: Hash32 = ZERO_HASH


@dataclass(frozen=True, slots=True)
class Dispute:
    """A client's challenge of one job."""

    bond: int = 0
    """Locked by the client; 0 again when it was paid out."""
    resolve_by: int = 0
    """From here on silence is a draw."""
    ended: bool = False
    outcome: Outcome = Outcome.NONE
    fee: int = 0
    """What the resolver was paid."""


@dataclass(frozen=True, slots=True)
class Juror:
    """A member of the committee."""

    tickets: int = 0
    leaving: int = 0
    """Bond on its way out."""
    free_at: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A dispute before the committee."""

    snapshot: int = 0
    """Block whose tickets count; 0 when there is no such case."""
    seed_block: int = 0
    """Block whose randomness is the seed."""
    commit_ends: int = 0
    reveal_ends: int = 0
    commits: int = 0
    accepts: int = 0
    rejects: int = 0
    paid: int = 0
    """Seats that took their share of the fee."""
    seed: Hash32 = ZERO_HASH
    spec_hash: Hash32 = ZERO_HASH
    result_hash: Hash32 = ZERO_HASH
    evidence: Hash32 = ZERO_HASH


@dataclass(frozen=True, slots=True)
class Seat:
    """One ticket in one case."""

    commitment: Hash32 = ZERO_HASH
    state: SeatState = SeatState.NONE


@dataclass(frozen=True, slots=True)
class Attestation:
    """What one issuer says about one subject and topic."""

    data: Hash32
    issued_at: int
    valid_until: int
    revoked: bool
    version: int


@dataclass(frozen=True, slots=True)
class CommitteeTerms:
    """What a Committee was deployed with."""

    address: Address = ZERO_ADDRESS
    """The contract, which is the resolver that a quote names and the account that fees are paid to."""
    token: Address = ZERO_ADDRESS
    seat_bond: int = 1
    """Price of a ticket."""
    seats: int = 1
    """Seats of a case on average."""
    quorum: int = 1
    """Reveals below which the committee was silent."""
    commit_window: int = 0
    reveal_window: int = 0
    leave_delay: int = 0


@dataclass(frozen=True, slots=True)
class Escrow:
    """The state begins after `Vault.seal` with the five modules."""

    domain: Domain
    """EIP-712 domain of Channels: channel ids depend on it."""
    vault: Address
    tokens: frozenset[Address] = frozenset()
    """Tokens that may be deposited."""
    paused: bool = False
    balances: Mapping[tuple[Address, Address], int] = field(default_factory=dict)
    """(token, account) -> free balance in the vault."""
    locked: Mapping[tuple[Module, Address], int] = field(default_factory=dict)
    """(module, token) -> what that module has locked."""
    channels: Mapping[ChannelId, Channel] = field(default_factory=dict)
    owed: Mapping[tuple[Address, Address], int] = field(default_factory=dict)
    """(receiver, token) -> claimed and not yet settled."""
    workers: Mapping[Address, Worker] = field(default_factory=dict)
    guardians: frozenset[Address] = frozenset()
    """Who may cancel a booked slash."""
    capabilities: Mapping[Address, Capability] = field(default_factory=dict)
    convicted: frozenset[Address] = frozenset()
    """Hot keys that can never work again."""
    proven: frozenset[tuple[Address, Address]] = frozenset()
    """(hot key, token) whose equivocation was proved."""
    stakes: Mapping[tuple[Address, Address], Stake] = field(default_factory=dict)
    """(owner, token) -> stake"""
    earnings: Mapping[tuple[Address, Address, int], int] = field(default_factory=dict)
    """(owner, token, epoch) -> stake locked because of what was earned in that epoch"""
    slashes: Mapping[int, Slash] = field(default_factory=dict)
    """Ids count from 1."""
    jobs_domain: Domain = NO_DOMAIN
    """EIP-712 domain of Jobs: job ids depend on it."""
    jobs: Mapping[JobId, Job] = field(default_factory=dict)
    disputes: Mapping[JobId, Dispute] = field(default_factory=dict)
    terms: CommitteeTerms = CommitteeTerms()
    jurors: Mapping[Address, Juror] = field(default_factory=dict)
    tickets: Mapping[Address, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """juror, or the zero address for all -> (block, tickets from that block on), oldest first"""
    cases: Mapping[JobId, Case] = field(default_factory=dict)
    seats: Mapping[tuple[JobId, Address, int], Seat] = field(default_factory=dict)
    """(job, juror, ticket) -> seat that was taken by a commitment"""
    attestations: Mapping[tuple[Address, Address, Hash32], Attestation] = field(default_factory=dict)
    """(issuer, subject, topic)"""

    def balance_of(self, token: Address, account: Address) -> int:
        return self.balances.get((token, account), 0)

    def locked_by(self, module: Module, token: Address) -> int:
        return self.locked.get((module, token), 0)

    def liabilities(self, token: Address) -> int:
        """What the vault owes in `token`: free balances plus locks (I1)."""
        free = sum(v for (t, _), v in self.balances.items() if t == token)
        return free + sum(v for (_, t), v in self.locked.items() if t == token)

    def channel(self, channel_id: ChannelId) -> Channel:
        return self.channels.get(channel_id, _NO_CHANNEL)

    def owed_to(self, receiver: Address, token: Address) -> int:
        return self.owed.get((receiver, token), 0)

    def payout_of(self, hot_key: Address) -> Address:
        """Where earnings of `hot_key` go; the key itself when it was never registered."""
        worker = self.workers.get(hot_key)
        return worker.payout if worker else hot_key

    def owner_of(self, hot_key: Address) -> Address:
        worker = self.workers.get(hot_key)
        return worker.owner if worker else ZERO_ADDRESS

    def nonce_of(self, hot_key: Address) -> int:
        worker = self.workers.get(hot_key)
        return worker.nonce if worker else 0

    def stake_of(self, owner: Address, token: Address) -> Stake:
        return self.stakes.get((owner, token), _NO_STAKE)

    def job(self, job_id: JobId) -> Job:
        return self.jobs.get(job_id, _NO_JOB)

    def dispute(self, job_id: JobId) -> Dispute:
        return self.disputes.get(job_id, _NO_DISPUTE)

    def juror(self, juror: Address) -> Juror:
        return self.jurors.get(juror, _NO_JUROR)

    def seat(self, job_id: JobId, juror: Address, ticket: int) -> Seat:
        return self.seats.get((job_id, juror, ticket), _NO_SEAT)

    def case(self, job_id: JobId) -> Case:
        return self.cases.get(job_id, _NO_CASE)


_NO_CHANNEL: Final = Channel()
_NO_STAKE: Final = Stake()
_NO_JOB: Final = Job()
_NO_DISPUTE: Final = Dispute()
_NO_JUROR: Final = Juror()
_NO_CASE: Final = Case()
_NO_SEAT: Final = Seat()

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def require(holds: bool, name: str) -> None:
    """Revert with the Solidity error `name` unless `holds`."""
    if not holds:
        raise EscrowError(name)


def add(mapping: Mapping[_Key, int], key: _Key, amount: int) -> Mapping[_Key, int]:
    return {**mapping, key: mapping.get(key, 0) + amount}


def put(mapping: Mapping[_Key, _Value], key: _Key, value: _Value) -> Mapping[_Key, _Value]:
    return {**mapping, key: value}
