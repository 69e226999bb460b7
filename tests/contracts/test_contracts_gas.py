"""Gas against the budget of the design and against the committed snapshot, both on real receipts.

`GAS_UPDATE=1 pytest tests/contracts/test_contracts_gas.py` writes the snapshot anew after a change that was meant.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from node.testing.devnet.anvil import find_anvil

SNAPSHOT = Path(__file__).parent / "gas.json"


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    anvil = find_anvil()
    if anvil is None:
        pytest.skip("anvil is not installed (cd contracts && npm ci --ignore-scripts)")
    from node.testing.gas import measure

    figures = measure(anvil)
    if os.environ.get("GAS_UPDATE"):
        SNAPSHOT.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def test_gas_is_within_the_budget(measured: dict[str, int]) -> None:
    """With the slack of a tenth that the design gives."""
    from node.testing.gas import BUDGET

    over = {name: (measured[name], most) for name, most in BUDGET.items() if measured[name] * 10 > most * 11}
    assert not over, over


def test_gas_is_within_a_tenth_of_the_snapshot(measured: dict[str, int]) -> None:
    snapshot = json.loads(SNAPSHOT.read_text())
    assert set(measured) == set(snapshot)
    moved = {n: (measured[n], was) for n, was in snapshot.items() if abs(measured[n] - was) * 10 > was}
    assert not moved, f"gas moved by more than 10 %: {moved}"
