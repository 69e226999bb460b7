"""Channels: one-way payment under cumulative vouchers.

*Signatures* stay outside: the caller recovers the signer over the digest that the contract computes and passes the address,
or None when the bytes are no signature at all; for a contract wallet it passes the wallet's address when ERC-1271 says yes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from protocol.escrow import vault, workers
from protocol.escrow.state import Channel, Escrow, Module, add, put, require
from protocol.ids import ZERO_ADDRESS, Address, ChannelId
from protocol.typed_data import ChannelConfig

MIN_WITHDRAW_DELAY: Final = 15 * 60
MAX_WITHDRAW_DELAY: Final = 30 * 24 * 3600
MAX_BATCH: Final = 400
"""Entries of one claim; a transaction may use 2**24 gas (EIP-7825)."""


class SkipReason(IntEnum):
    """Why an entry of a claim was passed over; numbers as in Solidity."""

    NONE = 0
    CLOSED = 1
    NOT_HIGHER = 2
    OVER_ALLOCATED = 3
    BAD_SIGNATURE = 4
    OVER_VOUCHER = 5


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


def allocate(
    state: Escrow, now: int, config: ChannelConfig, allocated: int, valid_before: int, signer: Address | None
) -> Escrow:
    """Raise the channel's total to `allocated` out of the payer's balance."""
    require(ZERO_ADDRESS not in (config.payer_authorizer, config.receiver), "Channels_ZeroAddress")
    require(MIN_WITHDRAW_DELAY <= config.withdraw_delay <= MAX_WITHDRAW_DELAY, "Channels_DelayOutOfRange")
    require(now < valid_before, "Channels_Expired")
    channel_id = config.channel_id(state.domain)
    channel = state.channel(channel_id)
    require(not channel.closed, "Channels_Closed")
    require(channel.withdraw_at == 0, "Channels_WithdrawPending")
    require(allocated > channel.allocated, "Channels_NotHigher")
    require(signer == config.payer, "Channels_BadSignature")
    state = vault.lock(state, Module.CHANNELS, config.token, config.payer, allocated - channel.allocated)
    return _put_channel(state, channel_id, replace(channel, allocated=allocated))


def claim(state: Escrow, entries: Sequence[Claim]) -> tuple[Escrow, tuple[SkipReason, ...]]:
    """Take vouchers one by one (I13); the second value says what became of each."""
    require(1 <= len(entries) <= MAX_BATCH, "Channels_BatchSize")
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
    state = replace(state, owed=add(state.owed, (config.receiver, config.token), added))
    return _put_channel(state, channel_id, replace(channel, claimed=entry.amount)), SkipReason.NONE


def settle(state: Escrow, now: int, receiver: Address, token: Address) -> Escrow:
    """Move what is owed to the vault balance of the receiver's payout address."""
    amount = state.owed_to(receiver, token)
    require(amount > 0, "Channels_NothingOwed")
    state = replace(state, owed=add(state.owed, (receiver, token), -amount))
    state = workers.lock_for_earnings(state, now, receiver, token, amount)
    return _release(state, token, state.payout_of(receiver), amount)


def initiate_withdraw(state: Escrow, now: int, caller: Address, config: ChannelConfig) -> Escrow:
    channel_id, channel = _open(state, config)
    require(caller in (config.payer, config.payer_authorizer), "Channels_NotPayer")
    require(channel.withdraw_at == 0, "Channels_WithdrawPending")
    return _put_channel(state, channel_id, replace(channel, withdraw_at=now + config.withdraw_delay))


def finalize_withdraw(state: Escrow, now: int, config: ChannelConfig) -> Escrow:
    channel_id, channel = _open(state, config)
    require(channel.withdraw_at != 0, "Channels_NoWithdraw")
    require(now >= channel.withdraw_at, "Channels_TooEarly")
    state = _put_channel(state, channel_id, replace(channel, allocated=channel.claimed, closed=True))
    return _release(state, config.token, config.payer, channel.remainder)


def close(
    state: Escrow,
    now: int,
    config: ChannelConfig,
    final_amount: int,
    voucher_amount: int,
    voucher_signer: Address | None,
    close_signer: Address | None,
) -> Escrow:
    """End a channel with the receiver's consent: pay up to `final_amount`, return the rest, at once."""
    channel_id, channel = _open(state, config)
    require(final_amount >= channel.claimed, "Channels_BelowClaimed")
    require(final_amount <= channel.allocated, "Channels_OverAllocated")
    if final_amount > channel.claimed:
        require(final_amount <= voucher_amount, "Channels_OverVoucher")
        require(voucher_signer == config.payer_authorizer, "Channels_BadSignature")
    require(close_signer == config.receiver_authorizer != ZERO_ADDRESS, "Channels_BadSignature")
    state = _put_channel(state, channel_id, Channel(final_amount, final_amount, channel.withdraw_at, True))
    paid = final_amount - channel.claimed
    state = workers.lock_for_earnings(state, now, config.receiver, config.token, paid)
    state = _release(state, config.token, state.payout_of(config.receiver), paid)
    return _release(state, config.token, config.payer, channel.allocated - final_amount)


# -------------------------------------------------------------------------------------------------------------- pieces


def _put_channel(state: Escrow, channel_id: ChannelId, channel: Channel) -> Escrow:
    return replace(state, channels=put(state.channels, channel_id, channel))


def _open(state: Escrow, config: ChannelConfig) -> tuple[ChannelId, Channel]:
    """A channel that holds or held money and is not closed."""
    channel_id = config.channel_id(state.domain)
    channel = state.channel(channel_id)
    require(not channel.closed, "Channels_Closed")
    require(channel.allocated > 0, "Channels_Unknown")
    return channel_id, channel


def _release(state: Escrow, token: Address, to: Address, amount: int) -> Escrow:
    return vault.release(state, Module.CHANNELS, token, to, amount)
