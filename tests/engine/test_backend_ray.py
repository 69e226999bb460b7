"""Replicas over Ray: no stream is lost with a node or a replica that hangs, and the queue decides how many there are."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import trio

from node.errors import ModelError, PromptInvalid
from node.groups import plain_errors
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.ports import Prompt
from node.runtime.backend import EngineSettings, open_backend
from node.runtime.backends.autoscale import Autoscaler, Demand, Scale
from node.runtime.backends.ray_backend import LOSSES, RayBackend, open_replicas
from node.runtime.backends.ray_cluster import NoAnswer, Placement, ReplicaGone
from node.runtime.backends.ray_pool import RaySettings
from node.runtime.backends.ray_replica import Batch, Replica
from node.testing.tiny_model import add_tiny
from node.worker.worker import self_test
from protocol.logprobs import TokenLogprobs, check, unpack
from protocol.messages import FinishReason, Params, ResponseFormat

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "build" / "ray" / "bin" / "python"


def world(folder: Path, what: str) -> dict[str, Any]:
    python = sys.executable if importlib.util.find_spec("ray") else str(OWN)
    if not Path(python).exists():
        pytest.skip("ray is not installed (scripts/setup-peers ray)")
    command = [python, "-m", "node.testing.ray_world", str(folder), what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.mark.slow
def test_a_node_that_dies_under_load_costs_a_pause_and_no_stream(tmp_path: Path) -> None:
    seen = world(tmp_path, "dies")
    assert seen["under way"] > 1
    assert (seen["same tokens"], seen["same text"], seen["tokens"]) == (8, 8, 8 * 400)


@pytest.mark.slow
def test_the_queue_starts_replicas_a_hung_one_is_replaced_and_idle_ones_leave(tmp_path: Path) -> None:
    seen = world(tmp_path, "hangs")
    assert seen["under way"] == 4  # on the replica that then hung
    assert (seen["same tokens"], seen["same text"], seen["tokens"]) == (8, 8, 8 * 400)
    assert seen["replicas"] == [1, 2, 1]


@pytest.mark.slow
def test_a_full_store_stops_no_stream_and_strangers_get_nothing(tmp_path: Path) -> None:
    """Half a gigabyte of objects where there is room for a quarter of it. The ports are on loopback and ask for the token."""
    seen = world(tmp_path, "fills")
    assert seen["under way"] >= 4 and seen["memory"] <= 128 << 20
    assert seen["put"] == 64 or "full" in seen, "the store was tried"
    assert (seen["same tokens"], seen["same text"], seen["tokens"]) == (8, 8, 8 * 400)
    listening = {address.removeprefix("::ffff:") for address in seen["listening"]}
    assert listening == {"127.0.0.1"}, "and not on all addresses of the machine, as with 127.0.0.2"
    assert not seen["stranger"].startswith("in"), seen["stranger"]
    assert seen["later"] == 400, "the cluster outlives the quiet, in which idle threads end"


# ------------------------------------------------------------------------------------------------------ autoscaling


def wanted(scaler: Autoscaler, now: float, **demand: int) -> int:
    return scaler.wanted(now, Demand(**{"waiting": 0, "active": 0, "ready": 1, "starting": 0, "slots": 4, **demand}))


def test_more_replicas_when_streams_have_waited_long_enough() -> None:
    scaler = Autoscaler(Scale(least=1, most=4, up_s=2, down_s=60))
    assert wanted(scaler, 0, waiting=3, active=4) == 1
    assert wanted(scaler, 1, waiting=0, active=4) == 1  # a burst that passes changes nothing
    assert wanted(scaler, 2, waiting=3, active=4) == 1
    assert wanted(scaler, 4, waiting=5, active=4) == 3  # five that wait fill two
    assert wanted(scaler, 7, waiting=5, active=4, starting=2) == 3  # not again while those start
    assert wanted(scaler, 10, waiting=90, active=12, ready=3) == 4  # and never too many


def test_fewer_when_one_was_too_many_for_long_enough() -> None:
    scaler = Autoscaler(Scale(least=1, most=4, up_s=2, down_s=60))
    assert wanted(scaler, 0, active=8, ready=3) == 3
    assert wanted(scaler, 59, active=9, ready=3) == 3  # the third was of use: its time begins anew
    assert wanted(scaler, 60, active=8, ready=3) == 3
    assert wanted(scaler, 119, active=8, ready=3) == 3
    assert wanted(scaler, 120, active=8, ready=3) == 2
    assert wanted(scaler, 121, active=0, ready=2) == 2
    assert wanted(scaler, 999, active=0, ready=1) == 1  # and never too few


def test_a_load_at_the_edge_changes_nothing_and_what_is_lost_is_replaced() -> None:
    scaler = Autoscaler(Scale(least=2, most=4, up_s=2, down_s=10))
    for second in range(100):
        assert wanted(scaler, second, waiting=second % 2, active=7 + second % 2, ready=2) == 2
    assert wanted(scaler, 200, ready=0) == 2
    assert wanted(scaler, 201, ready=1, starting=1) == 2


# ------------------------------------------------------------------------------- the head, with replicas in this process


class Near:
    """A replica in this process where Ray would have it on a node: the real one, with a death of its own."""

    def __init__(self, wanted: Placement, dies_after: int, told: dict[str, Any]) -> None:
        self._replica = Replica(wanted.models_dir, wanted.models, wanted.engine, wanted.coalesce_ms)
        self.differs = dict(told.pop("differs", {}))
        self._left, self._told = dies_after, told
        self.dead = self.deaf = False

    def describe(self, timeout_s: float) -> dict[str, Any]:
        found = self._replica.describe() | self._told
        for model in found["models"].values() if self.differs else ():
            model |= self.differs
        return found

    def ping(self, timeout_s: float) -> int:
        if self.dead:
            raise ReplicaGone("it was told to die")
        if self.deaf:
            raise NoAnswer
        return self._replica.ping()

    def check_format(self, *call: Any, timeout_s: float) -> str:
        if self.dead:
            raise ReplicaGone("it was told to die")
        return self._replica.check_format(*call)

    def stream(self, *call: Any) -> Iterator[Batch]:
        for batch in self._replica.generate(*call):
            self._left -= len(batch[0])
            self.dead = self.dead or self._left < 0
            if self.dead:
                raise ReplicaGone("it was told to die")
            yield batch

    def stop(self, number: int) -> None:
        self._replica.stop(number)

    def drop(self) -> None:
        self.dead = True

    def end(self) -> None:
        """What Ray does with the process of an actor; in this process the engine would stay, with its cache."""
        with suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self._replica._host._nursery.cancel_scope.cancel, trio_token=self._replica._token)


class Cluster:
    """Where replicas are placed; each of the first ones lives for so many tokens."""

    def __init__(self, *lives: int, told: tuple[dict[str, Any], ...] = (), rooms: int = 100) -> None:
        self._lives, self._told, self._rooms = list(lives), list(told), rooms
        self.placed: list[Near] = []

    def place(self, wanted: Placement, given_up: threading.Event) -> Near:
        if len(self.placed) >= self._rooms:
            raise NoAnswer("the cluster has no room")
        life = self._lives.pop(0) if self._lives else 1 << 30
        self.placed.append(Near(wanted, life, dict(self._told.pop(0)) if self._told else {}))
        return self.placed[-1]


class Stored:
    def __init__(self, root: Path) -> None:
        source = root / "source"
        source.mkdir()
        self.store = ModelStore(root / "store")
        self.manifest: Manifest = add_tiny(self.store, source)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("ray"))


def head(stored: Stored, cluster: Cluster, test: Callable[[RayBackend], Awaitable[None]], **options: Any) -> None:
    values: dict[str, Any] = {
        "engine": EngineSettings(isolation="thread", max_streams=2),
        "health_s": 5.0,
        "coalesce_ms": 1,
        **options,
    }

    async def main() -> None:
        with trio.fail_after(120):
            async with open_replicas(
                stored.store, [stored.manifest], RaySettings(**values), start=cluster.place
            ) as backend:
                await test(backend)

    try:
        with plain_errors():
            trio.run(main)
    finally:
        for one in cluster.placed:
            one.end()


def job(stored: Stored, **changes: Any) -> tuple[Prompt, Params]:
    never = ((2, -100.0),)
    prompt = Prompt(stored.manifest.id, tuple(range(5, 25)))
    return prompt, Params(**{"max_tokens": 60, "temperature": 1.0, "seed": 5, "logit_bias": never, **changes})


async def run(backend: Any, asked: tuple[Prompt, Params]) -> tuple[list[int], str, FinishReason | None]:
    ids: list[int] = []
    text, reason = "", None
    async with aclosing(backend.generate(*asked)) as steps:
        async for step in steps:
            ids, text, reason = [*ids, *step.token_ids], text + step.text, step.finish_reason
    return ids, text, reason


def directly(stored: Stored, asked: tuple[Prompt, Params]) -> tuple[list[int], str, FinishReason | None]:
    async def main() -> tuple[list[int], str, FinishReason | None]:
        async with open_backend(stored.store, [stored.manifest], EngineSettings(isolation="thread")) as backend:
            return await run(backend, asked)

    return trio.run(main)


@pytest.mark.parametrize("life", [1, 7, 23])
def test_a_stream_that_moves_has_no_seam(stored: Stored, life: int) -> None:
    whole, text, _ = directly(stored, job(stored))
    stop = text[len(text) // 2 : len(text) // 2 + 3]  # three characters that some cut goes through
    wanted = directly(stored, job(stored, stop=(stop,)))
    assert wanted[2] is FinishReason.STOP_STRING

    async def test(backend: RayBackend) -> None:
        assert await run(backend, job(stored)) == (whole, text, FinishReason.LENGTH)
        assert await run(backend, job(stored, stop=(stop,))) == wanted

    cluster = Cluster(*[life] * 4)
    head(stored, cluster, test)
    assert len(cluster.placed) == 5


@pytest.mark.parametrize("life", [7, 23])
def test_log_probabilities_of_a_stream_that_moves_have_no_gap(stored: Stored, life: int) -> None:
    async def rows(backend: Any, asked: tuple[Prompt, Params]) -> list[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        async with aclosing(backend.generate(*asked)) as steps:
            async for step in steps:
                check(step.token_ids, step.data, 3)
                found += unpack(step.token_ids, step.data)
        return found

    async def direct() -> tuple[list[TokenLogprobs], str]:
        async with open_backend(stored.store, [stored.manifest], EngineSettings(isolation="thread")) as backend:
            return await rows(backend, job(stored, logprobs=3)), (await run(backend, job(stored)))[1]

    whole, text = trio.run(direct)
    assert len(whole) == 60
    stop = text[len(text) // 2 : len(text) // 2 + 3]

    async def test(backend: RayBackend) -> None:
        assert "logprobs" in backend.models[stored.manifest.id].params
        moved = await rows(backend, job(stored, logprobs=3))
        assert [one.token_id for one in moved] == [one.token_id for one in whole]
        assert [one.logprob for one in moved] == pytest.approx([one.logprob for one in whole], abs=1e-4)
        cut = await rows(backend, job(stored, logprobs=3, stop=(stop,)))
        assert 0 < len(cut) < 60 and [one.token_id for one in cut] == [one.token_id for one in whole[: len(cut)]]

    cluster = Cluster(*[life] * 2)
    head(stored, cluster, test)
    assert len(cluster.placed) == 3


def test_a_stream_that_kills_its_replicas_is_given_up(stored: Stored) -> None:
    async def test(backend: RayBackend) -> None:
        with pytest.raises(ModelError, match="again and again"):
            await run(backend, job(stored))

    cluster = Cluster(*[0] * (LOSSES + 1))
    head(stored, cluster, test)
    assert sum(one.dead for one in cluster.placed) >= LOSSES + 1


def test_what_has_no_memory_waits_for_it_and_what_has_no_place_for_a_place(stored: Stored) -> None:
    asked = job(stored, max_tokens=200)
    wanted = directly(stored, asked)
    per_token = 2 * 2 * 2 * 8 * 4

    async def test(backend: RayBackend) -> None:
        await self_test(backend)
        found: list[Any] = []

        async def one() -> None:
            found.append(await run(backend, asked))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
            await trio.sleep(0.2)
            assert backend.free_slots == 0
        assert found == [wanted] * 5 and backend.free_slots == 2
        assert not backend.could_fit(stored.manifest.id, 1000)

    head(stored, Cluster(), test, engine=EngineSettings(isolation="thread", max_streams=2, cache_bytes=300 * per_token))


def test_a_grammar_is_followed_also_where_a_stream_moves(stored: Stored) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    sums = ResponseFormat(kind="regex", text="[0-9]{30,60}")
    asked = job(stored, response_format=sums, logit_bias=())
    wanted = directly(stored, asked)
    assert re.fullmatch(r"[0-9]{30,60}", wanted[1])

    async def test(backend: RayBackend) -> None:
        check = backend.check_format
        await trio.to_thread.run_sync(check, stored.manifest.id, sums, ())
        with pytest.raises(PromptInvalid):
            await trio.to_thread.run_sync(check, stored.manifest.id, ResponseFormat(kind="regex", text="(["), ())
        assert await run(backend, asked) == wanted
        (info,) = backend.models.values()
        assert "response_format" in info.params

    cluster = Cluster(5)
    head(stored, cluster, test)
    assert len(cluster.placed) == 2


def test_a_replica_that_differs_is_not_used(stored: Stored) -> None:
    async def test(backend: RayBackend) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):  # one more than there are places, so a second replica starts
                nursery.start_soon(run, backend, job(stored, max_tokens=900))
            while not backend.pool.failure:
                await trio.sleep(0.02)
            assert len(backend.pool.members) == 1 and "numerics class" in backend.pool.failure

    told: tuple[dict[str, Any], ...] = ({}, *[{"differs": {"numerics_class": "of another GPU"}}] * 50)
    head(stored, Cluster(told=told), test, scale=Scale(1, 2, up_s=0.0))
    with pytest.raises(ModelError, match=r"version 0\.0"):
        head(stored, Cluster(told=({"version": "0.0"},)), test)


def test_without_room_nothing_is_served(stored: Stored) -> None:
    async def test(backend: RayBackend) -> None:
        async with aclosing(backend.generate(*job(stored, max_tokens=900))) as one:
            await anext(one)
            async with aclosing(backend.generate(*job(stored, max_tokens=900))) as two:
                await anext(two)
                with pytest.raises(ModelError, match=r"no replica had a free place for 0\.3 s: .* no room"):
                    await run(backend, job(stored))
        assert backend.free_slots == 2
        host = backend.pool.members[0].placed._replica._host  # type: ignore[attr-defined]
        while host._streams:  # left streams end there too
            await trio.sleep(0.01)

    head(stored, Cluster(rooms=1), test, scale=Scale(1, 2, up_s=0.0), queue_s=0.3)
    with pytest.raises(ModelError, match="no room"):
        head(stored, Cluster(rooms=0), test)


def test_a_replica_that_does_not_answer_is_lost(stored: Stored) -> None:
    asked = job(stored, max_tokens=400)
    wanted = directly(stored, asked)
    cluster = Cluster()

    async def test(backend: RayBackend) -> None:
        ids: list[int] = []
        async with aclosing(backend.generate(*asked)) as steps:
            async for step in steps:
                ids += step.token_ids
                if len(ids) > 8 and not cluster.placed[0].deaf:
                    cluster.placed[0].deaf = True
                    while not cluster.placed[0].dead:
                        await trio.sleep(0.02)
        assert ids == wanted[0]

    head(stored, cluster, test, health_s=0.3)
    assert len(cluster.placed) == 2


# ------------------------------------------------------------------------------------------------- replicas that lie


LIES: dict[str, Any] = {
    "no tuple": "hello",
    "nothing": None,
    "two of three": ((5,), 0),
    "text for ids": (("5",), 0, "", b""),
    "an id below": ((-1,), 0, "", b""),
    "an id beyond": ((1 << 40,), 0, "", b""),
    "no whole number": ((5.5,), 0, "", b""),
    "an unknown end": ((5,), 99, "", b""),
    "an end of ours": ((5,), int(FinishReason.STOP_STRING), "", b""),
    "a text end": ((5,), "stop", "", b""),
    "too short": ((5,), int(FinishReason.LENGTH), "", b""),
    "too long": (tuple(range(5, 5 + 61)), 0, "", b""),
    "far too long": ((5,) * 1_000_000, 0, "", b""),
    "end and fault": ((5,), int(FinishReason.STOP), "out of memory", b""),
    "an object": (object(), 0, "", b""),
    "rows that nobody asked for": ((5,), 0, "", bytes(4)),
}


class Liar(Near):
    """Says something else after its first batches."""

    lie: Any = None
    after = 3

    def stream(self, *call: Any) -> Iterator[Batch]:
        for number, batch in enumerate(super().stream(*call)):
            if number >= self.after:
                yield self.lie
            yield batch


class Lying(Cluster):
    """Whose first replica is one that lies."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self._how = how

    def place(self, wanted: Placement, given_up: threading.Event) -> Near:
        if self.placed:
            return super().place(wanted, given_up)
        liar = Liar(wanted, 1 << 30, {})
        for name, value in self._how.items():
            setattr(liar, name, value)
        self.placed.append(liar)
        return liar


@pytest.mark.parametrize("lie", LIES)
def test_a_replica_that_lies_is_lost_and_its_stream_is_what_it_would_have_been(stored: Stored, lie: str) -> None:
    wanted, cluster = directly(stored, job(stored)), Lying(lie=LIES[lie])

    async def test(backend: RayBackend) -> None:
        assert await run(backend, job(stored)) == wanted
        assert cluster.placed[0].dead and len(cluster.placed) == 2

    head(stored, cluster, test)


def test_one_that_says_nothing_for_ever_or_goes_on_after_its_end_is_lost(stored: Stored) -> None:
    from node.runtime.backends.ray_said import EMPTY, Listener, Nonsense

    silent = Listener(10)
    for _ in range(EMPTY):
        silent(((), 0, "", b""))
    with pytest.raises(Nonsense):
        silent(((), 0, "", b""))
    over = Listener(2)
    over(((5, 6), int(FinishReason.LENGTH), "", b""))
    with pytest.raises(Nonsense):
        over(((), 0, "", b""))
    assert Listener(2)(((), 0, "\x1b[2J" + "x" * 10_000, b""))[2].isprintable()
    assert len(Listener(2)(((), 0, "x" * 10_000, b""))[2]) <= 300


@pytest.mark.parametrize(
    "told",
    [
        {"version": 5},
        {"models": {}},
        {"models": None},
        {"models": {"another": {}}},
        {"more": 1},
        {"version": "x" * 10_000},
    ],
    ids=range(6),
)
def test_a_replica_that_says_nonsense_of_itself_is_not_used(stored: Stored, told: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="a replica cannot start"):
        head(stored, Cluster(told=(told,) * 50), lambda backend: trio.sleep(0))


def test_what_is_thrown_by_an_answer_is_no_end_of_the_worker(stored: Stored) -> None:
    """Unpickling may raise anything at all; so may a library of Ray's."""
    from node.runtime.backends import ray_cluster

    class Handle:
        class ping:
            remote = staticmethod(lambda: "reference")

    ray = pytest.MonkeyPatch()
    with ray.context() as patch:

        class FakeRay:
            class exceptions:
                GetTimeoutError = TimeoutError

            @staticmethod
            def get(reference: Any, timeout: float) -> Any:
                if answers:
                    return answers.pop()
                raise ModuleNotFoundError("no module named evil")

        answers: list[Any] = ["4711", None]
        patch.setitem(sys.modules, "ray", FakeRay)  # type: ignore[arg-type]
        for _ in range(3):
            with pytest.raises(ReplicaGone):
                ray_cluster.Placed(Handle(), None).ping(1)
