"""Workers that cheat, stall or die: the client loses at most one window, says whose fault it was, and goes elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio

from node.audit import audit
from node.client.client import Client
from node.client.settings import ClientSettings
from node.errors import NoWorker, Refused, Timeout, VerificationFailed, WorkerFault
from node.network.discovery import fetch_offer
from node.ports import Prompt
from node.testing.cheaters import CHEATS, corrupt, silence
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, run_market
from node.worker.accepted import AcceptedAssets
from node.worker.worker import Worker
from protocol.channel import ChannelState, Role
from protocol.errors import RefusalReason
from protocol.ids import ModelId
from protocol.messages import ChatMessage
from protocol.pricing import Price, cost

HELLO = [{"role": "user", "content": "hello there"}]


def the_channel(client: Client) -> ChannelState:
    (state,) = client.book.channels.values()
    return state


def window(client: Client, worker: Worker) -> int:
    """What a client may lose to one worker: the prompt as it estimates it, and one tick of output."""
    offer = client.offers.of(worker.key.peer_id)
    assert offer is not None
    model = offer.document.models[0]
    prompt = client.choosing.count_tokens(model, [ChatMessage(**m) for m in HELLO], 256)  # type: ignore[arg-type]
    return cost(model.prices[0], prompt, 0) + cost(Price(output=model.prices[0].output), 0, client.settings.tick_tokens)


async def clean(client: Client) -> None:
    assert await audit(client.book.ledger, Role.CLIENT, client.wallet.chains) == []


def test_a_model_that_is_out_of_service_is_not_sold_until_it_is_back() -> None:
    """The offer says so within a moment, an ask under the old one is refused, and both end by themselves."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5))
        worker = await market.worker(backend=backend)
        client = await market.client()
        assert await talk(client)

        async def slots() -> int:
            await fetch_offer(client.network, client.offers, worker.key.peer_id)
            offer = client.offers.of(worker.key.peer_id)
            assert offer is not None
            return offer.document.free_slots

        assert await slots() > 0
        backend.settings.in_service = False
        with pytest.raises((NoWorker, Refused)) as refused:
            await talk(client)
        if isinstance(refused.value, Refused):
            assert refused.value.reason is RefusalReason.BUSY
            assert "not in service" in refused.value.detail
        await trio.sleep(2 * worker.settings.models_poll_ms / 1000 + 0.1)
        assert await slots() == 0
        backend.settings.in_service = True
        await trio.sleep(2 * worker.settings.models_poll_ms / 1000 + 0.1)
        assert await slots() > 0
        assert await talk(await market.client())  # the first one gives a busy worker a rest
        await clean(client)

    run_market(test)


async def talk(client: Client) -> str:
    async with client.chat("fake", HELLO, max_tokens=5) as stream:
        return "".join([chunk.text async for chunk in stream])


ERRORS = {
    "chunk before accept": WorkerFault,
    "accepted twice": WorkerFault,
    "receipt twice": None,  # the first one is true, and nobody reads on
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_named_unpaid_and_avoided(cheat: str) -> None:
    async def test(market: Market) -> None:
        liar = await market.worker()
        corrupt(liar, cheat)
        client = await market.client()
        expected = ERRORS.get(cheat, VerificationFailed)
        delivered = 0
        if expected is None:
            async with client.chat("fake", HELLO) as stream:
                await stream.text()
            return
        with pytest.raises(expected) as caught:
            async with client.chat("fake", HELLO) as stream:
                async for chunk in stream:
                    delivered = chunk.cost
        assert str(liar.key.peer_id) in str(caught.value)
        state = the_channel(client)
        assert delivered <= state.spent <= max(delivered, cost(market.price, 3, 0)) and not state.open_jobs
        assert state.cumulative <= delivered + window(client, liar)
        assert client.history[liar.key.peer_id].failures == 1
        await clean(client)

        with pytest.raises(NoWorker) as none:
            client.chat("fake", HELLO)._choose()
        assert none.value.reasons == {str(liar.key.peer_id): ("recent_failure",)}
        honest = await market.worker()
        await client.meet(honest.network.addresses[0])
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        assert stream.worker == honest.key.peer_id

    run_market(test)


def test_a_cheat_at_the_door_costs_only_a_detour() -> None:
    async def test(market: Market) -> None:
        liar, honest = await market.worker(), await market.worker()
        corrupt(liar, "input overcounted")
        client = await market.client()
        for _ in range(2):
            async with client.chat("fake", HELLO) as stream:
                await stream.text()
            assert stream.worker == honest.key.peer_id

    run_market(test)


def test_with_the_tokenizer_at_hand_one_token_too_many_is_seen() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        client.choosing.counter = lambda model, messages: 3
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        assert stream.usage.input_tokens == 3
        client.choosing.counter = lambda model, messages: 2
        with pytest.raises(VerificationFailed, match="3 prompt tokens"):
            async with client.chat("fake", HELLO):
                pass
        assert client.history[worker.key.peer_id].failures == 1

    run_market(test)


def test_a_worker_that_never_answers() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker()
        silence(worker)
        client = await market.client(settings=ClientSettings(first_token_ms=200))
        with pytest.raises(Timeout):
            async with client.chat("fake", HELLO):
                pass
        assert the_channel(client).spent == 0
        assert the_channel(client).cumulative <= window(client, worker)
        assert client.history[worker.key.peer_id].failures == 1
        await clean(client)

    run_market(test)


def test_a_worker_that_drips_is_ended_by_the_deadline() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=10_000, seconds_per_token=0.1)))
        client = await market.client(settings=ClientSettings(deadline_ms=450, stall_ms=300))
        tokens = 0
        with pytest.raises(Timeout):
            async with client.chat("fake", HELLO) as stream:
                async for chunk in stream:
                    tokens = chunk.usage.output_tokens
        assert 0 < tokens < 10
        assert the_channel(client).spent == cost(market.price, 3, tokens)
        assert not the_channel(client).open_jobs
        await wait_idle(worker)
        await clean(client)

    run_market(test)


def test_a_worker_that_stalls_is_left() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=10_000, seconds_per_token=0.001))
        worker = await market.worker(backend)
        client = await market.client(settings=ClientSettings(stall_ms=200))
        with pytest.raises(Timeout):
            async with client.chat("fake", HELLO) as stream:
                async for _ in stream:
                    backend.settings.seconds_per_token = 60
        await wait_idle(worker)
        assert backend.aborted == 1
        await clean(client)

    run_market(test)


async def wait_idle(worker: Worker) -> None:
    while worker.server.busy:
        await trio.sleep(0.01)


@pytest.mark.parametrize("after", [300, 1_500, 4_000])
@pytest.mark.parametrize("seed", [None, 6])
def test_a_cut_stream_keeps_what_was_paid_for_and_the_rest_comes_home(after: int, seed: int | None) -> None:
    """C6."""

    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=500, seconds_per_token=0.0005)))
        client = await market.client()
        async with client.chat("fake", HELLO) as stream:  # opens the channel
            await stream.text()
        before = the_channel(client)
        market.hub.cut_stream_after(after)
        got: list[int] = []
        stream = client.chat("fake", HELLO, max_tokens=500)
        with pytest.raises(WorkerFault):
            async with stream:
                async for chunk in stream:
                    got += chunk.token_ids
        await wait_idle(worker)
        state = the_channel(client)
        paid = state.spent - before.spent
        assert paid == stream.parts[-1].cost == (cost(market.price, 3, len(got)) if paid else 0)
        assert paid or not got
        assert state.cumulative <= state.spent + window(client, worker)
        theirs = worker.book.channels[state.channel_id]
        assert not theirs.open_jobs
        assert theirs.spent - state.spent <= 2 * market.tick + cost(market.price, 300, 0)

        farewell = await client.wallet.close(state.channel_id, worker.key.peer_id)
        assert farewell.cooperative, farewell.note
        seen = market.ledger.world.escrow.channel(state.channel_id)
        assert seen.closed and seen.claimed <= state.cumulative
        assert await client.balance() == 10_000_000 - seen.claimed
        assert the_channel(client).spent == seen.claimed, "what was conceded at the close is in the journal"
        await clean(client)

    run_market(test, seed=seed)


def test_a_dead_worker_cannot_keep_the_money() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=500, seconds_per_token=0.001)))
        client = await market.client()
        with pytest.raises(WorkerFault):
            async with client.chat("fake", HELLO, max_tokens=500) as stream:
                async for chunk in stream:
                    if chunk.usage.output_tokens > 100:
                        market.crash(worker)
        state = the_channel(client)
        assert state.spent == stream.cost > 0
        first = await client.wallet.close(state.channel_id, worker.key.peer_id)
        assert not first.cooperative and first.available_at
        early = await client.wallet.close(state.channel_id, None)
        assert not early.returned and "left" in early.note
        market.ledger.advance(state.config.withdraw_delay)
        last = await client.wallet.close(state.channel_id, None)
        assert last.returned == state.allocated
        assert await client.balance() == 10_000_000
        await clean(client)

    run_market(test)


class OneAtATime(FakeBackend):
    """Its template is rendered for one conversation at a time, and a long one takes two seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.rendering = threading.Event()
        self.lock = threading.Lock()

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        with self.lock:
            if len(messages[0].content) > 16_384:
                self.rendering.set()
                time.sleep(2)
            return super().prepare(model, messages)


def test_a_long_conversation_that_is_rendered_holds_nobody_up() -> None:
    """A short one waits for its turn without the worker's loop."""
    longest = 0.0

    async def scenario(market: Market) -> None:
        backend = OneAtATime()
        await market.worker(backend)
        client = await market.client(means=[market.means(allocation=5_000_000)])

        async def chat(content: str) -> None:
            async with client.chat("fake", [{"role": "user", "content": content}]) as stream:
                assert await stream.text()

        async def look() -> None:
            nonlocal longest
            while True:
                began = time.monotonic()
                await trio.sleep(0.01)
                longest = max(longest, time.monotonic() - began)

        async with trio.open_nursery() as watch:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(chat, "x" * 20_000)
                while not backend.rendering.is_set():
                    await trio.sleep(0.01)
                watch.start_soon(look)
                nursery.start_soon(chat, "hello there")
            watch.cancel_scope.cancel()

    run_market(scenario)
    assert longest < 1.2


def test_a_model_that_fails_ends_the_part_with_a_typed_error() -> None:
    """C6."""

    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=200, fail_after=30)))
        client = await market.client()
        tokens = 0
        with pytest.raises(WorkerFault, match="backend"):
            async with client.chat("fake", HELLO) as stream:
                async for chunk in stream:
                    tokens = chunk.usage.output_tokens
        assert tokens == 30
        await wait_idle(worker)
        assert the_channel(client).spent == worker.book.channels[the_channel(client).channel_id].spent
        await clean(client)
        farewell = await client.wallet.close(the_channel(client).channel_id, worker.key.peer_id)
        assert farewell.cooperative

    run_market(test)


def test_a_model_that_fails_before_its_first_token_has_sold_nothing() -> None:
    """C9."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=40, fail_after=0))
        worker, client = await market.worker(backend), await market.client()
        with pytest.raises(WorkerFault, match="backend"):
            async with client.chat("fake", HELLO) as stream:
                await stream.text()
        await wait_idle(worker)
        theirs = worker.book.channels[the_channel(client).channel_id]
        assert theirs.spent == the_channel(client).spent == stream.parts[-1].cost == 0
        assert not theirs.open_jobs and not the_channel(client).open_jobs
        assert worker.meter.streams == 0 and worker.server.stats.ended == {"backend": 1}
        backend.settings.fail_after = None
        client.history.clear()
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        await wait_idle(worker)
        assert worker.book.channels[theirs.channel_id].spent == the_channel(client).spent == cost(market.price, 3, 40)
        await clean(client)
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []

    run_market(test)


@pytest.mark.parametrize("ever", [False, True])
def test_a_worker_without_memory_for_a_job_says_so_before_it_takes_it(ever: bool) -> None:
    """A job that will fit when others have ended is to be tried again; one that never will is not."""

    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(room=103))
        worker = await market.worker(backend)
        client = await market.client()
        made_way = 0

        async def make_way(fits: Any) -> bool:
            nonlocal made_way
            made_way += 1
            return bool(fits())

        worker.server.lodger.make_way = make_way  # type: ignore[method-assign, union-attr]
        if ever:
            backend.could_fit = lambda model, tokens: True  # type: ignore[method-assign]
        with pytest.raises(Refused) as caught:
            async with client.chat("fake", HELLO, max_tokens=101) as stream:
                await stream.text()
        assert caught.value.reason is (RefusalReason.BUSY if ever else RefusalReason.CONTEXT_EXCEEDED)
        assert backend.produced == 0 and bool(made_way) is ever, "nothing makes way for what cannot come"
        client.history.clear()
        async with client.chat("fake", HELLO, max_tokens=100) as stream:
            await stream.text()

    run_market(test)


def test_a_channel_that_is_said_to_be_open_and_is_not() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker()

        async def pretend(*_: object) -> bytes:
            return bytes(32)

        worker.channels._submit = pretend  # type: ignore[method-assign, assignment]
        client = await market.client(settings=ClientSettings(lock_wait_ms=100))
        with pytest.raises(WorkerFault, match="the contract has locked 0"):
            async with client.chat("fake", HELLO):
                pass
        assert the_channel(client).cumulative == 0

    run_market(test)


def test_money_cannot_be_asked_back_while_a_job_runs() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=5_000, seconds_per_token=0.001)))
        client = await market.client()
        async with client.chat("fake", HELLO) as stream:
            await stream.__anext__()
            with pytest.raises(Exception, match="under way"):
                await client.wallet.close(the_channel(client).channel_id, worker.key.peer_id)

    run_market(test)


def test_no_worker_says_why_for_every_worker() -> None:
    async def test(market: Market) -> None:
        dear = await market.worker(settings=market.settings(market.accepted(Price(output=10**12))))
        small = await market.worker(settings=replace(market.settings(), max_tokens=8))
        failed = await market.worker()
        full = await market.worker(FakeBackend(FakeSettings(slots=0)))
        client = await market.client(means=[market.means(max_cost=5_000)])
        client.failed(failed.key.peer_id)
        with pytest.raises(NoWorker) as caught:
            async with client.chat("fake", HELLO, max_tokens=16):
                pass
        assert caught.value.reasons == {
            str(dear.key.peer_id): ("price_too_high",),
            str(small.key.peer_id): ("max_tokens_exceeded",),
            str(failed.key.peer_id): ("recent_failure",),
            str(full.key.peer_id): ("busy",),
        }
        with pytest.raises(NoWorker) as caught:
            async with client.chat("no such model", HELLO):
                pass
        assert all(why[0] == "model_unknown" for why in caught.value.reasons.values())
        assert len(caught.value.reasons) == 4
        assert not client.book.channels

    run_market(test)


def test_a_renewed_offer_needs_no_second_question() -> None:
    """The worker was restarted, or its offer ran out: the refusal brings the new one, and the ask goes out again."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        await trio.sleep(0.002)  # the new offer must be younger
        worker.desk._valid, worker.desk._current = {}, None
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        assert stream.receipt is not None
        assert worker.server.stats.refused == {"offer_unknown": 1}
        assert client.history[worker.key.peer_id].failures == 0

    run_market(test)


def test_a_dearer_offer_is_not_taken_silently() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        await trio.sleep(0.002)
        worker.desk._valid, worker.desk._current = {}, None
        dearer = market.accepted(Price(request=10, input=1_000_000, output=2_000_001))
        accepted = AcceptedAssets([dearer], tick_tokens=64, credit_tokens=64)
        worker.desk._terms = replace(worker.desk._terms, accepted=accepted)
        with pytest.raises(Refused) as caught:
            async with client.chat("fake", HELLO):
                pass
        assert caught.value.reason is RefusalReason.OFFER_UNKNOWN
        async with client.chat("fake", HELLO) as stream:  # asked anew, the caller agrees to the new price
            await stream.text()
        assert stream.receipt is not None

    run_market(test)


# --------------------------------------------------------------------------------------------------------- house-keeping


def test_results_past_their_time_go_without_being_asked_for() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(settings=replace(market.settings(), sweep_ms=5))
        now = market.now_ms()
        await worker.results.put(bytes(32), b"for a moment", now + 50, now_ms=now)
        await worker.results.put(bytes([1]) * 32, b"for long", now + 10**9, now_ms=now)
        while worker.results.used_bytes() > len(b"for long"):
            await trio.sleep(0.005)
        assert market.now_ms() >= now + 50
        assert worker.results.get(bytes(32)) is None and worker.results.get(bytes([1]) * 32) == b"for long"

    run_market(test, timeout_s=10)
