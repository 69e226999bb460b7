"""Attacks on who may do what, and when: admins, intruders, attestations, time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node.testing.attacker.crowd import ANN, GUARD, MALLORY, OWNER, WORKER, Dice
from protocol import escrow
from protocol.escrow import JobState, SlashState
from protocol.escrow.workers import EARNINGS_WINDOW
from protocol.ids import ZERO_ADDRESS, Hash32, keccak256

if TYPE_CHECKING:
    from node.testing.attacker.attacker import Attacker

TOPICS = (Hash32(keccak256(b"region:eu")), Hash32(keccak256(b"soc2")))


def govern(a: Attacker, dice: Dice) -> None:
    """I14: nobody consents, so the invariants see that an admin's call moves nothing."""
    admin, yes = a.world.admin, dice.randint(0, 3) > 0
    kind = dice.randint(0, 3)
    if kind <= 1:
        a.step(admin, "Vault.setPaused", (not yes,), lambda s: escrow.set_paused(s, not yes))
    elif kind == 2:
        token = dice.choice(a.tokens)
        a.step(admin, "Vault.setToken", (token, yes), lambda s: escrow.set_token(s, token, yes))
    else:
        a.guard(yes)


def unpause(a: Attacker, dice: Dice) -> None:
    """A pause is soon over, because little happens in it."""
    a.step(a.world.admin, "Vault.setPaused", (False,), lambda s: escrow.set_paused(s, False))


def trespass(a: Attacker, dice: Dice) -> None:
    """What only modules, the admin or the deployer may do."""
    who, token = dice.choice((MALLORY, ANN, GUARD)), dice.choice(a.tokens)
    zero = bytes(32)
    attempts: tuple[tuple[str, tuple[Any, ...], str], ...] = (
        ("Vault.lock", (token, ANN, 1), "Vault_NotModule"),
        ("Vault.lockBond", (token, ANN, 1), "Vault_NotModule"),
        ("Vault.release", (token, MALLORY, dice.choice((0, 1))), "Vault_NotModule"),
        ("Vault.seal", ([MALLORY],), "Vault_NotDeployer"),
        ("Vault.setToken", (token, False), "AccessControlUnauthorizedAccount"),
        ("Vault.grantRole", (bytes(32), MALLORY), "AccessControlEnforcedDefaultAdminRules"),
        ("Vault.beginDefaultAdminTransfer", (MALLORY,), "AccessControlUnauthorizedAccount"),
        ("Workers.lockForEarnings", (WORKER, token, 10**6), "Workers_NotModule"),
        ("Workers.hold", (WORKER, token, 1), "Workers_NotModule"),
        ("Workers.letGo", (WORKER, token, 1), "Workers_NotModule"),
        ("Workers.bookSlash", (WORKER, token, 10**6, MALLORY, MALLORY, zero), "Workers_NotModule"),
        ("Workers.convict", (WORKER, zero), "Workers_NotModule"),
        ("Jobs.dispute", (a.any_quote(dice),), "Jobs_NotModule"),
        ("Jobs.resolve", (a.any_quote(dice), 1, True), "Jobs_NotModule"),
        ("Committee.begin", (zero, zero, zero, zero), "Committee_NotDisputes"),
    )
    call, args, refusal = dice.choice(attempts)
    a.intrude(who, call, args, (refusal,))


def attest(a: Attacker, dice: Dice) -> None:
    who, subject, topic = dice.choice((ANN, MALLORY)), dice.choice((WORKER, OWNER, ZERO_ADDRESS)), dice.choice(TOPICS)
    until = a.now + dice.choice((0, -1, 1, 900))
    model = lambda s: escrow.attest(s, a.now, who, subject, topic, topic, until)  # noqa: E731
    a.step(who, "Attestations.attest", (subject, topic, topic, until, "ipfs://"), model)
    _valid(a, who, subject, topic)


def revoke_attestation(a: Attacker, dice: Dice) -> None:
    who, subject, topic = dice.choice((ANN, MALLORY)), dice.choice((WORKER, OWNER)), dice.choice(TOPICS)
    model = lambda s: escrow.revoke_attestation(s, who, subject, topic)  # noqa: E731
    a.step(who, "Attestations.revoke", (subject, topic), model)
    _valid(a, who, subject, topic)


def _valid(a: Attacker, issuer: Any, subject: Any, topic: Hash32) -> None:
    shown = a.world.attestations.call("isValid", issuer, subject, topic)
    a.require(shown == escrow.is_valid(a.state, a.now, issuer, subject, topic), "an attestation's validity differs")


def edges(a: Attacker) -> list[int]:
    """The next moments at which something begins or ends to be possible."""
    s, now = a.state, a.now
    domain = a.world.jobs_domain
    times = [c.withdraw_at for c in s.channels.values() if not c.closed]
    times += [q.deadline for q in a.quotes.values() if s.job(q.job_id(domain)).state is JobState.OPEN]
    times += [j.window_end for j in s.jobs.values() if j.state is JobState.SUBMITTED]
    times += [d.resolve_by for d in s.disputes.values() if not d.ended]
    times += [f.moves_at for f in s.slashes.values() if f.state is SlashState.BOOKED]
    times += [k.free_at for k in s.stakes.values() if k.unbonding]
    times += [j.free_at for j in s.jurors.values() if j.leaving]
    times += [t for c in s.cases.values() for t in (c.commit_ends, c.reveal_ends)]
    times.append((now // EARNINGS_WINDOW + 1) * EARNINGS_WINDOW)
    return sorted({t for t in times if t > now})


def wait(a: Attacker, dice: Dice) -> None:
    """A little, or to just before, at or just after the next edges."""
    if dice.randint(0, 2) == 0:
        a.wait_until(a.now + dice.choice((1, 60, 600)))
    else:
        ahead = edges(a)[:4]
        a.wait_until(dice.choice((ahead[0], *ahead)) + dice.choice((-1, 0, 0, 1)))
