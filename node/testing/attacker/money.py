"""Attacks on Vault and Channels: any amount, any key, any order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from node.testing.attacker.crowd import (
    ANN,
    BOB,
    CLIENTS,
    CROWD,
    EVE,
    JURORS,
    KEYS,
    MALLORY,
    OWNER,
    OWNERS,
    PAYOUT,
    SESSION,
    WORKER,
    WORKER2,
    WORKER3,
    WORKERS,
    Dice,
    flaw_of,
    permit_digest,
    receive_digest,
    recovered,
    split,
)
from node.testing.contracts import NATIVE, config_tuple, signer_of
from protocol import escrow
from protocol.escrow import Claim, Escrow, SkipReason
from protocol.ids import UINT128_MAX, ZERO_ADDRESS, Address, ChannelId, Hash32, keccak256
from protocol.typed_data import Allocation, ChannelConfig, Close, Voucher

if TYPE_CHECKING:
    from node.testing.attacker.attacker import Attacker

HOLDERS = (*CLIENTS, *OWNERS, *JURORS, EVE, MALLORY)
"""Who deposits."""


def configs_of(token: Address) -> tuple[list[ChannelConfig], list[ChannelConfig]]:
    """(channels that can be, channels that must be refused)"""
    base = ChannelConfig(ANN, SESSION, WORKER, WORKER, token, 900, Hash32(bytes(32)))
    good = [
        base,
        replace(base, salt=Hash32(b"\1" * 32), withdraw_delay=3600),
        replace(base, payer=BOB, payer_authorizer=BOB, receiver=WORKER3),
        replace(base, token=NATIVE, receiver=WORKER2, receiver_authorizer=OWNER),
        replace(base, receiver_authorizer=ZERO_ADDRESS, receiver=WORKER2),
    ]
    bad = [
        replace(base, withdraw_delay=899),
        replace(base, withdraw_delay=30 * 86400 + 1),
        replace(base, payer_authorizer=ZERO_ADDRESS),
        replace(base, receiver=ZERO_ADDRESS),
    ]
    return good, bad


# --------------------------------------------------------------------------------------------------------------- vault


def deposit(a: Attacker, dice: Dice) -> None:
    who = dice.choice(HOLDERS)
    to = dice.choice((who, who, *CLIENTS, PAYOUT, ZERO_ADDRESS))
    token = dice.choice((*a.tokens, *a.tokens, a.world.vault.address))
    amount = dice.choice((0, 1, 300, 5000))
    value = amount if token == NATIVE else 0
    put_in(a, who, token, amount, to, dice.choice((value,) * 6 + (1,)))


def put_in(a: Attacker, who: Address, token: Address, amount: int, to: Address, value: int) -> None:
    if token == a.tokens[0] and who == EVE:
        return  # she never approves: her ways in are the signed ones

    a.step(
        who,
        "Vault.deposit",
        (token, amount, to),
        lambda s: escrow.deposit(s, token, amount, to, value=value),
        value=value,
        once=bool(value),
    )


def deposit_with_permit(a: Attacker, dice: Dice) -> None:
    """Eve never approves, so her tokens move by her permit alone, or by what an older one left."""
    who, flaw = EVE, flaw_of(dice)
    to, amount = dice.choice((who, who, ANN, ZERO_ADDRESS)), dice.choice((0, 1, 50, 200))
    nonce = a.world.token.call("nonces", who) + (flaw == "about")
    deadline = a.now + (-1 if flaw == "time" else dice.choice((0, 99)))
    spender = a.world.channels.address if flaw == "contract" else a.world.vault.address
    separator = bytes(32) if flaw == "chain" else a.permit_domain
    digest = permit_digest(separator, who, spender, amount + (flaw == "amount"), nonce, deadline)
    v, r, s = split(a.voices.sign_digest(who, digest, flaw))
    used = dice.choice((a.tokens[0],) * 8 + (NATIVE, a.world.vault.address))

    def model(state: Escrow) -> Escrow:
        now_nonce = a.world.token.call("nonces", who)
        wanted = permit_digest(a.permit_domain, who, a.world.vault.address, amount, now_nonce, deadline)
        fine = deadline >= a.now and signer_of(wanted, r + s + bytes((v,))) == who
        allowed = fine or a.world.token.call("allowance", who, a.world.vault.address) >= amount
        return escrow.deposit_with_permit(state, used, to, amount if allowed else None)

    a.step(who, "Vault.depositWithPermit", (used, amount, to, deadline, v, r, s), model)


def deposit_with_authorization(a: Attacker, dice: Dice) -> None:
    """Anyone submits what the payer signed for the vault; the credit is the payer's."""
    who, flaw = dice.choice((EVE, ANN, MALLORY, EVE, ANN, MALLORY, ZERO_ADDRESS)), flaw_of(dice)
    amount = dice.choice((0, 1, 50, 200))
    after, before = a.now - dice.choice((0, 1)), a.now + dice.choice((0, 1, 99))
    if flaw == "time":
        after, before = a.now + 1, a.now + 9
    nonce = keccak256(b"%d" % dice.randint(0, 2**30))
    separator = bytes(32) if flaw == "chain" else a.permit_domain
    to = a.world.channels.address if flaw == "contract" else a.world.vault.address
    signed_nonce = keccak256(nonce) if flaw == "about" else nonce
    digest = receive_digest(separator, who, to, amount + (flaw == "amount"), after, before, signed_nonce)
    v, r, s = split(a.voices.sign_digest(who, digest, flaw))
    used = dice.choice((a.tokens[0],) * 8 + (NATIVE, a.world.vault.address))

    def model(state: Escrow) -> Escrow:
        wanted = receive_digest(a.permit_domain, who, a.world.vault.address, amount, after, before, nonce)
        fine = signer_of(wanted, r + s + bytes((v,))) == who and after < a.now < before
        used_up = a.world.token.call("authorizationState", who, nonce)
        return escrow.deposit_with_authorization(state, used, who, amount if fine and not used_up else None)

    args = (used, who, amount, after, before, nonce, v, r, s)
    a.step(dice.choice(CROWD), "Vault.depositWithAuthorization", args, model)


def withdraw(a: Attacker, dice: Dice) -> None:
    who, token = dice.choice(CROWD), dice.choice(a.tokens)
    to = dice.choice((who, MALLORY, who, MALLORY, ZERO_ADDRESS, a.world.vault.address))
    balance = a.state.balance_of(token, who)
    amount = dice.choice((0, balance + 1, balance, balance // 8, balance // 2, 1, 1, UINT128_MAX))
    model = lambda s: escrow.withdraw(s, who, token, amount, to)  # noqa: E731
    a.step(who, "Vault.withdraw", (token, amount, to), model, consent={who})


# ------------------------------------------------------------------------------------------------------------ channels


def pick(a: Attacker, dice: Dice) -> ChannelConfig:
    return dice.choice(a.good if dice.randint(0, 9) else [*a.good, *a.bad])


def amount_near(a: Attacker, dice: Dice, config: ChannelConfig) -> int:
    """Around the channel's edges, and wild."""
    c = a.state.channel(config.channel_id(a.world.domain))
    edges = (0, max(c.claimed - 1, 0), c.claimed, c.claimed + 1, c.allocated, c.allocated + 1, UINT128_MAX)
    if dice.randint(0, 2):
        return dice.randint(c.claimed, max(c.allocated, c.claimed))
    return dice.choice(edges)


def voucher(a: Attacker, dice: Dice, config: ChannelConfig, amount: int, flaw: str) -> bytes:
    """A voucher for `amount` that may be for another channel or another amount."""
    domain = a.world.domain
    about = dice.choice(a.good) if flaw == "about" else config
    signed = amount + 1 if flaw == "amount" and amount < UINT128_MAX else amount
    struct = Voucher(about.channel_id(domain), signed)
    signature = a.voices.sign(struct, config.payer_authorizer, flaw, domain)
    if recovered(struct, domain, signature) == about.payer_authorizer:  # what the bytes say counts
        note_voucher(a, struct.channel_id, signed)
    return signature


def note_voucher(a: Attacker, channel_id: ChannelId, amount: int) -> None:
    a.seen["voucher", channel_id] = max(a.seen.get(("voucher", channel_id), 0), amount)


def allocate(a: Attacker, dice: Dice) -> None:
    config, flaw, domain = pick(a, dice), flaw_of(dice), a.world.domain
    channel_id = config.channel_id(domain)
    about = dice.choice(a.good).channel_id(domain) if flaw == "about" else channel_id
    amount = a.state.channel(channel_id).allocated + dice.choice((1, 50, 100, 300))
    if flaw == "amount":
        amount = amount_near(a, dice, config)
    until = a.now + (dice.choice((0, -1)) if flaw == "time" else dice.choice((1, 99)))
    signature = a.voices.sign(Allocation(about, amount, until), config.payer, flaw, domain)
    signer = recovered(Allocation(channel_id, amount, until), domain, signature)
    a.step(
        dice.choice(CROWD),
        "Channels.allocate",
        (config_tuple(config), amount, until, signature),
        lambda s: escrow.allocate(s, a.now, config, amount, until, signer),
        consent={config.payer} if signer == config.payer else (),
    )


def claim(a: Attacker, dice: Dice) -> None:
    entries, claims, domain = [], [], a.world.domain
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
        config = pick(a, dice)
        amount = amount_near(a, dice, config)
        ceiling = dice.choice((amount, amount, min(amount + 7, UINT128_MAX), amount_near(a, dice, config)))
        signature = voucher(a, dice, config, ceiling, flaw_of(dice))
        signer = recovered(Voucher(config.channel_id(domain), ceiling), domain, signature)
        entries.append((config_tuple(config), amount, ceiling, signature))
        claims.append(Claim(config, amount, ceiling, signer))
    before, sender = a.state, dice.choice(CROWD)
    if len(entries) > 1 and dice.randint(0, 3) == 0:
        a.one_by_one(sender, entries)
    logs = a.step(sender, "Channels.claim", (entries,), lambda s: escrow.claim(s, claims)[0])
    if logs is not None:
        said = [values.get("reason", 0) for _, values in a.evm.decode_events(logs)]
        if a.trusts_model:
            a.require(said == list(escrow.claim(before, claims)[1]), "I13: skip reasons differ", str(said))
        a.outcomes.update(("claim entry", SkipReason(reason).name) for reason in said)


def settle(a: Attacker, dice: Dice) -> None:
    receiver, token = dice.choice((*WORKERS[:3], MALLORY)), dice.choice(a.tokens)
    model = lambda s: escrow.settle(s, a.now, receiver, token)  # noqa: E731
    a.step(dice.choice(CROWD), "Channels.settle", (receiver, token), model)


def initiate_withdraw(a: Attacker, dice: Dice) -> None:
    config = pick(a, dice)
    caller = dice.choice((config.payer, config.payer, config.payer_authorizer, config.receiver, MALLORY))
    caller = caller if caller in KEYS else MALLORY
    model = lambda s: escrow.initiate_withdraw(s, a.now, caller, config)  # noqa: E731
    a.step(caller, "Channels.initiateWithdraw", (config_tuple(config),), model)


def finalize_withdraw(a: Attacker, dice: Dice) -> None:
    config, domain = pick(a, dice), a.world.domain
    leaving = [c for c in a.good if (s := a.state.channel(c.channel_id(domain))).withdraw_at and not s.closed]
    if leaving and dice.randint(0, 2):
        config = dice.choice(leaving)
        a.maybe_wait(dice, a.state.channel(config.channel_id(domain)).withdraw_at)
    model = lambda s: escrow.finalize_withdraw(s, a.now, config)  # noqa: E731
    a.step(dice.choice(CROWD), "Channels.finalizeWithdraw", (config_tuple(config),), model)


def close(a: Attacker, dice: Dice) -> None:
    config, flaw, domain = pick(a, dice), flaw_of(dice), a.world.domain
    channel_id = config.channel_id(domain)
    channel = a.state.channel(channel_id)
    ceiling = amount_near(a, dice, config)
    voucher_signature = voucher(a, dice, config, ceiling, flaw_of(dice))
    edges = (min(ceiling, channel.allocated), channel.allocated + 1, max(channel.claimed - 1, 0))
    final = dice.choice((edges[0], *edges, amount_near(a, dice, config)))
    about = dice.choice(a.good).channel_id(domain) if flaw == "about" else channel_id
    struct = Close(about, final + (flaw == "amount" and final < UINT128_MAX))
    signature = a.voices.sign(struct, config.receiver_authorizer, flaw, domain)
    voucher_signer = recovered(Voucher(channel_id, ceiling), domain, voucher_signature)
    close_signer = recovered(Close(channel_id, final), domain, signature)
    a.step(
        dice.choice(CROWD),
        "Channels.close",
        (config_tuple(config), final, ceiling, voucher_signature, signature),
        lambda s: escrow.close(s, a.now, config, final, ceiling, voucher_signer, close_signer),
    )
