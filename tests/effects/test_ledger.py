"""The journal in one process: what `append` promises, what `open` refuses, and that state is the fold of the records."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from node.store import database, errors
from node.store.fold import replay
from node.store.ledger import Entry, Head, Ledger, Record, genesis_hash, record_hash
from node.store.writer import Writer

TAG = b"\x11" * 20


def journal(tmp_path: Path) -> Path:
    return tmp_path / "data" / "journal.sqlite"


def entry(n: int, kind: str = "test.made") -> Entry:
    return Entry(kind, n.to_bytes(32, "big"), {"n": n})


def numbers(ledger: Ledger) -> list[int]:
    return replay(ledger, lambda seen, record: [*seen, msgspec.msgpack.decode(record.body)["n"]], [])


def gated(gate: threading.Event, entered: threading.Event, after: int = 1) -> type[sqlite3.Connection]:
    """A connection whose COMMITs beyond the first `after` wait until the gate opens. (The first is the epoch's.)"""

    class Gated(sqlite3.Connection):
        commits = 0

        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            if sql == "COMMIT":
                Gated.commits += 1
                if Gated.commits > after:
                    entered.set()
                    gate.wait(60)
            return super().execute(sql, *args)

    return Gated


def failing(when: Callable[[str], bool], error: str) -> type[sqlite3.Connection]:
    """A connection that fails with this SQLite error whenever `when(sql)`."""

    class Failing(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            self._maybe(sql)
            return super().execute(sql, *args)

        def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
            self._maybe(sql)
            return super().executemany(sql, *args)

        def _maybe(self, sql: str) -> None:
            if when(sql):
                failure = sqlite3.OperationalError(error)
                failure.sqlite_errorname = error
                raise failure

    return Failing


# What append promises


def test_records_come_back_as_they_were_appended(tmp_path: Path) -> None:
    class Body(msgspec.Struct):
        amount: bytes
        to: str

    with Ledger.open(journal(tmp_path), chain_tag=TAG, clock=lambda: 1_700_000_000_000) as ledger:
        assert ledger.head == Head(0, genesis_hash(TAG))
        written = ledger.append_sync([entry(7), Entry("a.b", b"", Body(b"\xff" * 16, "x"))])
        assert list(ledger.records()) == list(written)
        assert list(ledger.records(after=1)) == [written[1]]
        assert ledger.head == (2, written[1].hash)
    first, second = written
    assert (first.seq, first.at_ms, first.kind) == (1, 1_700_000_000_000, "test.made")
    assert msgspec.msgpack.decode(second.body, type=Body) == Body(b"\xff" * 16, "x")
    assert first.hash == record_hash(
        genesis_hash(TAG), 1, first.at_ms, b"test.made", (7).to_bytes(32, "big"), first.body
    )
    with Ledger.open(journal(tmp_path), chain_tag=TAG, create=False) as again:
        assert tuple(again.records()) == written


def test_the_hash_moves_with_every_field_and_with_their_borders() -> None:
    base = (b"\0" * 32, 1, 2, b"ab", b"cd", b"ef")
    others = [
        (b"\1" * 32, 1, 2, b"ab", b"cd", b"ef"),
        (b"\0" * 32, 2, 2, b"ab", b"cd", b"ef"),
        (b"\0" * 32, 1, 3, b"ab", b"cd", b"ef"),
        (b"\0" * 32, 1, 2, b"abc", b"d", b"ef"),
        (b"\0" * 32, 1, 2, b"ab", b"cde", b"f"),
        (b"\0" * 32, 1, 2, b"ab", b"c", b"def"),
    ]
    assert len({record_hash(*base), *(record_hash(*other) for other in others)}) == 7


def test_append_returns_only_after_its_commit(tmp_path: Path) -> None:
    gate, entered = threading.Event(), threading.Event()

    async def main() -> None:
        with Ledger.open(journal(tmp_path), chain_tag=TAG, factory=gated(gate, entered)) as ledger:
            returned: list[Record] = []

            async def appender() -> None:
                returned.extend(await ledger.append([entry(1)]))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(appender)
                await trio.to_thread.run_sync(entered.wait)
                await trio.testing.wait_all_tasks_blocked()
                assert returned == []
                assert ledger.head.seq == 0
                assert list(ledger.records()) == []
                gate.set()
            assert [record.seq for record in returned] == [1]
            assert ledger.head.seq == 1

    trio.run(main)


def test_concurrent_appends_share_one_commit_and_keep_their_order(tmp_path: Path) -> None:
    gate, entered = threading.Event(), threading.Event()

    async def main() -> None:
        with Ledger.open(journal(tmp_path), chain_tag=TAG, factory=gated(gate, entered)) as ledger:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ledger.append, [entry(0)])
                await trio.to_thread.run_sync(entered.wait)
                for n in range(1, 101):  # all of these queue behind the commit that is under way
                    nursery.start_soon(ledger.append, [entry(n), entry(n + 1000)])
                await trio.testing.wait_all_tasks_blocked()
                gate.set()
            assert ledger.commits == 2
            found = numbers(ledger)
            assert len(found) == 201
            pairs = list(zip(found[1::2], found[2::2], strict=True))
            assert all(second == first + 1000 for first, second in pairs)  # one call's records stay together
            assert sorted(first for first, _ in pairs) == list(range(1, 101))

    trio.run(main)


def test_appends_of_one_task_are_in_order_and_threads_may_append_too(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:

        def worker(name: int) -> None:
            for n in range(20):
                ledger.append_sync([Entry("t", bytes([name]), {"n": n})])

        threads = [threading.Thread(target=worker, args=(name,)) for name in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name in range(5):
            mine = [msgspec.msgpack.decode(r.body)["n"] for r in ledger.records() if r.subject == bytes([name])]
            assert mine == list(range(20))


def test_work_runs_in_the_order_of_its_submission(tmp_path: Path) -> None:
    gate, entered = threading.Event(), threading.Event()
    connection = sqlite3.connect(
        tmp_path / "plain", isolation_level=None, check_same_thread=False, factory=gated(gate, entered, after=0)
    )
    writer = Writer(connection, lambda: None)
    ran: list[int] = []
    writer.submit(lambda _: ran.append(0))
    assert entered.wait(10)
    for n in range(1, 600):
        writer.submit(lambda _, n=n: ran.append(n))  # type: ignore[misc]
    gate.set()
    writer.stop()
    assert ran == list(range(600))
    assert writer.commits == 3  # the lone first one, a full group, the rest
    connection.close()


def test_cancelling_comes_before_the_queue_or_not_at_all(tmp_path: Path) -> None:
    gate, entered = threading.Event(), threading.Event()

    async def main() -> None:
        with Ledger.open(journal(tmp_path), chain_tag=TAG, factory=gated(gate, entered)) as ledger:
            with trio.CancelScope() as early:
                early.cancel()
                await ledger.append([entry(1)])
            assert early.cancelled_caught
            late = trio.CancelScope()
            returned = []

            async def appender() -> None:
                with late:
                    returned.extend(await ledger.append([entry(2)]))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(appender)
                await trio.to_thread.run_sync(entered.wait)
                late.cancel()
                await trio.testing.wait_all_tasks_blocked()
                gate.set()
            assert len(returned) == 1
            assert numbers(ledger) == [2]

    trio.run(main)


@pytest.mark.parametrize(
    "bad",
    [
        Entry("", b"", {}),
        Entry("k" * 65, b"", {}),
        Entry("k\n", b"", {}),
        Entry("ké", b"", {}),
        Entry("k", b"x" * 33, {}),
        Entry("k", b"", {"n": 1 << 64}),
        Entry("k", b"", {"n": object()}),
        Entry("k", b"", {"n": b"x" * (1 << 20)}),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_with_everything_beside_it(tmp_path: Path, bad: Entry) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        with pytest.raises(errors.EntryInvalid):
            ledger.append_sync([entry(1), bad])
        assert list(ledger.records()) == []
        ledger.append_sync([entry(2)])
        assert numbers(ledger) == [2]


def test_nothing_to_append_is_nothing_written(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        assert ledger.append_sync([]) == ()
        assert trio.run(ledger.append, []) == ()
        assert ledger.head.seq == 0


# A failed write is final


@pytest.mark.parametrize("where", ["BEGIN", "INSERT INTO records", "UPDATE head", "COMMIT"])
@pytest.mark.parametrize("error", ["SQLITE_IOERR_WRITE", "SQLITE_FULL", "SQLITE_BUSY"])
def test_after_a_failed_write_nothing_more_is_taken(tmp_path: Path, where: str, error: str) -> None:
    """J4."""
    broken = False
    factory = failing(lambda sql: broken and sql.startswith(where), error)
    ledger = Ledger.open(journal(tmp_path), chain_tag=TAG, factory=factory)
    ledger.append_sync([entry(1)])
    broken = True
    with pytest.raises(errors.LedgerFailed, match=error):
        ledger.append_sync([entry(2)])
    broken = False  # the disk is fine again, but nobody knows what was lost
    with pytest.raises(errors.LedgerFailed):
        ledger.append_sync([entry(3)])
    with pytest.raises(errors.LedgerFailed):
        trio.run(ledger.append, [entry(4)])
    assert ledger.failure is not None and error in ledger.failure
    assert numbers(ledger) == [1]
    ledger.close()
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as again:
        assert numbers(again) == [1]
        again.append_sync([entry(5)])


def test_everybody_waiting_hears_of_the_failure(tmp_path: Path) -> None:
    """J4."""
    gate, entered = threading.Event(), threading.Event()
    first = gated(gate, entered)
    state = {"broken": False}

    class Both(first):  # type: ignore[valid-type, misc]
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            if state["broken"] and sql == "RELEASE work":
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *args)

    async def main() -> None:
        ledger = Ledger.open(journal(tmp_path), chain_tag=TAG, factory=Both)
        outcomes: list[str] = []

        async def appender(n: int) -> None:
            try:
                await ledger.append([entry(n)])
                outcomes.append("ok")
            except errors.LedgerFailed:
                outcomes.append("failed")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(appender, 0)
            await trio.to_thread.run_sync(entered.wait)
            for n in range(1, 21):
                nursery.start_soon(appender, n)
            await trio.testing.wait_all_tasks_blocked()
            state["broken"] = True
            gate.set()
        assert sorted(outcomes) == ["failed"] * 20 + ["ok"]
        assert numbers(ledger) == [0]
        ledger.close()

    trio.run(main)


def test_a_second_writer_that_slipped_past_the_lock_is_caught(tmp_path: Path) -> None:
    path = journal(tmp_path)
    old = Ledger.open(path, chain_tag=TAG)
    old.append_sync([entry(1)])
    path.with_name(path.name + ".lock").unlink()  # what nobody should do
    new = Ledger.open(path, chain_tag=TAG)
    new.append_sync([entry(2)])
    with pytest.raises(errors.LedgerFailed):
        old.append_sync([entry(3)])
    old.close()
    new.append_sync([entry(4)])
    assert numbers(new) == [1, 2, 4]
    new.close()


def test_after_close_nothing_is_taken_and_closing_twice_is_fine(tmp_path: Path) -> None:
    ledger = Ledger.open(journal(tmp_path), chain_tag=TAG)
    ledger.append_sync([entry(1)])
    ledger.close()
    ledger.close()
    with pytest.raises(errors.LedgerClosed):
        ledger.append_sync([entry(2)])
    assert not journal(tmp_path).with_name("journal.sqlite-wal").exists()


# What open refuses


def test_a_second_opener_in_the_same_process_is_refused(tmp_path: Path) -> None:
    """J3."""
    with Ledger.open(journal(tmp_path), chain_tag=TAG), pytest.raises(errors.LedgerLocked):
        Ledger.open(journal(tmp_path), chain_tag=TAG)
    Ledger.open(journal(tmp_path), chain_tag=TAG).close()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    Ledger.open(journal(tmp_path), chain_tag=TAG).close()
    assert journal(tmp_path).stat().st_mode & 0o777 == 0o600
    journal(tmp_path).chmod(mode)
    for read_only in (False, True):
        with pytest.raises(errors.LedgerUnsafe, match="chmod 600"):
            Ledger.open(journal(tmp_path), chain_tag=TAG, read_only=read_only)


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    Ledger.open(journal(tmp_path), chain_tag=TAG).close()
    assert journal(tmp_path).parent.stat().st_mode & 0o777 == 0o700
    journal(tmp_path).parent.chmod(0o750)
    with pytest.raises(errors.LedgerUnsafe, match="chmod 700"):
        Ledger.open(journal(tmp_path), chain_tag=TAG)


def test_every_file_beside_the_journal_is_private(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        ledger.append_sync([entry(1)])
        for path in journal(tmp_path).parent.iterdir():
            assert path.stat().st_mode & 0o077 == 0, path.name


@pytest.mark.parametrize("setting", [("synchronous", "NORMAL"), ("synchronous", "OFF"), ("journal_mode", "delete")])
def test_a_setting_that_would_lose_records_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: tuple[str, str]
) -> None:
    """The planted bug: the settings are made wrongly, and only the reading back can see it."""
    Ledger.open(journal(tmp_path), chain_tag=TAG).close()
    monkeypatch.setattr(database, "SETTINGS", (*tuple(s for s in database.SETTINGS if s[0] != setting[0]), setting))
    with pytest.raises(errors.LedgerUnsafe, match=setting[0]):
        Ledger.open(journal(tmp_path), chain_tag=TAG)


def test_a_missing_journal_is_not_made_unless_asked(tmp_path: Path) -> None:
    for read_only in (False, True):
        with pytest.raises(errors.LedgerMissing):
            Ledger.open(journal(tmp_path), chain_tag=TAG, create=False, read_only=read_only)
    assert not journal(tmp_path).exists()


def test_the_journal_of_somebody_else_is_refused(tmp_path: Path) -> None:
    Ledger.open(journal(tmp_path), chain_tag=TAG).close()
    with pytest.raises(errors.LedgerForeign, match=TAG.hex()):
        Ledger.open(journal(tmp_path), chain_tag=b"\x22" * 20)


def test_a_later_schema_is_refused(tmp_path: Path) -> None:
    Ledger.open(journal(tmp_path), chain_tag=TAG).close()
    with sqlite3.connect(journal(tmp_path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for read_only in (False, True):
        with pytest.raises(errors.LedgerTooNew) as caught:
            Ledger.open(journal(tmp_path), chain_tag=TAG, read_only=read_only)
        assert caught.value.found == 99


def test_an_open_that_was_refused_gives_back_the_lock(tmp_path: Path) -> None:
    Ledger.open(journal(tmp_path), chain_tag=TAG).close()
    with pytest.raises(errors.LedgerForeign):
        Ledger.open(journal(tmp_path), chain_tag=b"")
    Ledger.open(journal(tmp_path), chain_tag=TAG).close()


# Reading


def test_a_read_only_ledger_works_beside_the_writer_and_shows_its_moment(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        ledger.append_sync([entry(1)])
        seen = Ledger.open(journal(tmp_path), chain_tag=TAG, read_only=True)
        ledger.append_sync([entry(2)])
        assert numbers(seen) == [1]
        assert seen.head.seq == 1
        with pytest.raises(errors.LedgerClosed):
            seen.append_sync([entry(3)])
        with seen.reading() as connection, pytest.raises(sqlite3.OperationalError):
            connection.execute("INSERT INTO results (job_id, payload, size, expires_ms) VALUES (x'00', x'', 0, 0)")
        assert numbers(ledger) == [1, 2]


def test_a_slow_reader_neither_blocks_the_writer_nor_misses_a_record(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        ledger.append_sync([entry(n) for n in range(5000)])
        reader = ledger.records()
        first = next(reader)
        ledger.append_sync([entry(5000)])
        assert [first.seq, *(record.seq for record in reader)] == list(range(1, 5001))


def test_records_can_be_neither_changed_nor_removed(tmp_path: Path) -> None:
    with Ledger.open(journal(tmp_path), chain_tag=TAG) as ledger:
        ledger.append_sync([entry(1)])
    for change in ("UPDATE records SET at_ms = 0", "DELETE FROM records"):
        connection = sqlite3.connect(journal(tmp_path))
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(change)
        connection.close()


batches = st.lists(st.lists(st.integers(0, 2**63), max_size=4), max_size=8)


@settings(max_examples=30, deadline=None)
@given(lives=st.lists(batches, min_size=1, max_size=3))
def test_the_fold_of_the_journal_is_the_list_of_what_was_appended(
    tmp_path_factory: pytest.TempPathFactory, lives: list[list[list[int]]]
) -> None:
    """L1."""
    path = journal(tmp_path_factory.mktemp("ledger"))
    model: list[int] = []
    for life in lives:
        with Ledger.open(path, chain_tag=TAG) as ledger:
            assert numbers(ledger) == model
            for batch in life:
                ledger.append_sync([entry(n) for n in batch])
                model.extend(batch)
            assert numbers(ledger) == model
            assert ledger.head.seq == len(model)
    with Ledger.open(path, chain_tag=TAG, read_only=True) as ledger:
        assert numbers(ledger) == model
