"""What must hold after every accepted call, whatever the model says. Numbers are those of contracts/INVARIANTS.md.

Only three things are believed here: the numbers that the contracts show, our own clock and notes (`Judge.seen`), and who
really signed what (`Judge.voices`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node.testing.attacker import invariants_jobs, invariants_jury, invariants_stake
from node.testing.attacker.reads import Words
from node.testing.attacker.seen import LIVE, Seen, address, payout_of
from protocol.escrow import Module, SlashState
from protocol.ids import Address
from protocol.typed_data import Close

if TYPE_CHECKING:
    from node.testing.attacker.judge import Judge

ADMIN = frozenset({"Vault.setPaused", "Vault.setToken", "Vault.grantRole", "Vault.revokeRole"})


def check(judge: Judge, seen: Seen) -> None:
    """Raises `Disagreement` naming what is broken."""
    _ledger(judge)
    invariants_stake.note_earnings(judge, seen)
    invariants_stake.locks(judge)
    invariants_stake.verdict(judge, seen)
    kinds = {kind for kind, _ in seen.changed}
    if seen.call in ADMIN:
        judge.require(kinds <= {"paused", "locked stake"}, f"I14: {seen.call} changed more", str(sorted(kinds)))
    for (_, account), before, now in seen.of("balance"):
        judge.require(now[0] >= before[0] or account in seen.consent, f"I10: {seen.call} took money from a stranger")
    for kind, one in CHECKS.items():
        if kind in kinds:
            for key, before, now in seen.of(kind):
                one(judge, seen, key, before, now)


def _ledger(judge: Judge) -> None:
    """I1, per token and per module."""
    of, require = judge.numbers.of, judge.require
    free = dict.fromkeys(judge.tokens, 0)
    parts = {(module, token): 0 for module in Module for token in judge.tokens}
    for (token, _), words in of("balance").items():
        free[token] += words[0]
    for key, words in of("channel").items():
        parts[Module.CHANNELS, judge.configs[key].token] += words[0] - words[1]
    for (_, token), words in of("owed").items():
        parts[Module.CHANNELS, token] += words[0]
    for (_, token), words in of("stake").items():
        parts[Module.WORKERS, token] += words[0] + words[1]
    for words in of("slash").values():
        if words[6] == SlashState.BOOKED:
            parts[Module.WORKERS, address(words[1])] += words[2]
    for key, words in of("job").items():
        if words[0] in LIVE:
            parts[Module.JOBS, judge.quotes[key].token] += judge.quotes[key].amount
    for key, words in of("dispute").items():
        if words[0]:
            parts[Module.DISPUTES, judge.quotes[key].token] += words[0]
    for words in of("juror").values():
        parts[Module.COMMITTEE, judge.tokens[0]] += words[0] * judge.state.terms.seat_bond + words[1]
    locked, owes = of("locked"), of("liabilities")
    for name, amount in parts.items():
        lock = locked[name][0]
        require(lock == amount, f"I1: the lock of {name[0].name} is not the sum of its parts", f"{lock}, {amount}")
    for token in judge.tokens:
        all_locks = sum(locked[module, token][0] for module in Module)
        require(owes[token][0] == free[token] + all_locks, "I1: liabilities are not the sum of balances and locks")
        require(judge.coins(token) >= owes[token][0], "I1: the vault owes more than it has")


# ------------------------------------------------------------------------------------------------------------ channels


def _channel(judge: Judge, seen: Seen, key: bytes, before: Words, now: Words) -> None:
    require = judge.require
    allocated, claimed, withdraw_at, closed = now
    config = judge.configs[key]
    require(before[1] <= claimed <= allocated, "I2: claimed fell, or passed allocated")
    require(allocated >= before[0] or bool(closed and allocated == claimed), "I2: an open channel lost money")
    require(claimed <= judge.seen.get(("voucher", key), 0), "I4: claimed without the session key's voucher")
    require(not before[3], "I6: a closed channel changed")
    if withdraw_at and not before[2]:
        require(seen.sender in (config.payer, config.payer_authorizer), "I4: somebody else began a withdrawal")
        judge.seen["withdraw", key] = judge.now + config.withdraw_delay
        require(
            withdraw_at == judge.now + config.withdraw_delay, "I5: a withdrawal ends at another time than it should"
        )
    if seen.call == "Channels.finalizeWithdraw":
        require(judge.now >= judge.when("withdraw", key), "I5: a withdrawal ended before its delay")
    if seen.call == "Channels.close":
        closing = Close(key, seen.args[1]).digest(judge.world.domain)
        require(judge.voices.said(config.receiver_authorizer, closing), "I4: closed without the receiver")
    if seen.call in ("Channels.finalizeWithdraw", "Channels.close"):
        paid_now = claimed - before[1]
        rest = before[0] - claimed
        require(sum(seen.gains(config.token).values()) == paid_now + rest, "I6: paid and returned are not all of it")


def _owed(judge: Judge, seen: Seen, key: tuple[Address, Address], before: Words, now: Words) -> None:
    """What a receiver is owed is what its channels claimed, and goes to its payout address."""
    if seen.call == "Channels.settle":
        paid = {payout_of(judge, key[0]): before[0]}
        judge.require(now[0] == 0 and seen.gains(key[1]) == paid, "I4: earnings went to somebody else")
        return
    configs = ((judge.configs[channel], n[1] - b[1]) for channel, b, n in seen.of("channel"))
    claimed = sum(more for config, more in configs if (config.receiver, config.token) == key)
    judge.require(now[0] - before[0] == claimed, "I2: owed is not what was claimed")


# ---------------------------------------------------------------------------------------------------------- the others


def _attestation(judge: Judge, seen: Seen, key: Any, before: Words, now: Words) -> None:
    judge.require(seen.sender == key[0], "I4: somebody else attested")
    again = now[4] == before[4] + 1 and not now[3]
    taken_back = now[4] == before[4] and bool(now[3]) and not before[3]
    judge.require(again or taken_back, "I6: an attestation came back")


CHECKS = {
    "channel": _channel,
    "owed": _owed,
    "job": invariants_jobs.job,
    "dispute": invariants_jobs.dispute,
    "stake": invariants_stake.stake,
    "slash": invariants_stake.slash,
    "worker": invariants_stake.worker,
    "convicted": invariants_stake.convicted,
    "capability": invariants_stake.capability,
    "juror": invariants_jury.juror,
    "case": invariants_jury.case,
    "seat": invariants_jury.seat,
    "attestation": _attestation,
}
