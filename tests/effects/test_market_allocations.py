"""Allocations: what a client signs counts for its day and its channel only when it comes to something."""

from __future__ import annotations

from typing import Any

import pytest

from node.client.client import Client
from node.errors import InsufficientFunds, NodeError, WorkerFault
from node.testing.market import Market, run_market
from protocol.channel import AllocationRaised
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.signing import Scope

HELLO = [{"role": "user", "content": "hello there"}]


async def chat(client: Client) -> str:
    async with client.chat("fake", HELLO, max_tokens=200) as stream:
        return await stream.text()


def locked_today(market: Market, name: str) -> int:
    """What the client's signer has counted for the day's limit."""
    return sum(mark.value for (scope, _), mark in market._tables[name].all() if scope is Scope.DAY_LOCKED)


async def fill(client: Client) -> None:
    """Chats until the channel has no room for one more."""
    (state,) = client.book.channels.values()
    for _ in range(50):
        if client.book.channels[state.channel_id].free < 693:  # what such a chat can cost
            return
        await chat(client)
    raise AssertionError("the channel is not full")


# ------------------------------------------------------------------------------------------------------------- client


def test_a_raise_that_the_vault_cannot_hold_is_not_signed() -> None:
    """A gateway that starts has not looked at its vault yet. What it may lock on one day is not to be used up by tries, and the
    channel is raised as soon as there is money."""

    async def test(market: Market) -> None:
        await market.worker()
        means = [market.means(allocation=1500)]
        client = await market.client(name="a", deposit=2000, means=means)
        await chat(client)
        await fill(client)
        market.crash(client)
        client = await market.client(name="a", deposit=0, means=means)
        assert locked_today(market, "a") == 1500
        for _ in range(3):
            client.wallet._seen.clear()
            with pytest.raises(InsufficientFunds):
                await chat(client)
        assert locked_today(market, "a") == 1500 and len(client.book.channels) == 1
        payer = client.wallet.payer.address
        market.ledger.apply(lambda world, _: (world.pay(market.ledger.token, payer, 10_000), []))
        await client.deposit(10_000)
        assert await chat(client)
        (state,) = client.book.channels.values()
        assert state.allocated == state.authorized == 3000

    run_market(test)


def test_a_first_allocation_that_the_vault_cannot_hold_is_not_signed() -> None:
    async def test(market: Market) -> None:
        await market.worker()
        client = await market.client(name="a", deposit=1000, means=[market.means(allocation=1500)])
        for _ in range(3):
            client.wallet._seen.clear()
            with pytest.raises(InsufficientFunds):
                await chat(client)
        assert locked_today(market, "a") == 0 and not client.book.channels

    run_market(test)


@pytest.mark.parametrize("failed", ["sign", "journal"])
def test_what_was_signed_and_not_journaled_is_gone_past(failed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signer goes on only above it, and the day is charged for it once."""

    async def test(market: Market) -> None:
        await market.worker()
        client = await market.client(name="a", means=[market.means(allocation=1500)])
        await chat(client)
        await fill(client)
        change, sign = client.book.change, client.wallet.payer.sign

        async def not_now(changes: Any, **more: Any) -> Any:
            if any(isinstance(one, AllocationRaised) for one in changes):
                raise LocalProtocolError("planted")
            return await change(changes, **more)

        async def lost(*asked: Any) -> bytes:
            await sign(*asked)
            raise NodeError("planted: signed, and nobody hears of it")

        with monkeypatch.context() as patch:
            if failed == "journal":
                patch.setattr(client.book, "change", not_now)
            else:
                patch.setattr(client.wallet.payer, "sign", lost)
            with pytest.raises((NodeError, LocalProtocolError), match="planted"):
                await chat(client)
        assert locked_today(market, "a") == 3000
        assert await chat(client)
        assert locked_today(market, "a") == 3001
        (state,) = client.book.channels.values()
        assert state.allocated == state.authorized == 3001

    run_market(test)


def test_an_allocation_that_is_good_still_is_sent_again_and_not_signed_again() -> None:
    """The worker submitted it and its answer was lost; it would refuse one that adds a unit."""

    async def test(market: Market) -> None:
        worker = await market.worker(settings=market.settings(market.accepted(min_allocation=1_000)))
        client = await market.client(name="a", means=[market.means(allocation=1500)])
        honest = worker.channels.refresh

        async def mute(*_: Any) -> Any:
            raise RemoteProtocolError(WireCode.INTERNAL, "planted")

        worker.channels.refresh = mute  # type: ignore[method-assign]
        with pytest.raises(WorkerFault, match="planted"):
            await client.open_channel("fake", HELLO, max_tokens=200)
        worker.channels.refresh = honest  # type: ignore[method-assign]
        assert await chat(client)
        (state,) = client.book.channels.values()
        assert state.allocated == state.authorized == locked_today(market, "a") == 1500

    run_market(test)
