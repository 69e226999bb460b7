"""Each way through a job, a stake, a dispute and a case, on the executable model alone.

That the compiled contracts do the same is `tests/contracts/test_contracts_differential.py`'s. Numbers such as I12 are of
contracts/INVARIANTS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from protocol import escrow
from protocol.escrow import BURNT, CommitteeTerms, Escrow, EscrowError, JobState, Module, Outcome
from protocol.escrow.workers import EARNINGS_WINDOW, SLASH_DELAY, UNBONDING, lock_for_earnings
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId, keccak256
from protocol.typed_data import ChannelConfig, Domain, Quote, Receipt


def account(name: str) -> Address:
    return Address(keccak256(name.encode())[12:])


ANN, WORKER, OWNER, PAYOUT, BOB, GUARDIAN, TOKEN, COMMITTEE = map(
    account, ("ann", "worker", "owner", "payout", "bob", "guardian", "token", "committee")
)
JURORS = tuple(account(f"juror {n}") for n in range(4))
NOW = 1_800_000_000
RESULT = Hash32(b"\7" * 32)
ZERO = Hash32(bytes(32))
TERMS = CommitteeTerms(COMMITTEE, TOKEN, 100, 1000, 2, 3600, 3600, 20 * 86400)
QUOTE = Quote(ZERO, ANN, WORKER, TOKEN, 1000, 400, NOW + 60, NOW + 600, 900, COMMITTEE, ZERO)


def fresh() -> Escrow:
    """Ann, the owner and the jurors have 10,000; the worker's owner has staked 2,000 and allows it all to be held."""
    state = Escrow(
        Domain(1, account("channels")),
        account("vault"),
        frozenset({TOKEN}),
        guardians=frozenset({GUARDIAN}),
        jobs_domain=Domain(1, account("jobs")),
        terms=TERMS,
    )
    for who in (ANN, OWNER, *JURORS):
        state = escrow.deposit(state, TOKEN, 10_000, who)
    state = escrow.register(state, NOW, OWNER, WORKER, PAYOUT, NOW + 1, WORKER)
    state = escrow.stake(state, OWNER, TOKEN, 2_000)
    return escrow.set_exposure(state, OWNER, TOKEN, 2_000)


def opened(quote: Quote = QUOTE) -> Escrow:
    return escrow.open_job(fresh(), NOW, WORKER, quote, WORKER, ANN)


def submitted(claimed: int = 900) -> Escrow:
    return escrow.submit(opened(), NOW + 10, BOB, QUOTE, RESULT, claimed, WORKER)


def job_of(state: Escrow) -> JobId:
    return QUOTE.job_id(state.jobs_domain)


def refused(name: str, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(EscrowError) as caught:
        call(*args)
    assert caught.value.name == name


def whole(state: Escrow) -> None:
    """I1: nothing came from nowhere and nothing is lost."""
    assert state.liabilities(TOKEN) == 60_000
    stakes = sum(s.total for s in state.stakes.values())
    booked = sum(s.amount for s in state.slashes.values() if s.state is escrow.SlashState.BOOKED)
    assert state.locked_by(Module.WORKERS, TOKEN) == stakes + booked
    assert all(v >= 0 for v in (*state.balances.values(), *state.locked.values()))


def test_silence_after_the_submission_pays_the_worker() -> None:
    state = submitted()
    assert state.stake_of(OWNER, TOKEN).held == 400
    refused("Jobs_TooEarly", escrow.finalize, state, NOW + 909, QUOTE)
    state = escrow.finalize(state, NOW + 910, QUOTE)
    assert (state.balance_of(TOKEN, PAYOUT), state.balance_of(TOKEN, ANN)) == (900, 9_100)
    assert state.stake_of(OWNER, TOKEN).held == 0
    assert state.job(job_of(state)).state is JobState.SETTLED
    assert escrow.locked_stake(state, NOW + 910, OWNER, TOKEN) == 0  # its penalty answered for it until here
    refused("Jobs_WrongState", escrow.finalize, state, NOW + 910, QUOTE)  # I6
    whole(state)


def test_half_of_what_a_channel_paid_answers_for_one_to_two_windows() -> None:
    state = lock_for_earnings(submitted(), NOW + 910, WORKER, TOKEN, 900)
    assert escrow.locked_stake(state, NOW + 910, OWNER, TOKEN) == 400 + 450
    later = (NOW // EARNINGS_WINDOW + 2) * EARNINGS_WINDOW
    assert escrow.locked_stake(state, later - 1, OWNER, TOKEN) == 400 + 450
    assert escrow.locked_stake(state, later, OWNER, TOKEN) == 400


def test_silence_before_the_submission_refunds_the_client_and_slashes() -> None:
    state = opened()
    refused("Jobs_TooEarly", escrow.refund, state, NOW + 599, BOB, QUOTE)
    refused("Jobs_TooLate", escrow.submit, state, NOW + 600, BOB, QUOTE, RESULT, 900, WORKER)
    state = escrow.refund(state, NOW + 600, BOB, QUOTE)
    assert state.balance_of(TOKEN, ANN) == 10_000
    assert state.stake_of(OWNER, TOKEN).active == 1_600
    refused("Workers_TooEarly", escrow.move_slash, state, NOW + 600 + SLASH_DELAY - 1, 1)
    refused("Workers_NotGuardian", escrow.cancel_slash, state, NOW, OWNER, 1)
    moved = escrow.move_slash(state, NOW + 600 + SLASH_DELAY, 1)
    assert [moved.balance_of(TOKEN, who) for who in (ANN, BOB, BURNT)] == [10_200, 100, 100]
    refused("Workers_NotBooked", escrow.move_slash, moved, NOW + 600 + SLASH_DELAY, 1)  # I3
    whole(moved)
    refused("Workers_TooLate", escrow.cancel_slash, state, NOW + 600 + SLASH_DELAY, GUARDIAN, 1)
    spared = escrow.cancel_slash(state, NOW + 600, GUARDIAN, 1)
    assert spared.stake_of(OWNER, TOKEN).active == 2_000
    refused("Workers_NotBooked", escrow.move_slash, spared, NOW + 600 + SLASH_DELAY, 1)
    whole(spared)


def test_an_honest_failure_costs_a_quarter_and_a_submission_taken_back_all() -> None:
    refused("Jobs_TooLate", escrow.fail, opened(), NOW + 600, WORKER, QUOTE)
    for state, price in ((opened(), 100), (submitted(), 400)):
        refused("Jobs_NotWorker", escrow.fail, state, NOW, BOB, QUOTE)
        for who in (WORKER, OWNER):
            failed = escrow.fail(state, NOW + 20, who, QUOTE)
            assert failed.balance_of(TOKEN, ANN) == 10_000
            assert failed.slashes[1].amount == price
            whole(failed)


def test_the_client_can_accept_at_once() -> None:
    refused("Jobs_BelowClaimed", escrow.settle_job, opened(), NOW, BOB, QUOTE, RESULT, 999, ANN)
    assert escrow.settle_job(opened(), NOW, BOB, QUOTE, RESULT, 1000, ANN).balance_of(TOKEN, PAYOUT) == 1000
    state = submitted()
    refused("Jobs_BelowClaimed", escrow.settle_job, state, NOW, BOB, QUOTE, RESULT, 899, ANN)
    refused("Jobs_OverAmount", escrow.settle_job, state, NOW, BOB, QUOTE, RESULT, 1001, ANN)
    refused("Jobs_WrongResult", escrow.settle_job, state, NOW, BOB, QUOTE, ZERO, 950, ANN)
    refused("Jobs_BadSignature", escrow.settle_job, state, NOW, BOB, QUOTE, RESULT, 950, WORKER)
    settled = escrow.settle_job(state, NOW, ANN, QUOTE, RESULT, 950, None)
    assert (settled.balance_of(TOKEN, PAYOUT), settled.balance_of(TOKEN, ANN)) == (950, 9_050)
    whole(settled)


def test_what_can_not_be_opened() -> None:
    state = fresh()
    for change, name in (
        ({"worker": ZERO_ADDRESS}, "Jobs_ZeroAddress"),
        ({"amount": 0}, "Jobs_ZeroAmount"),
        ({"valid_before": NOW}, "Jobs_Expired"),
        ({"deadline": NOW}, "Jobs_DeadlineOutOfRange"),
        ({"window": 899}, "Jobs_WindowOutOfRange"),
        ({"penalty": 2_001}, "Workers_OverExposure"),
        ({"amount": 10_001}, "Vault_Insufficient"),
    ):
        refused(name, escrow.open_job, state, NOW, WORKER, replace(QUOTE, **change), WORKER, ANN)
    refused("Jobs_WrongState", escrow.open_job, opened(), NOW, WORKER, QUOTE, WORKER, ANN)  # I3
    refused("Jobs_BadSignature", escrow.open_job, state, NOW, WORKER, QUOTE, ANN, ANN)
    for stranger in (BOB, ANN):  # the client too: what answers with a stake is the worker's to open
        refused("Jobs_NotWorker", escrow.open_job, state, NOW, stranger, QUOTE, WORKER, ANN)
    assert escrow.open_job(state, NOW, BOB, replace(QUOTE, penalty=0), WORKER, ANN)
    refused("Vault_Paused", escrow.open_job, escrow.set_paused(state, True), NOW, WORKER, QUOTE, WORKER, ANN)
    retired = escrow.revoke(state, NOW, OWNER, WORKER)
    refused("Jobs_WorkerRetired", escrow.open_job, retired, NOW, WORKER, QUOTE, WORKER, ANN)


def test_stake_leaves_after_its_delay_and_not_while_it_is_held() -> None:
    """I8"""
    state = escrow.unstake(opened(), NOW, OWNER, TOKEN, 2_000)
    refused("Workers_TooEarly", escrow.withdraw_stake, state, NOW + UNBONDING - 1, OWNER, TOKEN)
    state = escrow.withdraw_stake(state, NOW + UNBONDING, OWNER, TOKEN)
    assert state.balance_of(TOKEN, OWNER) == 9_600
    refused("Workers_NothingFree", escrow.withdraw_stake, state, NOW + UNBONDING, OWNER, TOKEN)
    state = escrow.refund(state, NOW + UNBONDING, BOB, QUOTE)  # on its way out, it is slashed all the same, by the cap
    assert state.slashes[1].amount == 200
    assert state.stake_of(OWNER, TOKEN).unbonding == 200
    whole(escrow.withdraw_stake(state, NOW + UNBONDING, OWNER, TOKEN))


def test_two_receipts_with_one_number_convict_once() -> None:
    state = fresh()
    config = ChannelConfig(ANN, ANN, WORKER, WORKER, TOKEN, 900, ZERO)
    channel = config.channel_id(state.domain)
    first = Receipt(JobId(ZERO), 0, channel, 1, ZERO, ZERO, ZERO, ZERO, 1, 1, 5, ZERO, 1, 2, 0)  # type: ignore[arg-type]
    second = replace(first, cost=6)
    prove = escrow.prove_equivocation
    refused("Disputes_NoEquivocation", prove, state, NOW, BOB, config, first, WORKER, first, WORKER)
    other = replace(second, sequence=2)
    refused("Disputes_NoEquivocation", prove, state, NOW, BOB, config, first, WORKER, other, WORKER)
    refused("Disputes_BadSignature", prove, state, NOW, BOB, config, first, WORKER, second, ANN)
    state = prove(state, NOW, BOB, config, first, WORKER, second, WORKER)
    assert (state.slashes[1].amount, state.slashes[1].victim, state.slashes[1].reporter) == (1_000, ANN, BOB)
    refused("Disputes_ConvictedBefore", prove, state, NOW, BOB, config, second, WORKER, first, WORKER)
    refused("Workers_Convicted", escrow.register, state, NOW, OWNER, WORKER, PAYOUT, NOW + 1, WORKER)
    whole(state)


def tried(votes: str, *, silent: int = 0) -> tuple[Escrow, int]:
    """A dispute with one juror per letter, A for accept and R for reject, and some who never reveal. (state, time)"""
    state = submitted()
    for juror in JURORS[: len(votes) + silent]:
        state = escrow.enroll(state, 5, juror, 1)
    state = escrow.open_dispute(state, NOW + 20, 6, ANN, QUOTE, ZERO)
    job = job_of(state)
    refused("Committee_TooEarly", escrow.seal, state, NOW + 30, 134, job, True, ZERO)
    state = escrow.seal(state, NOW + 30, 135, job, True, ZERO)
    outcomes = [Outcome.ACCEPT if v == "A" else Outcome.REJECT for v in votes] + [Outcome.ACCEPT] * silent
    for juror, vote in zip(JURORS, outcomes, strict=False):
        commitment = escrow.commitment_of(job, juror, 0, vote, RESULT, ZERO)
        state = escrow.commit(state, NOW + 40, juror, job, 0, commitment)
    for juror, vote in zip(JURORS[: len(votes)], outcomes, strict=False):
        refused("Committee_BadReveal", escrow.reveal, state, NOW + 3620, juror, job, 0, vote, ZERO, ZERO)
        state = escrow.reveal(state, NOW + 3620, juror, job, 0, vote, RESULT, ZERO)
    return state, NOW + 20 + 7200


@pytest.mark.parametrize(
    ("votes", "worker", "bond_back", "fee", "slashed"),
    [
        ("AAR", 0, 50, 50, 400),
        ("RRA", 900, 0, 50, 0),
        ("AR", 450, 50, 50, 0),
        ("A", 450, 100, 0, 0),
        ("", 450, 100, 0, 0),
    ],
)
def test_a_dispute_ends_as_the_committee_says(votes: str, worker: int, bond_back: int, fee: int, slashed: int) -> None:
    state, now = tried(votes)
    said = escrow.resolver_says(state, now, QUOTE)
    if said is Outcome.NONE:
        refused("Disputes_Undecided", escrow.resolve_dispute, state, now, QUOTE, said)
        now = NOW + 20 + 14 * 86400
    state = escrow.resolve_dispute(state, now, QUOTE, said)
    to_worker = worker + (50 if said is Outcome.REJECT else 0)
    assert state.balance_of(TOKEN, PAYOUT) == to_worker
    assert state.balance_of(TOKEN, ANN) == 10_000 - 100 - worker + bond_back
    assert state.balance_of(TOKEN, COMMITTEE) == fee
    assert sum(s.amount for s in state.slashes.values()) == slashed
    refused("Disputes_Ended", escrow.resolve_dispute, state, now, QUOTE, said)
    for juror, vote in zip(JURORS, votes, strict=False):
        won = said is Outcome.DRAW or (fee and vote == ("A" if said is Outcome.ACCEPT else "R"))
        if won:
            state = escrow.claim_fee(state, juror, QUOTE, 0)
        refused("Committee_NoFee", escrow.claim_fee, state, juror, QUOTE, 0)
    assert state.balance_of(TOKEN, COMMITTEE) == 0
    assert state.locked_by(Module.JOBS, TOKEN) == state.locked_by(Module.DISPUTES, TOKEN) == 0  # I12
    whole(state)


def test_a_seat_that_stays_silent_loses_its_ticket() -> None:
    state, now = tried("AA", silent=1)
    job = job_of(state)
    refused("Committee_TooEarly", escrow.forfeit, state, now - 1, 500, job, JURORS[2], 0)
    refused("Committee_NothingToForfeit", escrow.forfeit, state, now, 500, job, JURORS[0], 0)
    state = escrow.forfeit(state, now, 500, job, JURORS[2], 0)
    assert (state.juror(JURORS[2]).tickets, state.juror(JURORS[2]).leaving) == (0, 90)
    refused("Committee_NothingToForfeit", escrow.forfeit, state, now, 500, job, JURORS[2], 0)
    refused("Committee_TooEarly", escrow.withdraw_bond, state, now, JURORS[2])
    state = escrow.withdraw_bond(state, now + TERMS.leave_delay, JURORS[2])
    assert (state.balance_of(TOKEN, JURORS[2]), state.balance_of(TOKEN, BURNT)) == (9_990, 10)


def test_tickets_bought_after_the_case_began_have_no_seat() -> None:
    state = escrow.enroll(submitted(), 5, JURORS[0], 2)
    state = escrow.open_dispute(state, NOW + 20, 6, ANN, QUOTE, ZERO)
    state = escrow.enroll(state, 7, JURORS[1], 5)
    job = job_of(state)
    state = escrow.seal(state, NOW + 30, 135, job, True, ZERO)
    assert [escrow.has_seat(state, job, JURORS[0], n) for n in range(3)] == [True, True, False]
    assert not escrow.has_seat(state, job, JURORS[1], 0)
    refused("Committee_NoSuchTicket", escrow.commit, state, NOW + 40, JURORS[1], job, 0, ZERO)
    late = escrow.resign(state, NOW + 40, 140, JURORS[0], 2)  # the seat stays, and its bond behind it
    assert escrow.has_seat(late, job, JURORS[0], 1)


def test_attestations_expire_and_are_taken_back() -> None:
    state, topic = fresh(), Hash32(keccak256(b"region:eu"))
    refused("Attestations_Unknown", escrow.revoke_attestation, state, BOB, WORKER, topic)
    state = escrow.attest(state, NOW, BOB, WORKER, topic, ZERO, NOW + 10)
    assert escrow.is_valid(state, NOW + 9, BOB, WORKER, topic)
    assert not escrow.is_valid(state, NOW + 10, BOB, WORKER, topic)
    assert not escrow.is_valid(state, NOW, ANN, WORKER, topic)
    state = escrow.revoke_attestation(state, BOB, WORKER, topic)
    assert not escrow.is_valid(state, NOW, BOB, WORKER, topic)
    refused("Attestations_Revoked", escrow.revoke_attestation, state, BOB, WORKER, topic)
    state = escrow.attest(state, NOW, BOB, WORKER, topic, ZERO, NOW + 10)
    assert escrow.is_valid(state, NOW, BOB, WORKER, topic)


def test_the_most_beside_a_bond_is_exact() -> None:
    def together(amount: int) -> int:
        return amount + escrow.bond_for(replace(QUOTE, amount=amount))

    for balance in (*range(2, 300), 10**30 + 7):
        most = escrow.most_beside_bond(balance)
        assert together(most) <= balance < together(most + 1)
    assert [escrow.most_beside_bond(balance) for balance in (0, 1)] == [0, 0]
