"""Run a real model: so many streams at once, each a prompt that the nonce decides, greedy, a fixed number of tokens.

The engine is used as its host uses it, through `submit`, `step` and `abort`, without the host's thread and the network around
it: what is measured is what device and engine can do, which is the most that a client can see.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from node.errors import ModelError
from node.runtime.engine.errors import EngineError
from node.runtime.engine.sequence import FinishReason, StepOutput
from node.runtime.engine.sequence import Sequence as EngineSequence
from protocol.benchmark import BenchmarkDocument, ModelRun, Skipped, figure, output_hash, prompt_ids
from protocol.sampling import SamplingParams


class Engine(Protocol):
    """What is used of `node.runtime.engine`."""

    vocab_size: int

    def submit(self, sequence: EngineSequence) -> Any: ...

    def step(self) -> list[StepOutput]: ...

    def abort(self, sequence_id: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What one model run is."""

    batches: tuple[int, ...] = (1, 4, 16)
    turns: int = 3
    prompt_tokens: int = 128
    output_tokens: int = 64


QUICK = Plan(turns=2, prompt_tokens=32, output_tokens=16)
AGAIN_MAX = 1_000_000
"""Tokens that are run again because a stranger's file says so."""
WARM_UP = 2**32 - 1
"""The turn whose prompts warm the engine up."""


@dataclass(slots=True)
class Turn:
    """One round of one batch size, as it was seen. Seconds."""

    ids: list[list[int]]
    wall: float = 0.0
    first: list[float] = field(default_factory=list)
    """By stream: from its submission to its first token."""
    per_token: list[float] = field(default_factory=list)


def run_turn(engine: Engine, prompts: Sequence[tuple[int, ...]], tokens: int) -> Turn:
    """Raises `ModelError` when the engine computes no token for a stream, or too few."""
    turn = Turn([[] for _ in prompts])
    first, last = [0.0] * len(prompts), [0.0] * len(prompts)
    submitted = []
    began = time.perf_counter()
    try:
        for n, prompt in enumerate(prompts):
            # Without guessing: a model that is asked nonsense repeats itself, and guesses would be right as nowhere else.
            greedy = SamplingParams(temperature=0.0)
            engine.submit(EngineSequence(n, prompt, greedy, tokens, eos_ids=frozenset(), speculate=False))
            submitted.append(time.perf_counter())
        running = len(prompts)
        while running:
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise ModelError("the model computed no usable logits")
                n = int(output.id)  # type: ignore[call-overload]
                turn.ids[n].append(output.token_id)
                first[n] = first[n] or now
                last[n] = now
                running -= output.finish_reason is not None
    except BaseException:
        for n in range(len(prompts)):
            engine.abort(n)
        raise
    turn.wall = time.perf_counter() - began
    if any(len(ids) != tokens for ids in turn.ids):
        raise ModelError(f"the engine gave {[len(ids) for ids in turn.ids]} tokens per stream, not {tokens}")
    turn.first = [at - since for at, since in zip(first, submitted, strict=True)]
    turn.per_token = [(end - at) / (tokens - 1) for at, end in zip(first, last, strict=True)]
    return turn


class ModelRunner:
    """All turns of all batch sizes; `step` runs one of them."""

    def __init__(self, engine: Engine, plan: Plan, nonce: bytes) -> None:
        self._engine = engine
        self._plan = plan
        self._nonce = nonce
        self._turns: dict[int, list[Turn]] = {batch: [] for batch in plan.batches}

    def warm_up(self) -> list[Skipped]:
        """One turn of every batch size: memory is allocated, kernels are chosen. What the engine has no memory for is left out,
        and said. Raises `ModelError` when it cannot take one stream."""
        skipped = []
        for batch in self._plan.batches:
            try:
                run_turn(self._engine, self._prompts(batch, WARM_UP), self._plan.output_tokens)
            except EngineError as error:
                if batch == min(self._plan.batches):
                    raise ModelError(
                        f"the engine cannot take one stream: {error}", hint="raise engine.kv_bytes"
                    ) from None
                del self._turns[batch]
                skipped.append(Skipped(f"batch_{batch}", f"the engine cannot take so many streams: {error}"[:250]))
        return skipped

    @property
    def batches(self) -> tuple[int, ...]:
        """Those that are measured."""
        return tuple(self._turns)

    def step(self, batch: int) -> None:
        turns = self._turns[batch]
        turns.append(run_turn(self._engine, self._prompts(batch, len(turns)), self._plan.output_tokens))

    def runs(self) -> tuple[ModelRun, ...]:
        return tuple(_run(batch, turns, self._plan.output_tokens) for batch, turns in self._turns.items())

    @property
    def vocab_size(self) -> int:
        return int(self._engine.vocab_size)

    def _prompts(self, batch: int, turn: int) -> list[tuple[int, ...]]:
        plan = self._plan
        return [
            prompt_ids(self._nonce, batch, turn, stream, plan.prompt_tokens, self.vocab_size) for stream in range(batch)
        ]


def answers_again(engine: Engine, document: BenchmarkDocument) -> bool:
    """Whether this engine, on the model and in the format that the document names, gives the hash of its smallest batch. Equal on
    like machines; in float32 nearly everywhere. Raises `ModelError`."""
    bench = document.model
    if bench is None:
        raise ModelError("this benchmark ran no model")
    claimed = min(bench.runs, key=lambda run: run.batch)
    if bench.vocab_size != engine.vocab_size:
        raise ModelError(f"this model has {engine.vocab_size} tokens, the one that was run {bench.vocab_size}")
    turns = claimed.tokens_per_second.samples
    size = turns * claimed.batch * (bench.prompt_tokens + bench.output_tokens)
    if size > AGAIN_MAX:
        raise ModelError(f"this benchmark claims {size} tokens for its smallest batch: that is not run again")
    plan = Plan((claimed.batch,), turns, bench.prompt_tokens, bench.output_tokens)
    runner = ModelRunner(engine, plan, document.nonce)
    for _ in range(turns):
        runner.step(claimed.batch)
    return runner.runs()[0].output_hash == claimed.output_hash


def _run(batch: int, turns: Sequence[Turn], tokens: int) -> ModelRun:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return ModelRun(
        batch=batch,
        tokens_per_second=figure("tokens_per_second", "tokens/s", [batch * tokens / turn.wall for turn in turns]),
        ttft_ms=figure("ttft_ms", "ms", [1000 * mean(turn.first) for turn in turns]),
        tpot_ms=figure("tpot_ms", "ms", [1000 * mean(turn.per_token) for turn in turns]),
        output_hash=output_hash([turn.ids for turn in turns]),
    )
