"""For all tests: nothing is left in the user's folders, and what takes long waits to be asked for.

`--long` runs every randomised or repeated test at its full count, as the figures in docs/measurements.md were taken.
"""

from __future__ import annotations

import os
import tempfile

import pytest

_state = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run repeated tests at their full count")


def pytest_configure(config: pytest.Config) -> None:
    # Bytes of layers are compared with what the C library counts, and huge pages are counted whole (node/runtime/__init__.py).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")
    # The fences of the journals that tests open (node/store/fence.py), also for the processes that tests start.
    config.stash[_state] = tempfile.TemporaryDirectory(prefix="gristmill-state-")
    os.environ["XDG_STATE_HOME"] = config.stash[_state].name
    # The kernels that one node compiles for its engines, the nodes of later tests have (node/runtime/kernels.py).
    os.environ["XDG_CACHE_HOME"] = os.path.join(config.stash[_state].name, "cache")


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_state].cleanup()


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the full counts are asked for."""
    return bool(request.config.getoption("--long"))
