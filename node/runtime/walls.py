"""The walls around an engine's process, tried from inside. What is not seen to hold is not reported.

The trials come before anything of a model is read, so it is still our code that says how they went. No packet leaves: connecting
a datagram socket only asks the system for a route.
"""

from __future__ import annotations

import os
import resource
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from node import hardening, syscalls
from node.runtime.wire import Walls

_NOWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses of documentation (RFC 5737, RFC 3849): routed like any other."""


_NAMES = ("network", "keys", "models", "processes", "programs", "cores")


class Load(Protocol):
    """What the walls stand around."""

    @property
    def folder(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def hidden(self) -> tuple[str, ...]: ...
    @property
    def memory_limit(self) -> int: ...


def raise_walls(load: Load, *, alone: bool) -> Walls:
    """Harden this process as far as the system lets us, then try every wall. Call it while there is one thread.

    `alone`: nothing outside has put the process into a network of its own, so it tries to leave ours by itself.
    """
    hardening.harden()
    hardening.die_with_parent()
    if alone:
        hardening.leave_network()
    if load.memory_limit:
        hardening.limit_memory(load.memory_limit)
    syscalls.refuse(cpu_only=load.device.partition(":")[0] == "cpu")
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return Walls(
        network=not any(_reachable(family, address) for family, address in _NOWHERE),
        keys=bool(load.hidden) and not any(map(_readable, load.hidden)),
        models=not _writable(Path(load.folder)),
        processes=_neighbours() == 0,
        programs=not _multiplies(),
        cores=resource.getrlimit(resource.RLIMIT_CORE) == (0, 0),
        memory=0 if soft == resource.RLIM_INFINITY else soft,
    )


def words(mode: str, walls: Walls | None) -> str:
    """What is in force, for the operator. `mode`: bwrap, process or thread."""
    if walls is None:
        return f"{mode}: none, the engine shares the node's process, keys and network"
    held = [name for name in _NAMES if getattr(walls, name)]
    open_ = [name for name in _NAMES if name not in held]
    if walls.memory:
        held.append(f"memory {walls.memory / (1 << 30):.1f} GiB")
    else:
        open_.append("memory")
    return f"{mode}: shut off from {_list(held)}" + (f"; OPEN: {_list(open_)}" if open_ else "")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _reachable(family: socket.AddressFamily, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.connect((address, 9))
    except OSError:
        return False
    return True


def _readable(path: str) -> bool:
    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            with open(path, "rb"):
                pass
    except OSError:
        return False
    return True


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return any(os.access(file, os.W_OK) for file in folder.iterdir())


def _neighbours() -> int:
    """Processes in sight besides this one and at most one more, the sandbox's own."""
    try:
        return max(0, sum(name.isdigit() for name in os.listdir("/proc")) - 2)
    except OSError:
        return 0


def _multiplies() -> bool:
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True
