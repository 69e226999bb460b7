"""Kept results: fetched again by job id until acknowledged or expired, bounded by bytes, durable with their receipt."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from node.store import errors
from node.store.ledger import Entry, Ledger
from node.store.results import KEEP_MS, Results

TAG = b"\x11" * 20
NOW = 1_700_000_000_000


def job(n: int) -> bytes:
    return n.to_bytes(32, "big")


def open_ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "data" / "journal.sqlite", chain_tag=TAG)


def test_a_result_outlives_a_restart_until_it_expires(tmp_path: Path) -> None:
    async def first() -> None:
        with open_ledger(tmp_path) as ledger:
            results = Results(ledger)
            await results.put(job(1), b"one", NOW + KEEP_MS, now_ms=NOW)
            await results.put(job(1), b"one", NOW + KEEP_MS, now_ms=NOW)
            with pytest.raises(errors.ResultConflict):
                await results.put(job(1), b"two", NOW + KEEP_MS, now_ms=NOW)
            assert results.get(job(2)) is None

    async def second() -> None:
        with open_ledger(tmp_path) as ledger:
            results = Results(ledger)
            assert results.get(job(1)) == b"one"
            assert await results.acknowledge(job(1), now_ms=NOW + 5)
            assert not await results.acknowledge(job(2), now_ms=NOW + 5)
            assert results.get(job(1)) == b"one"  # until room is needed
            assert await results.sweep(NOW + KEEP_MS - 1) == 0
            assert await results.sweep(NOW + KEEP_MS) == 1
            assert results.get(job(1)) is None
            assert results.used_bytes() == 0

    trio.run(first)
    trio.run(second)


def test_room_is_made_from_expired_then_oldest_acknowledged_and_never_from_what_waits(tmp_path: Path) -> None:
    async def main() -> None:
        with open_ledger(tmp_path) as ledger:
            results = Results(ledger, max_bytes=100)

            async def put(n: int, size: int, now_ms: int, keep_ms: int = KEEP_MS) -> None:
                await results.put(job(n), bytes(size), now_ms + keep_ms, now_ms=now_ms)

            await put(1, 25, NOW)
            await put(2, 25, NOW)
            await put(3, 25, NOW)
            await put(4, 25, NOW, keep_ms=10)
            with pytest.raises(errors.ResultsFull):
                await put(5, 1, NOW)
            await put(5, 25, NOW + 10)  # in place of 4, which has expired
            assert [n for n in range(1, 6) if results.get(job(n))] == [1, 2, 3, 5]
            await results.acknowledge(job(3), now_ms=NOW + 20)
            await results.acknowledge(job(1), now_ms=NOW + 21)
            await results.acknowledge(job(3), now_ms=NOW + 99)  # the first time counts
            await put(6, 25, NOW + 30)
            assert [n for n in range(1, 7) if results.get(job(n))] == [1, 2, 5, 6]
            with pytest.raises(errors.ResultsFull):
                await put(7, 30, NOW + 30)
            assert [n for n in range(1, 8) if results.get(job(n))] == [1, 2, 5, 6]  # a refusal drops nothing
            assert results.used_bytes() == 100

    trio.run(main)


def test_what_was_released_goes_when_room_is_needed_unless_it_is_wanted_again(tmp_path: Path) -> None:
    async def main() -> None:
        with open_ledger(tmp_path) as ledger:
            results = Results(ledger, max_bytes=100)
            for n in (1, 2):
                await results.put(job(n), bytes(50), NOW + 1000, now_ms=NOW)
                await ledger.append([], also=results.releasing(job(n), now_ms=NOW))
            assert results.used_bytes() == 100 and results.held_bytes(NOW) == 0
            assert await results.extend(job(1), NOW + 500)
            assert results.held_bytes(NOW) == 50
            await results.put(job(3), bytes(50), NOW + 1000, now_ms=NOW)
            assert [n for n in range(1, 4) if results.get(job(n))] == [1, 3]

    trio.run(main)


def test_receipt_and_result_are_durable_together_or_not_at_all(tmp_path: Path) -> None:
    async def main() -> None:
        with open_ledger(tmp_path) as ledger:
            results = Results(ledger, max_bytes=10)
            receipt = Entry("receipt.signed", job(1), {"cost": "5"})
            with pytest.raises(errors.ResultsFull):
                await ledger.append([receipt], also=results.keeping(job(1), bytes(11), NOW + 1, now_ms=NOW))
            assert ledger.head.seq == 0
            before = ledger.commits
            await ledger.append([receipt], also=results.keeping(job(1), b"answer", NOW + 1, now_ms=NOW))
            assert ledger.commits == before + 1
            assert ledger.head.seq == 1
            assert results.get(job(1)) == b"answer"

    trio.run(main)


def test_a_refusal_leaves_the_rest_of_its_group_alone(tmp_path: Path) -> None:
    async def main() -> None:
        outcomes: list[str] = []
        with open_ledger(tmp_path) as ledger:
            results = Results(ledger, max_bytes=10)

            async def keep(n: int) -> None:
                entry = Entry("receipt.signed", job(n), {"n": n})
                try:
                    await ledger.append([entry], also=results.keeping(job(n), bytes(3), NOW + 1, now_ms=NOW))
                    outcomes.append("kept")
                except errors.ResultsFull:
                    outcomes.append("full")

            async with trio.open_nursery() as nursery:
                for n in range(8):
                    nursery.start_soon(keep, n)
            assert sorted(outcomes) == ["full"] * 5 + ["kept"] * 3
            assert ledger.head.seq == 3
        with open_ledger(tmp_path) as ledger:
            kept = [record.subject for record in ledger.records()]
            assert all(Results(ledger).get(job_id) == bytes(3) for job_id in kept)

    trio.run(main)


def test_a_refusal_undoes_what_it_had_begun(tmp_path: Path) -> None:
    async def main() -> None:
        with open_ledger(tmp_path) as ledger:
            results = Results(ledger, max_bytes=10)
            await results.put(job(1), bytes(2), NOW + 1, now_ms=NOW)
            await results.put(job(2), bytes(8), NOW + 100, now_ms=NOW)
            with pytest.raises(errors.ResultsFull):  # dropping the expired one is not enough, so it stays
                await results.put(job(3), bytes(5), NOW + 100, now_ms=NOW + 50)
            assert results.get(job(1)) == bytes(2)

    trio.run(main)


def test_a_job_id_has_32_bytes(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger, pytest.raises(errors.EntryInvalid):
        Results(ledger).keeping(b"short", b"", NOW, now_ms=NOW)
