"""An engine that was taken over tries to get out (M7): for real, behind each launcher, and from inside.

What it tries and what it gets is the child's own word (`node.testing.hostile_engine`), which has no reason to lie to its author;
what it must not have reached is looked at from outside too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from node import syscalls
from node.runtime.launch import BubblewrapLauncher, Child, ProcessLauncher
from node.testing.hostile_engine import UNFILTERED

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"), reason="needs Linux and its seccomp"
)
HOSTILE = "node.testing.hostile_engine"
CLOSED = {"EPERM", "EACCES", "EROFS", "ENOENT", "ENOSYS", "ECONNREFUSED", "ENETUNREACH", "ESRCH"}
Ask = Callable[..., Awaitable[Any]]


def launchers() -> list[Any]:
    found: list[Any] = [pytest.param(ProcessLauncher(HOSTILE), id="process")]
    program = shutil.which("bwrap")
    trouble = trio.run(BubblewrapLauncher(program).works) if program else "it is not installed"
    skip = [pytest.mark.skip(reason=f"bubblewrap: {trouble}")] if trouble else []
    return [*found, pytest.param(BubblewrapLauncher(program or "bwrap", HOSTILE), id="bwrap", marks=skip)]


@asynccontextmanager
async def hostile(launch: ProcessLauncher, folder: Path, device: str = "cpu") -> AsyncIterator[tuple[Child, Ask, Any]]:
    """The child, how to order an attack, and what it says of its walls."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "m.safetensors").write_bytes(b"weights")
    (folder / "key").write_text("secret")
    ours, theirs = socket.socketpair()
    with trio.fail_after(120), ours:
        async with launch.start(theirs, str(folder / "model")) as child:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            heard = bytearray()

            async def say(value: object) -> Any:
                await stream.send_all(json.dumps(value).encode() + b"\n")
                while b"\n" not in heard:
                    data = await stream.receive_some()
                    assert data, await child.epitaph()
                    heard.extend(data)
                line, _, rest = bytes(heard).partition(b"\n")
                heard[:] = rest
                return json.loads(line)

            async def ask(*order: object) -> Any:
                return await say(order)

            load = {"folder": str(folder / "model"), "hidden": [str(folder / "key")], "memory_limit": 300 << 20}
            yield child, ask, await say({**load, "device": device})


def run(launch: ProcessLauncher, folder: Path, test: Callable[[Child, Ask, Any], Awaitable[None]], **how: str) -> None:
    async def main() -> None:
        async with hostile(launch, folder, **how) as (child, ask, walls):
            await test(child, ask, walls)

    trio.run(main)


@pytest.mark.parametrize("launch", launchers())
def test_nobody_outside_is_reached(launch: ProcessLauncher, tmp_path: Path) -> None:
    """Sockets of the network, of the file system, abstract ones, those of the machine's own host; signals; other programs."""
    with ExitStack() as stack:

        def listening(family: int, address: Any) -> socket.socket:
            one = stack.enter_context(socket.socket(family))
            one.bind(address)
            one.listen()
            one.setblocking(False)
            return one

        abstract = f"gristmill-{os.getpid()}"
        tcp = listening(socket.AF_INET, ("127.0.0.1", 0))
        doors = [tcp, listening(socket.AF_UNIX, str(tmp_path / "s")), listening(socket.AF_UNIX, f"\0{abstract}")]

        async def test(child: Child, ask: Ask, walls: Any) -> None:
            assert walls["network"] and walls["programs"] and walls["cores"]
            for kind, address in (("tcp", tcp.getsockname()), ("unix", str(tmp_path / "s")), ("unix", f"@{abstract}")):
                assert await ask("connect", kind, address) in CLOSED
            assert await ask("connect", "vsock", [2, 1]) in CLOSED, "a virtual machine's host is in no namespace"
            for door in doors:
                with pytest.raises(BlockingIOError):
                    door.accept()
            assert await ask("kill", os.getpid()) in CLOSED and await ask("kill", os.getppid()) in CLOSED
            assert await ask("run", "/bin/sh") in CLOSED
            kinds = [target.partition(":")[0] for target in await ask("descriptors", 0)]
            assert sorted(kinds) == ["/dev/null", "pipe", "socket"], "its line, its error output, and nothing"

        run(launch, tmp_path, test)


@pytest.mark.parametrize("launch", launchers())
def test_nothing_grows_without_limit(launch: ProcessLauncher, tmp_path: Path) -> None:
    """Processes, which would each have the limit anew; memory that no limit counts; files in memory, or on the disk."""

    async def test(child: Child, ask: Ask, walls: Any) -> None:
        assert await ask("fork", 0) == "EPERM"
        assert await ask("grab", "private") == 200 << 20, "within its limit it has what it needs"
        for order in (("grab", "shared"), ("grab", "memfd"), ("fill", "/tmp"), ("fill", "/dev/shm")):
            assert await ask(*order) in CLOSED, order
        for folder in (str(tmp_path / "model"), str(tmp_path), "/", "/usr/lib", str(Path(syscalls.__file__).parent)):
            assert await ask("write", folder) in CLOSED, folder
        assert not list(tmp_path.rglob("planted")) and not Path("/planted").exists()
        assert await ask("unlimit", 0) == "EPERM" and await ask("system", "shmget") in CLOSED

    run(launch, tmp_path, test)


@pytest.mark.parametrize("launch", launchers())
def test_the_kernels_side_doors_are_shut(launch: ProcessLauncher, tmp_path: Path) -> None:
    async def test(child: Child, ask: Ask, walls: Any) -> None:
        for name in ("bpf", "userfaultfd", "io_uring_setup", "perf_event_open", "keyctl", "add_key", "pidfd_open"):
            assert await ask("system", name) == "EPERM", name
        for flags in (0x10000000, 0x00020000, 0x40000000):  # users, mounts, network
            assert await ask("unshare", flags) == "EPERM"

    run(launch, tmp_path, test)


@pytest.mark.parametrize("launch", launchers()[1:])
def test_behind_bubblewrap_no_file_of_the_machine_is_there(launch: ProcessLauncher, tmp_path: Path) -> None:
    async def test(child: Child, ask: Ask, walls: Any) -> None:
        assert walls["keys"] and walls["models"] and walls["processes"]
        hidden = (
            str(tmp_path / "key"),
            "/etc/passwd",
            "/etc/shadow",
            "/home",
            "/var",
            "/run",
            "/dev/mem",
            "/proc/kcore",
        )
        for path in hidden:
            assert await ask("read", path) == "ENOENT", path
        assert await ask("processes") == 1
        for path in (
            "/proc/sys/kernel/core_pattern",
            "/sys/devices/system/cpu/online",
            "/proc/sys/vm/overcommit_memory",
        ):
            assert await ask("write", path) in CLOSED, path

    run(launch, tmp_path, test)


def processes_below(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def gone(pids: list[int]) -> None:
    with trio.fail_after(10):
        while any(map(alive, pids)):
            await trio.sleep(0.02)


@pytest.mark.parametrize("launch", launchers())
def test_it_does_not_outlive_its_killing(launch: ProcessLauncher, tmp_path: Path) -> None:
    """Behind bubblewrap it is not itself that is killed: it dies because it is bound to its parent, unless it could undo that."""

    async def main() -> None:
        async with hostile(launch, tmp_path) as (child, ask, _):
            assert await ask("outlive", 0) == -1
            assert child.pid is not None
            pids = processes_below(child.pid)
            with trio.move_on_after(0.2):
                await ask("sleep")  # it reads no line any more, so the line's end does not end it
            child.kill()
            await gone(pids)

    trio.run(main)


_PARENT = """
import socket, sys, trio
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_walls_hostile import hostile, launchers, processes_below
launch = next(one.values[0] for one in launchers() if one.id == {which!r})
async def main():
    async with hostile(launch, Path({folder!r})) as (child, ask, _):
        await ask("outlive", 0)
        print(*processes_below(child.pid), flush=True)
        await ask("sleep")
trio.run(main)
"""


@pytest.mark.parametrize("launch", launchers())
def test_it_dies_with_a_node_that_is_killed(
    launch: ProcessLauncher, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    which = request.node.callspec.id
    code = _PARENT.format(tests=str(Path(__file__).parent), which=which, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        pids = [int(word) for word in node.stdout.readline().split()]
        assert pids and all(map(alive, pids))
        node.send_signal(signal.SIGKILL)
    trio.run(gone, pids)


def test_what_is_refused_stays_refused_where_a_gpu_needs_more(tmp_path: Path) -> None:
    """Drivers make files and share memory; they start nothing and call nobody."""

    async def test(child: Child, ask: Ask, walls: Any) -> None:
        assert walls["programs"] and await ask("fork", 0) == "EPERM" and await ask("outlive", 0) == -1
        assert await ask("connect", "vsock", [2, 1]) == "EPERM"
        assert await ask("grab", "memfd") == 200 << 20

    run(ProcessLauncher(HOSTILE), tmp_path, test, device="cuda:0")


def test_without_the_filter_these_doors_are_open(tmp_path: Path) -> None:
    """The attacks, seen succeeding: each of them got through when this file was written."""

    async def test(child: Child, ask: Ask, walls: Any) -> None:
        assert not walls["programs"]
        assert await ask("fork", 0) == 40 and await ask("outlive", 0) == 0
        assert await ask("grab", "memfd") == await ask("grab", "shared") == 200 << 20
        assert await ask("run", "/bin/sh") == 7 and await ask("system", "keyctl") not in CLOSED

    run(ProcessLauncher(HOSTILE), tmp_path, test, device=UNFILTERED)
