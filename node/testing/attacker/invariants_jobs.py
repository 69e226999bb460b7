"""What must hold of jobs and disputes: who may move one, when, and where all of its money goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.testing.attacker.reads import Words
from node.testing.attacker.seen import LIVE, Seen, owner_of, payout_of
from protocol.escrow import JobState, Outcome
from protocol.escrow.disputes import RESOLVE_WINDOW
from protocol.ids import ZERO_ADDRESS, Hash32, JobId
from protocol.typed_data import Acceptance, Order, Quote, Submission

if TYPE_CHECKING:
    from node.testing.attacker.judge import Judge

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
NEAR: dict[Hash32, tuple[Hash32, ...]] = {
    Hash32(b"\7" * 32): (Hash32(b"\7" * 31 + b"\x08"),),
    Hash32(b"\7" * 31 + b"\x08"): (Hash32(b"\7" * 32),),
}


def job(judge: Judge, seen: Seen, key: JobId, before: Words, now: Words) -> None:
    quote, require, voices, domain = judge.quotes[key], judge.require, judge.voices, judge.world.jobs_domain
    move = (JobState(before[0]), JobState(now[0]))
    require(seen.call in JOB_MOVES.get(move, ()), f"I6: {seen.call} moved a job {move[0].name} -> {move[1].name}")
    result = Hash32(now[3].to_bytes(32))
    require(move[1] in LIVE or now[1:3] == (0, 0), "I6: an ended job keeps a claim")
    if move[1] is JobState.OPEN:
        require(voices.said(quote.worker, quote.digest(domain)), "I4: opened without the worker")
        ordered = voices.said(quote.client, Order(key).digest(domain)) or seen.sender == quote.client
        require(ordered, "I4: opened without the client")
        parties = (quote.worker, owner_of(judge, quote.worker))
        require(not quote.penalty or seen.sender in parties, "I4: a stranger put a penalty at risk")
        require(judge.now < min(quote.valid_before, quote.deadline), "I5: opened too late")
        worker = judge.numbers.values.get(("worker", quote.worker), (0, 1))
        require(bool(worker[1]) or not worker[0], "I6: opened for a retired key")
    elif move[1] is JobState.SUBMITTED:
        submission = Submission(key, result, now[2]).digest(domain)
        require(voices.said(quote.worker, submission) or seen.sender == quote.worker, "I4: submitted by a stranger")
        require(judge.now < quote.deadline and now[2] <= quote.amount, "I5: submitted too late, or too much claimed")
        require(now[1] == judge.now + quote.window, "I5: the window is not the quote's")
        judge.seen["window", key] = judge.now + quote.window
    elif move[1] is JobState.DISPUTED:
        require(seen.sender == quote.client, "I4: a dispute that is not the client's")
        require(judge.now < judge.when("window", key), "I5: disputed after the window")
        require(now[1:] == before[1:], "I6: a dispute changed the claim")
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
    payout = payout_of(judge, quote.worker)
    require(sum(gains.values()) == quote.amount + bond, "I6: paid and returned are not all of the job")
    allowed = {quote.client, payout} | ({quote.resolver} if bond else set())
    require({a for a, gain in gains.items() if gain} <= allowed, "I6: a job paid somebody else")
    if move[1] is JobState.REFUNDED or move[0] is not JobState.OPEN:
        kept = bytes(32) if move[1] is JobState.REFUNDED else before[3].to_bytes(32)
        require(result == kept, "I6: the end changed the result")
    to_worker = gains.get(payout, 0) if payout != quote.client else None
    if seen.call == "Jobs.finalize":
        require(judge.now >= judge.when("window", key), "I5: finalized within the window")
        require(to_worker in (before[2], None), "I6: silence paid something else than was claimed")
    elif seen.call == "Jobs.refund":
        require(judge.now >= quote.deadline, "I5: refunded before the deadline")
        require(not to_worker, "I6: a refund paid the worker")
    elif seen.call == "Jobs.fail":
        owner = owner_of(judge, quote.worker)
        require(seen.sender in (quote.worker, owner), "I4: failed by a stranger")
        require(move[0] is not JobState.OPEN or judge.now < quote.deadline, "I5: failed after the deadline")
        require(not to_worker, "I6: a failure paid the worker")
    elif seen.call == "Jobs.settle" and to_worker is not None:
        accepted = any(
            judge.voices.said(quote.client, Acceptance(key, near, to_worker).digest(domain))
            for near in (result, *NEAR.get(result, ()))
        )
        require(accepted or seen.sender == quote.client, "I4: settled without the client")
        least = quote.amount if move[0] is JobState.OPEN else before[2]
        require(least <= to_worker <= quote.amount, "I6: settled below what was claimed")


def penalty_of(judge: Judge, seen: Seen) -> tuple[Quote | None, int]:
    """(the job that this call ended, what it must cost the worker as far as there is stake)"""
    for key, before, now in seen.of("job"):
        quote = judge.quotes[key]
        if now[0] == JobState.REFUNDED:
            honest = seen.call == "Jobs.fail" and before[0] == JobState.OPEN
            return quote, quote.penalty // (4 if honest else 1)
        if now[0] == JobState.SETTLED:
            lost = judge.numbers.values["dispute", key][3] == Outcome.ACCEPT
            return quote, quote.penalty if lost else 0
    return None, 0


def dispute(judge: Judge, seen: Seen, key: JobId, before: Words, now: Words) -> None:
    require, quote = judge.require, judge.quotes[key]
    require(not before[2], "I6: an ended dispute changed")
    if not before[1]:
        require(seen.call == "Disputes.open" and quote.resolver != ZERO_ADDRESS, "I4: a dispute without a judge")
        require(now[0] == max(-(-quote.amount // 10), 1), "I11: the bond is not a tenth")
        require(now[1:] == (judge.now + RESOLVE_WINDOW, 0, 0, 0), "I5: the resolver has another time than it should")
        return
    require(bool(now[2]) and now[1] == before[1], "I6: a dispute changed while it was open")
    require(now[0] == 0, "I3: the bond stays locked after the end")
    late = judge.now >= judge.when("disputed", key) + RESOLVE_WINDOW
    require(now[3] != 0 or late, "I5: ended as silence before its time")
    require(now[4] * 2 in (before[0], before[0] - 1) if now[3] else now[4] == 0, "I11: the fee is not half")
    payout = payout_of(judge, quote.worker)
    if quote.resolver in judge.accounts and quote.resolver not in (quote.client, payout):
        gain = seen.gains(quote.token).get(quote.resolver, 0)
        require(gain == now[4], "I11: the resolver got something else than its fee")
    if payout not in (quote.client, quote.resolver):
        claimed = seen.changed["job", key][0][2]
        worker = {1: 0, 2: claimed + before[0] - now[4]}.get(now[3], claimed // 2)
        require(seen.gains(quote.token).get(payout, 0) == worker, "I11: the outcome paid a wrong part")
    if quote.resolver == judge.world.committee.address:
        require(now[3] == _found(judge, key), "I3: an outcome that the seats did not vote for")


def _found(judge: Judge, key: JobId) -> Outcome:
    """What the revealed seats say now."""
    case = judge.numbers.values.get(("case", key), (0,) * 12)
    commits, accepts, rejects = case[4:7]
    waits = judge.now < case[2] or (judge.now < case[3] and accepts + rejects < commits)
    if waits or accepts + rejects < judge.state.terms.quorum:
        return Outcome.NONE
    if accepts == rejects:
        return Outcome.DRAW
    return Outcome.ACCEPT if accepts > rejects else Outcome.REJECT
