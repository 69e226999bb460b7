"""Disputes on the shipped bytecode: equivocation, every row of the table, hostile resolvers, starved calls.

Numbers such as I6 are invariants of contracts/INVARIANTS.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from hypothesis import given, settings
from hypothesis import strategies as st

from node.testing.batch import CLIENT, DAY, EVIDENCE, OWNER, PAYOUT, PURSE, RESULT, STAKE, WORKER, Batch
from node.testing.contracts import Deployment, config_tuple, high_s, key, quote_tuple
from node.testing.evm import Contract, Reverted
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId, ModelId
from protocol.keys import PrivateKey
from protocol.typed_data import ChannelConfig, Domain, HotKey, Receipt

ZOO = Path(__file__).parent / "zoo"
MALLORY, FISHER = key("mallory"), key("fisher")
BURNT = Address(bytes(18) + b"\xde\xad")
NONE, ACCEPT, REJECT, DRAW = range(4)
HONEST, REVERTING, GAS_BURNER, RETURN_BOMB, SHORT, EMPTY, WILD, HIGH_BITS, REENTRANT, HUNGRY, MIND_CHANGER = range(11)


def refused(name: str):  # type: ignore[no-untyped-def]
    return pytest.raises(Reverted, match=rf"^{name}\(")


def zoo(world: Deployment, name: str, *args: object) -> Contract:
    artifact = json.loads((ZOO / f"{name}.json").read_text())
    return world.evm.deploy_code(
        artifact["abi"], bytes.fromhex(artifact["bytecode"][2:]), *args, sender=MALLORY.address
    )


class Court:
    """Jobs whose resolver is a strange one: it says and does what the test tells it."""

    def __init__(self, world: Deployment) -> None:
        self.world = world
        self.judge = zoo(world, "StrangeResolver")
        self.batch = Batch(world, self.judge.address)
        self.disputes = world.disputes

    def say(self, answer: int, *, begin: int = HONEST, outcome: int = HONEST) -> None:
        self.judge.send(MALLORY.address, "set", begin, outcome, answer)

    def books(self) -> dict[str, int]:
        """Free vault balances of everybody whom a dispute can pay."""
        people = {"client": CLIENT.address, "payout": PAYOUT, "judge": self.judge.address, "worker": WORKER.address}
        return {name: self.batch.balance(account) for name, account in people.items()}

    def moved(self, before: dict[str, int]) -> dict[str, int]:
        return {name: now - before[name] for name, now in self.books().items() if now != before[name]}

    def of(self, job: object) -> tuple[int, int, bool, int, int]:
        return self.disputes.call("disputeOf", self.batch.id(job))  # type: ignore[no-any-return, arg-type]

    def locked(self) -> int:
        return int(self.world.vault.call("lockedBy", self.disputes.address, self.batch.token))


@pytest.fixture
def court(deployment: Deployment) -> Court:
    return Court(deployment)


# ------------------------------------------------------------------------------------------------------------ the table

TABLE = {
    # outcome: (to the worker of 701 claimed, bond back to the client, fee, bond to the worker); the bond is 101
    ACCEPT: (0, 51, 50, 0),
    REJECT: (701, 0, 50, 51),
    DRAW: (350, 51, 50, 0),
    NONE: (350, 101, 0, 0),
}


@pytest.mark.parametrize("outcome", TABLE)
def test_every_row_of_the_table_pays_what_it_says(court: Court, outcome: int) -> None:
    to_worker, bond_back, fee, bond_to_worker = TABLE[outcome]
    job = court.batch.submitted(701, amount=1001)
    before = court.books()
    assert court.disputes.call("bondFor", quote_tuple(job)) == 101  # a tenth, rounded up
    court.batch.challenge(job)
    assert court.moved(before) == {"client": -101}
    assert court.locked() == 101
    court.say(outcome)
    with_silence = court.world.evm.now + 14 * DAY
    if outcome == NONE:
        court.world.evm.set_time(with_silence - 1)
        with refused("Disputes_Undecided"):
            court.batch.resolve(job)
        court.world.evm.set_time(with_silence)
    result = court.batch.resolve(job)
    assert dict(result.events)["DisputeResolved"] == {
        "jobId": court.batch.id(job),
        "outcome": outcome,
        "toWorker": to_worker,
        "bondBack": bond_back,
        "fee": fee,
    }
    client = 1001 - to_worker + bond_back - 101
    expected = {"client": client, "payout": to_worker + bond_to_worker, "judge": fee}
    assert court.moved(before) == {name: amount for name, amount in expected.items() if amount}  # I6, I11
    assert court.locked() == 0  # I12
    assert court.of(job) == (0, with_silence, True, outcome, fee)
    slashed = {ACCEPT: 500}.get(outcome, 0)
    stake = court.world.workers.call("stakeOf", OWNER.address, court.batch.token)
    assert stake[0] + stake[1] == STAKE - slashed
    assert stake[2] == 0  # nothing is held any more
    with refused("Disputes_Ended"):
        court.batch.resolve(job)


def test_an_answer_after_the_window_still_counts_until_somebody_says_silence(court: Court) -> None:
    job = court.batch.disputed()
    court.world.evm.set_time(court.world.evm.now + 20 * DAY)
    court.say(REJECT)
    court.batch.resolve(job)
    assert court.of(job)[3] == REJECT


def test_a_bond_is_at_least_one_unit_and_its_halves_never_lose_one(court: Court) -> None:
    job = court.batch.submitted(1, amount=1)
    assert court.disputes.call("bondFor", quote_tuple(job)) == 1
    before = court.books()
    court.batch.challenge(job)
    court.say(DRAW)
    court.batch.resolve(job)
    assert court.moved(before) == {"client": 1}  # half of one is nothing, for the worker and for the judge (I11)
    assert court.locked() == 0


@settings(max_examples=30, deadline=None)
@given(amount=st.integers(0, 2**128 - 1))
def test_the_bond_is_a_tenth_rounded_up(amount: int) -> None:
    world = _shared_world()
    quote = replace(Batch.quote(_batch_of(world)), amount=amount)
    assert world.disputes.call("bondFor", quote_tuple(quote)) == max(1, -(-amount // 10))


_worlds: list[Deployment] = []


def _shared_world() -> Deployment:
    import os

    from node.testing.evm import ARTIFACTS

    if not _worlds:
        _worlds.append(Deployment(Path(os.environ.get("CONTRACT_ARTIFACTS", ARTIFACTS))))
    return _worlds[0]


_batches: list[Batch] = []


def _batch_of(world: Deployment) -> Batch:
    if not _batches:
        _batches.append(Batch(world))
    return _batches[0]


# -------------------------------------------------------------------------------------------------- who may open, and when


def test_only_the_client_challenges_and_only_where_there_is_a_judge(court: Court) -> None:
    job = court.batch.submitted()
    for stranger in (MALLORY, WORKER, OWNER):
        with refused("Disputes_NotClient"):
            court.disputes.send(stranger.address, "open", quote_tuple(job), EVIDENCE)
    judgeless = court.batch.submitted(resolver=ZERO_ADDRESS)
    with refused("Disputes_NoResolver"):
        court.batch.challenge(judgeless)
    with refused("Disputes_NoDispute"):
        court.batch.resolve(job)
    court.batch.challenge(job)
    with refused("Jobs_WrongState"):  # one dispute per job
        court.batch.challenge(job)
    court.say(DRAW)
    court.batch.resolve(job)
    with refused("Jobs_WrongState"):
        court.batch.challenge(job)


def test_a_challenge_comes_after_the_submission_and_before_the_end_of_the_window(court: Court) -> None:
    job = court.batch.quote()
    with refused("Jobs_WrongState"):
        court.batch.challenge(job)
    court.batch.open(job)
    with refused("Jobs_WrongState"):
        court.batch.challenge(job)
    court.batch.submit(job, 10)
    end = court.world.evm.now + 3600
    late = court.batch.submitted()
    court.world.evm.set_time(end - 1)
    court.batch.challenge(job)
    court.world.evm.set_time(end)
    with refused("Jobs_TooLate"):
        court.batch.challenge(late)


def test_a_challenge_needs_the_bond_and_changes_nothing_without_it(court: Court) -> None:
    job = court.batch.submitted()
    court.world.vault.send(
        CLIENT.address, "withdraw", court.batch.token, court.batch.balance(CLIENT.address) - 99, MALLORY.address
    )
    with refused("Vault_Insufficient"):
        court.batch.challenge(job)
    assert court.of(job) == (0, 0, False, 0, 0)
    assert court.judge.call("begun") == 0
    court.world.fund(CLIENT.address, 1)
    court.batch.challenge(job)


def test_terms_that_differ_in_one_field_are_another_job(court: Court) -> None:
    job = court.batch.disputed()
    court.say(REJECT)
    for forged in (
        replace(job, amount=2000),
        replace(job, resolver=MALLORY.address),
        replace(job, worker=MALLORY.address),
    ):
        with refused("Disputes_NoDispute"):
            court.batch.resolve(forged)


def test_a_pause_stops_no_challenge_and_no_verdict(court: Court) -> None:
    job = court.batch.submitted()
    court.world.vault.send(court.world.admin, "setPaused", True)
    court.batch.challenge(job)  # I9: a bond is part of a way out
    court.say(ACCEPT)
    court.batch.resolve(job)


# ------------------------------------------------------------------------------------------------------ strange resolvers


@pytest.mark.parametrize("mood", [REVERTING, GAS_BURNER])
def test_a_resolver_that_does_not_take_the_case_stops_nobody(court: Court, mood: int) -> None:
    court.say(NONE, begin=mood)
    job = court.batch.submitted()
    opened = dict(court.batch.challenge(job).events)["DisputeOpened"]
    assert opened["resolverTook"] is False
    assert (opened["resolver"], opened["bond"], opened["evidence"]) == (court.judge.address, 100, EVIDENCE)


def test_a_resolver_hears_the_case_with_all_its_gas(court: Court) -> None:
    job = court.batch.submitted()
    assert dict(court.batch.challenge(job).events)["DisputeOpened"]["resolverTook"] is True
    assert court.judge.call("begun") == 1
    assert 399_000 < court.judge.call("gasSeen") <= 400_000


@pytest.mark.parametrize("mood", [REVERTING, GAS_BURNER, RETURN_BOMB, SHORT, EMPTY, WILD, HIGH_BITS])
def test_an_answer_that_is_none_of_three_words_is_silence(court: Court, mood: int) -> None:
    job = court.batch.disputed()
    court.say(ACCEPT, outcome=mood)
    with refused("Disputes_Undecided"):
        court.batch.resolve(job)
    court.world.evm.set_time(court.world.evm.now + 14 * DAY)
    before = court.books()
    court.batch.resolve(job)
    assert court.moved(before) == {"client": 600, "payout": 500}
    assert court.of(job)[2:] == (True, NONE, 0)


@pytest.mark.parametrize("resolver", [MALLORY.address, Address(bytes(19) + b"\2"), Address(bytes(19) + b"\4")])
def test_an_account_or_a_precompile_as_resolver_is_a_silent_one(court: Court, resolver: Address) -> None:
    job = court.batch.submitted(resolver=resolver)
    assert dict(court.batch.challenge(job).events)["DisputeOpened"]["resolverTook"] is False
    with refused("Disputes_Undecided"):
        court.batch.resolve(job)
    court.world.evm.set_time(court.world.evm.now + 14 * DAY)
    court.batch.resolve(job)
    assert court.of(job)[2:] == (True, NONE, 0)


def test_our_own_contracts_as_resolvers_do_nothing_for_the_challenger(court: Court) -> None:
    world = court.world
    for contract in (world.vault, world.workers, world.channels, world.jobs, world.disputes, world.token):
        job = court.batch.submitted(resolver=contract.address)
        before = court.books()
        court.batch.challenge(job)
        assert court.moved(before) == {"client": -100}
        with refused("Disputes_Undecided"):
            court.batch.resolve(job)


def test_a_resolver_that_changes_its_mind_is_believed_once(court: Court) -> None:
    job = court.batch.disputed()
    court.say(NONE, outcome=MIND_CHANGER)
    court.world.evm.set_time(court.world.evm.now // 2 * 2)
    court.batch.resolve(job)
    assert court.of(job)[3] == ACCEPT
    court.world.evm.set_time(court.world.evm.now + 1)
    with refused("Disputes_Ended"):
        court.batch.resolve(job)
    assert court.of(job)[3] == ACCEPT


def test_a_resolver_can_not_come_back_through_the_door(court: Court) -> None:
    job, other = court.batch.submitted(), court.batch.submitted()
    attacks = (
        (court.disputes, "resolve", quote_tuple(job)),
        (court.disputes, "open", quote_tuple(other), EVIDENCE),
        (court.world.jobs, "finalize", quote_tuple(job)),
        (court.world.jobs, "refund", quote_tuple(job)),
        (court.world.jobs, "dispute", quote_tuple(other)),
        (court.world.jobs, "resolve", quote_tuple(job), 1, True),
        (court.world.vault, "release", court.batch.token, MALLORY.address, 1),
    )
    for contract, function, *arguments in attacks:
        target = court.batch.submitted()
        if function in ("resolve", "finalize", "refund"):
            arguments[0] = quote_tuple(target)
        court.say(ACCEPT, begin=REENTRANT)
        court.judge.send(MALLORY.address, "arm", contract.address, contract.encode(function, *arguments))
        before = court.books()
        court.batch.challenge(target)
        assert court.judge.call("attackWorked") is False, function
        assert court.moved(before) == {"client": -100}
        assert court.of(target)[:4] == (100, court.world.evm.now + 14 * DAY, False, NONE)


def test_a_verdict_does_not_depend_on_the_state_of_the_call(court: Court) -> None:
    """While `resolve` asks, nothing has moved yet: a resolver that looks back sees the dispute open, and cannot write."""
    job = court.batch.disputed()
    court.judge.send(MALLORY.address, "arm", court.disputes.address, court.disputes.encode("resolve", quote_tuple(job)))
    court.say(NONE, outcome=REENTRANT)
    court.batch.resolve(job)
    assert court.of(job)[3] == DRAW  # its static call failed


# ------------------------------------------------------------------------------------------------------------ starved calls


def test_no_amount_of_gas_turns_a_case_into_one_that_was_not_taken(court: Court) -> None:
    """The resolver needs nearly all of its gas; whoever opens brings enough, or opens nothing."""
    court.say(NONE, begin=HUNGRY)
    took, starved = 0, 0
    for gas in range(440_000, 860_000, 10_000):
        job = court.batch.submitted()
        court.world.evm.gas_limit = gas
        try:
            opened = dict(court.batch.challenge(job).events)["DisputeOpened"]
        except Reverted as error:
            starved += error.name == "Disputes_NotEnoughGas"
        else:
            took += 1
            assert opened["resolverTook"] is True, gas
        finally:
            court.world.evm.gas_limit = 30_000_000
    assert took > 5
    assert starved > 5


def test_no_amount_of_gas_turns_a_verdict_into_silence(court: Court) -> None:
    """From `resolveBy` on silence would be a draw: the loser must not be able to make it."""
    jobs = [court.batch.disputed() for _ in range(40)]
    court.world.evm.set_time(court.world.evm.now + 14 * DAY)
    court.say(REJECT, outcome=HUNGRY)
    done = 0
    for job, gas in zip(jobs, range(60_000, 460_000, 10_000), strict=True):
        court.world.evm.gas_limit = gas
        try:
            court.batch.resolve(job)
        except Reverted:
            continue
        finally:
            court.world.evm.gas_limit = 30_000_000
        done += 1
        assert court.of(job)[3] == REJECT, gas
    assert 5 < done < 40


# -------------------------------------------------------------------------------------------------------------- equivocation


class Fraud:
    """A channel of the batch worker, and receipts under it that its hot key signs."""

    def __init__(self, world: Deployment, **changes: object) -> None:
        self.world = world
        self.batch = Batch(world)
        base = ChannelConfig(
            CLIENT.address, CLIENT.address, WORKER.address, WORKER.address, self.batch.token, 900, Hash32(bytes(32))
        )
        self.config = replace(base, **changes)  # type: ignore[arg-type]
        self.first = self.receipt()
        self.second = replace(self.first, output_digest=Hash32(b"\2" * 32))

    def receipt(self, sequence: int = 7) -> Receipt:
        some = Hash32(b"\1" * 32)
        return Receipt(
            JobId(some), 0, self.config.channel_id(self.world.domain), sequence, ModelId(some), some, some, some,
            10, 20, 30, some, 1, 2, 1,
        )  # fmt: skip

    def prove(
        self,
        first: Receipt | None = None,
        second: Receipt | None = None,
        *,
        signers: tuple[PrivateKey, PrivateKey] = (WORKER, WORKER),
        domain: Domain | None = None,
        signatures: tuple[bytes, bytes] | None = None,
        config: ChannelConfig | None = None,
    ) -> object:
        first, second = first or self.first, second or self.second
        if signatures is None:
            domain = domain or self.world.domain
            signatures = (signers[0].sign(first.digest(domain)), signers[1].sign(second.digest(domain)))
        return self.world.disputes.send(
            FISHER.address,
            "proveEquivocation",
            config_tuple(config or self.config),
            receipt_tuple(first),
            signatures[0],
            receipt_tuple(second),
            signatures[1],
        )


def receipt_tuple(receipt: Receipt) -> tuple[object, ...]:
    return tuple(getattr(receipt, name) for name in Receipt.__slots__)


@pytest.fixture
def fraud(deployment: Deployment) -> Fraud:
    return Fraud(deployment)


def test_python_and_solidity_agree_on_a_receipt(fraud: Fraud) -> None:
    top = replace(
        fraud.first, part=2**32 - 1, sequence=2**64 - 1, cost=2**128 - 1, started=2**64 - 1, finish_reason=255
    )
    for receipt in (fraud.first, top):
        found = fraud.world.disputes.call("receiptDigest", receipt_tuple(receipt))
        assert found == receipt.digest(fraud.world.domain)


def test_two_receipts_with_one_number_convict_the_key(fraud: Fraud) -> None:
    world, token = fraud.world, fraud.batch.token
    result = fraud.prove()
    events = dict(result.events)  # type: ignore[attr-defined]
    second = fraud.second.digest(world.domain)
    assert events["Equivocated"] == {
        "hotKey": WORKER.address,
        "channelId": fraud.config.channel_id(world.domain),
        "sequence": 7,
        "first": fraud.first.digest(world.domain),
        "second": second,
        "slashId": result.value,  # type: ignore[attr-defined]
    }
    owner, of, amount, victim, reporter, _, state, cause = world.workers.call("slash", result.value)  # type: ignore[attr-defined]
    assert (owner, of, victim, reporter, cause) == (OWNER.address, token, CLIENT.address, FISHER.address, second)
    assert (amount, state) == (STAKE // 2, 1)  # I7: by the cap, and booked, not moved
    assert world.workers.call("isConvicted", WORKER.address) is True
    assert world.workers.call("isActive", WORKER.address) is False
    world.evm.set_time(world.evm.now + 7 * DAY)
    world.workers.send(MALLORY.address, "moveSlash", result.value)  # type: ignore[attr-defined]
    assert fraud.batch.balance(FISHER.address) == STAKE // 8
    assert fraud.batch.balance(BURNT) == STAKE // 8


def test_a_key_is_convicted_once_whatever_else_it_signed(fraud: Fraud) -> None:
    fraud.prove()
    for sequence in (7, 8):
        first = fraud.receipt(sequence)
        with refused("Disputes_ConvictedBefore"):
            fraud.prove(first, replace(first, cost=99))
    with refused("Disputes_ConvictedBefore"):
        fraud.prove(fraud.second, fraud.first)  # the other way round


def test_a_proof_in_a_token_without_stake_shelters_no_stake(fraud: Fraud) -> None:
    """A worker that sees the proof coming convicts itself under a channel of its own, in a token that nobody staked."""
    world, token = fraud.world, fraud.batch.token
    mine = replace(fraud.config, token=Address(b"\x12" * 20), payer=MALLORY.address)
    first = replace(fraud.first, channel_id=mine.channel_id(world.domain))
    assert fraud.prove(first, replace(first, cost=99), config=mine).value == 0  # type: ignore[attr-defined]
    assert world.workers.call("isConvicted", WORKER.address) is True
    slash = world.workers.call("slash", fraud.prove().value)  # type: ignore[attr-defined]
    assert (slash[2], slash[3]) == (STAKE // 2, CLIENT.address)
    for config in (mine, fraud.config):
        again = replace(fraud.first, channel_id=config.channel_id(world.domain))
        with refused("Disputes_ConvictedBefore"):
            fraud.prove(again, replace(again, cost=99), config=config)
    assert world.workers.call("stakeOf", OWNER.address, token)[0] == STAKE - STAKE // 2


@pytest.mark.parametrize("how", ["revoke", "rotate"])
def test_a_key_that_is_long_gone_costs_nothing_any_more(fraud: Fraud, how: str) -> None:
    """As long as a stake answers after it began to leave; a thief of an old disk comes too late."""
    world = fraud.world
    if how == "revoke":
        world.workers.send(OWNER.address, "revoke", WORKER.address)
    else:
        fresh = key("fresh")
        consent = HotKey(OWNER.address, fresh.address, PAYOUT, 0, 2**40 - 1)
        signature = fresh.sign(consent.digest(world.workers_domain))
        world.workers.send(OWNER.address, "rotate", WORKER.address, fresh.address, 2**40 - 1, signature)
    world.evm.set_time(world.evm.now + 52 * DAY)
    with world.evm.undone():
        assert fraud.prove().value == 1  # type: ignore[attr-defined]
    world.evm.set_time(world.evm.now + 1)
    assert fraud.prove().value == 0  # type: ignore[attr-defined]
    assert world.workers.call("isConvicted", WORKER.address) is True
    assert world.workers.call("stakeOf", OWNER.address, fraud.batch.token)[0] == STAKE


def test_what_is_not_two_receipts_of_one_number_proves_nothing(fraud: Fraud) -> None:
    other = replace(fraud.config, salt=Hash32(b"\7" * 32))
    elsewhere = replace(fraud.second, channel_id=other.channel_id(fraud.world.domain))
    same = fraud.first
    for first, second in (
        (same, same),
        (same, replace(fraud.second, sequence=8)),
        (same, elsewhere),
        (elsewhere, same),
        (replace(same, channel_id=elsewhere.channel_id), elsewhere),
    ):
        with refused("Disputes_NoEquivocation"):
            fraud.prove(first, second)
    with refused("Disputes_NoEquivocation"):
        fraud.prove(config=other)


def test_only_the_receivers_own_key_convicts_it(fraud: Fraud) -> None:
    for signers in ((WORKER, MALLORY), (MALLORY, WORKER), (MALLORY, MALLORY), (CLIENT, CLIENT)):
        with refused("Disputes_BadSignature"):
            fraud.prove(signers=signers)
    first, second = (WORKER.sign(r.digest(fraud.world.domain)) for r in (fraud.first, fraud.second))
    v0 = second[:64] + bytes((second[64] - 27,))
    for bad in (high_s(second), v0, second[:64], second + b"\0", b"", bytes(65), first):
        with refused("Disputes_BadSignature"):
            fraud.prove(signatures=(first, bad))
        with refused("Disputes_BadSignature"):
            fraud.prove(signatures=(bad if bad != first else second, second))
    for domain in (Domain(1, fraud.world.domain.verifying_contract), Domain(fraud.world.evm.chain_id, MALLORY.address)):
        with refused("Disputes_BadSignature"):
            fraud.prove(domain=domain)


def test_a_payer_can_not_convict_by_an_authorizer_of_its_choice(deployment: Deployment) -> None:
    fraud = Fraud(deployment, receiver_authorizer=CLIENT.address)
    with refused("Disputes_BadSignature"):
        fraud.prove(signers=(CLIENT, CLIENT))
    fraud.prove()


def test_a_wallet_that_says_yes_to_all_is_no_key(deployment: Deployment) -> None:
    wallet = zoo(deployment, "Wallet", CLIENT.address)
    fraud = Fraud(deployment, receiver=wallet.address)
    with refused("Disputes_BadSignature"):
        fraud.prove(signers=(CLIENT, CLIENT))
    wallet.send(MALLORY.address, "setMood", 5)
    with refused("Disputes_BadSignature"):
        fraud.prove(signers=(CLIENT, CLIENT))


def test_the_zero_address_is_nobodys_key(deployment: Deployment) -> None:
    fraud = Fraud(deployment, receiver=ZERO_ADDRESS)
    with refused("Disputes_BadSignature"):
        fraud.prove(signatures=(bytes(65), bytes(65)))


def test_a_key_without_owner_or_stake_is_convicted_all_the_same(deployment: Deployment) -> None:
    lone = key("lone worker")
    fraud = Fraud(deployment, receiver=lone.address)
    result = fraud.prove(signers=(lone, lone))
    assert result.value == 0  # type: ignore[attr-defined]
    assert deployment.workers.call("isConvicted", lone.address) is True


def test_purse_is_whole_after_a_conviction(fraud: Fraud) -> None:
    """I7: a slash takes from the stake and never from a free balance."""
    before = fraud.batch.balance(OWNER.address)
    fraud.prove()
    assert fraud.batch.balance(OWNER.address) == before == PURSE - STAKE


# ---------------------------------------------------------------------------------------------------------------- verifier


def proof(verdict: int, spec: bytes, result: bytes = RESULT) -> bytes:
    return bytes((verdict,)) + spec + result


def test_a_proof_decides_once_and_its_bringer_is_paid(deployment: Deployment) -> None:
    world = deployment
    judge = world.evm.deploy(
        "VerifierResolver",
        world.vault.address,
        world.jobs.address,
        world.disputes.address,
        zoo(world, "ProofStub").address,
        sender=MALLORY.address,
    )
    batch = Batch(world, judge.address)
    for verdict, outcome in ((1, REJECT), (2, ACCEPT)):
        job = batch.disputed()
        job_id, good = batch.id(job), proof(verdict, job.spec_hash)
        assert judge.call("outcome", job_id) == NONE
        for nothing in (b"", proof(0, job.spec_hash), proof(verdict, RESULT), proof(verdict, job.spec_hash, EVIDENCE)):
            with refused("VerifierResolver_ShowsNothing"):
                judge.send(MALLORY.address, "prove", job_id, nothing)
        with pytest.raises(Reverted):  # no verdict has this number
            judge.send(MALLORY.address, "prove", job_id, proof(3, job.spec_hash))
        judge.send(FISHER.address, "prove", job_id, good)
        for again in (1, 2):
            with refused("VerifierResolver_Proven"):
                judge.send(MALLORY.address, "prove", job_id, proof(again, job.spec_hash))
        assert judge.call("outcome", job_id) == outcome
        with refused("VerifierResolver_NoFee"):  # not resolved yet
            judge.send(FISHER.address, "claimFee", quote_tuple(job), FISHER.address)
        batch.resolve(job)
        assert world.disputes.call("disputeOf", job_id)[3:] == (outcome, 50)
        with refused("VerifierResolver_NotProver"):
            judge.send(MALLORY.address, "claimFee", quote_tuple(job), MALLORY.address)
        before = world.token.call("balanceOf", FISHER.address)
        judge.send(FISHER.address, "claimFee", quote_tuple(job), FISHER.address)
        assert world.token.call("balanceOf", FISHER.address) - before == 50
        with refused("VerifierResolver_NoFee"):
            judge.send(FISHER.address, "claimFee", quote_tuple(job), FISHER.address)
    assert batch.balance(judge.address) == 0


def test_a_verifier_takes_cases_from_disputes_only(deployment: Deployment) -> None:
    world = deployment
    arguments = (world.vault.address, world.jobs.address, world.disputes.address, zoo(world, "ProofStub").address)
    judge = world.evm.deploy("VerifierResolver", *arguments, sender=MALLORY.address)
    with refused("VerifierResolver_NotDisputes"):
        judge.send(MALLORY.address, "begin", RESULT, RESULT, RESULT, RESULT)
    with refused("VerifierResolver_Unknown"):
        judge.send(MALLORY.address, "prove", RESULT, proof(1, RESULT))
    for missing in range(4):
        wrong = (*arguments[:missing], MALLORY.address, *arguments[missing + 1 :])
        with refused("VerifierResolver_NotAContract"):
            world.evm.deploy("VerifierResolver", *wrong, sender=MALLORY.address)
