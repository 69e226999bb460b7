"""What a Ray cluster adds to a token: the same engine in this process and in a replica, in turns, one stream and four.

The model is tiny and of random weights, so that a token costs little and what is added shows; on a real model the added time is a
smaller share of the same token. Added time per token is below zero where the replica's own process leaves the engine more of a
processor than this one does. Ray is not a peer here but the way that is measured; the peer is the direct call.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "build" / "ray" / "bin" / "python"


def run(args: Any) -> dict[str, Any]:
    python = OWN if OWN.exists() else Path(sys.executable)
    if python != OWN and importlib.util.find_spec("ray.cluster_utils") is None:
        raise SystemExit("error: Ray is not installed\n\nhint: scripts/setup-peers ray")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "node.testing.ray_world", folder, "costs"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"error: the cluster failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    through = {name: value for name, value in figures.items() if "direct" not in name}
    direct = {name.replace("_direct", ""): value for name, value in figures.items() if "direct" in name}
    return {
        "figures": through,
        "peers": {"the engine in this process": direct},
        "conditions": {"model": "tiny, random"},
    }
