"""Payment on one channel: `apply(state, change) -> (state, effects)`.

Rules of this file:

1. All money that one channel can move is in `ChannelState`, and only `apply` makes a new one. It is deterministic, does no
   I/O and knows no clock, so the fold of the journal *is* the state (invariant L1).
2. A driver journals a change before it acts on it: nothing is signed or sent that a restart would forget.
3. A change that breaks a rule raises and leaves the state as it was: Remote when the other side is to blame for it, Local
   when we are.
4. A channel is on one chain, and its id says on which: nothing signed for another chain or contract counts here.

Both roles hold the same state and run the same changes; the few rules that differ ask `state.role`. Amounts are in the
smallest unit of the channel's token and cumulative over the channel's life. Invariants L1 to L10: docs/invariants.md.

(Structs and not dataclasses: a start makes millions of these, and `replace` on a frozen dataclass takes thirty times as long.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, assert_never

import msgspec
from msgspec.structs import replace

from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.ids import UINT128_MAX, ChannelId, JobId
from protocol.typed_data import ChannelConfig, Domain

Part = tuple[JobId, int]
"""One part of one job: what a single worker serves of it."""


class Role(StrEnum):
    CLIENT = "client"
    WORKER = "worker"


# ----------------------------------------------------------------------------------------------------------- changes


class ChannelOpened(msgspec.Struct, frozen=True, gc=False):
    """The payer signed the first allocation."""

    channel_id: ChannelId
    config: ChannelConfig
    allocated: int
    valid_before: int
    signature: bytes
    domain: Domain | None = None
    """Chain and contract that the channel is on. None only in journals from before there were several: see `placed`."""


class AllocationRaised(msgspec.Struct, frozen=True, gc=False):
    """The payer signed a higher allocation for a channel that exists."""

    channel_id: ChannelId
    allocated: int
    valid_before: int
    signature: bytes


class ChainSeen(msgspec.Struct, frozen=True, gc=False):
    """What the contract says now. Absolute values, so a reorg is just another sight."""

    channel_id: ChannelId
    allocated: int
    claimed: int
    withdraw_at: int
    closed: bool


class JobOpened(msgspec.Struct, frozen=True, gc=False):
    """A part of a job was asked for (client) or taken (worker)."""

    channel_id: ChannelId
    job_id: JobId
    part: int
    sequence: int
    """Number of the receipt to come; the client learns it later and says 0."""
    limit: int
    """The most this part can cost: its price at `max_tokens`. Reserved until the part ends."""


class VoucherAdded(msgspec.Struct, frozen=True, gc=False):
    channel_id: ChannelId
    cumulative: int
    signature: bytes


class JobEnded(msgspec.Struct, frozen=True, gc=False):
    """A part ended: with its receipt, or without one when the other side broke off."""

    channel_id: ChannelId
    job_id: JobId
    part: int
    spent: int
    """Cost of what was delivered."""
    sequence: int
    """The receipt's number; 0 without a receipt."""
    receipt: bytes
    """`messages.ReceiptMessage` as it crossed the wire; empty without one."""


class CloseSigned(msgspec.Struct, frozen=True, gc=False):
    """The worker consented to end the channel at `final`. No job and no voucher after it.

    A worker records it twice: decided, with an empty signature, and signed.
    """

    channel_id: ChannelId
    final: int
    signature: bytes


Change = ChannelOpened | AllocationRaised | ChainSeen | JobOpened | VoucherAdded | JobEnded | CloseSigned
CHANGES: Final = (ChannelOpened, AllocationRaised, ChainSeen, JobOpened, VoucherAdded, JobEnded, CloseSigned)


# ----------------------------------------------------------------------------------------------------------- effects


class ClaimNow(msgspec.Struct, frozen=True, gc=False):
    """Worker: the payer is leaving; claim before the delay has passed."""

    channel_id: ChannelId
    amount: int


Effect = ClaimNow


# ------------------------------------------------------------------------------------------------------------- state


class ChannelState(msgspec.Struct, frozen=True, gc=False):
    role: Role
    channel_id: ChannelId
    config: ChannelConfig
    authorized: int
    """Highest allocation the payer signed."""
    valid_before: int
    allocation_signature: bytes
    domain: Domain | None = None
    """Chain and contract; None when the journal does not say and no chain that we know fits the id."""
    allocated: int = 0
    """What the contract has locked, as last seen."""
    claimed: int = 0
    withdraw_at: int = 0
    """Chain seconds; 0 = the payer has not begun to leave."""
    closed: bool = False
    cumulative: int = 0
    """Highest voucher."""
    voucher_signature: bytes = b""
    spent: int = 0
    """Sum of the cost of all parts that ended."""
    sequence: int = 0
    """Highest receipt number given (worker) or seen (client)."""
    final: int | None = None
    """Set once the worker has signed a close."""
    open_jobs: Mapping[Part, int] = msgspec.field(default_factory=dict)
    """Parts under way and the most each can cost."""

    @property
    def home(self) -> Domain:
        """The domain of everything that is signed about this channel. Raises `LocalProtocolError` when it is not known."""
        if self.domain is None:
            raise LocalProtocolError(
                f"channel {self.channel_id} is on no chain that we know: nothing is signed about it"
            )
        return self.domain

    @property
    def reserved(self) -> int:
        return sum(self.open_jobs.values())

    @property
    def ceiling(self) -> int:
        """How high vouchers can go: for the worker what is locked on chain, for the client what it authorised."""
        return self.allocated if self.role is Role.WORKER else self.authorized

    @property
    def free(self) -> int:
        """What new jobs may still cost on this channel."""
        return max(0, self.ceiling - self.spent - self.reserved)

    @property
    def leaving(self) -> bool:
        """No new work: the payer withdraws, a close is signed, or the channel is over."""
        return self.closed or self.withdraw_at != 0 or self.final is not None

    @property
    def claimable(self) -> int:
        """What the worker may claim now: earned, covered by a voucher in hand, locked, and not claimed yet.

        What was claimed above every voucher in hand needs no term here: it leaves nothing to claim.
        """
        return max(0, min(self.spent, self.cumulative, self.allocated) - self.claimed)

    @property
    def covered(self) -> int:
        """What is paid for: vouched for, or claimed already (a payer may claim for us with a voucher it never sent)."""
        return max(self.cumulative, self.claimed)

    def owed(self, running: int = 0) -> int:
        """Cost delivered and not covered; `running` is the cost so far of the parts under way."""
        return max(0, self.spent + running - self.covered)


def apply(state: ChannelState, change: Change) -> tuple[ChannelState, tuple[Effect, ...]]:
    """The next state and what the driver should do. Raises `ProtocolError` by blame; then nothing has changed."""
    if change.channel_id != state.channel_id:
        raise LocalProtocolError(f"change for channel {change.channel_id} applied to {state.channel_id}")
    match change:
        case ChannelOpened():
            raise LocalProtocolError("a channel opens once")
        case AllocationRaised():
            return _allocation_raised(state, change), ()
        case ChainSeen():
            return _chain_seen(state, change)
        case JobOpened():
            return _job_opened(state, change), ()
        case VoucherAdded():
            return _voucher_added(state, change), ()
        case JobEnded():
            return _job_ended(state, change), ()
        case CloseSigned():
            return _close_signed(state, change), ()
        case _:
            assert_never(change)


def opened(role: Role, change: ChannelOpened) -> ChannelState:
    """The first state of a channel."""
    if not 0 < change.allocated <= UINT128_MAX:
        raise _blame(role, WireCode.BAD_VOUCHER, "an allocation is a positive uint128")
    if change.domain is not None and change.config.channel_id(change.domain) != change.channel_id:
        raise _blame(
            role, WireCode.WRONG_DOMAIN, f"channel {change.channel_id} is not one of chain {change.domain.chain_id}"
        )
    return ChannelState(
        role=role,
        channel_id=change.channel_id,
        config=change.config,
        authorized=change.allocated,
        valid_before=change.valid_before,
        allocation_signature=change.signature,
        domain=change.domain,
    )


def placed(change: ChannelOpened, domains: Iterable[Domain]) -> ChannelOpened:
    """The change with its chain, when its record does not say: the one of `domains` to which the channel's id commits.

    No guess: the id is the digest of the configuration under chain and contract, so at most one fits.
    """
    if change.domain is not None:
        return change
    fitting = (domain for domain in domains if change.config.channel_id(domain) == change.channel_id)
    return replace(change, domain=next(fitting, None))


def _allocation_raised(state: ChannelState, change: AllocationRaised) -> ChannelState:
    if state.leaving:
        raise _blame(state.role, WireCode.BAD_VOUCHER, "the channel is ending; open another one")
    if not state.authorized < change.allocated <= UINT128_MAX:
        raise _blame(state.role, WireCode.BAD_VOUCHER, "an allocation only rises")
    return replace(
        state,
        authorized=change.allocated,
        valid_before=change.valid_before,
        allocation_signature=change.signature,
    )


def _chain_seen(state: ChannelState, change: ChainSeen) -> tuple[ChannelState, tuple[Effect, ...]]:
    if state.role is Role.CLIENT and change.claimed > state.cumulative:
        # L8: the contract accepts a claim only under a voucher, and only our session key signs those. A claim above every
        # voucher we know of means that this journal is an old copy, or that our key signs somewhere else. Stop rather than
        # guess. A worker takes the sight: anybody may submit a claim, so a payer may pay us with a voucher we never saw.
        raise LocalProtocolError(
            f"the chain shows {change.claimed} claimed on {state.channel_id}, this journal knows vouchers up to "
            f"{state.cumulative}: it is an old backup, or the key is in use elsewhere",
        )
    state = replace(
        state,
        allocated=change.allocated,
        claimed=change.claimed,
        withdraw_at=change.withdraw_at,
        closed=change.closed,
    )
    if state.role is Role.WORKER and state.withdraw_at and not state.closed and state.claimable:
        return state, (ClaimNow(state.channel_id, state.claimed + state.claimable),)
    return state, ()


def _job_opened(state: ChannelState, change: JobOpened) -> ChannelState:
    key = (change.job_id, change.part)
    if key in state.open_jobs:
        raise _blame(state.role, WireCode.UNEXPECTED, f"part {change.part} of job {change.job_id} is already open")
    if state.leaving:
        raise _blame(state.role, WireCode.BAD_VOUCHER, "the channel is ending")
    if change.limit < 0 or change.limit > state.free:
        raise _blame(
            state.role, WireCode.BAD_VOUCHER, f"a job of up to {change.limit} on a channel with {state.free} free"
        )
    if state.role is Role.WORKER and change.sequence != state.sequence + 1:
        raise LocalProtocolError(f"receipt number {change.sequence} does not follow {state.sequence}")
    return replace(
        state,
        sequence=max(state.sequence, change.sequence),
        open_jobs={**state.open_jobs, key: change.limit},
    )


def _voucher_added(state: ChannelState, change: VoucherAdded) -> ChannelState:
    if change.cumulative <= state.cumulative:
        raise _blame(
            state.role,
            WireCode.BAD_VOUCHER,
            f"voucher of {change.cumulative} is not above the last, {state.cumulative}",
        )
    if change.cumulative > state.ceiling:
        raise _blame(
            state.role,
            WireCode.BAD_VOUCHER,
            f"voucher of {change.cumulative} is over the allocation of {state.ceiling}",
        )
    if state.role is Role.CLIENT and change.cumulative > state.spent + state.reserved:
        raise LocalProtocolError(
            f"voucher of {change.cumulative} is over the {state.spent + state.reserved} that all jobs can cost"
        )
    if state.final is not None:  # L7: also one below the total, which a claim of somebody else's may have raised
        raise _blame(state.role, WireCode.BAD_VOUCHER, "a close of the channel is signed")
    return replace(state, cumulative=change.cumulative, voucher_signature=change.signature)


def _job_ended(state: ChannelState, change: JobEnded) -> ChannelState:
    key = (change.job_id, change.part)
    limit = state.open_jobs.get(key)
    if limit is None:
        raise LocalProtocolError(f"part {change.part} of job {change.job_id} is not open: a part is paid at most once")
    if not 0 <= change.spent <= limit:
        raise _blame(state.role, WireCode.BAD_RECEIPT, f"cost {change.spent} is over the {limit} agreed")
    if state.role is Role.WORKER and change.sequence > state.sequence:
        raise LocalProtocolError(f"receipt number {change.sequence} was never given; the last is {state.sequence}")
    return replace(
        state,
        spent=state.spent + change.spent,
        sequence=max(state.sequence, change.sequence),
        open_jobs={k: v for k, v in state.open_jobs.items() if k != key},
    )


def _close_signed(state: ChannelState, change: CloseSigned) -> ChannelState:
    if state.open_jobs:
        raise _blame(state.role, WireCode.UNEXPECTED, "jobs are under way on this channel")
    if state.final is not None and state.final != change.final:
        raise LocalProtocolError(f"a close at {state.final} was signed before")
    earned = max(state.claimed, min(state.spent, state.cumulative))
    if state.role is Role.WORKER and change.final != earned:
        raise LocalProtocolError(f"a close at {change.final} where {earned} is earned")
    if state.role is Role.CLIENT and not state.claimed <= change.final <= earned:
        raise RemoteProtocolError(
            WireCode.BAD_RECEIPT, f"the worker wants to close at {change.final}, {earned} is owed"
        )
    return replace(state, final=change.final)


def _blame(role: Role, code: WireCode, message: str) -> LocalProtocolError | RemoteProtocolError:
    """The client decides on these changes itself; the worker applies what the client sent."""
    return LocalProtocolError(message) if role is Role.CLIENT else RemoteProtocolError(code, message)
