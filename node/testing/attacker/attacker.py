"""The hostile crowd: chooses who does what next, and at the end shows that everybody gets out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from node.testing.attacker import jury, keys, money, rules, work
from node.testing.attacker.crowd import ANN, CROWD, JURORS, OWNERS, WORKERS, Dice
from node.testing.attacker.judge import Judge
from node.testing.contracts import NATIVE, quote_tuple
from node.testing.evm import Contract, Reverted, artifact
from protocol import escrow
from protocol.escrow import Escrow, JobState, Outcome, SeatState, SlashState
from protocol.ids import Address, JobId, keccak256
from protocol.typed_data import Quote

ANYBODY = frozenset(
    {
        *("Channels.allocate", "Channels.claim", "Channels.settle", "Channels.finalizeWithdraw", "Channels.close"),
        *("Jobs.finalize", "Disputes.resolve", "Workers.moveSlash", "Committee.forfeit"),
        "Vault.depositWithAuthorization",
    }
)
"""Calls in which the sender has no say: a replay may come from anybody."""


class Call(NamedTuple):
    """What a replay needs."""

    sender: Address
    call: str
    args: tuple[Any, ...]
    model: Callable[[Escrow], Escrow]
    consent: Collection[Address]


class Mood(NamedTuple):
    """How a strange resolver behaves; numbers of tests' StrangeResolver.Mood."""

    begin: int = 0
    outcome: int = 0
    answer: Outcome = Outcome.NONE


HONEST, REVERTING, GAS_BURNER, RETURN_BOMB, SHORT, EMPTY, WILD, HIGH_BITS, REENTRANT, HUNGRY, MIND_CHANGER = range(11)


class Attacker(Judge):
    """One deployment, its model, and the hostile crowd around it."""

    def __init__(
        self, artifacts: Path, outcomes: Counter[tuple[str, str]], zoo: Path, *, trusts_model: bool = True
    ) -> None:
        """`zoo`: folder with the artifact of the strange resolver."""
        super().__init__(artifacts, outcomes, trusts_model=trusts_model)
        made = [self.evm.deploy_code(*artifact(zoo / "StrangeResolver.json"), sender=ANN) for _ in range(2)]
        self._strange: dict[Address, Contract] = {contract.address: contract for contract in made}
        self._moods: dict[Address, Mood] = {address: Mood() for address in self._strange}
        self.resolvers = tuple(self._strange)
        self.calls: list[Call] = []
        """What a replay chooses from (I3)."""
        self.votes: dict[tuple[JobId, Address, int], tuple[Outcome, bytes]] = {}
        self._shown: dict[int, tuple[bytes, bytes]] = {}
        self.permit_domain: bytes = self.world.token.call("DOMAIN_SEPARATOR")
        self.good, self.bad = money.configs_of(self.tokens[0])
        for config in (*self.good, *self.bad):
            self.watch_config(config)
        for address in self._strange:
            self.watch_account(address)
        self._begin()

    def _begin(self) -> None:
        """Everybody has something in the vault, and two owners have workers with stake."""
        self.numbers.read()
        for person in money.HOLDERS:
            for token in self.tokens:
                money.put_in(self, person, token, 20_000, person, 20_000 if token == NATIVE else 0)
        for owner, hot in zip((*OWNERS, OWNERS[0]), WORKERS, strict=False):
            keys.register_plainly(self, owner, hot)
        for owner in OWNERS:
            for token in self.tokens:
                keys.stake_plainly(self, owner, token, 2000)
        for juror in JURORS:
            jury.enroll_plainly(self, juror, 2)

    # ------------------------------------------------------------------------------------------------------ what is done

    def act(self, dice: Dice) -> None:
        """One step of somebody's choosing."""
        action, ready = dice.choice(_DECK)
        for _ in range(4):  # what has nothing to act on yet is tried, but seldom
            if ready(self) or dice.randint(0, 19) == 0:
                break
            action, ready = dice.choice(_DECK)
        action(self, dice)

    def step(
        self,
        sender: Address,
        call: str,
        args: tuple[Any, ...],
        model: Callable[[Escrow], Escrow],
        *,
        value: int = 0,
        gas: int | None = None,
        consent: Collection[Address] = (),
        once: bool = False,
    ) -> list[Any] | None:
        """As `Judge.step`; `once` keeps it out of the replays, because the model's answer depends on the moment."""
        if not once and not value:
            self.calls.append(Call(sender, call, args, model, consent))
        return super().step(sender, call, args, model, value=value, gas=gas, consent=consent)

    def replay(self, dice: Dice) -> None:
        """I3: an old call again, byte for byte, by anybody where the sender has no say. Judged in today's state."""
        if not self.calls:
            return
        old = dice.choice(self.calls if dice.randint(0, 1) else self.calls[-40:])
        sender = dice.choice(CROWD) if old.call in ANYBODY else old.sender
        super().step(sender, old.call, old.args, old.model, consent=old.consent)

    def maybe_wait(self, dice: Dice, when: int) -> None:
        """To the edge of `when`: the last moment before, or the first one. Seldom over the heads of many other edges."""
        if when <= self.now:
            return
        leapt = sum(edge < when for edge in rules.edges(self))
        if dice.randint(0, 2 + 3 * min(leapt, 6)) == 0:
            self.wait_until(when - dice.choice((0, 0, 1)))

    def one_by_one(self, sender: Address, entries: list[Any]) -> None:
        """I13: the same claims, in one batch and one after the other, leave the same numbers."""
        left = []
        for batches in ([entries], [[entry] for entry in entries]):
            with self.evm.undone():
                for batch in batches:
                    try:
                        self.evm.transact(sender, self.world.channels.address, self.encode("Channels.claim", batch))
                    except Reverted as reverted:  # entries are skipped, they never take the batch down
                        self.require(False, f"I13: a batch of claims ends in {reverted.name}")
                left.append(self.numbers.peek())
        self.require(left[0] == left[1], "I13: a batch is not its entries one by one")

    def intrude(self, sender: Address, call: str, args: tuple[Any, ...], refusals: Collection[str]) -> None:
        """Something that nobody of the crowd may do, ever."""
        name, function = call.split(".")
        try:
            self.contracts[name].send(sender, function, *args)
        except Reverted as reverted:
            self.outcomes[call, reverted.name] += 1
            self.require(reverted.name in refusals, f"I14: {call} was refused as {reverted.name!r}")
            return
        self.require(False, f"I14: {call} is open to everybody")

    def any_quote(self, dice: Dice) -> tuple[Any, ...]:
        quote = dice.choice(list(self.quotes.values())) if self.quotes else work.new_quote(self, dice)
        return quote_tuple(quote)

    # --------------------------------------------------------------------------------------------------------- resolvers

    def set_mood(self, dice: Dice, resolver: Address, answer: Outcome) -> None:
        mood = Mood(dice.choice((HONEST, dice.randint(0, 10))), dice.choice((HONEST, dice.randint(0, 10))), answer)
        self._moods[resolver] = mood
        strange = self._strange[resolver]
        strange.send(ANN, "set", *mood)
        disputes = self.world.disputes  # armed before it is asked anything: a call to nobody would succeed
        strange.send(ANN, "arm", disputes.address, disputes.encode("resolve", self.any_quote(dice)))

    def takes(self, resolver: Address) -> bool:
        """Whether a resolver with all the gas that it is promised takes a case."""
        if resolver in self._moods:
            return self._moods[resolver].begin not in (REVERTING, GAS_BURNER)
        return resolver == self.world.committee.address

    def quiet(self, resolver: Address) -> None:
        """Its attack from inside the call has not worked."""
        if resolver in self._strange:
            self.require(not self._strange[resolver].call("attackWorked"), "a resolver called back in")

    def says(self, state: Escrow, quote: Quote) -> Outcome:
        """What the quote's resolver answers now, as Disputes must understand it."""
        mood = self._moods.get(quote.resolver)
        if mood is None:
            return escrow.resolver_says(state, self.now, quote)
        if mood.outcome == MIND_CHANGER:
            return Outcome.REJECT if self.now % 2 else Outcome.ACCEPT
        if mood.outcome == REENTRANT:
            return Outcome.DRAW
        return mood.answer if mood.outcome in (HONEST, HUNGRY) else Outcome.NONE

    def header(self, dice: Dice, number: int) -> tuple[bool, bytes, bytes | None]:
        """(is the block's hash readable, a header to show, its randomness or None when it is the wrong one)"""
        past = self.block - number
        wrong = dice.randint(0, 4) == 0
        if number in self._shown:
            header, randomness = self._shown[number]
        elif not 256 < past <= 8191:
            return past <= 256, b"\xc0", None
        elif dice.randint(0, 3) == 0:
            return False, b"", None
        else:
            randomness = keccak256(b"randomness %d" % dice.randint(0, 2**30))
            header = self.evm.show_header(number, randomness)
            self._shown[number] = header, randomness
        return True, header + b"\0" if wrong else header, None if wrong else randomness


def _jobs(*states: JobState) -> Callable[[Attacker], bool]:
    return lambda a: any(job.state in states for job in a.state.jobs.values())


def _channels(a: Attacker) -> bool:
    return any(c.allocated and not c.closed for c in a.state.channels.values())


def _seats(*states: SeatState) -> Callable[[Attacker], bool]:
    return lambda a: any(seat.state in states for seat in a.state.seats.values())


def _cases(a: Attacker) -> bool:
    return any(a.now < case.commit_ends for case in a.state.cases.values())


def _always(a: Attacker) -> bool:
    return True


Action = Callable[[Attacker, Dice], None]
_WEIGHTED: tuple[tuple[int, Action, Callable[[Attacker], bool]], ...] = (
    (4, money.deposit, _always),
    (2, money.deposit_with_permit, _always),
    (2, money.deposit_with_authorization, _always),
    (3, money.withdraw, _always),
    (7, money.allocate, _always),
    (8, money.claim, _channels),
    (3, money.settle, lambda a: any(a.state.owed.values())),
    (2, money.initiate_withdraw, _channels),
    (3, money.finalize_withdraw, lambda a: any(c.withdraw_at and not c.closed for c in a.state.channels.values())),
    (3, money.close, _channels),
    (4, keys.register, lambda a: any(not w.active for w in a.state.workers.values())),
    (1, keys.rotate, _always),
    (2, keys.set_payout, _always),
    (1, keys.revoke, _always),
    (2, keys.announce, _always),
    (4, keys.stake, _always),
    (3, keys.unstake, _always),
    (4, keys.withdraw_stake, lambda a: any(s.unbonding for s in a.state.stakes.values())),
    (3, keys.set_exposure, _always),
    (4, keys.move_slash, lambda a: any(s.state is SlashState.BOOKED for s in a.state.slashes.values())),
    (2, keys.cancel_slash, lambda a: any(s.state is SlashState.BOOKED for s in a.state.slashes.values())),
    (14, work.open_job, _always),
    (12, work.submit, _jobs(JobState.OPEN)),
    (4, work.settle_job, _jobs(JobState.OPEN, JobState.SUBMITTED)),
    (3, work.finalize, _jobs(JobState.SUBMITTED)),
    (3, work.refund, _jobs(JobState.OPEN)),
    (2, work.fail, _jobs(JobState.OPEN, JobState.SUBMITTED)),
    (10, work.open_dispute, _jobs(JobState.SUBMITTED)),
    (6, work.resolve_dispute, _jobs(JobState.DISPUTED)),
    (1, work.prove_equivocation, _always),
    (3, work.resolver_mood, _always),
    (4, jury.enroll, _always),
    (1, jury.resign, lambda a: any(j.tickets for j in a.state.jurors.values())),
    (3, jury.withdraw_bond, lambda a: any(j.leaving for j in a.state.jurors.values())),
    (9, jury.seal, lambda a: any(not any(c.seed) and a.now < c.commit_ends for c in a.state.cases.values())),
    (14, jury.commit, _cases),
    (10, jury.reveal, _seats(SeatState.COMMITTED)),
    (4, jury.forfeit, _seats(SeatState.COMMITTED)),
    (4, jury.claim_fee, _seats(SeatState.ACCEPTED, SeatState.REJECTED)),
    (2, rules.govern, _always),
    (18, rules.unpause, lambda a: a.state.paused),
    (1, rules.attest, _always),
    (1, rules.revoke_attestation, lambda a: bool(a.state.attestations)),
    (2, rules.trespass, _always),
    (3, rules.wait, _always),
    (9, Attacker.replay, lambda a: bool(a.calls)),
)
_DECK = tuple((action, ready) for weight, action, ready in _WEIGHTED for _ in range(weight))
"""One card per unit of weight; drawing one is one choice, which shrinks well."""
