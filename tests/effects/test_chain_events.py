"""From where events are read: nothing of the past that nobody asks for, nothing lost when the reading breaks off."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest
import trio
import trio.testing

from node.chain.memory import MemoryChain, MemoryLedger
from node.errors import ChainError, ReorgTooDeep
from node.ports import REORG_DEPTH, ChainEvent
from node.testing.market import open_market
from protocol.keys import PrivateKey

KEY = PrivateKey(b"\x51" * 32)


def test_without_a_start_only_the_last_blocks_are_told() -> None:
    async def told(chain: MemoryChain, start: int | None, count: int) -> list[int]:
        found = []
        async with aclosing(_as_generator(chain.events(start))) as events:
            async for event in events:
                found.append(event.args["amount"])
                if len(found) == count:
                    return found
        return found

    async def main() -> None:
        ledger = MemoryLedger()
        chain = MemoryChain(ledger, KEY.address)
        ledger.mint(KEY.address, tokens=100)
        await chain.deposit(chain.token, 1)
        ledger.mine(REORG_DEPTH - 2)
        await chain.deposit(chain.token, 2)  # two blocks: the first deposit is now just out of sight
        assert await told(chain, None, 1) == [2]
        assert await told(chain, 0, 2) == [1, 2]

    trio.run(main)


async def _as_generator(events: AsyncIterator[ChainEvent]) -> AsyncIterator[ChainEvent]:
    async for event in events:
        yield event


@pytest.mark.parametrize("error", [ChainError("the node refused"), ReorgTooDeep("the chain was rewritten")])
def test_a_worker_loses_no_event_when_the_reading_breaks_off(
    monkeypatch: pytest.MonkeyPatch, error: ChainError
) -> None:
    """Broken before the event is told, and not taken up again until the chain has gone far on."""
    real = MemoryChain.events
    starts: list[int | None] = []
    broken, go = trio.Event(), trio.Event()

    async def events(self: MemoryChain, start: int | None = None) -> AsyncIterator[ChainEvent]:
        starts.append(start)
        async for event in real(self, start):
            if event.name == "WithdrawInitiated" and not go.is_set():
                broken.set()
                await go.wait()
                raise error
            yield event

    monkeypatch.setattr(MemoryChain, "events", events)

    async def main() -> None:
        with trio.fail_after(20):
            async with open_market() as market:
                settings = replace(market.settings(), chain_poll_ms=10, reread_ms=10**9)
                worker = await market.worker(settings=settings)
                market.ledger.mine(100)
                client = await market.client()
                async with client.chat("fake", [{"role": "user", "content": "hi"}]) as stream:
                    await stream.text()
                (state,) = worker.book.channels.values()
                await client.wallet.chain.initiate_withdraw(state.config)
                await broken.wait()
                market.ledger.mine(3 * REORG_DEPTH)
                go.set()
                while not worker.book.channels[state.channel_id].leaving or len(starts) < 2:
                    await trio.sleep(0.01)
                # It went on from near where it was, or, after a rewritten chain, from near the head it read everything at.
                allocated = next(e for e in market.ledger.canonical_events() if e.name == "Allocated")
                assert starts[1] is not None and starts[1] >= allocated.block_number - REORG_DEPTH > 0

    trio.run(main)
