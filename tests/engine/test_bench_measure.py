"""Measuring: a real tiny model on this machine's processor, figures that hang together, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")

from node.errors import ModelError  # noqa: E402
from node.runtime.backend import EngineSettings, load_engine  # noqa: E402
from node.runtime.bench import measure as measuring  # noqa: E402
from node.runtime.bench.arithmetic import ON_HOST, Size, Task, size_for, tasks  # noqa: E402
from node.runtime.bench.kept import AGE_MAX_MS, KeptBenchmarks  # noqa: E402
from node.runtime.bench.measure import Model, Nonce, disturbances, measure  # noqa: E402
from node.runtime.bench.reference import ModelRunner, Plan, answers_again, run_turn  # noqa: E402
from node.runtime.engine.sequence import FinishReason, StepOutput  # noqa: E402
from node.runtime.hal.devices import Device, Kind  # noqa: E402
from node.runtime.hal.probe import chosen  # noqa: E402
from node.runtime.hal.readings import Process, Reading, Unavailable  # noqa: E402
from protocol.benchmark import (  # noqa: E402
    BenchmarkDocument,
    SignedBenchmark,
    Skipped,
    benchmark_frame,
    judged,
    output_hash,
    prompt_ids,
)
from protocol.ids import Address, ModelId, keccak256  # noqa: E402
from protocol.keys import PrivateKey  # noqa: E402
from protocol.messages import encode  # noqa: E402
from protocol.typed_data import MARKET_DOMAIN  # noqa: E402

KEY = PrivateKey(keccak256(b"a worker that measures"))
MODEL = ModelId.of_manifest(b"tiny")
NONCE = Nonce(bytes(range(32)), "verifier")
PLAN = Plan(batches=(1, 3), turns=2, prompt_tokens=5, output_tokens=4)
SMALL = Size(matrix=64, buffer=1 << 20, seconds=0.001)


@pytest.fixture(scope="module")
def cpu() -> Device:
    return chosen("cpu").device


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "size_for", lambda device, *, quick: SMALL)
    monkeypatch.setattr(measuring.reference, "QUICK", PLAN)


def engine(tiny: Path) -> Any:
    return load_engine(tiny, EngineSettings(cache_bytes=1 << 22))


def documents(tiny: Path, cpu: Device, **given: Any) -> BenchmarkDocument:
    model = Model(MODEL, "tiny", "float32", lambda: engine(tiny))
    return measure(cpu, NONCE, model, threads=1, quick=True, **given)


@pytest.mark.usefixtures("small")
def test_the_whole_benchmark_of_a_tiny_model(tiny: Path, cpu: Device) -> None:
    told: list[tuple[str, int, int]] = []
    document = documents(tiny, cpu, tell=lambda *step: told.append(step))
    names = {one.name for one in document.figures}
    assert {"matmul_float32", "matmul_bfloat16", "memory_copy", "memory_read"} <= names
    assert all(one.value > 0 and one.samples == 3 for one in document.figures)
    assert {one.name: one.why for one in document.skipped}["to_device_pinned"] == ON_HOST
    assert [done for _, done, _ in told] == list(range(told[-1][2])), "every step is told, and none besides"
    assert document.device.uuid == cpu.uuid and document.software.torch == str(torch.__version__)
    assert document.started < document.finished and document.stable == (not document.reasons)

    bench = document.model
    assert bench is not None and [one.batch for one in bench.runs] == [1, 3] and bench.vocab_size == 97
    for run in bench.runs:
        # What one stream takes: first token, then the others; streams share the wall clock.
        lone = (run.ttft_ms.low + run.tpot_ms.low * (PLAN.output_tokens - 1)) / 1000
        assert run.tokens_per_second.high <= run.batch * PLAN.output_tokens / lone * 1.0001

    again = ModelRunner(engine(tiny), PLAN, NONCE.value)
    for _ in range(PLAN.turns):
        for batch in PLAN.batches:
            again.step(batch)
    assert [one.output_hash for one in again.runs()] == [one.output_hash for one in bench.runs], (
        "anybody can run it again"
    )
    other = ModelRunner(engine(tiny), replace(PLAN, turns=1, batches=(1,)), bytes(32))
    other.step(1)
    assert other.runs()[0].output_hash != bench.runs[0].output_hash


def test_the_output_hash_is_of_what_the_model_says_to_the_nonces_prompts(tiny: Path) -> None:
    """By the engine's other way to the same tokens: whole prefills, one after the other, and the largest logit."""
    runner = ModelRunner(engine(tiny), replace(PLAN, turns=1, batches=(2,)), NONCE.value)
    runner.step(2)
    judge, streams = engine(tiny), []
    for stream in range(2):
        ids = list(prompt_ids(NONCE.value, 2, 0, stream, PLAN.prompt_tokens, 97))
        for _ in range(PLAN.output_tokens):
            ids.append(int(judge.prefill_logits(ids, len(ids) - 1)[0].argmax()))
        streams.append(ids[PLAN.prompt_tokens :])
    assert runner.runs()[0].output_hash == output_hash([streams])


@pytest.mark.usefixtures("small")
def test_whoever_has_the_model_can_run_it_again(tiny: Path, make_model: Callable[..., Path], cpu: Device) -> None:
    document = documents(tiny, cpu)
    assert answers_again(engine(tiny), document)
    assert not answers_again(engine(tiny), msgspec.structs.replace(document, nonce=bytes(32)))
    assert not answers_again(engine(make_model(num_hidden_layers=2)), document), "a smaller model is seen"
    with pytest.raises(ModelError, match="has 50 tokens, the one that was run 97"):
        answers_again(engine(make_model(vocab_size=50)), document)
    model = document.model
    assert model is not None
    with pytest.raises(ModelError, match="that is not run again"):
        endless = msgspec.structs.replace(model, output_tokens=2**20)
        answers_again(engine(tiny), msgspec.structs.replace(document, model=endless))
    with pytest.raises(ModelError, match="no model"):
        answers_again(engine(tiny), msgspec.structs.replace(document, model=None))


def test_streams_that_do_not_fit_are_left_out_and_said(tiny: Path) -> None:
    plan = Plan(batches=(1, 64), turns=1, prompt_tokens=40, output_tokens=4)
    narrow = load_engine(tiny, EngineSettings(cache_bytes=1 << 18))
    runner = ModelRunner(narrow, plan, NONCE.value)
    (skipped,) = runner.warm_up()
    assert skipped.name == "batch_64" and "so many streams" in skipped.why and runner.batches == (1,)
    runner.step(1)
    assert [one.batch for one in runner.runs()] == [1], "what was submitted is gone again"
    with pytest.raises(ModelError, match="cannot take one stream"):
        ModelRunner(narrow, replace(plan, prompt_tokens=400), NONCE.value).warm_up()


class Failing:
    """An engine that says what it is told to."""

    vocab_size = 10

    def __init__(self, outputs: list[list[StepOutput]]) -> None:
        self.outputs, self.aborted = outputs, []

    def submit(self, sequence: Any) -> None: ...

    def step(self) -> list[StepOutput]:
        return self.outputs.pop(0)

    def abort(self, sequence_id: Any) -> None:
        self.aborted.append(sequence_id)


@pytest.mark.parametrize(
    ("outputs", "words", "aborted"),
    [
        ([[StepOutput(0, -1, 1, FinishReason.ERROR)]], "no usable logits", [0, 1]),
        ([[StepOutput(0, 1, 1, FinishReason.STOP), StepOutput(1, 1, 1, FinishReason.STOP)]], r"\[1, 1\] tokens", []),
    ],
)
def test_an_engine_that_computes_nothing_is_no_benchmark(
    outputs: list[list[StepOutput]], words: str, aborted: list[int]
) -> None:
    broken = Failing(outputs)
    with pytest.raises(ModelError, match=words):
        run_turn(broken, [(1,), (2,)], 4)
    assert broken.aborted == aborted


def test_times_are_counted_from_each_streams_own_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 10.0, 12.0, 13.0])  # began, submitted twice, two steps, the end
    monkeypatch.setattr("node.runtime.bench.reference.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    first = [StepOutput(0, 1, 1), StepOutput(1, 1, 1)]
    last = [StepOutput(0, 1, 2, FinishReason.LENGTH), StepOutput(1, 1, 2, FinishReason.LENGTH)]
    turn = run_turn(Failing([first, last]), [(1,), (2,)], 2)
    assert (turn.first, turn.per_token, turn.wall) == ([9.0, 8.0], [2.0, 2.0], 13.0)


def test_a_format_that_would_only_be_emulated_is_skipped(cpu: Device) -> None:
    found = list(tasks(replace(cpu, flags=()), SMALL, 1))
    assert [one.name for one in found if isinstance(one, Skipped) and "fp16 arithmetic" in one.why] == [
        "matmul_float16"
    ]
    assert any(one.name == "matmul_int8" for one in found)
    assert size_for(cpu, quick=True).matrix == size_for(cpu, quick=False).matrix // 2


def test_a_round_is_as_long_as_was_asked() -> None:
    clock, calls = [0.0], []

    def work() -> None:
        clock[0] += 0.25
        calls.append(1)

    task = Task("x", "B/s", 10.0, work, 1.0, lambda: None)
    import node.runtime.bench.arithmetic as module

    real, module.time = module.time, SimpleNamespace(perf_counter=lambda: clock[0])
    try:
        assert task.round() == 40.0 and len(calls) == 1 + 1 + 4, "warm-up, calibration, then four calls"
        assert task.round() == 40.0 and len(calls) == 10
    finally:
        module.time = real


GPU = Device(Kind.CUDA, 0, "Simulated GPU", "GPU-1", 80, 79)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (Unavailable("no NVML"), Unavailable("no NVML"), ()),
        (Reading(processes=(Process(1, None),), utilisation=0.0), Reading(throttle=("software power cap",)), ()),
        (
            Reading(processes=(Process(1, None), Process(2, 5)), utilisation=0.5),
            Reading(throttle=("hardware thermal slowdown",), ecc_uncorrected=2),
            (
                "1 other programs compute on the device",
                "the device was busy before: 50%",
                "its clock was held down: hardware thermal slowdown",
                "2 memory errors that were not corrected",
            ),
        ),
        (Reading(utilisation=1.0), Unavailable("a processor"), ()),
    ],
)
def test_what_the_sensors_say_against_the_figures(before: Any, after: Any, found: tuple[str, ...]) -> None:
    assert disturbances(before, after) == found


# --------------------------------------------------------------------------------------------------------------- kept


@pytest.fixture
def sign(tiny: Path, cpu: Device, small: None) -> Iterator[Callable[..., bytes]]:
    measured = documents(tiny, cpu)

    def steady(document: BenchmarkDocument, **changes: Any) -> BenchmarkDocument:
        """The same figures, each from rounds that agreed, on a machine that was quiet."""
        flat = lambda one: msgspec.structs.replace(one, low=one.value, high=one.value)  # noqa: E731
        model = document.model
        assert model is not None
        runs = tuple(
            msgspec.structs.replace(
                run,
                tokens_per_second=flat(run.tokens_per_second),
                ttft_ms=flat(run.ttft_ms),
                tpot_ms=flat(run.tpot_ms),
            )
            for run in model.runs
        )
        quiet = {
            "figures": tuple(flat(one) for one in document.figures),
            "model": msgspec.structs.replace(model, runs=runs),
            "other_load": 0.0,
            "quick": False,
        }
        return judged(msgspec.structs.replace(document, **{**quiet, **changes}))

    def make(key: PrivateKey = KEY, **changes: Any) -> bytes:
        raw, frame = benchmark_frame(steady(measured, peer_id=str(key.peer_id), **changes), key.peer_id)
        return encode(SignedBenchmark(raw, key.sign(frame.digest(MARKET_DOMAIN))))

    yield make


def test_the_newest_stable_one_is_what_offers_claim(cpu: Device, sign: Callable[..., bytes], tmp_path: Path) -> None:
    kept, model = KeptBenchmarks(tmp_path / "kept"), MODEL
    now = 2_000_000_000_000
    ask = {"worker": KEY.address, "torch": str(torch.__version__), "now_ms": now}
    assert kept.claim(model, "float32", cpu.uuid, **ask) is None
    kept.save(sign(finished=now - 5000))
    found = kept.claim(model, "float32", cpu.uuid, **ask)
    assert found is not None and found.tokens_per_second > 0 and found.ttft_ms > 0
    kept.save(sign(finished=now - 4000, other_load=0.9))
    assert kept.claim(model, "float32", cpu.uuid, **ask) == found, "a newer one that is not stable does not count"
    assert kept.claim(model, "bfloat16", cpu.uuid, **ask) is None
    assert kept.claim(model, "float32", "CPU-other", **ask) is None
    assert kept.claim(model, "float32", cpu.uuid, **{**ask, "torch": "2.12"}) is None
    assert kept.claim(model, "float32", cpu.uuid, **{**ask, "worker": Address(b"x" * 20)}) is None
    assert kept.claim(model, "float32", cpu.uuid, **{**ask, "now_ms": now + AGE_MAX_MS}) is None


def test_a_damaged_file_is_left_alone_and_the_folder_stays_small(
    sign: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.runtime.bench.kept.KEPT", 3)
    kept = KeptBenchmarks(tmp_path)
    paths = [kept.save(sign(finished=2_000_000_000_000 + n)) for n in range(5)]
    assert [path.exists() for path in paths] == [False, False, True, True, True]
    paths[-1].write_bytes(b"\x00" * 50)
    assert [path for path, _ in kept.all()] == [paths[3], paths[2]]
