"""A market on several chains: who is paid where, what is replayed from one to the other, and that trouble on one stays there.

The memory chains have their contracts and tokens at the same addresses, as a careful deployer would: only the chain id differs.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import msgspec
import pytest
import trio

from node.audit import audit
from node.chain.memory import MemoryLedger
from node.client import locking
from node.client.client import Client
from node.client.settings import ClientSettings
from node.errors import ChainError, ConfigError, InsufficientFunds, NoWorker, Refused, VerificationFailed
from node.network.drive import converse
from node.ports import ClaimEntry
from node.store import channels as book_module
from node.store.channels import ChannelBook
from node.testing.cheaters import Hand, corrupt
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, raw_key, run_market
from node.testing.planted import notices, sound
from node.worker.accepted import Accepted, AcceptedAssets
from node.worker.batch import BatchRules
from node.worker.batch_run import RunSettings
from node.worker.claims import Claimer
from node.worker.worker import Worker
from protocol import records as records_module
from protocol.batch import Timing
from protocol.channel import ChannelOpened, ChannelState, Role, VoucherAdded
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode
from protocol.ids import ZERO_ADDRESS
from protocol.messages import (
    CHANNEL_PROTOCOL,
    Accept,
    ChatMessage,
    OpenChannel,
    Params,
    QueryChannel,
    ReceiptMessage,
    Refuse,
    amount_to_wire,
    config_to_wire,
)
from protocol.offers import Asset, Payment, VerifiedOffer
from protocol.pricing import Price, cost
from protocol.records import to_body
from protocol.selection import Exclusion, Policy
from protocol.tasks import ChatRequest
from protocol.typed_data import Allocation, Domain

HELLO = [{"role": "user", "content": "hello there"}]
BOTH = ("default", "two")
CHEAP, DEAR = Price(request=10, input=1_000_000, output=2_000_000), Price(request=20, input=2_000_000, output=4_000_000)


async def until(true: Any) -> None:
    with trio.fail_after(5):
        while not true():
            await trio.sleep(0.005)


async def greet(client: Client, **params: Any) -> ChannelState:
    """One paid chat; the channel that paid for it."""
    async with client.chat("fake", HELLO, **params) as stream:
        assert await stream.text()
    assert stream.receipt is not None and stream.receipt.cost > 0 and stream.channel_id is not None
    return client.book.channels[stream.channel_id]


async def clean(*nodes: Client | Worker) -> None:
    for node in nodes:
        await node.book.change([])
        chains = node.wallet.chains if isinstance(node, Client) else node.chains
        assert await audit(node.book.ledger, node.book.role, chains) == []


async def everywhere(market: Market, backend: FakeBackend | None = None, **serve: int) -> tuple[MemoryLedger, Worker]:
    """A second chain, and a worker that takes token and coin on both. (It never claims by itself.)"""
    two = market.add_chain("two", 2)
    accepts = [
        market.accepted(CHEAP),
        market.accepted(CHEAP, token=ZERO_ADDRESS),
        market.accepted(CHEAP, two),
        market.accepted(CHEAP, two, token=ZERO_ADDRESS),
    ]
    settings = replace(market.settings(*accepts, **serve), chain_poll_ms=10)
    return two, await market.worker(backend, settings, chains=BOTH, name="w")


def test_two_chains_two_tokens_two_clients() -> None:
    """Each client has one chain and two tokens of it. Everybody is paid where the channel is, and every journal is sound."""

    async def test(market: Market) -> None:
        two, worker = await everywhere(market, FakeBackend(FakeSettings(tokens=300)))
        assert len((await worker.desk.current()).document) < 1200
        clients = {}
        for name, ledger in (("default", market.ledger), ("two", two)):
            means = [market.means(ledger, rate=None), market.means(ledger, token=ZERO_ADDRESS, rate=None)]
            clients[name] = client = await market.client(means=means, chains=[name])
            first = await greet(client, max_tokens=300)  # long enough for vouchers in the stream
            assert (first.home, first.config.token) == (ledger.domain, ledger.token)
            other = replace(client.wallet.means[means[1].asset])
            client.wallet.means = {other.asset: other}  # now it pays with the coin
            second = await greet(client, max_tokens=300)
            assert (second.home, second.config.token) == (ledger.domain, ZERO_ADDRESS)
        await until(lambda: not worker.server.busy)
        assert len(worker.book.channels) == 4
        report = await worker.claim()
        assert sorted(report.claimed.values()) == sorted(s.spent for s in worker.book.channels.values())
        for ledger in (market.ledger, two):
            for token in (ledger.token, ZERO_ADDRESS):
                (paid,) = [
                    s.spent
                    for s in worker.book.channels.values()
                    if (s.domain, s.config.token) == (ledger.domain, token)
                ]
                assert ledger.world.escrow.balance_of(token, worker.key.address) == paid > 0
        await clean(worker)
        for client in clients.values():
            for channel_id in client.book.channels:
                await client.wallet.refresh(channel_id)
            await clean(client)
        assert market.failures == {}

    run_market(test)


def test_a_client_of_a_third_chain_is_told_why_nobody_serves_it() -> None:
    async def test(market: Market) -> None:
        two, worker = await everywhere(market)
        three = market.add_chain("three", 3)
        client = await market.client(means=[market.means(three)], chains=["three"])
        with pytest.raises(NoWorker) as caught:
            await greet(client)
        assert caught.value.reasons == {str(worker.key.peer_id): ("no_common_chain",)}
        assert "paid on chain 2, 31339, we pay on 3" in caught.value.hint
        # Its money and its word are no good there either.
        hand_made = await market.client(means=[market.means(two)], chains=["two"], name="other")
        state = (await Hand.of(hand_made, worker)).state
        wrong = OpenChannel(
            chain_id=3,
            contract=bytes(three.domain.verifying_contract),
            config=config_to_wire(state.config),
            allocated=amount_to_wire(state.authorized),
            valid_before=state.valid_before,
            signature=state.allocation_signature,
        )
        with pytest.raises(RemoteProtocolError, match="chain 3") as refused:
            await converse(hand_made.network, worker.key.peer_id, CHANNEL_PROTOCOL, wrong, timeout_s=5)
        assert refused.value.code is WireCode.WRONG_DOMAIN
        assert len(worker.book.channels) == 1

    run_market(test)


# ------------------------------------------------------------------------------------------------------------- replay


async def twins(market: Market) -> tuple[MemoryLedger, Worker, Hand, Hand]:
    """One client with the *same* channel configuration on both chains, salt and all."""
    two, worker = await everywhere(market)
    client = await market.client(means=[market.means(), market.means(two)], chains=BOTH)
    first = await Hand.of(client, worker)
    state = first.state
    channel_id = state.config.channel_id(two.domain)
    allocation = Allocation(channel_id, state.authorized, state.valid_before)
    signature = raw_key(client.wallet.payer).sign(allocation.digest(two.domain))
    await client.book.change(
        [ChannelOpened(channel_id, state.config, state.authorized, state.valid_before, signature, two.domain)]
    )
    await client.wallet.locking.submit(worker.key.peer_id, channel_id)
    second = Hand(client, first.offer, client.book.channels[channel_id])
    assert first.state.config == second.state.config and first.state.channel_id != second.state.channel_id
    return two, worker, first, second


def test_a_voucher_of_the_twin_channel_pays_nothing_here() -> None:
    """S5."""

    async def test(market: Market) -> None:
        two, worker, here, there = await twins(market)
        # The first voucher of an ask, one in the stream, one with the ack: all are signed for the other chain.
        foreign = here.voucher(900, domain=two.domain)
        refused = await here.talk(here.ask(voucher=foreign))
        answer = await refused.until(Refuse, Accept)
        assert isinstance(answer, Refuse) and answer.reason is RefusalReason.VOUCHER_INVALID
        of_the_twin = there.voucher(900)  # a right one of the other channel, word for word
        refused = await here.talk(here.ask(voucher=of_the_twin))
        answer = await refused.until(Refuse, Accept)
        assert isinstance(answer, Refuse) and answer.reason is RefusalReason.VOUCHER_INVALID
        talk = await here.talk(here.ask(400, params=Params(max_tokens=4)))
        assert await talk.until(ReceiptMessage) is not None
        await talk.send(here.voucher(500, domain=two.domain))
        assert await talk.receive() is None and worker.server.stats.ended["bad_signature"] == 1
        assert worker.book.channels[here.state.channel_id].cumulative == 400
        assert worker.book.channels[there.state.channel_id].cumulative == 0

    run_market(test)


def test_an_ask_for_one_chain_is_not_run_for_the_other() -> None:
    async def test(market: Market) -> None:
        _, worker, here, there = await twins(market)
        ask = here.ask(400)
        moved = msgspec.structs.replace(
            ask, channel_id=bytes(there.state.channel_id), voucher_signature=there.voucher(400).signature
        )
        talk = await there.talk(moved)
        answer = await talk.until(Refuse, Accept)
        assert isinstance(answer, Refuse) and answer.reason is RefusalReason.SIGNER_MISMATCH
        assert not worker.server.backend.produced  # type: ignore[attr-defined]

    run_market(test)


def test_what_was_signed_for_one_chain_moves_nothing_on_the_other() -> None:
    """S5: straight to the contracts: allocation, voucher and close of the twin, each on the wrong chain."""

    async def test(market: Market) -> None:
        two, worker, here, there = await twins(market)
        client = here.client
        await (await here.talk(here.ask(500, params=Params(max_tokens=4)))).until(ReceiptMessage)
        await until(lambda: worker.book.channels[here.state.channel_id].spent)
        state = worker.book.channels[here.state.channel_id]
        wrong, right = client.wallet.chains.named("two"), client.wallet.chains.named("default")
        before = two.world.escrow
        more = Allocation(state.channel_id, 5_000_000, 2**40 - 1)
        signature = raw_key(client.wallet.payer).sign(more.digest(market.ledger.domain))
        assert (await wrong.allocate(state.config, 5_000_000, 2**40 - 1, signature)).error == "Channels_BadSignature"
        entry = book_entry(state)
        await wrong.claim([entry])
        assert two.world.escrow.channel(there.state.channel_id).claimed == 0
        question = here.voucher(state.spent)
        closing = await wrong.close_channel(state.config, state.spent, 500, question.signature, question.signature)
        assert not closing.ok
        assert two.world.escrow == before
        assert (await right.claim([entry])).ok
        assert market.ledger.world.escrow.channel(state.channel_id).claimed == state.spent > 0

    run_market(test)


def book_entry(state: ChannelState) -> ClaimEntry:
    return ClaimEntry(state.config, state.spent, state.cumulative, state.voucher_signature)


def test_a_receipt_for_another_chain_is_unverifiable_and_unpaid() -> None:
    """S5."""

    async def test(market: Market) -> None:
        _, worker = await everywhere(market)
        corrupt(worker, "receipt for another chain")
        client = await market.client()
        with pytest.raises(VerificationFailed, match="signed by"):
            async with client.chat("fake", HELLO) as stream:
                await stream.text()
        (state,) = client.book.channels.values()
        assert stream.receipt is None and not state.open_jobs
        prompt = client.choosing.count_tokens(worker_model(client), [ChatMessage("user", "hello there")], 256)
        assert state.cumulative <= cost(CHEAP, prompt, 0) + market.tick, "what was vouched for before the receipt"

    run_market(test)


# ---------------------------------------------------------------------------------------------------- trouble on one


def test_a_chain_that_is_away_stops_its_own_channels_only() -> None:
    """C13."""

    async def test(market: Market) -> None:
        two, worker = await everywhere(market, chain_age_limit_ms=100)
        one = await market.client(name="one")
        other = await market.client(means=[market.means(two)], chains=["two"], name="other")
        assert (await greet(one)).home == market.ledger.domain and (await greet(other)).home == two.domain
        chain = worker.chains.named("two")
        chain.head = failing  # type: ignore[method-assign]
        await until(lambda: worker.watches[two.domain].age_ms() > 100)
        await greet(one)
        with pytest.raises(Refused) as caught:
            await greet(other)
        assert caught.value.reason is RefusalReason.CHAIN_STALE
        # Who can pay on either is served on the other.
        both = await market.client(means=[market.means(two, rate=None), market.means(rate=None)], chains=BOTH)
        assert (await sound(greet(both))).home == market.ledger.domain
        del chain.head  # type: ignore[attr-defined]
        await until(lambda: worker.watches[two.domain].age_ms() < 100)
        other.history.clear()
        await greet(other)
        assert market.failures == {}

    run_market(test)


async def failing(*_: object) -> Any:
    raise ChainError("away")


def test_a_batch_job_on_one_chain_is_run_while_the_other_is_away() -> None:
    """Quoted, locked, run, paid and audited on the second chain; on the first new jobs are refused meanwhile."""

    async def test(market: Market) -> None:
        two = market.add_chain("two", 2)
        fast = Timing(submit_margin=2, accept_grace=1, settle_patience=1, finalize_patience=1, dispute_margin=2)
        usual = market.settings(market.accepted(), market.accepted(ledger=two))
        assert usual.batch is not None
        batch = replace(
            usual.batch,
            quotes=replace(usual.batch.quotes, margin_s=2, min_duration=4),
            run=RunSettings(margin_s=2, pause_s=0.02, piece_s=0.05),
            timing=fast,
            rules=BatchRules(chain_age_limit_ms=200),
        )
        settings = replace(usual, batch=batch, chain_poll_ms=10)
        worker = await market.worker(FakeBackend(FakeSettings(tokens=6)), settings, chains=BOTH)
        quick = ClientSettings(jobs=fast, job_poll_s=0.05, job_reread_s=0.1)
        one = await market.client(settings=quick)
        other = await market.client(settings=quick, means=[market.means(two)], chains=["two"])
        assert worker.batch is not None
        worker.chains.first.head = failing  # type: ignore[method-assign]
        await until(lambda: worker.age_of(market.ledger.domain) > 200)
        with pytest.raises(NoWorker) as caught:
            await one.post_job("fake", ["a line"], max_tokens=8)
        assert "chain_stale" in str(caught.value.reasons)
        job = await other.post_job("fake", ["a line", "another line"], max_tokens=8)
        assert job.state.domain == two.jobs_domain
        assert len(await job.result(20)) == 2
        await until(lambda: job.state.ended)
        assert two.world.escrow.balance_of(two.token, worker.key.address) == job.state.paid > 0
        assert market.ledger.world.escrow.balance_of(market.ledger.token, worker.key.address) == 0
        del worker.chains.first.head  # type: ignore[attr-defined]
        await until(lambda: all(one.ended for one in worker.batch.book.jobs.values()))  # type: ignore[union-attr]
        await clean(worker, other)

    run_market(test)


def test_who_leaves_on_one_chain_is_claimed_there_and_nowhere_else() -> None:
    async def test(market: Market) -> None:
        two, worker = await everywhere(market)
        one = await market.client(name="one")
        other = await market.client(means=[market.means(two)], chains=["two"], name="other")
        here, there = await greet(one), await greet(other)
        await until(lambda: not worker.server.busy)
        height = market.ledger.head.number
        result = await other.wallet.chain.initiate_withdraw(there.config)
        assert result.ok
        await until(lambda: two.world.escrow.channel(there.channel_id).claimed == there.spent)
        assert market.ledger.head.number == height and market.ledger.world.escrow.channel(here.channel_id).claimed == 0
        assert worker.book.channels[there.channel_id].leaving and not worker.book.channels[here.channel_id].leaving

    run_market(test)


def test_a_claim_that_fails_on_one_chain_does_not_hold_up_the_other() -> None:
    """C13."""

    async def test(market: Market) -> None:
        two, worker = await everywhere(market)
        one = await market.client(name="one")
        other = await market.client(means=[market.means(two)], chains=["two"], name="other")
        here, there = await greet(one), await greet(other)
        await until(lambda: not worker.server.busy)
        first = worker.chains.named("default")
        first.claim = failing  # type: ignore[method-assign, assignment]
        with pytest.raises(ChainError, match="away"):
            await worker.claim()
        assert two.world.escrow.channel(there.channel_id).claimed == there.spent
        assert market.ledger.world.escrow.channel(here.channel_id).claimed == 0
        del first.claim  # type: ignore[attr-defined]
        assert (await worker.claim()).claimed == {here.channel_id: here.spent}

    run_market(test)


def test_what_is_unpaid_in_one_token_uses_up_no_credit_of_another() -> None:
    """C12: each asset has its own cap: a unit of one is not a unit of the other."""

    async def test(market: Market) -> None:
        two = market.add_chain("two", 2)
        tick = market.tick
        accepts = [market.accepted(credit_limit=tick), market.accepted(ledger=two, credit_limit=tick)]
        backend = FakeBackend(FakeSettings(tokens=500))
        worker = await market.worker(backend, market.settings(*accepts, stall_ms=60_000, max_streams=8), chains=BOTH)
        first = await Hand.of(await market.client(name="a"), worker)
        unpaid = first.ask(cost(CHEAP, 2, 0), params=Params(max_tokens=500))
        assert isinstance(await (await first.talk(unpaid)).receive(), Accept)
        second = await Hand.of(await market.client(name="b"), worker)
        answer = await (await second.talk(second.ask(cost(CHEAP, 2, 0), params=Params(max_tokens=500)))).receive()
        assert isinstance(answer, Refuse) and answer.reason is RefusalReason.CREDIT_EXHAUSTED
        third = await Hand.of(await market.client(means=[market.means(two)], chains=["two"], name="c"), worker)
        answer = await (await third.talk(third.ask(cost(CHEAP, 2, 0), params=Params(max_tokens=500)))).receive()
        assert isinstance(answer, Accept)

    run_market(test)


# ------------------------------------------------------------------------------------------------- what is paid with


def test_the_order_of_preference_decides_where_no_rate_does() -> None:
    async def test(market: Market) -> None:
        two = market.add_chain("two", 2)
        accepts = [market.accepted(DEAR), market.accepted(CHEAP, two)]
        await market.worker(settings=market.settings(*accepts), chains=BOTH)
        for first, second in ((market.ledger, two), (two, market.ledger)):
            means = [market.means(first, rate=None), market.means(second, rate=None)]
            client = await market.client(means=means, chains=BOTH)
            assert (await greet(client)).home == first.domain

    run_market(test)


def test_rates_compare_what_units_cannot() -> None:
    """C12: the coin asks for fewer units, of which each is worth a hundred of the token's."""

    async def test(market: Market) -> None:
        two = market.add_chain("two", 2)
        accepts = [market.accepted(DEAR), market.accepted(CHEAP, two)]
        await market.worker(settings=market.settings(*accepts), chains=BOTH)
        for rate, chosen in ((Fraction(100), market.ledger), (Fraction(1, 100), two), (Fraction(1), two)):
            client = await market.client(means=[market.means(), market.means(two, rate=rate)], chains=BOTH)
            assert (await greet(client)).home == chosen.domain, rate

    run_market(test)


def test_an_empty_purse_is_passed_over_and_a_filled_one_found_again() -> None:
    async def test(market: Market) -> None:
        two, _ = await everywhere(market)
        means = [market.means(rate=None), market.means(two, rate=None, allocation=1_500)]
        client = await market.client(means=means, chains=BOTH, deposit=0, name="c")
        with pytest.raises(InsufficientFunds, match="the vault holds 0"):
            await greet(client)
        with pytest.raises(InsufficientFunds, match="in every token"):  # now it has looked
            await greet(client)
        assert not client.book.channels and client.history == {}
        # Somebody else deposits for the client, on the second chain; it looks again before it gives up.
        payer = client.wallet.payer.address
        two.apply(lambda world, _: (world.pay(two.token, payer, 10**7), []))
        await client.wallet.chains.named("two").deposit(two.token, 10**7)
        assert (await greet(client)).home == two.domain
        selection = client.choosing.explain("fake", ChatRequest(()), Params(), Policy())
        assert [c.payment.chain_id for c in selection.ranked] == [2]
        await client.wallet.withdraw(await client.wallet.balance(means[1].asset), asset=means[1].asset)
        await client.wallet.look()
        # The channel still holds enough.
        assert (await greet(client)).home == two.domain and len(client.book.channels) == 1
        with pytest.raises(InsufficientFunds, match="in every token"):
            await greet(client, max_tokens=2_000)

    run_market(test)


def test_a_limit_in_one_token_admits_no_payment_in_another_without_a_rate() -> None:
    """C12."""

    async def test(market: Market) -> None:
        two = market.add_chain("two", 2)
        worker = await market.worker(settings=market.settings(market.accepted(CHEAP, two)), chains=["two"])
        peer = worker.key.peer_id
        blind = await market.client(means=[market.means(two, rate=None)], chains=["two"])
        rated = await market.client(means=[market.means(two, rate=Fraction(1, 2))], chains=["two"])
        most = cost(CHEAP, blind.choosing.count_tokens(worker_model(blind), ()), 100)
        for limit, against in ((most, ()), (most // 2 + 1, ()), (most // 4, (Exclusion.PRICE_TOO_HIGH,))):
            asked = ("fake", ChatRequest(()), Params(max_tokens=100), Policy(max_cost=limit))
            assert rated.choosing.explain(*asked).rejected == ({peer: against} if against else {})
            assert blind.choosing.explain(*asked).rejected == {peer: (Exclusion.NOT_COMPARABLE,)}
        assert blind.choosing.explain("fake", ChatRequest(()), Params(max_tokens=100), Policy()).ranked

    run_market(test)


def worker_model(client: Client) -> Any:
    return client.offers.current()[0].document.models[0]


# ----------------------------------------------------------------------------------------------------------- journals


def test_a_restart_on_two_chains_goes_on_where_each_was() -> None:
    async def test(market: Market) -> None:
        two, worker = await everywhere(market)
        means = [market.means(rate=None), market.means(two, rate=None)]
        client = await market.client(means=means, chains=BOTH, name="c")
        await greet(client)
        client.wallet.means = dict(reversed(client.wallet.means.items()))
        await greet(client)
        await until(lambda: not worker.server.busy)
        before = dict(worker.book.channels)
        assert {state.home for state in before.values()} == {market.ledger.domain, two.domain}
        market.crash(worker)
        market.crash(client)
        again = await market.worker(settings=worker.settings, name="w", chains=BOTH)
        assert again.book.channels == before
        assert ChannelBook.restore(again.ledger, Role.WORKER).channels == before, "the journal itself says which chain"
        client = await market.client(means=means, chains=BOTH, name="c", deposit=0)
        assert (await greet(client)).home == market.ledger.domain and len(client.book.channels) == 2
        await until(lambda: not again.server.busy)
        await clean(again)

    run_market(test)


def test_a_journal_from_before_it_named_its_chain_is_served_claimed_and_audited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(market: Market) -> None:
        with monkeypatch.context() as old:
            old.setattr(
                book_module, "to_body", lambda change: {k: v for k, v in to_body(change).items() if k != "domain"}
            )
            worker, client = await market.worker(name="w"), await market.client(name="c")
            await greet(client)
            await until(lambda: not worker.server.busy)
            market.crash(worker)
            market.crash(client)
        two, again = await everywhere(market)
        client = await market.client(
            means=[market.means(two, rate=None), market.means(rate=None)], chains=BOTH, name="c"
        )
        (state,) = again.book.channels.values()
        assert state.domain == market.ledger.domain
        client.wallet.means.pop(Asset.of(two.domain, two.token))
        assert (await greet(client)).channel_id == state.channel_id, "the old channel pays"
        await until(lambda: not again.server.busy)
        assert (await again.claim()).claimed
        await client.wallet.refresh(state.channel_id)
        await clean(again, client)

    run_market(test)


def test_channels_of_a_chain_that_is_no_longer_configured_are_kept_and_left_alone() -> None:
    async def test(market: Market) -> None:
        two, worker = await everywhere(market)
        client = await market.client(
            means=[market.means(two, rate=None), market.means(rate=None)], chains=BOTH, name="c"
        )
        there = await greet(client)
        assert there.home == two.domain
        await until(lambda: not worker.server.busy)
        market.crash(worker)
        market.crash(client)
        again = await market.worker(name="w")
        client = await market.client(name="c")
        assert (await greet(client)).home == market.ledger.domain
        await until(lambda: not again.server.busy)
        assert (await sound(again.claim())).claimed.keys() == {
            s.channel_id for s in again.book.channels.values() if s.home == market.ledger.domain
        }
        hand = Hand(client, client.offers.current()[0], client.book.channels[there.channel_id])
        answer = await (await hand.talk(hand.ask(there.cumulative + 400))).until(Refuse, Accept)
        assert isinstance(answer, Refuse) and answer.reason is RefusalReason.WRONG_DOMAIN
        status = await converse(
            client.network, again.key.peer_id, CHANNEL_PROTOCOL, QueryChannel(bytes(there.channel_id)), timeout_s=5
        )
        assert status.channel_id == there.channel_id  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="chain 2"):
            await client.wallet.close(there.channel_id, again.key.peer_id)
        findings = await audit(again.ledger, Role.WORKER, again.chains)
        assert len(findings) == 1 and "chain 2" in findings[0] and "not compared" in findings[0]
        # Nor does a server of the first chain make us look there, by an event that it invents.
        market.ledger._append(market.ledger.world, None, [("Claimed", {"channelId": bytes(there.channel_id)})])
        before = again.watches[market.ledger.domain]._events_from
        market.ledger.mine(70)
        await greet(await market.client())  # opens a channel: an event that is true
        await until(lambda: again.watches[market.ledger.domain]._events_from > before)
        assert market.failures == {}
        assert market.failures == {}

    run_market(test)


def test_an_audit_sees_what_was_signed_for_another_chain() -> None:
    """A journal whose voucher is good on the twin chain only."""

    async def test(market: Market) -> None:
        two, worker, here, _ = await twins(market)
        foreign = here.voucher(700, domain=two.domain)
        await worker.book.change([VoucherAdded(here.state.channel_id, 700, foreign.signature)])
        findings = await audit(worker.ledger, Role.WORKER, worker.chains)
        assert len(findings) == 1 and "the voucher is not signed by" in findings[0]
        # Asked about one chain, it compares there alone; signatures need no chain.
        assert len(await audit(worker.ledger, Role.WORKER, worker.chains, worker.chains.named("two"))) == 1

    run_market(test)


@pytest.mark.parametrize("chain_id", [2, 31339])
def test_a_worker_takes_an_allocation_for_the_chain_that_it_names(chain_id: int) -> None:
    """The chain stands in the message, and in the signature: they must agree."""

    async def test(market: Market) -> None:
        two, worker, here, _ = await twins(market)
        named = next(ledger for ledger in (market.ledger, two) if ledger.chain_id == chain_id)
        other = two if named is market.ledger else market.ledger
        config = replace(here.state.config, salt=type(here.state.config.salt)(bytes(31) + b"\x09"))

        def question(signed_for: Domain) -> OpenChannel:
            allocation = Allocation(config.channel_id(signed_for), 5_000, 2**40 - 1)
            return OpenChannel(
                chain_id=chain_id,
                contract=bytes(named.domain.verifying_contract),
                config=config_to_wire(config),
                allocated=amount_to_wire(5_000),
                valid_before=2**40 - 1,
                signature=raw_key(here.client.wallet.payer).sign(allocation.digest(signed_for)),
            )

        ask = here.client.network, worker.key.peer_id, CHANNEL_PROTOCOL
        with pytest.raises(RemoteProtocolError) as caught:
            await converse(*ask, question(other.domain), timeout_s=5)
        assert caught.value.code is WireCode.BAD_SIGNATURE and len(worker.book.channels) == 2
        await converse(*ask, question(named.domain), timeout_s=5)
        assert worker.book.channels[config.channel_id(named.domain)].home == named.domain
        assert other.world.escrow.channel(config.channel_id(other.domain)).allocated == 0

    run_market(test)


def test_an_address_is_not_an_asset() -> None:
    """The same token address stands on both chains; what is held of one is not taken for the other."""

    async def test(market: Market) -> None:
        two = market.add_chain("two", 2)
        assert two.token == market.ledger.token and two.channels == market.ledger.channels
        worker = await market.worker(settings=market.settings(market.accepted(ledger=two)), chains=BOTH)
        client = await market.client(means=[market.means()], chains=BOTH)
        with pytest.raises(NoWorker) as caught:
            await greet(client)
        assert caught.value.reasons == {str(worker.key.peer_id): ("no_common_chain",)}

    run_market(test)


# -------------------------------------------------------------------------------------------------------- planted bugs


def all_channels(self: Claimer) -> list[ChannelState]:
    return list(self._book.channels.values())


def any_asset(self: AcceptedAssets, state: ChannelState) -> Accepted:
    return next(iter(self))


def first_age(self: Worker, domain: Domain) -> int:
    return next(iter(self.watches.values())).age_ms()


def same_address(state: ChannelState, offer: VerifiedOffer, payment: Payment) -> bool:
    return state.config.receiver == offer.worker and state.config.token == payment.token


PLANTED: dict[str, tuple[object, str, Any, Any]] = {
    "a claim takes the channels of every chain": (
        Claimer,
        "_here",
        all_channels,
        test_channels_of_a_chain_that_is_no_longer_configured_are_kept_and_left_alone,
    ),
    "every channel is in the first asset": (
        AcceptedAssets,
        "of",
        any_asset,
        test_what_is_unpaid_in_one_token_uses_up_no_credit_of_another,
    ),
    "the age of the first chain counts for all": (
        Worker,
        "age_of",
        first_age,
        test_a_chain_that_is_away_stops_its_own_channels_only,
    ),
    "a token's address is what is paid": (
        locking,
        "_between",
        same_address,
        test_a_chain_that_is_away_stops_its_own_channels_only,
    ),
    "a journal that names no chain is on none": (
        records_module,
        "placed",
        lambda change, domains: change,
        lambda: test_a_journal_from_before_it_named_its_chain_is_served_claimed_and_audited(pytest.MonkeyPatch()),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, bug, watch = PLANTED[name]
    with monkeypatch.context() as planted:
        planted.setattr(where, what, bug)
        assert notices(watch)
    assert not notices(watch)
