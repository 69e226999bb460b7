"""What it costs to start: CPU seconds of `import node.client` and of the first commands, each in a fresh process.

Peers in the same run: the imports of web3 and openai, where they are installed; they are what a dApp would import instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median
from typing import Any

RUNS = 5


def _seconds(words: list[str]) -> tuple[float, float]:
    """(CPU, wall) of a process that runs to its end."""
    before, began = os.times(), os.times().elapsed
    done = subprocess.run([sys.executable, *words], capture_output=True)
    after = os.times()
    if done.returncode != 0:
        raise LookupError(done.stderr.decode()[-200:])
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, after.elapsed - began


def _measure(words: list[str]) -> dict[str, float]:
    runs = [_seconds(words) for _ in range(RUNS)]
    return {"cpu": round(median(cpu for cpu, _ in runs), 3), "wall": round(median(wall for _, wall in runs), 3)}


def run(args: Any = None) -> dict[str, Any]:
    """Medians of five fresh processes each. The bare interpreter is listed so that it can be subtracted."""
    figures: dict[str, float] = {}
    for name, words in {
        "python_alone": ["-c", "pass"],
        "import_node_client": ["-c", "from node.client import Client"],
        "import_to_connect": ["-c", "import node.client.connect, node.network.host, node.chain.client"],
        "gristmill_version": ["-m", "node", "version"],
    }.items():
        measured = _measure(words)
        figures[f"{name}_cpu_seconds"], figures[f"{name}_wall_seconds"] = measured["cpu"], measured["wall"]
    peers: dict[str, dict[str, float]] = {}
    missing = []
    for name in ("web3", "openai", "libp2p"):
        try:
            peers[f"import {name}"] = {"cpu_seconds": _measure(["-c", f"import {name}"])["cpu"]}
        except LookupError:
            missing.append(name)
    return {"figures": figures, "peers": peers, "missing_peers": missing}
