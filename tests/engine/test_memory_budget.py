"""One budget for chats and other tasks (M9): who is put out for whom, and what each process may have."""

from __future__ import annotations

import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

pytest.importorskip("torch")

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.ports import Step
from node.runtime.backend import TorchBackend, open_backend
from node.runtime.fleet import EngineSettings
from node.runtime.footprint import measure
from node.runtime.launch import TASKS, ProcessLauncher, ThreadLauncher
from node.runtime.life import Phase
from node.runtime.memory import MemoryBudget, NoRoom
from node.runtime.packing import Packing
from node.runtime.tasks.backend import TaskModels, open_tasks
from node.runtime.tasks.loading import TaskSettings, load_runner
from node.runtime.tasks.needs import needs, weighed
from node.testing.tiny_model import add_tiny, add_tiny_encoder
from protocol.messages import ChatMessage, Params
from protocol.tasks import EmbedRequest

CACHE = 64 << 20
HELLO = [ChatMessage(role="user", content="hello")]
TEXTS = EmbedRequest(("A man is eating food.", "The girl is carrying a baby."))


@dataclass(frozen=True)
class Models:
    store: ModelStore
    chat: Manifest
    vectors: Manifest

    @property
    def chat_bytes(self) -> int:
        """Of the chat model, in a thread."""
        found = measure(self.store.path(self.chat.id), self.chat, Packing("float32"), CACHE)
        return found.weights + found.cache

    @property
    def vector_bytes(self) -> int:
        """What the encoder says once it is loaded, in a thread."""
        runner, _ = load_runner(self.store.path(self.vectors.id), TaskSettings())
        return sum(weighed(runner.memory, TaskSettings().max_jobs))

    @property
    def room_for_one(self) -> int:
        """Of what both weigh."""
        return max(self.chat_bytes, self.vector_bytes)

    @property
    def vector_estimate(self) -> int:
        return needs(self.store.path(self.vectors.id), self.vectors, "float32", 4, process=False).total


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    store = ModelStore(tmp_path_factory.mktemp("store"))
    chat = add_tiny(store, tmp_path_factory.mktemp("chat"))
    return Models(store, chat, add_tiny_encoder(store, tmp_path_factory.mktemp("vectors")))


@asynccontextmanager
async def opened(
    models: Models, budget: int, *, lazy: bool = True, pinned: tuple[str, ...] = ()
) -> AsyncIterator[tuple[TorchBackend, TaskModels, MemoryBudget, list[str]]]:
    memory, said = MemoryBudget(budget), list[str]()
    chats = EngineSettings(cache_bytes=CACHE, isolation="thread", lazy=lazy, pinned=pinned)
    others = TaskSettings(lazy=lazy, pinned=pinned)
    with trio.fail_after(120):
        async with (
            open_backend(models.store, [models.chat], chats, launch=ThreadLauncher(), memory=memory) as backend,
            open_tasks(models.store, [models.vectors], others, memory=memory, say=said.append) as tasks,
        ):
            yield backend, tasks, memory, said


async def chat(backend: TorchBackend, models: Models) -> list[Step]:
    prompt = backend.prepare(models.chat.id, HELLO)
    return [step async for step in backend.generate(prompt, Params(max_tokens=5, temperature=0))]


async def nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def vectors(tasks: TaskModels, models: Models) -> list[Step]:
    prepared = tasks.prepare(models.vectors.id, TEXTS)
    return [step async for step in tasks.run(prepared, Params(), nothing())]  # type: ignore[arg-type]


def test_what_an_encoder_needs_is_bounded_before_it_is_loaded(models: Models) -> None:
    folder = models.store.path(models.vectors.id)
    runner, _ = load_runner(folder, TaskSettings())
    expected = needs(folder, models.vectors, "float32", 4, process=False)
    assert expected.weights == runner.memory.weights
    assert runner.memory.total(4) <= expected.total


@pytest.mark.parametrize("name", ["minilm", "whisper-tiny.en", "ppocr-v6-small"])
def test_so_is_what_the_models_of_packages_need(name: str, stored: object) -> None:
    folder: Path = stored(name)  # type: ignore[operator]
    manifest = Manifest.parse((folder / "manifest.json").read_bytes())
    runner, _ = load_runner(folder, TaskSettings())
    expected = needs(folder, manifest, "float32", 4, process=False)
    assert abs(runner.memory.weights - expected.weights) < 0.01 * runner.memory.weights
    assert runner.memory.total(4) <= expected.total


def test_a_chat_and_another_task_put_each_other_out_and_come_back(models: Models) -> None:
    budget = max(models.chat_bytes, models.vector_estimate)

    async def main() -> None:
        async with opened(models, budget) as (backend, tasks, memory, said):
            resident, other = backend.fleet.residents[models.chat.id], tasks.residents[models.vectors.id]
            assert resident.phase is Phase.COLD and other.in_memory and not said
            assert set(backend.models) == {models.chat.id} and set(tasks.models) == {models.vectors.id}
            whole = await vectors(tasks, models)
            assert memory.used == models.vector_bytes, "as it was weighed, not as it was taken for"
            memory.limit = models.room_for_one
            assert await chat(backend, models)
            assert resident.ready and not other.in_memory
            assert memory.used == models.chat_bytes == backend.fleet.used
            assert await vectors(tasks, models) == whole
            assert resident.phase is Phase.COLD and memory.used <= memory.limit
            report = tasks.report()[0]
            assert report["weighed"] and report["in_memory"] and report["memory_bytes"] == models.vector_bytes

    trio.run(main)


def test_at_once_each_waits_for_the_other(models: Models) -> None:
    budget = max(models.chat_bytes, models.vector_estimate)

    async def main() -> None:
        async with opened(models, budget) as (backend, tasks, memory, _):
            most: list[int] = []
            memory.limit = models.room_for_one

            async def look() -> None:
                while True:
                    most.append(memory.used)
                    await trio.sleep(0.001)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                async with trio.open_nursery() as jobs:
                    for _ in range(4):
                        jobs.start_soon(chat, backend, models)
                        jobs.start_soon(vectors, tasks, models)
                nursery.cancel_scope.cancel()
            assert max(most) <= memory.limit

    trio.run(main)


def test_what_does_not_fit_at_a_start_is_said_and_left_out(models: Models) -> None:
    async def main() -> None:
        with pytest.raises(NoRoom, match=r"tiny-vectors needs \d+ bytes"):
            async with opened(models, models.chat_bytes, lazy=False):
                pass
        memory, said = MemoryBudget(models.chat_bytes + models.vector_estimate), list[str]()
        chats = EngineSettings(cache_bytes=CACHE, isolation="thread")
        again = add_tiny_encoder(models.store, await trio.to_thread.run_sync(_folder, models), "tiny-vectors-2")
        async with (
            open_backend(models.store, [models.chat], chats, launch=ThreadLauncher(), memory=memory) as backend,
            open_tasks(models.store, [models.vectors, again], TaskSettings(), memory=memory, say=said.append) as tasks,
        ):
            assert set(tasks.models) == {models.vectors.id} and set(backend.models) == {models.chat.id}
            assert len(said) == 1 and "tiny-vectors-2 is not sold" in said[0]

    trio.run(main)


def _folder(models: Models) -> Path:
    folder = models.store.path(models.vectors.id).parent.parent / "again"
    folder.mkdir()
    return folder


def test_pinned_others_that_leave_no_room_ever_refuse_a_job_instead_of_letting_it_wait(models: Models) -> None:
    budget = max(models.chat_bytes, models.vector_estimate)

    async def main() -> None:
        async with opened(models, budget) as (backend, tasks, memory, _):
            memory.limit = models.room_for_one
            assert await chat(backend, models)
            backend.fleet.residents[models.chat.id].pinned = True
            with pytest.raises(NoRoom):
                await vectors(tasks, models)
            assert await chat(backend, models)

    trio.run(main)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: prlimit of another process")
def test_a_task_s_process_has_a_limit_and_dies_of_it_alone(models: Models) -> None:
    """Lowered under a running one, an allocation fails; the job ends, the process is started again."""

    async def main() -> None:
        async with open_tasks(models.store, [models.vectors], TaskSettings(), launch=ProcessLauncher(TASKS)) as tasks:
            whole = await vectors(tasks, models)
            one = tasks.residents[models.vectors.id]
            assert one.host is not None
            pid = one.host._process.pid
            assert pid is not None
            expected = needs(one.folder, models.vectors, "float32", 4, process=True)
            assert resource.prlimit(pid, resource.RLIMIT_DATA)[0] == expected.process_limit
            assert one.footprint.process > 0
            resource.prlimit(pid, resource.RLIMIT_DATA, (1 << 20, expected.process_limit))
            with pytest.raises(ModelError):
                for _ in range(50):
                    big = EmbedRequest(("the mill turns and the river " * 15,) * 800)
                    prepared = tasks.prepare(models.vectors.id, big)
                    async for _step in tasks.run(prepared, Params(), nothing()):  # type: ignore[arg-type]
                        pass
            with trio.fail_after(60):
                while models.vectors.id not in tasks.models:
                    await trio.sleep(0.05)
            assert await vectors(tasks, models) == whole

    trio.run(main)
