"""What is written beside the contracts names what is there: planted bugs and the tests that caught them, trees of functions."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ABI = ROOT / "node" / "chain" / "abi"
CONTRACTS = ROOT / "contracts"
TESTS = ROOT / "tests" / "contracts"
pytestmark = pytest.mark.skipif(not CONTRACTS.is_dir(), reason="the contract sources are not here (installed wheel)")


def mutants() -> tuple[tuple[str, str, str, str], ...]:
    spec = importlib.util.spec_from_file_location("mutants", TESTS / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MUTANTS


def test_every_planted_bug_has_its_place_and_only_one() -> None:
    sources = {file: (CONTRACTS / "src" / file).read_text() for _, file, _, _ in mutants()}
    assert [(name, sources[file].count(old)) for name, file, old, _ in mutants() if sources[file].count(old) != 1] == []
    assert [name for name, _, old, new in mutants() if old == new] == []


def test_no_two_planted_bugs_are_one() -> None:
    assert [name for name, times in Counter(name for name, *_ in mutants()).items() if times > 1] == []
    assert [bug for bug, times in Counter(mutant[1:] for mutant in mutants()).items() if times > 1] == []


def page() -> str:
    return (CONTRACTS / "INVARIANTS.md").read_text(encoding="utf-8")


def test_the_table_of_planted_bugs_names_all_of_them_and_no_other() -> None:
    """`scripts/check-mutants --table` writes it."""
    rows = re.findall(r"^\| ([^|]+) \|", page().partition("## Planted bugs")[2], re.MULTILINE)
    assert rows == ["bug", *(name for name, *_ in mutants())]


def test_every_test_that_the_page_names_exists() -> None:
    """`test_the_first_words_...` stands for all tests that begin so."""
    there = {
        name
        for path in (*TESTS.glob("test_*.py"), *(CONTRACTS / "test").glob("*.sol"))
        for name in re.findall(r"(?:def|function) (\w+)\(", path.read_text())
    }
    cited = re.findall(r"`((?:test|testFuzz|invariant)_\w+)(\.\.\.|\[[^`]*)?`", page())
    assert len(cited) > 50
    missing = [
        name + more
        for name, more in cited
        if (not any(t.startswith(name) for t in there) if more == "..." else name not in there)
    ]
    assert missing == []


# --------------------------------------------------------------------------------------------------------------- trees


def tree(name: str) -> list[str]:
    return (CONTRACTS / "test" / f"{name}.tree").read_text(encoding="utf-8").splitlines()


def nodes(lines: list[str]) -> list[str]:
    """What has a node of its own: functions, and the constructor."""
    return [name for line in lines[1:] if line[0] in "├└" for name in line[4:].split(", ")]


def functions(name: str) -> set[str]:
    entries = json.loads((ABI / f"{name}.json").read_text())["abi"]
    return {entry["name"] for entry in entries if entry["type"] == "function"}


OURS = sorted({path.stem for path in ABI.glob("*.json")} - {"TimelockController"})  # OpenZeppelin's, as it is


@pytest.mark.parametrize("name", OURS)
def test_every_external_function_has_a_node_in_its_tree(name: str) -> None:
    found = [node for node in nodes(tree(name)) if node != "constructor"]
    assert sorted(found) == sorted(functions(name))


def test_the_library_has_a_node_for_each_function() -> None:
    source = (CONTRACTS / "src" / "Signatures.sol").read_text()
    assert nodes(tree("Signatures")) == re.findall(r"function (\w+)", source)


@pytest.mark.parametrize("path", sorted((CONTRACTS / "test").glob("*.tree")), ids=lambda path: path.stem)
def test_every_branch_of_a_tree_is_drawn_to_its_end(path: Path) -> None:
    lines = tree(path.stem)
    assert [line for line in lines[1:] if not re.match(r"(?:[│ ] {3})?[├└]── \S", line)] == []
    assert [at for at, line in enumerate(lines) if line[0] == "└"] == [
        max(at for at, line in enumerate(lines) if line[0] in "├└")
    ]
    for line, following in zip(lines[1:], [*lines[2:], "└"], strict=True):
        if line[0] in "│ ":  # the last leaf of a node, and no other, has the corner
            assert (line[4] == "└") == (following[0] in "├└"), line
    for line, following in zip(lines[1:], [*lines[2:], ""], strict=True):
        if line[0] in "├└" and path.stem in OURS:
            assert following[:1] == ("│" if line[0] == "├" else " "), f"{line}: what does it do?"
