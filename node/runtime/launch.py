"""How an engine is started: behind bubblewrap, as a plain child, or in a thread of the node. One port, three ways.

- `bwrap`: namespaces of its own (network, processes, users, ...), a root that holds the Python environment, the system's
  libraries and the one model, all read-only, and nobody's user id.
- `process`: a child without our environment and descriptors. It leaves the network by itself where the system allows that;
  files of our user stay readable to it.
- `thread`: for tests and debugging. No wall, and a hang cannot be ended.
- `auto`: bwrap where it works, else process.

What really holds is tried from inside (`node.runtime.walls`) and told to the operator.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

import trio

import node
from node.errors import ModelError
from node.hardening import environment
from node.runtime.child import Line, LoadEngine, load_engine, serve
from node.runtime.hal.devices import SEEN
from protocol.tame import one_line

log = logging.getLogger(__name__)
ENGINE: Final = "node.runtime.child"
TASKS: Final = "node.runtime.tasks.child"
_TAIL: Final = 2000
_SYSTEM: Final = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/alternatives",
)
_HARDWARE: Final = ("/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/bus/pci", "/sys/devices/pci0000:00")
_DEVICES: Final = ("nvidia", "dri", "kfd", "accel")


class Child(Protocol):
    """An engine that was started. It ends with its line."""

    @property
    def pid(self) -> int | None: ...

    def kill(self) -> None:
        """At once, whatever it is doing. Does nothing to a thread."""

    async def epitaph(self) -> str:
        """How it ended, once it has: signal or status, and the end of what it wrote to its error output."""


class Launcher(Protocol):
    mode: str
    """bwrap, process or thread."""

    def start(self, theirs: socket.socket, folder: str) -> AbstractAsyncContextManager[Child]:
        """Start an engine that may read `folder`, with its end of the line; ended at the end of the block. Closes our copy of
        `theirs`. Raises `ModelError`."""

    def seeing(self, folder: str) -> Launcher:
        """One whose engines may read another folder besides."""


# ---------------------------------------------------------------------------------------------------------- processes


class _Process:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid: int | None = process.pid
        self.tail = b""

    def kill(self) -> None:
        self._process.kill()

    async def epitaph(self) -> str:
        with trio.move_on_after(2):
            await self.reap()
        code = self._process.poll()
        if code is None:
            how = "its line ended"
        elif code < 0 or code > 128:  # bubblewrap says 128 + signal, as a shell does
            number = -code if code < 0 else code - 128
            how = f"killed by {signal.Signals(number).name}" if number in set(signal.Signals) else f"status {code}"
        else:
            how = f"ended with status {code}"
        said = one_line(self.tail.decode(errors="replace"))[-300:]
        return f"{how} ({said})" if said else how

    async def listen(self) -> None:
        """Keep the end of what it says, and never let it wait to be heard."""
        pipe = self._process.stderr
        if pipe is None:
            return
        async with trio.lowlevel.FdStream(os.dup(pipe.fileno())) as stream:
            async for block in stream:
                self.tail = (self.tail + bytes(block))[-_TAIL:]

    async def reap(self) -> None:
        while self._process.poll() is None:
            await trio.sleep(0.002)


class ProcessLauncher:
    """A plain child."""

    mode = "process"

    def __init__(self, module: str = ENGINE) -> None:
        """`module`: what runs in it, as `python -m`."""
        self._module = module
        self._python = [sys.executable, "-P", "-m", module]

    def seeing(self, folder: str) -> Launcher:
        return self  # its files are as open to it as to us

    def command(self, descriptor: int, folder: str) -> list[str]:
        return [*self._python, str(descriptor), "alone"]

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Child]:
        env = environment(
            SEEN,
            PYTHONPATH=_tree(),
            OMP_WAIT_POLICY="PASSIVE",
            THP_MEM_ALLOC_ENABLE="1",
            USER="engine",
            LOGNAME="engine",
            HOME="/tmp",
        )
        try:
            # Not trio's: it starts processes from threads that end when they are idle, and the child with them, which is to die
            # with the thread that started it.
            with theirs:
                process = subprocess.Popen(
                    self.command(theirs.fileno(), folder),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    env=env,
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            raise ModelError(f"the engine's process cannot be started: {error}") from error
        child = _Process(process)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.listen)
                try:
                    yield child
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            child.kill()
            with trio.CancelScope(shield=True):
                await child.reap()
            if process.stderr is not None:
                process.stderr.close()


class BubblewrapLauncher(ProcessLauncher):
    """A child behind bubblewrap (https://github.com/containers/bubblewrap)."""

    mode = "bwrap"

    def __init__(self, program: str, module: str = ENGINE, also: tuple[str, ...] = ()) -> None:
        """`also`: folders that its engines may read besides their model's."""
        super().__init__(module)
        self._program, self._also = program, also

    def seeing(self, folder: str) -> Launcher:
        return BubblewrapLauncher(self._program, self._module, (*self._also, folder))

    def command(self, descriptor: int, folder: str) -> list[str]:
        return [self._program, *_sandbox([folder, *self._also]), "--", *self._python, str(descriptor), "walled"]

    async def works(self) -> str:
        """Empty, or why a sandbox cannot be made here."""
        command = [self._program, *_sandbox([]), "--", sys.executable, "-I", "-S", "-c", ""]
        try:
            done = await trio.run_process(command, capture_stderr=True, check=False, stdin=b"", capture_stdout=True)
        except OSError as error:
            return str(error)
        return "" if done.returncode == 0 else one_line(done.stderr.decode(errors="replace"))[:300] or "it failed"


def _tree() -> str:
    return str(Path(node.__file__).resolve().parents[1])


def _sandbox(folders: Sequence[str]) -> list[str]:
    """bubblewrap's arguments. Order matters: a later mount lies on top of an earlier one."""
    arguments = ["--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        arguments += ["--uid", "65534", "--gid", "65534"]
    for path in _SYSTEM:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        else:
            arguments += ["--ro-bind-try", path, path]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for path in _HARDWARE:
        arguments += ["--ro-bind-try", path, path]
    for device in sorted(Path("/dev").iterdir()):
        if device.name.startswith(_DEVICES):
            arguments += ["--dev-bind-try", str(device), str(device)]
    for path in (*_python_folders(), *folders):
        arguments += ["--ro-bind", path, path]
    return [*arguments, "--remount-ro", "/", "--chdir", "/"]


def _python_folders() -> list[str]:
    """The environment, what it was made from, and our two packages: not the folder they lie in, which may hold anything."""
    tree = Path(_tree())
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    wanted = [sys.base_prefix, sys.prefix, *libraries, str(tree / "node"), str(tree / "protocol")]
    found = [path for path in dict.fromkeys(wanted) if os.path.isdir(path) and path not in ("/", "/usr")]
    return [path for path in found if not any(path != other and Path(other) in Path(path).parents for other in found)]


# ------------------------------------------------------------------------------------------------------------ a thread


class _Thread:
    pid = None

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def kill(self) -> None:
        pass

    async def epitaph(self) -> str:
        return "its thread ended"


class ThreadLauncher:
    """A thread of this process. `load`: what makes the engine."""

    mode = "thread"

    def __init__(self, load: LoadEngine = load_engine) -> None:
        self._load = load

    def seeing(self, folder: str) -> Launcher:
        return self

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Child]:
        def run() -> None:
            with theirs:
                serve(Line(theirs), self._load, lambda _: None)

        thread = threading.Thread(target=run, name="engine", daemon=True)
        thread.start()
        try:
            yield _Thread(thread)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                while thread.is_alive():
                    await trio.sleep(0.002)


async def launcher(isolation: str, module: str = ENGINE) -> Launcher:
    """By the setting `engine.isolation`; `module` is what runs in a process, where there is one. Raises `ModelError` when it asks
    for what this machine has not."""
    if isolation == "thread":
        return ThreadLauncher()
    if isolation in ("auto", "bwrap"):
        program = shutil.which("bwrap")
        bubblewrap = BubblewrapLauncher(program, module) if program else None
        trouble = await bubblewrap.works() if bubblewrap else "it is not installed"
        if bubblewrap and not trouble:
            return bubblewrap
        if isolation == "bwrap":
            raise ModelError(
                f"bubblewrap does not work here: {trouble}", hint="install bubblewrap, or set engine.isolation"
            )
        log.warning("engines run as plain children, without bubblewrap: %s", trouble)
    return ProcessLauncher(module)
