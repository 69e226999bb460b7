"""The tables of the journal file, version by version. `PRAGMA user_version` is the number of migrations applied.

Rules: a released migration is never edited; a migration never touches a row of `records`, because their hashes bind what
was written; every released version has a fixture in the tests that must open. Older programs refuse newer files.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

Migration = Callable[[sqlite3.Connection], None]


def _v1(connection: sqlite3.Connection) -> None:
    for statement in (
        # What the file is: the identity it belongs to and the schema version a second time, against a flipped header bit.
        "CREATE TABLE about (id INTEGER PRIMARY KEY CHECK (id = 1), chain_tag BLOB NOT NULL, schema INTEGER NOT NULL)",
        """CREATE TABLE records (seq INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, kind TEXT NOT NULL,
                                 subject BLOB NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL)""",
        "CREATE TRIGGER records_never_change BEFORE UPDATE ON records BEGIN SELECT RAISE(ABORT, 'append-only'); END",
        "CREATE TRIGGER records_never_go BEFORE DELETE ON records BEGIN SELECT RAISE(ABORT, 'append-only'); END",
        # The last record once more: a lost tail is seen, and a second writer fails its compare-and-swap.
        "CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, hash BLOB NOT NULL)",
        """CREATE TABLE results (job_id BLOB PRIMARY KEY, payload BLOB NOT NULL, size INTEGER NOT NULL,
                                 expires_ms INTEGER NOT NULL, acknowledged_ms INTEGER)""",
        "CREATE INDEX results_by_state ON results (acknowledged_ms, expires_ms, size)",
    ):
        connection.execute(statement)


def _v2(connection: sqlite3.Connection) -> None:
    for statement in (
        # Every open for writing: what `node.store.fence` compares. (seq, hash): the head at that moment.
        """CREATE TABLE epochs (epoch INTEGER PRIMARY KEY, token BLOB NOT NULL, seq INTEGER NOT NULL, hash BLOB NOT NULL,
                                at_ms INTEGER NOT NULL)""",
        # The fold up to a record, so that a start need not fold what came before; see `node.store.snapshot`.
        """CREATE TABLE snapshots (name TEXT PRIMARY KEY, seq INTEGER NOT NULL, hash BLOB NOT NULL, code BLOB NOT NULL,
                                   payload BLOB NOT NULL, digest BLOB NOT NULL)""",
    ):
        connection.execute(statement)


MIGRATIONS: tuple[Migration, ...] = (_v1, _v2)

SCHEMA_VERSION = len(MIGRATIONS)
