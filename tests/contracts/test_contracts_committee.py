"""The committee on the shipped bytecode: tickets, the draw, commit and reveal, fees, forfeits, and who would like to bend them.

Numbers such as I12 are invariants of contracts/INVARIANTS.md.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from node.testing.batch import DAY, RESULT, SPEC, Batch
from node.testing.contracts import COMMITTEE, Deployment, key, quote_tuple
from node.testing.evm import Reverted
from protocol.escrow.committee import commitment_of
from protocol.escrow.state import Outcome
from protocol.ids import ZERO_ADDRESS, Address, Hash32, keccak256
from protocol.keys import PrivateKey
from protocol.typed_data import Quote

MALLORY = key("mallory")
JURORS = [key(f"juror {n}") for n in range(8)]
ANN, BEN, CAT, DAN, EVE, FAY, GUS, HAL = JURORS
BURNT = Address(bytes(18) + b"\xde\xad")
NONE, ACCEPT, REJECT, DRAW = range(4)
BOND = COMMITTEE["seat_bond"]
SALT = Hash32(b"\x5a" * 32)
SEED_DELAY = 128
COMMITTED, ACCEPTED, REJECTED, FORFEITED, PAID = range(1, 6)


def refused(name: str):  # type: ignore[no-untyped-def]
    return pytest.raises(Reverted, match=rf"^{name}\(")


class Jury:
    """Jobs whose resolver is the committee, and people with tickets."""

    def __init__(self, world: Deployment, tickets: dict[PrivateKey, int] | None = None) -> None:
        self.world, self.evm = world, world.evm
        self.committee = world.committee
        self.batch = Batch(world, world.committee.address)
        for juror, n in (tickets or {}).items():
            self.enroll(juror, n)
        self.evm.set_block(self.evm.block + 1)

    def enroll(self, juror: PrivateKey, tickets: int) -> None:
        self.world.fund(juror.address, tickets * BOND)
        self.committee.send(juror.address, "enroll", tickets)

    def seal(self, job: Quote, randao: bytes = b"\x77" * 32) -> None:
        """Seal as soon as a header can be shown here: 257 blocks after the seed's."""
        seed_block = self.of(job)["seed_block"]
        if self.evm.block < seed_block + 257:
            self.evm.set_block(seed_block + 257)
        header = self.evm.show_header(seed_block, randao)
        self.committee.send(MALLORY.address, "seal", self.batch.id(job), header)

    def sealed(self, **changes: object) -> Quote:
        job = self.batch.disputed(**changes)
        self.seal(job)
        return job

    def of(self, job: Quote) -> dict[str, int]:
        names = (
            "snapshot",
            "seed_block",
            "commit_ends",
            "reveal_ends",
            "commits",
            "accepts",
            "rejects",
            "paid",
            "seed",
        )
        return dict(zip(names, self.committee.call("caseOf", self.batch.id(job)), strict=False))

    def commit(self, job: Quote, juror: PrivateKey, vote: int, ticket: int = 0, salt: Hash32 = SALT) -> None:
        said = commitment_of(self.batch.id(job), juror.address, ticket, Outcome(vote), RESULT, salt)
        self.committee.send(juror.address, "commit", self.batch.id(job), ticket, said)

    def reveal(self, job: Quote, juror: PrivateKey, vote: int, ticket: int = 0, salt: Hash32 = SALT) -> None:
        self.committee.send(juror.address, "reveal", self.batch.id(job), ticket, vote, RESULT, salt)

    def to_reveals(self, job: Quote) -> None:
        self.evm.set_time(max(self.evm.now, self.of(job)["commit_ends"]))

    def to_end(self, job: Quote) -> None:
        self.evm.set_time(max(self.evm.now, self.of(job)["reveal_ends"]))

    def vote(self, job: Quote, votes: dict[PrivateKey, int]) -> None:
        """Everybody commits with ticket 0, then everybody reveals."""
        for juror, vote in votes.items():
            self.commit(job, juror, vote)
        self.to_reveals(job)
        for juror, vote in votes.items():
            self.reveal(job, juror, vote)

    def outcome(self, job: Quote) -> int:
        return int(self.committee.call("outcome", self.batch.id(job)))

    def claim(self, job: Quote, juror: PrivateKey, ticket: int = 0) -> int:
        return int(self.committee.send(juror.address, "claimFee", quote_tuple(job), ticket).value)

    def seat(self, job: Quote, juror: PrivateKey, ticket: int = 0) -> int:
        return int(self.committee.call("seatOf", self.batch.id(job), juror.address, ticket)[1])

    def juror(self, juror: PrivateKey) -> tuple[int, int, int]:
        return self.committee.call("jurorOf", juror.address)  # type: ignore[no-any-return]

    def seats_of(self, job: Quote, juror: PrivateKey, tickets: int) -> list[int]:
        job_id = self.batch.id(job)
        return [t for t in range(tickets) if self.committee.call("hasSeat", job_id, juror.address, t)]

    def locked(self) -> int:
        return int(self.world.vault.call("lockedBy", self.committee.address, self.batch.token))


@pytest.fixture
def jury(deployment: Deployment) -> Jury:
    """Five jurors with a ticket each, as many as there are seats: everybody has one."""
    return Jury(deployment, dict.fromkeys(JURORS[:5], 1))


# ----------------------------------------------------------------------------------------------------------- the usual way


@pytest.mark.parametrize(
    ("votes", "outcome"),
    [
        ((ACCEPT, ACCEPT, REJECT), ACCEPT),
        ((REJECT, ACCEPT, REJECT, REJECT), REJECT),
        ((ACCEPT, REJECT), DRAW),
        ((ACCEPT, ACCEPT), ACCEPT),
        ((ACCEPT,), NONE),  # below the quorum of two
        ((), NONE),
    ],
)
def test_a_case_from_challenge_to_fee(jury: Jury, votes: tuple[int, ...], outcome: int) -> None:
    job = jury.sealed(amount=1000)
    ballots = dict(zip(JURORS, votes, strict=False))
    jury.vote(job, ballots)
    assert jury.outcome(job) == outcome  # all commits are revealed: no need to wait for the end
    if outcome == NONE:
        with refused("Disputes_Undecided"):
            jury.batch.resolve(job)
        jury.evm.set_time(jury.evm.now + 14 * DAY)
    jury.batch.resolve(job)
    fee = 0 if outcome == NONE else 50
    assert jury.world.disputes.call("disputeOf", jury.batch.id(job))[3:] == (outcome, fee)
    winners = [j for j, vote in ballots.items() if outcome in (DRAW, vote)]
    for juror, vote in ballots.items():
        if outcome == NONE or vote not in (outcome, *([vote] if outcome == DRAW else [])):
            with refused("Committee_NoFee"):
                jury.claim(job, juror)
    paid = [jury.claim(job, juror) for juror in winners] if outcome != NONE else []
    assert sum(paid) == fee
    assert max(paid, default=0) - min(paid, default=0) <= 1  # I11
    assert jury.batch.balance(jury.committee.address) == 0
    assert jury.locked() == 5 * BOND


def test_outcome_waits_for_the_last_commit_or_the_end(jury: Jury) -> None:
    job = jury.sealed()
    for juror in (ANN, BEN, CAT):
        jury.commit(job, juror, ACCEPT)
    jury.to_reveals(job)
    jury.reveal(job, ANN, ACCEPT)
    jury.reveal(job, BEN, ACCEPT)
    assert jury.outcome(job) == NONE
    jury.evm.set_time(jury.of(job)["reveal_ends"] - 1)
    assert jury.outcome(job) == NONE
    jury.to_end(job)
    assert jury.outcome(job) == ACCEPT
    with refused("Committee_TooLate"):
        jury.reveal(job, CAT, ACCEPT)


def test_dust_of_a_fee_goes_to_the_last_ones(jury: Jury) -> None:
    job = jury.sealed(amount=1000)  # a fee of 50 for four winners
    jury.vote(job, dict.fromkeys(JURORS[:4], REJECT))
    jury.batch.resolve(job)
    assert [jury.claim(job, juror) for juror in (BEN, DAN, ANN, CAT)] == [12, 12, 13, 13]


def test_a_fee_that_is_smaller_than_the_jury_is_paid_out_whole(jury: Jury) -> None:
    job = jury.sealed(amount=60)  # a bond of 6, a fee of 3
    jury.vote(job, dict.fromkeys(JURORS[:5], ACCEPT))
    jury.batch.resolve(job)
    assert [jury.claim(job, juror) for juror in JURORS[:5]] == [0, 0, 1, 1, 1]


def test_a_fee_in_another_token_than_the_tickets(jury: Jury) -> None:
    world = jury.world
    for account in ("batch client", "batch owner"):
        world.evm.give(key(account).address, 10**9)
        world.vault.send(key(account).address, "deposit", ZERO_ADDRESS, 10**9, key(account).address, value=10**9)
    world.workers.send(key("batch owner").address, "stake", ZERO_ADDRESS, 10**6)
    world.workers.send(key("batch owner").address, "setExposure", ZERO_ADDRESS, 10**6)
    native, usual = jury.batch.disputed(token=ZERO_ADDRESS), jury.batch.disputed()
    for job in (native, usual):
        jury.seal(job)
        for juror in (ANN, BEN):
            jury.commit(job, juror, REJECT)
    jury.to_reveals(native)
    for job in (native, usual):
        for juror in (ANN, BEN):
            jury.reveal(job, juror, REJECT)
        jury.batch.resolve(job)
    with refused("Committee_Unknown"):  # the token is part of what is hashed to the job's id
        jury.claim(replace(native, token=jury.batch.token), ANN)
    assert [jury.claim(job, j) for job in (native, usual) for j in (ANN, BEN)] == [25] * 4
    assert jury.batch.balance(ANN.address, ZERO_ADDRESS) == 25
    assert jury.batch.balance(ANN.address) == 25


# ------------------------------------------------------------------------------------------------------------ tickets


def test_tickets_lock_their_bond_and_give_it_back_after_the_delay(jury: Jury) -> None:
    jury.enroll(FAY, 3)
    assert (jury.locked(), jury.batch.balance(FAY.address)) == (8 * BOND, 0)
    jury.committee.send(FAY.address, "resign", 2)
    free_at = jury.evm.now + COMMITTEE["leave_delay"]
    assert jury.juror(FAY) == (1, 2 * BOND, free_at)
    jury.evm.set_time(free_at - 1)
    with refused("Committee_TooEarly"):
        jury.committee.send(FAY.address, "withdrawBond")
    jury.evm.set_time(free_at)
    assert jury.committee.send(FAY.address, "withdrawBond").value == 2 * BOND
    with refused("Committee_NothingFree"):
        jury.committee.send(FAY.address, "withdrawBond")
    assert (jury.locked(), jury.batch.balance(FAY.address)) == (6 * BOND, 2 * BOND)


def test_a_second_resignation_begins_the_delay_anew_for_all(jury: Jury) -> None:
    """I8: else a bond could leave with the date of another one, while its ticket still has a seat."""
    jury.enroll(FAY, 3)
    jury.committee.send(FAY.address, "resign", 1)
    first = jury.juror(FAY)[2]
    jury.evm.set_time(first - 1)
    jury.committee.send(FAY.address, "resign", 2)
    assert jury.juror(FAY) == (0, 3 * BOND, first - 1 + COMMITTEE["leave_delay"])
    jury.evm.set_time(first)
    with refused("Committee_TooEarly"):
        jury.committee.send(FAY.address, "withdrawBond")


def test_bad_numbers_of_tickets(jury: Jury) -> None:
    for call in (("enroll", 0), ("resign", 0)):
        with refused("Committee_ZeroAmount"):
            jury.committee.send(ANN.address, *call)
    with refused("Committee_TooFewTickets"):
        jury.committee.send(ANN.address, "resign", 2)
    with refused("Vault_Insufficient"):
        jury.committee.send(ANN.address, "enroll", 1)
    jury.world.fund(ANN.address, 10**6 * BOND)
    with refused("Committee_TooManyTickets"):
        jury.committee.send(ANN.address, "enroll", 10**6)
    jury.committee.send(ANN.address, "enroll", 10**6 - 1)


def test_a_pause_stops_new_tickets_and_nothing_else(jury: Jury) -> None:
    job = jury.batch.disputed()
    jury.world.fund(FAY.address, BOND)
    jury.world.vault.send(jury.world.admin, "setPaused", True)
    with refused("Vault_Paused"):
        jury.committee.send(FAY.address, "enroll", 1)
    jury.seal(job)  # I9: all that follows is a way out for somebody
    jury.commit(job, EVE, ACCEPT)
    jury.vote(job, {ANN: ACCEPT, BEN: ACCEPT})
    jury.to_end(job)
    jury.batch.resolve(job)
    jury.claim(job, ANN)
    jury.committee.send(MALLORY.address, "forfeit", jury.batch.id(job), EVE.address, 0)
    jury.committee.send(ANN.address, "resign", 1)
    jury.evm.set_time(jury.evm.now + COMMITTEE["leave_delay"])
    jury.committee.send(ANN.address, "withdrawBond")


def test_tickets_of_a_past_block(jury: Jury) -> None:
    first = jury.evm.block - 1
    assert jury.committee.call("ticketsAt", ANN.address, first) == 1
    assert jury.committee.call("ticketsAt", ZERO_ADDRESS, first) == 5
    with refused("Committee_TooEarly"):  # a block that is not over
        jury.committee.call("ticketsAt", ANN.address, jury.evm.block)
    jury.enroll(ANN, 2)
    jury.committee.send(BEN.address, "resign", 1)
    jury.evm.set_block(jury.evm.block + 5)
    at = jury.evm.block - 3
    assert [jury.committee.call("ticketsAt", a, at) for a in (ANN.address, BEN.address, ZERO_ADDRESS)] == [3, 0, 6]
    assert jury.committee.call("ticketsAt", ZERO_ADDRESS, first) == 5


# --------------------------------------------------------------------------------------------------------------- the seed


def test_the_seed_is_what_the_header_of_its_block_says(jury: Jury) -> None:
    begun = jury.evm.block
    job = jury.batch.disputed()
    job_id, seed_block = jury.batch.id(job), begun + SEED_DELAY
    case = jury.of(job)
    assert (case["snapshot"], case["seed_block"]) == (begun, seed_block)
    for number in (begun + 1, seed_block - 1, seed_block):  # at its own block the hash still reads as zero
        jury.evm.set_block(number)
        with refused("Committee_TooEarly"):
            jury.committee.send(MALLORY.address, "seal", job_id, b"")
    jury.evm.set_block(seed_block + 300)
    other = jury.evm.show_header(seed_block + 1, b"\x01" * 32)
    good = jury.evm.show_header(seed_block, b"\x02" * 32)
    for header in (other, good[:-1], good + b"\0", b"", good.replace(b"\x02" * 32, b"\x03" * 32)):
        with refused("Committee_WrongHeader"):
            jury.committee.send(MALLORY.address, "seal", job_id, header)
    with refused("Committee_NotSealed"):
        jury.commit(job, ANN, ACCEPT)
    assert not jury.committee.call("hasSeat", job_id, ANN.address, 0)
    jury.committee.send(MALLORY.address, "seal", job_id, good)
    assert jury.of(job)["seed"] == keccak256(b"\x02" * 32 + job_id)
    assert jury.committee.call("hasSeat", job_id, ANN.address, 0)
    with refused("Committee_Sealed"):
        jury.committee.send(MALLORY.address, "seal", job_id, good)


def test_a_near_header_is_checked_by_the_opcode(jury: Jury) -> None:
    """Within 256 blocks no header can be shown here, because pyrevm makes the hash up: any is the wrong one."""
    job = jury.batch.disputed()
    for distance in (1, 2, 255, 256):
        jury.evm.set_block(jury.of(job)["seed_block"] + distance)
        with refused("Committee_WrongHeader"):
            jury.committee.send(MALLORY.address, "seal", jury.batch.id(job), b"\xc0")


def test_a_seed_that_nobody_fetched_gets_a_new_block_and_not_for_ever(jury: Jury) -> None:
    job = jury.batch.disputed()
    job_id = jury.batch.id(job)
    jury.evm.set_block(jury.of(job)["seed_block"] + 9000)
    jury.committee.send(MALLORY.address, "seal", job_id, b"")
    assert jury.of(job)["seed_block"] == jury.evm.block + SEED_DELAY
    assert jury.of(job)["snapshot"] < jury.evm.block - 9000  # tickets stay those of the beginning
    with refused("Committee_TooEarly"):
        jury.committee.send(MALLORY.address, "seal", job_id, b"")
    jury.evm.set_block(jury.evm.block + 9000, jury.of(job)["commit_ends"])
    with refused("Committee_TooLate"):
        jury.committee.send(MALLORY.address, "seal", job_id, b"")


def test_cases_of_one_block_have_seeds_of_their_own(jury: Jury) -> None:
    jobs = [jury.batch.disputed() for _ in range(3)]
    for job in jobs:
        jury.seal(job)
    assert len({jury.of(job)["seed"] for job in jobs}) == 3


def test_tickets_bought_or_sold_after_the_block_of_the_case_change_nothing(jury: Jury) -> None:
    jury.enroll(FAY, 1)  # in the block of the case: nobody can know its seed, so this one counts
    job = jury.batch.disputed()
    jury.committee.send(EVE.address, "resign", 1)  # and so does this one
    jury.evm.set_block(jury.evm.block + 1)
    jury.enroll(GUS, 100)
    jury.committee.send(DAN.address, "resign", 1)
    jury.seal(job)
    with refused("Committee_NoSuchTicket"):
        jury.commit(job, GUS, ACCEPT)
    with refused("Committee_NoSuchTicket"):
        jury.commit(job, EVE, ACCEPT)
    with refused("Committee_NoSuchTicket"):
        jury.commit(job, ANN, ACCEPT, ticket=1)
    jury.commit(job, DAN, ACCEPT)
    jury.commit(job, FAY, ACCEPT)


# --------------------------------------------------------------------------------------------------------------- the draw


def test_seats_are_as_many_as_promised_and_splitting_changes_nothing(deployment: Deployment) -> None:
    """200 tickets of one against 200 of twenty: over many seeds both get half of the seats, five a case in all."""
    rich, many = key("rich"), [key(f"poor {n}") for n in range(20)]
    jury = Jury(deployment, {rich: 200, **dict.fromkeys(many, 10)})
    cases, counts = 60, []
    jobs = [jury.batch.disputed() for _ in range(cases)]
    for n, job in enumerate(jobs):
        jury.seal(job, keccak256(n.to_bytes(32)))
    mine = theirs = 0
    for job in jobs:
        a = len(jury.seats_of(job, rich, 200))
        b = sum(len(jury.seats_of(job, poor, 10)) for poor in many)
        mine, theirs = mine + a, theirs + b
        counts.append(a + b)
    mean = sum(counts) / cases
    spread = (COMMITTEE["seats"] / cases) ** 0.5  # of the mean, as of a Poisson count
    assert abs(mean - COMMITTEE["seats"]) < 4 * spread
    assert abs(mine - theirs) < 4 * (cases * COMMITTEE["seats"]) ** 0.5
    assert min(counts) < max(counts)  # a draw, not a quota


def test_every_ticket_has_a_seat_while_there_are_no_more_than_seats(jury: Jury) -> None:
    job = jury.sealed()
    assert all(jury.seats_of(job, juror, 1) for juror in JURORS[:5])
    assert not jury.committee.call("hasSeat", jury.batch.id(job), ZERO_ADDRESS, 0)


def test_a_ticket_that_was_not_drawn_can_not_commit(deployment: Deployment) -> None:
    jury = Jury(deployment, {ANN: 300})
    job = jury.sealed()
    seats = jury.seats_of(job, ANN, 300)
    assert 0 < len(seats) < 30
    for ticket in range(300):
        if ticket in seats:
            jury.commit(job, ANN, ACCEPT, ticket)
        else:
            with refused("Committee_NoSeat"):
                jury.commit(job, ANN, ACCEPT, ticket)
    assert jury.of(job)["commits"] == len(seats)


# --------------------------------------------------------------------------------------------------------- commit and reveal


def test_a_seat_is_taken_once(jury: Jury) -> None:
    job = jury.sealed()
    jury.commit(job, ANN, ACCEPT)
    with refused("Committee_Committed"):
        jury.commit(job, ANN, REJECT)
    jury.commit(job, BEN, ACCEPT)
    jury.to_reveals(job)
    jury.reveal(job, ANN, ACCEPT)
    with refused("Committee_BadReveal"):
        jury.reveal(job, ANN, ACCEPT)
    with refused("Committee_TooLate"):
        jury.commit(job, ANN, REJECT)
    assert jury.of(job)["accepts"] == 1


def test_windows_hold_to_the_second(jury: Jury) -> None:
    job = jury.sealed()
    case = jury.of(job)
    assert case["commit_ends"] - jury.evm.now == COMMITTEE["commit_window"]
    assert case["reveal_ends"] - case["commit_ends"] == COMMITTEE["reveal_window"]
    jury.evm.set_time(case["commit_ends"] - 1)
    jury.commit(job, ANN, ACCEPT)
    with refused("Committee_TooEarly"):  # nobody's vote is seen while somebody may still commit
        jury.reveal(job, ANN, ACCEPT)
    jury.evm.set_time(case["commit_ends"])
    with refused("Committee_TooLate"):
        jury.commit(job, BEN, ACCEPT)
    jury.evm.set_time(case["reveal_ends"] - 1)
    jury.reveal(job, ANN, ACCEPT)


def test_a_commitment_opens_in_one_way_only(jury: Jury) -> None:
    job, other = jury.batch.disputed(), jury.batch.disputed()
    jury.seal(job)
    jury.seal(other)
    jury.commit(job, ANN, ACCEPT)
    jury.commit(other, ANN, ACCEPT)
    jury.to_reveals(job)
    for change in ({"vote": REJECT}, {"salt": RESULT}, {"ticket": 1}, {"juror": BEN}):
        with refused("Committee_BadReveal"):
            jury.reveal(**{"job": job, "juror": ANN, "vote": ACCEPT} | change)  # type: ignore[arg-type]
    with refused("Committee_BadReveal"):
        jury.committee.send(ANN.address, "reveal", jury.batch.id(job), 0, ACCEPT, SPEC, SALT)
    for vote in (NONE, DRAW):
        with refused("Committee_BadVote"):
            jury.reveal(job, ANN, vote)
    jury.reveal(job, ANN, ACCEPT)


def test_a_copied_commitment_is_worth_nothing(jury: Jury) -> None:
    job = jury.sealed()
    said = commitment_of(jury.batch.id(job), ANN.address, 0, Outcome.ACCEPT, RESULT, SALT)
    jury.committee.send(ANN.address, "commit", jury.batch.id(job), 0, said)
    jury.committee.send(BEN.address, "commit", jury.batch.id(job), 0, said)
    jury.to_reveals(job)
    jury.reveal(job, ANN, ACCEPT)
    with refused("Committee_BadReveal"):
        jury.reveal(job, BEN, ACCEPT)


def test_small_numbers_as_commitments_are_no_votes(jury: Jury) -> None:
    job = jury.sealed()
    for juror, number in zip(JURORS, range(5), strict=False):
        jury.committee.send(juror.address, "commit", jury.batch.id(job), 0, number.to_bytes(32))
    jury.to_end(job)
    assert jury.of(job)["accepts"] == jury.of(job)["rejects"] == 0
    assert jury.outcome(job) == NONE
    assert [jury.seat(job, juror) for juror in JURORS[:5]] == [COMMITTED] * 5


def test_reveal_without_a_commitment(jury: Jury) -> None:
    job = jury.sealed()
    jury.commit(job, BEN, ACCEPT)
    jury.to_reveals(job)
    with refused("Committee_BadReveal"):
        jury.reveal(job, ANN, ACCEPT)


# ------------------------------------------------------------------------------------------------------------------ forfeits


def test_a_silent_seat_loses_a_tenth_and_its_ticket_once(jury: Jury) -> None:
    job = jury.sealed()
    for juror in JURORS[:4]:
        jury.commit(job, juror, ACCEPT)
    jury.to_reveals(job)
    for juror in (ANN, BEN):
        jury.reveal(job, juror, ACCEPT)
    job_id = jury.batch.id(job)
    with refused("Committee_TooEarly"):
        jury.committee.send(MALLORY.address, "forfeit", job_id, CAT.address, 0)
    jury.to_end(job)
    for honest in (ANN, EVE):  # revealed, and never committed
        with refused("Committee_NothingToForfeit"):
            jury.committee.send(MALLORY.address, "forfeit", job_id, honest.address, 0)
    jury.committee.send(MALLORY.address, "forfeit", job_id, CAT.address, 0)
    assert jury.juror(CAT) == (0, BOND - BOND // 10, jury.evm.now + COMMITTEE["leave_delay"])
    assert jury.batch.balance(BURNT) == BOND // 10
    assert jury.committee.call("ticketsAt", ZERO_ADDRESS, jury.evm.block - 1) == 5
    with refused("Committee_NothingToForfeit"):
        jury.committee.send(MALLORY.address, "forfeit", job_id, CAT.address, 0)
    jury.batch.resolve(job)
    for juror in (CAT, DAN, EVE):
        with refused("Committee_NoFee"):
            jury.claim(job, juror)
    assert [jury.claim(job, juror) for juror in (ANN, BEN)] == [25, 25]
    with refused("Committee_NoFee"):
        jury.claim(job, ANN)
    with refused("Committee_NothingToForfeit"):  # paid is not silent
        jury.committee.send(MALLORY.address, "forfeit", job_id, ANN.address, 0)
    assert jury.locked() == 5 * BOND - BOND // 10


def test_resigning_does_not_save_the_bond_behind_a_silent_seat(jury: Jury) -> None:
    job = jury.sealed()
    jury.commit(job, ANN, ACCEPT)
    jury.committee.send(ANN.address, "resign", 1)
    free_at = jury.evm.now + COMMITTEE["leave_delay"]
    jury.to_end(job)
    assert jury.evm.now + 7 * DAY <= free_at  # a week for somebody to call
    jury.committee.send(MALLORY.address, "forfeit", jury.batch.id(job), ANN.address, 0)
    assert jury.juror(ANN) == (0, BOND - BOND // 10, free_at)
    jury.evm.set_time(free_at)
    assert jury.committee.send(ANN.address, "withdrawBond").value == BOND - BOND // 10
    assert jury.locked() == 4 * BOND  # I12


def test_the_last_moment_to_resign_is_still_too_late_to_run(jury: Jury) -> None:
    """Resigns in the block after the case began, when the ticket counts: the bond is there a week after the last reveal."""
    job = jury.batch.disputed()
    jury.evm.set_block(jury.evm.block + 1)
    jury.committee.send(ANN.address, "resign", 1)
    jury.seal(job)
    jury.commit(job, ANN, REJECT)
    jury.to_end(job)
    jury.evm.set_time(jury.evm.now + 7 * DAY - 1)
    with refused("Committee_TooEarly"):
        jury.committee.send(ANN.address, "withdrawBond")
    jury.committee.send(MALLORY.address, "forfeit", jury.batch.id(job), ANN.address, 0)


def test_more_silent_seats_than_a_ticket_can_pay_take_what_there_is(deployment: Deployment) -> None:
    jury = Jury(deployment, {ANN: 1, BEN: 1})
    jobs = [jury.batch.disputed() for _ in range(12)]
    for job in jobs:
        jury.seal(job)
        jury.commit(job, ANN, ACCEPT)
    jury.to_end(jobs[-1])
    for job in jobs:
        jury.committee.send(MALLORY.address, "forfeit", jury.batch.id(job), ANN.address, 0)
    assert jury.juror(ANN)[:2] == (0, 0)
    assert jury.batch.balance(BURNT) == BOND
    assert jury.locked() == BOND  # Ben's: nobody else's bond was touched (I10)


# -------------------------------------------------------------------------------------------------------- fees of many cases


def test_fees_of_many_cases_never_mix(jury: Jury) -> None:
    """Every case pays out exactly its own fee, in whatever order its jurors come (I3, I11)."""
    dice = random.Random(7)
    jobs = [jury.batch.disputed(amount=dice.randrange(1, 5000)) for _ in range(12)]
    ballots = {job: {j: dice.choice((ACCEPT, REJECT)) for j in dice.sample(JURORS[:5], 4)} for job in jobs}
    for job in jobs:
        jury.seal(job)
        for juror, vote in ballots[job].items():
            jury.commit(job, juror, vote)
    jury.to_reveals(jobs[-1])
    for job in jobs:
        for juror, vote in ballots[job].items():
            jury.reveal(job, juror, vote)
        jury.batch.resolve(job)
    fees = {job: jury.world.disputes.call("disputeOf", jury.batch.id(job))[4] for job in jobs}
    claims = [(job, juror) for job in jobs for juror in JURORS[:5]] * 2
    dice.shuffle(claims)
    paid = dict.fromkeys(jobs, 0)
    for job, juror in claims:
        try:
            paid[job] += jury.claim(job, juror)
        except Reverted as error:
            assert error.name == "Committee_NoFee"
    assert paid == fees
    assert jury.batch.balance(jury.committee.address) == 0
    assert jury.locked() == 5 * BOND


def test_no_fee_before_the_dispute_is_resolved(jury: Jury) -> None:
    job = jury.sealed()
    jury.vote(job, {ANN: ACCEPT, BEN: ACCEPT})
    with refused("Committee_NoFee"):
        jury.claim(job, ANN)
    jury.batch.resolve(job)
    with refused("Committee_NoFee"):
        jury.claim(job, MALLORY)
    jury.claim(job, ANN)


# ---------------------------------------------------------------------------------------------------------------- the door


def test_only_disputes_brings_cases(jury: Jury) -> None:
    job = jury.batch.disputed()
    for caller in (MALLORY.address, jury.world.admin, ANN.address):
        with refused("Committee_NotDisputes"):
            jury.committee.send(caller, "begin", jury.batch.id(job), SPEC, RESULT, RESULT)
    unknown = keccak256(b"no such job")
    calls = (
        ("seal", unknown, b""),
        ("commit", unknown, 0, SALT),
        ("reveal", unknown, 0, ACCEPT, SALT, SALT),
        ("forfeit", unknown, ANN.address, 0),
    )
    for call in calls:
        with refused("Committee_Unknown"):
            jury.committee.send(ANN.address, *call)
    assert jury.committee.call("outcome", unknown) == NONE


def parameters(**changes: int) -> tuple[int, ...]:
    return tuple({**COMMITTEE, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"seat_bond": 9},
        {"seat_bond": 2**96},
        {"seats": 0, "quorum": 0},
        {"seats": 1001},
        {"quorum": 0},
        {"seats": 3, "quorum": 4},
        {"commit_window": 899},
        {"commit_window": 6 * DAY + 1},
        {"reveal_window": 899},
        {"reveal_window": 6 * DAY + 1},
        {"leave_delay": COMMITTEE["commit_window"] + COMMITTEE["reveal_window"] + 7 * DAY - 1},
        {"leave_delay": 90 * DAY + 1},
    ],
)
def test_parameters_out_of_bounds(deployment: Deployment, changes: dict[str, int]) -> None:
    world = deployment
    places = (world.vault.address, world.jobs.address, world.disputes.address, world.token.address)
    world.evm.deploy("Committee", *places, parameters(), sender=MALLORY.address)
    with refused("Committee_BadParameters"):
        world.evm.deploy("Committee", *places, parameters(**changes), sender=MALLORY.address)


def test_no_committee_without_contracts_or_randomness(deployment: Deployment) -> None:
    world = deployment
    places = [world.vault.address, world.jobs.address, world.disputes.address, world.token.address]
    for missing in range(3):
        wrong = [MALLORY.address if n == missing else place for n, place in enumerate(places)]
        with refused("Committee_NotAContract"):
            world.evm.deploy("Committee", *wrong, parameters(), sender=MALLORY.address)
    for constant in (0, 1, 2**64 - 1):
        world.evm.set_randao(constant.to_bytes(32))
        with refused("Committee_NoRandomness"):
            world.evm.deploy("Committee", *places, parameters(), sender=MALLORY.address)


def test_the_longest_case_ends_before_its_dispute_becomes_a_draw(deployment: Deployment) -> None:
    six = {"commit_window": 6 * DAY, "reveal_window": 6 * DAY, "leave_delay": 90 * DAY}
    assert six["commit_window"] + six["reveal_window"] + 2 * DAY <= 14 * DAY
    places = (deployment.vault.address, deployment.jobs.address, deployment.disputes.address, deployment.token.address)
    deployment.evm.deploy("Committee", *places, parameters(**six), sender=MALLORY.address)
