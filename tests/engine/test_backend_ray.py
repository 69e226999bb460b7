"""Replicas over a Ray cluster: no stream is lost with a node or with a replica that hangs, and the queue decides how many there are."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from node.runtime.backends.autoscale import Autoscaler, Demand, Scale

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "build" / "ray" / "bin" / "python"


def world(folder: Path, what: str) -> dict[str, Any]:
    python = sys.executable if importlib.util.find_spec("ray") else str(OWN)
    if not Path(python).exists():
        pytest.skip("ray is not installed (scripts/setup-peers ray)")
    command = [python, "-m", "node.testing.ray_world", str(folder), what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.mark.slow
def test_a_node_that_dies_under_load_costs_a_pause_and_no_stream(tmp_path: Path) -> None:
    seen = world(tmp_path, "dies")
    assert seen["under way"] > 1
    assert (seen["same tokens"], seen["same text"], seen["tokens"]) == (8, 8, 8 * 400)


@pytest.mark.slow
def test_the_queue_starts_replicas_a_hung_one_is_replaced_and_idle_ones_leave(tmp_path: Path) -> None:
    seen = world(tmp_path, "hangs")
    assert seen["under way"] == 4  # on the replica that then hung
    assert (seen["same tokens"], seen["same text"], seen["tokens"]) == (8, 8, 8 * 400)
    assert seen["replicas"] == [1, 2, 1]


# ------------------------------------------------------------------------------------------------------ autoscaling


def wanted(scaler: Autoscaler, now: float, **demand: int) -> int:
    return scaler.wanted(now, Demand(**{"waiting": 0, "active": 0, "ready": 1, "starting": 0, "slots": 4, **demand}))


def test_more_replicas_when_streams_have_waited_long_enough() -> None:
    scaler = Autoscaler(Scale(least=1, most=4, up_s=2, down_s=60))
    assert wanted(scaler, 0, waiting=3, active=4) == 1
    assert wanted(scaler, 1, waiting=0, active=4) == 1  # a burst that passes changes nothing
    assert wanted(scaler, 2, waiting=3, active=4) == 1
    assert wanted(scaler, 4, waiting=5, active=4) == 3  # five that wait fill two
    assert wanted(scaler, 7, waiting=5, active=4, starting=2) == 3  # not again while those start
    assert wanted(scaler, 10, waiting=90, active=12, ready=3) == 4  # and never too many


def test_fewer_when_one_was_too_many_for_long_enough() -> None:
    scaler = Autoscaler(Scale(least=1, most=4, up_s=2, down_s=60))
    assert wanted(scaler, 0, active=8, ready=3) == 3
    assert wanted(scaler, 59, active=9, ready=3) == 3  # the third was of use: its time begins anew
    assert wanted(scaler, 60, active=8, ready=3) == 3
    assert wanted(scaler, 119, active=8, ready=3) == 3
    assert wanted(scaler, 120, active=8, ready=3) == 2
    assert wanted(scaler, 121, active=0, ready=2) == 2
    assert wanted(scaler, 999, active=0, ready=1) == 1  # and never too few


def test_a_load_at_the_edge_changes_nothing_and_what_is_lost_is_replaced() -> None:
    scaler = Autoscaler(Scale(least=2, most=4, up_s=2, down_s=10))
    for second in range(100):
        assert wanted(scaler, second, waiting=second % 2, active=7 + second % 2, ready=2) == 2
    assert wanted(scaler, 200, ready=0) == 2
    assert wanted(scaler, 201, ready=1, starting=1) == 2
