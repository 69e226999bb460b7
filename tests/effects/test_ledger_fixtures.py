"""Journals written by every released schema version open in this one; the dump of each is fixed.

`tests/vectors/ledger_v<N>.sqlite.gz` was written once, by `write_fixture` of the version that released schema N, and is never
written again.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
from pathlib import Path

import pytest

from node.store import database, errors, migrations
from node.store import ledger as ledger_module
from node.store.dump import dump
from node.store.ledger import Entry, Ledger
from node.store.results import Results

TAG = bytes.fromhex("11" * 20)
VECTORS = Path(__file__).parents[1] / "vectors"
RELEASED = {1: "fae647e7", 2: "fae647e7"}
"""Schema version -> how the hash of the last record of its fixture begins."""


def write_fixture(path: Path) -> None:
    """What the fixture of the current version holds."""
    times = iter(range(1_700_000_000_000 - 7, 1_700_000_001_000, 7))  # the first is the epoch's
    with Ledger.open(path, chain_tag=TAG, clock=lambda: next(times)) as ledger:
        for n in range(20):
            ledger.append_sync(
                [Entry("test.made", n.to_bytes(32, "big"), {"n": n, "amount": str(2**100 + n), "raw": b"\x01"})]
            )
        ledger.append_sync([Entry("test.pair", b"a", {}), Entry("test.pair", b"b", {"list": [1, None, True, "x"]})])
        ledger.write_sync(Results(ledger).keeping(b"\x22" * 32, b"answer", 1_800_000_000_000, now_ms=0))


def fixture(version: int, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    path = folder / "journal.sqlite"
    path.touch(mode=0o600)
    path.write_bytes(gzip.decompress((VECTORS / f"ledger_v{version}.sqlite.gz").read_bytes()))
    return path


def test_every_released_version_has_a_fixture() -> None:
    assert sorted(RELEASED) == list(range(1, migrations.SCHEMA_VERSION + 1))
    assert {path.name for path in VECTORS.glob("ledger_v*")} == {f"ledger_v{n}.sqlite.gz" for n in RELEASED}


@pytest.mark.parametrize("version", sorted(RELEASED))
def test_a_released_journal_opens_and_goes_on(version: int, tmp_path: Path) -> None:
    path = fixture(version, tmp_path)
    with Ledger.open(path, chain_tag=TAG, create=False) as ledger:
        assert ledger.head.seq == 22
        assert ledger.head.hash.hex().startswith(RELEASED[version])
        assert Results(ledger).get(b"\x22" * 32) == b"answer"
        lines = [json.loads(line) for line in dump(ledger)]
        ledger.append_sync([Entry("test.later", b"", {})])
    with Ledger.open(path, chain_tag=TAG, create=False) as ledger:
        assert ledger.head.seq == 23
    assert lines[3] == {
        "seq": 4,
        "at_ms": 1_700_000_000_021,
        "kind": "test.made",
        "subject": "0x" + "00" * 31 + "03",
        "body": {"n": 3, "amount": str(2**100 + 3), "raw": "0x01"},
        "hash": lines[3]["hash"],
    }
    assert [line["seq"] for line in lines] == list(range(1, 23))
    assert lines[21]["body"] == {"list": [1, None, True, "x"]}
    assert lines[21]["hash"].startswith("0x" + RELEASED[version])


def test_today_writes_what_the_fixture_of_its_version_holds(tmp_path: Path) -> None:
    old = fixture(migrations.SCHEMA_VERSION, tmp_path)
    new = tmp_path / "new" / "journal.sqlite"
    write_fixture(new)
    with (
        Ledger.open(old, chain_tag=TAG, read_only=True) as before,
        Ledger.open(new, chain_tag=TAG, read_only=True) as now,
    ):
        assert list(before.records()) == list(now.records())


def next_version(monkeypatch: pytest.MonkeyPatch, migration: migrations.Migration) -> None:
    monkeypatch.setattr(ledger_module, "MIGRATIONS", (*migrations.MIGRATIONS, migration))
    monkeypatch.setattr(ledger_module, "SCHEMA_VERSION", migrations.SCHEMA_VERSION + 1)


def test_a_migration_keeps_the_chain_and_shuts_the_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fixture(migrations.SCHEMA_VERSION, tmp_path)
    with monkeypatch.context() as later:
        next_version(later, lambda connection: connection.execute("CREATE TABLE more (x)"))
        with pytest.raises(errors.LedgerError, match="older schema"):
            Ledger.open(path, chain_tag=TAG, read_only=True)
        with Ledger.open(path, chain_tag=TAG) as ledger:
            assert ledger.head.seq == 22
            with ledger.reading() as connection:
                assert connection.execute("SELECT COUNT(*) FROM more").fetchone() == (0,)
                assert database.pragma(connection, "user_version") == migrations.SCHEMA_VERSION + 1
    with pytest.raises(errors.LedgerTooNew):
        Ledger.open(path, chain_tag=TAG)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fixture(migrations.SCHEMA_VERSION, tmp_path)

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE more (x)")
        connection.execute("CREATE TABLE records (x)")

    with monkeypatch.context() as later:
        next_version(later, broken)
        with pytest.raises(errors.LedgerFailed, match="stays at schema"):
            Ledger.open(path, chain_tag=TAG)
    with Ledger.open(path, chain_tag=TAG) as ledger:
        assert ledger.head.seq == 22
        with ledger.reading() as connection:
            assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'more'").fetchone() is None


def test_the_dump_shows_any_body_as_json(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "data" / "journal.sqlite", chain_tag=TAG) as ledger:
        ledger.append_sync([Entry("k", b"\xff", {"deep": {"raw": [b"\x00", (b"\x01",)]}, "big": 2**64 - 1})])
        (line,) = dump(ledger)
        assert dict(json.loads(line), hash="", at_ms=0) == {
            "seq": 1,
            "at_ms": 0,
            "kind": "k",
            "subject": "0xff",
            "body": {"deep": {"raw": ["0x00", ["0x01"]]}, "big": 2**64 - 1},
            "hash": "",
        }
        assert list(dump(ledger, after=1)) == []
