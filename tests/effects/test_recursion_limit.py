"""py-evm lifts Python's recursion limit for the whole process; then a parser in C dies on nested brackets. Ours puts it back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import json, sys
before = sys.getrecursionlimit()
{imports}
assert sys.getrecursionlimit() == before, sys.getrecursionlimit()
try:
    json.loads("[" * 100_000)
except RecursionError:
    print("refused")
"""


def probe(imports: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", PROBE.format(imports=imports)], capture_output=True, timeout=120)


def test_nested_brackets_are_an_error_and_not_a_crash() -> None:
    pytest.importorskip("eth", reason="py-evm is not installed")
    done = probe("import node.testing.devnet.evm_chain, node.testing.devnet.devnet, node.cli.main, node.app")
    assert done.stdout.strip() == b"refused", done.stderr.decode()[-2000:]


def test_the_probe_sees_a_lifted_limit() -> None:
    assert probe("sys.setrecursionlimit(100_000)").returncode != 0
