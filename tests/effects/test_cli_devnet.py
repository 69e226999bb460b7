"""`devnet up` and `down`: a chain in the background, found again, funded, and stopped by its own pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from node.cli import devnet
from node.cli import main as frame
from node.config import load
from node.testing.devnet.devnet import available

needs_chain = pytest.mark.skipif(not available(), reason="no simulated chain on this machine (anvil or py-evm)")
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        status = frame.main(["--json", "--data-dir", str(tmp_path / "data"), *arguments])
        return status, json.loads(capfd.readouterr().out)

    return go


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_chain
def test_up_is_found_used_and_stopped(run: Run, tmp_path: Path) -> None:
    _, made = run("init")
    status, up = run("devnet", "up")
    try:
        assert status == 0 and up["started"] is True
        assert up["funded"] == [key["address"] for key in made["keys"]]
        assert run("devnet", "up") == (0, {**up, "started": False})
        config = load({"data_dir": tmp_path / "data"}, environ={})
        assert config.chain.rpc_urls == (up["url"],) and str(config.chain.deployment) == up["deployment"]
        _, checks = run("doctor")
        assert [one["status"] for one in checks["checks"] if one["check"] == "chain"] == ["pass"]
        status, claimed = run("claim")  # nothing runs and nothing is owed: journal and chain by themselves
        assert status == 0 and claimed == {"claimed": {}, "totals": [], "transactions": []}
        status, given = run("devnet", "faucet", "0x" + "ab" * 20, "--tokens", "5_000")
        assert status == 0 and given["tokens"] == "5000"
    finally:
        stopped = run("devnet", "down")
    assert stopped == (0, {"stopped": True, "pid": up["pid"]})
    assert run("devnet", "down") == (0, {"stopped": False, "pid": None})
    assert not (tmp_path / "data/devnet/state.json").exists()
    assert load({"data_dir": tmp_path / "data"}, environ={}).chain.rpc_urls == ()
    status, error = run("devnet", "faucet", "0x" + "ab" * 20)
    assert status == 6 and error["error"]["hint"] == "gristmill devnet up"


@needs_chain
def test_a_killed_devnet_is_noticed(run: Run, tmp_path: Path) -> None:
    _, up = run("devnet", "up")
    os.kill(up["pid"], signal.SIGTERM)  # from outside, as a reboot would
    wait_until(lambda: not devnet._alive(up))
    state = tmp_path / "data/devnet/state.json"
    state.write_text(json.dumps(up))  # what a kill -9 would have left
    assert run("devnet", "down") == (0, {"stopped": False, "pid": None})
    assert not state.exists()


def test_a_pid_of_somebody_else_is_left_alone(run: Run, tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        state = tmp_path / "data/devnet/state.json"
        state.parent.mkdir(parents=True)
        old = {"pid": stranger.pid, "pid_since": "1", "url": "http://127.0.0.1:1", "deployment": "d.json"}
        state.write_text(json.dumps(old))
        assert run("devnet", "down") == (0, {"stopped": False, "pid": None})
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_hinders_the_start_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_ANVIL", str(tmp_path / "nothing"))
    status, answer = run("devnet", "up", "--kind", "anvil")
    assert status == 6 and answer["error"]["code"] == "chain" and "GRISTMILL_ANVIL" in answer["error"]["message"]
    assert not (tmp_path / "data/devnet/state.json").exists()
    status, answer = run("devnet", "up", "--fund", "0x12")
    assert status == 2 and answer["error"]["code"] == "usage"
