"""Clients that do not keep to the rules: each is told why, costs at most the credit window, and disturbs nobody."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from node.audit import audit
from node.client.client import Client
from node.errors import Refused
from node.network.drive import converse
from node.ports import StreamClosed
from node.testing.cheaters import STRANGER, Hand
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, raw_key, run_market
from node.worker.channels import ChannelRules, GasBudget
from node.worker.worker import Worker
from protocol.channel import ChannelState, Role
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode
from protocol.ids import Address, Hash32
from protocol.messages import (
    CHANNEL_PROTOCOL,
    JOB_PROTOCOL,
    OFFER_PROTOCOL,
    Abort,
    Accept,
    Ack,
    Cancel,
    ChatMessage,
    Chunk,
    OpenChannel,
    Params,
    ReceiptMessage,
    Refuse,
    RequestClose,
    amount_to_wire,
    config_to_wire,
    decode,
)
from protocol.offers import open_offer, sign_offer
from protocol.pricing import Price, cost
from protocol.tasks import ChatRequest
from protocol.typed_data import Allocation, Close, Domain

HELLO = [{"role": "user", "content": "hello there"}]
PROMPT = 3
"""Tokens of HELLO by the fake model's count."""


async def wait_idle(worker: Worker) -> None:
    while worker.server.busy:
        await trio.sleep(0.005)


async def still_serves(worker: Worker, client: Client) -> None:
    await wait_idle(worker)
    async with client.chat("fake", HELLO) as stream:
        await stream.text()
    assert stream.receipt is not None
    await wait_idle(worker)
    assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
    assert worker.network.stats.handler_errors == 0, "a peer's mistake is no mistake of a handler"


# ------------------------------------------------------------------------------------------------------------- asks

Case = Callable[[Hand, Worker], Any]


def stocked(hand: Hand, worker: Worker, *, age_ms: int = 0, **model: Any) -> bytes:
    """Put another offer of this worker on its desk; returns its hash."""
    document = hand.offer.document
    models = (type(document.models[0])(**{f: model.get(f, getattr(document.models[0], f))
              for f in document.models[0].__struct_fields__}),)  # fmt: skip
    values = {f: getattr(document, f) for f in document.__struct_fields__}
    values |= {"models": models, "issued": document.issued - age_ms, "expires": document.expires - age_ms}
    message = sign_offer(type(document)(**values), raw_key(worker.key))
    offer = open_offer(message, now_ms=values["issued"] + 1)
    worker.desk._valid[offer.hash] = offer
    return bytes(offer.hash)


ASKS: dict[str, tuple[RefusalReason, Case]] = {
    "another worker's": (RefusalReason.WRONG_WORKER, lambda h, w: h.ask(worker=bytes(20))),
    "a foreign offer": (RefusalReason.OFFER_UNKNOWN, lambda h, w: h.ask(offer_hash=bytes(32))),
    "an expired offer": (
        RefusalReason.OFFER_EXPIRED,
        lambda h, w: h.ask(offer_hash=stocked(h, w, age_ms=600_000)),
    ),
    "an unknown model": (RefusalReason.MODEL_UNKNOWN, lambda h, w: h.ask(model_id=bytes(32))),
    "a parameter that is not sold": (
        RefusalReason.UNSUPPORTED_PARAM,
        lambda h, w: h.ask(offer_hash=stocked(h, w, params=()), params=Params(max_tokens=4, top_k=3)),
    ),
    "too many tokens": (
        RefusalReason.MAX_TOKENS_EXCEEDED,
        lambda h, w: h.ask(offer_hash=stocked(h, w, max_tokens=8)),
    ),
    "a prompt longer than the context": (
        RefusalReason.CONTEXT_EXCEEDED,
        lambda h, w: h.ask(request=ChatRequest(messages=(ChatMessage(role="user", content="a " * 8_200),))),
    ),
    "a prompt that leaves no room": (
        RefusalReason.CONTEXT_EXCEEDED,
        lambda h, w: h.ask(params=Params(max_tokens=8_190)),
    ),
    "an empty prompt": (
        RefusalReason.PROMPT_INVALID,
        lambda h, w: h.ask(request=ChatRequest(messages=(ChatMessage(role="user", content=""),))),
    ),
    "a deadline that is past": (RefusalReason.DEADLINE_INVALID, lambda h, w: h.ask(deadline=w.now_ms())),
    "a deadline in two days": (
        RefusalReason.DEADLINE_INVALID,
        lambda h, w: h.ask(deadline=w.now_ms() + 48 * 3_600_000),
    ),
    "an unknown channel": (RefusalReason.CHANNEL_UNKNOWN, lambda h, w: h.ask(channel_id=bytes(32))),
    "messages changed after signing": (
        RefusalReason.SIGNER_MISMATCH,
        lambda h, w: h.ask(forged=True, request=ChatRequest(messages=(ChatMessage(role="user", content="bye"),))),
    ),
    "parameters changed after signing": (
        RefusalReason.SIGNER_MISMATCH,
        lambda h, w: h.ask(forged=True, params=Params(max_tokens=41)),
    ),
    "a voucher signed by a stranger": (
        RefusalReason.VOUCHER_INVALID,
        lambda h, w: h.ask(voucher=h.voucher(400, key=STRANGER)),
    ),
    "a voucher signed by the payer's cold key": (
        RefusalReason.VOUCHER_INVALID,
        lambda h, w: h.ask(voucher=h.voucher(400, key=raw_key(h.client.wallet.payer))),
    ),
    "a voucher for another channel": (
        RefusalReason.VOUCHER_INVALID,
        lambda h, w: h.ask(voucher=h.voucher(400, channel=bytes(32))),
    ),
    "a voucher for another chain": (
        RefusalReason.VOUCHER_INVALID,
        lambda h, w: h.ask(voucher=h.voucher(400, domain=Domain(1, h.domain.verifying_contract))),
    ),
    "a voucher for another contract": (
        RefusalReason.VOUCHER_INVALID,
        lambda h, w: h.ask(voucher=h.voucher(400, domain=Domain(h.domain.chain_id, Address(bytes(20))))),
    ),
    "a voucher over the allocation": (RefusalReason.ALLOCATION_INSUFFICIENT, lambda h, w: h.ask(1_000_001)),
    "a job over the allocation": (
        RefusalReason.ALLOCATION_INSUFFICIENT,
        lambda h, w: h.ask(offer_hash=stocked(h, w, prices=(Price(output=10**12),)), params=Params(max_tokens=40)),
    ),
    "a long prompt on credit": (
        RefusalReason.VOUCHER_INSUFFICIENT,
        lambda h, w: h.ask(0, request=ChatRequest(messages=(ChatMessage(role="user", content="a " * 200),))),
    ),
}


@pytest.mark.parametrize("case", ASKS)
def test_an_ask_that_may_not_be_is_refused_before_any_work(case: str) -> None:
    reason, make = ASKS[case]

    async def test(market: Market) -> None:
        backend = FakeBackend()
        worker, client = await market.worker(backend), await market.client()
        hand = await Hand.of(client, worker)
        records = worker.ledger.head.seq
        talk = await hand.talk(make(hand, worker))
        answer = await talk.receive()
        assert isinstance(answer, Refuse)
        assert answer.reason is reason, answer.detail
        assert answer.offer is not None, "a retry needs no question"
        assert await talk.receive() is None
        assert (backend.produced, backend.aborted) == (0, 0)
        assert worker.ledger.head.seq == records, "a refusal leaves no trace"
        assert worker.server.stats.refused == {reason.code: 1}
        await still_serves(worker, client)

    run_market(test)


def test_a_prompt_that_is_too_long_for_a_client_without_tokenizer_is_refused_by_name() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend()
        await market.worker(backend)
        client = await market.client()
        with pytest.raises(Refused) as caught:
            async with client.chat("fake", [{"role": "user", "content": "a " * 8_000}]):
                pass
        assert caught.value.reason is RefusalReason.CONTEXT_EXCEEDED
        assert backend.produced == 0

    run_market(test)


def test_an_ask_is_served_once_and_again_from_memory() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend()
        worker = await market.worker(backend, market.settings(ack_ms=50))
        client = await market.client()
        hand = await Hand.of(client, worker)
        ask = hand.ask()
        seen = []
        for _ in range(3):
            talk = await hand.talk(ask)
            ids: list[int] = []
            text = ""
            while not isinstance(message := await talk.receive(), ReceiptMessage):
                assert message is not None
                if isinstance(message, Chunk):
                    ids += message.token_ids
                    text += message.text
            seen.append((ids, text, message))
            await talk.stream.aclose()  # never acknowledged
            await wait_idle(worker)
        assert seen[0] == seen[1] == seen[2]
        assert backend.produced == 40
        state = worker.book.channels[hand.state.channel_id]
        assert state.spent == cost(market.price, PROMPT, 40) and state.sequence == 1
        # Another ask under the same name is neither served nor charged, and a stranger's channel has names of its own.
        again = await hand.talk(hand.ask(job_id=ask.job_id))
        assert isinstance(no := await again.receive(), Refuse) and no.reason is RefusalReason.DUPLICATE_JOB
        other = await Hand.of(await market.client(), worker)
        talk = await other.talk(other.ask(job_id=ask.job_id))
        assert await talk.until(ReceiptMessage) is not None
        await wait_idle(worker)
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []

    run_market(test, seed=8)


def test_an_ack_after_the_second_serving_still_pays() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        hand = await Hand.of(client, worker)
        ask = hand.ask(30)
        talk = await hand.talk(ask)
        heard = 0
        while cost(market.price, PROMPT, heard) <= 30:  # how much one chunk brings depends on the machine
            heard += len((await talk.until(Chunk)).token_ids)
        await talk.stream.reset()
        await wait_idle(worker)
        talk = await hand.talk(ask)
        receipt = await talk.until(ReceiptMessage)
        total = int.from_bytes(receipt.receipt.cost)
        assert total >= cost(market.price, PROMPT, heard) > 30
        await talk.send(Ack(**as_dict(hand.voucher(total))))
        await wait_idle(worker)
        state = worker.book.channels[hand.state.channel_id]
        assert state.cumulative == state.spent == total

    run_market(test)


def as_dict(voucher: Any) -> dict[str, bytes]:
    return {"cumulative": voucher.cumulative, "signature": voucher.signature}


def test_one_part_is_not_served_twice_at_once() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=1_000, seconds_per_token=0.01)))
        hand = await Hand.of(await market.client(), worker)
        ask = hand.ask()
        first, second = await hand.talk(ask), await hand.talk(ask)
        assert isinstance(await first.receive(), Accept)
        assert isinstance(no := await second.receive(), Refuse)
        assert no.reason is RefusalReason.DUPLICATE_JOB

    run_market(test)


# --------------------------------------------------------------------------------------------- vouchers in a stream

VOUCHERS: dict[str, tuple[WireCode, Case]] = {
    "lower": (WireCode.BAD_VOUCHER, lambda h, w: h.voucher(20)),
    "the same": (WireCode.BAD_VOUCHER, lambda h, w: h.voucher(30)),
    "over the allocation": (WireCode.BAD_VOUCHER, lambda h, w: h.voucher(1_000_001)),
    "for another channel": (WireCode.BAD_SIGNATURE, lambda h, w: h.voucher(90, channel=bytes(32))),
    "for another chain": (
        WireCode.BAD_SIGNATURE,
        lambda h, w: h.voucher(90, domain=Domain(5, h.domain.verifying_contract)),
    ),
    "for another contract": (
        WireCode.BAD_SIGNATURE,
        lambda h, w: h.voucher(90, domain=Domain(h.domain.chain_id, Address(bytes(20)))),
    ),
    "signed by a stranger": (WireCode.BAD_SIGNATURE, lambda h, w: h.voucher(90, key=STRANGER)),
    "an ask again": (WireCode.UNEXPECTED, lambda h, w: h.ask()),
    "an ack before the receipt": (WireCode.UNEXPECTED, lambda h, w: Ack(**as_dict(h.voucher(90)))),
}


@pytest.mark.parametrize("case", VOUCHERS)
def test_a_voucher_that_may_not_be_ends_the_part(case: str) -> None:
    code, make = VOUCHERS[case]

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5_000))
        worker, client = await market.worker(backend), await market.client()
        hand = await Hand.of(client, worker)
        talk = await hand.talk(hand.ask(30, params=Params(max_tokens=5_000)))
        assert isinstance(await talk.receive(), Accept)
        await talk.send(make(hand, worker))
        end = await talk.until(Abort, ReceiptMessage)
        assert isinstance(end, Abort) and end.code is code, end
        await wait_idle(worker)
        state = worker.book.channels[hand.state.channel_id]
        assert state.cumulative == 30 and not state.open_jobs
        assert state.owed() <= market.tick
        assert backend.aborted == 1
        assert worker.meter.streams == 0
        await still_serves(worker, client)

    run_market(test)


def test_vouchers_of_one_unit_do_not_fill_the_journal() -> None:
    """C8."""

    async def test(market: Market) -> None:
        worker, client = (
            await market.worker(FakeBackend(FakeSettings(tokens=5_000, prefill_seconds=60))),
            await market.client(),
        )
        hand = await Hand.of(client, worker)
        talk = await hand.talk(hand.ask(100, params=Params(max_tokens=5_000)))
        assert isinstance(await talk.receive(), Accept)
        for amount in range(101, 140):
            with suppress(StreamClosed):
                await talk.send(hand.voucher(amount))
        end = await talk.until(Abort, ReceiptMessage)
        assert isinstance(end, Abort) and end.code is WireCode.BAD_VOUCHER, end
        await wait_idle(worker)
        assert worker.book.channels[hand.state.channel_id].cumulative <= 104

    run_market(test)


def test_vouchers_that_nothing_needs_are_not_journaled() -> None:
    """C8."""

    async def test(market: Market) -> None:
        worker, client = (
            await market.worker(FakeBackend(FakeSettings(tokens=40, prefill_seconds=0.1))),
            await market.client(),
        )
        hand = await Hand.of(client, worker)
        talk = await hand.talk(hand.ask(300, params=Params(max_tokens=100)))  # costs 213 at most
        assert isinstance(await talk.receive(), Accept)
        for amount in range(1_000, 20_000, 1_000):
            await talk.send(hand.voucher(amount))
        await talk.until(ReceiptMessage)
        await talk.send(hand.voucher(20_000))
        await trio.testing.wait_all_tasks_blocked()
        assert worker.book.channels[hand.state.channel_id].cumulative == 300
        await talk.send(Ack(**as_dict(hand.voucher(20_001))))
        await wait_idle(worker)
        assert worker.book.channels[hand.state.channel_id].cumulative == 20_001

    run_market(test)


# ----------------------------------------------------------------------------------------------------------- unpaid


def test_a_client_that_stops_paying_gets_one_tick_and_no_more() -> None:
    """C4."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5_000))
        worker = await market.worker(backend, market.settings(stall_ms=200))
        hand = await Hand.of(await market.client(), worker)
        paid = 100
        talk = await hand.talk(hand.ask(cost(market.price, PROMPT, paid), params=Params(max_tokens=5_000)))
        end = await talk.until(Abort, ReceiptMessage)
        assert isinstance(end, Abort) and end.code is WireCode.UNPAID
        await wait_idle(worker)
        state = worker.book.channels[hand.state.channel_id]
        tick = worker.settings.tick_tokens
        assert state.spent == cost(market.price, PROMPT, paid + tick), "the whole credit window, and nothing beyond it"
        assert state.owed() == market.tick
        assert backend.produced <= paid + 2 * tick, "the engine runs one tick ahead of what may be sent"
        # The debt stays: the next ask must pay it.
        refused = await hand.talk(hand.ask(cost(market.price, PROMPT, paid)))
        assert isinstance(no := await refused.receive(), Refuse)
        assert no.reason is RefusalReason.VOUCHER_INSUFFICIENT
        paying = await hand.talk(hand.ask(cost(market.price, PROMPT, paid + tick) + 400))
        assert isinstance(await paying.receive(), Accept)

    run_market(test, seed=2)


@pytest.mark.parametrize("at_once", [True, False])
def test_twenty_identities_together_get_no_more_than_the_global_cap(at_once: bool) -> None:
    """C5."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=500))
        tick = market.tick
        worker = await market.worker(
            backend, market.settings(market.accepted(credit_limit=5 * tick), stall_ms=150, max_streams=64)
        )
        hands = [await Hand.of(await market.client(means=[market.means(allocation=20_000)]), worker) for _ in range(20)]
        answers: list[Any] = []

        async def steal(hand: Hand) -> None:
            talk = await hand.talk(hand.ask(cost(market.price, PROMPT, 0), params=Params(max_tokens=500)))
            answers.append(await talk.receive())
            await talk.until(Abort)

        async with trio.open_nursery() as nursery:
            for hand in hands:
                if at_once:
                    nursery.start_soon(steal, hand)
                else:
                    await steal(hand)
        await wait_idle(worker)
        lost = sum(state.owed() for state in worker.book.channels.values())
        assert lost == 5 * tick
        refused = [a.reason for a in answers if isinstance(a, Refuse)]
        assert refused == [RefusalReason.CREDIT_EXHAUSTED] * 15
        assert backend.produced <= 5 * 2 * worker.settings.tick_tokens
        # Who pays ahead in full risks nothing of ours and is served all the same.
        async with (await market.client()).chat("fake", HELLO, max_tokens=20) as stream:
            await stream.text()
        assert stream.receipt is not None

    run_market(test)


def test_a_voucher_on_one_stream_lets_the_others_of_its_channel_go_on() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(
            FakeBackend(FakeSettings(tokens=5_000)), market.settings(stall_ms=60_000, coalesce_ms=0)
        )
        hand = await Hand.of(await market.client(), worker)
        talks = [await hand.talk(hand.ask(26, params=Params(max_tokens=5_000))) for _ in range(2)]

        def stuck() -> bool:
            """Both engines are a tick ahead, and the credit is used up: nothing but money moves them."""
            state, serving = worker.book.channels[hand.state.channel_id], worker.server._serving
            full = [s.pending_units >= worker.settings.tick_tokens for s in serving]
            return full == [True, True] and state.owed(worker.meter.running(state.channel_id)) == market.tick

        while not stuck():
            await trio.sleep(0.005)
        await trio.testing.wait_all_tasks_blocked(0.01)
        other = next(s for s in worker.server._serving if s.key[0] == (2).to_bytes(32))
        before = len(other.sent_ids)
        await talks[0].send(hand.voucher(26 + 2 * 1_000))
        with trio.fail_after(10):
            while len(other.sent_ids) == before:
                await trio.sleep(0.005)

    run_market(test)


def test_who_reads_nothing_does_not_hold_the_engine() -> None:
    async def test(market: Market) -> None:
        market.hub.buffer = 2_000
        backend = FakeBackend(FakeSettings(tokens=5_000))
        worker = await market.worker(backend, market.settings(stall_ms=150))
        hand = await Hand.of(await market.client(), worker)
        await hand.talk(hand.ask(900_000, params=Params(max_tokens=5_000)))
        while not backend.aborted:
            await trio.sleep(0.01)
        await wait_idle(worker)
        assert not worker.book.channels[hand.state.channel_id].open_jobs
        assert backend.produced < 5_000

    run_market(test)


def test_who_never_acknowledges_holds_no_place() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(settings=market.settings(max_streams=1, ack_ms=60_000))
        hand = await Hand.of(await market.client(), worker)
        talk = await hand.talk(hand.ask())
        await talk.until(ReceiptMessage)
        assert worker.server.free_slots == 1
        second = await hand.talk(hand.ask(800))
        assert isinstance(await second.receive(), Accept)

    run_market(test)


def test_a_full_worker_says_so() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5_000, seconds_per_token=0.01))
        worker = await market.worker(backend, market.settings(max_streams=2))
        hand = await Hand.of(await market.client(), worker)
        talks = [await hand.talk(hand.ask(1_000)) for _ in range(3)]
        kinds = [type(await talk.receive()) for talk in talks]
        assert kinds == [Accept, Accept, Refuse]
        for talk in talks[:2]:
            await talk.send(Cancel())
            assert (await talk.until(ReceiptMessage)).receipt.finish_reason.code == "cancelled"

    run_market(test)


# -------------------------------------------------------------------------------------------------- leaving, closing


def test_a_payer_who_leaves_in_the_middle_is_served_no_further_and_claimed_at_once() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5_000, seconds_per_token=0.002))
        worker, client = await market.worker(backend, market.settings(ack_ms=50)), await market.client()
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        hand = await Hand.of(client, worker)
        await wait_idle(worker)
        earned = worker.book.channels[hand.state.channel_id].spent
        talk = await hand.talk(hand.ask(earned + 500, params=Params(max_tokens=400)))
        await talk.until(Chunk)
        await client.wallet.chain.initiate_withdraw(hand.state.config)
        receipt = await talk.until(ReceiptMessage)
        assert receipt.receipt.finish_reason.code == "cancelled"
        assert backend.aborted == 1
        await wait_idle(worker)
        while market.ledger.world.escrow.channel(hand.state.channel_id).claimed < earned:
            await trio.sleep(0.01)
        refused = await hand.talk(hand.ask(earned + 900))
        assert isinstance(no := await refused.receive(), Refuse)
        assert no.reason is RefusalReason.CHANNEL_CLOSING
        await worker.claim()
        assert market.ledger.world.escrow.channel(hand.state.channel_id).claimed > earned

    run_market(test)


@pytest.mark.parametrize("case", ["stranger", "too little", "busy"])
def test_a_close_that_may_not_be(case: str) -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=40))
        worker, client = await market.worker(backend), await market.client()
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        hand = await Hand.of(client, worker)
        await wait_idle(worker)
        final = 0 if case == "too little" else stream.cost
        signer = STRANGER if case == "stranger" else raw_key(client.session)
        if case == "busy":
            backend.settings.seconds_per_token = 0.05
            talk = await hand.talk(hand.ask(500))
            await talk.until(Accept)
        wish = Close(hand.state.channel_id, final)
        question = RequestClose(
            channel_id=bytes(hand.state.channel_id),
            final=amount_to_wire(final),
            signature=signer.sign(wish.digest(hand.domain)),
        )
        with pytest.raises(RemoteProtocolError):
            await converse(client.network, worker.key.peer_id, CHANNEL_PROTOCOL, question, timeout_s=5)
        assert worker.book.channels[hand.state.channel_id].final is None

    run_market(test)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"receiver": Address(bytes(20))}, WireCode.BAD_VOUCHER),
        ({"receiver_authorizer": Address(bytes(20))}, WireCode.BAD_VOUCHER),
        ({"token": Address(bytes(20))}, WireCode.WRONG_DOMAIN),
        ({"withdraw_delay": 899}, WireCode.BAD_VOUCHER),
        ({"payer": STRANGER.address}, WireCode.BAD_SIGNATURE),
        ({"salt": Hash32(bytes(31) + b"\x01")}, WireCode.BAD_SIGNATURE),
    ],
    ids=str,
)
def test_a_channel_that_may_not_be_is_not_opened_and_costs_no_gas(change: dict[str, Any], code: WireCode) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        hand = await Hand.of(client, worker)
        state = client.book.channels[hand.state.channel_id]
        head = market.ledger.head.number
        question = OpenChannel(
            chain_id=state.home.chain_id,
            contract=bytes(state.home.verifying_contract),
            config=config_to_wire(replace(state.config, **change)),
            allocated=amount_to_wire(state.authorized),
            valid_before=state.valid_before,
            signature=state.allocation_signature,
        )
        with pytest.raises(RemoteProtocolError) as caught:
            await converse(client.network, worker.key.peer_id, CHANNEL_PROTOCOL, question, timeout_s=5)
        assert caught.value.code is code
        assert market.ledger.head.number == head
        assert len(worker.book.channels) == 1

    run_market(test)


def _open_question(client: Client, state: ChannelState, allocated: int, salt: int | None = None) -> OpenChannel:
    config = state.config if salt is None else replace(state.config, salt=Hash32(salt.to_bytes(32)))
    allocation = Allocation(config.channel_id(state.home), allocated, state.valid_before)
    return OpenChannel(
        chain_id=state.home.chain_id,
        contract=bytes(state.home.verifying_contract),
        config=config_to_wire(config),
        allocated=amount_to_wire(allocated),
        valid_before=state.valid_before,
        signature=raw_key(client.wallet.payer).sign(allocation.digest(state.home)),
    )


async def _refused(client: Client, worker: Worker, question: msgspec.Struct) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        await converse(client.network, worker.key.peer_id, CHANNEL_PROTOCOL, question, timeout_s=5)
    return caught.value


def test_an_allocation_that_adds_too_little_costs_no_gas() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(settings=market.settings(market.accepted(min_allocation=1_000)))
        client = await market.client()
        state = (await Hand.of(client, worker)).state
        head = market.ledger.head.number
        for question in (
            _open_question(client, state, state.authorized + 999),
            _open_question(client, state, 999, salt=1),
        ):
            assert (await _refused(client, worker, question)).code is WireCode.BAD_VOUCHER
        assert market.ledger.head.number == head and len(worker.book.channels) == 1
        more = _open_question(client, state, state.authorized + 1_000)
        await converse(client.network, worker.key.peer_id, CHANNEL_PROTOCOL, more, timeout_s=5)
        assert worker.book.channels[state.channel_id].allocated == state.authorized + 1_000

    run_market(test)


def test_a_channel_that_earned_nothing_goes_home_by_the_delayed_withdrawal() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        state = (await Hand.of(client, worker)).state
        farewell = await client.wallet.close(state.channel_id, worker.key.peer_id)
        assert not farewell.cooperative and farewell.available_at and "0 is earned" in farewell.note
        assert worker.book.channels[state.channel_id].final is None

    run_market(test)


def test_what_one_payer_and_all_payers_can_make_a_worker_submit_is_bounded() -> None:
    """C11."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        rules = worker.channels._rules
        state = (await Hand.of(client, worker)).state
        for salt in range(1, rules.payer_per_day):
            question = _open_question(client, state, 1, salt=salt)
            await converse(client.network, worker.key.peer_id, CHANNEL_PROTOCOL, question, timeout_s=5)
        head = market.ledger.head.number
        one_more = await _refused(client, worker, _open_question(client, state, 1, salt=99))
        assert one_more.code is WireCode.INTERNAL and market.ledger.head.number == head
        await Hand.of(await market.client(), worker)  # others are served

    run_market(test)


def test_the_gas_budget_forgets_after_an_hour_and_a_day() -> None:
    """C11: per payer and in all."""
    rules = ChannelRules(900, payer_per_day=2, all_per_hour=3)
    budget = GasBudget(rules)

    def takes(payer: int, now_s: int) -> bool:
        try:
            budget.take(Address(payer.to_bytes(20)), now_s)
        except RemoteProtocolError:
            return False
        return True

    assert [takes(1, 0), takes(1, 0), takes(1, 0), takes(2, 0), takes(3, 0)] == [True, True, False, True, False]
    assert [takes(3, 3599), takes(3, 3600), takes(1, 3600), takes(1, 86_399)] == [False, True, False, False]
    assert takes(1, 86_400) and len(budget._day) == 2 and set(budget._of) == {Address((n).to_bytes(20)) for n in (1, 3)}


# --------------------------------------------------------------------------------------------------------- nonsense

GARBAGE = {
    "noise": bytes(range(256)) * 40,
    "huge frame": b"\xff\xff\xff\xff",
    "empty frame": bytes(4),
    "not msgpack": b"\x00\x00\x00\x04\xc1\xc1\xc1\xc1",
    "half a frame": b"\x00\x00\x10\x00abc",
    "deep nesting": (100_000).to_bytes(4) + b"\x91" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("protocol", [JOB_PROTOCOL, CHANNEL_PROTOCOL, OFFER_PROTOCOL])
def test_nonsense_ends_its_own_stream(protocol: str) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        for data in GARBAGE.values():
            stream = await client.network.open_stream(worker.key.peer_id, protocol)
            try:
                await stream.send_all(data)
                await stream.aclose()
            except StreamClosed:
                pass
            await trio.sleep(0)
        # Half open: asked nothing, closed nothing.
        waiting = [await client.network.open_stream(worker.key.peer_id, protocol) for _ in range(50)]
        assert worker.server.free_slots > 0
        await still_serves(worker, client)
        for stream in waiting:
            await stream.reset()

    run_market(test, seed=11)


@pytest.mark.parametrize("protocol", [JOB_PROTOCOL, CHANNEL_PROTOCOL, OFFER_PROTOCOL])
@pytest.mark.parametrize("what", [name for name in GARBAGE if name not in ("noise", "nothing", "half a frame")])
def test_what_is_not_understood_is_answered_with_a_wire_code(protocol: str, what: str) -> None:
    """H2: and the conversation beside it goes on."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(FakeBackend(FakeSettings(tokens=60))), await market.client()
        hand = await Hand.of(client, worker)
        beside = await hand.talk(hand.ask(400))
        assert isinstance(await beside.receive(), Accept)
        stream = await client.network.open_stream(worker.key.peer_id, protocol)
        await stream.send_all(GARBAGE[what])
        said = b""
        with trio.fail_after(10):
            while more := await stream.receive_some():
                said += more
        answer = decode(protocol, said[4:])
        assert isinstance(answer, Abort) and answer.code in (WireCode.TOO_LARGE, WireCode.MALFORMED), answer
        assert isinstance(await beside.until(ReceiptMessage), ReceiptMessage)

    run_market(test)


def test_a_stream_that_never_asks_is_ended() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(settings=market.settings(first_byte_ms=100))
        hand = await Hand.of(await market.client(), worker)
        assert await (await hand.talk()).receive() is None
        assert await (await hand.talk(Abort(code=WireCode.CANCELLED))).receive() is None
        assert worker.server.stats.accepted == 0

    run_market(test)


def test_a_client_that_hangs_up_is_charged_for_what_left() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5_000, seconds_per_token=0.001))
        worker, client = await market.worker(backend), await market.client()
        hand = await Hand.of(client, worker)
        for end in ("reset", "aclose"):
            talk = await hand.talk(hand.ask(900, params=Params(max_tokens=400)))
            await talk.until(Chunk)
            await getattr(talk.stream, end)()
            await wait_idle(worker)
        state = worker.book.channels[hand.state.channel_id]
        assert not state.open_jobs and 2 * cost(market.price, PROMPT, 1) <= state.spent <= 900
        assert backend.aborted == 2
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []

    run_market(test)


def test_hanging_up_again_and_again_gets_one_tick_for_nothing_and_no_more() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5_000))
        worker, client = await market.worker(backend), await market.client()
        hand = await Hand.of(client, worker)
        answers = []
        for _ in range(4):
            talk = await hand.talk(hand.ask(cost(market.price, PROMPT, 0), params=Params(max_tokens=5_000)))
            answers.append(type(await talk.receive()))
            if answers[-1] is Accept:
                while worker.meter.running(hand.state.channel_id) < market.tick:
                    await trio.sleep(0.005)
            await talk.stream.reset()
            await wait_idle(worker)
        assert answers == [Accept, Refuse, Refuse, Refuse]
        assert worker.book.channels[hand.state.channel_id].owed() <= market.tick

    run_market(test)
