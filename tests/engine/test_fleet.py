"""Models under one memory budget: loaded, tested (M8), sold, put out, swapped, and never under a running stream (M9)."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("torch")

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.ports import Step
from node.runtime import backend as backend_module
from node.runtime import keeper, wire
from node.runtime.backend import TorchBackend, open_backend
from node.runtime.child import LoadedEngine, Tell, load_engine
from node.runtime.engine_settings import EngineSettings
from node.runtime.fleet import Fleet
from node.runtime.footprint import measure
from node.runtime.hal import processor
from node.runtime.launch import Child, ProcessLauncher, ThreadLauncher
from node.runtime.life import Phase
from node.runtime.memory import NoRoom
from node.runtime.packing import Packing
from node.runtime.resident import Resident
from node.runtime.selftest import SelfTest
from node.runtime.supervisor import Limits
from node.testing.planted import notices
from protocol.messages import ChatMessage, FinishReason, Params

HELLO = [ChatMessage(role="user", content="hello")]
SETTINGS = EngineSettings(cache_bytes=1 << 20, max_streams=8, isolation="thread", limits=Limits(backoff_s=0.02))


@dataclass(frozen=True)
class Models:
    store: ModelStore
    manifests: tuple[Manifest, ...]

    def bytes_of(self, n: int) -> int:
        manifest = self.manifests[n]
        found = measure(self.store.path(manifest.id), manifest, Packing("float32"), SETTINGS.cache_bytes)
        return found.weights + found.cache  # in a thread there is no process beside

    def cache_of(self, n: int, spare: int) -> int:
        manifest = self.manifests[n]
        return measure(
            self.store.path(manifest.id), manifest, Packing("float32"), SETTINGS.cache_bytes, spare=spare
        ).cache


@pytest.fixture(scope="module")
def models(make_chat_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    store = ModelStore(tmp_path_factory.mktemp("store"))
    manifests = tuple(
        store.add_folder(make_chat_model(num_hidden_layers=layers), f"tiny-{layers}") for layers in (1, 2, 3)
    )
    return Models(store, manifests)


@asynccontextmanager
async def opened(models: Models, *which: int, **changes: object) -> AsyncIterator[TorchBackend]:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    said: list[str] = []
    with trio.fail_after(60):
        async with open_backend(
            models.store, [models.manifests[n] for n in which], settings, launch=ThreadLauncher(), say=said.append
        ) as backend:
            backend.said = said  # type: ignore[attr-defined]
            yield backend


def stream(backend: TorchBackend, models: Models, n: int, tokens: int = 100) -> AsyncGenerator[Step, None]:
    prompt = backend.prepare(models.manifests[n].id, HELLO)
    return backend.generate(prompt, Params(max_tokens=tokens, temperature=0, logit_bias=((257, -100.0),)))


def phases(backend: TorchBackend, models: Models) -> list[Phase | None]:
    residents = [backend.fleet.residents.get(manifest.id) for manifest in models.manifests]
    return [one.phase if one else None for one in residents]


async def text(steps: AsyncGenerator[Step, None]) -> str:
    return "".join([step.text async for step in steps])


def test_what_is_sold_has_answered_a_job(models: Models) -> None:
    async def main() -> None:
        async with opened(models, 0, 1) as backend:
            assert set(backend.models) == {models.manifests[0].id, models.manifests[1].id}
            for one in backend.report():
                assert one["phase"] == "ready"
                assert one["self_test"]["passed"] and one["self_test"]["tokens"] > 0
                assert one["isolation"].startswith("thread: none")
            assert all(speed.ttft_ms > 0 for speed in backend.speeds.values())
            assert any("self-test passed" in line for line in backend.said)  # type: ignore[attr-defined]

    trio.run(main)


def test_a_model_that_fails_its_test_is_not_sold_and_says_why(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend_module.self_test

    async def red(prepare: object, generate: object) -> SelfTest:
        found = await real(prepare, generate)  # type: ignore[arg-type]
        return replace(found, passed=False, reason="planted")

    async def main() -> None:
        async with opened(models, 0) as backend:
            monkeypatch.setattr(backend_module, "self_test", red)
            with pytest.raises(ModelError, match="planted"):
                await backend.fleet.load(models.manifests[1])
            assert set(backend.models) == {models.manifests[0].id}
            failed = backend.report()[1]
            assert failed["phase"] == "failed" and "planted" in failed["trouble"]
            while backend.fleet.residents[models.manifests[1].id].host is not None:
                await trio.sleep(0.01)
            monkeypatch.setattr(backend_module, "self_test", real)
            await backend.fleet.load(models.manifests[1])  # mended, it can be loaded again
            assert len(backend.models) == 2

    trio.run(main)


def test_the_budget_is_never_passed_and_the_longest_unused_goes(models: Models) -> None:
    budget = models.bytes_of(1) + models.bytes_of(2)

    async def main() -> None:
        async with opened(models, 0, 1, memory_budget=budget, lazy=True) as backend:
            assert phases(backend, models)[:2] == [Phase.READY, Phase.READY]
            await text(stream(backend, models, 0, 3))  # now 1 is the longest unused
            await backend.fleet.load(models.manifests[2])
            assert phases(backend, models) == [Phase.READY, Phase.COLD, Phase.READY]
            assert backend.fleet.used <= budget

    trio.run(main)


def test_one_byte_less_and_it_does_not_fit(models: Models) -> None:
    def outcome(budget: int) -> int:
        async def main() -> int:
            async with opened(models, 0, 1, memory_budget=budget) as backend:
                return len(backend.models)

        return trio.run(main)

    exact = models.bytes_of(0) + models.bytes_of(1)
    assert outcome(exact) == 2
    assert outcome(exact - 1) == 1


def test_without_a_setting_the_budget_is_what_the_device_has(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a container leaves of a machine, for instance."""
    exact = models.bytes_of(0) + models.bytes_of(1)
    for total, fit in ((exact, 2), (exact - 1, 1)):
        monkeypatch.setattr(processor, "memory", lambda total=total: (total, total))

        async def main(fit: int = fit) -> None:
            async with opened(models, 0, 1) as backend:
                assert len(backend.models) == fit

        trio.run(main)


def test_pins_and_streams_keep_a_model_in_memory(models: Models) -> None:
    budget = models.bytes_of(0) + models.bytes_of(1)

    async def main() -> None:
        async with (
            opened(models, 0, 1, memory_budget=budget, pinned=("tiny-1",)) as backend,
            aclosing(stream(backend, models, 1)) as steps,
        ):
            await anext(steps)
            with pytest.raises(ModelError, match=r"needs \d+ bytes"):
                await backend.fleet.load(models.manifests[2])
            assert phases(backend, models)[:2] == [Phase.READY, Phase.READY]
            await text(steps)

    trio.run(main)


def test_a_cold_model_that_is_sold_is_loaded_when_a_job_wants_it(models: Models) -> None:
    budget = max(models.bytes_of(n) for n in range(3))

    async def main() -> None:
        async with opened(models, 0, 1, memory_budget=budget, lazy=True) as backend:
            assert phases(backend, models)[:2] == [Phase.COLD, Phase.READY]
            assert set(backend.models) == {models.manifests[0].id, models.manifests[1].id}
            cold = backend.fleet.residents[models.manifests[0].id]
            assert backend.speeds[models.manifests[0].id].ttft_ms > cold.load_s * 1000  # its load is in the offer
            prompt = backend.prepare(models.manifests[0].id, HELLO)
            assert backend.fits(prompt, 5)
            whole = await text(stream(backend, models, 0, 5))
            assert whole
            assert phases(backend, models)[:2] == [Phase.READY, Phase.COLD]

    trio.run(main)


def test_a_job_that_leaves_a_cold_model_leaves_no_model_half_loaded(models: Models) -> None:
    """Or any client could take both off the market: the one that comes in, and the one that is put out for it."""
    budget = max(models.bytes_of(n) for n in range(3))

    async def main() -> None:
        async with opened(models, 0, 1, memory_budget=budget, lazy=True) as backend:
            cold, warm = (backend.fleet.residents[models.manifests[n].id] for n in (0, 1))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(text, stream(backend, models, 0, 5))
                while cold.phase is not Phase.LOADING or warm.phase is not Phase.DRAINING:
                    await trio.sleep(0)
                nursery.cancel_scope.cancel()
            while not cold.ready:
                await cold.changed.wait()
            assert phases(backend, models)[:2] == [Phase.READY, Phase.COLD]
            assert await text(stream(backend, models, 1, 5))

    trio.run(main)


def test_jobs_that_come_in_one_moment_share_the_cache_and_not_one_context(models: Models) -> None:
    """Before the engine has heard of the first, what it takes is counted here: in blocks, of the whole cache."""

    async def main() -> None:
        async with opened(models, 0, cache_bytes=64 * 16 * 128) as backend:  # 1,024 tokens; the context is 256
            prompt = backend.prepare(models.manifests[0].id, HELLO)
            size = len(prompt.token_ids)
            host = backend.fleet.residents[models.manifests[0].id].host
            assert host is not None and host._room == 1024
            async with trio.open_nursery() as nursery:
                for n in range(4):
                    assert not backend.fits(prompt, 257 - size), "longer than the context"
                    assert backend.fits(prompt, 242 - size), f"{n} of 4 before it"
                    nursery.start_soon(text, stream(backend, models, 0, 242 - size))
                    while len(host._streams) <= n:
                        await trio.sleep(0)
                assert not backend.fits(prompt, 18 - size), "heard of or not, all is promised"
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_jobs_that_want_more_models_than_fit_all_end_well(models: Models) -> None:
    """Three models, room for one, nine jobs at once: each waits for the others' streams and none is cut."""
    budget = max(models.bytes_of(n) for n in range(3))

    async def main() -> None:
        async with opened(models, 0, 1, 2, memory_budget=budget, lazy=True) as backend:
            ended: list[int] = []

            async def job(n: int) -> None:
                steps = [step async for step in stream(backend, models, n, 20)]
                assert steps[-1].finish_reason is FinishReason.LENGTH
                ended.append(n)

            async with trio.open_nursery() as nursery:
                for n in (0, 1, 2) * 3:
                    nursery.start_soon(job, n)
            assert sorted(ended) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
            assert backend.fleet.used <= budget

    trio.run(main)


def test_swapping_cuts_no_stream_and_leaves_no_gap(models: Models) -> None:
    async def main() -> None:
        async with opened(models, 0) as backend:
            old, new = (models.manifests[n].id for n in (0, 1))
            wanted = await text(stream(backend, models, 0))
            sold: list[set[object]] = []

            async def look() -> None:
                while True:
                    sold.append(set(backend.models))
                    await trio.sleep(0)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                async with aclosing(stream(backend, models, 0)) as steps:
                    begun = (await anext(steps)).text
                    done: list[bool] = []

                    async def swap() -> None:
                        done.append(await backend.fleet.swap(old, models.manifests[1]))

                    nursery.start_soon(swap)
                    while new not in backend.models or old in backend.models:
                        await trio.sleep(0.001)
                    assert phases(backend, models)[0] is Phase.DRAINING
                    assert not backend.fits(backend.prepare(old, HELLO), 5)  # new jobs go to the new one
                    assert await text(stream(backend, models, 1, 5))
                    assert begun + await text(steps) == wanted
                while not done:
                    await trio.sleep(0.001)
                nursery.cancel_scope.cancel()
            assert done == [True]
            assert all(sold)  # there was no moment without a model
            assert set(backend.models) == {new} and old not in backend.fleet.residents

    trio.run(main)


def test_swapping_without_room_for_both_drains_first(models: Models) -> None:
    async def main() -> None:
        async with opened(models, 0, memory_budget=models.bytes_of(1)) as backend:
            assert await backend.fleet.swap(models.manifests[0].id, models.manifests[1]) is False
            assert set(backend.models) == {models.manifests[1].id}

    trio.run(main)


def test_unloading_waits_for_streams(models: Models) -> None:
    async def main() -> None:
        async with opened(models, 0, 1) as backend:
            wanted = await text(stream(backend, models, 0))
            async with trio.open_nursery() as nursery, aclosing(stream(backend, models, 0)) as steps:
                begun = (await anext(steps)).text
                nursery.start_soon(backend.fleet.unload, models.manifests[0].id)
                await trio.sleep(0.05)
                assert set(backend.models) == {models.manifests[1].id}
                assert begun + await text(steps) == wanted
            assert set(backend.fleet.residents) == {models.manifests[1].id}

    trio.run(main)


def test_a_model_damaged_between_two_loads_is_not_read(
    models: Models, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """M1, for every load and not only the first: what has changed since it matched is hashed again."""

    async def main() -> None:
        store = ModelStore(tmp_path)
        manifest = _copy(store, models, tmp_path_factory.mktemp("source"))
        again = Models(store, (manifest,))
        async with opened(again, 0) as backend:
            await backend.fleet.unload(manifest.id)
            await backend.fleet.load(manifest)
            one = backend.fleet.residents[manifest.id]
            assert one.proven
            await backend.fleet._put_out(one)
            file = store.path(manifest.id) / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.chmod(0o644)
            file.write_bytes(data)
            with pytest.raises(ModelError, match="damaged"):
                await backend.fleet.load(manifest)

    trio.run(main)


def _copy(store: ModelStore, models: Models, folder: Path) -> Manifest:
    source = models.store.path(models.manifests[0].id)
    _copy_files(source, folder)
    return store.add_folder(folder, "copy")


def _copy_files(source: Path, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())


def test_an_engine_that_dies_is_not_noticed_by_other_models(models: Models) -> None:
    """M5. Two processes; one is killed under a stream of each."""

    async def main() -> None:
        settings = replace(SETTINGS, isolation="process")
        async with open_backend(models.store, models.manifests[:2], settings, launch=ProcessLauncher()) as backend:
            wanted = [await text(stream(backend, models, n)) for n in (0, 1)]
            killed, other = (backend.fleet.residents[models.manifests[n].id] for n in (0, 1))
            async with aclosing(stream(backend, models, 0)) as first, aclosing(stream(backend, models, 1)) as second:
                begun = [(await anext(steps)).text for steps in (first, second)]
                assert killed.host is not None and killed.host.pid is not None
                os.kill(killed.host.pid, signal.SIGKILL)
                assert begun[1] + await text(second) == wanted[1]
                assert begun[0] + await text(first) == wanted[0]
            assert killed.host.deaths == 1
            assert other.host is not None and other.host.deaths == 0
            while len(backend.models) < 2:  # tested again, sold again
                await trio.sleep(0.01)

    trio.run(main)


class Mortal:
    """Loads engines that die when they are told to, and keeps what the last one was given and has finished, in order."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.dies = False
        self.seen: list[str] = []

    def load(self, load: wire.Load, tell: Tell) -> LoadedEngine:
        engine = load_engine(load, tell)
        self.seen, self.dies = [], False
        submit, step = engine.submit, engine.step

        def submits(sequence: Any) -> None:
            self.seen.append("stream" if sequence.generated_ids else "test")
            submit(sequence)

        def steps(**hold: Any) -> list[Any]:
            if self.dies:
                raise RuntimeError("it dies")
            time.sleep(self.step_s)
            outputs = step(**hold)
            self.seen += ["end" for output in outputs if output.finish_reason is not None]
            return outputs

        engine.submit, engine.step = submits, steps  # type: ignore[method-assign]
        return engine


@pytest.mark.parametrize(
    ("step_s", "patience", "order"),
    [(0.0, 1000.0, ["test", "end", "stream"]), (0.03, 0.05, ["test", "stream", "end"])],
    ids=["the test goes first", "not for long"],
)
def test_after_a_death_the_test_goes_first(
    step_s: float, patience: float, order: list[str], models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M8. It is short, and what it waits for is a worker that sells."""
    monkeypatch.setattr(keeper, "FIRST_S", patience)
    mortal = Mortal(step_s)

    async def main() -> None:
        async with open_backend(
            models.store, models.manifests[:1], SETTINGS, launch=ThreadLauncher(mortal.load)
        ) as backend:
            wanted = await text(stream(backend, models, 0, 40))
            async with aclosing(stream(backend, models, 0, 40)) as steps:
                begun = (await anext(steps)).text
                mortal.dies = True
                assert begun + await text(steps) == wanted
            assert mortal.seen[:3] == order
            assert backend.fleet.residents[models.manifests[0].id].engine().deaths == 1

    trio.run(main)


def test_a_test_that_has_no_room_beside_the_streams_does_not_go_first(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "FIRST_S", 1000.0)
    mortal = Mortal()

    async def main() -> None:
        settings = replace(SETTINGS, cache_bytes=1 << 15)
        async with open_backend(
            models.store, models.manifests[:1], settings, launch=ThreadLauncher(mortal.load)
        ) as backend:
            one = backend.fleet.residents[models.manifests[0].id]
            assert one.capacity == one.engine()._room
            length = len(backend.prepare(one.manifest.id, HELLO).token_ids)
            async with aclosing(stream(backend, models, 0, one.capacity - length)) as steps:
                await anext(steps)
                mortal.dies = True
                for _ in range(40):  # all the room is its own, still
                    await anext(steps)
                assert mortal.seen == ["stream"]
                assert not one.ready
            while not one.ready:
                await trio.sleep(0.01)
            assert mortal.seen == ["stream", "test", "end"]

    trio.run(main)


def test_a_model_that_passes_its_next_test_is_not_ended_for_the_one_before(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that fails its test is ended once its streams have. If its engine dies before that and the next one passes, it is
    sold, and must have an engine."""
    real, mortal = backend_module.self_test, Mortal()

    async def red(prepare: object, generate: object) -> SelfTest:
        found = await real(prepare, generate)  # type: ignore[arg-type]
        return replace(found, passed=False, reason="planted")

    async def main() -> None:
        async with open_backend(
            models.store, models.manifests[:1], SETTINGS, launch=ThreadLauncher(mortal.load)
        ) as backend:
            one = backend.fleet.residents[models.manifests[0].id]
            async with aclosing(stream(backend, models, 0, 40)) as steps:
                await anext(steps)
                monkeypatch.setattr(backend_module, "self_test", red)
                mortal.dies = True
                while one.phase is not Phase.FAILED:
                    await trio.sleep(0.01)
                monkeypatch.setattr(backend_module, "self_test", real)
                mortal.dies = True
                while not one.ready:
                    await trio.sleep(0.01)
            await trio.sleep(0.1)
            assert one.ready and one.in_memory
            assert await text(stream(backend, models, 0, 4))

    trio.run(main)


class NoProcess(ThreadLauncher):
    """Starts nothing while `full`."""

    full = False

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Child]:
        if self.full:
            theirs.close()
            raise ModelError("the engine's process cannot be started: no memory")
        async with super().start(theirs, folder) as child:
            yield child


def test_an_engine_for_which_there_is_no_process_ends_no_other_model(models: Models) -> None:
    async def main() -> None:
        launch = NoProcess()
        async with open_backend(models.store, models.manifests[:2], SETTINGS, launch=launch) as backend:
            host = backend.fleet.residents[models.manifests[0].id].host
            assert host is not None and host._process.link is not None
            launch.full = True
            host._process.link._sock.shutdown(socket.SHUT_RDWR)
            while not host.failure:
                await trio.sleep(0.01)
            assert "no memory" in host.failure
            assert await text(stream(backend, models, 1, 5))
            launch.full = False
            while len(backend.models) < 2:
                await trio.sleep(0.01)

    trio.run(main)


def test_what_an_engine_counts_is_on_the_page(models: Models) -> None:
    async def main() -> None:
        async with opened(models, 0) as backend:
            async with aclosing(stream(backend, models, 0)) as steps:
                await anext(steps)
                assert ("vllm:num_requests_running", 1) in {(f.name, v) for f, _, v in backend.samples()}
            names: dict[str, object] = {}
            with trio.fail_after(5):  # the abort is counted as it comes, with no step after it
                while names.get("vllm:num_requests_running") != 0:
                    names = {family.name: value for family, _, value in backend.samples()}
                    await trio.sleep(0.01)
            assert names["vllm:kv_cache_usage_perc"] == 0
            assert isinstance(names["vllm:generation_tokens_total"], int) and names["vllm:generation_tokens_total"] > 8

    trio.run(main)


def test_a_model_that_is_put_out_under_a_stream_would_be_noticed(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M9, planted: whoever has a stream counts as idle, and its engine is ended at once."""
    monkeypatch.setattr(Resident, "idle", property(lambda self: self.phase is Phase.READY))
    assert notices(lambda: test_pins_and_streams_keep_a_model_in_memory(models))


def test_a_model_that_is_sold_untested_would_be_noticed(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """M8, planted: loaded is good enough."""
    monkeypatch.setattr(Fleet, "on_sale", lambda self, one: one.phase is not Phase.COLD)
    with pytest.MonkeyPatch.context() as inner:
        assert notices(lambda: test_a_model_that_fails_its_test_is_not_sold_and_says_why(models, inner))


# --------------------------------------------------------------------------------------------------- what it really weighs


def heavier(by: int, *names: str) -> ThreadLauncher:
    """Engines of these models hold more than anybody thought."""

    def load(load: wire.Load, tell: Tell) -> LoadedEngine:
        engine = load_engine(load, tell)
        if json.loads((Path(load.folder) / "manifest.json").read_bytes())["name"] not in names:
            return engine
        kind = type(engine)
        changed = type("Heavier", (kind,), {"weight_bytes": property(lambda self: kind.weight_bytes.fget(self) + by)})
        engine.__class__ = changed
        return engine

    return ThreadLauncher(load)


def test_what_an_engine_weighs_counts_from_then_on(models: Models) -> None:
    """Larger than its estimate: another that is idle makes room, now and at every later load."""
    budget = models.bytes_of(0) + models.bytes_of(1)

    async def main() -> None:
        settings = replace(SETTINGS, memory_budget=budget, lazy=True)
        launch = heavier(1, "tiny-2")
        async with open_backend(models.store, models.manifests[:1], settings, launch=launch) as backend:
            one = await backend.fleet.load(models.manifests[1])
            assert one.footprint.total == models.bytes_of(1) + 1 == backend.fleet.used
            assert phases(backend, models)[:2] == [Phase.COLD, Phase.READY]
            assert await text(stream(backend, models, 0, 3))
            assert backend.fleet.used == models.bytes_of(0)
            assert not backend.fleet.could_warm(replace_pin(backend, models, 0))
            assert one.report()["weighed"] and one.report()["memory_bytes"] == models.bytes_of(1) + 1

    trio.run(main)


def replace_pin(backend: TorchBackend, models: Models, n: int) -> Resident:
    """Pin a model, and ask about the other."""
    backend.fleet.residents[models.manifests[n].id].pinned = True
    return backend.fleet.residents[models.manifests[1].id]


def test_what_turns_out_too_large_goes_again_and_says_why(models: Models) -> None:
    budget = models.bytes_of(0) + models.bytes_of(1)

    async def main() -> None:
        settings = replace(SETTINGS, memory_budget=budget, pinned=("tiny-1",))
        started: list[str] = []
        launch = heavier(1, "tiny-2")
        real = launch.start

        def start(theirs: socket.socket, folder: str) -> Any:
            started.append(folder)
            return real(theirs, folder)

        launch.start = start  # type: ignore[method-assign]
        async with open_backend(models.store, models.manifests[:1], settings, launch=launch) as backend:
            for _ in range(2):  # it has weighed it once; then it need not be loaded to know
                with pytest.raises(NoRoom, match=rf"tiny-2 needs {models.bytes_of(1) + 1} bytes .* are free"):
                    await backend.fleet.load(models.manifests[1])
                assert phases(backend, models)[:2] == [Phase.READY, Phase.COLD]
                assert backend.fleet.used == models.bytes_of(0)
                assert set(backend.models) == {models.manifests[0].id}
            assert len(started) == 2
            assert await text(stream(backend, models, 0, 3))

    trio.run(main)


def test_an_engine_that_claims_more_than_its_process_may_have_puts_nobody_out(models: Models) -> None:
    """The process is not trusted: what it says must not cost other models their place."""

    async def main() -> None:
        settings = replace(SETTINGS, memory_budget=1 << 40)
        launch = heavier(1 << 39, "tiny-2")
        async with open_backend(models.store, models.manifests[:1], settings, launch=launch) as backend:
            with pytest.raises(ModelError, match="more than its process may have"):
                await backend.fleet.load(models.manifests[1])
            assert phases(backend, models)[:2] == [Phase.READY, Phase.COLD]
            assert backend.fleet.used == models.bytes_of(0)

    trio.run(main)


# -------------------------------------------------------------------------------------------------------- draft models


@pytest.fixture(scope="module")
def pair(
    make_model: Callable[..., Path], make_chat_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Models:
    """A model, the same again under another name as its draft, and one of another vocabulary."""
    store = ModelStore(tmp_path_factory.mktemp("pair"))
    stranger = make_model(vocab_size=640)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stranger / name).write_bytes((make_chat_model() / name).read_bytes())
    return Models(
        store,
        (
            store.add_folder(make_chat_model(), "large"),
            store.add_folder(make_chat_model(), "small"),
            store.add_folder(stranger, "stranger"),
        ),
    )


def test_with_a_draft_model_the_tokens_are_the_same_and_it_is_used(pair: Models) -> None:
    async def answers(**changes: object) -> tuple[list[list[int]], int, int]:
        async with opened(pair, 0, **changes) as backend:
            one = backend.fleet.residents[pair.manifests[0].id]
            found = []
            for n, temperature in enumerate((0.0, 1.0)):
                prompt = backend.prepare(pair.manifests[0].id, HELLO)
                params = Params(max_tokens=60, temperature=temperature, seed=n, logit_bias=((257, -100.0),))
                found.append([token async for step in backend.generate(prompt, params) for token in step.token_ids])
            assert one.metrics is not None
            stats = one.metrics.stats()
            assert stats is not None
            return found, stats.accepted_tokens, one.footprint.total

    async def main() -> None:
        plain, luck, alone = await answers()
        guessed, accepted, both = await answers(drafts=("large=small",), draft_cache_bytes=SETTINGS.cache_bytes)
        assert guessed == plain
        assert accepted > luck + 40, "greedy guesses of a model for itself are right"
        weights = alone - pair.cache_of(0, spare=1)
        assert both == 2 * weights + pair.cache_of(0, spare=1) + pair.cache_of(0, spare=0), (
            "its weights and its cache are counted"
        )

    trio.run(main)


@pytest.mark.parametrize(
    ("draft", "why"),
    [
        ("stranger", r"stranger cannot guess for large: it has 640 tokens, not \d+"),
        ("large", "cannot guess for itself"),
        ("nobody", "nobody"),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused_before_anything_is_loaded(
    pair: Models, draft: str, why: str
) -> None:
    async def main() -> None:
        with pytest.raises(ModelError, match=why):
            async with opened(pair, 0, drafts=(f"large={draft}",)):
                pass

    trio.run(main)


def test_a_draft_model_with_another_vocabulary_of_the_same_size_is_refused(
    pair: Models, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, source = ModelStore(tmp_path_factory.mktemp("store")), pair.store.path(pair.manifests[0].id)
    manifests = []
    for name, swap in (("large", False), ("small", True)):
        folder = tmp_path_factory.mktemp(name)
        _copy_files(source, folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
        if swap:
            vocabulary = tokenizer["model"]["vocab"]
            one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        manifests.append(store.add_folder(folder, name))

    async def main() -> None:
        with pytest.raises(ModelError, match="small cannot guess for large: its tokenizer has another vocabulary"):
            async with opened(Models(store, tuple(manifests)), 0, drafts=("large=small",)):
                pass

    trio.run(main)
