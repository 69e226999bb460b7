"""Journals, a signer's table and a fence as released versions wrote them: what they hold is what it was, record by record.

A field that is renamed, retyped or dropped, a kind that is called otherwise, a mark under another name: whoever starts with the
books of yesterday would know less than it has signed. `tests/effects/test_ledger_fixtures.py` is about the file; this is about
what is in it.
"""

from __future__ import annotations

import ast
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.audit import fold
from node.store import errors
from node.store.dump import read
from node.store.fence import Fence
from node.store.ledger import Ledger
from node.testing import every_kind, fixtures
from node.testing.every_kind import DOMAIN
from node.testing.fixtures import EDITION, JOURNALS
from protocol.channel import Role
from protocol.records import BATCH_KINDS, KINDS
from protocol.signing import Scope

VECTORS = Path(__file__).parents[1] / "vectors"
EDITIONS = range(1, EDITION + 1)


def unpacked(edition: int, root: Path) -> Path:
    fixtures.unpack(VECTORS, edition, root)
    return root


def told(edition: int) -> Any:
    return json.loads(fixtures.told(VECTORS, edition).read_text(encoding="utf-8"))


def as_json(found: Any) -> Any:
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What today's version writes."""
    root = tmp_path_factory.mktemp("made")
    fixtures.make(root)
    return root


def records(root: Path, name: str) -> list[Any]:
    with read(fixtures.place(root, name)) as ledger:
        return list(ledger.records())


def test_every_edition_is_there() -> None:
    expected = {fixtures.told(VECTORS, n) for n in EDITIONS}
    expected |= {fixtures.packed(VECTORS, n, name) for n in EDITIONS for name in fixtures.FILES}
    assert set(VECTORS.glob("books_*")) == expected


@pytest.mark.parametrize("edition", EDITIONS)
def test_an_edition_is_read_as_it_was_written(edition: int, tmp_path: Path) -> None:
    found = as_json(fixtures.facts(unpacked(edition, tmp_path)))
    if edition == EDITION:
        assert found == told(edition)  # a new schema needs a new edition, too
    before = {name: one for name, one in told(edition).items() if name != "schemas"}
    assert list(fixtures.within(before, found)) == []


@pytest.mark.parametrize("name", JOURNALS)
def test_today_writes_the_newest_edition_to_the_byte(name: str, made: Path, tmp_path: Path) -> None:
    """Both sides of the codec may be wrong alike: what was written before knows nothing of it."""
    assert records(made, name) == records(unpacked(EDITION, tmp_path), name)


def test_today_makes_marks_and_a_fence_as_in_the_newest_edition(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    assert fixtures.foreseen(as_json(fixtures.facts(tmp_path / "made"))) == fixtures.foreseen(told(EDITION))
    old, new = (
        [line.split(b'"token"')[0] for line in fixtures.place(root, "fence").read_bytes().splitlines()]
        for root in (unpacked(EDITION, tmp_path / "old"), made)
    )
    assert old == new and len(old) == 2


# ------------------------------------------------------------------------------------------------------ nothing is missing


def test_every_kind_that_the_code_knows_is_in_the_newest_edition() -> None:
    """Whoever adds a kind of record, or of mark, begins an edition."""
    counts = told(EDITION)
    assert {kind for name in JOURNALS for kind in counts[name]["kinds"]} == fixtures.ALL_KINDS
    assert {mark[0] for mark in counts["signer"]["marks"]} == {scope.name for scope in Scope}


def written_by(path: Path) -> Iterator[str]:
    """The kinds of the records that a module writes, as far as its text says."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Entry":
            kind = node.args[0]
            yield str(kind.value) if isinstance(kind, ast.Constant) else named.get(ast.unparse(kind), ast.unparse(kind))


def test_the_list_of_kinds_is_whole() -> None:
    """By the text of whoever makes an entry; those that are handed a kind are known: a change's own, and a sender's."""
    node = VECTORS.parents[1] / "node"
    paths = [path for path in node.rglob("*.py") if "testing" not in path.parts]
    written = {kind for path in paths for kind in written_by(path)}
    assert len(written) > 6
    assert written - fixtures.ALL_KINDS == {"kind_of(c)", "kind"}


def bodies(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in JOURNALS:
        for record in records(root, name):
            yield record.kind, msgspec.msgpack.decode(record.body)


def test_every_field_of_every_kind_is_in_the_newest_edition_and_says_something(tmp_path: Path) -> None:
    """Nothing is seen of a field that is zero or empty wherever it stands."""
    said: dict[str, set[str]] = {}
    for kind, body in bodies(unpacked(EDITION, tmp_path)):
        telling = {name for name, value in body.items() if (any(value) if isinstance(value, bytes) else value)}
        said.setdefault(kind, set()).update(telling)
    for kind, cls in {**KINDS, **BATCH_KINDS}.items():
        assert said[kind] == set(cls.__struct_fields__), kind
    assert said["receipt_refused"] == {"receipt"} and said["juror_voted"] == {"vote", "result_hash", "secret"}
    assert said["tx_signed"] >= {"purpose", "nonce", "tip", "max_fee", "data", "value", "raw", "anchor", "request"}


def test_fields_that_came_later_are_absent_in_one_record_at_least(tmp_path: Path) -> None:
    opened = [body for kind, body in bodies(unpacked(EDITION, tmp_path)) if kind == "channel_opened"]
    assert {"domain" in body for body in opened} == {True, False}


# ------------------------------------------------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("role", list(Role))
def test_a_snapshot_of_another_version_changes_nothing(edition: int, role: Role, tmp_path: Path) -> None:
    path = fixtures.place(unpacked(edition, tmp_path), role.value)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM snapshots").fetchall() == [(role.value,)]
    with read(path) as ledger:
        states, findings = fold(ledger.records(), role, [DOMAIN])
    assert findings == [] and as_json(every_kind.plain(states)) == as_json(told(edition)[role.value]["channels"])


@pytest.mark.parametrize("edition", EDITIONS)
def test_what_a_table_forbade_it_forbids(edition: int, tmp_path: Path) -> None:
    path = fixtures.place(unpacked(edition, tmp_path), "signer")
    assert all(fixtures.refusals(path)) and len(fixtures.refusals(path)) == 8


@pytest.mark.parametrize("edition", EDITIONS)
def test_a_fence_lets_its_journal_pass_and_no_other(edition: int, tmp_path: Path) -> None:
    root = unpacked(edition, tmp_path / "a")
    fence, tag = fixtures.place(root, "fence"), bytes(every_kind.account(Role.WORKER))
    another = tmp_path / "another" / "journal"
    Ledger.open(another, chain_tag=tag).close()
    with pytest.raises(errors.LedgerFenced, match="with this key has "):
        Ledger.open(another, chain_tag=tag, fence=Fence(fence))
    with Ledger.open(fixtures.place(root, "worker"), chain_tag=tag, create=False, fence=Fence(fence)) as ledger:
        assert ledger.epoch == 2
