"""Allocations, from both ends: what a client signs counts for its day and its channel only when it comes to something, and what a
payer shows a worker is only noted when it has locked money."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from node.audit import audit
from node.chain.memory import Events, World
from node.client.client import Client
from node.errors import InsufficientFunds, NodeError, WorkerFault
from node.network.drive import converse
from node.testing.market import Market, raw_key, run_market
from node.worker.worker import Worker
from protocol.channel import AllocationRaised, Role, VoucherAdded
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.ids import ChannelId, Hash32
from protocol.messages import (
    CHANNEL_PROTOCOL,
    ChannelStatus,
    OpenChannel,
    amount_from_wire,
    amount_to_wire,
    config_to_wire,
)
from protocol.signing import Scope
from protocol.typed_data import Allocation, ChannelConfig, Voucher

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


# ------------------------------------------------------------------------------------------------------------- worker

LEAST = 1_000


class Payer:
    """A hand that signs allocations of one channel, as many as it likes, and can submit them itself."""

    def __init__(self, market: Market, worker: Worker, client: Client) -> None:
        self.worker, self.client = worker, client
        self.key, self.domain = raw_key(client.wallet.payer), market.ledger.domain
        self.until = market.now_ms() // 1000 + 10**6
        self.config = ChannelConfig(
            payer=self.key.address,
            payer_authorizer=self.key.address,
            receiver=worker.key.address,
            receiver_authorizer=worker.key.address,
            token=market.ledger.token,
            withdraw_delay=3600,
            salt=Hash32(bytes(32)),
        )
        self.channel_id: ChannelId = self.config.channel_id(self.domain)

    def signature(self, allocated: int) -> bytes:
        return self.key.sign(Allocation(self.channel_id, allocated, self.until).digest(self.domain))

    async def lock(self, allocated: int) -> None:
        """By a transaction of its own."""
        chain = self.client.wallet.chain
        (await chain.allocate(self.config, allocated, self.until, self.signature(allocated))).sound()

    async def show(self, allocated: int) -> ChannelStatus:
        question = OpenChannel(
            chain_id=self.domain.chain_id,
            contract=bytes(self.domain.verifying_contract),
            config=config_to_wire(self.config),
            allocated=amount_to_wire(allocated),
            valid_before=self.until,
            signature=self.signature(allocated),
        )
        answer = await converse(self.client.network, self.worker.key.peer_id, CHANNEL_PROTOCOL, question, timeout_s=10)
        assert isinstance(answer, ChannelStatus)
        return answer

    async def refused(self, allocated: int) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            await self.show(allocated)
        assert caught.value.code is WireCode.BAD_VOUCHER

    def noted(self) -> int:
        """How many allocations the worker has journaled."""
        kinds = ("channel_opened", "allocation_raised")
        return sum(record.kind in kinds for record in self.worker.ledger.records())


async def payer_of(market: Market) -> Payer:
    worker = await market.worker(settings=market.settings(market.accepted(min_allocation=LEAST)))
    return Payer(market, worker, await market.client())


def test_allocations_below_what_is_locked_do_not_grow_the_journal() -> None:
    """C11. One transaction of a stranger's, and as many signatures as it likes."""

    async def test(market: Market) -> None:
        payer = await payer_of(market)
        await payer.lock(100_000)
        for allocated in (1, LEAST, 99_999):
            await payer.refused(allocated)
        assert payer.channel_id not in payer.worker.book.channels
        assert amount_from_wire((await payer.show(100_000)).allocated) == 100_000
        head = payer.worker.ledger.head.seq
        for allocated in range(1, 100_001, 5_000):
            await payer.show(allocated)
        assert payer.worker.ledger.head.seq == head and payer.noted() == 1

    run_market(test)


def test_raises_by_a_unit_do_not_grow_the_journal() -> None:
    async def test(market: Market) -> None:
        payer = await payer_of(market)
        await payer.show(10_000)
        for more in range(1, 20):
            await payer.lock(10_000 + more)
            await payer.show(10_000 + more)
        assert payer.noted() == 1
        assert payer.worker.book.channels[payer.channel_id].allocated == 10_019, "what is locked counts all the same"
        await payer.lock(10_000 + LEAST)
        await payer.show(10_000 + LEAST)
        assert payer.noted() == 2
        assert payer.worker.book.channels[payer.channel_id].authorized == 10_000 + LEAST

    run_market(test)


def test_vouchers_up_to_a_raise_that_was_not_noted_are_sound() -> None:
    async def test(market: Market) -> None:
        payer = await payer_of(market)
        await payer.show(10_000)
        await payer.lock(10_001)
        await payer.show(10_001)
        worker = payer.worker
        voucher = payer.key.sign(Voucher(payer.channel_id, 10_001).digest(payer.domain))
        await worker.book.change([VoucherAdded(payer.channel_id, 10_001, voucher)])
        state = worker.book.channels[payer.channel_id]
        assert state.cumulative == 10_001 > state.authorized
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []

        def shrink(world: World, _: int) -> tuple[World, Events]:
            channels = dict(world.escrow.channels)
            channels[payer.channel_id] = replace(channels[payer.channel_id], allocated=10_000)
            return replace(world, escrow=replace(world.escrow, channels=channels)), []

        market.ledger.apply(shrink)
        findings = await audit(worker.ledger, Role.WORKER, worker.chains)
        assert any("vouchers of 10001, 10000 locked on chain" in finding for finding in findings)

    run_market(test)


def test_a_channel_of_less_than_the_least_is_not_noted() -> None:
    async def test(market: Market) -> None:
        payer = await payer_of(market)
        await payer.lock(LEAST - 1)
        await payer.refused(LEAST - 1)
        assert not payer.noted()
        await payer.show(2 * LEAST)
        assert payer.noted() == 1

    run_market(test)
