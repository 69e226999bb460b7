"""What must hold after every accepted call, whatever the model says. Numbers are those of contracts/INVARIANTS.md.

Only three things are believed here: the numbers that the contracts show, our own clock and notes (`Judge.seen`), and who
really signed what (`Judge.voices`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from node.testing.attacker.reads import Name, Words
from protocol.escrow import BURNT, JobState, Module, SeatState, SlashState
from protocol.escrow.workers import SLASH_DELAY, UNBONDING
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId
from protocol.typed_data import Acceptance, Order, Quote, Submission

if TYPE_CHECKING:
    from node.testing.attacker.judge import Judge

LIVE = (JobState.OPEN, JobState.SUBMITTED, JobState.DISPUTED)
JOB_MOVES = {
    (JobState.NONE, JobState.OPEN): {"Jobs.open"},
    (JobState.OPEN, JobState.SUBMITTED): {"Jobs.submit"},
    (JobState.OPEN, JobState.SETTLED): {"Jobs.settle"},
    (JobState.OPEN, JobState.REFUNDED): {"Jobs.refund", "Jobs.fail"},
    (JobState.SUBMITTED, JobState.SETTLED): {"Jobs.settle", "Jobs.finalize"},
    (JobState.SUBMITTED, JobState.REFUNDED): {"Jobs.fail"},
    (JobState.SUBMITTED, JobState.DISPUTED): {"Disputes.open"},
    (JobState.DISPUTED, JobState.SETTLED): {"Disputes.resolve"},
}
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
SEAT_MOVES = {
    (SeatState.NONE, SeatState.COMMITTED): {"Committee.commit"},
    (SeatState.COMMITTED, SeatState.ACCEPTED): {"Committee.reveal"},
    (SeatState.COMMITTED, SeatState.REJECTED): {"Committee.reveal"},
    (SeatState.COMMITTED, SeatState.FORFEITED): {"Committee.forfeit"},
    (SeatState.ACCEPTED, SeatState.PAID): {"Committee.claimFee"},
    (SeatState.REJECTED, SeatState.PAID): {"Committee.claimFee"},
}
NEAR: dict[Hash32, tuple[Hash32, ...]] = {
    Hash32(b"\7" * 32): (Hash32(b"\7" * 31 + b"\x08"),),
    Hash32(b"\7" * 31 + b"\x08"): (Hash32(b"\7" * 32),),
}
ADMIN = frozenset({"Vault.setPaused", "Vault.setToken", "Vault.grantRole", "Vault.revokeRole"})


@dataclass(frozen=True, slots=True)
class Seen:
    """One accepted call and what it changed."""

    sender: Address
    call: str
    changed: dict[Name, tuple[Words, Words]]
    consent: frozenset[Address]
    """Whose vault balance may fall."""

    def of(self, kind: str) -> Iterator[tuple[Any, Words, Words]]:
        for (name, key), (before, now) in self.changed.items():
            if name == kind:
                yield key, before, now

    def gains(self, token: Address) -> dict[Address, int]:
        """What every account got in this call, or lost."""
        return {k[1]: now[0] - before[0] for k, before, now in self.of("balance") if k[0] == token}


def check(judge: Judge, seen: Seen) -> None:
    """Raises `Disagreement` naming what is broken."""
    _ledger(judge)
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
            parts[Module.WORKERS, Address(words[1].to_bytes(20))] += words[2]
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
    if seen.call == "Channels.finalizeWithdraw":
        require(judge.now >= judge.when("withdraw", key), "I5: a withdrawal ended before its delay")
    if seen.call in ("Channels.finalizeWithdraw", "Channels.close"):
        paid_now = claimed - before[1]
        rest = before[0] - claimed
        require(sum(seen.gains(config.token).values()) == paid_now + rest, "I6: paid and returned are not all of it")


# ---------------------------------------------------------------------------------------------------------------- jobs


def _job(judge: Judge, seen: Seen, key: JobId, before: Words, now: Words) -> None:
    quote, require, voices, domain = judge.quotes[key], judge.require, judge.voices, judge.world.jobs_domain
    move = (JobState(before[0]), JobState(now[0]))
    require(seen.call in JOB_MOVES.get(move, ()), f"I6: {seen.call} moved a job {move[0].name} -> {move[1].name}")
    result = Hash32(now[3].to_bytes(32))
    require(move[1] in LIVE or now[1:3] == (0, 0), "I6: an ended job keeps a claim")
    if move[1] is JobState.OPEN:
        require(voices.said(quote.worker, quote.digest(domain)), "I4: opened without the worker")
        ordered = voices.said(quote.client, Order(key).digest(domain)) or seen.sender == quote.client
        require(ordered, "I4: opened without the client")
    elif move[1] is JobState.SUBMITTED:
        submission = Submission(key, result, now[2]).digest(domain)
        require(voices.said(quote.worker, submission) or seen.sender == quote.worker, "I4: submitted by a stranger")
        require(judge.now < quote.deadline and now[2] <= quote.amount, "I5: submitted too late, or too much claimed")
        judge.seen["window", key] = judge.now + quote.window
    elif move[1] is JobState.DISPUTED:
        require(seen.sender == quote.client, "I4: a dispute that is not the client's")
        require(judge.now < judge.when("window", key), "I5: disputed after the window")
        judge.seen["disputed", key] = judge.now
    else:
        _paid(judge, seen, key, quote, move, before, result)


def _paid(
    judge: Judge,
    seen: Seen,
    key: JobId,
    quote: Quote,
    move: tuple[JobState, JobState],
    before: Words,
    result: Hash32,
) -> None:
    """I5, I6: when it may end, and that all of the money goes where it must."""
    require, domain = judge.require, judge.world.jobs_domain
    gains = seen.gains(quote.token)
    bond = sum(was[0] - now[0] for _, was, now in seen.of("dispute"))
    payout = _payout(judge, quote.worker)
    require(sum(gains.values()) == quote.amount + bond, "I6: paid and returned are not all of the job")
    allowed = {quote.client, payout} | ({quote.resolver} if bond else set())
    require({a for a, gain in gains.items() if gain} <= allowed, "I6: a job paid somebody else")
    to_worker = gains.get(payout, 0) if payout != quote.client else None
    if seen.call == "Jobs.finalize":
        require(judge.now >= judge.when("window", key), "I5: finalized within the window")
        require(to_worker in (before[2], None), "I6: silence paid something else than was claimed")
    elif seen.call == "Jobs.refund":
        require(judge.now >= quote.deadline, "I5: refunded before the deadline")
        require(not to_worker, "I6: a refund paid the worker")
    elif seen.call == "Jobs.fail":
        owner = _owner(judge, quote.worker)
        require(seen.sender in (quote.worker, owner), "I4: failed by a stranger")
        require(not to_worker, "I6: a failure paid the worker")
    elif seen.call == "Jobs.settle" and to_worker is not None:
        accepted = any(
            judge.voices.said(quote.client, Acceptance(key, near, to_worker).digest(domain))
            for near in (result, *NEAR.get(result, ()))
        )
        require(accepted or seen.sender == quote.client, "I4: settled without the client")
        least = quote.amount if move[0] is JobState.OPEN else before[2]
        require(least <= to_worker <= quote.amount, "I6: settled below what was claimed")


def _dispute(judge: Judge, seen: Seen, key: JobId, before: Words, now: Words) -> None:
    require, quote = judge.require, judge.quotes[key]
    require(not before[2], "I6: an ended dispute changed")
    if now[2] and not before[2]:
        require(now[0] == 0, "I3: the bond stays locked after the end")
        late = judge.now >= judge.when("disputed", key) + 14 * 86400
        require(now[3] != 0 or late, "I5: ended as silence before its time")
        require(now[4] * 2 in (before[0], before[0] - 1) if now[3] else now[4] == 0, "I11: the fee is not half")
        payout = _payout(judge, quote.worker)
        if quote.resolver in judge.accounts and quote.resolver not in (quote.client, payout):
            gain = seen.gains(quote.token).get(quote.resolver, 0)
            require(gain == now[4], "I11: the resolver got something else than its fee")
        if payout not in (quote.client, quote.resolver):
            claimed = seen.changed["job", key][0][2]
            worker = {1: 0, 2: claimed + before[0] - now[4]}.get(now[3], claimed // 2)
            require(seen.gains(quote.token).get(payout, 0) == worker, "I11: the outcome paid a wrong part")


# --------------------------------------------------------------------------------------------------------------- stake


def _stake(judge: Judge, seen: Seen, key: tuple[Address, Address], before: Words, now: Words) -> None:
    require = judge.require
    owner, token = key
    total, was = now[0] + now[1], before[0] + before[1]
    booked = sum(
        n[2] for _, b, n in seen.of("slash") if b[6] == 0 and n[0] == int.from_bytes(owner) and n[1] == _word(token)
    )
    held = sum(q.penalty for q in _open_jobs(judge, owner, token))
    require(now[2] == held, "I8: what is held is not what open jobs hold", f"{now[2]}, {held}")
    if now[1] > before[1]:
        require(seen.call == "Workers.unstake" and seen.sender == owner, "I8: stake began to leave by another's hand")
        judge.seen["unstaked", key] = judge.now
    if booked:
        require(was - total == booked <= was // 2, "I7: a slash over the cap, or that is not what left the stake")
        require(now[0] == before[0] or now[1] == 0, "I7: active stake was slashed before what is leaving")
        require(now[3] == max(before[3] - booked, 0), "I7: a slash has not used up exposure")
    elif total < was:
        require(seen.call == "Workers.withdrawStake" and seen.sender == owner, f"I8: {seen.call} took stake away")
        require(judge.now >= judge.when("unstaked", key) + UNBONDING, "I8: stake left before its delay")
        require(now[0] == before[0], "I8: active stake left")
        earned = sum(n for at, n in judge.earned.get(key, ()) if judge.now < at + 7 * 86400)
        require(total >= min(was, held + earned), "I8: stake left that was held or locked by earnings")
    if not booked and now[3] != before[3]:
        require(seen.call == "Workers.setExposure" and seen.sender == owner, "I8: exposure by another's hand")


def _locked_stake(judge: Judge, seen: Seen, key: tuple[Address, Address], before: Words, now: Words) -> None:
    """Notes what payments lock, by our own clock: a lock lasts one window at least."""
    held_before = judge.seen.get(("held", key), 0)
    held = judge.numbers.values["stake", key][2]
    judge.seen["held", key] = held
    judge.note_earnings(key, (now[0] - held) - (before[0] - held_before))


def _slash(judge: Judge, seen: Seen, key: int, before: Words, now: Words) -> None:
    require = judge.require
    move = (SlashState(before[6]), SlashState(now[6]))
    require(seen.call in SLASH_MOVES.get(move, ()), f"I7: {seen.call} moved a slash {move[0].name} -> {move[1].name}")
    token, amount = Address(now[1].to_bytes(20)), now[2]
    if move[1] is SlashState.BOOKED:
        judge.seen["booked", key] = judge.now
        quotes = [judge.quotes[job] for job, _, _ in seen.of("job")]
        if quotes:
            honest = (
                seen.call == "Jobs.fail" and ("window", quotes[0].job_id(judge.world.jobs_domain)) not in judge.seen
            )
            require(amount <= quotes[0].penalty // (4 if honest else 1), "I7: a slash over the penalty")
            require(now[3] == _word(quotes[0].client), "I7: a slash for somebody else than the victim")
        return
    require(before[:6] == now[:6] and before[7] == now[7], "I6: a booked slash changed")
    if move[1] is SlashState.MOVED:
        require(judge.now >= judge.when("booked", key) + SLASH_DELAY, "I5: a slash moved before its delay")
        gains, wanted = seen.gains(token), {BURNT: amount}
        for who, part in ((now[3], amount // 2), (now[4], amount // 4)):
            if who:
                to = Address(who.to_bytes(20))
                wanted[to] = wanted.get(to, 0) + part
                wanted[BURNT] -= part
        require(gains == {who: part for who, part in wanted.items() if part}, "I7: a slash was shared out wrongly")
    else:
        require(judge.now < judge.when("booked", key) + SLASH_DELAY, "I5: a slash was cancelled too late")
        require(seen.sender in judge.guardians, "I7: a slash was cancelled by a stranger")
        require(not any(True for _ in seen.of("balance")), "I14: cancelling moved a balance")


# ----------------------------------------------------------------------------------------------------------- committee


def _juror(judge: Judge, seen: Seen, key: Address, before: Words, now: Words) -> None:
    require, bond = judge.require, judge.state.terms.seat_bond
    was, total = before[0] * bond + before[1], now[0] * bond + now[1]
    if now[1] > before[1]:
        judge.seen["left", key] = judge.now
    if seen.call == "Committee.withdrawBond":
        late = judge.now >= judge.when("left", key) + judge.state.terms.leave_delay
        require(seen.sender == key and late, "I8: a bond left before its delay")
    elif seen.call == "Committee.forfeit":
        require(0 <= was - total <= bond // 10, "I7: a forfeit took more than a tenth of a ticket")
        require(seen.gains(judge.tokens[0]) == ({BURNT: was - total} if was > total else {}), "I7: a forfeit paid out")
    else:
        require(total >= was and seen.sender == key, f"I10: {seen.call} took from a juror")


def _case(judge: Judge, seen: Seen, key: JobId, before: Words, now: Words) -> None:
    require = judge.require
    if before[0]:
        require(before[0] == now[0] and before[2:4] == now[2:4], "I6: a case changed its snapshot or its times")
        require(before[8] in (0, now[8]), "I6: a seed changed")
        require(before[9:] == now[9:], "I6: a case changed its subject")
        require(all(b <= n for b, n in zip(before[4:8], now[4:8], strict=True)), "I6: a count fell")
    else:
        require(seen.call == "Disputes.open", "I6: a case began without a dispute")


def _seat(judge: Judge, seen: Seen, key: tuple[JobId, Address, int], before: Words, now: Words) -> None:
    require = judge.require
    move = (SeatState(before[1]), SeatState(now[1]))
    require(seen.call in SEAT_MOVES.get(move, ()), f"I6: {seen.call} moved a seat {move[0].name} -> {move[1].name}")
    case = judge.numbers.values["case", key[0]]
    if move[1] is SeatState.COMMITTED:
        require(judge.now < case[2] and case[8] != 0, "I5: a seat was taken too late, or before the seed")
    elif seen.call == "Committee.reveal":
        require(case[2] <= judge.now < case[3], "I5: a vote was opened outside its window")
    elif seen.call == "Committee.forfeit":
        require(judge.now >= case[3], "I5: a ticket was forfeited while it could still speak")
    else:
        quote = judge.quotes[key[0]]
        dispute = judge.numbers.values["dispute", key[0]]
        voted = 1 if move[0] is SeatState.ACCEPTED else 2
        require(bool(dispute[2]) and dispute[3] in (voted, 3), "I3: a fee for the losing side, or before the end")
        fee, winners = dispute[4], {1: case[5], 2: case[6]}.get(dispute[3], case[5] + case[6])
        gain = seen.gains(quote.token)[seen.sender]
        require(fee // winners <= gain <= -(-fee // winners), "I11: a share of a fee is off by more than a unit")


# ---------------------------------------------------------------------------------------------------------- the others


def _worker(judge: Judge, seen: Seen, key: Address, before: Words, now: Words) -> None:
    require = judge.require
    require(before[0] in (0, now[0]), "I6: a key changed its owner")
    require(now[3] >= before[3], "I3: a consent can be used again")
    require(now[2] != 0, "I6: a registered key has no payout address")
    require(not (now[1] and judge.numbers.values["convicted", key][0]), "I6: a convicted key works")


def _convicted(judge: Judge, seen: Seen, key: Address, before: Words, now: Words) -> None:
    judge.require(bool(now[0]) and seen.call == "Disputes.proveEquivocation", "I6: a conviction came or went")


def _attestation(judge: Judge, seen: Seen, key: Any, before: Words, now: Words) -> None:
    judge.require(seen.sender == key[0], "I4: somebody else attested")
    again = now[4] == before[4] + 1 and not now[3]
    taken_back = now[4] == before[4] and bool(now[3]) and not before[3]
    judge.require(again or taken_back, "I6: an attestation came back")


CHECKS = {
    "channel": _channel,
    "job": _job,
    "dispute": _dispute,
    "stake": _stake,
    "locked stake": _locked_stake,
    "slash": _slash,
    "juror": _juror,
    "case": _case,
    "seat": _seat,
    "worker": _worker,
    "convicted": _convicted,
    "attestation": _attestation,
}


def _word(address: Address) -> int:
    return int.from_bytes(address)


def _owner(judge: Judge, worker: Address) -> Address:
    return Address(judge.numbers.values["worker", worker][0].to_bytes(20))


def _payout(judge: Judge, worker: Address) -> Address:
    known = judge.numbers.values.get(("worker", worker), (0, 0, 0, 0))
    return Address(known[2].to_bytes(20)) if known[2] else worker


def _open_jobs(judge: Judge, owner: Address, token: Address) -> Iterator[Quote]:
    for key, words in judge.numbers.of("job").items():
        quote = judge.quotes[key]
        if words[0] in LIVE and quote.token == token and _owner(judge, quote.worker) == owner != ZERO_ADDRESS:
            yield quote
