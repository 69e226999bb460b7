"""Compiled kernels go from engine to engine by way of a process that saw no model, and of nothing else (M10)."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

pytest.importorskip("torch")
pytest.importorskip("numba")

from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.runtime import kernel_child, kernels, wire
from node.runtime.backend import TorchBackend, open_backend
from node.runtime.engine_settings import EngineSettings
from node.runtime.host import EngineHost
from node.runtime.kernels import FILE, CompiledKernels, compiled_kernels
from node.runtime.launch import Child, Launcher, ProcessLauncher, ThreadLauncher, launcher
from node.runtime.supervisor import Limits
from protocol.messages import ChatMessage, Params

NAME = "write uint16"


@pytest.fixture(scope="module")
def made() -> wire.Kernels:
    """By the compiler's own process."""
    program = (
        "import sys, msgspec; from node.runtime.kernel_child import answer;"
        "sys.stdout.buffer.write(answer(msgspec.msgpack.encode(sys.argv[1:])))"
    )
    names = [
        NAME,
        "turn uint16",
        "attend uint16 64",
        "attend uint16 64 0 False",
        "attend uint16 64 999999 False",
        "attend uint16 x 1 True",
        "nothing 3",
        "turn turn",
    ]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, check=True)
    return msgspec.msgpack.decode(done.stdout, type=wire.Kernels)


def test_only_what_has_a_name_is_compiled(made: wire.Kernels) -> None:
    assert [kernel.name for kernel in made.kernels] == [NAME, "turn uint16"]


PROGRAM = """
import logging, sys, msgspec, numpy as np, torch
from node.runtime import wire
from node.runtime.engine.kernels.book import BOOK, ObjectCode
logging.basicConfig(level=logging.WARNING)
for given in msgspec.msgpack.decode(sys.stdin.buffer.read(), type=list[wire.Kernels]):
    BOOK.give(given.stamp, [ObjectCode(*msgspec.structs.astuple(one)) for one in given.kernels])
    from node.runtime.engine.kernels import attention
    attention.write.cache_clear()
    BOOK.compiled.clear()
    run = attention.write(np.uint16)
    kv, slots, cache = torch.randn(2, 3, 5).bfloat16(), torch.tensor([4, 1]), torch.zeros(3, 6, 5).bfloat16()
    run(2, 3, 5, 15, kv.data_ptr(), slots.data_ptr(), 6, cache.data_ptr())
    assert torch.equal(cache[:, [4, 1]].transpose(0, 1), kv)
    print(*BOOK.compiled)
"""


def used(*given: wire.Kernels) -> tuple[list[str], list[str]]:
    """What a process compiles when it wants `NAME` and tries it, given each of these in turn; and what it logs."""
    data = msgspec.msgpack.encode(given)
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=data, capture_output=True, check=True)
    return done.stdout.decode().splitlines(), done.stderr.decode().splitlines()


def test_a_kernel_that_was_given_is_not_compiled(made: wire.Kernels) -> None:
    assert used(made) == ([""], [])


def test_of_another_stamp_or_not_what_it_says_it_is_compiled(made: wire.Kernels) -> None:
    """Stale: other versions, processor or source. Else sound code under a wrong name or number, or cut off."""
    write, turn = made.kernels
    wrong = (
        msgspec.structs.replace(turn, name=NAME),
        msgspec.structs.replace(write, number=write.number + 1),
        msgspec.structs.replace(write, tags=()),
        msgspec.structs.replace(write, module=b"BC" + bytes(100)),
    )
    compiled, said = used(
        wire.Kernels("0" * 64, made.kernels), *(wire.Kernels(made.stamp, (kernel,)) for kernel in wrong)
    )
    assert compiled == [NAME] * 5
    assert sum("compiled again" in line for line in said) == 4


# ------------------------------------------------------------------------------------------------------------ the file


class Nobody:
    pid = None

    def kill(self) -> None: ...

    async def epitaph(self) -> str:
        return "ended"


class Compiler(ThreadLauncher):
    """Answers as the compiler's process does, without one."""

    mode = "bwrap"

    def __init__(self, answer: Callable[[list[str]], bytes]) -> None:
        super().__init__()
        self.answer, self.asked = answer, list[list[str]]()

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Child]:
        async def serve() -> None:
            theirs.setblocking(False)
            with trio.socket.from_stdlib_socket(theirs) as sock:
                names = msgspec.msgpack.decode(await sock.recv(1 << 16), type=list[str])
                self.asked.append(names)
                await trio.SocketStream(sock).send_all(self.answer(names))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield Nobody()


def kept(folder: Path, made: wire.Kernels) -> CompiledKernels:
    """After `learn` of all that was made."""
    store = CompiledKernels(folder, Compiler(lambda _: msgspec.msgpack.encode(made)))
    store.read()
    trio.run(store.learn, [kernel.name for kernel in made.kernels])
    return store


def again(folder: Path) -> wire.Kernels | None:
    """What a later node reads."""
    store = CompiledKernels(folder, Compiler(lambda _: b""))
    store.read()
    return store.given


def test_what_one_node_kept_the_next_one_gives(tmp_path: Path, made: wire.Kernels) -> None:
    folder = tmp_path / "kernels"
    assert kept(folder, made).given == made
    assert again(folder) == made
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / FILE).stat().st_mode & 0o777 == 0o600
    assert os.listdir(folder) == [FILE]


def test_new_ones_join_old_ones_of_the_same_stamp_and_replace_others(tmp_path: Path, made: wire.Kernels) -> None:
    first, second = (wire.Kernels(made.stamp, (kernel,)) for kernel in made.kernels)
    stale = wire.Kernels("0" * 64, (msgspec.structs.replace(made.kernels[0], name="write float32"),))
    assert kept(tmp_path / "a", first).given == first
    store = CompiledKernels(tmp_path / "a", Compiler(lambda _: msgspec.msgpack.encode(second)))
    store.read()
    trio.run(store.learn, ["turn uint16"])
    assert store.given == again(tmp_path / "a") == made
    assert kept(tmp_path / "b", stale).given == stale
    assert kept(tmp_path / "b", made).given == again(tmp_path / "b") == made


@pytest.mark.parametrize("how", ["file", "folder", "owner", "link", "damaged", "short", "huge", "foreign", "pipe"])
def test_a_file_that_another_may_have_written_is_not_read(
    how: str, tmp_path: Path, made: wire.Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """M10."""
    folder = tmp_path / "kernels"
    kept(folder, made)
    file = folder / FILE
    assert again(folder) is not None
    match how:
        case "file":
            file.chmod(0o620)
        case "folder":
            folder.chmod(0o702)
        case "owner":
            us = os.geteuid()
            monkeypatch.setattr(kernels.os, "geteuid", lambda: us + 1)
        case "link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        case "damaged":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        case "short":
            file.write_bytes(file.read_bytes()[:-1])
        case "huge":
            file.write_bytes(bytes(kernels.LIMIT + 2))
        case "foreign":
            data = msgspec.msgpack.encode(("nothing", 1))
            file.write_bytes(hashlib.sha256(data).digest() + data)
        case "pipe":
            file.unlink()
            os.mkfifo(file, 0o600)
    assert again(folder) is None
    assert "are not used" in caplog.text


def test_nothing_is_written_where_others_may_write(
    tmp_path: Path, made: wire.Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    """This node's engines have them all the same."""
    tmp_path.chmod(0o777)
    assert kept(tmp_path, made).given == made
    assert os.listdir(tmp_path) == []
    assert "cannot be kept" in caplog.text


def test_an_engine_may_ask_for_each_name_once(tmp_path: Path, made: wire.Kernels) -> None:
    """It is not trusted: that it always compiles itself must not keep a compiler busy for ever."""
    compiler = Compiler(lambda _: msgspec.msgpack.encode(made))
    store = CompiledKernels(tmp_path / "kernels", compiler)
    for _ in range(3):
        trio.run(store.learn, [NAME, NAME, "nothing 3"])
    trio.run(store.learn, [f"nothing {n}" for n in range(1000)])
    trio.run(store.learn, ["one more"])
    assert compiler.asked[0] == [NAME, "nothing 3"]
    assert sum(map(len, compiler.asked)) == wire.KERNELS


@pytest.mark.parametrize("answer", [b"", b"\x00", bytes(kernels.LIMIT + 1)], ids=["none", "nonsense", "too much"])
def test_a_compiler_that_fails_costs_nothing(answer: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CompiledKernels(tmp_path / "kernels", Compiler(lambda _: answer))
    trio.run(store.learn, [NAME])
    assert store.given is None
    assert "go on compiling" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_name_is_of_a_closed_form() -> None:
    for name in ("../x", "Write uint16", "write  uint16", "write uint16 ", "write " + "9" * 9, "write 1 2 3 4 5"):
        with pytest.raises(msgspec.ValidationError):
            kernel_child.answer(msgspec.msgpack.encode([name]))


def test_plain_children_share_nothing(tmp_path: Path) -> None:
    """M10: they could write the file."""
    for engines in (ProcessLauncher(), ThreadLauncher()):
        assert trio.run(compiled_kernels, tmp_path, engines) is None


# --------------------------------------------------------------------------------------------------------- from end to end


async def answered(backend: TorchBackend, manifest: Manifest) -> str:
    prompt = backend.prepare(manifest.id, [ChatMessage(role="user", content="hello")])
    async with aclosing(backend.generate(prompt, Params(max_tokens=20, temperature=0))) as steps:
        return "".join([step.text async for step in steps])


def test_the_second_start_compiles_nothing(make_chat_model: Callable[..., Path], tmp_path: Path) -> None:
    """After a death, and in another node."""
    store = ModelStore(tmp_path / "models")
    manifest = store.add_folder(make_chat_model(hidden_size=96, head_dim=16), "tiny")
    settings = EngineSettings(
        cache_bytes=1 << 20, dtype="bfloat16", kernels=tmp_path / "kernels", limits=Limits(backoff_s=0.02)
    )

    async def main() -> None:
        walled: Launcher = await launcher("auto")
        if walled.mode != "bwrap":
            pytest.skip("bubblewrap does not work here")
        with trio.fail_after(200):
            async with open_backend(store, [manifest], settings) as backend:
                host = backend.fleet.residents[manifest.id].engine()
                assert host.facts is not None
                assert "attend uint16 16 3 False" in host.facts.compiled
                wanted = await answered(backend, manifest)
                while not (tmp_path / "kernels" / FILE).exists():
                    await trio.sleep(0.05)
                assert host.pid is not None
                os.kill(host.pid, signal.SIGKILL)
                assert await answered(backend, manifest) == wanted
                assert host.deaths == 1
                assert host.facts.compiled == ()
            async with open_backend(store, [manifest], settings) as backend:
                host = backend.fleet.residents[manifest.id].engine()
                assert host.facts is not None
                assert host.facts.compiled == ()
                assert await answered(backend, manifest) == wanted

    trio.run(main)


def test_an_engine_that_cannot_be_started_again_is_tried_without(made: wire.Kernels) -> None:
    """A compiled kernel that ends the process, as LLVM does where a symbol is missing, is not what keeps a model away."""
    given = list[bool]()

    class Dying(ThreadLauncher):
        @asynccontextmanager
        async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Child]:
            async def act() -> None:
                reader = wire.TO_ENGINE.reader()
                with trio.socket.from_stdlib_socket(theirs) as sock:
                    loads = list[wire.ToEngine]()
                    while not loads:
                        loads += reader.feed(await sock.recv(1 << 16))
                    assert isinstance(loads[0], wire.Load)
                    given.append(loads[0].kernels is not None)
                    if len(given) == 1 or not given[-1]:
                        ready = wire.Ready(1000, 97, "0" * 32, (96,), 1000, 1000)
                        await trio.SocketStream(sock).send_all(wire.TO_NODE.frame(ready))
                        await trio.sleep(0.1 if len(given) == 1 else 1000)

            theirs.setblocking(False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(act)
                yield Nobody()
                nursery.cancel_scope.cancel()

    async def main() -> None:
        load = wire.Load("/nowhere", "cpu", "float32", 1, 1 << 20, 8, 0)
        host = EngineHost(Dying(), load, limits=Limits(backoff_s=0.01), kernels=lambda: made)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                while len(given) < 2 or not host.ready:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert given == [True, False]


def test_every_family_of_kernels_can_be_asked_for() -> None:
    """Else an engine would compile it at every start, and nobody would notice."""
    from node.runtime.engine.kernels import attention, named, norms, products, race

    there = {
        name
        for module in (attention, norms, products, race)
        for name, made in vars(module).items()
        if hasattr(made, "cache_info") and made.__module__ == module.__name__
    }
    assert there == set(named.FAMILIES)
