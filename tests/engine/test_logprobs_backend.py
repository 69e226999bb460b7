"""Log probabilities from the engine to the client: the model's own, the same alone, in company, resumed, and over a death."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Hashable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("torch")

import torch

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.ports import Prompt, offered_logprobs
from node.runtime import wire
from node.runtime.backend import EngineSettings, TorchBackend, load_engine, open_backend
from node.runtime.engine.sampler import Draw, _likeliest, pick_rows
from node.runtime.engine.sequence import FinishReason, StepOutput
from node.runtime.engine.sequence import Sequence as EngineSequence
from node.runtime.host import MAX_DEATHS, EngineHost
from node.runtime.launch import ThreadLauncher
from node.testing.market import Market, run_market
from node.testing.tiny_model import NAME, add_tiny
from protocol.logprobs import LOGPROBS_LIMIT, TokenLogprobs, check, unpack
from protocol.messages import ChatMessage, Params, ResponseFormat
from protocol.sampling import SamplingParams

PROMPT = tuple((11 * n + 5) % 400 + 3 for n in range(37))
NEVER = ((2, -100.0),)
SAMPLED = Params(
    max_tokens=30, temperature=1.2, top_p=0.9, top_k=40, repetition_penalty=1.3, logit_bias=NEVER, seed=5, logprobs=5
)
GREEDY = Params(max_tokens=30, logit_bias=NEVER, logprobs=LOGPROBS_LIMIT)
ALONE = Params(max_tokens=30, logit_bias=NEVER, logprobs=0)


@dataclass
class Stored:
    store: ModelStore
    manifest: Manifest

    @property
    def folder(self) -> Path:
        return self.store.path(self.manifest.id)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    root = tmp_path_factory.mktemp("logprobs")
    (root / "source").mkdir()
    store = ModelStore(root / "store")
    return Stored(store, add_tiny(store, root / "source"))


def on_backend(stored: Stored, test: Callable[[TorchBackend], Any], **settings: Any) -> None:
    async def main() -> None:
        with trio.fail_after(120):
            values = EngineSettings(**{"isolation": "thread", "max_streams": 8, **settings})
            async with open_backend(stored.store, [stored.manifest], values) as backend:
                await test(backend)

    trio.run(main)


async def told(backend: Any, stored: Stored, params: Params, resume: Sequence[int] = ()) -> list[TokenLogprobs]:
    """All rows of a stream, each step's held to its tokens as a client does."""
    found: list[TokenLogprobs] = []
    async with aclosing(backend.generate(Prompt(stored.manifest.id, PROMPT), params, tuple(resume))) as steps:
        async for step in steps:
            check(step.token_ids, step.data, params.likeliest)
            found += unpack(step.token_ids, step.data)
    return found


def alike(found: Sequence[TokenLogprobs], wanted: Sequence[TokenLogprobs]) -> None:
    """The same tokens in the same order, with figures that differ by what the cut of a prompt changes in float32."""
    assert [row.token_id for row in found] == [row.token_id for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [one.logprob, *(x for _, x in one.top)] == pytest.approx(
            [other.logprob, *(x for _, x in other.top)], abs=1e-4
        )


def of_the_model(stored: Stored, answer: Sequence[int]) -> torch.Tensor:
    """Log probabilities over the whole vocabulary where each token of the answer stands, by one prefill."""
    engine = load_engine(stored.folder, EngineSettings(device="cpu"))
    logits = engine.prefill_logits([*PROMPT, *answer[:-1]], start=len(PROMPT) - 1)
    return logits.double().log_softmax(-1)


# -------------------------------------------------------------------------------------------------------- the sampler


def test_equal_tokens_are_ranked_by_id_also_at_the_edge_and_in_any_company() -> None:
    """bfloat16 makes many of them; topk alone would take any."""
    logits = torch.zeros(3, 5000, dtype=torch.bfloat16)
    logits[:, 4000] = 2.0
    logits[1, 77] = 1.0
    greedy = SamplingParams(temperature=0)
    draws = [Draw(greedy, [0], [], logprobs=count) for count in (3, 5, 20)]
    together = pick_rows(logits, draws)
    for row, wanted in enumerate(([4000, 0, 1], [4000, 77, 0, 1, 2], [4000, *range(19)])):
        (alone,) = pick_rows(logits[row : row + 1], draws[row : row + 1])
        assert [token for token, _ in alone.top_logprobs] == wanted
        assert (alone.logprob, alone.top_logprobs) == (together[row].logprob, together[row].top_logprobs)
        assert alone.logprob == alone.top_logprobs[0][1]
    fewer = pick_rows(torch.tensor([[1.0, -math.inf, 3.0]]), [Draw(greedy, [0], [], logprobs=20)])[0]
    assert [token for token, _ in fewer.top_logprobs] == [2, 0, 1] and fewer.top_logprobs[2][1] == -math.inf


@pytest.mark.parametrize("size", [1, 20, 63, 64, 65, 129, 1300, 5000])
def test_the_likeliest_of_any_row(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(5, size, generator=generator)
    rows[1] = rows[1].bfloat16().float()
    rows[2] = torch.randint(0, 3, (size,), generator=generator).float()
    rows[3][torch.rand(size, generator=generator) < 0.7] = -math.inf
    rows[4] = 0.0
    counts = [min(size, count) for count in (20, 19, 20, 7, 1)]
    for row, count, (ids, values) in zip(rows, counts, _likeliest(rows, counts), strict=True):
        wanted = sorted(range(size), key=lambda token, row=row: (-float(row[token]), token))[:count]  # type: ignore[misc]
        assert ids.tolist() == wanted and values.tolist() == [float(row[token]) for token in wanted]


# ------------------------------------------------------------------------------------------------------- the back end


@pytest.mark.parametrize("params", [SAMPLED, GREEDY, ALONE], ids=["sampled", "greedy", "none of the likeliest"])
def test_figures_are_those_of_the_model_before_anything_is_done_to_its_logits(stored: Stored, params: Params) -> None:
    async def test(backend: TorchBackend) -> None:
        assert "logprobs" in backend.models[stored.manifest.id].params
        rows = await told(backend, stored, params)
        answer = [row.token_id for row in rows]
        assert len(rows) == 30
        own = of_the_model(stored, answer)
        for row, figures in zip(rows, own, strict=True):
            assert math.isclose(row.logprob, float(figures[row.token_id]), rel_tol=1e-4, abs_tol=1e-4)
            count = params.likeliest or 0
            values, ids = figures.topk(LOGPROBS_LIMIT)
            assert [token for token, _ in row.top] == ids.tolist()[:count]
            assert [figure for _, figure in row.top] == pytest.approx(values.tolist()[:count], rel=1e-4, abs=1e-4)
        plain = [step async for step in backend.generate(Prompt(stored.manifest.id, PROMPT), Params(max_tokens=3))]
        assert all(step.data == b"" for step in plain)

    on_backend(stored, test)


@pytest.mark.parametrize("params", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_stream_that_goes_on_from_any_token_has_no_gap_and_no_seam(stored: Stored, params: Params) -> None:
    """What a client asks of the next worker when one has died."""

    async def test(backend: TorchBackend) -> None:
        whole = await told(backend, stored, params)
        for cut in range(1, len(whole), 4):
            rest = await told(backend, stored, params, [row.token_id for row in whole[:cut]])
            alike(rest, whole[cut:])
        many: list[list[TokenLogprobs]] = []

        async def one() -> None:
            many.append(await told(backend, stored, params))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        for rows in many:
            alike(rows, whole)

    on_backend(stored, test)


def test_an_engine_that_is_killed_leaves_no_gap(stored: Stored) -> None:
    params = Params(max_tokens=300, temperature=1.0, seed=3, logit_bias=NEVER, logprobs=5)

    async def test(backend: TorchBackend) -> None:
        whole = await told(backend, stored, params)
        found: list[TokenLogprobs] = []
        host = backend.fleet.get(stored.manifest.id).engine()
        prompt = Prompt(stored.manifest.id, PROMPT)
        async with aclosing(backend.generate(prompt, params)) as steps:
            async for step in steps:
                check(step.token_ids, step.data, 5)
                before, found = len(found), [*found, *unpack(step.token_ids, step.data)]
                if before < 40 <= len(found):
                    assert host.pid is not None
                    os.kill(host.pid, signal.SIGKILL)
        assert host.deaths == 1
        alike(found, whole)

    on_backend(stored, test, isolation="child")


def test_a_grammar_and_a_stop_string_change_no_figure(stored: Stored) -> None:
    """What a grammar forbids has the probability that the model gave it."""

    async def test(backend: TorchBackend) -> None:
        wanted = ResponseFormat("regex", "[0-9]{8,12}")
        rows = await told(backend, stored, Params(max_tokens=12, logprobs=3, response_format=wanted))
        own = of_the_model(stored, [row.token_id for row in rows])
        assert all(
            math.isclose(row.logprob, float(at[row.token_id]), rel_tol=1e-4) for row, at in zip(rows, own, strict=True)
        )
        assert any(row.token_id not in [token for token, _ in row.top] for row in rows), (
            "the model would say other things"
        )
        whole = backend.tokenizer(stored.manifest.id).decode([row.token_id for row in rows])
        cut = await told(backend, stored, Params(max_tokens=12, logprobs=3, response_format=wanted, stop=(whole[5:7],)))
        assert 0 < len(cut) < len(rows)
        alike(cut, rows[: len(cut)])

    pytest.importorskip("llguidance")
    on_backend(stored, test)


def test_a_model_with_fewer_tokens_than_may_be_asked_for_tells_none() -> None:
    assert offered_logprobs(LOGPROBS_LIMIT) == ("logprobs",) and offered_logprobs(LOGPROBS_LIMIT - 1) == ()


# ----------------------------------------------------------------------------------------------- a process that lies


class LyingEngine:
    """An engine that gives one token a stream, with figures of the test's choice."""

    vocab_size, context_length, eos_ids, room = 100, 2048, frozenset[int](), 1 << 20
    weight_bytes, cache_bytes, draft_bytes = 0, 0, (0, 0)
    starved = False

    def __init__(self, logprob: Any, top: Any) -> None:
        self._said = logprob, top
        self._waiting: list[tuple[Hashable, int]] = []

    @property
    def idle(self) -> bool:
        return not self._waiting

    def submit(self, sequence: EngineSequence) -> None:
        self._waiting.append((sequence.id, len(sequence.prompt_ids)))

    def abort(self, sequence_id: Hashable) -> bool:
        return False

    def step(self, hold: Any = ()) -> list[StepOutput]:
        (key, position), self._waiting = self._waiting[0], self._waiting[1:]
        return [StepOutput(key, 7, position, FinishReason.LENGTH, *self._said)]

    def could_fit(self, tokens: int) -> bool:
        return tokens <= 2048

    def check_integrity(self) -> None:
        pass

    def numerics_probe(self) -> bytes:
        return bytes(32)


LIES: dict[str, tuple[Any, Any, int]] = {
    "none": (None, (), 2),
    "too few": (-0.5, ((7, -0.5),), 2),
    "too many": (-0.5, ((7, -0.5), (8, -1.5), (9, -2.5)), 2),
    "NaN": (math.nan, ((7, -0.5), (8, -1.5)), 2),
    "+inf": (-0.5, ((7, math.inf), (8, -1.5)), 2),
    "above 0": (0.5, ((7, 0.5), (8, -1.5)), 2),
    "out of order": (-1.5, ((8, -1.5), (7, -0.5)), 2),
    "outside the vocabulary": (-0.5, ((7, -0.5), (100, -1.5)), 2),
    "a negative token": (-0.5, ((7, -0.5), (-1, -1.5)), 2),
    "nobody asked": (-0.5, ((7, -0.5), (8, -1.5)), 0),
}


@pytest.mark.parametrize("name", LIES)
def test_an_engine_process_that_lies_is_killed(name: str) -> None:
    """C16, M7."""
    logprob, top, asked = LIES[name]
    load = wire.Load("/nowhere", "cpu", "float32", 1, 1 << 20, 8, 0)
    sequence = EngineSequence("s", (1,), SamplingParams(temperature=0), 4, logprobs=asked)

    async def main() -> None:
        host = EngineHost(ThreadLauncher(lambda load, tell: LyingEngine(logprob, top)), load)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                with pytest.raises(ModelError, match="log probabilities of token 7"):
                    async for _ in host.generate(sequence):
                        pass
                assert host.deaths == MAX_DEATHS
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_true_one_is_believed() -> None:
    """What the lies above differ from, and a step of the largest size fits into one message."""
    output = wire.Output(2**62, 2**31 - 1, 2**40, "length", -0.5, tuple((2**31 - 1, -1.0 - n) for n in range(20)))
    step = wire.Stepped((output,) * wire.MAX_OUTPUTS, 1, 1, 1.0, wire.Stats())
    assert wire.TO_NODE.frame(step)


# ---------------------------------------------------------------------------------------------------------- the market


def test_bought_on_a_market_from_a_real_engine(stored: Stored) -> None:
    """An engine in a process of its own, a client that pays, several answers at a time: what is told is the model's."""

    async def test(market: Market) -> None:
        async with open_backend(stored.store, [stored.manifest], EngineSettings(max_streams=4)) as backend:
            worker = await market.worker(backend)  # type: ignore[arg-type]
            client = await market.client()
            question: Any = {"role": "user", "content": "What is counted?"}
            asked: dict[str, Any] = {
                "max_tokens": 16,
                "temperature": 1.0,
                "seed": 9,
                "logit_bias": NEVER,
                "logprobs": 4,
            }
            answers = client.answers(NAME, [question], 3, **asked)
            rows: dict[int, list[TokenLogprobs]] = {0: [], 1: [], 2: []}
            async with answers:
                async for answer, chunk in answers:
                    rows[answer.index] += chunk.logprobs
            assert answers.errors == [] and len({tuple(row.token_id for row in one) for one in rows.values()}) == 3
            (host,) = [one.engine() for one in backend.fleet.residents.values()]
            assert host.deaths == 0, host.last_death
            (stats,) = [one.metrics.stats() for one in backend.fleet.residents.values() if one.metrics]
            assert stats is not None and stats.prefix_hits > 0, "the prompt was computed once"
            prompt = backend.prepare(stored.manifest.id, [ChatMessage(**question)])
            engine = load_engine(stored.folder, EngineSettings(device="cpu"))
            for told_of in rows.values():
                ids = [row.token_id for row in told_of]
                logits = engine.prefill_logits([*prompt.token_ids, *ids[:-1]], start=len(prompt.token_ids) - 1)
                for row, at in zip(told_of, logits.double().log_softmax(-1), strict=True):
                    assert math.isclose(row.logprob, float(at[row.token_id]), rel_tol=1e-3, abs_tol=1e-3)
                    assert [token for token, _ in row.top] == at.topk(4).indices.tolist()
            while worker.server.busy:
                await trio.sleep(0.01)

    run_market(test, timeout_s=120)
