"""Jurors that follow `protocol.jury` against the model of the contracts: nothing that they do is ever refused, and every seat of
a juror that has voted and looks now and then is revealed and paid. Y3 and Y4."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from protocol import escrow, jury
from protocol.errors import LocalProtocolError
from protocol.escrow import Case, CommitteeTerms, Dispute, Escrow, Outcome, Seat, SeatState
from protocol.escrow.committee import SEED_DELAY, tickets_at
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId, keccak256
from protocol.jury import Duty, Sight, Vote
from protocol.typed_data import Domain, Quote


def account(name: str) -> Address:
    return Address(keccak256(name.encode())[12:])


ANN, WORKER, OWNER, TOKEN, COMMITTEE = map(account, ("ann", "worker", "owner", "token", "committee"))
NOW, BLOCK_S, WINDOW = 1_800_000_000, 12, 3600
ZERO, RESULT = Hash32(bytes(32)), Hash32(b"\7" * 32)
QUOTE = Quote(ZERO, ANN, WORKER, TOKEN, 1000, 400, NOW + 60, NOW + 600, 900, COMMITTEE, ZERO)


def disputed(tickets: Mapping[Address, int], seats: int) -> Escrow:
    terms = CommitteeTerms(COMMITTEE, TOKEN, 100, seats, 1, WINDOW, WINDOW, 20 * 86400)
    state = Escrow(
        Domain(1, account("channels")),
        account("vault"),
        frozenset({TOKEN}),
        jobs_domain=Domain(1, account("jobs")),
        terms=terms,
    )
    for who in (ANN, OWNER, *tickets):
        state = escrow.deposit(state, TOKEN, 10_000, who)
    state = escrow.register(state, NOW, OWNER, WORKER, WORKER, NOW + 1, WORKER)
    state = escrow.set_exposure(escrow.stake(state, OWNER, TOKEN, 2_000), OWNER, TOKEN, 2_000)
    for who, count in tickets.items():
        state = escrow.enroll(state, 1, who, count)
    state = escrow.open_job(state, NOW, WORKER, QUOTE, WORKER, ANN)
    state = escrow.submit(state, NOW, ANN, QUOTE, RESULT, 900, WORKER)
    return escrow.open_dispute(state, NOW, 10, ANN, QUOTE, ZERO)


JOB = QUOTE.job_id(Domain(1, account("jobs")))


@dataclass
class Chain:
    state: Escrow
    now: int = NOW
    block: int = 10

    def sight(self, juror: Address) -> Sight:
        case = self.state.case(JOB)
        held = tickets_at(self.state, juror, case.snapshot)
        total = tickets_at(self.state, ZERO_ADDRESS, case.snapshot)
        numbers = jury.drawn(case.seed, juror, held, total, self.state.terms.seats)
        assert numbers == [n for n in range(held) if escrow.has_seat(self.state, JOB, juror, n)]
        return Sight(
            job_id=JOB,
            juror=juror,
            case=case,
            block=self.block,
            now=self.now,
            held=held,
            total=total,
            seats=self.state.terms.seats,
            mine={n: self.state.seat(JOB, juror, n) for n in numbers},
            found=escrow.resolver_says(self.state, self.now, QUOTE),
            dispute=self.state.dispute(JOB),
        )

    def send(self, juror: Address, due: jury.Due, lag: int) -> None:
        """Mined in a later block than the one that was seen. Raises when the contract would refuse."""
        state, at, block, vote = self.state, self.now + lag, self.block + 1, due.vote
        match due.duty:
            case Duty.SEAL:
                past = block - state.case(JOB).seed_block
                seed = keccak256(past.to_bytes(32))
                state = escrow.seal(state, at, block, JOB, past <= 256, seed)
            case Duty.COMMIT if vote is not None:
                state = escrow.commit(state, at, juror, JOB, due.ticket, vote.commitment(juror, due.ticket))
            case Duty.REVEAL if vote is not None:
                said = (vote.outcome, vote.result_hash, vote.salt(due.ticket))
                state = escrow.reveal(state, at, juror, JOB, due.ticket, *said)
            case Duty.RESOLVE:
                found = escrow.resolver_says(state, at, QUOTE)
                state = escrow.resolve_dispute(state, at, QUOTE, found)
            case Duty.CLAIM:
                state = escrow.claim_fee(state, juror, QUOTE, due.ticket)
            case _:
                raise AssertionError(due)
        self.state = state


@dataclass
class Juror:
    account: Address
    votes: list[Vote] = field(default_factory=list)
    """The journal: it outlives every crash."""


def vote(dice: random.Random) -> Vote:
    return Vote(JOB, dice.choice(jury.VOTES), Hash32(dice.randbytes(32)), dice.randbytes(32))


@pytest.mark.parametrize("seed", range(60))
def test_who_follows_the_rules_is_never_refused_and_always_paid(seed: int) -> None:
    dice = random.Random(seed)
    tickets = {account(f"juror {n}"): dice.randint(1, 8) for n in range(dice.randint(1, 4))}
    chain = Chain(disputed(tickets, seats=dice.choice((3, 5, 100))))
    jurors = [Juror(who) for who in tickets]
    enough = 0
    while chain.now < NOW + 2 * WINDOW + 600:
        step = dice.choice((1, 1, 2, 5, 20))
        chain.block, chain.now = chain.block + step, chain.now + step * BLOCK_S
        for juror in jurors:
            undecided = not any(s.state is not SeatState.NONE for s in chain.sight(juror.account).mine.values())
            if undecided and dice.random() < 0.02:
                juror.votes.append(vote(dice))  # also another one, while none has left
            todo = jury.due(chain.sight(juror.account), juror.votes)
            for due in todo[: dice.randint(0, len(todo))]:  # a crash in the middle
                if due.duty is Duty.RESOLVE and chain.state.dispute(JOB).ended:
                    continue
                if due.duty is Duty.SEAL and any(chain.state.case(JOB).seed):
                    continue
                last = min(chain.state.case(JOB).commit_ends, chain.state.case(JOB).reveal_ends) - 1
                chain.send(juror.account, due, lag=min(dice.choice((0, 1, 12)), max(0, last - chain.now)))
                enough += 1
    for _ in range(3):
        for juror in jurors:
            for due in jury.due(chain.sight(juror.account), juror.votes):
                chain.send(juror.account, due, lag=0)
    case, dispute = chain.state.case(JOB), chain.state.dispute(JOB)
    assert any(case.seed) and enough
    for juror in jurors:
        seats = chain.sight(juror.account).mine.values()
        assert SeatState.COMMITTED not in {seat.state for seat in seats}, "a vote was not revealed"
        assert not any(escrow.wins(seat.state, dispute.outcome) for seat in seats) or not dispute.fee
        assert jury.due(chain.sight(juror.account), juror.votes) == []
    if case.accepts + case.rejects:
        assert (
            dispute.ended and sum(seat.state is SeatState.PAID for seat in chain.state.seats.values()) == case.paid > 0
        )


def sight(case: Case, mine: Mapping[int, Seat] | None = None, **given: object) -> Sight:
    values: dict[str, object] = {
        "job_id": JOB,
        "juror": ANN,
        "case": case,
        "block": 10 + SEED_DELAY,
        "now": NOW,
        "held": 3,
        "total": 3,
        "seats": 5,
        "mine": mine or {},
        "found": Outcome.NONE,
        "dispute": Dispute(10, NOW + 100_000),
    }
    return Sight(**{**values, **given})  # type: ignore[arg-type]


CASE = Case(10, 10 + SEED_DELAY, NOW + 100, NOW + 200, seed=RESULT)
MINE = Vote(JOB, Outcome.ACCEPT, RESULT, b"\1" * 32)


def test_nothing_is_due_without_a_case_a_ticket_or_a_vote() -> None:
    unsealed = replace(CASE, seed=ZERO)
    assert jury.due(sight(Case()), [MINE]) == []
    assert jury.due(sight(unsealed, held=0), [MINE]) == []
    assert jury.due(sight(unsealed, block=9 + SEED_DELAY), [MINE]) == []
    assert jury.due(sight(unsealed, now=NOW + 100), [MINE]) == []
    assert [one.duty for one in jury.due(sight(unsealed), [])] == [Duty.SEAL]
    assert jury.due(sight(CASE, {0: Seat()}), []) == []
    assert [one.duty for one in jury.due(sight(CASE, {0: Seat(), 2: Seat()}), [MINE])] == [Duty.COMMIT] * 2
    assert jury.due(sight(CASE, {0: Seat()}, now=NOW + 100), [MINE]) == []


def test_the_vote_behind_a_commitment_is_found_among_all_and_a_strangers_is_not_revealed() -> None:
    other = Vote(JOB, Outcome.REJECT, RESULT, b"\2" * 32)
    first, lost = (
        Seat(one.commitment(ANN, 0), SeatState.COMMITTED)
        for one in (MINE, Vote(JOB, Outcome.ACCEPT, RESULT, b"\3" * 32))
    )
    late = sight(CASE, {0: first}, now=NOW + 100)
    (due,) = jury.due(late, [MINE, other])  # the one that counts now is not the one that was sent
    assert due.duty is Duty.REVEAL and due.vote == MINE
    assert jury.behind(sight(CASE, {0: lost}), 0, [MINE, other]) is None
    assert jury.due(sight(CASE, {0: lost}, now=NOW + 100), [MINE, other]) == []
    # A ticket's commitment is good for that ticket alone.
    assert jury.behind(sight(CASE, {1: first}), 1, [MINE, other]) is None
    assert jury.due(sight(CASE, {0: first}, now=NOW + 200), [MINE]) == []


def test_who_gains_nothing_ends_no_dispute() -> None:
    end, won, lost = NOW + 200, Seat(ZERO, SeatState.ACCEPTED), Seat(ZERO, SeatState.REJECTED)
    found = {"now": end, "found": Outcome.ACCEPT}
    assert [one.duty for one in jury.due(sight(CASE, {0: won, 1: lost}, **found), [])] == [Duty.RESOLVE]
    assert jury.due(sight(CASE, {0: lost}, **found), []) == []
    assert jury.due(sight(CASE, {0: won}, now=end), []) == []
    ended = Dispute(0, NOW + 1, True, Outcome.ACCEPT, 10)
    assert jury.due(sight(CASE, {0: won, 1: lost, 2: won}, **found, dispute=ended), []) == [
        jury.Due(Duty.CLAIM, 0),
        jury.Due(Duty.CLAIM, 2),
    ]
    assert jury.due(sight(CASE, {0: won}, **found, dispute=replace(ended, fee=0)), []) == []


def test_a_vote_is_accept_or_reject_and_has_a_secret() -> None:
    for outcome in (Outcome.NONE, Outcome.DRAW):
        with pytest.raises(LocalProtocolError, match="accept or reject"):
            Vote(JOB, outcome, RESULT, bytes(32))
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        Vote(JOB, Outcome.ACCEPT, RESULT, b"")
    assert len({MINE.salt(n) for n in range(100)}) == 100
    assert MINE.salt(0) != replace(MINE, secret=b"\2" * 32).salt(0)


def test_the_draw_is_the_contracts() -> None:
    tickets = {account("one"): 400, account("two"): 600}
    state = disputed({account("one"): 50, account("two"): 60}, seats=7)
    state = escrow.seal(state, NOW + 1, 11 + SEED_DELAY, JOB, True, RESULT)
    seats = 0
    for who in tickets:
        case = state.case(JOB)
        held = tickets_at(state, who, case.snapshot)
        mine = jury.drawn(case.seed, who, held, 110, 7)
        assert mine == [n for n in range(held) if escrow.has_seat(state, JOB, who, n)]
        seats += len(mine)
    assert 0 < seats < 30 and jury.drawn(ZERO, ANN, 5, 5, 7) == []
    assert isinstance(JOB, JobId)
