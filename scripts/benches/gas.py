"""Gas of every action of the contracts, from receipts of a real chain (anvil), beside what others publish.

Peers are published figures (their own documents and reports), not runs of ours: gas does not depend on the machine, but it
does on what a system does for it, so each says what it counts.
"""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, dict[str, int]] = {
    "Lilypad, one job of four transactions (compiled and run from its sources)": {"job": 1_650_000},
    "Raiden, gas.json of its contracts": {
        "open_and_deposit": 147_000,
        "close": 119_000,
        "settle": 109_000,
        "cooperative_close": 112_000,
        "claim_one": 104_000,
        "claim_6_each": 27_500,
    },
    "x402 batch-settlement (its shape, implemented again; its contract's source is not public)": {
        "claim_one": 47_712,
        "claim_100_each": 21_392,
        "settle": 45_000,
    },
    "0G Serving, settlement document: 30,059 and 13,740 a request": {
        "request_at_10": 19_255,
        "request_at_40": 14_441,
        "request_at_1000": 13_770,
    },
}


def run(args: Any = None) -> dict[str, Any]:
    """One transaction an action; two runs give the same figures. Raises `SystemExit` without anvil."""
    from node.testing.devnet.anvil import find_anvil
    from node.testing.gas import measure

    anvil = find_anvil()
    if anvil is None:
        raise SystemExit("error: anvil is not installed\n\nhint: scripts/setup --dev")
    return {"figures": measure(anvil), "peers": PUBLISHED}
