"""A snapshot of the fold saves work and never changes what is so: with it, without it and with a bad one the book is the same."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from node.audit import audit
from node.chain.memory import MemoryChain, MemoryLedger
from node.chains import Chains
from node.store import channels as books
from node.store import snapshot
from node.store.channels import ChannelBook
from node.store.ledger import ADOPTED, Entry, Ledger
from node.testing.pair import Parties
from protocol.channel import ChainSeen, ChannelOpened, ChannelState, JobEnded, JobOpened, Role, VoucherAdded
from protocol.ids import JobId
from protocol.records import decode_state, kind_of, to_body

TAG = b"\x11" * 20
PARTIES = Parties()
CHANNEL = PARTIES.channel_id


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "SNAPSHOT_EVERY", 7)


def journal(tmp_path: Path) -> Path:
    return tmp_path / "data" / "journal.sqlite"


def some_changes(jobs: int) -> list[Any]:
    """A channel with parts that ended, one that was cut off, and one under way."""
    changes: list[Any] = [
        ChannelOpened(CHANNEL, PARTIES.config, 2**100, 2**40 - 1, bytes(65), PARTIES.domain),
        ChainSeen(CHANNEL, 2**100, 0, 0, False),
    ]
    for n in range(jobs):
        job = JobId(n.to_bytes(32))
        changes += [JobOpened(CHANNEL, job, 0, n + 1, 10), VoucherAdded(CHANNEL, (n + 1) * 10, bytes(65))]
        if n < jobs - 1:
            changes.append(JobEnded(CHANNEL, job, 0, 10, n + 1 if n else 0, b"r" if n else b""))
    return changes


async def book_of(ledger: Ledger, changes: list[Any]) -> ChannelBook:
    book = ChannelBook.restore(ledger, Role.WORKER, [PARTIES.domain])
    for change in changes:
        await book.change([change])
    return book


def parts(book: ChannelBook) -> tuple[Any, ...]:
    return book.channels, book.cut_off, book.adopted, book.frozen, {s.channel_id for s in book.at_risk}


def kept(path: Path) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT name, seq FROM snapshots").fetchall()


def folded(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ChannelBook, int]:
    """The book at the next start, and how many records were folded for it."""
    count = 0
    honest = ChannelBook._fold

    def counting(self: ChannelBook, state: None, record: Any) -> None:
        nonlocal count
        count += 1
        honest(self, state, record)

    with monkeypatch.context() as patch, Ledger.open(path, chain_tag=TAG) as ledger:
        patch.setattr(ChannelBook, "_fold", counting)
        return ChannelBook.restore(ledger, Role.WORKER, [PARTIES.domain]), count


def test_a_start_folds_only_what_came_after_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1."""
    path = journal(tmp_path)
    with Ledger.open(path, chain_tag=TAG) as ledger:
        book = trio.run(book_of, ledger, some_changes(12))
        length = ledger.head.seq
    ((name, seq),) = kept(path)
    assert (name, seq) == ("worker", length - length % 7)
    again, count = folded(path, monkeypatch)
    assert count == length - seq < 7
    assert parts(again) == parts(book)
    assert again.cut_off and again.channels[CHANNEL].open_jobs and again.channels[CHANNEL].authorized == 2**100


def test_other_records_between_do_not_confuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of other kinds, appended by other tasks at the same time, are counted by number and not by content."""

    async def main(ledger: Ledger) -> ChannelBook:
        book = ChannelBook.restore(ledger, Role.WORKER, [PARTIES.domain])

        async def others() -> None:
            for n in range(40):
                await ledger.append([Entry("other", b"", {"n": n})])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            for change in some_changes(30):
                await book.change([change])
        return book

    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        book = trio.run(main, ledger)
    again, _ = folded(journal(tmp_path), monkeypatch)
    assert parts(again) == parts(book)


def test_many_tasks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is applied in memory and not yet durable is behind the snapshot in the queue, or in it, and never both."""

    async def main(ledger: Ledger) -> ChannelBook:
        book = ChannelBook.restore(ledger, Role.WORKER, [PARTIES.domain])
        await book.change(some_changes(0)[:2])

        async def job(n: int) -> None:
            number = book.channels[CHANNEL].sequence + 1
            await book.change([JobOpened(CHANNEL, JobId(n.to_bytes(32)), 0, number, 10)])
            await book.change([JobEnded(CHANNEL, JobId(n.to_bytes(32)), 0, 5, number, b"r")])

        async with trio.open_nursery() as nursery:
            for n in range(200):
                nursery.start_soon(job, n)
        return book

    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        book = trio.run(main, ledger)
    assert kept(journal(tmp_path))
    again, _ = folded(journal(tmp_path), monkeypatch)
    assert parts(again) == parts(book)
    assert again.channels[CHANNEL].spent == 1000


def test_an_adoption_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = journal(tmp_path)
    with Ledger.open(path, chain_tag=TAG) as ledger:
        trio.run(book_of, ledger, some_changes(1))
        ledger.append_sync([Entry(ADOPTED, b"", {})] + [Entry("other", b"", {})] * 10)
        book = ChannelBook.restore(ledger, Role.WORKER, [PARTIES.domain])
    assert book.frozen == {CHANNEL}
    again, count = folded(path, monkeypatch)
    assert count == 0 and parts(again) == parts(book)


SPOILED: dict[str, str] = {
    "its bytes": "UPDATE snapshots SET payload = zeroblob(length(payload))",
    "its types": "UPDATE snapshots SET payload = 5, digest = 'text'",
    "a number below the first": "UPDATE snapshots SET seq = 0",
    "its record": "UPDATE snapshots SET hash = zeroblob(32)",
    "its number": "UPDATE snapshots SET seq = seq - 1",
    "a number beyond the end": "UPDATE snapshots SET seq = 10000",
    "other code": "UPDATE snapshots SET code = zeroblob(32)",
    "the other role": "UPDATE snapshots SET name = 'client'",
    "nothing": "DELETE FROM snapshots",
}


@pytest.mark.parametrize("harm", SPOILED)
def test_a_snapshot_that_does_not_hold_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    """L1."""
    path = journal(tmp_path)
    with Ledger.open(path, chain_tag=TAG) as ledger:
        book = trio.run(book_of, ledger, some_changes(12))
        length = ledger.head.seq
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(SPOILED[harm])
    again, count = folded(path, monkeypatch)
    assert count == length
    assert parts(again) == parts(book)


def test_it_is_not_used_after_a_change_of_the_code_that_folds_or_of_the_chains(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        book = ChannelBook(ledger, Role.WORKER, [PARTIES.domain])
        source = tmp_path / "module.py"
        codes = {book._code, ChannelBook(ledger, Role.WORKER)._code}
        for text in ("a = 1", "a = 2"):
            source.write_text(text)
            codes.add(snapshot.code_of([type("Module", (), {"__file__": str(source)})()]))  # type: ignore[list-item]
    assert len(codes) == 4


def test_a_reader_takes_none(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        ledger.append_sync([Entry(kind_of(c), CHANNEL, to_body(c)) for c in some_changes(12)])
    with Ledger.open(journal(tmp_path), chain_tag=TAG, read_only=True) as reader:
        assert ChannelBook.restore(reader, Role.WORKER, [PARTIES.domain]).channels
    assert kept(journal(tmp_path)) == []


@pytest.mark.parametrize("spoil", [None, lambda state: msgspec.structs.replace(state, spent=state.spent + 1)])
def test_audit_folds_everything_and_finds_a_snapshot_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any] | None
) -> None:
    """The planted bug: a snapshot of a state that the records do not lead to, with everything else about it right."""

    def encoded(value: Any) -> Any:
        return to_body(spoil(value) if spoil is not None and isinstance(value, ChannelState) else value)

    monkeypatch.setattr(books, "to_body", encoded)
    chains = Chains({"default": MemoryChain(MemoryLedger(clock=lambda: 0.0), PARTIES.config.receiver)})

    async def main() -> list[str]:
        with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
            with monkeypatch.context() as patch:
                if spoil is not None:
                    patch.setattr(
                        books,
                        "to_body",
                        lambda v: to_body(spoil(v) if hasattr(v, "spent") and hasattr(v, "role") else v),
                    )
                book = ChannelBook.restore(ledger, Role.WORKER, chains.domains)
                for change in some_changes(12):
                    await book.change([change])
            return await audit(ledger, Role.WORKER, chains)

    found = any("snapshot" in finding for finding in trio.run(main))
    assert found is (spoil is not None)


def test_every_field_of_a_state_comes_back(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        state = trio.run(book_of, ledger, some_changes(3)).channels[CHANNEL]
    full = msgspec.structs.replace(state, withdraw_at=7, closed=True, final=2**127, claimed=2**64)
    for one in (state, full, msgspec.structs.replace(state, domain=None, open_jobs={})):
        assert decode_state(msgspec.msgpack.encode(to_body(one))) == one
    assert all(getattr(full, name) not in (None, 0, b"", {}, False) for name in full.__struct_fields__)
