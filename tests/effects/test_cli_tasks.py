"""`embed` and `run` on a market in memory: what goes to stdout, what to stderr, and what is said of bad input."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from node.cli import embed as embed_module
from node.cli import main as frame
from node.cli import run as run_module
from node.client.client import Client
from node.testing.fake_tasks import FakeTasks, read_of, score_of, vector_of, words_of
from node.testing.market import Market, run_market
from protocol.pricing import Price, cost

AUDIO = bytes(range(250)) * 128 * 3
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (300).to_bytes(4) + (200).to_bytes(4) + bytes(500)
TEXTS = ("hello there", "a mill")


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command whose client lives on a market in memory, with these bytes as its standard input."""
    monkeypatch.chdir(tmp_path)

    def on_market(shared: Any, work: Callable[[Client], Awaitable[None]], workers: Any = (), **options: Any) -> None:
        async def test(market: Market) -> None:
            await market.worker(tasks=FakeTasks())
            await work(await market.client())

        run_market(test)

    monkeypatch.setattr(embed_module, "run", on_market)
    monkeypatch.setattr(run_module, "with_client", on_market)

    def go(*words: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        status = frame.main(["--data-dir", str(tmp_path / "data"), *words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(status, captured.out, captured.err)

    return go


def summary(row: dict[str, Any], task: str, units: int, output: int) -> None:
    price = Price(request=10, input=1_000_000, output=2_000_000)
    assert row["task"] == task
    assert row["usage"] == {"input_tokens": units, "output_tokens": output}
    assert row["cost"] == row["receipt"]["cost"] == str(cost(price, units, output))
    assert row["receipt_signature"].startswith("0x")


def test_embed_prints_a_vector_a_line_and_the_bill_beside_it(run: Run) -> None:
    done = run("embed", "fake-embed", *TEXTS)
    assert done.status == 0, done.err
    assert [tuple(json.loads(line)) for line in done.out.splitlines()] == [vector_of(text) for text in TEXTS]
    assert "usage    4 x token, 2 x vector" in done.err and "cost     " in done.err and "verified" in done.err


def test_embed_reads_lines_and_tells_machines_everything(run: Run) -> None:
    done = run("--json", "embed", "fake-embed", "-", stdin=b"hello there\n\na mill\n")
    *vectors, last = done.rows
    assert [(row["index"], tuple(row["vector"])) for row in vectors] == [
        (0, vector_of(TEXTS[0])),
        (1, vector_of(TEXTS[1])),
    ]
    summary(last, "embed", 4, 2)


def test_rerank_prints_scores_in_the_order_of_the_documents(run: Run) -> None:
    done = run("run", "rerank", "fake-rerank", "a mill", *TEXTS)
    assert done.status == 0, done.err
    assert done.out.splitlines() == [f"{score_of('a mill', text):.6f}\t{text}" for text in TEXTS]
    *scores, last = run("--json", "run", "rerank", "fake-rerank", "a mill", "-", stdin=b"hello there\na mill\n").rows
    assert scores == [{"index": 0, "score": 0.0}, {"index": 1, "score": 2.0}]
    summary(last, "rerank", 8, 2)


def test_transcribe_hears_a_file_and_standard_input(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sound.pcm").write_bytes(AUDIO)
    done = run("run", "transcribe", "fake-transcribe", "sound.pcm")
    assert (done.status, done.out) == (0, words_of(AUDIO) + "\n"), done.err
    assert "300 x 10 ms of audio" in done.err
    *texts, last = run("--json", "run", "transcribe", "fake-transcribe", "-", stdin=AUDIO).rows
    assert "".join(row["text"] for row in texts) == words_of(AUDIO)
    summary(last, "transcribe", 300, 3)
    assert last["finish_reason"] == "stop"


def test_ocr_reads_a_picture(run: Run, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(PNG)
    done = run("run", "ocr", "fake-ocr", "page.png")
    assert (done.status, done.out) == (0, read_of(PNG) + "\n"), done.err
    *texts, last = run("--json", "run", "ocr", "fake-ocr", "page.png").rows
    assert "".join(row["text"] for row in texts) == read_of(PNG)
    summary(last, "ocr", 2, len(read_of(PNG)))


MISTAKES: dict[str, tuple[list[str], bytes, int, str]] = {
    "nothing to embed": (["embed", "fake-embed"], b"\n\n", 2, "usage"),
    "nothing to rank": (["run", "rerank", "fake-rerank", "x"], b"", 2, "usage"),
    "a file that is not there": (["run", "ocr", "fake-ocr", "none.png"], b"", 3, "config"),
    "a folder": (["run", "transcribe", "fake-transcribe", "."], b"", 3, "config"),
    "no picture": (["run", "ocr", "fake-ocr", "text.txt"], b"", 3, "config"),
    "half a sample": (["run", "transcribe", "fake-transcribe", "text.txt"], b"", 3, "config"),
    "a WAV file through a pipe": (["run", "transcribe", "fake-transcribe", "-"], b"RIFF1234WAVEfmt ", 3, "config"),
    "a chat model": (["embed", "fake", "x"], b"", 5, "no_worker"),
    "no such model": (["run", "rerank", "nobody", "x", "y"], b"", 5, "no_worker"),
    "too dear": (["embed", "fake-embed", "x", "--max-cost", "3"], b"", 5, "no_worker"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_have_their_exit_status_and_their_code(run: Run, tmp_path: Path, case: str) -> None:
    words, stdin, status, code = MISTAKES[case]
    (tmp_path / "text.txt").write_bytes(b"abc")
    done = run("--json", *words, stdin=stdin)
    assert done.status == status, (done.out, done.err)
    assert done.rows[-1]["error"]["code"] == code
