"""Batch jobs between real workers and clients on a network and a chain in memory: every way a job can end, with crashes, lies and
silence. Each ends in an audit, with the money where docs/spec/batch.md says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio

from node.audit import audit
from node.client import job_fetch
from node.client.client import Client
from node.client.job_quotes import JobWish
from node.client.jobs import Job
from node.client.settings import ClientSettings
from node.errors import ConfigError, InsufficientFunds, JobFailed, NodeError, NoWorker, WorkerFault
from node.network.drive import converse
from node.testing.fake_backend import FAKE_MODEL, FakeBackend, FakeSettings
from node.testing.market import PENALTY, Market, key, run_market
from node.worker import batch_run
from node.worker.allowance import Limits
from node.worker.batch import BatchRules
from node.worker.batch_quotes import HELD_EACH
from node.worker.batch_run import RunSettings
from node.worker.worker import Worker, WorkerSettings
from protocol import escrow
from protocol.batch import BatchState, Timing
from protocol.channel import Role
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode
from protocol.escrow import JobState, Module, Outcome, SlashState
from protocol.ids import Address, Hash32, JobId
from protocol.messages import (
    BATCH_PROTOCOL,
    AcceptJob,
    BatchRefusal,
    ChatMessage,
    FinishReason,
    GetResult,
    JobStatus,
    OpenJob,
    Params,
    QueryJob,
    QuoteMessage,
    RequestCancel,
    RequestQuote,
    amount_to_wire,
    quote_from_wire,
)
from protocol.pricing import batch_cost
from protocol.typed_data import Acceptance, Order
from protocol.workload import NOT_BEGUN, PLACE, BatchSpec, ResultItem, content_hash, encode_spec

DEPOSIT = 10_000_000
RESOLVER = Address(b"\x08" * 20)
LINES = [f"line number {n}" for n in range(10)]
OWNER = key("owner")
FAST = Timing(submit_margin=2, accept_grace=1, settle_patience=1, finalize_patience=1, dispute_margin=2)


def settings(market: Market, **given: Any) -> WorkerSettings:
    """A worker's defaults with quick times and a resolver."""
    usual = market.settings()
    if usual.batch is None:
        raise AssertionError
    quotes = replace(
        usual.batch.quotes, resolvers=usual.batch.quotes.resolvers | {RESOLVER}, margin_s=2, min_duration=4
    )
    run = RunSettings(margin_s=2, pause_s=0.02, piece_s=0.05, **given)
    return replace(usual, batch=replace(usual.batch, quotes=quotes, run=run, timing=FAST))


async def pair(
    market: Market, backend: FakeBackend | None = None, *, name: str = "", tokens: int = 6, **given: Any
) -> tuple[Worker, Client]:
    """A worker whose answers are shorter than what is asked for, so that the claim is below the amount; and a client."""
    worker = await market.worker(
        backend or FakeBackend(FakeSettings(tokens=tokens)), settings(market, **given), name=name and f"{name} w"
    )
    return worker, await a_client(market, name=name)


async def a_client(market: Market, *, name: str = "", deposit: int = DEPOSIT, meet: bool = True) -> Client:
    quick = ClientSettings(jobs=FAST, job_poll_s=0.05, job_reread_s=0.1)
    return await market.client(settings=quick, name=name and f"{name} c", deposit=deposit, meet=meet)


def stake(market: Market, worker: Worker, amount: int = 10_000) -> None:
    """An owner stakes for the worker and allows it all to be held."""
    ledger, hot, now = market.ledger, worker.key.address, market.ledger.head.timestamp

    def change(world: Any, _: int) -> Any:
        state = escrow.register(world.escrow, now, OWNER.address, hot, hot, now + 1, hot)
        state = escrow.deposit(state, ledger.token, amount, OWNER.address)
        state = escrow.stake(state, OWNER.address, ledger.token, amount)
        funded = world.pay(ledger.token, ledger.vault, amount)
        return replace(funded, escrow=escrow.set_exposure(state, OWNER.address, ledger.token, amount)), []

    ledger.apply(change)


async def until(true: Callable[[], Any]) -> None:
    with trio.fail_after(20):
        while not true():
            await trio.sleep(0.005)


def on_chain(market: Market, job: Job) -> escrow.Job:
    return market.ledger.world.escrow.job(job.job_id)


def events(market: Market) -> list[str]:
    names = ("Opened", "Submitted", "JobsSettled", "Refunded", "Failed", "Disputed")
    return [event.name for event in market.ledger.canonical_events() if event.name in names]


def earned(market: Market, worker: Worker) -> int:
    return market.ledger.world.escrow.balance_of(market.ledger.token, worker.key.address)


def theirs(worker: Worker, job: Job) -> BatchState:
    if worker.batch is None:
        raise AssertionError
    return worker.batch.book.jobs[job.job_id]


async def clean(market: Market, *nodes: Client | Worker) -> None:
    """Both journals agree with the contract, nothing is locked, each job was paid at most once."""
    state = market.ledger.world.escrow
    assert state.locked_by(Module.JOBS, market.ledger.token) == 0
    assert state.locked_by(Module.DISPUTES, market.ledger.token) == 0
    settled = [
        e.args["jobId"] for e in market.ledger.canonical_events() if e.name in ("JobsSettled", "Refunded", "Failed")
    ]
    assert len(settled) == len(set(settled))
    for node in nodes:
        book = node.jobs.book if isinstance(node, Client) else node.batch.book  # type: ignore[union-attr]
        await until(lambda book=book: all(job.ended for job in book.jobs.values()))  # type: ignore[misc]
        await node.book.change([])
        chains = node.wallet.chains if isinstance(node, Client) else node.chains
        assert await audit(node.book.ledger, node.book.role, chains) == []
    assert market.failures == {}


def cost_of(market: Market, inputs: int, input_tokens: int, output_tokens: int) -> int:
    return batch_cost(market.price, inputs, input_tokens, output_tokens)


# --------------------------------------------------------------------------------------------------- how it should be


def test_a_job_is_quoted_locked_run_submitted_verified_and_paid_to_the_unit() -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market)
        job = await client.post_job("fake", LINES, id="mine", max_tokens=8, wish=JobWish(reward=5_000))
        words = sum(len(line.split()) + 1 for line in LINES)  # the fake tokenizer counts words, "user:" among them
        assert job.state.quote.amount == cost_of(market, 10, words, 80)
        items = await job.result(20)
        assert [item.finish_reason for item in items] == [FinishReason.STOP] * 10
        assert len({item.text for item in items}) == len({len(line) for line in LINES}) or items[0].text
        await until(lambda: job.state.ended)
        paid = cost_of(market, 10, words, 60)
        assert (await client.balance(), earned(market, worker)) == (DEPOSIT - paid, paid)
        assert job.state.paid == paid and theirs(worker, job).paid == paid
        assert events(market) == ["Opened", "Submitted", "JobsSettled"]
        await clean(market, worker, client)

    run_market(test)


def test_a_claim_of_the_whole_amount_is_settled_without_a_submission() -> None:
    """B4."""

    async def test(market: Market) -> None:
        worker, client = await pair(market, tokens=40)
        job = await client.post_job("fake", LINES, max_tokens=8)
        await job.result(20)
        await until(lambda: job.state.ended)
        assert events(market) == ["Opened", "JobsSettled"]
        assert earned(market, worker) == job.state.quote.amount == job.state.paid
        await clean(market, worker, client)

    run_market(test)


def test_the_same_name_is_the_same_job_and_another_job_is_refused_the_name() -> None:
    """B9."""

    async def test(market: Market) -> None:
        worker, client = await pair(market)
        first = await client.post_job("fake", LINES, id="mine", max_tokens=8)
        again = await client.post_job("fake", LINES, id="mine", max_tokens=8)
        assert again.job_id == first.job_id
        await first.result(20)
        third = await client.post_job("fake", LINES, id="mine", max_tokens=8)
        assert third.job_id == first.job_id and await third.result(5) == await first.result(5)
        with pytest.raises(ConfigError, match="another job"):
            await client.post_job("fake", [*LINES, "one more"], id="mine", max_tokens=8)
        await until(lambda: first.state.ended)
        assert events(market).count("Opened") == 1
        await clean(market, worker, client)

    run_market(test)


def test_a_cancelled_job_pays_for_what_was_done() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=4, seconds_per_token=0.02))
        worker, client = await pair(market, backend, streams=1)
        job = await client.post_job("fake", [*LINES] * 20, max_tokens=4)
        await until(lambda: job.told and job.told.done >= 2)
        await job.cancel()
        items = await job.result(20)
        done = [item for item in items if item != NOT_BEGUN]
        assert 2 <= len(done) < 200 and len(items) == 200
        await until(lambda: job.state.ended)
        assert earned(market, worker) == cost_of(market, len(done), 4 * len(done), 4 * len(done))
        await clean(market, worker, client)
        with pytest.raises(ConfigError, match="ended"):
            await job.cancel()

    run_market(test)


# ------------------------------------------------------------------------------------------------------------ silence


def test_a_client_that_is_silent_after_the_result_pays_by_the_window() -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market, name="a")
        job = await client.post_job("fake", LINES, max_tokens=8)
        market.crash(client)
        await until(lambda: on_chain(market, job).state is JobState.SUBMITTED)
        claimed = on_chain(market, job).claimed
        market.ledger.advance(900)
        await until(lambda: on_chain(market, job).state is JobState.SETTLED)
        assert earned(market, worker) == claimed
        # It comes back: it paid, so it gets its result, verified.
        back = await a_client(market, name="a", deposit=0)
        job = back.jobs.all()[0]
        await until(lambda: job.state.ended)
        assert len(await job.result(10)) == len(LINES)
        assert job.state.accepted is None and job.state.paid == claimed
        await clean(market, worker, back)

    run_market(test)


def test_a_worker_that_is_silent_is_refunded_by_itself_and_its_owner_slashed() -> None:
    """B6."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=6, seconds_per_token=5))
        worker, client = await pair(market, backend)
        stake(market, worker)
        job = await client.post_job("fake", LINES, max_tokens=8, wish=JobWish(min_penalty=400))
        assert market.ledger.world.escrow.stake_of(OWNER.address, market.ledger.token).held == 400
        market.crash(worker)
        market.ledger.advance(3600)
        await until(lambda: on_chain(market, job).state is JobState.REFUNDED)
        with pytest.raises(JobFailed, match="no result"):
            await job.result(5)
        assert await client.balance() == DEPOSIT
        slashes = market.ledger.world.escrow.slashes.values()
        assert [(s.amount, s.victim, s.reporter, s.state) for s in slashes] == [
            (400, client.wallet.payer.address, client.wallet.payer.address, SlashState.BOOKED)
        ]
        await clean(market, client)

    run_market(test)


def test_a_worker_that_cannot_says_so_and_loses_a_quarter() -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market, FakeBackend(FakeSettings(tokens=6, fail_after=2)))
        stake(market, worker)
        job = await client.post_job("fake", LINES, max_tokens=8, wish=JobWish(min_penalty=400))
        with pytest.raises(JobFailed, match="no result"):
            await job.result(20)
        assert theirs(worker, job).failure == "the model runtime failed"
        assert events(market) == ["Opened", "Failed"]
        assert [s.amount for s in market.ledger.world.escrow.slashes.values()] == [100]
        assert await client.balance() == DEPOSIT
        await clean(market, worker, client)

    run_market(test)


def test_a_job_that_cannot_be_done_in_time_is_given_up_before_its_deadline() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=6, seconds_per_token=0.01))
        worker, client = await pair(market, backend, streams=1)
        stake(market, worker)
        wish = JobWish(min_penalty=400, deadline_s=6)
        job = await client.post_job("fake", LINES * 60, max_tokens=6, wish=wish)
        with pytest.raises(JobFailed):
            await job.result(20)
        assert "time is too short" in theirs(worker, job).failure
        assert market.ledger.head.timestamp < job.state.quote.deadline
        assert [s.amount for s in market.ledger.world.escrow.slashes.values()] == [100]
        await clean(market, worker, client)

    run_market(test)


def test_an_order_that_was_never_opened_is_void_and_its_name_free() -> None:
    """B9."""

    async def test(market: Market) -> None:
        worker, client = await pair(market)
        if worker.batch is None:
            raise AssertionError
        honest = worker.batch.desk._order

        async def deaf(*_: Any) -> Any:
            raise RemoteProtocolError(WireCode.INTERNAL, "planted")

        worker.batch.desk._order = deaf  # type: ignore[method-assign]
        with pytest.raises(NodeError, match="has not opened"):
            await client.post_job("fake", LINES, id="mine", max_tokens=8, wish=JobWish(open_s=0.3))
        market.ledger.advance(130)
        old = client.jobs.get("mine")
        await until(lambda: old.state.void)
        assert await client.balance() == DEPOSIT
        worker.batch.desk._order = honest  # type: ignore[method-assign]
        job = await client.post_job("fake", LINES, id="mine", max_tokens=8)
        assert job.job_id != old.job_id
        await job.result(20)
        await until(lambda: job.state.ended)
        await clean(market, worker, client)

    run_market(test)


# ------------------------------------------------------------------------------------------------------------ crashes


def test_a_worker_that_is_killed_in_the_middle_goes_on_and_computes_little_twice() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=4, seconds_per_token=0.004))
        worker, client = await pair(market, backend, name="a", piece_items=4)
        job = await client.post_job("fake", LINES * 8, max_tokens=8)
        await until(lambda: worker.batch and worker.batch.runner.done(job.job_id) >= 30)
        market.crash(worker)
        assert theirs(worker, job).result is None
        second = FakeBackend(FakeSettings(tokens=4))
        again = await market.worker(second, settings(market), name="a w")
        await client.meet(again.network.addresses[0])
        items = await job.result(20)
        assert len(items) == 80 and all(item.finish_reason is FinishReason.STOP for item in items)
        assert second.produced <= (80 - 24) * 4, "what was on disk was not computed again"
        await until(lambda: job.state.ended)
        assert job.state.paid == cost_of(market, 80, 80 * 4, 80 * 4)
        await clean(market, again, client)

    run_market(test)


@pytest.mark.parametrize("when", ["kept", "journaled"])
def test_a_worker_that_dies_between_result_and_submission_submits_the_same(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B2."""

    async def test(market: Market) -> None:
        worker, client = await pair(market, name="a")
        if worker.batch is None:
            raise AssertionError
        honest, seen = worker.batch.book.change, []

        async def change(changes: Any, *, also: Any = None) -> None:
            kept = [c for c in changes if type(c).__name__ == "BatchResultKept"]
            if kept and when == "kept":
                seen.append(worker.results.get(bytes(kept[0].job_id)))
                market.crash(worker)
                await trio.sleep_forever()
            await honest(changes, also=also)
            if kept and when == "journaled":
                seen.append(worker.results.get(bytes(kept[0].job_id)))
                market.crash(worker)
                await trio.sleep_forever()

        worker.batch.book.change = change  # type: ignore[method-assign]
        job = await client.post_job("fake", LINES, max_tokens=8)
        await until(lambda: seen)
        # Another answer now, if it computed again.
        again = await market.worker(FakeBackend(FakeSettings(tokens=3)), settings(market), name="a w")
        await client.meet(again.network.addresses[0])
        await job.result(20)
        assert again.results.get(bytes(job.job_id)) == seen[0]
        assert on_chain(market, job).result_hash == content_hash(seen[0])
        await until(lambda: job.state.ended)
        market.failures.clear()
        await clean(market, again, client)

    run_market(test)


def test_a_client_that_is_killed_goes_on_from_its_journal() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=6, seconds_per_token=0.01))
        worker, client = await pair(market, backend, name="a")
        job = await client.post_job("fake", LINES, id="mine", max_tokens=8)
        market.crash(client)
        await until(lambda: on_chain(market, job).state is JobState.SUBMITTED)
        back = await a_client(market, name="a", deposit=0, meet=False)
        again = back.jobs.get("mine")
        assert again.job_id == job.job_id
        assert len(await again.result(20)) == len(LINES)
        await until(lambda: again.state.ended)
        same = await back.post_job("fake", LINES, id="mine", max_tokens=8)
        assert same.job_id == job.job_id
        assert events(market) == ["Opened", "Submitted", "JobsSettled"]
        await clean(market, worker, back)

    run_market(test)


def test_an_order_journaled_and_never_sent_is_sent_after_the_restart() -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market, name="a")

        async def die(*_: Any) -> Any:
            market.crash(client)
            raise WorkerFault("planted")

        client.jobs.steps._send_order = die  # type: ignore[method-assign]
        with pytest.raises((NodeError, ExceptionGroup)):
            await client.post_job("fake", LINES, id="mine", max_tokens=8, wish=JobWish(open_s=1))
        assert events(market) == []
        back = await a_client(market, name="a", deposit=0)
        job = await back.post_job("fake", LINES, id="mine", max_tokens=8)
        await job.result(20)
        await until(lambda: job.state.ended)
        assert events(market) == ["Opened", "Submitted", "JobsSettled"]
        market.failures.clear()
        await clean(market, worker, back)

    run_market(test)


# ---------------------------------------------------------------------------------------------------------- bad results


Cheat = Callable[[Market, Worker, pytest.MonkeyPatch], None]


def other_bytes(market: Market, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serves bytes that are not those of the hash."""
    honest = worker.results.piece
    monkeypatch.setattr(
        worker.results, "piece", lambda job, at, size: (honest(job, at, size) or b"")[:-1] + b"x" if at == 0 else b""
    )


def few_items(market: Market, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submits fewer items than inputs."""
    honest = batch_run.BatchResult
    monkeypatch.setattr(
        batch_run, "BatchResult", lambda spec_hash, items: honest(spec_hash=spec_hash, items=items[:-1])
    )


def unfinished(market: Market, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submits an input that it never ran."""
    honest = batch_run.BatchResult
    monkeypatch.setattr(
        batch_run, "BatchResult", lambda spec_hash, items: honest(spec_hash=spec_hash, items=(NOT_BEGUN, *items[1:]))
    )


def greedy(market: Market, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims more than its tokens cost."""
    honest = batch_run.claim_of
    monkeypatch.setattr(batch_run, "claim_of", lambda terms, items: honest(terms, items) + 1)


def padded(market: Market, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says that an answer ended for its length, which it has not."""
    honest = batch_run.BatchResult

    def make(spec_hash: bytes, items: tuple[ResultItem, ...]) -> Any:
        first = ResultItem(items[0].token_ids, items[0].text, FinishReason.LENGTH)
        return honest(spec_hash=spec_hash, items=(first, *items[1:]))

    monkeypatch.setattr(batch_run, "BatchResult", make)


@pytest.mark.parametrize("cheat", [other_bytes, few_items, unfinished, greedy, padded])
@pytest.mark.parametrize("outcome", Outcome)
def test_a_bad_result_is_never_accepted_and_a_dispute_ends_by_the_table(
    cheat: Cheat, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B4."""

    async def test(market: Market) -> None:
        worker, client = await pair(market)
        stake(market, worker)
        cheat(market, worker, monkeypatch)
        job = await client.post_job("fake", LINES, max_tokens=8, wish=JobWish(min_penalty=400, resolver=RESOLVER))
        await until(lambda: job.state.chain is JobState.SUBMITTED)
        if cheat is not other_bytes:
            with pytest.raises(JobFailed, match="not its result"):
                await job.result(10)
        else:
            with pytest.raises(NodeError):
                await job.result(0.5)
        claimed, bond = job.state.claimed, escrow.bond_for(job.state.quote)
        await job.dispute(Hash32(b"\x05" * 32))
        assert job.state.chain is JobState.DISPUTED
        assert await client.balance() == DEPOSIT - job.state.quote.amount - bond
        if outcome is Outcome.NONE:
            market.ledger.advance(15 * 24 * 3600)
        else:
            market.ledger.findings[job.job_id] = outcome
        await until(lambda: job.state.ended)
        to_worker = {Outcome.ACCEPT: 0, Outcome.REJECT: claimed}.get(outcome, claimed // 2)
        back = {Outcome.REJECT: 0, Outcome.NONE: bond}.get(outcome, bond - bond // 2)
        share = bond - bond // 2 if outcome is Outcome.REJECT else 0
        assert job.state.paid == to_worker
        assert earned(market, worker) == to_worker + share
        assert await client.balance() == DEPOSIT - to_worker - bond + back
        slashed = [s.amount for s in market.ledger.world.escrow.slashes.values()]
        assert slashed == ([400] if outcome is Outcome.ACCEPT else [])
        assert job.state.accepted is None
        await clean(market, worker, client)

    run_market(test)


def test_a_worker_that_serves_wrong_bytes_at_first_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market)
        with monkeypatch.context() as patch:
            other_bytes(market, worker, patch)
            job = await client.post_job("fake", LINES, max_tokens=8)
            await until(lambda: "not those of the result" in client.jobs.steps.troubles.get(job.job_id, ""))
        await job.result(20)
        await until(lambda: job.state.ended)
        await clean(market, worker, client)

    run_market(test)


@pytest.mark.parametrize("lie", ["dearer", "other terms", "other job", "miscounted", "forged"])
def test_a_quote_that_is_not_what_was_asked_is_refused(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market)
        if worker.batch is None:
            raise AssertionError
        desk, honest = worker.batch.desk, worker.batch.desk._quote

        async def quote(peer: Any, question: RequestQuote) -> Any:
            match lie:
                case "dearer":
                    ((where, one),) = worker.batch.quotes.assets.items()  # type: ignore[union-attr]
                    changed = replace(one, price=msgspec.structs.replace(one.price, output=one.price.output + 1))
                    monkeypatch.setattr(worker.batch.quotes, "assets", {where: changed})  # type: ignore[union-attr]
                case "miscounted":
                    monkeypatch.setattr(
                        worker.batch.quotes,
                        "_tokenise",
                        lambda spec: (100_000,) * len(spec.inputs),  # type: ignore[union-attr]
                    )
            answer = await honest(peer, question)
            match lie:
                case "other terms":
                    return msgspec.structs.replace(answer, terms=answer.terms[:-1] + b"\x02")
                case "other job":
                    wire = msgspec.structs.replace(answer.quote, window=answer.quote.window + 1)
                    return msgspec.structs.replace(answer, quote=wire)
                case "forged":
                    return msgspec.structs.replace(answer, signature=client.session.sign(bytes(32)))
            return answer

        desk._quote = quote  # type: ignore[method-assign]
        with pytest.raises(NoWorker):
            await client.post_job("fake", LINES, max_tokens=8, wish=JobWish(reward=2_000_000))
        assert client.jobs.all() == [] and await client.balance() == DEPOSIT

    run_market(test)


# ----------------------------------------------------------------------------------------------------- strangers, bounds


class Asker:
    """A hand that speaks the protocol without a client's restraint."""

    def __init__(self, market: Market, worker: Worker, name: str, *, payer: str = "", funds: int = DEPOSIT) -> None:
        self.key = key(name)
        self.payer = key(payer or f"{name} payer")
        self.market = market
        self.worker = worker
        self.network = market.hub.join(self.key.peer_id)
        self.deposit(funds)

    def deposit(self, amount: int) -> None:
        ledger, payer = self.market.ledger, self.payer.address
        if amount:
            ledger.apply(
                lambda world, _: (replace(world, escrow=escrow.deposit(world.escrow, ledger.token, amount, payer)), [])
            )

    async def ask(self, question: msgspec.Struct) -> Any:
        peer = await self.network.connect(self.worker.network.addresses[0])
        return await converse(self.network, peer, BATCH_PROTOCOL, question, timeout_s=10)

    def question(self, spec: BatchSpec | None = None, **changed: Any) -> RequestQuote:
        ledger = self.market.ledger
        question = RequestQuote(
            spec=encode_spec(spec or spec_of(LINES)),
            client=bytes(self.payer.address),
            chain_id=ledger.jobs_domain.chain_id,
            contract=bytes(ledger.jobs_domain.verifying_contract),
            token=bytes(ledger.token),
            max_amount=amount_to_wire(10**9),
            min_penalty=amount_to_wire(0),
            deadline=ledger.head.timestamp + 3600,
            window=900,
            resolver=bytes(20),
        )
        return msgspec.structs.replace(question, **changed)

    async def quote(self, spec: BatchSpec | None = None, **changed: Any) -> QuoteMessage:
        answer = await self.ask(self.question(spec, **changed))
        assert isinstance(answer, QuoteMessage), answer
        return answer

    def order(self, answer: QuoteMessage) -> OpenJob:
        domain = self.market.ledger.jobs_domain
        job_id = quote_from_wire(answer.quote).job_id(domain)
        return OpenJob(job_id=bytes(job_id), order=self.payer.sign(Order(job_id).digest(domain)))

    async def refused(self, question: msgspec.Struct) -> RefusalReason:
        answer = await self.ask(question)
        assert isinstance(answer, BatchRefusal), answer
        return answer.reason


def spec_of(lines: list[str], **params: Any) -> BatchSpec:
    return BatchSpec(
        model_id=bytes(FAKE_MODEL),
        params=Params(**{"max_tokens": 8, **params}),
        messages=(ChatMessage(role="user", content=PLACE),),
        inputs=tuple(lines),
    )


def test_every_refusal_has_its_reason() -> None:
    async def test(market: Market) -> None:
        worker, _ = await pair(market)
        asker = Asker(market, worker, "asker")
        now = market.ledger.head.timestamp
        R = RefusalReason
        cases: list[tuple[RefusalReason, RequestQuote]] = [
            (R.NO_BATCH, asker.question(contract=b"\x01" * 20)),
            (R.NO_BATCH, asker.question(chain_id=5)),
            (R.WRONG_DOMAIN, asker.question(token=b"\x01" * 20)),
            (R.DEADLINE_INVALID, asker.question(deadline=now + 1)),
            (R.DEADLINE_INVALID, asker.question(deadline=now + 31 * 86400)),
            (R.TERMS_UNACCEPTABLE, asker.question(window=899)),
            (R.TERMS_UNACCEPTABLE, asker.question(window=8 * 86400)),
            (R.TERMS_UNACCEPTABLE, asker.question(resolver=b"\x01" * 20)),
            (R.TERMS_UNACCEPTABLE, asker.question(min_penalty=amount_to_wire(PENALTY + 1))),
            (R.TERMS_UNACCEPTABLE, asker.question(min_penalty=amount_to_wire(PENALTY))),  # nothing is staked
            (R.OVER_BUDGET, asker.question(max_amount=amount_to_wire(1))),
            (R.MODEL_UNKNOWN, asker.question(msgspec.structs.replace(spec_of(LINES), model_id=bytes(32)))),
            (R.PROMPT_INVALID, asker.question(spec_of(["fine", " "]))),
            (R.CONTEXT_EXCEEDED, asker.question(spec_of(["fine", "word " * 8190]))),
            (R.MAX_TOKENS_EXCEEDED, asker.question(spec_of(["fine"], max_tokens=100_000))),
        ]
        for reason, question in cases:
            assert await asker.refused(question) is reason, reason
        if worker.batch is None:
            raise AssertionError
        usual = worker.batch.quotes.rules
        assets = worker.batch.quotes.assets
        ((where, asset),) = assets.items()
        worker.batch.quotes.assets = {where: replace(asset, min_amount=10**6)}
        assert await asker.refused(asker.question()) is R.BELOW_MINIMUM
        worker.batch.quotes.assets = assets
        worker.batch.quotes.rules = replace(usual, max_jobs=0)
        assert await asker.refused(asker.question()) is R.BUSY
        worker.batch.quotes.rules = usual
        worker.results._max_bytes = 1000
        assert await asker.refused(asker.question()) is R.JOB_TOO_LARGE
        worker.results._max_bytes = 256 << 20
        worker.batch.desk.draining = True
        assert await asker.refused(asker.question()) is R.DRAINING
        worker.batch.desk.draining = False
        worker.batch.desk._rules = BatchRules(chain_age_limit_ms=-1)
        assert await asker.refused(asker.question()) is R.CHAIN_STALE

    run_market(test)


def test_a_job_is_its_askers_and_nobody_elses() -> None:
    """B12."""

    async def test(market: Market) -> None:
        worker, _ = await pair(market, FakeBackend(FakeSettings(tokens=6, seconds_per_token=0.02)))
        asker, thief = Asker(market, worker, "asker"), Asker(market, worker, "thief", funds=0)
        order = asker.order(await asker.quote())
        job_id = order.job_id
        unknown = RefusalReason.JOB_UNKNOWN
        assert await thief.refused(order) is unknown, "the order is the asker's"
        with pytest.raises(RemoteProtocolError, match="order is signed by"):
            await asker.ask(
                OpenJob(job_id=job_id, order=thief.payer.sign(Order(JobId(job_id)).digest(market.ledger.jobs_domain)))
            )
        status = await asker.ask(order)
        assert isinstance(status, JobStatus) and status.state == JobState.OPEN and len(status.transaction) == 32
        assert (await asker.ask(order)).transaction == b"", "sent again it changes nothing"
        assert await asker.refused(GetResult(job_id=job_id, offset=0)) is RefusalReason.RESULT_NOT_READY
        acceptance = AcceptJob(job_id=job_id, result_hash=bytes(32), amount=amount_to_wire(1), signature=bytes(65))
        for question in (
            order,
            QueryJob(job_id=job_id),
            GetResult(job_id=job_id, offset=0),
            acceptance,
            RequestCancel(job_id=job_id),
        ):
            assert await thief.refused(question) is unknown
        await until(lambda: worker.batch and worker.batch.book.get(job_id) and worker.batch.book.get(job_id).result)  # type: ignore[union-attr]
        assert await thief.refused(GetResult(job_id=job_id, offset=0)) is unknown
        # The client's own key may ask as well: a session key can get lost.
        owner = Asker(market, worker, "asker payer", payer="asker payer", funds=0)
        assert (await owner.ask(QueryJob(job_id=job_id))).done == len(LINES)
        # An acceptance by somebody else, of something else or of too little moves nothing.
        kept = (await asker.ask(QueryJob(job_id=job_id))).result_hash
        domain = market.ledger.jobs_domain
        for hash_, amount, signer in ((kept, 10**6, thief), (bytes(32), 10**6, asker), (kept, 1, asker)):
            said = Acceptance(JobId(job_id), Hash32(hash_), amount)
            message = AcceptJob(
                job_id=job_id,
                result_hash=hash_,
                amount=amount_to_wire(amount),
                signature=signer.payer.sign(said.digest(domain)),
            )
            with pytest.raises(RemoteProtocolError):
                await asker.ask(message)
        state = worker.batch.book.get(job_id) if worker.batch else None
        assert state is not None and state.accepted is None and earned(market, worker) == 0

    run_market(test)


def test_what_strangers_can_make_a_worker_open_is_bounded() -> None:
    """B11."""

    async def test(market: Market) -> None:
        worker, _ = await pair(market, FakeBackend(FakeSettings(tokens=6, seconds_per_token=1)))
        if worker.batch is None:
            raise AssertionError
        asker, other = Asker(market, worker, "asker"), Asker(market, worker, "other")
        from node.worker.allowance import Allowance

        worker.batch.desk._opens = Allowance(Limits(2, 86_400, 3, 3600, "jobs to be opened"))
        opened = 0
        for who, good in ((asker, True), (asker, True), (asker, False), (other, True), (other, False)):
            answer = await who.ask(who.order(await who.quote()))
            assert isinstance(answer, JobStatus if good else BatchRefusal), answer
            opened += good
        assert len(events(market)) == opened == 3
        poor = Asker(market, worker, "poor", funds=0)
        assert await poor.refused(poor.order(await poor.quote())) is RefusalReason.FUNDS_INSUFFICIENT
        stranger = Asker(market, worker, "stranger", funds=0)
        nothing = OpenJob(job_id=b"\x01" * 32, order=bytes(65))
        assert await stranger.refused(nothing) is RefusalReason.JOB_UNKNOWN
        assert len(worker.batch.book.jobs) == 3, "what is not opened leaves nothing in the journal"

    run_market(test)


def test_quotes_held_are_bounded_and_forgotten() -> None:
    async def test(market: Market) -> None:
        worker, _ = await pair(market)
        asker = Asker(market, worker, "asker")
        held = [await asker.quote() for _ in range(HELD_EACH)]
        assert await asker.refused(asker.question()) is RefusalReason.BUSY
        market.ledger.advance(121)
        assert await asker.refused(asker.order(held[0])) is RefusalReason.JOB_UNKNOWN
        await asker.quote()
        assert len(worker.batch.quotes._held) == 1  # type: ignore[union-attr]

    run_market(test)


def test_characters_to_tokenise_are_bounded() -> None:
    async def test(market: Market) -> None:
        usual = settings(market)
        if usual.batch is None:
            raise AssertionError
        quotes = replace(usual.batch.quotes, characters=Limits(1000, 3600, 2000, 3600, "characters to be tokenised"))
        worker = await market.worker(settings=replace(usual, batch=replace(usual.batch, quotes=quotes)))
        asker = Asker(market, worker, "asker")
        await asker.quote(spec_of(["x" * 900]))
        assert await asker.refused(asker.question(spec_of(["x" * 900]))) is RefusalReason.BUSY
        await Asker(market, worker, "b").quote(spec_of(["x" * 900]))
        third = Asker(market, worker, "c")
        assert await third.refused(third.question(spec_of(["x" * 900]))) is RefusalReason.BUSY

    run_market(test)


def test_a_quote_outlives_the_worker() -> None:
    """J1: who holds a quote can have the job opened, also after a restart."""

    async def test(market: Market) -> None:
        worker, _ = await pair(market, name="a")
        asker = Asker(market, worker, "asker")
        order = asker.order(await asker.quote())
        market.crash(worker)
        asker.worker = await market.worker(FakeBackend(FakeSettings(tokens=6)), settings(market), name="a w")
        assert isinstance(await asker.ask(order), JobStatus)
        await until(lambda: market.ledger.world.escrow.job(JobId(order.job_id)).state is JobState.SUBMITTED)

    run_market(test)


def test_a_client_without_funds_is_told_what_is_missing() -> None:
    async def test(market: Market) -> None:
        await market.worker(settings=settings(market))
        client = await a_client(market, deposit=100)
        with pytest.raises(InsufficientFunds, match="holds 100"):
            await client.post_job("fake", LINES, max_tokens=8)
        rich = await a_client(market)
        with pytest.raises(NoWorker) as caught:
            await rich.post_job("fake", LINES, max_tokens=8, wish=JobWish(reward=5))
        assert "over_budget" in str(caught.value.reasons)
        with pytest.raises(ConfigError, match="no message has a place"):
            await rich.post_job("fake", LINES, messages=[{"role": "user", "content": "no place"}])
        assert rich.jobs.all() == []

    run_market(test)


def test_a_worker_at_work_is_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is news, and news must not lead to the next question at once."""

    async def test(market: Market) -> None:
        asked, ask = 0, job_fetch.ask

        async def counted(*args: Any) -> Any:
            nonlocal asked
            asked += 1
            return await ask(*args)

        monkeypatch.setattr(job_fetch, "ask", counted)
        worker = await market.worker(FakeBackend(FakeSettings(tokens=200, seconds_per_token=0.005)), settings(market))
        quick = ClientSettings(jobs=FAST, job_poll_s=0.2, job_reread_s=0.4)
        client = await market.client(settings=quick, deposit=DEPOSIT)
        begun = trio.current_time()
        job = await client.post_job("fake", LINES[:4], max_tokens=200)
        await job.result(20)
        took = trio.current_time() - begun
        assert took > 1, "the job was too quick to tell"
        assert asked <= 6 + 2 * took / 0.2
        await until(lambda: job.state.ended)
        await clean(market, worker, client)

    run_market(test)


# ----------------------------------------------------------------------------------------------------- beside live streams


def test_live_streams_come_first() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=400, seconds_per_token=0.002, slots=4))
        worker, client = await pair(market, backend)
        job = await client.post_job("fake", LINES[:2], max_tokens=400)
        await until(lambda: worker.batch and worker.batch.runner.active == 2)
        assert worker.server.free_slots == 4, "what batch items use is free for streams"
        async with client.chat("fake", [{"role": "user", "content": "hello"}], max_tokens=400) as stream:
            await stream.__anext__()
            await trio.sleep(0.1)
            before = backend.produced, stream.usage.output_tokens
            await trio.sleep(0.3)
            batch = backend.produced - before[0] - (stream.usage.output_tokens - before[1])
            assert batch <= 60, "items pause while a stream runs"
            await stream.text()
        await job.result(20)
        await until(lambda: job.state.ended and not worker.server.busy)
        await clean(market, worker, client)

    run_market(test)


def test_memory_is_freed_for_a_stream() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=300, seconds_per_token=0.002))
        worker, client = await pair(market, backend)
        job = await client.post_job("fake", LINES[:2], max_tokens=300)
        await until(lambda: worker.batch and worker.batch.runner.active == 2)
        fits = backend.fits

        def crowded(prompt: Any, max_tokens: int) -> bool:
            return fits(prompt, max_tokens) and (max_tokens == 300 or backend._active == 0)

        backend.fits = crowded  # type: ignore[method-assign]
        async with client.chat("fake", [{"role": "user", "content": "hello"}], max_tokens=20) as stream:
            await stream.text()
        del backend.fits
        await job.result(20)
        await until(lambda: job.state.ended)

    run_market(test)


# ------------------------------------------------------------------------------------------------------- chain trouble


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_reorganisation_is_lived_through(depth: int) -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market)
        job = await client.post_job("fake", LINES, max_tokens=8)
        await job.result(20)
        await until(lambda: job.state.ended)
        market.ledger.reorg(depth, keep=False)
        if depth < 3:  # the opening still stands
            await until(lambda: on_chain(market, job).state is JobState.SETTLED)
            await until(lambda: job.state.ended and theirs(worker, job).ended)
            assert job.state.paid == earned(market, worker)
        else:  # the order is good until its time is over: the client sends it again
            await until(lambda: on_chain(market, job).state in (JobState.SETTLED, JobState.NONE))

    run_market(test)


def test_a_chain_that_fails_now_and_then_stops_nothing() -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market, FakeBackend(FakeSettings(tokens=6, seconds_per_token=0.01)))
        job = await client.post_job("fake", LINES, max_tokens=8)
        for _ in range(6):
            market.ledger.fail_next(3)
            await trio.sleep(0.1)
        await job.result(20)
        await until(lambda: job.state.ended)
        await clean(market, worker, client)

    run_market(test)


# ----------------------------------------------------------------------------------------------------------------- audit


def test_the_audit_sees_what_is_wrong() -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market)
        job = await client.post_job("fake", LINES, max_tokens=8)
        await job.result(20)
        await until(lambda: job.state.ended and theirs(worker, job).ended)
        await client.book.change([]), await worker.book.change([])
        honest = market.ledger.canonical_events
        market.ledger.canonical_events = lambda: [  # type: ignore[method-assign]
            replace(e, args={**e.args, "paid": e.args["paid"] + 1}) if e.name == "JobsSettled" else e for e in honest()
        ]
        for node, chains in ((client, client.wallet.chains), (worker, worker.chains)):
            findings = await audit(node.book.ledger, node.book.role, chains)
            assert len(findings) == 1 and "was paid" in findings[0]

    run_market(test)


def test_the_audit_sees_a_job_that_nobody_ends() -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market, FakeBackend(FakeSettings(tokens=6, seconds_per_token=5)), name="a")
        await client.post_job("fake", LINES, max_tokens=8)
        market.crash(worker)
        market.crash(client)
        market.ledger.advance(4000)
        from node.store.ledger import Ledger

        path = market.folder / "a-c" / "journal.sqlite"
        ledger = Ledger.open(path, chain_tag=bytes(client.wallet.payer.address), read_only=True)
        findings = await audit(ledger, Role.CLIENT, client.wallet.chains)
        assert len(findings) == 1 and "still open" in findings[0]

    run_market(test)
