"""`gristmill demo`: the JSON that outside checks read, on the chain that needs nothing but pip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from node.config import load

MODEL = "smollm2-135m-instruct"


def _model_stored() -> bool:
    try:
        from node.models.store import ModelStore

        return any(manifest.name == MODEL for manifest in ModelStore(load({}).models_dir).list())
    except Exception:
        return False


pytestmark = [
    pytest.mark.skipif(find_spec("eth") is None, reason="the embedded chain is not installed (extra devnet)"),
    pytest.mark.skipif(not _model_stored(), reason=f"{MODEL} is not in the model store: scripts/setup prepares it"),
    pytest.mark.slow,
]


def test_the_demo_on_the_embedded_chain_agrees_to_the_last_unit() -> None:
    words = ["demo", "What is flour?", "--chain", "embedded", "--max-tokens", "8", "--json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRISTMILL_")}
    done = subprocess.run([sys.executable, "-m", "node", *words], capture_output=True, env=environment, timeout=240)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, (result, done.stderr.decode()[-2000:])
    assert result["ok"] is True
    assert result["problems"] == []
    assert "embedded" in result["chain"]
    assert "simulated" in result["chain"]
    assert set(result["seconds"]) >= {"setup", "first_token", "total"}
    assert result["seconds"]["setup"] <= result["seconds"]["first_token"] <= result["seconds"]["total"]
    assert set(result["model"]) >= {"id", "sha256"}
    assert result["text"]
    assert result["usage"]["output_tokens"] == result["receipt"]["output_tokens"] > 0
    assert result["receipt_verified"] is True
    assert result["transactions_during_job"] == 0
    assert [t["purpose"] for t in result["transactions"]] == [
        "approve",
        "deposit",
        "allocate",
        "claim",
        "settle",
        "close",
    ]
    assert all(t["gas"] > 21_000 and len(t["hash"]) == 66 for t in result["transactions"])
    assert result["client_paid"] == result["worker_received"] == result["receipt"]["cost"]
    assert result["audit"] == {"client": "ok", "worker": "ok"}
