"""`gristmill bench` as a command: measures a tiny model, signs with the worker's key, keeps the file, runs it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from node.cli import main as frame
from node.keystore import Keystore
from node.models.store import ModelStore
from node.runtime.bench import measure as measuring
from node.runtime.bench.arithmetic import Size
from node.runtime.bench.kept import KeptBenchmarks
from node.runtime.bench.reference import Plan
from protocol.benchmark import open_benchmark
from protocol.ids import Address

NONCE = "ab" * 32
Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def data(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data dir with a worker's key and a tiny model; measuring is as small as it can be."""
    monkeypatch.setattr(measuring, "size_for", lambda device, *, quick: Size(32, 1 << 16, 0.0005))
    plan = Plan(batches=(1, 2), turns=2, prompt_tokens=4, output_tokens=3)
    monkeypatch.setattr(measuring.reference, "QUICK", plan)
    folder = tmp_path / "data"
    keys = Keystore(folder / "keys", scrypt_n=1 << 12)
    keys.create("worker", b"password")
    (folder / "keys" / "password").write_text("password\n")
    (folder / "keys" / "password").chmod(0o600)
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "tokenizer.json").write_text("{}")
    ModelStore(folder / "models").add_folder(model, "tiny", license_id="none")
    return folder


@pytest.fixture
def run(data: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def go(*words: str | Path) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        status = frame.main(["--data-dir", str(data), "--json", "--set", "keys.signer=inline", *map(str, words)])
        captured = capsys.readouterr()
        return status, json.loads(captured.out), captured.err

    return go


def test_measure_sign_keep_verify_and_run_again(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.bench"
    status, made, said = run("bench", "--quick", "--model", "tiny", "--nonce", NONCE, "--out", out)
    assert status == 0, (made, said)
    assert made["nonce"] == "0x" + NONCE and made["nonce_source"] == "verifier" and made["quick"] is True
    assert [one["batch"] for one in made["model"]["runs"]] == [1, 2] and made["device"]["kind"] == "cpu"
    assert "measuring cpu" in said and "engine.device is auto" in said
    verified = open_benchmark(out.read_bytes(), nonce=bytes.fromhex(NONCE))
    assert verified.worker == Address(made["worker"]) == Keystore(data / "keys").address("worker")
    ((path, kept),) = KeptBenchmarks(data / "benchmarks").all()
    assert kept == verified and path.read_bytes() == out.read_bytes() and path.parent.stat().st_mode & 0o077 == 0
    assert run("bench", "verify", out, "--nonce", NONCE, "--again")[0] == 0
    assert run("bench", "show")[1]["hash"] == made["hash"]
    status, advice, _ = run("bench", "advise", "--hourly-cost", "1")
    assert status == 0 and int(advice["price_output"]) > 0


def test_without_a_verifier_and_without_a_chain_the_nonce_is_random_and_says_so(run: Run) -> None:
    found = [run("bench", "--quick", "--model", "tiny", "--set", "network=nowhere") for _ in range(2)]
    assert [status for status, _, _ in found] == [0, 0]
    assert {made["nonce_source"] for _, made, _ in found} == {"random"}
    assert found[0][1]["nonce"] != found[1][1]["nonce"]
    assert "does not show how old" in found[0][2]
    runs = [made["model"]["runs"][0]["output_hash"] for _, made, _ in found]
    assert runs[0] != runs[1], "other prompts, other answers"


def test_a_run_on_other_prompts_than_the_nonces_is_seen(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that answers prompts it has had for long, and signs a nonce of today."""
    out = tmp_path / "mine.bench"
    with monkeypatch.context() as lying:
        lying.setattr("node.runtime.bench.reference.prompt_ids", lambda *_: (1, 2, 3, 4))
        assert run("bench", "--quick", "--model", "tiny", "--nonce", NONCE, "--out", out)[0] == 0
    assert run("bench", "verify", out, "--nonce", NONCE)[0] == 0, "the signature alone does not show it"
    status, answer, _ = run("bench", "verify", out, "--nonce", NONCE, "--again")
    assert status == 7 and "answers otherwise" in answer["error"]["message"]


def test_a_device_that_is_not_there(run: Run) -> None:
    status, answer, _ = run("bench", "--quick", "--model", "tiny", "--device", "mps")
    assert (
        status == 7 and answer["error"]["code"] == "device" and "set engine.device to auto" in answer["error"]["hint"]
    )


def test_a_wrong_password_is_told_before_anything_is_measured(run: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("nonsense\n")
    wrong.chmod(0o600)
    status, answer, said = run("bench", "--quick", "--model", "tiny", "--password-file", wrong)
    assert status == 4 and "measuring" not in said, answer
