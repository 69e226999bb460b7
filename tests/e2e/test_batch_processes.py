"""A batch job over real processes: libp2p, a simulated chain with the real contracts, the real model; and both sides killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node.config import load
from node.testing.devnet.devnet import available

MODEL = "smollm2-135m-instruct"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GRISTMILL_") or k == "GRISTMILL_ANVIL"}
LINES = [f"Mill {n} grinds wheat and rye." for n in range(20)]
TOKENS = 5


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


class World:
    """A chain, a worker folder, a client folder with a deposit, a file of inputs."""

    def __init__(self, folder: Path) -> None:
        self.chain, self.worker, self.client = (folder / name for name in ("chain", "worker", "client"))
        self.file = folder / "lines.txt"
        self.file.write_text("\n".join(LINES) + "\n\n")
        made = [self.run(f, "init", "--network", "devnet", "--role", r)[0] for f, r in self.roles()]
        funds = [word for one in made for account in one["keys"] for word in ("--fund", account["address"])]
        self.state = self.run(self.chain, "devnet", "up", *funds)[0]
        self.settings = [
            *("--set", f"chain.rpc_urls={self.state['url']}"),
            *("--set", f"chain.deployment={self.state['deployment']}"),
            *("--set", f"models.folder={load({}).models_dir}"),
            *("--set", f"worker.models={MODEL}"),
            *("--set", "worker.batch_min=1"),
        ]
        self.run(self.client, *self.settings, "deposit", "5000000")

    def roles(self) -> list[tuple[Path, str]]:
        return [(self.worker, "worker"), (self.client, "client")]

    def run(self, folder: Path, *words: str, timeout: float = 300) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "node", "--json", "--data-dir", str(folder), *words],
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout,
        )  # fmt: skip
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 0, (words, rows, done.stderr.decode()[-2000:])
        assert b"Traceback" not in done.stderr, done.stderr.decode()[-3000:]
        return rows

    def job(self, *words: str, **options: Any) -> list[dict[str, Any]]:
        return self.run(self.client, *self.settings, "job", *words, **options)

    def start(self, folder: Path, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "node", "--json", "--data-dir", str(folder), *self.settings, *words],
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def start_worker(self) -> tuple[subprocess.Popen[bytes], str]:
        process = self.start(self.worker, "start")
        assert process.stdout is not None
        row = json.loads(process.stdout.readline())
        assert row.get("event") == "ready", row
        return process, row["addresses"][0]

    def progress(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.run(self.worker, "status")[0]["batch"]
        return found

    def audit(self) -> None:
        for folder, role in self.roles():
            assert self.run(folder, *self.settings, "audit", "--role", role)[0]["audit"] == {role: "ok"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("b")
    made = World(folder)
    yield made
    made.run(made.chain, "devnet", "down")
    shutil.rmtree(folder)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def stop(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    finally:
        kill(process)
    return process.returncode


def until(true: Callable[[], Any], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)


def test_a_file_of_lines_is_run_verified_and_paid_to_the_unit(world: World) -> None:
    process, address = world.start_worker()
    try:
        words = ["--model", MODEL, "--max-tokens", str(TOKENS)]
        before = world.run(world.worker, "status")[0]
        rows = world.job("post", str(world.file), *words, "--worker", address, "--id", "words", "--wait")
        items, summary = rows[:-1], rows[-1]
        assert [row["index"] for row in items] == list(range(len(LINES)))
        assert all(row["text"].strip() and 0 < row["output_tokens"] <= TOKENS for row in items)
        assert (summary["status"], summary["inputs"]) == ("settled", len(LINES))
        assert 0 < int(summary["paid"]) <= int(summary["amount"])
        # Again under the same name: the same job, the same result, no transaction.
        again = world.job("post", str(world.file), *words, "--worker", address, "--id", "words", "--wait")
        assert again == [*items, {**summary, "done": None}]
        assert before["batch"] == [] == world.progress()
        listed = world.job("list")
        assert [(row["id"], row["status"], row["paid"]) for row in listed] == [("words", "settled", summary["paid"])]
        balance = 5_000_000 - int(summary["paid"])
        assert world.run(world.client, *world.settings, "deposit", "1")[0]["vault_balance"] == str(balance + 1)
    finally:
        assert stop(process) == 0
    # Without the worker: the result is kept here.
    assert world.job("result", "words")[:-1] == items
    world.audit()


def test_both_sides_killed_in_the_middle(world: World) -> None:
    process, address = world.start_worker()
    try:
        words = ["--model", MODEL, "--max-tokens", str(TOKENS), "--worker", address, "--id", "killed"]
        client = world.start(world.client, "job", "post", str(world.file), *words, "--wait")
        until(lambda: any(job["done"] >= 4 for job in world.progress()))
        kill(client)
        kill(process)
        process, address = world.start_worker()
        until(lambda: world.progress() == [] or world.progress()[0]["done"] >= 1)
        rows = world.job("result", "killed", "--worker", address)
        assert len(rows) == len(LINES) + 1
        assert rows[-1]["status"] == "settled"
        assert world.job("post", str(world.file), *words)[0]["job"] == rows[-1]["job"]
    finally:
        assert stop(process) == 0
    world.audit()
