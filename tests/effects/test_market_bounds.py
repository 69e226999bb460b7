"""What is bounded on both sides: money locked for many chats at once, and memory lent to peers that have not signed anything."""

from __future__ import annotations

import pytest
import trio

from node.client.settings import ClientSettings
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, run_market

HELLO = [{"role": "user", "content": "hello there"}]


@pytest.mark.parametrize("chats", [4, 8])
@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_chats_at_once_raise_a_channel_that_has_room_for_one(chats: int, latency: float) -> None:
    """Whoever loses the race for what is free goes back for more; no caller sees an error of ours."""

    async def scenario(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=20, prefill_seconds=0.05))
        await market.worker(backend, market.settings(max_streams=chats))
        client = await market.client(settings=ClientSettings(allocation=2_000))
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
