"""What `juror` says to a person, in every phase of a case and before every step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.cli.juror_text import case_data, case_text, juror_text, phase, will_do
from node.ports import TokenInfo
from protocol.escrow import Case, CommitteeTerms, Dispute, Juror, Outcome, Seat, SeatState
from protocol.ids import Address, Hash32, JobId
from protocol.jury import Due, Duty, Sight, Vote

ME, ZERO, SEED = Address(b"\1" * 20), Hash32(bytes(32)), Hash32(b"\5" * 32)
JOB = JobId(b"\2" * 32)
DAY = 86_400
CASE = Case(10, 138, DAY, 2 * DAY, commits=2, accepts=1, rejects=0, seed=SEED)
SIGHT = Sight(
    job_id=JOB,
    juror=ME,
    case=CASE,
    block=140,
    now=0,
    held=3,
    total=3,
    seats=5,
    mine={0: Seat(), 2: Seat(ZERO, SeatState.COMMITTED)},
    found=Outcome.NONE,
    dispute=Dispute(10, 9 * DAY),
)
VOTE = Vote(JOB, Outcome.ACCEPT, SEED, b"\3" * 32)
INFO = TokenInfo(Address(b"\7" * 20), "tUSD", 6)
ENDED = Dispute(0, 9 * DAY, True, Outcome.ACCEPT, 5)


@pytest.mark.parametrize(
    ("sight", "name", "words"),
    [
        (replace(SIGHT, case=Case()), "unknown", "does not have it"),
        (replace(SIGHT, case=replace(CASE, seed=ZERO), mine={}), "seed", "block 138 (now 140)"),
        (SIGHT, "commit", "commit until 1970-01-02 00:00 UTC, 2 have"),
        (replace(SIGHT, now=DAY), "reveal", "reveal until 1970-01-03 00:00 UTC, 1 of 2 have"),
        (replace(SIGHT, now=DAY, found=Outcome.DRAW), "decided", "has found draw"),
        (replace(SIGHT, now=2 * DAY), "decided", "has found nothing (1 accept, 0 reject)"),
        (replace(SIGHT, now=2 * DAY, found=Outcome.ACCEPT, dispute=ENDED), "ended", "the dispute has ended so"),
    ],
)
def test_each_phase_has_its_words(sight: Sight, name: str, words: str) -> None:
    assert phase(sight) == name == case_data(sight, [])["phase"]
    assert words in case_text(sight, [VOTE])


def test_a_case_shows_seats_and_vote_and_why_there_are_none() -> None:
    text = case_text(SIGHT, [replace(VOTE, outcome=Outcome.REJECT), VOTE])
    assert "seats  0 free, 2 committed" in text and "vote   accept" in text
    assert "vote   none here" in case_text(SIGHT, [])
    assert "there was no ticket" in case_text(replace(SIGHT, held=0, mine={}), [])
    assert "none of the tickets is drawn" in case_text(replace(SIGHT, mine={}), [])
    assert "not drawn yet, of 3 tickets" in case_text(replace(SIGHT, case=replace(CASE, seed=ZERO), mine={}), [])


def test_each_step_is_told_with_what_it_risks() -> None:
    said = {duty: will_do(SIGHT, Due(duty, 2, VOTE), "10 tUSD") for duty in Duty}
    assert "block 138" in said[Duty.SEAL]
    assert (
        "1970-01-02 00:00 UTC and 1970-01-03 00:00 UTC" in said[Duty.COMMIT] and "10 tUSD is burnt" in said[Duty.COMMIT]
    )
    assert "accept" not in said[Duty.COMMIT], "a sealed vote is not told on the way"
    assert "ticket 2 reveals accept" in said[Duty.REVEAL]
    assert str(ME) in said[Duty.CLAIM] and "none" in said[Duty.RESOLVE]


def test_a_juror_sees_tickets_bond_and_what_is_on_its_way() -> None:
    terms = CommitteeTerms(seat_bond=10_000_000, leave_delay=8 * DAY + DAY // 2)
    text = juror_text(Juror(3, 5_000_000, DAY), terms, INFO, 1_500_000, DAY - 1)
    assert "3, 30 tUSD of bond (back 8.5 days after" in text and "1.5 tUSD free" in text
    assert "5 tUSD, to be taken from 1970-01-02 00:00 UTC" in text
    assert "to be taken now" in juror_text(Juror(3, 5, DAY), terms, INFO, 0, DAY)
    assert "leaving" not in juror_text(Juror(3, 0, 0), terms, INFO, 0, DAY)
