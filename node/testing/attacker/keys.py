"""Attacks on Workers: hot keys, stake, slashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.testing.attacker.crowd import (
    ANN,
    CROWD,
    GUARD,
    MALLORY,
    OWNER,
    OWNER2,
    OWNERS,
    PAYOUT,
    WORKERS,
    Dice,
    flaw_of,
    recovered,
)
from protocol import escrow
from protocol.escrow import Capability, Escrow, SlashState
from protocol.ids import ZERO_ADDRESS, Address, Hash32, keccak256
from protocol.typed_data import HotKey

if TYPE_CHECKING:
    from node.testing.attacker.attacker import Attacker

ACTORS = (OWNER, OWNER, OWNER2, MALLORY)


def owner_for(a: Attacker, dice: Dice, hot: Address) -> Address:
    """Mostly who owns it; sometimes the key itself, which a thief of the machine has."""
    owner = a.state.owner_of(hot)
    return owner if owner in OWNERS and dice.randint(0, 3) else dice.choice((*ACTORS, hot))


def consent(a: Attacker, dice: Dice, owner: Address, hot: Address, payout: Address, flaw: str) -> tuple[int, bytes]:
    """(deadline, signature) of a hot key."""
    nonce = a.state.nonce_of(hot) + (flaw == "amount")
    deadline = a.now + (dice.choice((0, -1)) if flaw == "time" else 99)
    struct = HotKey(MALLORY if flaw == "about" else owner, hot, payout, nonce, deadline)
    return deadline, a.voices.sign(struct, hot, flaw, a.world.workers_domain)


def consenting(
    a: Attacker, s: Escrow, owner: Address, hot: Address, payout: Address, deadline: int, signature: bytes
) -> Address | None:
    """Who signed the digest that the contract computes in this state, with its nonce and payout of the moment."""
    return recovered(HotKey(owner, hot, payout, s.nonce_of(hot), deadline), a.world.workers_domain, signature)


def register(a: Attacker, dice: Dice) -> None:
    hot = dice.choice(WORKERS)
    who, payout = owner_for(a, dice, hot), dice.choice((PAYOUT, PAYOUT, OWNER, ANN, ZERO_ADDRESS))
    deadline, signature = consent(a, dice, who, hot, payout, flaw_of(dice))

    def model(s: Escrow) -> Escrow:
        signer = consenting(a, s, who, hot, payout, deadline, signature)
        return escrow.register(s, a.now, who, hot, payout, deadline, signer)

    a.step(who, "Workers.register", (hot, payout, deadline, signature), model)


def register_plainly(a: Attacker, owner: Address, hot: Address) -> None:
    """As the honest do."""
    deadline = a.now + 99
    signature = a.voices.sign(HotKey(owner, hot, PAYOUT, 0, deadline), hot, "none", a.world.workers_domain)

    def model(s: Escrow) -> Escrow:  # replays are judged by it too, and by then the nonce may be another
        signer = consenting(a, s, owner, hot, PAYOUT, deadline, signature)
        return escrow.register(s, a.now, owner, hot, PAYOUT, deadline, signer)

    a.step(owner, "Workers.register", (hot, PAYOUT, deadline, signature), model)


def stake_plainly(a: Attacker, owner: Address, token: Address, amount: int) -> None:
    """Stake, and let jobs hold all of it."""
    a.step(owner, "Workers.stake", (token, amount), lambda s: escrow.stake(s, owner, token, amount), consent={owner})
    model = lambda s: escrow.set_exposure(s, owner, token, amount)  # noqa: E731
    a.step(owner, "Workers.setExposure", (token, amount), model)


def rotate(a: Attacker, dice: Dice) -> None:
    old, new = dice.choice(WORKERS), dice.choice(WORKERS)
    who = owner_for(a, dice, old)
    deadline, signature = consent(a, dice, who, new, a.state.payout_of(old), flaw_of(dice))

    def model(s: Escrow) -> Escrow:
        signer = consenting(a, s, who, new, s.payout_of(old), deadline, signature)
        return escrow.rotate(s, a.now, who, old, new, deadline, signer)

    a.step(who, "Workers.rotate", (old, new, deadline, signature), model)


def set_payout(a: Attacker, dice: Dice) -> None:
    hot, payout = dice.choice(WORKERS), dice.choice((PAYOUT, OWNER, ZERO_ADDRESS))
    who = owner_for(a, dice, hot)
    a.step(who, "Workers.setPayout", (hot, payout), lambda s: escrow.set_payout(s, who, hot, payout))


def revoke(a: Attacker, dice: Dice) -> None:
    hot = dice.choice(WORKERS)
    who = owner_for(a, dice, hot)
    a.step(who, "Workers.revoke", (hot,), lambda s: escrow.revoke(s, a.now, who, hot))


def announce(a: Attacker, dice: Dice) -> None:
    hot = dice.choice(WORKERS)
    who = dice.choice((hot, hot, owner_for(a, dice, hot), MALLORY))
    known = a.state.capabilities.get(hot, Capability()).version
    version = max(known + dice.choice((1, 1, 5, 0, -1)), 0)
    capability, until = Hash32(keccak256(b"%d" % version)), a.now + dice.choice((-1, 0, 99))
    model = lambda s: escrow.announce(s, who, hot, capability, version, until)  # noqa: E731
    a.step(who, "Workers.announce", (hot, capability, version, until, "ipfs://"), model)


# --------------------------------------------------------------------------------------------------------------- stake


def stake(a: Attacker, dice: Dice) -> None:
    who, token = dice.choice(ACTORS), dice.choice((a.tokens[0], *a.tokens))
    amount = dice.choice((0, 1, 100, 400, a.state.balance_of(token, who) + 1))
    model = lambda s: escrow.stake(s, who, token, amount)  # noqa: E731
    a.step(who, "Workers.stake", (token, amount), model, consent={who})


def unstake(a: Attacker, dice: Dice) -> None:
    who, token = dice.choice(ACTORS), dice.choice((a.tokens[0], *a.tokens))
    active = a.state.stake_of(who, token).active
    amount = dice.choice((0, active + 1, active // 2, active, active // 3, 1))
    a.step(who, "Workers.unstake", (token, amount), lambda s: escrow.unstake(s, a.now, who, token, amount))


def withdraw_stake(a: Attacker, dice: Dice) -> None:
    who, token = dice.choice(ACTORS), dice.choice((a.tokens[0], *a.tokens))
    leaving = [k for k, s in a.state.stakes.items() if s.unbonding]
    if leaving and dice.randint(0, 2):
        who, token = dice.choice(leaving)
        if dice.randint(0, 3) == 0:
            a.maybe_wait(dice, a.state.stake_of(who, token).free_at)
    model = lambda s: escrow.withdraw_stake(s, a.now, who, token)  # noqa: E731
    a.step(who, "Workers.withdrawStake", (token,), model)


def set_exposure(a: Attacker, dice: Dice) -> None:
    who, token = dice.choice(ACTORS), dice.choice((a.tokens[0], *a.tokens))
    exposure = dice.choice((0, 100, 1000, 1000, 10**6))
    model = lambda s: escrow.set_exposure(s, who, token, exposure)  # noqa: E731
    a.step(who, "Workers.setExposure", (token, exposure), model)


def _slash(a: Attacker, dice: Dice) -> int:
    booked = [n for n, s in a.state.slashes.items() if s.state is SlashState.BOOKED]
    if booked and dice.randint(0, 4):
        slash_id = dice.choice(booked)
        a.maybe_wait(dice, a.state.slashes[slash_id].moves_at)
        return slash_id
    return dice.randint(0, len(a.state.slashes) + 1)


def move_slash(a: Attacker, dice: Dice) -> None:
    slash_id = _slash(a, dice)
    a.step(dice.choice(CROWD), "Workers.moveSlash", (slash_id,), lambda s: escrow.move_slash(s, a.now, slash_id))


def cancel_slash(a: Attacker, dice: Dice) -> None:
    slash_id, who = _slash(a, dice), dice.choice((GUARD, GUARD, a.world.admin, MALLORY, OWNER))
    model = lambda s: escrow.cancel_slash(s, a.now, who, slash_id)  # noqa: E731
    a.step(who, "Workers.cancelSlash", (slash_id,), model)
