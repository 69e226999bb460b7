"""What counting costs: one observation of a histogram, one page, one import; prometheus_client beside it in the same run.

Both count into histograms of vLLM's 22 buckets of the time to first token. Minima of several rounds: what is above them is the
machine's, not the code's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

OBSERVATIONS = 50_000
FAMILIES = 21
ROUNDS = 7


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _import_seconds(name: str) -> float:
    """Of a fresh process that has loaded what both need anyway."""
    code = (
        "import bisect, dataclasses, logging, threading, typing, time; began = time.perf_counter(); "
        f"import {name}; print(time.perf_counter() - began)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(ROUNDS)]
    return min(float(one.stdout) for one in runs)


def _figures(observe: Callable[[float], object], page: Callable[[], object], module: str) -> dict[str, float]:
    def many() -> None:
        for _ in range(OBSERVATIONS):
            observe(0.03)

    return {
        "observation_us": round(_best(many) / OBSERVATIONS * 1e6, 3),
        "page_ms": round(_best(page) * 1e3, 3),
        "import_ms": round(_import_seconds(module) * 1e3, 2),
    }


def run(args: Any = None) -> dict[str, Any]:
    from node.telemetry.engine import TTFT
    from node.telemetry.exposition import Family, Histogram, render

    families = [Family(f"y{n}_seconds", "histogram", "Y.", TTFT.labels, TTFT.buckets) for n in range(FAMILIES)]
    samples = [(family, ("m", "0"), Histogram(TTFT.buckets)) for family in families]
    figures = _figures(samples[0][2].observe, lambda: render(samples), "node.telemetry.exposition")
    try:
        import prometheus_client as theirs
    except ImportError:
        return {"figures": figures, "missing_peers": ["prometheus_client"]}
    registry = theirs.CollectorRegistry()
    histograms = [
        theirs.Histogram(family.name, family.help, family.labels, buckets=family.buckets, registry=registry).labels(
            "m", "0"
        )
        for family in families
    ]
    peer = _figures(histograms[0].observe, lambda: theirs.generate_latest(registry), "prometheus_client")
    return {"figures": figures, "peers": {"prometheus_client": peer}, "missing_peers": []}
