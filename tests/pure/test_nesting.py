"""Depth is counted before a parser sees it: right for every JSON, and cheap."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.nesting import MAX_DEPTH, check_depth, loads

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('[]{}"\\ab', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[{"\\', max_size=3), inner, max_size=3),
    max_leaves=12,
)


def depth(value: Any) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 0


@given(values, st.integers(0, 6))
def test_the_depth_is_the_depth_whatever_strings_hold(value: Any, limit: int) -> None:
    raw = json.dumps(value).encode()
    if depth(value) > limit:
        with pytest.raises(ValueError, match="deep"):
            check_depth(raw, limit)
    else:
        check_depth(raw, limit)
        assert loads(raw) == value


@pytest.mark.parametrize(
    "bad", ["[" * 200_000, '{"a":' * 200_000, '"' + "[" * 200_000, "\\" * 200_000, "[" * 101 + "]" * 101]
)
def test_bombs_are_value_errors(bad: str) -> None:
    with pytest.raises(ValueError):
        loads(bad)


def test_a_process_with_a_lifted_limit_survives() -> None:
    lifted = "import sys; sys.setrecursionlimit(100_000)\n"
    probe = lifted + "from {module} import {name}\ntry: {name}('[' * 200_000)\nexcept ValueError: print('refused')"
    ours = subprocess.run(
        [sys.executable, "-c", probe.format(module="node.nesting", name="loads")], capture_output=True
    )
    assert ours.stdout.strip() == b"refused"
    plain = subprocess.run([sys.executable, "-c", probe.format(module="json", name="loads")], capture_output=True)
    assert plain.returncode != 0  # what it is for: the standard parser dies of the same text


def test_the_limit_is_generous() -> None:
    assert MAX_DEPTH >= 64
