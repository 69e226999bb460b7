"""What a worker serves on what it sees of its chain (N6, N7): outages, a head that stands still, lying events, reorganisations.

Times are a hundredth of the real ones: a view is stale after 600 ms, channels are read again every 300 ms, an outage lasts 3 s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio

from node.chain.memory import MemoryChain
from node.client.client import Client
from node.errors import ChainError, Refused
from node.ports import ChainEvent, ChannelOnChain
from node.store.channels import ChannelBook
from node.testing.cheaters import Hand
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, run_market
from node.testing.planted import notices, within
from node.worker import serve as serving
from node.worker.watch import ChainWatch
from node.worker.worker import Worker, WorkerSettings
from protocol.channel import ChannelState
from protocol.errors import RefusalReason
from protocol.ids import ChannelId, JobId
from protocol.keys import recover
from protocol.messages import Accept, Chunk, Params, ReceiptMessage, Refuse
from protocol.typed_data import MARKET_DOMAIN, Refusal

HELLO = [{"role": "user", "content": "hello there"}]
OUTAGE_S = 3.0
LIMIT_MS = 600


def scaled(market: Market, **values: Any) -> WorkerSettings:
    settings = market.settings(chain_age_limit_ms=LIMIT_MS, ack_ms=50)
    return replace(settings, chain_poll_ms=20, reread_ms=300, **values)


def the_channel(node: Client | Worker) -> ChannelState:
    (state,) = node.book.channels.values()
    return state


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await trio.sleep(0.005)


async def greet(client: Client) -> None:
    async with client.chat("fake", HELLO) as stream:
        await stream.text()


async def answer(hand: Hand, cumulative: int) -> object:
    return await (await hand.talk(hand.ask(cumulative))).until(Accept, Refuse)


# ---------------------------------------------------------------------------------------------------------------- outage


@pytest.mark.parametrize("silence_s", [0.0, 0.2], ids=["refused", "hung"])
def test_through_an_outage_a_worker_serves_within_its_float_and_comes_back_by_itself(silence_s: float) -> None:
    """Five minutes, scaled. Every answer during it is either an acceptance within the float or a signed refusal."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(settings=scaled(market)), await market.client()
        hand = await Hand.of(client, worker)
        assert isinstance(await answer(hand, 400), Accept)
        await until(lambda: not worker.server.busy)
        began = trio.current_time()
        market.ledger.outage = silence_s
        answers: list[tuple[float, object]] = []
        while trio.current_time() - began < OUTAGE_S:
            paid = the_channel(worker).spent + 400
            answers.append((trio.current_time() - began, await answer(hand, paid)))
            await until(lambda: not worker.server.busy)
            await trio.sleep(0.1)
        market.ledger.outage = None
        accepted = [when for when, what in answers if isinstance(what, Accept)]
        refused = [(when, what) for when, what in answers if isinstance(what, Refuse)]
        assert accepted and max(accepted) <= (LIMIT_MS + 20) / 1000 + 0.25, "nothing is taken beyond the float"
        assert len(refused) > 5 and min(when for when, _ in refused) > 0.3
        for _, no in refused:
            assert no.reason is RefusalReason.CHAIN_STALE and no.offer is not None
        number = hand.number.to_bytes(32)  # of the last ask, which was refused
        last = refused[-1][1]
        digest = Refusal(JobId(number), int(last.reason), last.at).digest(MARKET_DOMAIN)
        assert recover(digest, last.signature) == worker.key.address
        await until(lambda: worker.sight_age_ms(the_channel(worker)) < 100)
        assert isinstance(await answer(hand, the_channel(worker).spent + 400), Accept)
        assert market.failures == {}

    run_market(test)


def test_a_withdrawal_begun_in_an_outage_is_claimed_after_it() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(settings=scaled(market)), await market.client()
        await greet(client)
        await until(lambda: not worker.server.busy)
        state = the_channel(worker)
        market.ledger.outage = 0.0
        await until(lambda: worker.chain_age_ms() > LIMIT_MS)
        market.ledger.outage = None
        withdrawing = client.wallet.chain.initiate_withdraw(state.config)
        await withdrawing
        market.ledger.outage = 0.0
        await trio.sleep(1)
        assert market.ledger.world.escrow.channel(state.channel_id).claimed == 0
        market.ledger.outage = None
        await until(lambda: market.ledger.world.escrow.channel(state.channel_id).claimed == state.spent)

    run_market(test)


@pytest.mark.parametrize("patience", [4500, 1], ids=["a quarter of the delay is over", "it is not"])
def test_work_under_way_ends_when_the_money_may_be_gone(patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PATIENCE", patience)  # 4500 parts of an hour are 800 ms

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=2_000, seconds_per_token=0.002))
        worker, client = await market.worker(backend, scaled(market)), await market.client()
        hand = await Hand.of(client, worker)
        talk = await hand.talk(hand.ask(20_000, params=Params(max_tokens=2_000)))
        await talk.until(Chunk)
        market.ledger.outage = 0.0
        with trio.move_on_after(2.0) as scope:
            await talk.until(ReceiptMessage)
        assert scope.cancelled_caught == (patience == 1)
        if patience > 1:
            await until(lambda: not worker.server.live)
            assert backend.aborted == 1 and 0 < the_channel(worker).spent < 4_000, "what was delivered is booked"

    run_market(test)


def test_a_head_that_stands_still_makes_the_view_stale() -> None:
    """A server that answers with the same old block for ever is no better than one that is silent."""

    async def test(market: Market) -> None:
        ages = {market.ledger.domain: 1}
        worker, client = await market.worker(settings=scaled(market, head_ages_s=ages)), await market.client()
        mining = trio.CancelScope()

        async def mine() -> None:
            with mining:
                while True:
                    market.ledger.mine()
                    await trio.sleep(0.1)

        market.nursery.start_soon(mine)
        await greet(client)
        await trio.sleep(1.5)
        client.history.clear()
        await greet(client)
        mining.cancel()
        await until(lambda: worker.chain_age_ms() > LIMIT_MS)
        with pytest.raises(Refused) as caught:
            await greet(client)
        assert caught.value.reason is RefusalReason.CHAIN_STALE
        market.ledger.mine()
        await until(lambda: worker.chain_age_ms() < 100)
        client.history.clear()
        await greet(client)

    run_market(test)


def test_a_channel_that_cannot_be_read_is_stale_and_the_others_are_served() -> None:
    """The head is fine, one channel is not: a withdrawal on it could be hidden."""

    async def test(market: Market) -> None:
        worker = await market.worker(settings=scaled(market))
        hidden, sound = await market.client(), await market.client()
        await greet(hidden)
        await greet(sound)
        secret = the_channel(hidden).channel_id
        honest = worker.chain.channel

        async def channel(channel_id: ChannelId) -> ChannelOnChain:
            if channel_id == secret:
                raise ChainError("no two servers agree on this channel")
            return await honest(channel_id)

        worker.chain.channel = channel  # type: ignore[method-assign]
        await trio.sleep(0.3 + LIMIT_MS / 1000 + 0.4)
        assert worker.chain_age_ms() < 100
        with pytest.raises(Refused) as caught:
            await greet(hidden)
        assert caught.value.reason is RefusalReason.CHAIN_STALE
        await greet(sound)
        del worker.chain.channel
        await until(lambda: worker.sight_age_ms(the_channel(hidden)) < LIMIT_MS)
        hidden.history.clear()
        await greet(hidden)

    run_market(test)


# ---------------------------------------------------------------------------------------------------------------- events


class Teller:
    """Events as a lying server tells them, instead of the chain's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.send, self.receive = trio.open_memory_channel[ChainEvent](10**6)
        teller = self

        async def events(self: MemoryChain, start: int | None = None) -> AsyncIterator[ChainEvent]:
            async for event in teller.receive.clone():
                yield event

        monkeypatch.setattr(MemoryChain, "events", events)


def test_invented_events_cost_one_look_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    teller = Teller(monkeypatch)

    async def test(market: Market) -> None:
        worker = await market.worker(settings=replace(scaled(market), reread_ms=10**8))
        client = await market.client()
        await greet(client)
        await until(lambda: not worker.server.busy)
        before, looks = the_channel(worker), Counter[ChannelId]()
        honest = worker.chain.channel

        async def channel(channel_id: ChannelId) -> ChannelOnChain:
            looks[channel_id] += 1
            return await honest(channel_id)

        worker.chain.channel = channel  # type: ignore[method-assign]
        stranger = ChannelId(b"\x77" * 32)
        lies = [
            ("Allocated", {"allocated": 10**12}),
            ("WithdrawInitiated", {"withdrawAt": 1}),
            ("Closed", {}),
            ("Claimed", {}),
        ]
        for n in range(1000):
            name, args = lies[n % len(lies)]
            for victim in (before.channel_id, stranger, b"short", "not bytes", None):
                block = bytes([n // 500]) * 32
                teller.send.send_nowait(ChainEvent(name, 10**6, block, n, {**args, "channelId": victim}, n % 7 == 0))
        await until(lambda: not teller.receive.statistics().current_buffer_used)
        await trio.sleep(0.05)
        assert the_channel(worker) == before and set(looks) == {before.channel_id}
        assert looks[before.channel_id] < 600  # two blocks, each now undone and now not; never once per event
        await greet(client)
        assert market.failures == {}

    run_market(test)


def test_hidden_events_are_found_by_reading_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Teller(monkeypatch)  # tells nothing

    async def test(market: Market) -> None:
        worker, client = await market.worker(settings=scaled(market)), await market.client()
        await greet(client)
        await until(lambda: not worker.server.busy)
        state = the_channel(worker)
        began = trio.current_time()
        await client.wallet.chain.initiate_withdraw(state.config)
        await until(lambda: market.ledger.world.escrow.channel(state.channel_id).claimed == state.spent)
        assert trio.current_time() - began < 1.5, "a reading is never further away than its interval"

    run_market(test)


# ------------------------------------------------------------------------------------------------------- reorganisations


def allocations(market: Market, channel_id: ChannelId) -> int:
    return sum(e.name == "Allocated" and e.args["channelId"] == channel_id for e in market.ledger.canonical_events())


def test_a_claim_that_a_reorganisation_took_is_made_again_once() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(settings=scaled(market)), await market.client()
        await greet(client)
        await until(lambda: not worker.server.busy)
        state = the_channel(worker)
        market.ledger.mine(5)
        await worker.claim()  # a claim and a settlement
        market.ledger.mine()
        assert the_channel(worker).claimed == state.spent
        market.ledger.reorg(3, keep=False)
        await until(lambda: the_channel(worker).claimed == 0)
        for _ in range(3):
            await worker.claim()
        assert the_channel(worker).claimed == state.spent
        claims = [e.args["added"] for e in market.ledger.canonical_events() if e.name == "Claimed"]
        settled = [e.args["amount"] for e in market.ledger.canonical_events() if e.name == "Settled"]
        assert claims == settled == [state.spent]

    run_market(test)


@pytest.mark.parametrize("obstacle", ["", "expired", "spent", "leaving"])
def test_an_allocation_that_a_reorganisation_took_is_submitted_again(obstacle: str) -> None:
    """N7: until it is there again nothing is served on it."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(settings=scaled(market)), await market.client()
        market.ledger.mine(12)
        hand = await Hand.of(client, worker)
        state = the_channel(worker)
        market.ledger.mine(11)
        if obstacle == "expired":
            market.ledger.advance(4_000)
            worker.channels._now_s = lambda: market.now_ms() // 1000 + 4_000
        market.ledger.reorg(12 + (obstacle == "expired"), keep=False)
        if obstacle == "spent":
            balance = await client.balance()
            await client.wallet.chain.withdraw(client.wallet.chain.token, balance, client.wallet.payer.address)
        if obstacle == "leaving":
            await worker.book.change([])
            held = worker.book._states[state.channel_id]
            worker.book._states[state.channel_id] = msgspec.structs.replace(held, final=0)
        if obstacle:
            await trio.sleep(1)
            assert allocations(market, state.channel_id) == 0 and the_channel(worker).allocated == 0
            assert isinstance(await answer(hand, 400), Refuse)
            return
        await until(lambda: the_channel(worker).allocated == state.authorized)
        assert isinstance(await answer(hand, 400), Accept)
        await trio.sleep(0.7)
        assert allocations(market, state.channel_id) == 1

    run_market(test)


# ----------------------------------------------------------------------------------------------------------- planted bugs


async def no_look(self: ChainWatch) -> None:
    await trio.sleep_forever()


def always_fresh(self: ChainWatch, head: Any) -> None:
    self._seen = trio.current_time()


async def believing(self: ChainWatch, event: ChainEvent) -> None:
    """An event is taken at its word."""
    book: ChannelBook = self._book
    raw = event.args.get("channelId")
    state = book.get(ChannelId(raw)) if isinstance(raw, bytes) and len(raw) == 32 else None
    if state is not None and event.name == "Allocated":
        book._states[state.channel_id] = msgspec.structs.replace(state, allocated=event.args["allocated"])


PLANTED: dict[str, tuple[str, Any, Callable[..., None], tuple[Any, ...]]] = {
    "channels are never read again": ("_reread", no_look, test_hidden_events_are_found_by_reading_again, ()),
    "any answered head is fresh": ("_note", always_fresh, test_a_head_that_stands_still_makes_the_view_stale, ()),
    "a channel is as fresh as the head": (
        "unread_ms",
        lambda self, channel_id: 0,
        test_a_channel_that_cannot_be_read_is_stale_and_the_others_are_served,
        (),
    ),
    "events are believed": ("_see", believing, test_invented_events_cost_one_look_and_change_nothing, ()),
    "lost allocations are left alone": (
        "_mend",
        no_look,
        test_an_allocation_that_a_reorganisation_took_is_submitted_again,
        ("",),
    ),
    "the view never ages": (
        "age_ms",
        lambda self: 0,
        test_a_head_that_stands_still_makes_the_view_stale,
        (),
    ),
}


TURNS = 1000
"""Of the event loop, before a wait is in vain: the longest of these tests takes 360."""


def watched(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The test that watches for this bug, with little patience."""
    _, _, watch, arguments = PLANTED[name]
    patient = run_market
    monkeypatch.setitem(globals(), "run_market", lambda test: patient(within(TURNS, test)))
    if "monkeypatch" in watch.__code__.co_varnames[: watch.__code__.co_argcount]:
        arguments = (*arguments, monkeypatch)
    return lambda: watch(*arguments)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, bug, _, _ = PLANTED[name]
    monkeypatch.setattr(ChainWatch, what, bug)
    assert notices(watched(name, monkeypatch))


@pytest.mark.parametrize("name", {row[2]: name for name, row in PLANTED.items()}.values())
def test_without_a_bug_that_patience_is_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notices(watched(name, monkeypatch))
