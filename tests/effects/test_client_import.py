"""What a dApp loads by `import node.client`: neither a model runtime nor a worker, and nothing heavy before it connects."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "web3", "eth_account", "libp2p", "tokenizers", "numpy", "node.worker", "node.runtime")
PROBE = """
import json, sys
from node.client import Client, ChatStream
{more}
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def loaded(more: str = "") -> list[str]:
    probe = PROBE.format(heavy=HEAVY, more=more)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True, timeout=60)
    names: list[str] = json.loads(done.stdout)
    return names


def test_importing_the_client_loads_nothing_heavy() -> None:
    assert loaded() == []


@pytest.mark.parametrize("name", ["numpy", "node.worker"])
def test_the_probe_would_see_it(name: str) -> None:
    pytest.importorskip(name)
    assert name in loaded(f"import {name}")


def test_connecting_loads_no_torch_and_no_worker() -> None:
    """The modules that `connect` uses at run time, libp2p host and chain included."""
    more = "import node.client.connect, node.client.sync, node.network.host, node.chain.client"
    assert {"torch", "transformers", "web3", "node.worker", "node.runtime"}.isdisjoint(loaded(more))


def test_importing_a_worker_loads_no_torch() -> None:
    """A start is quick, and what computes is behind a wall."""
    assert "torch" not in loaded("import node.app, node.runtime.backend, node.runtime.fleet, node.runtime.grammar")


def test_looking_for_devices_loads_no_torch() -> None:
    """A child does, and ends. Needs torch there: without it the child has nothing to say."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    assert "torch" not in loaded("from node.runtime.hal.probe import chosen; assert chosen('cpu').device.memory_total")
