"""Tokens per CPU second of our engine beside its peers and our other back ends: same weights, one thread, one run.

Workload: SmolLM2-135M-Instruct, prompts of 128 tokens of English, 64 new tokens, greedy, end-of-sequence ignored, 1, 4 and 16
streams at once. Contenders take turns, round by round, so that what else the machine does hits all of them; medians are
reported. Each engine runs in a process of its own, with one thread, prefix caches off, fresh prompts in every round.

Figures: `FORMAT_cN` = new tokens per second of CPU time of the whole run, prefill included, which is what the bars are about;
`FORMAT_cN_decode` = the same of decoding alone (the run less a run of one token); `FORMAT_PEER_cN` = ours over the peer's, the
median of the rounds' ratios. `spread` is (largest - smallest) / median over the rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from peers import report

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
MODEL = "smollm2-135m-instruct"
PROMPT_TOKENS, NEW_TOKENS = 128, 64
STREAMS = (1, 4, 16)
THREADS = 1
OWN = "own"
"""Name, among contenders, of the engine's own measures."""


@dataclass(frozen=True)
class Contender:
    """One engine in one set-up."""

    name: str
    format: str
    driver: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: str | None = None
    """Folder below --peers-dir; None is ours."""
    slow_to_start: bool = False

    def python(self, peers: Path) -> Path:
        return Path(sys.executable) if self.environment is None else peers / self.environment / "bin" / "python"


OURS = tuple(
    Contender(f"ours_{name}", name, "gristmill", {"format": long})
    for name, long in (("bf16", "bfloat16"), ("int8", "int8"), ("int4", "int4"), ("fp32", "float32"))
)
OURS_FORMATS = {one.name: one.format for one in OURS}
PEERS = (
    Contender("vllm_eager", "bf16", "vllm", {"compiled": False}, "vllm"),
    Contender("vllm_compiled", "bf16", "vllm", {"compiled": True}, "vllm", slow_to_start=True),
    Contender("transformers_bf16", "bf16", "transformers", {"continuous": False, "dtype": "bfloat16"}, "transformers"),
    Contender("llamacpp_q8", "int8", "llamacpp", {"quant": "q8_0"}, "llamacpp"),
    Contender("ctranslate2", "int8", "ctranslate2", {}, "ctranslate2"),
    Contender("llamacpp_q4", "int4", "llamacpp", {"quant": "q4_0"}, "llamacpp"),
    Contender("backend_transformers", "fp32", "backend", {"runtime": "transformers", "dtype": "float32"}),
    Contender("backend_onnx", "fp32", "backend", {"runtime": "onnx", "dtype": "float32"}),
    Contender("backend_onnx_int8", "int8", "backend", {"runtime": "onnx", "dtype": "int8"}),
    Contender("backend_onnx_int4", "int4", "backend", {"runtime": "onnx", "dtype": "int4"}),
    Contender("transformers_cb", "fp32", "transformers", {"continuous": True, "dtype": "float32"}, "transformers"),
)


class Running:
    """A contender's process."""

    def __init__(self, contender: Contender, peers: Path) -> None:
        self.contender = contender
        self.versions: dict[str, str] = {}
        threads = str(THREADS)
        script = FOLDER / "peers" / f"with_{contender.driver}.py"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "THP_MEM_ALLOC_ENABLE": "1",  # our engine sets it for itself; torch's other users get it too
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self.log = (peers / f"{contender.name}.log").open("w")
        self.process = subprocess.Popen(
            [contender.python(peers), script], env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request, wait for its answer. Raises RuntimeError with what the engine said."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the process has no pipes")
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.contender.name} ended without an answer: see {self.log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.contender.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        try:
            self.process.communicate('{"do": "exit"}\n', timeout=30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.communicate()
        self.log.close()


def run(args: Any = None) -> dict[str, Any]:
    """Measure. `args.runs`: rounds, 3 by default; `args.only`: names of contenders, comma separated; `args.compiled`: vLLM
    compiled as well, which takes a minute to start; `args.peers_dir` and `args.install_peers`."""
    rounds = getattr(args, "runs", None) or 3
    load = os.getloadavg()[0]
    peers = Path(getattr(args, "peers_dir", None) or ROOT / "build" / "peers").resolve()
    peers.mkdir(parents=True, exist_ok=True)
    only = set(filter(None, (getattr(args, "only", None) or "").split(",")))
    unknown = only - {OWN, *(contender.name for contender in (*OURS, *PEERS))}
    if unknown:
        raise SystemExit(f"error: no contender {', '.join(sorted(unknown))}")
    compiled = getattr(args, "compiled", False)
    wanted = [one for one in (*OURS, *PEERS) if one.name in only or not (only or (one.slow_to_start and not compiled))]
    failed = _install(wanted, peers) if getattr(args, "install_peers", False) else {}
    missing = [one.name for one in wanted if not one.python(peers).exists()]
    wanted = [one for one in wanted if one.name not in missing]
    folder, gguf = _model(peers)
    tokens = _text(folder)
    with _started(wanted, peers, folder, gguf, failed) as running:
        measured = _rounds(running, rounds, tokens) if running else {}
        versions = {name: version for one in running for name, version in one.versions.items()}
    own: dict[str, float] = {}
    if not only or OWN in only:
        from own.measures import measure

        _say("the engine's own measures")
        try:
            own = measure(folder, tokens, {one.format: one.options["format"] for one in OURS[:2]}, rounds, THREADS)
        except RuntimeError as error:
            failed[OWN] = str(error)
    return {
        "figures": {**_figures(measured), **own},
        "peers": {one.name: _summary(measured[one.name]) for one in PEERS if one.name in measured},
        "missing_peers": missing,
        "failed": failed,
        "conditions": {
            "versions": versions,
            "rounds": rounds,
            "threads": THREADS,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "load": load,
            "load_after": os.getloadavg()[0],
        },
    }


def _install(wanted: Sequence[Contender], peers: Path) -> dict[str, str]:
    """Make the environments that are not there; contender -> why it has none."""
    from peers.install import install

    failed = {}
    for name in dict.fromkeys(one.environment for one in wanted if one.environment):
        if not (peers / name / "bin" / "python").exists():
            _say(f"installing {name}")
            why = install(name, peers / name)
            failed |= {one.name: why for one in wanted if why and one.environment == name}
    return failed


@contextlib.contextmanager
def _started(
    wanted: Sequence[Contender], peers: Path, folder: Path, gguf: Path, failed: dict[str, str]
) -> Iterator[list[Running]]:
    """Load one after the other; who cannot load is left out, and `failed` says why."""
    running: list[Running] = []
    try:
        for contender in wanted:
            _say(f"loading {contender.name}")
            process = Running(contender, peers)
            try:
                asked = {"model": str(folder), "gguf": str(gguf), "scratch": str(peers), **contender.options}
                process.versions = process.ask(do="load", threads=THREADS, streams=max(STREAMS), **asked)["versions"]
            except RuntimeError as error:
                failed[contender.name] = str(error)
                _say(f"  failed: {error}")
                process.close()
            else:
                running.append(process)
        yield running
    finally:
        for process in running:
            process.close()


def _rounds(running: list[Running], rounds: int, tokens: list[int]) -> dict[str, dict[int, list[dict[str, float]]]]:
    """name -> streams -> one measurement a round. Prompts differ from round to round and stream to stream."""
    measured: dict[str, dict[int, list[dict[str, float]]]] = {}
    picked = random.Random(11)
    for turn in range(-1, rounds):  # the first warms up
        for streams in STREAMS:
            starts = picked.sample(range(len(tokens) - PROMPT_TOKENS), streams)
            prompts = [tokens[start : start + PROMPT_TOKENS] for start in starts]
            for process in running:
                whole = process.ask(do="run", prompts=prompts, new_tokens=NEW_TOKENS if turn >= 0 else 4)
                if turn < 0:
                    continue
                prefill = process.ask(do="run", prompts=prompts, new_tokens=1)
                one = _one(whole, prefill, streams)
                measured.setdefault(process.contender.name, {}).setdefault(streams, []).append(one)
                _say(f"round {turn + 1}/{rounds} c{streams:<3} {process.contender.name:<18} " + _row(one))
    return measured


def _one(whole: dict[str, Any], prefill: dict[str, Any], streams: int) -> dict[str, float]:
    count = streams * NEW_TOKENS
    first = [seconds for seconds in whole["first"] if seconds is not None]
    return {
        "cpu": count / whole["cpu"],
        "wall": count / whole["wall"],
        "decode": (count - streams) / max(whole["cpu"] - prefill["cpu"], 1e-9),
        "prefill": streams * PROMPT_TOKENS / prefill["cpu"],
        "ttft_ms": 1000 * (median(first) if first else prefill["wall"]),
    }


def _row(one: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:7.1f}" for key, value in one.items())


def _summary(by_streams: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    found = {}
    for streams, measured in by_streams.items():
        for key in measured[0]:
            values = [one[key] for one in measured]
            name = f"c{streams}" + ("" if key == "cpu" else f"_{key}")
            found[name] = round(median(values), 1)
            if key == "cpu":
                found[f"c{streams}_spread"] = round((max(values) - min(values)) / median(values), 3)
    return found


def _figures(measured: dict[str, dict[int, list[dict[str, float]]]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    ours = {one.format: measured[one.name] for one in OURS if one.name in measured}
    for format_name, by_streams in ours.items():
        figures |= {f"{format_name}_{key}": value for key, value in _summary(by_streams).items()}
    for peer in PEERS:
        for streams, theirs in measured.get(peer.name, {}).items() if peer.format in ours else ():
            pairs = zip(ours[peer.format][streams], theirs, strict=True)
            ratio = median(own["cpu"] / their["cpu"] for own, their in pairs)
            figures[f"{peer.format}_{peer.name}_c{streams}"] = round(ratio, 3)
    return figures


def _model(peers: Path) -> tuple[Path, Path]:
    """Folder of the converted model, and the packaged GGUF that it was converted from."""
    from node.models.packages import KNOWN, add_known, installed
    from node.models.store import ModelStore

    store = ModelStore(Path(os.environ.get("GRISTMILL_TEST_MODELS") or peers / "models"))
    files = installed(KNOWN[MODEL].packages[0])
    if files is None:
        raise SystemExit(f"error: {KNOWN[MODEL].requirement} is not installed\n\nhint: scripts/setup --dev")
    gguf = next(path for name, path in files.items() if name.endswith(".gguf"))
    return store.path(add_known(store, MODEL).id), gguf


def _text(folder: Path) -> list[int]:
    """Token ids of English prose: what this repository's documents say, without headings, tables and code."""
    from tokenizers import Tokenizer

    pages = sorted((ROOT / "docs").rglob("*.md"))
    lines = [line.strip(" -*>") for page in pages for line in page.read_text().splitlines()]
    prose = " ".join(line for line in lines if line[:1].isalpha() and "|" not in line)
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prose).ids
    return ids


def table(result: dict[str, Any]) -> str:
    return report.table(result, OURS_FORMATS, STREAMS)


def plot(result: dict[str, Any], path: Path) -> None:
    report.plot(result, OURS_FORMATS, STREAMS, path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
