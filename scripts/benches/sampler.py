"""What choosing 16 tokens costs: the normative sampler and its grammar masks, beside transformers' processors.

Logits are the real model's at 16 positions of a text (random ones where its package is missing), 49,152 tokens wide, on one
thread. Figures are milliseconds of CPU for one step of 16 rows, medians. With penalties each row has 500 tokens of history.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROWS, VOCAB, RUNS = 16, 49152, 40
TEXT = "The history of the steam engine begins in the first century. Once there was a small village near the river, and"
CASES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "temperature 0.8, top_p 0.95, top_k 50": {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
    "temperature 0.8, top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "temperature 0.8, top_p 0.95, penalties": {
        "temperature": 0.8,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
    },
    "temperature 1": {"temperature": 1.0},
    "temperature 1, min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "temperature 2, top_p 0.99": {"temperature": 2.0, "top_p": 0.99},
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}


def _model() -> Any:
    """Folder of the real model in the configured store, or None."""
    from node.config import load
    from node.errors import NodeError
    from node.models.store import ModelStore

    store = ModelStore(load().models_dir)
    try:
        return store.path(store.resolve("smollm2-135m-instruct").id)
    except NodeError:
        return None


def _logits(folder: Any) -> Any:
    import torch

    if folder is None:
        logits = 3.5 * torch.randn((ROWS, VOCAB), generator=torch.Generator().manual_seed(1))
        logits[:, 7] += 14
        return logits
    from node.models.tokenizer import Tokenizer
    from node.runtime.engine.engine import Engine

    tokens = Tokenizer(folder).encode(TEXT)
    return Engine(folder).prefill_logits(tokens)[-ROWS:].clone()


def _milliseconds(step: Callable[[], Any], runs: int) -> float:
    step()
    spent = []
    for _ in range(runs):
        began = time.process_time()
        step()
        spent.append(time.process_time() - began)
    return round(1000 * median(spent), 3)


def run(args: Any = None) -> dict[str, Any]:
    import torch

    from node.runtime.engine.history import History
    from node.runtime.engine.sampler import Draw, Scratch, pick_rows
    from protocol.sampling import SamplingParams

    torch.set_num_threads(1)
    runs = getattr(args, "runs", None) or RUNS
    folder = _model()
    logits = _logits(folder)
    scratch = Scratch.of(logits)
    prompt, generated = [13 * i % 9000 for i in range(300)], [7 * i % 4000 for i in range(200)]
    figures = {}
    for name, filters in CASES.items():
        draws = []
        for row in range(ROWS):
            params = SamplingParams(**{"seed": row + 1, **filters})  # type: ignore[arg-type]
            history = History(params, prompt, generated, logits.device)
            draws.append(Draw(params, prompt, generated, history=history))
        figures[f"{name}, ms"] = _milliseconds(lambda draws=draws: pick_rows(logits, draws, scratch), runs)  # type: ignore[misc]
    greedy = SamplingParams(temperature=0)
    for count in (1, 20):
        told = [Draw(greedy, [0], [], logprobs=count) for _ in range(ROWS)]
        figures[f"greedy, {count} log probabilities, ms"] = _milliseconds(
            lambda told=told: pick_rows(logits, told, scratch),  # type: ignore[misc]
            runs,
        )
    if folder is not None:
        figures.update(_grammar(folder, logits, scratch, runs))
    return {
        "figures": figures,
        "peers": _transformers(logits, runs),
        "conditions": {"logits": "random" if folder is None else "smollm2-135m-instruct"},
    }


def _grammar(folder: Any, logits: Any, scratch: Any, runs: int) -> dict[str, float]:
    """Compile time of a small schema, and a step of 16 greedy rows in the midst of its answers."""
    from node.runtime.engine.sampler import Draw, pick_rows
    from node.runtime.grammar import Grammars
    from protocol.messages import ResponseFormat
    from protocol.sampling import SamplingParams

    greedy = SamplingParams(temperature=0)
    grammars = Grammars(folder, [2], seconds=30)
    wanted = [ResponseFormat("json_schema", json.dumps({**SCHEMA, "title": str(n)})) for n in range(9)]
    grammars.start(wanted[0])  # starts the child, loads the tokenizer
    began = time.perf_counter()
    for one in wanted[1:]:
        grammars.start(one)
    compiling = (time.perf_counter() - began) / 8
    answers = [grammars.start(wanted[0]) for _ in range(ROWS)]
    for constraint in answers:
        while not (allowed := constraint.mask().nonzero()[:, 0]).shape[0] > 1000:
            constraint.accept(int(allowed[0]))

    def step() -> None:
        pick_rows(logits, [Draw(greedy, [0], [], one.mask()) for one in answers], scratch)

    figures = {
        "grammar: compile a small schema, ms": round(1000 * compiling, 2),
        "grammar: masks of 16 answers, ms": _milliseconds(lambda: [one.mask() for one in answers], runs),
        "grammar: masks and greedy, ms": _milliseconds(step, runs),
    }
    grammars.close()
    return figures


def _transformers(logits: Any, runs: int) -> dict[str, dict[str, float]]:
    """The same cases by its logits processors and torch.multinomial: no seed per row, float32."""
    import torch

    try:
        from transformers.generation import logits_process as lp
    except ImportError:
        return {}
    ids = torch.arange(500).repeat(ROWS, 1)
    chains = {
        "greedy": [],
        "temperature 0.8, top_p 0.95, top_k 50": [
            lp.TemperatureLogitsWarper(0.8),
            lp.TopKLogitsWarper(50),
            lp.TopPLogitsWarper(0.95),
        ],
        "temperature 0.8, top_p 0.95": [lp.TemperatureLogitsWarper(0.8), lp.TopPLogitsWarper(0.95)],
        "temperature 1": [],
    }

    def step(name: str, chain: list[Any]) -> Any:
        scores = logits
        for processor in chain:
            scores = processor(ids, scores)
        return scores.argmax(-1) if name == "greedy" else torch.multinomial(scores.softmax(-1), 1)

    return {
        "transformers": {
            f"{name}, ms": _milliseconds(lambda name=name, chain=chain: step(name, chain), max(5, runs // 4))  # type: ignore[misc]
            for name, chain in chains.items()
        }
    }
