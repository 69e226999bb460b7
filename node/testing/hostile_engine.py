"""An engine that was taken over: the process of an engine, behind the walls of one, that then tries to break out.

Product code: tests start it in place of `node.runtime.child`, as `python -m node.testing.hostile_engine FD MODE`. It raises the
walls as an engine does, takes orders over its line, tries, and says what it got: one JSON object a line. It harms nothing but
itself: what it could fill or kill, it stops at a bound that proves the point.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from node import syscalls
from node.runtime import wire
from node.runtime.walls import raise_walls

ENOUGH: Final = 200 << 20
"""Bytes beyond the limit that prove that there is none."""
FORKS: Final = 40
UNFILTERED: Final = "unfiltered"
"""As the device: the walls as they were before `node.syscalls`, to see the attacks succeed."""
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_NUMBERS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "bpf": (321, 280),
        "userfaultfd": (323, 282),
        "io_uring_setup": (425, 425),
        "perf_event_open": (298, 241),
        "keyctl": (250, 219),
        "add_key": (248, 217),
        "memfd_create": (319, 279),
        "pidfd_open": (434, 434),
        "shmget": (29, 194),
    }
)
"""System calls by their numbers on x86-64 and on arm64."""


def _call(name: str, *arguments: Any) -> int:
    """Its result, or the negative error."""
    number = _NUMBERS[name][os.uname().machine == "aarch64"]
    found = int(_LIBC.syscall(ctypes.c_long(number), *arguments))
    return found if found >= 0 else -ctypes.get_errno()


def _tried(attempt: Callable[[], object]) -> object:
    """What an attempt gave, or the name of the error that stopped it."""
    try:
        return attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except MemoryError:
        return "ENOMEM"


def read(path: str) -> object:
    return _tried(lambda: len(os.listdir(path)) if os.path.isdir(path) else len(Path(path).read_bytes()))


def write(path: str) -> object:
    """Write one byte into a file, made where it is missing; in a folder, into a new file."""

    def attempt() -> str:
        target = os.path.join(path, "planted") if os.path.isdir(path) else path
        with open(target, "ab") as file:
            file.write(b"\n")
        return "written"

    return _tried(attempt)


def connect(kind: str, address: Any) -> object:
    """`kind`: tcp, unix (a path, or an abstract name that begins with @) or vsock."""
    family = {"tcp": socket.AF_INET, "unix": socket.AF_UNIX, "vsock": 40}[kind]

    def attempt() -> str:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            if kind == "vsock":
                return "made"  # whoever is behind it is outside of every network namespace
            trial.settimeout(2)
            trial.connect(tuple(address) if kind == "tcp" else address.replace("@", "\0", 1))
            return "connected"

    return _tried(attempt)


def processes() -> object:
    return _tried(lambda: sum(name.isdigit() for name in os.listdir("/proc")))


def kill(pid: int) -> object:
    return _tried(lambda: os.kill(pid, 0) or "reached")


def fork(_: object) -> object:
    """How many children it gets that stay."""
    made: list[int] = []

    def attempt() -> int:
        while len(made) < FORKS:
            pid = os.fork()
            if pid == 0:
                time.sleep(5)
                os._exit(0)
            made.append(pid)
        return len(made)

    try:
        return _tried(attempt)
    finally:
        for pid in made:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def fill(folder: str) -> object:
    """Bytes that it gets into a folder."""

    def attempt() -> int:
        with open(os.path.join(folder, "full"), "wb") as file:
            try:
                for _ in range(ENOUGH >> 20):
                    file.write(bytes(1 << 20))
                file.flush()
            finally:
                os.unlink(file.name)
            return ENOUGH

    return _tried(attempt)


def grab(how: str) -> object:
    """Bytes of memory that it gets: private, shared or memfd."""

    def attempt() -> int:
        if how == "memfd":
            descriptor = _call("memfd_create", b"x", 0)
            if descriptor < 0:
                raise OSError(-descriptor, "memfd")
            for _ in range(ENOUGH >> 20):
                os.write(descriptor, bytes(1 << 20))
            os.close(descriptor)
            return ENOUGH
        flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if how == "shared" else mmap.MAP_PRIVATE)
        with mmap.mmap(-1, ENOUGH, flags=flags) as memory:
            for at in range(0, ENOUGH, 4096):
                memory[at] = 1
            return ENOUGH

    return _tried(attempt)


def system(name: str) -> object:
    """A system call with nothing in it: EPERM, ENOSYS or EACCES is a closed door."""
    arguments = {"keyctl": (0, ctypes.c_long(-3), 0), "shmget": (0, 4096, 0o600), "memfd_create": (b"x", 0)}
    found = _call(name, *arguments.get(name, (0, 0, 0, 0, 0)))
    return found if found >= 0 else errno.errorcode[-found]


def run(program: str) -> object:
    return _tried(lambda: os.spawnv(os.P_WAIT, program, [program, "-c", "exit 7"]))


def unshare(flags: int) -> object:
    return _tried(lambda: "done" if _LIBC.unshare(flags) == 0 else errno.errorcode[ctypes.get_errno()])


def outlive(_: object) -> object:
    """Not to die with whoever started us."""
    return _LIBC.prctl(1, 0, 0, 0, 0)


def unlimit(_: object) -> object:
    """Have the limit on memory taken away."""
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, infinite)
    except (ValueError, OSError):
        return "EPERM"
    return "done"


def descriptors(_: object) -> object:
    """What is open, but for this look itself."""
    return sorted(
        {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")}
    )


ATTACKS: Final[Mapping[str, Callable[..., object]]] = MappingProxyType(
    {
        one.__name__: one
        for one in (read, write, connect, kill, fork, fill, grab, system, run, unshare, outlive, unlimit, descriptors)
    }
)


def main(argv: list[str]) -> int:
    line = socket.socket(fileno=int(argv[1]))
    with line, line.makefile("rwb") as speech:
        load = json.loads(speech.readline())
        device, limit, hidden = load.get("device", "cpu"), load["memory_limit"], tuple(load["hidden"])
        if device == UNFILTERED:
            syscalls.refuse = lambda **_: False
        wanted = wire.Load(load["folder"], device, "float32", 1, 0, 1, limit, hidden=hidden)
        walls = raise_walls(wanted, alone=argv[2] == "alone")
        answer: object = {name: getattr(walls, name) for name in wire.Walls.__struct_fields__}
        while True:
            speech.write(json.dumps(answer).encode() + b"\n")
            speech.flush()
            order = speech.readline()
            if not order:
                return 0
            name, *arguments = json.loads(order)
            if name == "processes":
                answer = processes()
            elif name == "sleep":
                time.sleep(3600)
            else:
                answer = ATTACKS[name](*arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
