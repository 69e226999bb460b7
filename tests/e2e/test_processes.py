"""Real processes, real libp2p, a simulated chain, the real model: what a stranger's machine does, and what it refuses to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.config import load
from node.testing.devnet.devnet import available

MODEL = "smollm2-135m-instruct"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GRISTMILL_") or k == "GRISTMILL_ANVIL"}
QUESTION = "Tell me a long story about a mill."


def _model_stored() -> bool:
    try:
        from node.models.store import ModelStore

        return any(manifest.name == MODEL for manifest in ModelStore(load({}).models_dir).list())
    except Exception:
        return False


pytestmark = [
    pytest.mark.skipif(not available(), reason="no simulated chain: neither anvil nor the embedded one is installed"),
    pytest.mark.skipif(not _model_stored(), reason=f"{MODEL} is not in the model store: scripts/setup prepares it"),
    pytest.mark.slow,
]


def gristmill(folder: Path, *words: str, check: bool = True, timeout: float = 120) -> list[dict[str, Any]]:
    """Run one command with --json; its lines. With `check` a failure fails the test with what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "node", "--json", "--data-dir", str(folder), *words],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if check:
        assert done.returncode == 0, (words, rows, done.stderr.decode()[-2000:])
    assert b"Traceback" not in done.stderr, done.stderr.decode()[-3000:]
    return [*rows, {"status": done.returncode, "said": done.stderr.decode()}]


class World:
    """A chain, a worker folder and a client folder; the chain lives as long as the module's tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chain = folder / "chain"
        self.worker = folder / "worker"
        self.client = folder / "client"
        made = [gristmill(f, "init", "--network", "devnet", "--role", r)[0] for f, r in self.roles()]
        accounts = [key["address"] for one in made for key in one["keys"]]
        funds = [word for account in accounts for word in ("--fund", account)]
        self.state = gristmill(self.chain, "devnet", "up", *funds)[0]
        self.settings = [
            *("--set", f"chain.rpc_urls={self.state['url']}"),
            *("--set", f"chain.deployment={self.state['deployment']}"),
            *("--set", f"models.folder={load({}).models_dir}"),
            *("--set", f"worker.models={MODEL}"),
        ]
        gristmill(self.client, *self.settings, "deposit", "5000000")

    def roles(self) -> list[tuple[Path, str]]:
        return [(self.worker, "worker"), (self.client, "client")]

    def close(self) -> None:
        gristmill(self.chain, "devnet", "down")

    def start(self, folder: Path | None = None, *more: str) -> subprocess.Popen[bytes]:
        words = ["--json", "--data-dir", str(folder or self.worker), *self.settings, *more, "start"]
        return subprocess.Popen(
            [sys.executable, "-m", "node", *words],
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("w")
    made = World(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


def ready(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    row: dict[str, Any] = json.loads(process.stdout.readline())
    assert row.get("event") == "ready", row
    return row


def stop(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
    return process.returncode


def refusal(world: World, *more: str, folder: Path | None = None) -> dict[str, Any]:
    """Start a worker that must refuse; the error it ends with, and its status."""
    process = world.start(folder, *more)
    out, err = process.communicate(timeout=120)
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows, err.decode()[-2000:]
    assert "error" in rows[-1], rows
    assert b"Traceback" not in err
    return {**rows[-1]["error"], "status": process.returncode}


def test_a_worker_that_is_told_to_stop_before_it_is_ready_stops(world: World) -> None:
    """Hashing a model may take minutes."""
    process = world.start()
    assert process.stderr is not None and process.stdout is not None
    try:
        assert any(b": hashing " in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        rows = [json.loads(line) for line in process.stdout]
        assert rows == [{"event": "stopped", "clean": True}]
        assert process.wait(60) == 0
    finally:
        stop(process)


def test_a_paid_chat_over_processes_then_claim_close_and_audit(world: World) -> None:
    """C7: the chat is no transaction. What the worker counts meanwhile is on its page."""
    process = world.start(None, "--set", "telemetry.metrics=0")
    try:
        row = ready(process)
        address = row["addresses"][0]
        rows = gristmill(
            world.client, *world.settings, "chat", MODEL, "What is a mill?", "--worker", address, "--max-tokens", "24"
        )
        answer = rows[-2]
        assert answer["usage"]["output_tokens"] == sum(len(row["token_ids"]) for row in rows[:-2])
        assert "".join(row["text"] for row in rows[:-2]).strip()
        assert answer["blocks"]["before"] == answer["blocks"]["after"]  # automine: a transaction would be a block
        status = gristmill(world.worker, "status")[0]
        assert status["finished"] == 1
        page = urllib.request.urlopen(f"http://{row['metrics']}/metrics", timeout=20).read().decode()
        assert "\ngristmill_jobs_finished_total 1.0\n" in page
        assert f"\ngristmill_output_tokens_total {float(answer['usage']['output_tokens'])}\n" in page
        counted = f'vllm:time_to_first_token_seconds_count{{engine="0",model_name="{MODEL}"}} 2.0'
        assert counted in page, "the self-test and the chat"
        assert "vllm:kv_cache_usage_perc" in page and "vllm:num_requests_running" in page
        (asset,) = status["assets"]
        assert asset["earned"] == answer["cost"] and asset["chain"] == answer["chain"] == "default"
        claimed, end = gristmill(world.worker, "claim")
        assert "claiming 0." in end["said"] and "tUSD on default" in end["said"]
        assert [one["amount"] for one in claimed["totals"]] == [answer["cost"]]
        assert [t["purpose"] for t in claimed["transactions"]] == ["claim", "settle"]
        # A sampled answer with a seed is the same answer twice.
        sampled = [
            gristmill(
                world.client, *world.settings, "chat", MODEL, "Name a colour.", "--worker", address,
                "--max-tokens", "12", "--temperature", "1", "--seed", "7",
            )
            for _ in range(2)
        ]  # fmt: skip
        texts = ["".join(row.get("text", "") for row in rows) for rows in sampled]
        assert texts[0] == texts[1]
        # A schema binds what is written, and what is wrong with one is said before anything is owed.
        schema = world.client / "colour.json"
        schema.write_text('{"enum": ["red", "blue"]}')
        bound = gristmill(
            world.client, *world.settings, "chat", MODEL, "Name a colour.", "--worker", address,
            "--max-tokens", "12", "--temperature", "1", "--json-schema", str(schema),
        )  # fmt: skip
        assert json.loads("".join(row.get("text", "") for row in bound)) in ("red", "blue")
        schema.write_text('{"type": "array", "uniqueItems": true}')
        rows = gristmill(
            world.client, *world.settings, "chat", MODEL, "Hi.", "--worker", address, "--json-schema", str(schema), check=False
        )  # fmt: skip
        (refused,) = [row["error"] for row in rows if "error" in row]
        assert "response_format: the client's JSON schema is refused" in refused["message"], refused
    finally:
        assert stop(process) == 0
    for folder, role in world.roles():
        assert gristmill(folder, *world.settings, "audit", "--role", role)[0]["audit"] == {role: "ok"}


def test_the_client_library_from_code_without_trio(world: World) -> None:
    from node.client import sync_client
    from node.errors import NoWorker

    process = world.start()
    try:
        address = ready(process)["addresses"][0]
        pairs = [pair.split("=", 1) for pair in world.settings if "=" in pair]
        config = load({"data_dir": world.client, **dict(pairs)})
        with sync_client(config, workers=[address]) as client:
            before = client.balance()
            with client.chat(MODEL, [{"role": "user", "content": "Say yes."}], max_tokens=6) as stream:
                chunks = list(stream)
            assert stream.receipt.output_tokens == sum(len(chunk.token_ids) for chunk in chunks) > 0
            assert stream.parts[0].receipt == stream.receipt
            with pytest.raises(NoWorker) as error, client.chat("no-such-model", [{"role": "user", "content": "?"}]):
                pass
            assert list(error.value.reasons.values()) == [("model_unknown",)]
            assert client.balance() <= before
    finally:
        assert stop(process) == 0


def test_a_killed_worker_leaves_a_typed_error_and_the_money_comes_back(world: World) -> None:
    process = world.start()
    client: subprocess.Popen[bytes] | None = None
    try:
        address = ready(process)["addresses"][0]
        words = ["chat", MODEL, QUESTION, "--worker", address, "--max-tokens", "400"]
        client = subprocess.Popen(
            [sys.executable, "-m", "node", "--json", "--data-dir", str(world.client), *world.settings, *words],
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert client.stdout is not None
        rows = [json.loads(client.stdout.readline()) for _ in range(6)]
        process.kill()
        out, err = client.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
        if client is not None:
            client.kill()
    rows += [json.loads(line) for line in out.splitlines()]
    assert b"Traceback" not in err, err.decode()[-3000:]
    assert rows[-1]["error"]["code"] == "worker_fault", rows[-1]
    delivered = sum(len(row.get("token_ids", [])) for row in rows)
    assert delivered > 0
    # The worker is dead: no consent, so the delayed withdrawal begins; after the delay everything is home.
    before = gristmill(world.client, *world.settings, "channels", "list")
    states = [row for row in before if row.get("status") == "open"]
    assert states
    first = gristmill(world.client, *world.settings, "channels", "close")
    for state in states:
        assert f"closing {state['channel']}: up to " in first[-1]["said"]
    assert all(row["cooperative"] is False for row in first[:-1])
    wait = max(row["available_at"] for row in first[:-1]) - int(time.time())
    _advance(world.state["url"], wait + 3600)
    second = gristmill(world.client, *world.settings, "channels", "close")
    assert sum(int(row["returned"]) for row in second[:-1]) == sum(
        int(state["allocated"]) - int(state["claimed"]) for state in states
    ), json.dumps([first, second], indent=1)
    # The dead worker's journal opens again, books what the vouchers cover, and is sound.
    assert gristmill(world.client, *world.settings, "audit", "--role", "client")[0]["audit"] == {"client": "ok"}
    again = world.start()
    try:
        ready(again)
    finally:
        assert stop(again) == 0
    assert gristmill(world.worker, *world.settings, "audit", "--role", "worker")[0]["audit"] == {"worker": "ok"}


def _advance(url: str, seconds: int) -> None:
    import urllib.request

    for method, params in (("evm_increaseTime", [hex(seconds)]), ("evm_mine", [])):
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        assert "error" not in json.load(urllib.request.urlopen(request, timeout=10))


def test_a_wrong_password_is_refused_at_start(world: World, tmp_path: Path) -> None:
    wrong = tmp_path / "password"
    wrong.write_text("not the password\n")
    wrong.chmod(0o600)
    error = refusal(world, "--set", f"keys.password_file={wrong}")
    assert (error["code"], error["status"]) == ("key", 4)


def test_a_wrong_chain_id_is_refused_at_start(world: World, tmp_path: Path) -> None:
    deployment = json.loads(Path(world.state["deployment"]).read_text())
    deployment["chain_id"] += 1
    other = tmp_path / "deployment.json"
    other.write_text(json.dumps(deployment))
    error = refusal(world, "--set", f"chain.deployment={other}")
    assert (error["code"], error["status"]) == ("chain", 6)
    assert "chain" in error["message"]


def test_a_contract_that_is_not_ours_is_refused_at_start(world: World, tmp_path: Path) -> None:
    deployment = json.loads(Path(world.state["deployment"]).read_text())
    # Our own code at the wrong address is not the Channels contract.
    deployment["channels"], deployment["workers"] = deployment["workers"], deployment["channels"]
    other = tmp_path / "deployment.json"
    other.write_text(json.dumps(deployment))
    error = refusal(world, "--set", f"chain.deployment={other}")
    assert (error["code"], error["status"]) == ("chain", 6)


def test_a_second_worker_on_one_journal_is_refused(world: World) -> None:
    process = world.start()
    try:
        ready(process)
        error = refusal(world)
        assert error["status"] != 0
        assert error["code"] == "signer_locked"
    finally:
        assert stop(process) == 0


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(world: World) -> None:
    process = world.start()
    try:
        address = ready(process)["addresses"][0]
        rows = gristmill(world.client, *world.settings, "chat", MODEL, "mill " * 9000, "--worker", address, check=False)
        assert rows[-1]["status"] != 0
        assert "context_exceeded" in json.dumps(rows[0]["error"])
        rows = gristmill(world.client, *world.settings, "chat", "no-such-model", "hi", "--worker", address, check=False)
        assert rows[0]["error"]["code"] == "no_worker"
        status = gristmill(world.worker, "status")[0]
        assert (status["accepted"], status["output_tokens"]) == (0, 0)
    finally:
        assert stop(process) == 0
