"""`chat --logprobs --n` between real processes, on a model of random weights: bought, paid, told in OpenAI's form, audited."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.testing.devnet.devnet import available

pytest.importorskip("torch")

import torch

from node.client import sync_client
from node.config import load
from node.models.store import ModelStore
from node.models.tokenizer import Tokenizer
from node.runtime.backend import EngineSettings, load_engine
from node.testing.tiny_model import NAME, add_tiny

pytestmark = [
    pytest.mark.skipif(not available(), reason="no simulated chain: neither anvil nor the embedded one is installed"),
    pytest.mark.slow,
]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GRISTMILL_") or k == "GRISTMILL_ANVIL"}
QUESTION = "What is counted?"


def gristmill(folder: Path, *words: str, check: bool = True) -> list[dict[str, Any]]:
    """One command with --json: its lines."""
    done = subprocess.run(
        [sys.executable, "-m", "node", "--json", "--data-dir", str(folder), *words],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=180,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert b"Traceback" not in done.stderr, done.stderr.decode()[-3000:]
    assert not check or done.returncode == 0, (words, rows, done.stderr.decode()[-2000:])
    return rows


class World:
    """A chain, a worker that serves, and a client with a deposit."""

    def __init__(self, folder: Path) -> None:
        self.worker, self.client, self.chain = folder / "worker", folder / "client", folder / "chain"
        (folder / "source").mkdir()
        self.store = ModelStore(folder / "models")
        self.manifest = add_tiny(self.store, folder / "source")
        made = [
            gristmill(one, "init", "--network", "devnet", "--role", role)[0]
            for one, role in ((self.worker, "worker"), (self.client, "client"))
        ]
        funds = [word for one in made for key in one["keys"] for word in ("--fund", key["address"])]
        state = gristmill(self.chain, "devnet", "up", *funds)[0]
        self.settings = [
            *("--set", f"chain.rpc_urls={state['url']}"),
            *("--set", f"chain.deployment={state['deployment']}"),
        ]
        self.models = ["--set", f"models.folder={folder / 'models'}"]
        gristmill(self.client, *self.settings, "deposit", "5000000")
        words = [
            "--data-dir",
            str(self.worker),
            *self.settings,
            *self.models,
            "--set",
            f"worker.models={NAME}",
            "start",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "node", "--json", *words],
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        row = json.loads(self.process.stdout.readline())
        assert row.get("event") == "ready", row
        self.address = row["addresses"][0]

    def chat(self, *words: str, models: bool = True, check: bool = True) -> list[dict[str, Any]]:
        local = self.models if models else []
        return gristmill(
            self.client, *self.settings, *local, "chat", NAME, QUESTION, "--worker", self.address, *words, check=check
        )

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(60) == 0
        finally:
            self.process.kill()
            self.process.communicate()
            audits = [
                gristmill(folder, *self.settings, "audit", "--role", role)[0]["audit"]
                for folder, role in ((self.worker, "worker"), (self.client, "client"))
            ]
            gristmill(self.chain, "devnet", "down")
        assert audits == [{"worker": "ok"}, {"client": "ok"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("w"))
    yield made
    made.close()


def test_several_answers_with_the_models_own_figures(world: World) -> None:
    *chunks, last = world.chat("--n", "2", "--logprobs", "3", "--temperature", "1", "--seed", "4", "--max-tokens", "12")
    engine = load_engine(world.store.path(world.manifest.id), EngineSettings(device="cpu"))
    tokenizer = Tokenizer(world.store.path(world.manifest.id))
    prompt = tokenizer.chat([{"role": "user", "content": QUESTION}])
    texts = set()
    for index in (0, 1):
        mine = [row for row in chunks if row["choices"][0]["index"] == index]
        ids = [token for row in mine for token in row["token_ids"]]
        content = [one for row in mine for one in row["choices"][0]["logprobs"]["content"]]
        logits = engine.prefill_logits([*prompt, *ids[:-1]], start=len(prompt) - 1)
        for token, one, own in zip(ids, content, logits.double().log_softmax(-1), strict=True):
            assert one["token"] == tokenizer.name_of(token) and one["bytes"] == list(tokenizer.bytes_of(token))
            assert math.isclose(one["logprob"], float(own[token]), rel_tol=1e-3, abs_tol=1e-3)
            likeliest = torch.topk(own, 3).indices.tolist()
            assert [top["token"] for top in one["top_logprobs"]] == [tokenizer.name_of(top) for top in likeliest]
        choice = last["choices"][index]
        text = "".join(row["choices"][0]["delta"]["content"] for row in mine)
        assert choice["message"] == {"role": "assistant", "content": text} and choice["error"] is None
        assert choice["usage"]["output_tokens"] == len(ids) == int(choice["receipt"]["output_tokens"])
        assert choice["finish_reason"] in ("stop", "length")
        texts.add(text)
    assert len(texts) == 2
    assert int(last["cost"]) == sum(int(choice["receipt"]["cost"]) for choice in last["choices"])


def test_a_client_without_the_model_has_the_ids(world: World) -> None:
    *chunks, last = world.chat("--logprobs", "1", "--max-tokens", "4", models=False)
    content = [one for row in chunks for one in row["choices"][0]["logprobs"]["content"]]
    ids = [token for row in chunks for token in row["token_ids"]]
    assert [one["token"] for one in content] == [f"token_id:{token}" for token in ids]
    assert all(one["bytes"] is None and len(one["top_logprobs"]) == 1 for one in content)
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in content), "greedy"
    assert last["choices"][0]["finish_reason"] == "length" and last["receipt"]["output_tokens"] == 4


def test_several_answers_from_code_without_trio(world: World) -> None:
    pairs = [pair.split("=", 1) for pair in world.settings if "=" in pair]
    config = load({"data_dir": world.client, **dict(pairs)})
    with sync_client(config, workers=[world.address]) as client:
        asked = client.answers(NAME, [{"role": "user", "content": QUESTION}], 2, max_tokens=5, logprobs=2)
        told: dict[int, int] = {}
        with asked as answers:
            for answer, chunk in answers:
                told[answer.index] = told.get(answer.index, 0) + len(chunk.logprobs)
        assert told == {0: 5, 1: 5} and answers.errors == []
        assert answers.cost == sum(answer.stream.receipt.cost for answer in answers.answers)


def test_a_limit_is_for_all_answers_together(world: World) -> None:
    one = world.chat("--max-tokens", "4", "--max-cost", "100000")[-1]
    assert "error" not in one
    rows = world.chat("--max-tokens", "4", "--n", "100", "--max-cost", "100", check=False)
    assert rows[-1]["error"]["code"] == "no_worker"
    assert list(rows[-1]["error"]["reasons"].values()) == [["price_too_high"]]
