"""Batch jobs by hand: every state and every silence, who may do what, and the zoos of signatures, tokens and wallets.

Numbers such as I5 are invariants of contracts/INVARIANTS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from node.testing.contracts import NATIVE, PUPPET, Deployment, high_s, key, quote_tuple
from node.testing.evm import Result, Reverted
from protocol.escrow.state import JobState
from protocol.ids import ZERO_ADDRESS, ZERO_HASH, Address, Hash32, JobId, keccak256
from protocol.keys import PrivateKey
from protocol.typed_data import Acceptance, Domain, HotKey, Order, Quote, Submission

DAY = 86_400
FOREVER = 2**40 - 1
ANN, WORKER, OWNER, MALLORY = (key(n) for n in ("ann", "worker", "owner", "mallory"))
PAYOUT = Address(b"\x99" * 20)
BURN = Address("0x000000000000000000000000000000000000dEaD")
RESULT, OTHER = Hash32(b"\xaa" * 32), Hash32(b"\xbb" * 32)
ONE = Hash32((1).to_bytes(32))
AMOUNT, PENALTY = 300, 40


class Scene:
    """Ann has 1,000 in the vault; the owner staked 400 of 1,000 and allowed all of it; `quote` is the worker's."""

    def __init__(self, world: Deployment, token: Address | None = None, **changes: object) -> None:
        self.world, self.vault, self.jobs = world, world.vault, world.jobs
        self.token = world.token.address if token is None else token
        if token is None:
            world.fund(ANN.address, 1000)
            world.fund(OWNER.address, 1000)
        consent = HotKey(OWNER.address, WORKER.address, PAYOUT, 0, FOREVER).digest(world.workers_domain)
        world.workers.send(OWNER.address, "register", WORKER.address, PAYOUT, FOREVER, WORKER.sign(consent))
        world.workers.send(OWNER.address, "stake", self.token, 400)
        world.workers.send(OWNER.address, "setExposure", self.token, 400)
        now = world.evm.now
        base = Quote(
            spec_hash=Hash32(b"\x05" * 32),
            client=ANN.address,
            worker=WORKER.address,
            token=self.token,
            amount=AMOUNT,
            penalty=PENALTY,
            valid_before=now + 600,
            deadline=now + 3600,
            window=900,
            resolver=PUPPET,
            salt=Hash32(bytes(32)),
        )
        self.quote: Quote = replace(base, **changes)  # type: ignore[arg-type]

    @property
    def id(self) -> JobId:
        return self.quote.job_id(self.world.jobs_domain)

    def sign(self, who: PrivateKey, struct: Any, domain: Domain | None = None) -> bytes:
        return who.sign(struct.digest(domain or self.world.jobs_domain))

    def send(self, function: str, *args: object, sender: Address = MALLORY.address) -> Result:
        return self.jobs.send(sender, function, quote_tuple(self.quote), *args)

    def open(self, worker: bytes | None = None, client: bytes | None = None, sender: Address | None = None) -> None:
        """By anybody who may: a stranger, or the worker where its stake answers."""
        sender = sender or (self.quote.worker if self.quote.penalty else MALLORY.address)
        worker = self.sign(WORKER, self.quote) if worker is None else worker
        client = self.sign(ANN, Order(self.id)) if client is None else client
        self.send("open", worker, client, sender=sender)

    def submit(self, claimed: int = AMOUNT, result: Hash32 = RESULT, signature: bytes | None = None) -> None:
        signature = self.sign(WORKER, Submission(self.id, result, claimed)) if signature is None else signature
        self.send("submit", result, claimed, signature)

    def settle(self, amount: int = AMOUNT, result: Hash32 = RESULT, signature: bytes | None = None) -> None:
        signature = self.sign(ANN, Acceptance(self.id, result, amount)) if signature is None else signature
        self.send("settle", result, amount, signature)

    def by_module(self, function: str, *args: object) -> Result:
        return self.jobs.send(MALLORY.address, function, quote_tuple(self.quote), *args, via=PUPPET)

    def disputed(self, claimed: int = AMOUNT) -> None:
        self.open()
        self.submit(claimed)
        self.by_module("dispute")

    def job(self) -> tuple[JobState, int, int, bytes]:
        state, window_end, claimed, result = self.jobs.call("job", self.id)
        return JobState(state), window_end, claimed, result

    def balance(self, account: Address) -> int:
        return self.vault.call("balanceOf", self.token, account)  # type: ignore[no-any-return]

    def split(self) -> tuple[int, int, int]:
        """(what Ann has, what the worker was paid, what Jobs still holds)"""
        return (
            self.balance(ANN.address),
            self.balance(PAYOUT),
            self.vault.call("lockedBy", self.jobs.address, self.token),
        )

    def stake(self) -> tuple[int, int, int]:
        """(active, unbonding, held)"""
        return self.world.workers.call("stakeOf", OWNER.address, self.token)[:3]  # type: ignore[no-any-return]

    def slash(self) -> tuple[int, Address, Address]:
        """(amount, victim, reporter) of the first slash."""
        found = self.world.workers.call("slash", 1)
        return found[2], found[3], found[4]

    def later(self, seconds: int) -> None:
        self.world.evm.set_time(self.world.evm.now + seconds)


@pytest.fixture
def scene(puppet: Deployment) -> Scene:
    return Scene(puppet)


def refused(name: str):  # type: ignore[no-untyped-def]
    return pytest.raises(Reverted, match=rf"^{name}\(")


# ------------------------------------------------------------------------------------------------------- the usual ways


def test_open_locks_the_amount_and_holds_the_penalty(scene: Scene) -> None:
    scene.open()
    assert scene.split() == (700, 0, 300)
    assert scene.stake() == (400, 0, PENALTY)
    assert scene.job() == (JobState.OPEN, 0, 0, ZERO_HASH)


def test_the_client_accepts_and_the_worker_is_paid_at_once(scene: Scene) -> None:
    scene.open()
    scene.submit(claimed=200)
    assert scene.job() == (JobState.SUBMITTED, scene.world.evm.now + 900, 200, RESULT)
    scene.settle(amount=250)
    assert scene.split() == (750, 250, 0)  # I6: paid and returned are all of it
    assert scene.stake() == (400, 0, 0)
    assert scene.job() == (JobState.SETTLED, 0, 0, RESULT)


def test_the_client_accepts_the_whole_before_any_submission(scene: Scene) -> None:
    scene.open()
    with refused("Jobs_BelowClaimed"):
        scene.settle(amount=AMOUNT - 1)
    scene.settle()
    assert scene.split() == (700, 300, 0)
    assert scene.job() == (JobState.SETTLED, 0, 0, RESULT)


def test_client_and_worker_need_no_signature_when_they_send_themselves(scene: Scene) -> None:
    scene.quote = replace(scene.quote, penalty=0)
    scene.open(client=b"", sender=ANN.address)
    scene.send("submit", RESULT, 10, b"", sender=WORKER.address)
    scene.send("settle", RESULT, 20, b"", sender=ANN.address)
    assert scene.split() == (980, 20, 0)


def test_silence_after_the_submission_pays_what_was_claimed(scene: Scene) -> None:
    """I5: not a second before the window has ended."""
    scene.open()
    scene.submit(claimed=100)
    scene.later(899)
    with refused("Jobs_TooEarly"):
        scene.send("finalize")
    scene.later(1)
    scene.send("finalize")
    assert scene.split() == (900, 100, 0)
    assert (scene.stake(), scene.job()) == ((400, 0, 0), (JobState.SETTLED, 0, 0, RESULT))


def test_silence_before_the_submission_refunds_and_slashes(scene: Scene) -> None:
    """I5: not a second before the deadline, and from then on no submission."""
    scene.open()
    scene.later(3599)
    with refused("Jobs_TooEarly"):
        scene.send("refund")
    scene.later(1)
    with refused("Jobs_TooLate"):
        scene.submit()
    scene.send("refund")
    assert (scene.split(), scene.stake()) == ((1000, 0, 0), (360, 0, 0))
    assert scene.slash() == (40, ANN.address, MALLORY.address)
    assert scene.job() == (JobState.REFUNDED, 0, 0, ZERO_HASH)
    scene.later(7 * DAY)
    scene.world.workers.send(MALLORY.address, "moveSlash", 1)
    assert [scene.balance(a) for a in (ANN.address, MALLORY.address, BURN)] == [1020, 10, 10]


@pytest.mark.parametrize("who", [WORKER, OWNER])
def test_an_honest_failure_costs_a_quarter_of_silence(scene: Scene, who: PrivateKey) -> None:
    scene.open()
    scene.send("fail", sender=who.address)
    assert (scene.split(), scene.stake()) == ((1000, 0, 0), (390, 0, 0))
    assert scene.slash() == (10, ANN.address, ZERO_ADDRESS)
    assert scene.job() == (JobState.REFUNDED, 0, 0, ZERO_HASH)


def test_an_honest_failure_is_said_before_the_deadline(scene: Scene) -> None:
    """Or silence could be turned into a failure by racing whoever asks for the refund."""
    scene.open()
    scene.later(3600)
    with refused("Jobs_TooLate"):
        scene.send("fail", sender=WORKER.address)


def test_taking_a_submission_back_costs_what_a_lost_dispute_costs(scene: Scene) -> None:
    """Or a worker could send anything, watch for the challenge, and run ahead of it for a quarter of the price."""
    scene.open()
    scene.submit()
    scene.later(3600)
    scene.send("fail", sender=WORKER.address)
    assert (scene.split(), scene.stake()) == ((1000, 0, 0), (360, 0, 0))
    assert scene.slash() == (PENALTY, ANN.address, ZERO_ADDRESS)
    assert scene.job() == (JobState.REFUNDED, 0, 0, ZERO_HASH)


def test_a_job_without_a_penalty_touches_no_stake(scene: Scene) -> None:
    for number, end in enumerate(("refund", "fail")):
        scene.quote = replace(scene.quote, penalty=0, salt=Hash32(bytes((number,)) * 32))
        scene.open()
        assert scene.stake() == (400, 0, 0)
        if end == "refund":
            scene.world.evm.set_time(scene.quote.deadline)
        scene.send(end, sender=WORKER.address)
        assert (scene.split(), scene.stake()) == ((1000, 0, 0), (400, 0, 0))
        scene.quote = replace(scene.quote, valid_before=FOREVER, deadline=scene.world.evm.now + 60)


def test_a_free_result_returns_everything(scene: Scene) -> None:
    scene.open()
    scene.submit(claimed=0)
    scene.later(900)
    scene.send("finalize")
    assert scene.split() == (1000, 0, 0)


# -------------------------------------------------------------------------------------------------------------- disputes


@pytest.mark.parametrize(("to_worker", "penalize"), [(0, True), (200, False), (100, False)])
def test_a_resolved_dispute_splits_the_job(scene: Scene, to_worker: int, penalize: bool) -> None:
    scene.disputed(claimed=200)
    assert scene.job()[0] is JobState.DISPUTED
    scene.by_module("resolve", to_worker, penalize)
    assert scene.split() == (1000 - to_worker, to_worker, 0)
    assert scene.stake() == (400 - penalize * PENALTY, 0, 0)
    if penalize:
        assert scene.slash() == (PENALTY, ANN.address, ANN.address)
    assert scene.job() == (JobState.SETTLED, 0, 0, RESULT)


def test_a_dispute_comes_within_the_window_and_pays_no_more_than_was_claimed(scene: Scene) -> None:
    scene.open()
    with refused("Jobs_WrongState"):
        scene.by_module("dispute")
    scene.submit(claimed=200)
    scene.later(900)
    with refused("Jobs_TooLate"):
        scene.by_module("dispute")
    scene.later(-1)
    found = scene.by_module("dispute").value
    assert found == (JobState.DISPUTED, scene.world.evm.now + 1, 200, RESULT)
    with refused("Jobs_OverAmount"):
        scene.by_module("resolve", 201, False)


def test_only_modules_dispute_and_resolve(scene: Scene) -> None:
    scene.open()
    scene.submit()
    for who in (ANN.address, WORKER.address, OWNER.address, scene.world.admin, MALLORY.address):
        for function, args in (("dispute", ()), ("resolve", (0, True))):
            with refused("Jobs_NotModule"):
                scene.send(function, *args, sender=who)


# ---------------------------------------------------------------------------------------------------- every wrong moment

ACTIONS: dict[str, Callable[[Scene], object]] = {
    "open": lambda s: s.open(),
    "submit": lambda s: s.submit(),
    "settle": lambda s: s.settle(),
    "finalize": lambda s: s.send("finalize"),
    "refund": lambda s: s.send("refund"),
    "fail": lambda s: s.send("fail", sender=WORKER.address),
    "dispute": lambda s: s.by_module("dispute"),
    "resolve": lambda s: s.by_module("resolve", 0, False),
}
ALLOWED = {
    JobState.NONE: {"open"},
    JobState.OPEN: {"submit", "settle", "refund", "fail"},
    JobState.SUBMITTED: {"settle", "finalize", "fail", "dispute"},
    JobState.DISPUTED: {"resolve"},
    JobState.SETTLED: set(),
    JobState.REFUNDED: set(),
}
WAYS: dict[str, tuple[JobState, tuple[str, ...]]] = {
    "none": (JobState.NONE, ()),
    "open": (JobState.OPEN, ("open",)),
    "submitted": (JobState.SUBMITTED, ("open", "submit")),
    "disputed": (JobState.DISPUTED, ("open", "submit", "dispute")),
    "settled at once": (JobState.SETTLED, ("open", "settle")),
    "settled": (JobState.SETTLED, ("open", "submit", "settle")),
    "resolved": (JobState.SETTLED, ("open", "submit", "dispute", "resolve")),
    "failed": (JobState.REFUNDED, ("open", "fail")),
    "taken back": (JobState.REFUNDED, ("open", "submit", "fail")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("action", ACTIONS)
def test_no_action_in_a_wrong_state(scene: Scene, way: str, action: str) -> None:
    """I3, I6: a quote opens once, an ended job never moves again; the refusal names the state that job() tells."""
    state, steps = WAYS[way]
    for step in steps:
        ACTIONS[step](scene)
    before = scene.split(), scene.stake(), scene.job()
    assert before[2][0] is state
    if action in ALLOWED[state]:
        return
    with pytest.raises(Reverted) as caught:
        ACTIONS[action](scene)
    assert caught.value.name == "Jobs_WrongState", caught.value
    assert caught.value.values == (scene.id, state)
    assert (scene.split(), scene.stake(), scene.job()) == before


def test_a_refunded_quote_never_opens_again(scene: Scene) -> None:
    """I3"""
    scene.quote = replace(scene.quote, valid_before=FOREVER)
    scene.open()
    scene.later(3600)
    scene.send("refund")
    for action in ("submit", "settle", "finalize", "refund", "fail", "dispute", "resolve"):
        with refused("Jobs_WrongState"):
            ACTIONS[action](scene)
    for moment in (0, -1):  # its deadline is over; and if the clock went back, its state
        scene.later(moment)
        with pytest.raises(Reverted, match=r"^Jobs_(DeadlineOutOfRange|WrongState)\("):
            scene.open()


# ----------------------------------------------------------------------------------------------------- terms of the quote


def bad_terms(now: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "Jobs_ZeroAddress", {"client": ZERO_ADDRESS}
    yield "Jobs_ZeroAddress", {"worker": ZERO_ADDRESS}
    yield "Jobs_ZeroAmount", {"amount": 0}
    yield "Jobs_Expired", {"valid_before": now}
    yield "Jobs_DeadlineOutOfRange", {"deadline": now}
    yield "Jobs_DeadlineOutOfRange", {"deadline": now + 30 * DAY + 1}
    yield "Jobs_WindowOutOfRange", {"window": 899}
    yield "Jobs_WindowOutOfRange", {"window": 7 * DAY + 1}
    yield "Vault_Insufficient", {"amount": 1001}
    yield "Vault_Insufficient", {"amount": 2**128 - 1}
    yield "Workers_OverExposure", {"penalty": 401}
    yield "Vault_Insufficient", {"token": NATIVE, "penalty": 0}


def test_terms_out_of_bounds_are_refused_and_the_bounds_themselves_are_not(scene: Scene) -> None:
    good, now = scene.quote, scene.world.evm.now
    for error, change in bad_terms(now):
        scene.quote = replace(good, **change)
        with refused(error):
            scene.open()
    for number, change in enumerate(
        ({"valid_before": now + 1}, {"deadline": now + 1}, {"deadline": now + 30 * DAY}, {"window": 7 * DAY})
    ):
        scene.quote = replace(good, amount=1, penalty=1, salt=Hash32(bytes((number + 1,)) * 32), **change)  # type: ignore[arg-type]
        scene.open()
    assert scene.split()[2] == 4


def test_what_is_asked_stays_within_what_was_quoted(scene: Scene) -> None:
    scene.open()
    with refused("Jobs_OverAmount"):
        scene.submit(claimed=AMOUNT + 1)
    for nothing in (ZERO_HASH, ONE):
        with refused("Jobs_NoResult"):
            scene.submit(result=nothing)
        with refused("Jobs_NoResult"):
            scene.settle(result=nothing)
    with refused("Jobs_OverAmount"):
        scene.settle(amount=AMOUNT + 1)
    scene.submit(claimed=200)
    with refused("Jobs_BelowClaimed"):
        scene.settle(amount=199)
    with refused("Jobs_OverAmount"):
        scene.settle(amount=AMOUNT + 1)
    for other in (OTHER, Hash32(RESULT[:9] + b"\0" * 23), ZERO_HASH):
        with refused("Jobs_WrongResult"):
            scene.settle(result=other)


def test_a_quote_with_dirty_bits_opens_nothing(scene: Scene) -> None:
    """The id is hashed over raw calldata, so that both could sign the id of a quote that no field fits: `open` reads them all."""
    scene.quote = replace(scene.quote, penalty=0)
    words = scene.jobs.encode("jobIdOf", quote_tuple(scene.quote))[4:]
    for word in range(1, 10):
        dirty = words[: 32 * word] + b"\x01" + words[32 * word + 1 :]
        struct = keccak256(keccak256(Quote.TYPE.encode()) + dirty)
        digest = keccak256(b"\x19\x01" + scene.world.jobs_domain.separator + struct)
        data = scene.jobs.encode("open", quote_tuple(scene.quote), WORKER.sign(digest), b"")
        with pytest.raises(Reverted) as caught:
            scene.world.evm.transact(ANN.address, scene.jobs.address, data[:4] + dirty + data[4 + len(words) :])
        assert (caught.value.name, caught.value.data) == ("", b""), word
    scene.open(client=b"", sender=ANN.address)


# ------------------------------------------------------------------------------------------------------------ who may what


def test_a_penalty_is_the_workers_to_put_at_risk(scene: Scene) -> None:
    """A client with a signed quote must not open what the worker's node never hears of, and be paid for the silence."""
    for sender in (ANN, MALLORY):
        with refused("Jobs_NotWorker"):
            scene.open(sender=sender.address)
    with scene.world.evm.undone():
        scene.open(sender=OWNER.address)
        assert scene.stake()[2] == PENALTY
    scene.open(sender=WORKER.address)
    scene.quote = replace(scene.quote, penalty=0, salt=OTHER)
    scene.open(sender=MALLORY.address)
    assert scene.stake()[2] == PENALTY


def test_a_retired_or_convicted_worker_opens_nothing_new_and_ends_what_it_has(scene: Scene) -> None:
    scene.open()
    first = scene.quote
    scene.world.workers.send(OWNER.address, "revoke", WORKER.address)
    for penalty in (0, 10):
        scene.quote = replace(first, penalty=penalty, salt=OTHER)
        with refused("Jobs_WorkerRetired"):
            scene.open()
    scene.world.workers.send(MALLORY.address, "convict", WORKER.address, RESULT, via=PUPPET)
    scene.quote = first
    scene.submit()
    scene.settle()
    assert scene.split() == (700, 300, 0)


def test_a_key_that_was_never_registered_works_without_a_penalty_and_is_paid_itself(scene: Scene) -> None:
    scene.quote = replace(scene.quote, worker=MALLORY.address)
    with refused("Workers_NotActive"):
        scene.open(worker=scene.sign(MALLORY, scene.quote))
    scene.quote = replace(scene.quote, penalty=0)
    scene.open(worker=scene.sign(MALLORY, scene.quote))
    scene.submit(signature=scene.sign(MALLORY, Submission(scene.id, RESULT, AMOUNT)))
    scene.settle()
    assert scene.balance(MALLORY.address) == 300
    scene.quote = replace(scene.quote, salt=OTHER)
    scene.open(worker=scene.sign(MALLORY, scene.quote))
    with refused("Jobs_NotWorker"):  # nobody is the owner of a key without one
        scene.send("fail", sender=ANN.address)


def test_only_the_worker_or_its_owner_fails_a_job(scene: Scene) -> None:
    scene.open()
    for who in (ANN.address, MALLORY.address, PAYOUT, scene.world.admin):
        with refused("Jobs_NotWorker"):
            scene.send("fail", sender=who)


def test_a_pause_stops_new_jobs_and_no_end(scene: Scene) -> None:
    """I9"""
    quotes = [replace(scene.quote, amount=50, penalty=10, salt=Hash32(bytes((n,)) * 32)) for n in range(6)]
    for scene.quote in quotes:
        scene.open()
    scene.vault.send(scene.world.admin, "setPaused", True)
    scene.quote = replace(scene.quote, salt=OTHER)
    with refused("Vault_Paused"):
        scene.open()
    for scene.quote in quotes[:4]:
        scene.submit(claimed=50)
    scene.quote = quotes[0]
    scene.settle(amount=50)
    scene.quote = quotes[1]
    scene.by_module("dispute")
    scene.by_module("resolve", 25, True)
    scene.quote = quotes[2]
    scene.send("fail", sender=WORKER.address)
    scene.quote = quotes[4]
    scene.send("fail", sender=WORKER.address)
    scene.later(3600)
    scene.quote = quotes[3]
    scene.send("finalize")
    scene.quote = quotes[5]
    scene.send("refund")
    assert scene.split()[2] == 0  # I12
    assert scene.stake()[2] == 0
    scene.later(7 * DAY)
    for number in range(1, 5):
        scene.world.workers.send(MALLORY.address, "moveSlash", number)
    scene.vault.send(ANN.address, "withdraw", scene.token, scene.balance(ANN.address), ANN.address)
    scene.vault.send(PAYOUT, "withdraw", scene.token, scene.balance(PAYOUT), PAYOUT)


def test_more_penalties_than_stake_are_never_held_and_every_end_frees_its_own(scene: Scene) -> None:
    """I7, I8: a slash that eats into what other jobs hold blocks none of their ends."""
    quotes = [replace(scene.quote, amount=1, penalty=190, salt=Hash32(bytes((n,)) * 32)) for n in range(3)]
    for scene.quote in quotes[:2]:
        scene.open()
    scene.quote = quotes[2]
    with refused("Workers_OverExposure"):
        scene.open()
    args = (WORKER.address, scene.token, 2**128 - 1, ANN.address, ANN.address, RESULT)
    for _ in range(9):  # down to nothing, while 380 are held
        scene.world.workers.send(MALLORY.address, "bookSlash", *args, via=PUPPET)
    assert scene.stake() == (1, 0, 380)
    scene.quote = quotes[0]
    scene.submit(claimed=1)
    scene.settle(amount=1)
    scene.quote = quotes[1]
    scene.later(3600)
    scene.send("refund")
    assert (scene.stake(), scene.split()) == ((1, 0, 0), (999, 1, 0))


# ---------------------------------------------------------------------------------------------------------- signature zoo


def forgeries(scene: Scene, who: PrivateKey, struct: Any, other: Any, stranger: Any) -> dict[str, bytes]:
    """Everything that is almost `who`'s signature of `struct`: `other` is of another job, `stranger` another struct."""
    good = scene.sign(who, struct)
    return {
        "high s": high_s(good),
        "v 0 or 1": good[:64] + bytes((good[64] - 27,)),
        "other v": good[:64] + bytes((55 - good[64],)),
        "v 29": good[:64] + b"\x1d",
        "EIP-2098": good[:32] + bytes((good[32] | (good[64] == 28) << 7,)) + good[33:64],
        "66 bytes": good + b"\0",
        "empty": b"",
        "zeros": bytes(65),
        "r 0": bytes(32) + good[32:],
        "other chain": scene.sign(who, struct, Domain(1, scene.jobs.address)),
        "other contract": scene.sign(who, struct, scene.world.domain),
        "other job": scene.sign(who, other),
        "other struct": scene.sign(who, stranger),
        "stranger": scene.sign(MALLORY, struct),
        "raw id": who.sign(scene.id),
    }


def test_signature_zoo_of_every_struct(scene: Scene) -> None:
    """I3, I4: one good form of a signature, one domain, one job, one key."""
    other = replace(scene.quote, salt=OTHER)
    far = other.job_id(scene.world.jobs_domain)
    for name, bad in forgeries(scene, WORKER, scene.quote, other, Order(scene.id)).items():
        if name == "raw id":  # a quote's digest is the id itself: this one is the good one
            continue
        with refused("Jobs_BadSignature"):
            scene.open(worker=bad)
    for bad in forgeries(scene, ANN, Order(scene.id), Order(far), scene.quote).values():
        with refused("Jobs_BadSignature"):
            scene.open(client=bad)
    scene.open()
    good = Submission(scene.id, RESULT, 200)
    for bad in forgeries(scene, WORKER, good, Submission(far, RESULT, 200), Acceptance(scene.id, RESULT, 200)).values():
        with refused("Jobs_BadSignature"):
            scene.submit(claimed=200, signature=bad)
    for almost in (replace(good, claimed=199), replace(good, result_hash=OTHER)):
        with refused("Jobs_BadSignature"):
            scene.submit(claimed=200, signature=scene.sign(WORKER, almost))
    whole = Acceptance(scene.id, RESULT, AMOUNT)
    for bad in forgeries(scene, ANN, whole, Acceptance(far, RESULT, AMOUNT), good).values():
        with refused("Jobs_BadSignature"):
            scene.settle(signature=bad)
    scene.submit(claimed=200)
    for almost in (replace(whole, amount=AMOUNT - 1), replace(whole, result_hash=OTHER)):
        with refused("Jobs_BadSignature"):
            scene.settle(signature=scene.sign(ANN, almost))
    with refused("Jobs_BadSignature"):  # the worker can not accept for the client
        scene.settle(signature=scene.sign(WORKER, whole))
    assert scene.split() == (700, 0, 300)
    scene.settle()


def test_signature_zoo_of_a_hot_key(scene: Scene) -> None:
    """I4, for the one struct that Workers reads."""
    world, domain = scene.world, scene.world.workers_domain
    hot = key("another hot key")
    good = HotKey(OWNER.address, hot.address, PAYOUT, 0, FOREVER)
    signature = hot.sign(good.digest(domain))
    bad = {
        "high s": high_s(signature),
        "v 0 or 1": signature[:64] + bytes((signature[64] - 27,)),
        "other v": signature[:64] + bytes((55 - signature[64],)),
        "EIP-2098": signature[:32] + bytes((signature[32] | (signature[64] == 28) << 7,)) + signature[33:64],
        "empty": b"",
        "zeros": bytes(65),
        "other chain": hot.sign(good.digest(Domain(1, world.workers.address))),
        "other contract": hot.sign(good.digest(world.domain)),
        "other owner": hot.sign(replace(good, owner=MALLORY.address).digest(domain)),
        "other payout": hot.sign(replace(good, payout=MALLORY.address).digest(domain)),
        "other nonce": hot.sign(replace(good, nonce=1).digest(domain)),
        "other deadline": hot.sign(replace(good, deadline=7).digest(domain)),
        "other key": WORKER.sign(good.digest(domain)),
    }
    for name, wrong in bad.items():
        with pytest.raises(Reverted) as caught:
            world.workers.send(OWNER.address, "register", hot.address, PAYOUT, FOREVER, wrong)
        assert caught.value.name == "Workers_BadSignature", name
    with refused("Workers_BadSignature"):  # the zero address signs nothing
        world.workers.send(OWNER.address, "register", ZERO_ADDRESS, PAYOUT, FOREVER, bytes(65))
    world.workers.send(OWNER.address, "register", hot.address, PAYOUT, FOREVER, signature)


# -------------------------------------------------------------------------------------------------- wallet and token zoos


def test_contract_wallets_order_accept_quote_and_submit(scene: Scene, zoo: Callable[..., Any]) -> None:
    """ERC-1271 on both sides; a wallet that reverts, burns gas or answers nonsense says no."""
    client, worker = zoo(scene.world, "Wallet", ANN.address), zoo(scene.world, "Wallet", WORKER.address)
    scene.world.token.send(ANN.address, "mint", ANN.address, 500)
    scene.vault.send(ANN.address, "deposit", scene.token, 500, client.address)
    scene.quote = replace(scene.quote, client=client.address, worker=worker.address, penalty=0)
    for wallet in (worker, client):
        for mood in range(1, 5):
            wallet.send(MALLORY.address, "setMood", mood)
            with refused("Jobs_BadSignature"):
                scene.open()
        wallet.send(MALLORY.address, "setMood", 0)
    scene.open()
    worker.send(MALLORY.address, "setMood", 2)
    with refused("Jobs_BadSignature"):
        scene.submit()
    worker.send(MALLORY.address, "setMood", 0)
    scene.submit()
    client.send(MALLORY.address, "setMood", 3)
    with refused("Jobs_BadSignature"):
        scene.settle()
    client.send(MALLORY.address, "setMood", 0)
    scene.settle()
    assert (scene.balance(client.address), scene.balance(worker.address)) == (200, 300)


def test_a_wallet_that_says_yes_to_all_orders_with_its_own_money_only(scene: Scene, zoo: Callable[..., Any]) -> None:
    """I10"""
    wallet = zoo(scene.world, "Wallet", MALLORY.address)
    wallet.send(MALLORY.address, "setMood", 5)
    scene.quote = replace(scene.quote, client=wallet.address)
    with refused("Vault_Insufficient"):
        scene.open(client=b"anything")


def deposited(world: Deployment, token: Any) -> None:
    """1,000 units of `token` for Ann and for the owner."""
    world.vault.send(world.admin, "setToken", token.address, True)
    for who in (ANN.address, OWNER.address):
        token.send(who, "mint", who, 1000)
        if "approve" in token.functions:
            token.send(who, "approve", world.vault.address, 1000)
        world.vault.send(who, "deposit", token.address, 1000, who)


@pytest.mark.parametrize("decimals", [0, 6, 18])
def test_a_job_in_a_token_of_any_decimals(puppet: Deployment, zoo: Callable[..., Any], decimals: int) -> None:
    """Contracts count units; halves and quarters of one unit are burnt or stay where they were (I11)."""
    token = zoo(puppet, "PausableToken", decimals)
    deposited(puppet, token)
    scene = Scene(puppet, token.address, amount=1, penalty=1)
    scene.open()
    scene.send("fail", sender=WORKER.address)
    assert scene.stake() == (400, 0, 0)  # a quarter of one unit is nothing
    scene.quote = replace(scene.quote, salt=OTHER)
    scene.open()
    scene.later(3600)
    scene.send("refund")
    scene.later(7 * DAY)
    puppet.workers.send(MALLORY.address, "moveSlash", 1)
    assert [scene.balance(a) for a in (ANN.address, MALLORY.address, BURN)] == [1000, 0, 1]
    assert scene.vault.call("liabilities", token.address) == 2000 == token.call("balanceOf", puppet.vault.address)


def test_a_token_stopped_by_its_issuer_stops_no_job(puppet: Deployment, zoo: Callable[..., Any]) -> None:
    """I12: modules move entries, not coins; only deposits and withdrawals wait."""
    token = zoo(puppet, "PausableToken", 6)
    deposited(puppet, token)
    scene = Scene(puppet, token.address)
    token.send(MALLORY.address, "setPaused", True)
    scene.open()
    scene.submit()
    scene.settle()
    assert scene.split() == (700, 300, 0)
    withdrawal = (PAYOUT, "withdraw", token.address, 300, PAYOUT)
    with pytest.raises(Reverted):
        scene.vault.send(*withdrawal)
    assert scene.balance(PAYOUT) == 300
    token.send(MALLORY.address, "setPaused", False)
    scene.vault.send(*withdrawal)


@pytest.mark.parametrize("name", ["FeeToken", "NoReturnToken", "ReentrantToken"])
def test_a_job_in_a_strange_token(puppet: Deployment, zoo: Callable[..., Any], name: str) -> None:
    """I1: what was credited is what is split; the rest of the market keeps every coin it is owed."""
    token = zoo(puppet, name)
    deposited(puppet, token)
    scene = Scene(puppet, token.address)
    if name == "ReentrantToken":
        attack = scene.jobs.encode("finalize", quote_tuple(scene.quote))
        token.send(MALLORY.address, "arm", scene.jobs.address, attack)
    whole = scene.balance(ANN.address)
    scene.open()
    scene.submit(claimed=200)
    scene.later(900)
    scene.send("finalize")
    assert scene.split() == (whole - 200, 200, 0)
    owed, coins = scene.vault.call("liabilities", token.address), token.call("balanceOf", puppet.vault.address)
    assert owed == coins == (1800 if name == "FeeToken" else 2000)
    if name == "ReentrantToken":  # the call back from inside a withdrawal finds an ended job
        with refused("Jobs_WrongState"):
            scene.vault.send(PAYOUT, "withdraw", token.address, 200, PAYOUT)
    else:
        scene.vault.send(PAYOUT, "withdraw", token.address, 200, PAYOUT)


def test_why_a_rebasing_token_must_not_be_listed(puppet: Deployment, zoo: Callable[..., Any]) -> None:
    """The ledger does not follow: what grows is nobody's, what shrinks is missed by the last to leave. Others lose nothing."""
    token = zoo(puppet, "RebasingToken")
    deposited(puppet, token)
    vault = puppet.vault
    token.send(MALLORY.address, "rebase", 110)
    assert vault.call("liabilities", token.address) == 2000
    assert token.call("balanceOf", vault.address) == 2200
    token.send(MALLORY.address, "rebase", 50)
    vault.send(ANN.address, "withdraw", token.address, 1000, ANN.address)
    with pytest.raises(Reverted):
        vault.send(OWNER.address, "withdraw", token.address, 1000, OWNER.address)
    puppet.fund(ANN.address, 7)
    vault.send(ANN.address, "withdraw", puppet.token.address, 7, ANN.address)


def test_a_false_token_and_a_silent_permit_bring_nothing(puppet: Deployment, zoo: Callable[..., Any]) -> None:
    """A fallback that swallows `permit` or an authorization credits nobody."""
    for name in ("FalseToken", "FallbackToken"):
        token = zoo(puppet, name)
        puppet.vault.send(puppet.admin, "setToken", token.address, True)
        if name == "FallbackToken":
            token.send(ANN.address, "mint", ANN.address, 1000)
        proof = (27, RESULT, OTHER)
        with pytest.raises(Reverted, match=r"^(SafeERC20FailedOperation|ERC20InsufficientAllowance)\("):
            puppet.vault.send(ANN.address, "depositWithPermit", token.address, 5, ANN.address, FOREVER, *proof)
        args = (token.address, ANN.address, 5, 0, FOREVER, RESULT, *proof)
        with pytest.raises(Reverted):
            puppet.vault.send(MALLORY.address, "depositWithAuthorization", *args)
        assert puppet.vault.call("liabilities", token.address) == 0
