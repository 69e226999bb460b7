"""Engines in processes of their own: what they cannot reach (M7), and that their deaths cost nobody a token (M5).

A hang is a stopped process, want of memory is a limit lowered under a running one: nothing in the product knows of these tests.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

pytest.importorskip("torch")

from node.errors import ModelError
from node.runtime import wire
from node.runtime.engine.sequence import Sequence
from node.runtime.host import EngineHost
from node.runtime.launch import BubblewrapLauncher, Child, Launcher, ProcessLauncher, launcher
from node.runtime.supervisor import Limits
from node.runtime.walls import words
from protocol.sampling import SamplingParams

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc and prlimit")
QUICK = Limits(load_s=120, hang_s=60.0, backoff_s=0.02, backoff_max_s=0.1)
IMPATIENT = replace(QUICK, hang_s=2.0)


def load(folder: Path, **changes: object) -> wire.Load:
    return wire.Load(str(folder), "cpu", "float32", 1, 64 << 20, 16, **{"memory_limit": 0, **changes})  # type: ignore[arg-type]


def sequence(n: int, max_tokens: int = 120) -> Sequence:
    sampling = SamplingParams(temperature=1.0, seed=n) if n % 2 else SamplingParams(temperature=0.0)
    return Sequence(n, (1, 5 + n, 9), sampling, max_tokens, eos_ids=frozenset())


@asynccontextmanager
async def running(launch: Launcher, load: wire.Load, limits: Limits = QUICK) -> AsyncIterator[EngineHost]:
    host = EngineHost(launch, load, limits=limits)
    with trio.fail_after(400):
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            yield host
            nursery.cancel_scope.cancel()
    assert host.stopped


async def tokens(host: EngineHost, asked: Sequence) -> list[int]:
    return [output.token_id async for outputs in host.generate(asked) for output in outputs]


def bubblewrap() -> BubblewrapLauncher:
    program = shutil.which("bwrap")
    if program is None:
        pytest.skip("bubblewrap is not installed")
    found = BubblewrapLauncher(program)
    trouble = trio.run(found.works)
    if trouble:
        pytest.skip(f"bubblewrap does not work here: {trouble}")
    return found


def launchers() -> list[Callable[[], Launcher]]:
    return [ProcessLauncher, bubblewrap]


def engine_pid(host: EngineHost) -> int:
    """The process that computes: the started one, or the innermost child of the sandbox that was started."""
    pid = host.pid
    assert pid is not None
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


# ----------------------------------------------------------------------------------------------------------------- walls


def test_behind_bubblewrap_every_wall_holds(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (tiny / "beside").unlink(missing_ok=True)

    async def main() -> None:
        async with running(
            bubblewrap_launcher, load(tiny, hidden=(str(tmp_path / "key"),), memory_limit=4 << 30)
        ) as host:
            assert host.facts is not None
            walls = host.facts.walls
            assert walls == wire.Walls(True, True, True, True, True, True, memory=4 << 30)
            assert "OPEN" not in words(host.mode, walls)
            assert len(await tokens(host, sequence(0, 5))) == 5

    bubblewrap_launcher = bubblewrap()
    trio.run(main)


def test_what_a_plain_child_can_reach_is_said(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")

    async def main() -> None:
        async with running(ProcessLauncher(), load(tiny, hidden=(str(tmp_path / "key"),))) as host:
            assert host.facts is not None and host.facts.walls is not None
            assert not host.facts.walls.keys  # it is our user, and says so
            assert "keys" in words(host.mode, host.facts.walls).split("OPEN: ")[1]
            assert host.facts.walls.cores
            assert host.facts.walls.network and host.facts.walls.programs

    trio.run(main)


def test_a_wall_that_is_not_there_is_not_reported(tiny: Path, tmp_path: Path) -> None:
    """Each trial, seen failing: in this process nothing is shut."""
    from node.runtime import walls

    (tmp_path / "key").write_text("secret")
    assert walls._readable(str(tmp_path / "key"))
    assert walls._readable(str(tmp_path))
    assert not walls._readable(str(tmp_path / "none"))
    assert walls._writable(tmp_path)
    assert walls._neighbours() > 0
    assert walls._multiplies()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        assert walls._reachable(socket.AF_INET, "127.0.0.1")


@LINUX
def test_a_child_gets_no_descriptor_but_its_line_and_no_secret(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the child's /proc entries are closed to its own user")
    monkeypatch.setenv("GRISTMILL_SECRET_OF_THE_TEST", "hunter2")
    with open(__file__) as leak:
        os.set_inheritable(leak.fileno(), True)

        async def main() -> None:
            async with running(ProcessLauncher(), load(tiny)) as host:
                environment = Path(f"/proc/{host.pid}/environ").read_bytes()
                assert b"hunter2" not in environment
                assert b"OMP_WAIT_POLICY=PASSIVE" in environment
                targets = [os.readlink(entry) for entry in Path(f"/proc/{host.pid}/fd").iterdir()]
                assert sum(target.startswith("socket:") for target in targets) == 1
                assert not any(target == __file__ for target in targets)
                limits = Path(f"/proc/{host.pid}/limits").read_text()
                assert limits.split("Max core file size")[1].split()[:2] == ["0", "0"]

        trio.run(main)


def test_an_engine_outlives_the_threads_that_trio_lends(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies with the thread that started it: that must be one that stays."""
    started: list[threading.Thread] = []
    real = subprocess.Popen.__init__

    def popen(self: object, *args: object, **options: object) -> None:
        started.append(threading.current_thread())
        real(self, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess.Popen, "__init__", popen)

    async def main() -> None:
        async with running(ProcessLauncher(), load(tiny)):
            assert started == [threading.current_thread()]

    trio.run(main)


def test_the_setting_asks_for_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert trio.run(launcher, "auto").mode == "process"
    assert trio.run(launcher, "process").mode == "process"
    assert trio.run(launcher, "thread").mode == "thread"
    with pytest.raises(ModelError, match="not installed"):
        trio.run(launcher, "bwrap")


def test_torch_comes_after_the_walls() -> None:
    """It starts threads, and a process that has some cannot leave its network."""
    code = "import sys, node.runtime.child, node.runtime.walls; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------------- deaths


@LINUX
@pytest.mark.parametrize("make", launchers(), ids=["process", "bwrap"])
def test_killed_at_any_moment_no_stream_loses_or_changes_a_token(
    make: Callable[[], Launcher], tiny: Path, request: pytest.FixtureRequest
) -> None:
    """Six streams at a time. One death costs none of them anything; two may end some, which say so."""
    launch = make()
    chance = random.Random(7)
    rounds = 12 if request.config.getoption("--long", default=False) else 3

    async def main() -> None:
        async with running(launch, load(tiny)) as host:
            wanted = {n: await tokens(host, sequence(n)) for n in range(6)}
            empty = host._room

            async def one(n: int, whole: list[bool]) -> None:
                try:
                    assert await tokens(host, sequence(n)) == wanted[n]
                    whole.append(True)
                except ModelError as error:
                    assert "died 2 times while this sequence ran" in error.message
                    assert "SIGKILL" in error.message
                    whole.append(False)

            for n_round in range(rounds):
                killed, twice = host.deaths, n_round % 2
                whole: list[bool] = []
                async with trio.open_nursery() as nursery:
                    for n in range(6):
                        nursery.start_soon(one, n, whole)
                    await trio.sleep(chance.uniform(0.0, 0.15))
                    os.kill(engine_pid(host), signal.SIGKILL)
                    with trio.fail_after(120):
                        while not (host.ready and host.deaths > killed):
                            await trio.sleep(0.01)
                    if twice:
                        await trio.sleep(chance.uniform(0.0, 0.15))
                        os.kill(engine_pid(host), signal.SIGKILL)
                assert len(whole) == 6
                assert all(whole) or twice
                while not host.ready:
                    await trio.sleep(0.01)
                assert host.running == 0
            assert await tokens(host, sequence(0)) == wanted[0]
            assert host._room == empty  # every byte of the cache is back

    trio.run(main)


@LINUX
def test_a_stopped_engine_is_taken_for_hung_and_its_streams_go_on(tiny: Path) -> None:
    async def main() -> None:
        async with running(ProcessLauncher(), load(tiny), IMPATIENT) as host:
            wanted = await tokens(host, sequence(1, 200))
            async with aclosing(host.generate(sequence(1, 200))) as batches:
                got = [output.token_id for output in await anext(batches)]
                os.kill(engine_pid(host), signal.SIGSTOP)
                got += [output.token_id async for outputs in batches for output in outputs]
            assert got == wanted
            assert host.deaths == 1
            assert "it hangs" in host.last_death

    trio.run(main)


def test_an_idle_engine_is_not_taken_for_hung(tiny: Path) -> None:
    async def main() -> None:
        async with running(ProcessLauncher(), load(tiny), IMPATIENT) as host:
            await trio.sleep(2 * IMPATIENT.hang_s)
            assert host.deaths == 0

    trio.run(main)


@LINUX
def test_out_of_memory_in_a_step_ends_the_engine_and_no_stream(make_model: Callable[..., Path]) -> None:
    """The limit falls under a running engine; a long prompt then needs what it cannot get."""
    folder = make_model(max_position_embeddings=8192)

    async def main() -> None:
        async with running(ProcessLauncher(), load(folder)) as host:
            asked = [Sequence(n, (1, 2, 3), SamplingParams(temperature=0), 400, eos_ids=frozenset()) for n in range(3)]
            asked.append(Sequence("long", (5, 6, 7, 8) * 1500, SamplingParams(temperature=0), 4, eos_ids=frozenset()))
            wanted = [await tokens(host, one) for one in asked]
            got: list[list[int]] = [[] for _ in asked]

            async def one(n: int) -> None:
                async for outputs in host.generate(asked[n]):
                    got[n] += [output.token_id for output in outputs]

            async with trio.open_nursery() as nursery:
                for n in range(3):
                    nursery.start_soon(one, n)
                while not all(got[:3]):
                    await trio.sleep(0.001)
                resource.prlimit(engine_pid(host), resource.RLIMIT_DATA, (1 << 20, 1 << 20))
                nursery.start_soon(one, 3)
            assert got == wanted
            assert host.deaths == 1
            assert "out of memory" in host.last_death

    trio.run(main)


def test_a_limit_that_is_too_small_is_said_as_such(tiny: Path) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with pytest.raises(ModelError, match="cannot be loaded"):
                await nursery.start(EngineHost(ProcessLauncher(), load(tiny, memory_limit=16 << 20), limits=QUICK).run)

    trio.run(main)


class Failing:
    """A launcher whose children cannot be started for a while."""

    mode = "process"

    def __init__(self) -> None:
        self.broken = False
        self._real = ProcessLauncher()

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Child]:
        async with self._real.start(theirs, "/nowhere" if self.broken else folder) as child:
            if self.broken:
                child.kill()
            yield child


def test_an_engine_that_cannot_be_started_again_says_so_until_it_can(tiny: Path) -> None:
    launch = Failing()

    async def main() -> None:
        async with running(launch, load(tiny)) as host:
            launch.broken = True
            pid = host.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            while not host.failure:
                await trio.sleep(0.01)
            assert "cannot be started again" in host.failure
            assert not host.fits(1, 1)
            with pytest.raises(ModelError, match="cannot be started again"):
                await tokens(host, sequence(0))
            launch.broken = False
            while not host.ready:
                await trio.sleep(0.01)
            assert host.failure == ""
            assert len(await tokens(host, sequence(0, 9))) == 9

    trio.run(main)
