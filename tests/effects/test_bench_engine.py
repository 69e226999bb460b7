"""The engine's benchmark: what it counts, and that a peer's failure is told and spoils nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "scripts" / "benches"

DRIVER = """
import subprocess, sys, threading, time
sys.path.insert(0, {folder!r})
import talk

def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass

class Engine:
    def run(self, prompts, new_tokens, first):
        print("an engine that chats on stdout")
        if new_tokens == 13:
            return [[1] for _ in prompts]
        if new_tokens == 14:
            raise ValueError("no such number")
        for n in range(len(prompts)):
            first(n)
        burn(0.1)
        thread = threading.Thread(target=burn, args=(0.1,))
        thread.start()
        thread.join()
        work = "import time\\nwhile time.process_time() < 0.2: pass\\n"
        subprocess.run([sys.executable, "-c", work], check=True)
        stay = work + "import sys; print(1, flush=True); sys.stdin.read()"
        self.living = subprocess.Popen([sys.executable, "-c", stay], stdin=-1, stdout=-1)
        self.living.stdout.readline()
        return [[7] * new_tokens for _ in prompts]

talk.serve(lambda asked: (Engine(), {{"engine": asked["version"]}}))
"""


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(BENCHES))
    try:
        import engine
    finally:
        sys.path.remove(str(BENCHES))
    return engine


def talk_to(tmp_path: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    script = tmp_path / "with_test.py"
    script.write_text(DRIVER.format(folder=str(BENCHES / "peers")))
    asked = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run([sys.executable, script], input=asked, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


LOAD = {"do": "load", "version": "1.2"}


def test_cpu_time_of_threads_and_of_living_and_reaped_children_counts(tmp_path: Path) -> None:
    loaded, ran = talk_to(tmp_path, LOAD, {"do": "run", "prompts": [[1, 2], [3]], "new_tokens": 3}, {"do": "exit"})
    assert loaded["versions"] == {"engine": "1.2"}
    assert ran["tokens"] == [[7, 7, 7], [7, 7, 7]]
    assert all(0 <= first < ran["wall"] for first in ran["first"])
    assert ran["cpu"] >= 0.55  # 0.1 and 0.1 in threads, 0.2 and 0.2 in children, less a tick for rounding


def test_a_wrong_number_of_tokens_and_an_exception_are_answers(tmp_path: Path) -> None:
    early, _, short, broken, fine = talk_to(
        tmp_path,
        {"do": "run", "prompts": [[1]], "new_tokens": 1},
        LOAD,
        {"do": "run", "prompts": [[1]], "new_tokens": 13},
        {"do": "run", "prompts": [[1]], "new_tokens": 14},
        {"do": "run", "prompts": [[1]], "new_tokens": 2},
    )
    assert "nothing is loaded" in early["error"]
    assert "asked for 13 tokens each, got [1]" in short["error"]
    assert broken["error"] == "ValueError: no such number"
    assert fine["tokens"] == [[7, 7]]


def test_figures_are_ratios_of_the_same_round(bench: Any) -> None:
    def rounds(*rates: float) -> dict[int, list[dict[str, float]]]:
        return {n: [{"cpu": rate, "decode": 2 * rate} for rate in rates] for n in bench.STREAMS}

    # The machine was half as fast in the second round: medians of each would say 1.25, every round says 2.
    measured = {"ours_bf16": rounds(20, 10, 50), "vllm_eager": rounds(10, 5, 25), "llamacpp_q8": rounds(1, 1, 1)}
    figures = bench._figures(measured)
    assert figures["bf16_c4"] == 20
    assert figures["bf16_c4_spread"] == 2.0
    assert figures["bf16_vllm_eager_c16"] == 2.0
    assert not any("llamacpp" in key for key in figures), "there is nothing of ours to compare it with"


def test_prefill_is_part_of_the_figure_and_not_of_decode(bench: Any) -> None:
    whole = {"cpu": 10.0, "wall": 20.0, "first": [0.5, 1.5, 1.0, 1.0]}
    one = bench._one(whole, {"cpu": 2.0, "wall": 3.0}, streams=4)
    assert one["cpu"] == 4 * bench.NEW_TOKENS / 10
    assert one["decode"] == 4 * (bench.NEW_TOKENS - 1) / 8
    assert one["prefill"] == 4 * bench.PROMPT_TOKENS / 2
    assert one["ttft_ms"] == 1000
    silent = bench._one({**whole, "first": [None] * 4}, {"cpu": 2.0, "wall": 3.0}, streams=4)
    assert silent["ttft_ms"] == 3000


def test_peers_that_are_not_installed_are_listed(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_model", lambda peers: (tmp_path, tmp_path))
    monkeypatch.setattr(bench, "_text", lambda folder: [1] * 1000)
    args = SimpleNamespace(runs=1, only="vllm_eager,llamacpp_q4", peers_dir=tmp_path)
    result = bench.run(args)
    assert result["missing_peers"] == ["vllm_eager", "llamacpp_q4"]
    assert result["peers"] == result["figures"] == {}
    text = bench.table({**result, "conditions": {"date": "today", "cpu": "some"}})
    assert "missing: vllm_eager (--install-peers)" in text


def test_a_peer_that_cannot_load_is_reported_with_its_name(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_model", lambda peers: (tmp_path, tmp_path))
    monkeypatch.setattr(bench, "_text", lambda folder: [1] * 1000)
    python = tmp_path / "llamacpp" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho broken >&2\nexec {sys.executable} -c 'raise SystemExit(1)'\n")
    python.chmod(0o755)
    result = bench.run(SimpleNamespace(runs=1, only="llamacpp_q4", peers_dir=tmp_path))
    assert "ended without an answer" in result["failed"]["llamacpp_q4"]
    assert "broken" in (tmp_path / "llamacpp_q4.log").read_text()


def test_an_unknown_contender_is_an_error(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no contender turbo"):
        bench.run(SimpleNamespace(only="turbo", peers_dir=tmp_path))
