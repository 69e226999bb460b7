"""`earnings` adds up to what the channels say, day by day, broken parts included."""

from __future__ import annotations

import json

import trio

from node.cli.earnings import _date, _day, _sums, _table, _total
from node.cli.output import dumps
from node.client.client import Client
from node.earnings import DAY_MS, Day, Earnings, earnings
from node.ports import TokenInfo
from node.store.ledger import Record
from node.testing.market import Market, run_market
from node.worker.worker import Worker
from protocol.channel import JobEnded
from protocol.ids import Address
from protocol.offers import Asset
from protocol.records import kind_of

HELLO = [{"role": "user", "content": "hello there"}]


async def _two_chats(client: Client) -> None:
    for _ in range(2):
        async with client.chat("fake", HELLO, max_tokens=8) as stream:
            async for _ in stream:
                pass


def _records() -> tuple[list[Record], Worker]:
    kept: list[tuple[list[Record], Worker]] = []

    async def test(market: Market) -> None:
        worker = await market.worker()
        client = await market.client()
        await _two_chats(client)
        async with client.chat("fake", HELLO, max_tokens=64) as stream:
            async for _ in stream:
                market.crash(client)  # the worker is left with a part that nobody ends
                break
        with trio.move_on_after(30):
            while worker.server.busy:
                await trio.sleep(0.05)
        kept.append((list(worker.ledger.records()), worker))

    run_market(test)
    return kept[0]


def test_days_add_up_to_the_channels() -> None:
    records, worker = _records()
    found = earnings(records)
    (asset,) = found.assets
    (state,) = worker.book.channels.values()
    assert state.spent > 0
    assert found.total(asset, "spent") == state.spent == sum(day.earned for day in found.days.values())
    assert found.total(asset, "claimable") == state.claimable
    assert sum(day.parts for day in found.days.values()) == 3
    assert sum(day.output_tokens for day in found.days.values()) >= 16


def test_each_part_counts_on_its_own_day() -> None:
    records, _ = _records()
    ended = [record for record in records if record.kind == kind_of(JobEnded)]
    assert len(ended) == 3
    # Records are structs that never change, so the second part is moved to the next day by a copy.
    moved = [
        Record(r.seq, r.at_ms + DAY_MS * (r.seq >= ended[1].seq), r.kind, r.subject, r.body, r.hash) for r in records
    ]
    found = earnings(moved)
    first, second = (found.days[key] for key in sorted(found.days))
    assert (first.parts, second.parts) == (1, 2)
    together = next(iter(earnings(records).days.values()))
    assert first.earned + second.earned == together.earned


def test_the_page_and_the_json_say_the_same() -> None:
    token = Address(b"\x07" * 20)
    asset = Asset(1, bytes(20), token)
    found = Earnings(days={(20_000, asset): Day(3, 1, 30, 12, 1_500_000), (20_001, asset): Day(1, 0, 10, 4, 750_000)})
    info = TokenInfo(token, "tUSD", 6)
    big, small = _table(found, sorted(found.days), {asset: info})
    assert big.startswith(f"{_date(20_000)}  ") and "1.5 tUSD" in big and "1 broken off" in big
    assert big.count("▇") == 2 * small.count("▇") == 24
    assert json.loads(dumps(_day(found, 20_000, asset, "default")))["earned"] == "1500000"
    assert _total(found, asset, "default", info, None)["to_settle"] is None
    assert _sums(found, {}, {}, {}) == ["nothing earned yet"]
