"""Batch jobs between real workers and clients on a network and a chain in memory: every way a job can end, with crashes, lies and
silence. Each ends in an audit, with the money where docs/spec/batch.md says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio

from node.audit import audit
from node.chain.memory import Events, World
from node.chain.memory_jobs import MemoryJobs
from node.client import job_fetch
from node.client.client import Client
from node.client.job import Job
from node.client.job_quotes import JobWish
from node.client.settings import ClientSettings
from node.errors import (
    ConfigError,
    InsufficientFunds,
    JobFailed,
    NodeError,
    NoWorker,
    SignerFailed,
    SignerOutdated,
    SignerRefused,
    WorkerFault,
)
from node.network.drive import converse, serve_one
from node.signer.journal import BEGUN
from node.store.ledger import Entry, Ledger
from node.testing.fake_backend import FAKE_MODEL, FakeBackend, FakeSettings
from node.testing.market import PENALTY, Market, key, run_market
from node.worker import batch_run
from node.worker.allowance import Limits
from node.worker.batch import BatchRules
from node.worker.batch_job import piece_key
from node.worker.batch_pace import Share
from node.worker.batch_quotes import HELD_EACH, spec_key
from node.worker.batch_run import RunSettings
from node.worker.desk import Speed
from node.worker.worker import Worker, WorkerSettings
from protocol import escrow
from protocol.batch import BatchState, Timing
from protocol.channel import Role
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode
from protocol.escrow import JobState, Module, Outcome, SlashState
from protocol.ids import Address, Hash32, JobId
from protocol.messages import (
    BATCH_PROTOCOL,
    Abort,
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
from protocol.signing import SigningReason
from protocol.tame import tame
from protocol.typed_data import Acceptance, Order, Quote
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
        usual.batch.quotes, resolvers=usual.batch.quotes.resolvers | {RESOLVER}, margin_s=2, min_duration=4, open_s=1
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


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (JobWish(reward=1, min_penalty=400, resolver=RESOLVER), "not 1 at most"),
        (JobWish(min_penalty=401, resolver=RESOLVER), "400 of stake answers for it, not 401"),
        (JobWish(min_penalty=400), f"{RESOLVER} judges a dispute, not nobody"),
        (JobWish(min_penalty=400, resolver=RESOLVER, window_s=901), "its window is 900 s, not 901"),
    ],
)
def test_a_name_whose_job_has_other_terms_is_no_name_for_these(other: JobWish, words: str) -> None:
    """Who posts with a penalty and a judge would think to have both."""

    async def test(market: Market) -> None:
        worker, client = await pair(market)
        stake(market, worker)
        wish = JobWish(reward=100_000, min_penalty=400, resolver=RESOLVER)
        job = await client.post_job("fake", LINES, id="x", max_tokens=8, wish=wish)
        with pytest.raises(ConfigError, match=words):
            await client.post_job("fake", LINES, id="x", max_tokens=8, wish=other)
        for same in (wish, replace(wish, reward=None, deadline_s=60), replace(wish, reward=job.state.quote.amount)):
            assert (await client.post_job("fake", LINES, id="x", max_tokens=8, wish=same)).job_id == job.job_id
        assert events(market).count("Opened") == 1

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


def test_a_job_that_is_cancelled_at_once_still_pays_for_its_transactions() -> None:
    """Who orders and cancels makes the worker open and submit: it goes on until that is worth the least it takes for a job."""

    async def test(market: Market) -> None:
        least, each = 500, cost_of(market, 1, 4, 4)
        usual = settings(market, streams=1)
        usual = replace(usual, accepts=(market.accepted(min_job=least),))
        backend = FakeBackend(FakeSettings(tokens=4, seconds_per_token=0.002))
        worker, client = await market.worker(backend, usual), await a_client(market)
        job = await client.post_job("fake", LINES * 10, max_tokens=8)
        await job.cancel()
        await job.result(20)
        await until(lambda: job.state.ended)
        assert least <= earned(market, worker) < least + each
        small = await client.post_job("fake", LINES * 2, max_tokens=8)  # worth it only with more output than there is
        await small.cancel()
        assert NOT_BEGUN not in await small.result(20), "all of it is less than the least"
        await until(lambda: small.state.ended)
        await clean(market, worker, client)

    run_market(test)


def test_a_cancelled_job_that_cannot_go_on_ends_with_what_there_is() -> None:
    async def test(market: Market) -> None:
        usual = settings(market, streams=1)
        usual = replace(usual, accepts=(market.accepted(min_job=10**3),))
        backend = FakeBackend(FakeSettings(tokens=4, seconds_per_token=0.002))
        worker, client = await market.worker(backend, usual), await a_client(market)
        stake(market, worker)
        job = await client.post_job("fake", LINES * 10, max_tokens=8, wish=JobWish(min_penalty=400))
        await until(lambda: worker.batch and worker.batch.runner.done(job.job_id) >= 3)
        backend.settings.fail_after = 1
        await job.cancel()
        items = await job.result(20)
        done = sum(item != NOT_BEGUN for item in items)
        assert 3 <= done < len(items)
        await until(lambda: job.state.ended)
        assert earned(market, worker) == cost_of(market, done, 4 * done, 4 * done)
        assert not market.ledger.world.escrow.slashes
        await clean(market, worker, client)

    run_market(test)


def test_a_payment_that_cannot_have_been_is_not_journaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers alone and lies about the event: the job ends in the journal when one tells what can be."""

    async def test(market: Market) -> None:
        worker, client = await pair(market)
        honest = MemoryJobs.paid
        asked = []

        async def lying(self: MemoryJobs, quote: Quote) -> int:
            asked.append(quote)
            return quote.amount + 1

        monkeypatch.setattr(MemoryJobs, "paid", lying)
        job = await client.post_job("fake", LINES, max_tokens=8)
        await until(lambda: len(asked) > 4)
        assert on_chain(market, job).state is JobState.SETTLED
        assert not job.state.ended and not theirs(worker, job).ended
        monkeypatch.setattr(MemoryJobs, "paid", honest)
        await until(lambda: job.state.ended)
        assert job.state.paid == earned(market, worker)
        await clean(market, worker, client)

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


def test_what_a_worker_says_of_itself_gives_no_orders_to_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """Its failure, its refusals and its reasons for breaking off reach errors, logs and screens as plain words."""
    evil = "\x1b[2J\x1b]52;c;cm0gLXJm\x07lost\nINFO all paid"

    async def test(market: Market) -> None:
        worker, client = await pair(market, FakeBackend(FakeSettings(seconds_per_token=5)))
        job = await client.post_job("fake", LINES, max_tokens=8)

        async def answer(_: Any, question: msgspec.Struct) -> msgspec.Struct:
            if isinstance(question, RequestCancel):
                raise RemoteProtocolError(WireCode.INTERNAL, "planted")
            if answers:
                return answers.pop()
            honest: msgspec.Struct = await worker.batch.desk._status(theirs(worker, job))  # type: ignore[union-attr]
            return msgspec.structs.replace(honest, failure=evil)

        answers: list[msgspec.Struct] = []
        worker.network.handlers[BATCH_PROTOCOL] = lambda stream: serve_one(stream, BATCH_PROTOCOL, answer, timeout_s=5)
        stop_keeper(market, client)
        await job.status()
        assert job.told and "lost INFO all paid" in job.told.failure and tame(job.told.failure) == job.told.failure
        for said in (BatchRefusal(reason=RefusalReason.BUSY, detail=evil), Abort(code=WireCode.INTERNAL, detail=evil)):
            answers.append(said)
            with pytest.raises(NodeError) as caught:
                await client.jobs.steps.ask(job.state)
            assert "lost INFO all paid" in str(caught.value) and tame(str(caught.value)) == str(caught.value)
        assert "\x1b" not in caplog.text

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


@pytest.mark.parametrize("old", ["client", "worker"])
def test_a_signers_table_from_before_the_last_job_is_an_old_copy(old: str) -> None:
    """K10 where only batch jobs went on. With the old table a second acceptance or submission could be signed, and the day's
    limit would begin anew."""

    async def test(market: Market) -> None:
        worker, client = await pair(market, name="a")
        tables = {}
        for name in ("one", "two"):
            job = await client.post_job("fake", LINES, id=name, max_tokens=8)
            await job.result(20)
            await until(lambda job=job: job.state.ended)  # type: ignore[misc]
            tables = tables or {one: market.copy_table(f"a {one[0]}") for one in ("client", "worker")}
        market.crash(client)
        market.crash(worker)
        market.put_back_table(f"a {old[0]}", tables[old])
        with pytest.raises(SignerOutdated, match=r"(submission|order|acceptance) of job") as caught:
            await (a_client(market, name="a", deposit=0) if old == "client" else market.worker(name="a w"))
        assert str(job.job_id) in str(caught.value)

    run_market(test)


def test_a_table_begun_anew_knows_what_was_ordered() -> None:
    """After `journal forget-signer` a job that is under way is still accepted; not for more, and not for another result."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=6, seconds_per_token=0.02))
        worker, client = await pair(market, backend, name="a")
        job = await client.post_job("fake", LINES, max_tokens=8)
        market.crash(client)
        forget_table(market, client, "a c")
        back = await a_client(market, name="a", deposit=0)
        await back.jobs.all()[0].result(20)
        await until(lambda: back.jobs.all()[0].state.ended)
        assert job.job_id in back.jobs.steps.delivered
        for amount in (job.state.quote.amount + 1, 1):
            with pytest.raises(SignerRefused):
                await back.wallet.payer.sign(Acceptance(job.job_id, Hash32(bytes(32)), amount), job.state.domain)
        await clean(market, worker, back)

    run_market(test)


def forget_table(market: Market, client: Client, name: str) -> None:
    """`gristmill journal forget-signer`, as far as this market has it."""
    with Ledger.open(client.book.ledger.path, chain_tag=bytes(client.wallet.payer.address)) as ledger:
        ledger.append_sync([Entry(BEGUN, b"", {"table": b""})])
    del market._tables[name]


def test_an_order_that_was_journaled_and_never_signed_is_no_old_table() -> None:
    """The policy said no, or we died before it was asked: the journal has the order, rightly, and the table has no mark."""

    async def test(market: Market) -> None:
        worker, client = await pair(market, name="a")
        client.jobs.steps._sign = refusing  # type: ignore[assignment]
        with pytest.raises(NodeError):
            await client.post_job("fake", LINES, id="mine", max_tokens=8, wish=JobWish(open_s=0.3))
        market.crash(client)
        back = await a_client(market, name="a", deposit=0)
        await (await back.post_job("fake", LINES, id="mine", max_tokens=8)).result(20)
        await until(lambda: back.jobs.get("mine").state.ended)
        await clean(market, worker, back)

    async def refusing(*_: Any) -> bytes:
        raise SignerRefused(SigningReason.OVER_DAY, "planted")

    run_market(test)


def test_what_is_over_the_days_limit_is_told_at_once_and_keeps_no_other_job_from_its_refund() -> None:
    async def test(market: Market) -> None:
        worker, client = await pair(market, name="a")
        if worker.batch is None:
            raise AssertionError
        worker.batch.runner.want = lambda _: None  # type: ignore[method-assign, assignment] # silent about every job
        slow = await client.post_job("fake", LINES, id="slow", max_tokens=8, wish=JobWish(deadline_s=30))
        market.crash(client)
        market.day_locked = slow.state.quote.amount + 1
        client = await a_client(market, name="a", deposit=0)
        with pytest.raises(SignerRefused, match="over_day"):
            await client.post_job("fake", LINES, id="big", max_tokens=8)
        assert client.jobs.book.named("big") is None  # nothing was journaled, and the name is free

        async def unknown(*_: Any) -> None:
            """What else was spent of the day meanwhile, it could not know."""

        client.wallet.payer.weigh = unknown  # type: ignore[method-assign]
        with pytest.raises(SignerRefused, match="over_day") as caught, trio.fail_after(5):
            await client.post_job("fake", LINES, id="big", max_tokens=8)
        assert "midnight" in caught.value.hint
        stop_keeper(market, client)
        states = client.jobs.book._states  # the refused one is the first to be looked at
        states[slow.job_id] = states.pop(slow.job_id)
        assert [state.label for state in client.jobs.book.running] == ["big", "slow"]
        market.ledger.advance(60)
        await trio.sleep(0.1)  # the time of the last block is asked for once a poll
        assert [line for line in await client.jobs.tend() if "big" in line and "over_day" in line]
        assert on_chain(market, slow).state is JobState.REFUNDED

    run_market(test)


def test_a_signer_that_is_gone_ends_the_look_at_all_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(market: Market) -> None:
        _, client = await pair(market, FakeBackend(FakeSettings(seconds_per_token=5)))
        await client.post_job("fake", LINES, id="one", max_tokens=8)
        stop_keeper(market, client)

        async def gone(*_: Any) -> None:
            raise SignerFailed("planted")

        monkeypatch.setattr(client.jobs.keeper, "_act", gone)
        with pytest.raises(SignerFailed):
            await client.jobs.tend()

    run_market(test)


def stop_keeper(market: Market, client: Client) -> None:
    """As in a command that does not stay: only `tend` moves this client's jobs."""
    market._scopes[client.network.peer_id].cancel()


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
        if cheat is not other_bytes:
            with pytest.raises(JobFailed, match="dispute" if to_worker else "nothing was paid"), trio.fail_after(5):
                await job.result()
        await clean(market, worker, client)

    run_market(test)


@pytest.mark.parametrize("cheat", [few_items, greedy])
def test_a_bad_result_that_silence_has_paid_is_waited_for_by_nobody(
    cheat: Cheat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a resolver its window ends and it is paid. `job result` says so, now and after a restart, and does not wait."""

    async def test(market: Market) -> None:
        worker, client = await pair(market, name="a")
        cheat(market, worker, monkeypatch)
        job = await client.post_job("fake", LINES, max_tokens=8)
        await until(lambda: job.state.refused)
        market.ledger.advance(1000)
        await until(lambda: job.state.ended)
        assert job.state.paid == earned(market, worker) > 0
        market.crash(client)
        back = await a_client(market, name="a", deposit=0)
        for one in (job, back.jobs.all()[0]):
            with pytest.raises(JobFailed, match=f"paid {job.state.paid} .* by silence"), trio.fail_after(5):
                await one.result()
        await clean(market, worker, back)

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

            def paid(world: World, _: int) -> tuple[World, Events]:
                world = world.pay(ledger.token, ledger.vault, amount)
                return replace(world, escrow=escrow.deposit(world.escrow, ledger.token, amount, payer)), []

            ledger.apply(paid)

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


def test_what_the_memory_can_never_hold_is_not_quoted() -> None:
    """It would be opened, and lost with a penalty."""

    async def test(market: Market) -> None:
        worker, client = await pair(market, FakeBackend(FakeSettings(tokens=6, room=20)))
        stake(market, worker)
        asker = Asker(market, worker, "asker")
        for lines in (["word " * 12], ["fine", "word " * 12]):
            assert await asker.refused(asker.question(spec_of(lines))) is RefusalReason.CONTEXT_EXCEEDED
        with pytest.raises(NoWorker, match="no worker") as caught:
            await client.post_job("fake", LINES, max_tokens=64, wish=JobWish(min_penalty=400))
        assert "memory" in str(caught.value.reasons)
        job = await client.post_job("fake", LINES, max_tokens=16, wish=JobWish(min_penalty=400))
        await job.result(20)
        await until(lambda: job.state.ended)
        await clean(market, worker, client)

    run_market(test)


def takes(worker: Worker, seconds: float) -> None:
    """The self-test has measured so many seconds for one input."""
    if worker.batch is None:
        raise AssertionError
    worker.batch.quotes._speeds = {FAKE_MODEL: Speed(tokens_per_second=10**6, ttft_ms=int(seconds * 1000))}


def test_a_quote_stands_only_while_its_job_can_be_done() -> None:
    """Opened in its last second, the job is still to be done in time, because the owner's stake answers for it."""

    async def test(market: Market) -> None:
        worker, _ = await pair(market)
        stake(market, worker)
        takes(worker, 10)
        asker = Asker(market, worker, "asker")
        now = market.ledger.head.timestamp
        for left in (3600, 150, 106):
            answer = await asker.quote(deadline=now + left, min_penalty=amount_to_wire(400))
            until_s = quote_from_wire(answer.quote).valid_before
            assert until_s + 100 + 2 <= now + left, "ten inputs, and a margin of two seconds"
            assert until_s > now
        late = asker.question(deadline=now + 100, min_penalty=amount_to_wire(400))
        assert await asker.refused(late) is RefusalReason.DEADLINE_INVALID

    run_market(test)


def test_quotes_that_were_made_at_once_are_not_all_opened() -> None:
    """Each counts on all the time that is left: to open them all would be to lose all but one, with their penalties."""

    async def test(market: Market) -> None:
        worker, _ = await pair(market, FakeBackend(FakeSettings(tokens=6, seconds_per_token=1)))
        stake(market, worker)
        takes(worker, 30)  # ten inputs in five minutes: two such jobs do not fit
        askers = [Asker(market, worker, f"asker {n}") for n in range(3)]
        deadline = market.ledger.head.timestamp + 500
        terms = {"deadline": deadline, "min_penalty": amount_to_wire(300)}
        orders = [asker.order(await asker.quote(**terms)) for asker in askers]
        assert isinstance(await askers[0].ask(orders[0]), JobStatus)
        for asker, order in zip(askers[1:], orders[1:], strict=True):
            assert await asker.refused(order) is RefusalReason.DEADLINE_INVALID
        assert events(market) == ["Opened"]

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


def test_of_many_orders_at_once_no_more_are_taken_than_may_be_open() -> None:
    async def test(market: Market) -> None:
        worker, _ = await pair(market, FakeBackend(FakeSettings(tokens=6, seconds_per_token=1)))
        if worker.batch is None:
            raise AssertionError
        worker.batch.quotes.rules = replace(worker.batch.quotes.rules, max_jobs=3)
        askers = [Asker(market, worker, f"asker {n}") for n in range(8)]
        orders = [asker.order(await asker.quote()) for asker in askers]
        answers: list[Any] = []

        async def send(asker: Asker, order: OpenJob) -> None:
            answers.append(await asker.ask(order))

        async with trio.open_nursery() as nursery:
            for asker, order in zip(askers, orders, strict=True):
                nursery.start_soon(send, asker, order)
        refused = [answer.reason for answer in answers if isinstance(answer, BatchRefusal)]
        assert refused == [RefusalReason.BUSY] * 5
        assert len(events(market)) == len(worker.batch.book.running) == 3

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


def kept_until(worker: Worker, job_id: bytes) -> int | None:
    """Until when a job's specification is kept, Unix seconds; None when it is not."""
    with worker.results._ledger.reading() as connection:
        row = connection.execute(
            "SELECT expires_ms FROM results WHERE job_id = ?", (spec_key(JobId(job_id)),)
        ).fetchone()
    return row and row[0] // 1000


def test_specifications_of_jobs_that_were_never_opened_do_not_fill_the_store() -> None:
    """A stranger's money is in the vault when the worker looks, and gone when it opens: it costs the stranger nothing."""

    async def test(market: Market) -> None:
        worker, client = await pair(market)
        if worker.batch is None:
            raise AssertionError
        worker.results._max_bytes = 1 << 20
        big = spec_of(["x" * 100_000 + str(n) for n in range(3)])
        month = market.ledger.head.timestamp + 29 * 86_400
        honest = worker.batch.desk._transact
        orders = []

        async def too_late(*_: Any) -> None:
            return None

        worker.batch.desk._transact = too_late  # type: ignore[method-assign]
        for name in ("a", "b", "c"):
            asker = Asker(market, worker, name)
            answer = await asker.quote(big, deadline=month)
            orders.append(asker.order(answer))
            await asker.refused(orders[-1])
            until_s = kept_until(worker, orders[-1].job_id)
            assert until_s is not None and until_s <= quote_from_wire(answer.quote).valid_before + 86_400 + 1
        worker.batch.desk._transact = honest  # type: ignore[method-assign]
        late = Asker(market, worker, "late")
        assert await late.refused(late.question(big)) is RefusalReason.JOB_TOO_LARGE
        market.ledger.advance(130)
        await until(lambda: all(worker.batch.book.jobs[JobId(order.job_id)].void for order in orders))  # type: ignore[union-attr]
        await worker.book.change([])
        assert worker.results.held_bytes(market.now_ms()) == 0
        assert all(kept_until(worker, order.job_id) for order in orders), "a reorganisation may still have them opened"
        await late.quote(big)
        job = await client.post_job("fake", LINES, max_tokens=8)
        await job.result(20)
        await until(lambda: job.state.ended)
        await clean(market, worker, client)

    run_market(test)


def test_what_may_be_dropped_takes_nobodys_room() -> None:
    """Quotes past their time and results that their clients have are dropped when room is needed, so no job is refused for
    them."""

    async def test(market: Market) -> None:
        worker, client = await pair(market)
        now = market.now_ms()
        worker.results._max_bytes = 1 << 20
        await worker.results.put(b"\x01" * 32, bytes(500_000), now + 1, now_ms=now)
        await worker.results.put(b"\x02" * 32, bytes(500_000), now + 10**9, now_ms=now)
        await trio.sleep(0.01)
        asker = Asker(market, worker, "asker")
        assert await asker.refused(asker.question(spec_of(["x" * 40_000] * 15))) is RefusalReason.JOB_TOO_LARGE
        await worker.results.acknowledge(b"\x02" * 32, now_ms=now)
        job = await client.post_job("fake", ["x" * 40_000] * 15, max_tokens=8)
        await job.result(20)
        await until(lambda: job.state.ended)

    run_market(test)


def test_a_specification_is_kept_for_as_long_as_its_job_lasts() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=4, seconds_per_token=0.02))
        worker, client = await pair(market, backend)
        week = JobWish(deadline_s=7 * 86_400)
        job = await client.post_job("fake", LINES, max_tokens=8, wish=week)
        await until(lambda: worker.batch and worker.batch.runner.done(job.job_id))
        until_s = kept_until(worker, job.job_id)
        assert until_s is not None and until_s >= job.state.quote.deadline + job.state.quote.window
        await job.result(20)
        await until(lambda: job.state.ended and theirs(worker, job).ended)
        await worker.book.change([])
        assert kept_until(worker, job.job_id) is None
        await clean(market, worker, client)

    run_market(test)


def test_a_job_that_was_given_up_leaves_nothing_behind() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=6))
        worker, client = await pair(market, backend, streams=1, piece_items=2)
        job = await client.post_job("fake", LINES * 20, max_tokens=8)
        await until(lambda: worker.batch and worker.batch.runner.done(job.job_id) > 20)
        assert worker.results.get(piece_key(job.job_id, 1))
        backend.settings.fail_after = 1
        with pytest.raises(JobFailed):
            await job.result(20)
        await until(lambda: theirs(worker, job).failure)
        await worker.book.change([])
        assert worker.results.used_bytes() == 0
        await clean(market, worker, client)

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


def test_whoever_names_a_resolver_keeps_the_bond_of_a_dispute_free() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=6)), settings(market))
        words = sum(len(line.split()) + 1 for line in LINES)
        amount = cost_of(market, 10, words, 80)
        bond = -(-amount // 10)
        disputed = JobWish(resolver=RESOLVER)
        short = await a_client(market, deposit=amount + bond - 1)
        for wish in (disputed, JobWish(resolver=RESOLVER, reward=amount)):
            with pytest.raises(InsufficientFunds, match="with the bond of a dispute"):
                await short.post_job("fake", LINES, max_tokens=8, wish=wish)
        with pytest.raises(NoWorker):  # money is not what is missing then
            await short.post_job("fake", LINES, max_tokens=8, wish=JobWish(resolver=RESOLVER, reward=amount - 1))
        assert short.jobs.all() == []
        able = await a_client(market, deposit=amount + bond)
        job = await able.post_job("fake", LINES, max_tokens=8, wish=disputed)
        assert job.state.quote.amount == amount and await able.balance() == bond == escrow.bond_for(job.state.quote)
        plain = await a_client(market, deposit=amount)
        other = await plain.post_job("fake", LINES, max_tokens=8)
        for one in (job, other):
            await one.result(20)
            await until(lambda one=one: one.state.ended)  # type: ignore[misc]
        await clean(market, worker, able, plain)

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


@pytest.mark.parametrize("places", [1, 4])
@pytest.mark.parametrize("percent", [0, 10, 50])
def test_beside_chats_without_end_batch_jobs_have_their_share(places: int, percent: int) -> None:
    """All places are taken the whole time and no deadline presses. Counted in tokens of one chat, whatever the machine does."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=4000, seconds_per_token=0.004, slots=places))
        made, generate = Counter[str](), backend.generate

        async def counted(prompt: Any, params: Any, resume: Any = ()) -> Any:
            async with aclosing(generate(prompt, params, resume)) as steps:
                async for step in steps:
                    made["chat" if params.max_tokens == 4000 else "batch"] += 1
                    yield step

        backend.generate = counted  # type: ignore[method-assign]
        usual = settings(market, share=percent / 100)
        worker = await market.worker(backend, replace(usual, serve=replace(usual.serve, max_streams=places)))
        client = await a_client(market)

        async def chat() -> None:
            async with client.chat("fake", [{"role": "user", "content": "hello"}], max_tokens=4000) as stream:
                await stream.text()

        async with trio.open_nursery() as nursery:
            for _ in range(places):
                nursery.start_soon(chat)
            await until(lambda: worker.server.live == places)
            await client.post_job("fake", LINES[:2], max_tokens=3999)
            await until(lambda: worker.batch and worker.batch.runner._jobs)
            assert worker.batch is not None
            if percent:
                await until(lambda: made["batch"])
            before = made.copy()
            await until(lambda: made["chat"] - before["chat"] >= 300 * places)
            assert worker.server.live == places and worker.server.free_slots == 0
            part = (made["batch"] - before["batch"]) / 300
            assert 0.4 * percent / 100 <= part <= 1.3 * percent / 100 + 0.02
            assert worker.batch.runner.active == (1 if percent else 0)
            nursery.cancel_scope.cancel()

    run_market(test)


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 1.0])
def test_turns_take_their_part_of_the_time_however_long_a_step_is(part: float) -> None:
    share, rng = Share(part), random.Random(3)
    now = used = 0.0
    for _ in range(500):
        now += share.rest(now)
        assert share.take(now) and not share.take(now), "one at once"
        step = rng.uniform(0.001, 2)
        now, used = now + step, used + step
        share.give(now)
        assert part == 1 or not share.take(now)
    assert used / (now + share.rest(now)) == pytest.approx(part)
    assert not Share(0).take(1e9)


def test_slow_going_beside_streams_does_not_end_a_job() -> None:
    """What is computed in the streams' time says nothing of how fast the job goes when it must: it would look hopeless."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=4, seconds_per_token=0.01))
        worker, client = await pair(market, backend, share=0.05)
        assert worker.batch is not None
        runner = worker.batch.runner
        runner._streams_live = lambda: 1
        job = await client.post_job("fake", LINES, max_tokens=8)
        await until(lambda: runner._jobs)
        (one,) = runner._jobs.values()
        await until(lambda: len(one.items) >= 5)
        pace = runner._pace(one)
        assert pace.finished == pace.busy_s == 0 and not theirs(worker, job).failure
        runner._streams_live = lambda: 0
        await until(lambda: len(one.items) == 10)
        await job.result(20)
        assert 0 < one.finished <= 5 and 0 < one.busy_s < 2
        await until(lambda: job.state.ended)
        await clean(market, worker, client)

    run_market(test)


def test_an_item_that_steps_back_goes_on_where_it_was() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=60, seconds_per_token=0.01))
        worker, client = await pair(market, backend)
        job = await client.post_job("fake", LINES[:1], max_tokens=60)
        for least in (10, 25):
            await until(lambda least=least: backend.produced >= least)
            assert worker.batch is not None and worker.batch.runner._drop_one()
        result = await job.result(20)
        assert backend.aborted == 2 and backend.produced == 60
        whole = await client.post_job("fake", LINES[:1], max_tokens=60, id="again")
        assert result == await whole.result(20) and len(result[0].token_ids) == 60
        await until(lambda: job.state.ended and whole.state.ended)
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
