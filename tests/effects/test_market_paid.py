"""Paid chats on a market in memory: whatever the bytes, the crowd and the latency do, both journals and the chain agree."""

from __future__ import annotations

import pytest
import trio

from node.audit import audit
from node.client.client import Client
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, run_market
from node.worker.worker import Worker
from protocol.channel import ChannelState, Role
from protocol.messages import FinishReason
from protocol.pricing import cost

HELLO = [{"role": "user", "content": "hello there"}]


async def settled(worker: Worker) -> None:
    """Until the worker has heard the last ack."""
    while worker.server.busy:
        await trio.sleep(0.01)


def the_channel(node: Worker | Client) -> ChannelState:
    (state,) = node.book.channels.values()
    return state


async def sound(market: Market, worker: Worker, client: Client) -> None:
    """Both journals audit clean, both sides count the same, the chain pays exactly that, and no unit is made or lost."""
    await settled(worker)
    ours, theirs = the_channel(client), the_channel(worker)
    assert ours.spent == theirs.spent <= theirs.cumulative == ours.cumulative <= theirs.allocated
    before = market.ledger.world.escrow
    assert (await worker.claim()).claimed == {theirs.channel_id: theirs.spent}
    token, vault = market.ledger.token, market.ledger.world.escrow
    payer, receiver = client.wallet.payer.address, worker.key.address
    assert vault.balance_of(token, receiver) - before.balance_of(token, receiver) == theirs.spent
    farewell = await client.wallet.close(ours.channel_id, worker.key.peer_id)
    assert farewell.cooperative
    await client.wallet.withdraw(await client.balance())
    await worker.chain.withdraw(token, theirs.spent, receiver)
    world = market.ledger.world
    assert world.coins_of(token, receiver) == theirs.spent
    assert world.coins_of(token, payer) == 10_000_000 - theirs.spent
    assert world.coins_of(token, market.ledger.vault) == 0
    await worker.channels.refresh(ours.channel_id)
    await worker.ledger.write(lambda connection: None)  # an event of the chain may be on its way to the disk
    assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
    assert await audit(client.book.ledger, Role.CLIENT, client.wallet.chains) == []


async def talk(client: Client, **params: object) -> int:
    """One chat to its end; returns its cost, having checked that the receipt says the same."""
    async with client.chat("fake", HELLO, **params) as stream:
        chunks = [chunk async for chunk in stream]
    receipt = stream.receipt
    assert receipt is not None
    assert receipt.output_tokens == sum(len(c.token_ids) for c in chunks)
    assert chunks[-1].cost == stream.cost == receipt.cost
    return receipt.cost


@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"seed": 2, "latency": 0.003}])
def test_one_chat_after_another_on_one_channel(options: dict[str, object]) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        total = 0
        for _ in range(4):
            total += await talk(client)
        assert the_channel(client).spent == total
        await sound(market, worker, client)

    run_market(test, **options)


@pytest.mark.parametrize("options", [{}, {"seed": 3, "latency": 0.002}])
def test_eight_chats_at_once_share_one_channel(options: dict[str, object]) -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=300, seconds_per_token=0.0005))
        settings = market.settings(max_streams=8, stall_ms=2_000)
        worker, client = await market.worker(backend, settings), await market.client()
        costs: list[int] = []

        async def one(max_tokens: int) -> None:
            costs.append(await talk(client, max_tokens=max_tokens))

        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(one, 60 + 40 * n)
        assert the_channel(client).spent == sum(costs)
        assert set(worker.server.stats.ended) == {"length", "stop"}
        await sound(market, worker, client)

    run_market(test, **options)


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "reason"), [(12, 40, FinishReason.STOP), (40, 12, FinishReason.LENGTH)]
)
def test_an_answer_ends_where_the_model_or_the_limit_says(tokens: int, max_tokens: int, reason: FinishReason) -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(tokens=tokens)))
        client = await market.client()
        async with client.chat("fake", HELLO, max_tokens=max_tokens) as stream:
            await stream.text()
        assert stream.finish_reason is reason
        assert stream.usage.output_tokens == 12
        assert stream.receipt is not None
        assert stream.receipt.cost == cost(market.price, stream.usage.input_tokens, 12)
        await sound(market, worker, client)

    run_market(test)


def test_a_long_answer_crosses_many_ticks() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=2_000))
        worker, client = await market.worker(backend), await market.client()
        assert await talk(client, max_tokens=2_000) == cost(market.price, 3, 2_000)
        vouchers = [r for r in worker.ledger.records() if r.kind == "voucher_added"]
        assert len(vouchers) >= 20
        await sound(market, worker, client)

    run_market(test, seed=9)


def test_leaving_early_pays_for_what_was_delivered_and_stops_the_engine() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5_000, seconds_per_token=0.0005))
        worker, client = await market.worker(backend), await market.client()
        async with client.chat("fake", HELLO, max_tokens=5_000) as stream:
            async for chunk in stream:
                if chunk.usage.output_tokens > 100:
                    break
        assert stream.finish_reason is FinishReason.CANCELLED
        assert stream.receipt is not None
        assert stream.receipt.output_tokens >= 101
        tick = worker.settings.tick_tokens
        assert backend.produced <= stream.receipt.output_tokens + tick
        assert backend.aborted == 1
        assert backend.free_slots == backend.settings.slots
        await sound(market, worker, client)

    run_market(test, seed=4)


def test_leaving_before_the_first_token_costs_the_prompt() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(FakeBackend(FakeSettings(prefill_seconds=30)))
        client = await market.client()
        async with client.chat("fake", HELLO) as stream:
            pass
        assert stream.receipt is not None
        assert stream.receipt.cost == cost(market.price, 3, 0)
        await sound(market, worker, client)

    run_market(test)


def test_a_slow_reader_is_served_to_the_end() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=600))
        worker = await market.worker(backend, market.settings(coalesce_ms=0))
        client = await market.client()
        async with client.chat("fake", HELLO, max_tokens=600) as stream:
            await trio.sleep(0.3)
            assert len((await stream.text()).split()) == 600
        await sound(market, worker, client)

    run_market(test, seed=5)
