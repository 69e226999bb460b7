"""What is written beside the contracts names what is there: planted bugs and the tests that caught them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
