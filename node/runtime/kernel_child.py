"""Compiles kernels for engines: `python -m node.runtime.kernel_child FD`, started by a node with one inherited socket.

It sees no model, no key and no network, and is told nothing but names. What it sends is run by engines.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Final

import msgspec

from node import hardening
from node.runtime import wire
from node.runtime.footprint import HEADROOM

_READ: Final = 1 << 16


def answer(request: bytes) -> bytes:
    """`wire.Kernels` of the names asked for. Raises `msgspec.DecodeError`."""
    names = msgspec.msgpack.decode(request, type=list[wire.KernelName])
    from node.runtime.engine.kernels import named, objects

    made = named.by_names(names)
    fields = wire.Kernel.__struct_fields__
    kernels = tuple(wire.Kernel(*(getattr(kernel, name) for name in fields)) for kernel in made)
    return msgspec.msgpack.encode(wire.Kernels(objects.stamp(), kernels))


def main(argv: list[str]) -> int:
    if len(argv) != 3 or not argv[1].isdecimal() or argv[2] not in ("alone", "walled"):
        sys.exit("error: this compiles kernels for a node's engines; a node starts it itself")
    hardening.harden()
    hardening.die_with_parent()
    if argv[2] == "alone":
        hardening.leave_network()
    hardening.limit_memory(HEADROOM)
    os.nice(19)  # engines are at work beside it
    with socket.socket(fileno=int(argv[1])) as sock:
        request = b""
        while part := sock.recv(_READ):
            request += part
        sock.sendall(answer(request))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
