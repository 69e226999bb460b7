"""The line between node and engine, and what the back end makes of the engine's steps. No model and no process needed."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Container, Hashable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed: the engine's types need it")

from node.errors import ModelError
from node.models.manifest import FileEntry, Manifest
from node.ports import Prompt, Step
from node.runtime import wire
from node.runtime.backend import TorchBackend
from node.runtime.child import Tell
from node.runtime.engine.errors import InvalidSequence
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput
from node.runtime.engine_settings import EngineSettings
from node.runtime.fleet import Fleet
from node.runtime.host import EngineHost
from node.runtime.launch import ThreadLauncher
from node.runtime.life import Phase
from node.runtime.resident import Resident
from node.runtime.stops import StopStrings
from node.telemetry.engine import ITL, EngineMetrics
from node.telemetry.exposition import Histogram
from protocol.ids import ModelId
from protocol.messages import FinishReason as Finish
from protocol.messages import Params
from protocol.sampling import SamplingParams


class EngineNumbers:
    """What an engine counts, as far as this test's does."""

    step_tokens = 1


class CountingEngine:
    """An engine whose n-th token of a stream is n. Counts what it was made to do."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.running: dict[Hashable, list[int]] = {}
        self.limits: dict[Hashable, int] = {}
        self.prompts: dict[Hashable, int] = {}
        self.logprobs: dict[Hashable, int] = {}
        self.stepped = 0
        self.aborted: list[Hashable] = []
        self.taken: list[Sequence] = []
        self.fail_at = fail_at

    @property
    def idle(self) -> bool:
        return not self.running

    def submit(self, sequence: Sequence) -> None:
        if not sequence.prompt_ids:
            raise InvalidSequence("the prompt is empty")
        self.taken.append(sequence)
        self.running[sequence.id] = list(sequence.generated_ids)
        self.limits[sequence.id] = sequence.max_tokens
        self.prompts[sequence.id] = len(sequence.prompt_ids)
        self.logprobs[sequence.id] = sequence.logprobs

    def abort(self, sequence_id: Hashable) -> bool:
        known = self.running.pop(sequence_id, None) is not None
        if known:
            self.aborted.append(sequence_id)
        return known

    def step(self, hold: Container[Hashable] = ()) -> list[StepOutput]:
        outputs = []
        for key, tokens in list(self.running.items()):
            if key in hold:
                continue
            self.stepped += 1
            if self.fail_at is not None and self.stepped > self.fail_at:
                raise RuntimeError("the device has gone")
            tokens.append(len(tokens))
            last = len(tokens) == self.limits[key]
            position = self.prompts[key] + len(tokens) - 1
            top = tuple((tokens[-1] + rank, -1.0 - rank) for rank in range(self.logprobs[key]))
            reason = FinishReason.LENGTH if last else None
            outputs.append(StepOutput(key, tokens[-1], position, reason, top[0][1] if top else None, top))
            if last:
                del self.running[key]
        return outputs

    def check_integrity(self) -> None:
        pass

    room = 1 << 20
    starved = False

    def could_fit(self, tokens: int) -> bool:
        return tokens <= 2048

    vocab_size, context_length, eos_ids = 4096, 2048, frozenset[int]()
    weight_bytes, cache_bytes, draft_bytes = 3000, 1 << 20, (0, 0)

    def numerics_probe(self) -> bytes:
        return bytes(32)


def sequence(name: str, max_tokens: int, prompt: tuple[int, ...] = (1,)) -> Sequence:
    return Sequence(name, prompt, SamplingParams(temperature=0), max_tokens)


LOAD = wire.Load("/nowhere", "cpu", "float32", 1, 1 << 20, 8, 0)


def run(engine: CountingEngine, work: Callable[[EngineHost], Any], **options: Any) -> None:
    async def main() -> None:
        host = EngineHost(ThreadLauncher(lambda load, tell: engine), LOAD, **options)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                await work(host)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_engine_gets_the_sequence_as_it_was_asked_for() -> None:
    engine = CountingEngine()
    asked = Sequence(
        "s",
        (3, 1, 4),
        SamplingParams(temperature=0.5, seed=7, logit_bias=((5, -1.5),)),
        6,
        generated_ids=(0, 1),
        eos_ids=frozenset({9, 11}),
        logprobs=2,
        salt=b"a tenant",
        paid=False,
        speculate=False,
    )

    async def work(host: EngineHost) -> None:
        assert [o.token_id async for batch in host.generate(asked) for o in batch] == [2, 3, 4, 5]

    run(engine, work)
    (taken,) = engine.taken
    assert replace(taken, id="s") == asked


def test_streams_side_by_side_get_their_own_tokens_in_order() -> None:
    async def work(host: EngineHost) -> None:
        got: dict[int, list[int]] = {}

        async def read(n: int) -> None:
            got[n] = [o.token_id async for batch in host.generate(sequence(f"s{n}", 20 + n)) for o in batch]

        async with trio.open_nursery() as nursery:
            for n in range(5):
                nursery.start_soon(read, n)
        assert got == {n: list(range(20 + n)) for n in range(5)}

    run(CountingEngine(), work)


def test_an_engine_is_not_pulled_further_than_the_window_ahead_of_its_reader() -> None:
    engine = CountingEngine()

    async def work(host: EngineHost) -> None:
        async with aclosing(host.generate(sequence("slow", 1000))) as stream:
            first = await anext(stream)
            while engine.stepped < len(first) + 8:
                await trio.sleep(0.001)
            await trio.sleep(0.05)  # time in which a host without a window would run far ahead
            assert engine.stepped == len(first) + 8
            # Another stream is not held up by the one that is.
            other = [o.token_id async for batch in host.generate(sequence("other", 5)) for o in batch]
            assert other == list(range(5))
            assert engine.stepped == len(first) + 8 + 5
            await anext(stream)  # reading makes room
            while engine.stepped < len(first) + 8 + 5 + 8:
                await trio.sleep(0.001)

    run(engine, work)


def counts(host: EngineHost) -> dict[str, float]:
    """What the host has counted: every sample without its own labels."""
    found: dict[str, float] = {}
    for family, labels, value in host.metrics.samples():
        name = "/".join((family.name.removeprefix("vllm:"), *labels[2:]))
        found[name] = sum(value.counts) if isinstance(value, Histogram) else value
    return found


class Told:
    """Hears of steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, float, float]] = []

    def stepped(self, stats: Any, began: float, ended: float) -> None:
        self.steps.append((stats, began, ended))


def test_times_and_ends_of_requests_are_counted_once_each() -> None:
    engine, told = CountingEngine(), Told()
    engine.stats = EngineNumbers()  # type: ignore[attr-defined]

    async def work(host: EngineHost) -> None:
        assert len([o async for batch in host.generate(sequence("whole", 5)) for o in batch]) == 5
        async with aclosing(host.generate(sequence("left", 1000))) as stream:
            await anext(stream)
        async with aclosing(host.generate(sequence("enough", 1000))) as stream:
            await anext(stream)
            host.satisfied("enough")
        with pytest.raises(ModelError):
            await anext(host.generate(sequence("refused", 5, prompt=())))
        while not engine.idle:
            await trio.sleep(0.001)
        await trio.sleep(0.05)
        seen.update(counts(host))

    seen: dict[str, float] = {}
    run(engine, work, metrics=EngineMetrics("m", 100), observers=[told])
    ends = {name: seen[f"request_success_total/{name}"] for name in ("stop", "length", "abort", "error")}
    assert ends == {"stop": 1, "length": 1, "abort": 1, "error": 1}
    assert seen["time_to_first_token_seconds"] == seen["request_decode_time_seconds"] == 3
    assert seen["request_queue_time_seconds"] == 3 and seen["e2e_request_latency_seconds"] == 4
    assert seen["inter_token_latency_seconds"] >= 4, "the whole stream's at least"
    assert seen["iteration_tokens_total"] == len(told.steps) > 5
    assert all(isinstance(stats, wire.Stats) and began <= ended for stats, began, ended in told.steps)
    assert host_is_in_order(told)


def host_is_in_order(told: Told) -> bool:
    return all(first[2] <= second[1] for first, second in itertools.pairwise(told.steps))


def test_a_pause_that_the_reader_caused_is_no_latency() -> None:
    engine = CountingEngine()

    async def work(host: EngineHost) -> None:
        async with aclosing(host.generate(sequence("slow", 1000))) as stream:
            first = await anext(stream)
            while engine.stepped < len(first) + 8:
                await trio.sleep(0.001)
            await trio.sleep(0.6)
            while engine.stepped < len(first) + 16:
                await anext(stream)
        (between,) = (v for f, _, v in host.metrics.samples() if f is ITL)
        assert isinstance(between, Histogram) and sum(between.counts) > 8
        assert between.sum < 0.5, "the pause is in no gap"

    run(engine, work)


def test_an_engine_that_fails_is_counted_as_an_error() -> None:
    async def work(host: EngineHost) -> None:
        with pytest.raises(ModelError, match="the device has gone"):
            async for _ in host.generate(sequence("s", 100)):
                pass
        assert counts(host)["request_success_total/error"] == 1

    run(CountingEngine(fail_at=3), work)


def test_leaving_a_stream_aborts_it() -> None:
    engine = CountingEngine()

    async def work(host: EngineHost) -> None:
        async with aclosing(host.generate(sequence("left", 1000))) as stream:
            await anext(stream)
        while not engine.aborted:
            await trio.sleep(0.001)
        assert len(engine.aborted) == 1
        assert engine.idle

    run(engine, work)


def test_a_refused_sequence_and_a_failed_engine_are_model_errors() -> None:
    async def refused(host: EngineHost) -> None:
        with pytest.raises(ModelError, match="empty"):
            async for _ in host.generate(sequence("none", 3, prompt=())):
                pass

    run(CountingEngine(), refused)

    async def failed(host: EngineHost) -> None:
        with pytest.raises(
            ModelError, match="died 2 times while this sequence ran, last: RuntimeError: the device has gone"
        ):
            async for _ in host.generate(sequence("doomed", 1000)):
                pass
        assert host.deaths == 2

    run(CountingEngine(fail_at=5), failed)


def test_a_model_that_cannot_be_loaded_is_said_at_start() -> None:
    def load(_load: wire.Load, _tell: Tell) -> Any:
        raise OSError("no such file")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with pytest.raises(ModelError, match="no such file"):
                await nursery.start(EngineHost(ThreadLauncher(load), LOAD).run)

    trio.run(main)


# ------------------------------------------------------------------------------------------------------ stop strings

texts = st.text("abx", max_size=40)


@given(texts, st.lists(st.text("abx", min_size=1, max_size=5), max_size=3), st.lists(st.integers(1, 5), max_size=40))
def test_stop_strings_do_not_depend_on_how_text_arrives(text: str, stops: list[str], cuts: list[int]) -> None:
    """Shown text is everything before the earliest place where a stop string was complete."""
    machine, shown, rest = StopStrings(stops), "", text
    for cut in [*cuts, len(text) or 1]:
        shown += machine.push(rest[:cut])
        rest = rest[cut:]
    hit, shown = machine.hit, shown + machine.finish()
    assert hit == any(stop in text for stop in stops)
    if not hit:
        assert shown == text
    else:
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert len(shown) in {start for _, start in ends}


class Letters:
    """A tokenizer of one letter per token."""

    def detokenizer(self, delivered: Any = ()) -> Letters:
        return self

    def push(self, ids: Any) -> str:
        return "".join(chr(97 + i) for i in ids)

    def finish(self) -> str:
        return ""


class Batches:
    """A host that hands out given tokens in given batches."""

    def __init__(self, batches: list[list[int]], last: FinishReason) -> None:
        self.batches, self.last = batches, last

    def satisfied(self, sequence_id: Any) -> None: ...

    async def generate(
        self, sequence: Sequence, response_format: object = None
    ) -> AsyncGenerator[list[StepOutput], None]:
        for n, batch in enumerate(self.batches):
            await trio.lowlevel.checkpoint()
            end = n == len(self.batches) - 1
            yield [
                StepOutput("s", token, 0, self.last if end and i == len(batch) - 1 else None)
                for i, token in enumerate(batch)
            ]


def delivered(batches: list[list[int]], stop: tuple[str, ...]) -> tuple[list[int], str, Finish | None]:
    model = ModelId(bytes(32))
    host: Any = Batches(batches, FinishReason.LENGTH)
    letters: Any = Letters()
    one = Resident(Manifest("letters", "none", 100, "F32", "", "", (FileEntry("x", 1, "0" * 64),)), Path("/nowhere"))
    one.phase, one.host, one.tokenizer = Phase.READY, host, letters
    nothing: Any = None
    backend = TorchBackend(EngineSettings(), lambda test: Fleet(nothing, EngineSettings(), nothing, nothing, test))
    backend.fleet.residents[model] = one

    async def main() -> list[Step]:
        return [step async for step in backend.generate(Prompt(model, (1,)), Params(max_tokens=50, stop=stop))]

    steps = trio.run(main)
    ids = [token for step in steps for token in step.token_ids]
    return ids, "".join(step.text for step in steps), steps[-1].finish_reason


@given(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.lists(st.integers(1, 6), max_size=24))
def test_tokens_billed_do_not_depend_on_batches(tokens: list[int], cuts: list[int]) -> None:
    """A stop string ends the answer at the token that completes it, however many tokens one step of the host carried."""
    batches, rest = [], tokens
    for cut in [*cuts, len(tokens)]:
        if rest[:cut]:
            batches.append(rest[:cut])
        rest = rest[cut:]
    for stop in ((), ("ab",), ("aa", "ba")):
        assert delivered(batches, stop) == delivered([[token] for token in tokens], stop)
