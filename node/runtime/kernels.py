"""Compiled kernels from one engine process to the next: a process that sees no model compiles them, once on a machine.

Rules
- An engine's process is not trusted, and compiled kernels are run. So an engine says only *which* it had to compile (names of a
  closed form); `node.runtime.kernel_child` compiles these from our source, behind walls of its own, and what it made goes to
  engines over the line as bytes. No engine's bytes ever reach another engine.
- Only behind bubblewrap: the file here must be out of every engine's reach, and a plain child writes what its user may.
- The file counts only as we left it: ours, writable for nobody else, whole by its hash. Anything else is not read, and engines
  compile as they would without it. What is stale is for the engine to see (`kernels.objects.stamp`); it then says so.
- The node itself runs and unpickles nothing of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import msgspec
import trio

import node.runtime.engine
from node.errors import ModelError
from node.groups import plain_errors
from node.runtime import wire
from node.runtime.launch import Launcher, launcher

log = logging.getLogger(__name__)
LIMIT: Final = 8 << 20
"""Bytes of all kernels together; twenty are 600 kB."""
COMPILE_S: Final = 300.0
CHILD: Final = "node.runtime.kernel_child"
FILE: Final = "kernels.bin"
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(wire.Kernels)


async def compiled_kernels(folder: Path | None, engines: Launcher) -> CompiledKernels | None:
    """What is kept in `folder`, for engines started so; None where they must compile each for itself."""
    if folder is None or engines.mode != "bwrap":
        return None
    kept = CompiledKernels(folder, await launcher("bwrap", CHILD))
    await trio.to_thread.run_sync(kept.read)
    return kept


class CompiledKernels:
    def __init__(self, folder: Path, compiler: Launcher) -> None:
        """`compiler` starts `node.runtime.kernel_child`."""
        self._folder, self._compiler = folder, compiler
        self._asked: set[str] = set()
        self._one = trio.Lock()
        self.given: wire.Kernels | None = None
        """For the next engine."""

    async def learn(self, names: Iterable[str]) -> None:
        """Compile these for later engines. Each name once in a node's life: an engine may claim what it likes."""
        wanted = [name for name in dict.fromkeys(names) if name not in self._asked][: wire.KERNELS - len(self._asked)]
        if not wanted:
            return
        self._asked.update(wanted)
        async with self._one:
            log.info("compiling %d kernels for later starts of engines", len(wanted))
            try:
                with trio.fail_after(COMPILE_S):
                    made = await self._compile(wanted)
            except (ModelError, OSError, trio.TooSlowError, trio.BrokenResourceError, msgspec.DecodeError) as error:
                log.warning("engines go on compiling their kernels: %s", str(error) or "it took too long")
                return
            self.given = _joined(self.given, made)
            await trio.to_thread.run_sync(self.write)

    async def _compile(self, names: list[str]) -> wire.Kernels:
        ours, theirs = socket.socketpair()
        with plain_errors(), ours:
            async with self._compiler.start(theirs, str(Path(node.runtime.engine.__file__).parent)) as child:
                ours.setblocking(False)
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
                await stream.send_all(_encoder.encode(names))
                await stream.send_eof()
                answer = bytearray()
                async for part in stream:
                    answer += part
                    if len(answer) > LIMIT:
                        raise ModelError("the compiled kernels are too large")
                if not answer:
                    raise ModelError(f"the compiler of kernels {await child.epitaph()}")
                return _decoder.decode(answer)

    def read(self) -> None:
        """Take what an earlier node left, if it is sound."""
        try:
            data = _read(self._folder)
            self.given = _decoder.decode(data) if data else None
        except (OSError, ValueError) as error:  # also msgspec's
            log.warning("the compiled kernels in %s are not used: %s", self._folder, error)

    def write(self) -> None:
        """Leave what there is to later nodes, if the folder is sound."""
        data = _encoder.encode(self.given)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check(self._folder.lstat(), "folder")
            with NamedTemporaryFile(dir=self._folder, delete=False) as file:  # 0600
                try:
                    file.write(hashlib.sha256(data).digest() + data)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, self._folder / FILE)
                except OSError:
                    with suppress(OSError):
                        os.unlink(file.name)
                    raise
        except (OSError, ValueError) as error:
            log.warning("compiled kernels cannot be kept in %s: %s", self._folder, error)


def _joined(old: wire.Kernels | None, new: wire.Kernels) -> wire.Kernels:
    """Both where they fit together, else the new ones."""
    if old is None or old.stamp != new.stamp:
        return new
    both = tuple({kernel.name: kernel for kernel in (*old.kernels, *new.kernels)}.values())
    size = sum(len(kernel.code) + len(kernel.module) for kernel in both)
    return wire.Kernels(new.stamp, both) if len(both) <= wire.KERNELS and size <= LIMIT else new


def _read(folder: Path) -> bytes:
    """Empty when there is no file. Raises `OSError`, and `ValueError` for what is not as we left it."""
    try:
        _check(folder.lstat(), "folder")
        descriptor = os.open(folder / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        _check(os.fstat(file.fileno()), "file")
        data = file.read(32 + LIMIT)  # what is longer does not have its hash then
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError("the file is damaged")
    return data[32:]


def _check(found: os.stat_result, what: str) -> None:
    """Raises `ValueError` when anybody else may have written it."""
    if not (stat.S_ISDIR if what == "folder" else stat.S_ISREG)(found.st_mode):
        raise ValueError(f"it is no {what}")
    if found.st_uid != os.geteuid():
        raise ValueError(f"the {what} belongs to another user")
    if found.st_mode & 0o022:
        raise ValueError(f"others may write the {what}")
