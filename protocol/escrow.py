"""Executable model of the contracts: Vault, Workers and Channels as one value and pure functions.

Each function is one Solidity function: the same checks in the same order, the same error names, a new state or an
`EscrowError`. Readability before speed; the differential tests hold the compiled contracts to it after every step.

Three things stay outside. *Signatures*: the caller recovers the signer over the digest that the contract computes and
passes the address, or None when the bytes are no signature at all; for a contract wallet it passes the wallet's address
when ERC-1271 says yes. *Coins*: `deposit` is told what arrived, `withdraw` only books. *Sealing and roles*: the state
begins after `Vault.seal` with Channels as its only module; who may pause or list tokens is the caller's affair.

Times are Unix seconds of the block; amounts the smallest unit of their token; the native coin is the zero address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final, TypeVar

from protocol.errors import ProtocolError
from protocol.ids import ZERO_ADDRESS, Address, ChannelId
from protocol.typed_data import ChannelConfig, Domain

MIN_WITHDRAW_DELAY: Final = 15 * 60
MAX_WITHDRAW_DELAY: Final = 30 * 24 * 3600
MAX_BATCH: Final = 400
"""Entries of one claim; a transaction may use 2**24 gas (EIP-7825)."""


class EscrowError(ProtocolError):
    """The contract would revert. `name` is the Solidity error's name, the state is unchanged."""

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(f"{name}: {detail}" if detail else name)
        self.name = name


class SkipReason(IntEnum):
    """Why an entry of a claim was passed over; numbers as in Solidity."""

    NONE = 0
    CLOSED = 1
    NOT_HIGHER = 2
    OVER_ALLOCATED = 3
    BAD_SIGNATURE = 4
    OVER_VOUCHER = 5


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


@dataclass(frozen=True, slots=True)
class Claim:
    """One entry of a claim."""

    config: ChannelConfig
    amount: int
    """The claimed total that the receiver asks for."""
    cumulative: int
    """The voucher's ceiling."""
    signer: Address | None
    """Who signed the voucher for `cumulative` on this channel; None when nobody can have."""


@dataclass(frozen=True, slots=True)
class Escrow:
    """All money and all rights at one moment. Absent keys mean zero, as in Solidity."""

    domain: Domain
    """EIP-712 domain of Channels: channel ids depend on it."""
    vault: Address
    tokens: frozenset[Address] = frozenset()
    """Tokens that may be deposited."""
    paused: bool = False
    balances: Mapping[tuple[Address, Address], int] = field(default_factory=dict)
    """(token, account) -> free balance in the vault."""
    locked: Mapping[Address, int] = field(default_factory=dict)
    """token -> what Channels has locked: remainders of its channels and what it owes to receivers."""
    channels: Mapping[ChannelId, Channel] = field(default_factory=dict)
    owed: Mapping[tuple[Address, Address], int] = field(default_factory=dict)
    """(receiver, token) -> claimed and not yet settled."""
    workers: Mapping[Address, Worker] = field(default_factory=dict)

    def balance_of(self, token: Address, account: Address) -> int:
        return self.balances.get((token, account), 0)

    def channel(self, channel_id: ChannelId) -> Channel:
        return self.channels.get(channel_id, Channel())

    def owed_to(self, receiver: Address, token: Address) -> int:
        return self.owed.get((receiver, token), 0)

    def payout_of(self, hot_key: Address) -> Address:
        """Where earnings of `hot_key` go; the key itself when it was never registered."""
        worker = self.workers.get(hot_key)
        return worker.payout if worker else hot_key

    def nonce_of(self, hot_key: Address) -> int:
        worker = self.workers.get(hot_key)
        return worker.nonce if worker else 0

    def liabilities(self, token: Address) -> int:
        """What the vault owes in `token`: free balances plus locks (I1)."""
        return sum(v for (t, _), v in self.balances.items() if t == token) + self.locked.get(token, 0)


# --------------------------------------------------------------------------------------------------------------- vault


def set_token(state: Escrow, token: Address, allowed: bool) -> Escrow:
    return replace(state, tokens=state.tokens | {token} if allowed else state.tokens - {token})


def set_paused(state: Escrow, paused: bool) -> Escrow:
    return replace(state, paused=paused)


def deposit(
    state: Escrow, token: Address, amount: int, beneficiary: Address, *, value: int = 0, received: int | None = None
) -> Escrow:
    """Credit `beneficiary`. `value` is the native coin sent along, `received` what the token really delivered."""
    _require(not state.paused, "Vault_Paused")
    _require(token in state.tokens, "Vault_TokenNotAllowed")
    _require(beneficiary != ZERO_ADDRESS, "Vault_ZeroAddress")
    _require(value == (amount if token == ZERO_ADDRESS else 0), "Vault_WrongValue")
    credited = amount if received is None else received
    _require(credited > 0, "Vault_ZeroAmount")
    return _credit(state, token, beneficiary, credited)


def withdraw(state: Escrow, caller: Address, token: Address, amount: int, to: Address) -> Escrow:
    """Book `amount` out of the vault. The coins go to `to`; a token that refuses makes the whole call revert."""
    _require(to not in (ZERO_ADDRESS, state.vault), "Vault_BadRecipient")
    _require(amount > 0, "Vault_ZeroAmount")
    return _debit(state, token, caller, amount)


# ------------------------------------------------------------------------------------------------------------- workers


def register(
    state: Escrow, now: int, caller: Address, hot_key: Address, payout: Address, deadline: int, signer: Address | None
) -> Escrow:
    """`signer` of HotKey{owner: caller, hotKey, payout, nonce: state.nonce_of(hot_key), deadline}."""
    _require(payout != ZERO_ADDRESS, "Workers_ZeroAddress")
    _require(now < deadline, "Workers_Expired")
    worker = state.workers.get(hot_key)
    _require(worker is None or (not worker.active and worker.owner == caller), "Workers_HotKeyTaken")
    _require(signer == hot_key, "Workers_BadSignature")
    return _put_worker(state, hot_key, Worker(caller, payout, True, state.nonce_of(hot_key) + 1))


def set_payout(state: Escrow, caller: Address, hot_key: Address, payout: Address) -> Escrow:
    worker = _owned(state, caller, hot_key)
    _require(payout != ZERO_ADDRESS, "Workers_ZeroAddress")
    return _put_worker(state, hot_key, replace(worker, payout=payout))


def rotate(
    state: Escrow, now: int, caller: Address, hot_key: Address, new_key: Address, deadline: int, signer: Address | None
) -> Escrow:
    """Retire `hot_key`, register `new_key` with the same payout by its own consent."""
    worker = _owned_active(state, caller, hot_key)
    retired = _put_worker(state, hot_key, replace(worker, active=False))
    return register(retired, now, caller, new_key, worker.payout, deadline, signer)


def revoke(state: Escrow, caller: Address, hot_key: Address) -> Escrow:
    worker = _owned_active(state, caller, hot_key)
    return _put_worker(state, hot_key, replace(worker, active=False))


# ------------------------------------------------------------------------------------------------------------ channels


def allocate(
    state: Escrow, now: int, config: ChannelConfig, allocated: int, valid_before: int, signer: Address | None
) -> Escrow:
    """Raise the channel's total to `allocated` out of the payer's balance."""
    _require(ZERO_ADDRESS not in (config.payer_authorizer, config.receiver), "Channels_ZeroAddress")
    _require(MIN_WITHDRAW_DELAY <= config.withdraw_delay <= MAX_WITHDRAW_DELAY, "Channels_DelayOutOfRange")
    _require(now < valid_before, "Channels_Expired")
    channel_id = config.channel_id(state.domain)
    channel = state.channel(channel_id)
    _require(not channel.closed, "Channels_Closed")
    _require(channel.withdraw_at == 0, "Channels_WithdrawPending")
    _require(allocated > channel.allocated, "Channels_NotHigher")
    _require(signer == config.payer, "Channels_BadSignature")
    _require(not state.paused, "Vault_Paused")
    added = allocated - channel.allocated
    state = _debit(state, config.token, config.payer, added)
    state = replace(state, locked=_add(state.locked, config.token, added))
    return _put_channel(state, channel_id, replace(channel, allocated=allocated))


def claim(state: Escrow, entries: Sequence[Claim]) -> tuple[Escrow, tuple[SkipReason, ...]]:
    """Take vouchers one by one (I13); the second value says what became of each."""
    _require(1 <= len(entries) <= MAX_BATCH, "Channels_BatchSize")
    reasons = []
    for entry in entries:
        state, reason = _claim_one(state, entry)
        reasons.append(reason)
    return state, tuple(reasons)


def _claim_one(state: Escrow, entry: Claim) -> tuple[Escrow, SkipReason]:
    config = entry.config
    channel_id = config.channel_id(state.domain)
    channel = state.channel(channel_id)
    if channel.closed:
        return state, SkipReason.CLOSED
    if entry.amount <= channel.claimed:
        return state, SkipReason.NOT_HIGHER
    if entry.amount > channel.allocated:
        return state, SkipReason.OVER_ALLOCATED
    if entry.amount > entry.cumulative:
        return state, SkipReason.OVER_VOUCHER
    if entry.signer != config.payer_authorizer:
        return state, SkipReason.BAD_SIGNATURE
    added = entry.amount - channel.claimed
    state = replace(state, owed=_add(state.owed, (config.receiver, config.token), added))
    return _put_channel(state, channel_id, replace(channel, claimed=entry.amount)), SkipReason.NONE


def settle(state: Escrow, receiver: Address, token: Address) -> Escrow:
    """Move what is owed to the vault balance of the receiver's payout address."""
    amount = state.owed_to(receiver, token)
    _require(amount > 0, "Channels_NothingOwed")
    state = replace(state, owed=_add(state.owed, (receiver, token), -amount))
    return _release(state, token, state.payout_of(receiver), amount)


def initiate_withdraw(state: Escrow, now: int, caller: Address, config: ChannelConfig) -> Escrow:
    channel_id, channel = _open(state, config)
    _require(caller in (config.payer, config.payer_authorizer), "Channels_NotPayer")
    _require(channel.withdraw_at == 0, "Channels_WithdrawPending")
    return _put_channel(state, channel_id, replace(channel, withdraw_at=now + config.withdraw_delay))


def finalize_withdraw(state: Escrow, now: int, config: ChannelConfig) -> Escrow:
    channel_id, channel = _open(state, config)
    _require(channel.withdraw_at != 0, "Channels_NoWithdraw")
    _require(now >= channel.withdraw_at, "Channels_TooEarly")
    state = _put_channel(state, channel_id, replace(channel, allocated=channel.claimed, closed=True))
    return _release(state, config.token, config.payer, channel.remainder)


def close(
    state: Escrow,
    config: ChannelConfig,
    final_amount: int,
    voucher_amount: int,
    voucher_signer: Address | None,
    close_signer: Address | None,
) -> Escrow:
    """End a channel with the receiver's consent: pay up to `final_amount`, return the rest, at once."""
    channel_id, channel = _open(state, config)
    _require(final_amount >= channel.claimed, "Channels_BelowClaimed")
    _require(final_amount <= channel.allocated, "Channels_OverAllocated")
    if final_amount > channel.claimed:
        _require(final_amount <= voucher_amount, "Channels_OverVoucher")
        _require(voucher_signer == config.payer_authorizer, "Channels_BadSignature")
    _require(close_signer == config.receiver_authorizer != ZERO_ADDRESS, "Channels_BadSignature")
    state = _put_channel(state, channel_id, Channel(final_amount, final_amount, channel.withdraw_at, True))
    state = _release(state, config.token, state.payout_of(config.receiver), final_amount - channel.claimed)
    return _release(state, config.token, config.payer, channel.allocated - final_amount)


# -------------------------------------------------------------------------------------------------------------- pieces

_Key = TypeVar("_Key")


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise EscrowError(name)


def _add(mapping: Mapping[_Key, int], key: _Key, amount: int) -> Mapping[_Key, int]:
    return {**mapping, key: mapping.get(key, 0) + amount}


def _credit(state: Escrow, token: Address, account: Address, amount: int) -> Escrow:
    return replace(state, balances=_add(state.balances, (token, account), amount))


def _debit(state: Escrow, token: Address, account: Address, amount: int) -> Escrow:
    balance = state.balance_of(token, account)
    if amount > balance:
        raise EscrowError("Vault_Insufficient", f"{account} holds {balance}, {amount} wanted")
    return _credit(state, token, account, -amount)


def _release(state: Escrow, token: Address, to: Address, amount: int) -> Escrow:
    """Vault.release by Channels: its lock -> a free balance."""
    _require(amount <= state.locked.get(token, 0), "Vault_ReleaseExceedsLocked")
    return _credit(replace(state, locked=_add(state.locked, token, -amount)), token, to, amount)


def _put_channel(state: Escrow, channel_id: ChannelId, channel: Channel) -> Escrow:
    return replace(state, channels={**state.channels, channel_id: channel})


def _put_worker(state: Escrow, hot_key: Address, worker: Worker) -> Escrow:
    return replace(state, workers={**state.workers, hot_key: worker})


def _open(state: Escrow, config: ChannelConfig) -> tuple[ChannelId, Channel]:
    """A channel that holds or held money and is not closed."""
    channel_id = config.channel_id(state.domain)
    channel = state.channel(channel_id)
    _require(not channel.closed, "Channels_Closed")
    _require(channel.allocated > 0, "Channels_Unknown")
    return channel_id, channel


def _owned(state: Escrow, caller: Address, hot_key: Address) -> Worker:
    worker = state.workers.get(hot_key)
    if worker is None or worker.owner != caller:
        raise EscrowError("Workers_NotOwner")
    return worker


def _owned_active(state: Escrow, caller: Address, hot_key: Address) -> Worker:
    worker = _owned(state, caller, hot_key)
    _require(worker.active, "Workers_NotActive")
    return worker
