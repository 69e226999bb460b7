"""A worker breaks its word, and half of its penalty comes to the client by itself: after the delay, once, across restarts, and
never for nothing. Y1 and Y2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio

from node.chain.memory import MemoryChain, MemoryLedger
from node.chain.memory_jobs import MemorySlashes
from node.chain.slashes import MOVE, newest, page_below, read
from node.client import slashes as of_client
from node.client.client import Client
from node.client.job_quotes import JobWish
from node.client.settings import ClientSettings
from node.client.slashes import ClientSlashes
from node.errors import ChainError
from node.store.ledger import Entry
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, key, run_market
from protocol import escrow, slashing
from protocol.batch import Timing
from protocol.escrow import EscrowError, JobState, SlashState
from protocol.escrow.state import BURNT
from protocol.escrow.workers import SLASH_DELAY, book_slash
from protocol.ids import UINT128_MAX, ZERO_ADDRESS, Address, Hash32

DEPOSIT, PENALTY, DAY = 10_000_000, 400, 86_400
LINES = [f"line number {n}" for n in range(10)]
OWNER, STRANGER = key("owner"), key("stranger").address
FAST = Timing(submit_margin=2, accept_grace=1, settle_patience=1, finalize_patience=1, dispute_margin=2)


async def a_client(market: Market, *, least: int = 1, look_s: float = 0.05, deposit: int = DEPOSIT) -> Client:
    quick = ClientSettings(jobs=FAST, job_poll_s=0.05, job_reread_s=0.1, slash_look_s=look_s, slash_min=least)
    return await market.client(settings=quick, name="c", deposit=deposit)


def on_world(market: Market, change: Callable[[escrow.Escrow, int], escrow.Escrow]) -> None:
    market.ledger.apply(lambda world, now: (replace(world, escrow=change(world.escrow, now)), []))


async def broken_word(market: Market, *, penalty: int = PENALTY, **given: Any) -> Client:
    """A job that was refunded: its slash is booked to the client, who refunded it itself."""
    worker = await market.worker(FakeBackend(FakeSettings(tokens=6, seconds_per_token=5)), name="w")
    hot, token = worker.key.address, market.ledger.token

    def stake(state: escrow.Escrow, now: int) -> escrow.Escrow:
        state = escrow.register(state, now, OWNER.address, hot, hot, now + 1, hot)
        state = escrow.deposit(state, token, 10_000, OWNER.address)
        state = escrow.stake(state, OWNER.address, token, 10_000)
        return escrow.set_exposure(state, OWNER.address, token, 10_000)

    on_world(market, stake)
    client = await a_client(market, **given)
    job = await client.post_job("fake", LINES, max_tokens=8, wish=JobWish(min_penalty=penalty))
    assert job.state.quote.penalty == penalty
    market.crash(worker)
    market.ledger.advance(3600)
    await until(lambda: job.state.chain is JobState.REFUNDED)
    return client


async def until(true: Callable[[], Any]) -> None:
    with trio.fail_after(20):
        while not true():
            await trio.sleep(0.005)


def slashes(market: Market) -> list[escrow.Slash]:
    return list(market.ledger.world.escrow.slashes.values())


def moves(market: Market) -> int:
    return [event.name for event in market.ledger.canonical_events()].count("SlashMoved")


def free(market: Market, account: Address) -> int:
    return market.ledger.world.escrow.balance_of(market.ledger.token, account)


def test_a_penalty_comes_by_itself_when_its_delay_is_over_and_not_before() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market)
        payer = client.wallet.payer.address
        (slash,) = slashes(market)
        assert (slash.victim, slash.reporter, slash.amount) == (payer, payer, PENALTY)
        market.ledger.advance(SLASH_DELAY - 60)
        await trio.sleep(0.3)
        assert moves(market) == 0 and free(market, payer) == DEPOSIT
        market.ledger.advance(60)
        await until(lambda: moves(market))
        await trio.sleep(0.3)
        assert moves(market) == 1, "it was moved once"
        assert free(market, payer) == DEPOSIT + PENALTY // 2 + PENALTY // 4
        assert free(market, BURNT) == PENALTY - PENALTY // 2 - PENALTY // 4

    run_market(test)


def test_a_client_that_was_away_for_the_whole_delay_finds_it_on_the_chain() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market)
        market.crash(client)
        market.ledger.advance(90 * 24 * 3600)
        back = await a_client(market, deposit=0)
        await until(lambda: moves(market))
        assert free(market, back.wallet.payer.address) == DEPOSIT + 300

    run_market(test)


def test_a_client_that_does_not_stay_moves_it_by_a_command_and_says_so_first() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market, look_s=3600)  # its own loop has looked, and does not look again
        said: list[tuple[str, int]] = []

        def say(text: str) -> None:
            said.append((text, moves(market)))

        assert await client.jobs.tend(say) == [] and said == []
        market.ledger.advance(SLASH_DELAY)
        assert await client.jobs.tend(say) == [] and moves(market) == 1
        ((text, before),) = said
        assert "0.0003 tUSD of its 0.0004 tUSD" in text and before == 0
        assert await client.jobs.tend(say) == [] and len(said) == moves(market) == 1

    run_market(test)


@pytest.mark.parametrize(("penalty", "least"), [(1, 1), (400, 301), (400, 0)])
def test_nothing_is_sent_for_a_share_that_is_not_worth_it(penalty: int, least: int) -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market, penalty=penalty, least=least)
        assert [slash.amount for slash in slashes(market)] == [penalty]
        market.ledger.advance(SLASH_DELAY)
        await trio.sleep(0.3)
        assert moves(market) == 0
        assert await client.jobs.tend() == []
        assert moves(market) == 0

    run_market(test)


def test_what_somebody_moved_or_a_guardian_cancelled_is_left_alone() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market)
        on_world(market, lambda s, now: replace(s, guardians=frozenset({STRANGER})))
        on_world(market, lambda s, now: escrow.cancel_slash(s, now, STRANGER, 1))
        market.ledger.advance(SLASH_DELAY)
        await trio.sleep(0.3)
        assert moves(market) == 0 and free(market, client.wallet.payer.address) == DEPOSIT
        assert slashes(market)[0].state is SlashState.CANCELLED

    run_market(test)


def test_a_crowd_of_strangers_slashes_hides_none_and_is_not_paid_for() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market)
        crowd(market, 40)
        market.ledger.advance(SLASH_DELAY)
        await until(lambda: moves(market))
        await trio.sleep(0.3)
        assert moves(market) == 1 and free(market, client.wallet.payer.address) == DEPOSIT + 300
        assert [slash.state for slash in slashes(market)] == [SlashState.MOVED] + [SlashState.BOOKED] * 40

    run_market(test)


def crowd(market: Market, count: int) -> None:
    """Slashes of a stranger by a stranger, newer than all others."""
    hot = key("w").address

    def book(state: escrow.Escrow, now: int) -> escrow.Escrow:
        for n in range(count):
            state = book_slash(state, now, hot, market.ledger.token, 5, STRANGER, STRANGER, Hash32(n.to_bytes(32)))
        return state

    on_world(market, book)


def test_what_too_many_newer_ones_hide_is_told_of_and_reached_by_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_client, "WALK_MOST", 32)

    async def test(market: Market) -> None:
        client = await broken_word(market, look_s=3600)
        crowd(market, 80)
        market.ledger.advance(SLASH_DELAY)
        for below in (49, 17):
            (text,) = await client.jobs.tend()
            assert f": {below} and older ones" in text and "slash move --last 81" in text and moves(market) == 0
        assert await client.jobs.tend() == [] and moves(market) == 1
        assert free(market, client.wallet.payer.address) == DEPOSIT + 300

    run_market(test)


@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_read_any_more_for_a_job_whose_slash_has_moved(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market, look_s=3600)
        market.ledger.advance(SLASH_DELAY)
        assert await client.jobs.tend() == [] and moves(market) == 1
        assert await client.jobs.tend() == []
        if again:  # the transaction is in the journal: by it the slash is looked at, and nothing else
            data = "00000000" + (1).to_bytes(32).hex()
            sent = {"purpose": MOVE, "chain_id": client.wallet.chain.chain_id, "data": data}
            await client.book.ledger.append([Entry("tx_signed", b"", sent)])
            client.jobs.slashes = ClientSlashes(book=client.jobs.book, chains=client.jobs.vaults, least=1, look_s=3600)
        crowd(market, 40)
        asked: list[int] = []
        honest = MemorySlashes.get

        async def get(self: MemorySlashes, slash_id: int) -> escrow.Slash:
            asked.append(slash_id)
            return await honest(self, slash_id)

        monkeypatch.setattr(MemorySlashes, "get", get)
        assert await client.jobs.tend() == []
        assert asked == ([1] if again else [])

    run_market(test)


def test_a_client_that_moves_nothing_by_itself_does_not_read_its_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_client, "_sent", lambda ledger: pytest.fail("it was read"))

    async def test(market: Market) -> None:
        client = await market.client(settings=ClientSettings(slash_min=0))
        assert await client.jobs.tend() == []

    run_market(test)


def test_a_chain_that_is_away_is_asked_again() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market)
        market.ledger.advance(SLASH_DELAY - 60)
        market.ledger.outage = 0.01
        market.ledger.advance(60)
        assert any("away" in problem for problem in await client.jobs.tend())
        market.ledger.outage = None
        await until(lambda: moves(market) == 1)

    run_market(test)


def test_a_number_that_a_reorganisation_gave_to_another_is_read_again() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market)
        await trio.sleep(0.2)  # it was seen under its first number
        (mine,) = slashes(market)
        other = replace(mine, victim=STRANGER, reporter=STRANGER)
        on_world(market, lambda s, now: replace(s, slashes={1: other, 2: mine}))
        market.ledger.advance(SLASH_DELAY)
        await until(lambda: moves(market))
        await trio.sleep(0.2)
        assert [slash.state for slash in slashes(market)] == [SlashState.BOOKED, SlashState.MOVED]
        assert free(market, client.wallet.payer.address) == DEPOSIT + 300

    run_market(test)


def test_what_was_a_strangers_before_a_reorganisation_may_be_ours_after_it() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market, look_s=3600)
        (mine,) = slashes(market)
        other = replace(mine, victim=STRANGER, reporter=STRANGER)
        on_world(market, lambda s, now: replace(s, slashes={1: other}))
        assert await client.jobs.tend() == []
        on_world(market, lambda s, now: replace(s, slashes={1: mine}))
        market.ledger.advance(SLASH_DELAY)
        assert await client.jobs.tend() == [] and moves(market) == 1

    run_market(test)


def test_nothing_is_said_of_what_was_cancelled_since_it_was_read() -> None:
    async def test(market: Market) -> None:
        client = await broken_word(market, look_s=3600)
        market.ledger.advance(DAY)
        said: list[str] = []
        assert await client.jobs.tend(said.append) == []
        on_world(market, lambda s, now: replace(s, guardians=frozenset({STRANGER})))
        on_world(market, lambda s, now: escrow.cancel_slash(s, now, STRANGER, 1))
        market.ledger.advance(SLASH_DELAY)
        assert await client.jobs.tend(said.append) == [] and said == [] and moves(market) == 0

    run_market(test)


# --------------------------------------------------------------------------------------------------------------- numbers


def _ledger(count: int) -> MemoryChain:
    ledger = MemoryLedger(clock=lambda: 1_000_000)
    slash = escrow.Slash(OWNER.address, ledger.token, 10, STRANGER, STRANGER, 5, SlashState.BOOKED, Hash32(bytes(32)))
    ledger.apply(
        lambda world, now: (
            replace(world, escrow=replace(world.escrow, slashes={n: slash for n in range(1, count + 1)})),
            [],
        )
    )
    return MemoryChain(ledger, STRANGER)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 100])
def test_the_newest_number_is_found_from_any_known_one(count: int) -> None:
    async def test() -> None:
        chain = _ledger(count)
        for known in range(count + 1):
            assert await newest(chain.slashes, known) == count

    trio.run(test)


def test_pages_cover_every_number_once_and_a_failing_chain_raises_its_error() -> None:
    async def test() -> None:
        chain = _ledger(40)
        first, seen = 40, []
        while first >= 3:
            page = page_below(first, 3)
            seen += [slash_id for slash_id, _ in await read(chain.slashes, page)]
            first = page[-1] - 1
        assert seen == list(range(40, 2, -1))
        chain.ledger.fail_next(3)
        with pytest.raises(ChainError, match="told to fail"):
            await read(chain.slashes, range(1, 10))

    trio.run(test)


@pytest.mark.parametrize("amount", [1, 2, 3, 5, 400, 10**18 + 7, UINT128_MAX])
@pytest.mark.parametrize("victim", [STRANGER, ZERO_ADDRESS, OWNER.address])
@pytest.mark.parametrize("reporter", [STRANGER, ZERO_ADDRESS])
def test_shares_are_what_the_contracts_pay(amount: int, victim: Address, reporter: Address) -> None:
    ledger = MemoryLedger(clock=lambda: 1_000_000)
    slash = escrow.Slash(OWNER.address, ledger.token, amount, victim, reporter, 5, SlashState.BOOKED, Hash32(bytes(32)))
    before = ledger.world.escrow
    state = escrow.stake(
        escrow.deposit(before, ledger.token, amount, OWNER.address), OWNER.address, ledger.token, amount
    )
    state = replace(state, slashes={1: slash})
    with pytest.raises(EscrowError, match="TooEarly"):
        escrow.move_slash(state, 4, 1)
    after = escrow.move_slash(state, 5, 1)
    assert not slashing.is_due(slash, 4) and slashing.is_due(slash, 5)
    assert not slashing.is_due(after.slashes[1], 5) and not slashing.worth_moving(after.slashes[1], STRANGER, 1)
    assert not slashing.worth_moving(slash, STRANGER, 0)
    assert slashing.worth_moving(slash, STRANGER, 1) == (slashing.share_for(slash, STRANGER) > 0)
    for account in {STRANGER, OWNER.address}:
        assert after.balance_of(ledger.token, account) == slashing.share_for(slash, account)
    assert after.balance_of(ledger.token, BURNT) == slashing.shares_of(slash).burnt


def test_a_walk_down_stops_at_the_first_that_was_booked_before() -> None:
    booked = 1_000_000
    slash = escrow.Slash(
        *(OWNER.address, ZERO_ADDRESS, 10, STRANGER, STRANGER, booked + SLASH_DELAY, SlashState.BOOKED),
        Hash32(bytes(32)),
    )
    assert not slashing.is_before(slash, booked) and slashing.is_before(slash, booked + 1)
