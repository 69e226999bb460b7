"""What is bounded on both sides: money locked for many chats at once, and memory lent to peers that have not signed anything."""

from __future__ import annotations

import gc
import math

import pytest
import trio
import trio.testing

from node.client.client import Client
from node.errors import NoWorker
from node.network.drive import HELD, serve_one
from node.network.memory import open_hub
from node.ports import ByteStream, StreamClosed
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, key, run_market
from node.testing.rounds import RoundTrips
from node.worker.worker import Worker
from protocol.frames import CONTROL_LIMIT, FrameReader
from protocol.messages import CHANNEL_PROTOCOL, JOB_PROTOCOL, OFFER_PROTOCOL, ChatMessage
from protocol.pricing import Price, cost
from protocol.selection import History, Policy, PriceLimit

HELLO = [{"role": "user", "content": "hello there"}]


@pytest.mark.parametrize("chats", [4, 8])
@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_chats_at_once_raise_a_channel_that_has_room_for_one(chats: int, latency: float) -> None:
    """Whoever loses the race for what is free goes back for more; no caller sees an error of ours."""

    async def scenario(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=20, prefill_seconds=0.05))
        await market.worker(backend, market.settings(max_streams=chats))
        client = await market.client(means=[market.means(allocation=2_000)])
        texts: list[str] = []

        async def one() -> None:
            async with client.chat("fake", HELLO, max_tokens=256) as stream:
                texts.append(await stream.text())

        async with trio.open_nursery() as nursery:
            for _ in range(chats):
                nursery.start_soon(one)
        assert len(texts) == chats and all(texts)
        for state in client.book.channels.values():
            assert state.reserved == 0 and not state.open_jobs

    run_market(scenario, latency=latency)


def test_a_limit_on_prices_is_kept() -> None:
    async def scenario(market: Market) -> None:
        await market.worker()
        limit = PriceLimit(output=market.price.output - 1)
        client = await market.client(means=[market.means(max_price=limit)])
        with pytest.raises(NoWorker) as caught:
            async with client.chat("fake", HELLO):
                pass
        assert set(caught.value.reasons.values()) == {("price_too_high",)}
        async with client.chat("fake", HELLO, policy=Policy(max_price=PriceLimit())) as stream:
            assert await stream.text()

    run_market(scenario)


@pytest.mark.parametrize(("speed", "ahead"), [(0.0, 64), (1e6, 64), (20.0, 40), (0.5, 8)])
def test_no_more_is_paid_ahead_than_a_worker_delivers_in_its_tick_ms(speed: float, ahead: int) -> None:
    """64 tokens or 2 s, whichever is less, by the speed that we measured ourselves."""

    async def scenario(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(prefill_seconds=math.inf)))
        client = await market.client()
        client.history[worker.key.peer_id] = History(tokens_per_second=speed)
        async with client.chat("fake", HELLO, max_tokens=200) as stream:
            assert stream.channel_id is not None
            (offered,) = client.offers.current()
            prompt = client.choosing.count_tokens(offered.document.models[0], (ChatMessage(**HELLO[0]),), 200)
            vouched = client.book.channels[stream.channel_id].cumulative
            assert vouched == cost(market.price, prompt, 0) + cost(Price(output=market.price.output), 0, ahead)

    run_market(scenario)


@pytest.mark.parametrize("speed", [0.5, 4.0, 15.0])
def test_a_slow_worker_is_paid_by_small_ticks_to_the_end(speed: float) -> None:
    """What a client adds at a time is half of *its* tick: to the worker that is no crumb, however slow it is."""

    async def scenario(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=300, seconds_per_token=0.005)))
        client = await market.client()
        client.history[worker.key.peer_id] = History(tokens_per_second=speed)
        async with client.chat("fake", HELLO, max_tokens=300) as stream:
            assert len((await stream.text()).split()) == 300
        vouchers = [one for one in worker.ledger.records() if one.kind == "voucher_added"]
        assert len(vouchers) > 5 + 2, "more than the few crumbs that are forgiven"

    run_market(scenario)


@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_a_job_on_an_open_channel_costs_one_round_trip(latency: float) -> None:
    """C7: counted on a timeline. The first job also opens a channel, and the count sees that."""

    async def scenario(market: Market) -> None:
        backend = FakeBackend()
        await market.worker(backend)
        client = await market.client()
        for expected in (2, 1, 1):
            with RoundTrips().watch(client.network, backend) as rounds:
                async with client.chat("fake", HELLO) as stream:
                    assert await stream.text()
            assert rounds.before_prompt == expected
            assert "receive" in rounds.events

    run_market(scenario, latency=latency)


# ------------------------------------------------------------------------------------------------ unfinished messages

PARTIAL = CONTROL_LIMIT.to_bytes(4) + bytes(CONTROL_LIMIT - 1)
"""The largest message but for its last byte: nobody has signed anything yet."""


def unfinished() -> int:
    """Bytes that frame readers really hold, whatever the account says."""
    return sum(len(one._buffer) for one in gc.get_objects() if isinstance(one, FrameReader))


async def fill(client: Client, worker: Worker, protocol: str, streams: int) -> list[ByteStream]:
    """Open streams and leave a message unfinished on each."""
    opened = [await client.network.open_stream(worker.key.peer_id, protocol) for _ in range(streams)]

    async def send(stream: ByteStream) -> None:
        try:
            await stream.send_all(PARTIAL)
        except StreamClosed:
            pass

    async with trio.open_nursery() as nursery:
        for stream in opened:
            nursery.start_soon(send, stream)
    await trio.testing.wait_all_tasks_blocked()
    return opened


@pytest.mark.parametrize("protocol", [JOB_PROTOCOL, CHANNEL_PROTOCOL, OFFER_PROTOCOL])
def test_unfinished_messages_fill_no_more_than_what_is_set_aside(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HELD, "limit", 4 << 20)

    async def scenario(market: Market) -> None:
        worker = await market.worker()
        honest = await market.client()
        mallories = [await market.client(deposit=0) for _ in range(6)]
        opened = [stream for one in mallories for stream in await fill(one, worker, protocol, 4)]
        slack = len(opened) * 65536
        assert CONTROL_LIMIT < HELD.total <= 4 << 20
        assert max(HELD.by_peer.values()) <= CONTROL_LIMIT
        assert unfinished() <= HELD.total + slack
        async with honest.chat("fake", HELLO) as stream:
            assert await stream.text()
        for left in opened:
            await left.reset()
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        assert HELD.total == 0 and not HELD.by_peer and unfinished() == 0

    run_market(scenario)


def test_an_ask_has_seconds_from_its_first_byte_and_minutes_before_it() -> None:
    async def scenario(market: Market) -> None:
        worker = await market.worker(settings=market.settings(frame_ms=50))
        client = await market.client()
        silent = await client.network.open_stream(worker.key.peer_id, JOB_PROTOCOL)
        (begun,) = await fill(client, worker, JOB_PROTOCOL, 1)
        with pytest.raises(StreamClosed):
            while await begun.receive_some():
                pass
        assert HELD.total == 0
        with trio.move_on_after(0.2) as waited:
            await silent.receive_some()
        assert waited.cancelled_caught

    run_market(scenario)


def test_a_question_has_seconds_from_its_first_byte_and_minutes_before_it() -> None:
    async def main() -> None:
        async with open_hub() as hub:
            server, client = hub.join(key("server").peer_id), hub.join(key("client").peer_id)

            async def never(*_: object) -> None:
                raise RuntimeError("no question was complete")

            async def handle(stream: ByteStream) -> None:
                await serve_one(stream, OFFER_PROTOCOL, never, timeout_s=math.inf, frame_s=0.05)  # type: ignore[arg-type]

            server.handle(OFFER_PROTOCOL, handle)
            peer = await client.connect(server.addresses[0])
            silent, begun = [await client.open_stream(peer, OFFER_PROTOCOL) for _ in range(2)]
            await begun.send_all(PARTIAL[:1000])
            with pytest.raises(StreamClosed):
                await begun.receive_some()
            with trio.move_on_after(0.2) as waited:
                await silent.receive_some()
            assert waited.cancelled_caught and HELD.total == 0

    trio.run(main)
