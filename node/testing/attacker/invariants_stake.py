"""What must hold of keys, stake and slashes.

What payments lock is counted here a second time, by our own clock and from the money that moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.testing.attacker.invariants_jobs import penalty_of
from node.testing.attacker.reads import Words
from node.testing.attacker.seen import Seen, address, open_jobs, owner_of, payout_of, word
from protocol.escrow import BURNT, SlashState
from protocol.escrow.workers import EARNINGS_WINDOW, SLASH_DELAY, UNBONDING
from protocol.ids import Address
from protocol.typed_data import HotKey

if TYPE_CHECKING:
    from node.testing.attacker.judge import Judge

SLASH_MOVES = {
    (SlashState.NONE, SlashState.BOOKED): {
        "Jobs.refund",
        "Jobs.fail",
        "Disputes.resolve",
        "Disputes.proveEquivocation",
    },
    (SlashState.BOOKED, SlashState.MOVED): {"Workers.moveSlash"},
    (SlashState.BOOKED, SlashState.CANCELLED): {"Workers.cancelSlash"},
}
ACTIVE_KEYS = {
    "Workers.register": 1,
    "Workers.rotate": 0,
    "Workers.setPayout": 0,
    "Workers.revoke": -1,
}
"""How many more keys work after each call of an owner."""
CONSENTS = {"Workers.register": 0, "Workers.rotate": 1}
"""Which argument is the key that must have consented."""
Owned = tuple[Address, Address]


# --------------------------------------------------------------------------------------------------------------- stake


def note_earnings(judge: Judge, seen: Seen) -> None:
    """A payment locks half of itself, as far as there is stake that no payment locks."""
    paid: list[tuple[Address, Address, int]] = []
    if seen.call == "Channels.settle":
        paid = [(*key, before[0] - now[0]) for key, before, now in seen.of("owed")]
    elif seen.call == "Channels.close":
        for key, before, now in seen.of("channel"):
            config = judge.configs[key]
            paid.append((config.receiver, config.token, now[1] - before[1]))
    for receiver, token, amount in paid:
        key = (owner_of(judge, receiver), token)
        stake = judge.numbers.values.get(("stake", key), (0, 0))
        free = max(stake[0] + stake[1] - earned(judge, key), 0)
        if (locks := min(amount // 2, free)) > 0:
            judge.earned.setdefault(key, []).append((judge.now, locks))


def earned(judge: Judge, key: Owned) -> int:
    """What payments of this window and of the one before lock."""
    this = judge.now // EARNINGS_WINDOW
    judge.earned[key] = left = [(at, n) for at, n in judge.earned.get(key, ()) if this - at // EARNINGS_WINDOW <= 1]
    return sum(n for _, n in left)


def locks(judge: Judge) -> None:
    """After every call: what is held and locked is what open jobs and payments hold and lock."""
    for key, words in judge.numbers.of("stake").items():
        held = sum(quote.penalty for quote in open_jobs(judge, *key))
        judge.require(words[2] == held, "I8: what is held is not what open jobs hold", f"{words[2]}, {held}")
        locked, known = judge.numbers.values["locked stake", key][0], held + earned(judge, key)
        judge.require(locked == known, "I8: what is locked is not what jobs and payments lock", f"{locked}, {known}")


def stake(judge: Judge, seen: Seen, key: Owned, before: Words, now: Words) -> None:
    require = judge.require
    owner, token = key
    total, was = now[0] + now[1], before[0] + before[1]
    booked = [n[2] for _, b, n in seen.of("slash") if b[6] == 0 and n[:2] == (word(owner), word(token))]
    if now[1] > before[1]:
        require(seen.call == "Workers.unstake" and seen.sender == owner, "I8: stake began to leave by another's hand")
        require(total == was and now[4] == judge.now + UNBONDING, "I8: stake leaves at another time than it should")
        judge.seen["unstaked", key] = judge.now
    if now[2] > before[2]:
        require(seen.call == "Jobs.open", f"I8: {seen.call} holds stake")
        require(now[2] <= now[3], "I8: more is held than the owner exposed")
        require(now[2] + earned(judge, key) <= total, "I8: what was locked is held as well")
    if booked:
        require(was - total == sum(booked) <= was // 2, "I7: a slash over the cap, or that is not what left the stake")
        require(now[0] == before[0] or now[1] == 0, "I7: active stake was slashed before what is leaving")
        require(now[3] == max(before[3] - sum(booked), 0), "I7: a slash has not used up exposure")
    elif total < was:
        require(seen.call == "Workers.withdrawStake" and seen.sender == owner, f"I8: {seen.call} took stake away")
        require(judge.now >= judge.when("unstaked", key) + UNBONDING, "I8: stake left before its delay")
        require(now[0] == before[0], "I8: active stake left")
        locked = now[2] + earned(judge, key)
        require(total == max(was - before[1], min(was, locked)), "I8: what left is not what was free")
    elif total > was:
        require(seen.call in ("Workers.stake", "Workers.cancelSlash"), f"I1: {seen.call} made stake")
    if not booked and now[3] != before[3]:
        require(seen.call == "Workers.setExposure" and seen.sender == owner, "I8: exposure by another's hand")


# ------------------------------------------------------------------------------------------------------------- slashes


def slash(judge: Judge, seen: Seen, key: int, before: Words, now: Words) -> None:
    require = judge.require
    move = (SlashState(before[6]), SlashState(now[6]))
    require(seen.call in SLASH_MOVES.get(move, ()), f"I7: {seen.call} moved a slash {move[0].name} -> {move[1].name}")
    token, amount = address(now[1]), now[2]
    if move[1] is SlashState.BOOKED:
        judge.seen["booked", key] = judge.now
        require(now[5] == judge.now + SLASH_DELAY, "I5: a slash moves at another time than it should")
        quote, _ = penalty_of(judge, seen)
        if quote is not None:
            reporter = {"Jobs.refund": seen.sender, "Disputes.resolve": quote.client}.get(seen.call, Address(bytes(20)))
            require(now[3] == word(quote.client), "I7: a slash for somebody else than the victim")
            require(now[4] == word(reporter), "I7: a slash reported by somebody else")
        return
    require(before[:6] == now[:6] and before[7] == now[7], "I6: a booked slash changed")
    if move[1] is SlashState.MOVED:
        require(judge.now >= judge.when("booked", key) + SLASH_DELAY, "I5: a slash moved before its delay")
        gains, wanted = seen.gains(token), {BURNT: amount}
        for who, part in ((now[3], amount // 2), (now[4], amount // 4)):
            if who:
                wanted[address(who)] = wanted.get(address(who), 0) + part
                wanted[BURNT] -= part
        require(gains == {who: part for who, part in wanted.items() if part}, "I7: a slash was shared out wrongly")
    else:
        require(judge.now < judge.when("booked", key) + SLASH_DELAY, "I5: a slash was cancelled too late")
        require(seen.sender in judge.guardians, "I7: a slash was cancelled by a stranger")
        require(not any(True for _ in seen.of("balance")), "I14: cancelling moved a balance")


def verdict(judge: Judge, seen: Seen) -> None:
    """While the key answers, what a job's end or a conviction costs is booked whole, up to half of the stake, in one slash."""
    quote, asked = penalty_of(judge, seen)
    if quote is not None:
        hot, token = quote.worker, quote.token
    elif seen.call == "Disputes.proveEquivocation":
        (_, _, hot, _, token, *_), asked = seen.args[0], 2**128 - 1
        judge.require(("proven", (hot, token)) not in judge.seen, "I3: a key was convicted twice in one token")
        judge.seen["proven", (hot, token)] = judge.now
    else:
        return
    key = owner_of(judge, hot), token
    if judge.now > judge.when("retired", hot) + UNBONDING:
        asked = 0
    words = judge.numbers.values.get(("stake", key), (0, 0))
    was = seen.changed.get(("stake", key), (words, words))[0]
    booked = [now[2] for _, before, now in seen.of("slash")]
    wanted = min(asked, (was[0] + was[1]) // 2)
    judge.require(booked == ([wanted] if wanted else []), "I7: a slash is not what it must be", f"{booked}, {wanted}")


# ---------------------------------------------------------------------------------------------------------------- keys


def worker(judge: Judge, seen: Seen, key: Address, before: Words, now: Words) -> None:
    require = judge.require
    require(before[0] in (0, now[0]), "I6: a key changed its owner")
    require(now[2] != 0, "I6: a registered key has no payout address")
    require(not (now[1] and judge.numbers.values["convicted", key][0]), "I6: a convicted key works")
    if before[1] and not now[1] and seen.call in ACTIVE_KEYS:
        judge.seen["retired", key] = judge.now
    elif now[1]:
        judge.seen.pop(("retired", key), None)
    if seen.call == "Disputes.proveEquivocation":
        require(now == (before[0], 0, *before[2:]), "I6: a conviction changed more than whether the key works")
        return
    require(seen.call in ACTIVE_KEYS and seen.sender == address(now[0]), f"I4: {seen.call} changed a stranger's key")
    more = sum(n[1] - b[1] for _, b, n in seen.of("worker"))
    require(more == ACTIVE_KEYS[seen.call], f"I6: {seen.call} left another number of keys at work")
    consented = seen.call in CONSENTS and key == seen.args[CONSENTS[seen.call]]
    require(now[3] == before[3] + consented, "I3: a consent can be used again, or was used up by nothing")
    if consented:
        domain = judge.world.workers_domain
        payout = seen.args[1] if seen.call == "Workers.register" else payout_of(judge, seen.args[0])
        consent = HotKey(seen.sender, key, payout, before[3], seen.args[2]).digest(domain)
        require(judge.voices.said(key, consent) and address(now[2]) == payout, "I4: a key without its consent")
        require(judge.now < seen.args[2], "I5: a consent after its time")
    else:
        wanted = word(seen.args[1]) if seen.call == "Workers.setPayout" else before[2]
        require(now[2] == wanted, "I4: earnings go somewhere else than the owner said")


def convicted(judge: Judge, seen: Seen, key: Address, before: Words, now: Words) -> None:
    judge.require(bool(now[0]) and seen.call == "Disputes.proveEquivocation", "I6: a conviction came or went")
    judge.require(key == seen.args[0][2], "I4: somebody else was convicted")


def capability(judge: Judge, seen: Seen, key: Address, before: Words, now: Words) -> None:
    judge.require(seen.sender in (key, owner_of(judge, key)), "I4: somebody else announced")
    judge.require(now[1] > before[1], "I3: an announcement went back")
    judge.require(not judge.numbers.values["convicted", key][0], "I6: a convicted key announced")
