"""Crashes, restarts, drains, broken disks and a chain that fails or forgets: nothing is paid twice, nothing is signed blindly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from node.audit import audit
from node.chain.memory import MemoryChain
from node.client.client import Client
from node.errors import ChainError, LedgerError, Refused, SignerOutdated, WorkerFault
from node.ports import ChainEvent, ChannelOnChain, ClaimEntry
from node.store import channels as books
from node.store.channels import ChannelBook
from node.store.writer import Writer
from node.testing.cheaters import Hand
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, raw_key, run_market
from node.worker.worker import Worker
from protocol.channel import ChainSeen, Change, ChannelState, Role
from protocol.errors import LocalProtocolError, RefusalReason
from protocol.ids import ChannelId
from protocol.messages import Accept, Cancel, Chunk, Params, ReceiptMessage, Refuse
from protocol.payment import recovered_costs
from protocol.pricing import cost
from protocol.typed_data import Voucher

HELLO = [{"role": "user", "content": "hello there"}]


def slow(tokens: int = 2_000) -> FakeBackend:
    return FakeBackend(FakeSettings(tokens=tokens, seconds_per_token=0.001))


def the_channel(node: Client | Worker) -> ChannelState:
    (state,) = node.book.channels.values()
    return state


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await trio.sleep(0.005)


async def clean(*nodes: Client | Worker) -> None:
    for node in nodes:
        await node.book.change([])
        chains = node.wallet.chains if isinstance(node, Client) else node.chains
        assert await audit(node.book.ledger, node.book.role, chains) == []


async def greet(client: Client) -> int:
    async with client.chat("fake", HELLO) as stream:
        await stream.text()
    return stream.cost


# ------------------------------------------------------------------------------------------------- crash and restart


def test_a_worker_that_died_in_the_middle_goes_on_from_its_journal() -> None:
    """C6."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(slow(), name="w"), await market.client(name="c")
        with pytest.raises(WorkerFault):
            async with client.chat("fake", HELLO, max_tokens=2_000) as stream:
                async for chunk in stream:
                    if chunk.usage.output_tokens > 150 and worker in market.workers:
                        died = the_channel(worker)
                        market.crash(worker)
        assert died.open_jobs and died.spent == 0

        again = await market.worker(name="w")
        state = the_channel(again)
        expected = recovered_costs(msgspec.structs.replace(died, role=Role.WORKER), market.tick)
        assert state.spent == sum(expected.values()) and not state.open_jobs
        assert the_channel(client).spent >= state.spent, "never charged for what it cannot have delivered"
        assert ChannelBook.restore(again.ledger, Role.WORKER).channels == again.book.channels, "the fold is the state"

        client.history.clear()
        await client.meet(again.network.addresses[0])
        await greet(client)
        await until(lambda: not again.server.busy)
        assert (await again.claim()).claimed == {state.channel_id: the_channel(again).spent}
        assert the_channel(again).claimed <= the_channel(client).cumulative
        await client.wallet.refresh(state.channel_id)
        await clean(again, client)

    run_market(test)


def test_after_a_crash_the_same_ask_is_neither_served_nor_charged_again() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(slow(), name="w"), await market.client()
        hand = await Hand.of(client, worker)
        ask = hand.ask(900, params=Params(max_tokens=400))
        await (await hand.talk(ask)).until(Chunk)
        market.crash(worker)
        backend = FakeBackend()
        again = await market.worker(backend, name="w")
        charged = the_channel(again).spent
        hand.offer = await client.meet(again.network.addresses[0])
        again.desk._valid[hand.offer.hash] = hand.offer
        old = next(iter(worker.desk._valid.values()))
        again.desk._valid[old.hash] = old  # even when it remembers the offer
        answer = await (await hand.talk(ask)).receive()
        assert isinstance(answer, Refuse) and answer.reason is RefusalReason.DUPLICATE_JOB
        assert backend.produced == 0 and the_channel(again).spent == charged

    run_market(test)


def test_a_kept_result_survives_the_worker() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(name="w"), await market.client()
        hand = await Hand.of(client, worker)
        ask = hand.ask()
        first = await (await hand.talk(ask)).until(ReceiptMessage)
        await until(lambda: worker.server.stats.finished)
        market.crash(worker)
        backend = FakeBackend()
        again = await market.worker(backend, name="w")
        await client.meet(again.network.addresses[0])
        second = await (await hand.talk(ask)).until(ReceiptMessage)
        assert second == first and backend.produced == 0
        assert the_channel(again).spent == cost(market.price, 3, 40)

    run_market(test)


def test_a_client_that_died_in_the_middle_counts_all_it_vouched_for() -> None:
    """C6."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(slow()), await market.client(name="c")
        stream = client.chat("fake", HELLO, max_tokens=2_000)
        with pytest.raises(LedgerError):
            async with stream:
                async for chunk in stream:
                    if chunk.usage.output_tokens > 150:
                        market.crash(client)
        died = the_channel(client)
        await until(lambda: not worker.server.busy)
        again = await market.client(name="c", deposit=0)
        state = the_channel(again)
        assert not state.open_jobs and state.spent == state.cumulative == died.cumulative
        assert the_channel(worker).spent - state.spent <= market.tick, "at most the credit window is unpaid"
        assert ChannelBook.restore(again.book.ledger, Role.CLIENT).channels == again.book.channels
        await greet(again)
        await until(lambda: not worker.server.busy)
        await clean(worker, again)

    run_market(test)


def test_the_worker_knows_a_voucher_that_the_client_forgot_to_be_told_of() -> None:
    """Both die; what each remembers still adds up, and the chain pays no more than what was signed."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(slow(), name="w"), await market.client(name="c")
        async with client.chat("fake", HELLO, max_tokens=2_000) as stream:
            async for chunk in stream:
                if chunk.usage.output_tokens > 150:
                    break
            market.crash(worker)
            market.crash(client)
        worker, client = await market.worker(name="w"), await market.client(name="c", deposit=0)
        ours, theirs = the_channel(client), the_channel(worker)
        assert theirs.spent <= theirs.cumulative <= ours.cumulative and theirs.spent <= ours.spent
        await worker.claim()
        farewell = await client.wallet.close(ours.channel_id, worker.key.peer_id)
        assert farewell.cooperative
        seen = market.ledger.world.escrow.channel(ours.channel_id)
        assert seen.closed and seen.claimed == theirs.spent
        assert await client.balance() == 10_000_000 - seen.claimed
        await worker.channels.refresh(ours.channel_id)
        await clean(worker, client)

    run_market(test)


# ---------------------------------------------------------------------------------------------------------- draining


def test_a_draining_worker_takes_nothing_new_and_ends_what_runs() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(slow(200)), await market.client()
        results: list[bool] = []
        async with client.chat("fake", HELLO) as stream:
            await stream.__anext__()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: drained(worker, results))
                await until(lambda: worker.server.draining)
                with pytest.raises(Refused) as caught:
                    async with client.chat("fake", HELLO):
                        pass
                assert caught.value.reason is RefusalReason.DRAINING
                assert not results
                await stream.text()
        assert results == [True] and stream.receipt is not None
        assert stream.usage.output_tokens == 200
        with pytest.raises(WorkerFault, match="draining"):
            async with (await market.client()).chat("fake", HELLO):
                pass

    async def drained(worker: Worker, results: list[bool]) -> None:
        results.append(await worker.drain(10))

    run_market(test)


def test_a_drain_has_an_end() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(slow(100_000)), await market.client()
        async with client.chat("fake", HELLO):
            assert not await worker.drain(0.1)

    run_market(test)


# ------------------------------------------------------------------------------------------------------ broken disks


def break_disk(node: Client | Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no group of this node's journal can be committed."""
    writer = node.book.ledger._writer
    honest = Writer._commit

    def commit(self: Writer, group: Any) -> None:
        if self is not writer:
            return honest(self, group)

        def full(connection: Any) -> None:
            raise OSError("no space left on device")

        honest(self, [(full, group[0][1]), *group[1:]])

    monkeypatch.setattr(Writer, "_commit", commit)


def test_a_worker_whose_disk_fails_signs_nothing_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(slow()), await market.client()
        hand = await Hand.of(client, worker)
        talk = await hand.talk(hand.ask(900, params=Params(max_tokens=400)))
        await talk.until(Chunk)
        break_disk(worker, monkeypatch)
        await talk.send(hand.voucher(950))
        assert await talk.until(ReceiptMessage, Accept, Refuse) is None, "no receipt is sent that was not journaled"
        with trio.fail_after(1):
            await until(lambda: market.failures)
        assert isinstance(market.failures[worker.key.peer_id], LedgerError)
        assert "no space left" in str(market.failures[worker.key.peer_id])
        later = await hand.talk(hand.ask(1_900))
        assert await later.receive() is None, "and nothing is accepted"

    run_market(test)


def test_a_client_whose_disk_fails_says_so_and_pays_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(slow()), await market.client()
        with pytest.raises(LedgerError, match="no space left"):
            async with client.chat("fake", HELLO, max_tokens=2_000) as stream:
                async for _ in stream:
                    if worker.server.busy and client.book.ledger.failure is None:
                        break_disk(client, monkeypatch)
        await until(lambda: not worker.server.busy)
        durable = ChannelBook.restore(client.book.ledger, Role.CLIENT)
        (state,) = durable.channels.values()
        assert the_channel(worker).cumulative == state.cumulative, "no voucher left that is not in the journal"
        with pytest.raises(LedgerError):
            await greet(client)

    run_market(test)


# ----------------------------------------------------------------------------------------------------- chain trouble


def test_a_stale_view_of_the_chain_refuses_new_work_until_it_is_fresh() -> None:
    async def test(market: Market) -> None:
        settings = market.settings(chain_age_limit_ms=100)
        worker = await market.worker(settings=replace(settings, chain_poll_ms=20))
        client = await market.client()
        await greet(client)
        worker.chain.head = failing(worker.chain.head)  # type: ignore[method-assign]
        await until(lambda: worker.chain_age_ms() > 100)
        with pytest.raises(Refused) as caught:
            await greet(client)
        assert caught.value.reason is RefusalReason.CHAIN_STALE
        del worker.chain.head
        await until(lambda: worker.chain_age_ms() < 50)
        client.history.clear()
        await greet(client)

    run_market(test)


def failing(_: Any) -> Any:
    async def head() -> Any:
        await trio.lowlevel.checkpoint()
        raise ChainError("the RPC server does not answer")

    return head


def test_the_loops_outlive_a_chain_that_fails_now_and_then() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(settings=replace(market.settings(), chain_poll_ms=10))
        client = await market.client()
        await greet(client)
        market.ledger.fail_next(3)
        await until(lambda: not market.ledger._failures)
        await greet(client)
        await until(lambda: not worker.server.busy)
        market.ledger.fail_next(2)
        for _ in range(3):
            with suppress(ChainError):  # one of the loops may have met the failure first
                await worker.claim()
        assert the_channel(worker).claimed == the_channel(worker).spent
        assert market.failures == {}

    run_market(test)


def test_a_withdrawal_begun_while_the_chain_could_not_be_read_is_seen_and_claimed() -> None:
    async def test(market: Market) -> None:
        settings = replace(market.settings(), chain_poll_ms=10)
        settings = replace(settings, claims=replace(settings.claims, retry_s=0.02))
        worker = await market.worker(settings=settings)
        client = await market.client()
        await greet(client)
        await until(lambda: not worker.server.busy)
        state = the_channel(worker)
        await client.wallet.chain.initiate_withdraw(state.config)
        market.ledger.fail_next(7)
        await until(lambda: market.ledger.world.escrow.channel(state.channel_id).claimed == state.spent)
        assert the_channel(worker).leaving

    run_market(test)


def forget_allocations(worker: Worker) -> None:
    """It does not submit again what a reorganisation took."""

    async def nothing(channel_id: ChannelId) -> None:
        await trio.lowlevel.checkpoint()

    for watch in worker.watches.values():
        watch._restore = nothing


@pytest.mark.parametrize("running", [False, True])
def test_a_reorg_that_takes_the_allocation_back_ends_the_credit(running: bool) -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=5_000, seconds_per_token=0.002))
        worker, client = await market.worker(backend, market.settings(stall_ms=100)), await market.client()
        hand = await Hand.of(client, worker)
        assert the_channel(worker).allocated == 1_000_000
        await worker.book.change([])
        forget_allocations(worker)
        if running:
            talk = await hand.talk(hand.ask(20_000, params=Params(max_tokens=5_000)))
            await talk.until(Chunk)
        market.ledger.reorg(1, keep=False)
        await until(lambda: the_channel(worker).allocated == 0)
        if running:
            await talk.until(ReceiptMessage)
            await until(lambda: not worker.server.busy)
            assert backend.aborted == 1
            assert backend.produced < 1_000
        refused = await hand.talk(hand.ask(20_000))
        answer = await refused.until(Refuse, Accept)
        assert isinstance(answer, Refuse)
        assert answer.reason is RefusalReason.ALLOCATION_INSUFFICIENT
        # The payer's signature is still good: anybody may submit it again.
        authorised = the_channel(client)
        result = await client.wallet.chain.allocate(
            authorised.config, authorised.authorized, authorised.valid_before, authorised.allocation_signature
        )
        assert result.ok
        await until(lambda: the_channel(worker).allocated == 1_000_000)
        assert isinstance(await (await hand.talk(hand.ask(20_000))).receive(), Accept)

    run_market(test)


def test_a_worker_whose_journal_alone_is_an_old_copy_does_not_start() -> None:
    """K10: its signer has seen a later one."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(name="w"), await market.client()
        await greet(client)
        await until(lambda: not worker.server.busy)
        saved = {end: (market.folder / "w" / f"journal.sqlite{end}").read_bytes() for end in ("", "-wal")}
        await greet(client)
        await until(lambda: not worker.server.busy)
        market.crash(worker)
        for end, data in saved.items():
            (market.folder / "w" / f"journal.sqlite{end}").write_bytes(data)
        with pytest.raises(SignerOutdated, match="old copy"):
            await market.worker(name="w")

    run_market(test)


def test_a_worker_that_starts_from_an_old_copy_takes_nothing_it_did_not_earn_and_leaves_evidence() -> None:
    """Journal and signer's table were both put back, and no fence is here. The chain cannot tell it apart from a payer who claims
    for us; a receipt number that the client saw twice can."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(name="w"), await market.client()
        await greet(client)
        await until(lambda: not worker.server.busy)
        old = (market.folder / "w" / "journal.sqlite").read_bytes()
        wal = (market.folder / "w" / "journal.sqlite-wal").read_bytes()
        table = market.copy_table("w")
        known = the_channel(worker).cumulative
        while the_channel(worker).spent <= known:
            await greet(client)
            await until(lambda: not worker.server.busy)
        await worker.claim()
        market.crash(worker)
        (market.folder / "w" / "journal.sqlite").write_bytes(old)
        (market.folder / "w" / "journal.sqlite-wal").write_bytes(wal)
        market.put_back_table("w", table)
        again = await market.worker(name="w")
        assert the_channel(again).claimed > the_channel(again).cumulative
        client.history.clear()
        await client.meet(again.network.addresses[0])
        await greet(client)
        await until(lambda: not again.server.busy)
        await again.claim()
        seen = market.ledger.world.escrow.channel(the_channel(again).channel_id)
        assert seen.claimed <= the_channel(client).spent
        await client.wallet.refresh(the_channel(client).channel_id)
        findings = await audit(client.book.ledger, Role.CLIENT, client.wallet.chains)
        assert len(findings) == 1 and "is used twice" in findings[0]

    run_market(test)


def test_a_payer_who_claims_for_the_worker_with_a_voucher_it_never_sent_pays_it_and_stops_nothing() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(name="w"), await market.client(name="c")
        other = await market.client()
        await greet(client)
        await greet(other)
        await until(lambda: not worker.server.busy)
        mine = the_channel(client)
        amount = mine.cumulative + 5_000
        voucher = raw_key(client.session).sign(Voucher(mine.channel_id, amount).digest(mine.home))
        result = await client.wallet.chain.claim([ClaimEntry(mine.config, amount, amount, voucher)])
        assert result.ok
        await until(lambda: worker.book.channels[mine.channel_id].claimed == amount)
        state = worker.book.channels[mine.channel_id]
        assert state.claimed > state.cumulative and state.owed() == 0
        await greet(other)
        hand = await Hand.of(client, worker)
        answer = await (await hand.talk(hand.ask(state.cumulative))).receive()
        assert isinstance(answer, Accept), "what was claimed is paid: no further voucher is due"
        await until(lambda: not worker.server.busy)
        await worker.claim(), await worker.claim()
        assert market.failures == {}
        await worker.book.change([])
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
        with pytest.raises(LocalProtocolError, match="old backup"):
            await client.wallet.refresh(mine.channel_id)  # only its own key signs vouchers

        market.crash(worker)
        again = await market.worker(name="w")
        other.history.clear()
        await other.meet(again.network.addresses[0])
        await greet(other)
        assert market.failures == {}

    run_market(test)


@pytest.mark.parametrize("side", Role)
def test_a_slow_answer_of_the_chain_never_overwrites_a_newer_one(side: Role) -> None:
    """C10."""

    async def test(market: Market) -> None:
        worker, client = (
            await market.worker(settings=replace(market.settings(), reread_ms=10**9)),
            await market.client(),
        )
        await greet(client)
        await until(lambda: not worker.server.busy)
        channel = the_channel(client).channel_id
        chain = worker.chain if side is Role.WORKER else client.wallet.chain
        refresh = worker.channels.refresh if side is Role.WORKER else client.wallet.refresh
        honest, arrived, go = chain.channel, trio.Event(), trio.Event()

        async def slow_at_first(channel_id: ChannelId) -> ChannelOnChain:
            seen = await honest(channel_id)
            if not arrived.is_set():
                arrived.set()
                await go.wait()
            return seen

        chain.channel = slow_at_first  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refresh, channel)
            await arrived.wait()
            await client.wallet.chain.initiate_withdraw(the_channel(client).config)
            nursery.start_soon(refresh, channel)
            await trio.testing.wait_all_tasks_blocked()
            go.set()
        assert the_channel(worker if side is Role.WORKER else client).withdraw_at

    run_market(test)


def test_a_withdrawal_that_no_event_told_of_is_seen_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(self: MemoryChain, start: int | None = None) -> AsyncIterator[ChainEvent]:
        await trio.sleep_forever()
        yield  # type: ignore[misc]

    monkeypatch.setattr(MemoryChain, "events", deaf)

    async def test(market: Market) -> None:
        worker = await market.worker(settings=replace(market.settings(), reread_ms=20))
        client = await market.client()
        await greet(client)
        await until(lambda: not worker.server.busy)
        state = the_channel(worker)
        await client.wallet.chain.initiate_withdraw(state.config)
        await until(lambda: market.ledger.world.escrow.channel(state.channel_id).claimed == state.spent)

    run_market(test)


def test_a_channel_whose_sight_breaks_a_rule_is_set_aside_and_the_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C10."""

    async def test(market: Market) -> None:
        settings = replace(market.settings(), reread_ms=20)
        worker, odd, sound = (
            await market.worker(settings=settings, name="w"),
            await market.client(),
            await market.client(),
        )
        await greet(odd)
        await greet(sound)
        await until(lambda: not worker.server.busy)
        channel, honest = the_channel(odd).channel_id, books.apply
        bad = True

        def apply(state: ChannelState, change: Change) -> Any:
            if bad and state.role is Role.WORKER and state.channel_id == channel and isinstance(change, ChainSeen):
                raise LocalProtocolError("planted")
            return honest(state, change)

        monkeypatch.setattr(books, "apply", apply)
        await worker.claim()  # moves both, so there is something new to see of both
        assert worker.book.quarantined == {channel: "planted"}
        with pytest.raises(Refused):
            await greet(odd)
        await greet(sound)
        market.crash(worker)
        worker = await market.worker(settings=settings, name="w")  # the start outlives it, too
        assert market.failures == {} and worker.book.quarantined == {channel: "planted"}
        bad = False
        await until(lambda: not worker.book.quarantined)
        odd.history.clear()
        await odd.meet(worker.network.addresses[0])
        await greet(odd)

    run_market(test)


def test_cancel_crossing_the_end_is_no_fault() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        hand = await Hand.of(client, worker)
        talk = await hand.talk(hand.ask(), Cancel())
        receipt = await talk.until(ReceiptMessage)
        assert receipt.receipt.finish_reason.code in ("cancelled", "length")

    run_market(test, seed=5)
