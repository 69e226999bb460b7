"""The node's end of the line to its signer: start the process, ask, hear that it died.

Asks are pipelined: whatever waits when the line is free travels in one write, and the signer answers all of it from one commit.
A signer that died is not started again behind the caller's back: marks and journal are held against each other at a start, and
only there. Everything asked of it fails, with the reason. One that does not answer in time is as good as dead: whatever it says
later is answered to nobody, since a late answer must never be taken for that of the next question.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

import node
from node.errors import KeyError_, NodeError, SignerError, SignerFailed, SignerLocked, SignerOutdated, SignerRefused
from node.hardening import environment
from node.signer import wire
from node.signer.keys import NO_JOURNAL, Answer, Asked, Follow, Signers, refused
from node.signer.sources import KeySource
from protocol.errors import GristmillError
from protocol.frames import FrameReader, encode_frame
from protocol.signing import KeyRole, Mark, Policy, Signable, SigningReason, SigningRefused
from protocol.signing_history import Ahead, KnownChannel, KnownWord
from protocol.typed_data import Domain

log = logging.getLogger(__name__)
START_S: Final = 60.0
"""A key file's password may cost a second to check; a machine under load much more."""
IDENTITY_S: Final = 5.0
"""How long libp2p, and the whole event loop with it, waits for a signature: a disk that is busy may take that long. Once."""
ASK_S: Final = 30.0
"""How long an ask may take, with all that waits before it."""
GRACE_S: Final = 2.0
"""What an ask that is cancelled still waits for its answer, so that in the ordinary run of things nobody is left not knowing what
was signed; and what an answer has that came while our own loop stood still."""
_READ: Final = 1 << 18
_PART: Final = 1024
"""Channels, and words, per message at a start."""
_ERRORS: Final[dict[str, type[NodeError]]] = {
    one.code: one for one in (KeyError_, SignerError, SignerFailed, SignerLocked, SignerOutdated)
}


class ProcessSigners(Signers):
    """Keys in a process of their own. Made by `open_process`."""

    def __init__(
        self, ready: wire.Ready, stream: trio.SocketStream, identity: socket.socket, reader: FrameReader
    ) -> None:
        public = {KeyRole(role): key for role, key in ready.public_keys.items()}
        witness = Mark(ready.seq, ready.hash) if ready.seq else None
        super().__init__(public, ready.table, empty=ready.empty, witness=witness)
        self._stream = stream
        self._identity = identity
        self._identity_lock = threading.Lock()
        self._identity_next = 0
        self._reader = reader
        self._following = Follow()
        self._failure: str | None = None
        self._next = 0
        self._outbox: list[tuple[int, tuple[wire.WireRequest, ...]]] = []
        self._waiting: dict[int, trio.Event] = {}
        self._answers: dict[int, tuple[wire.WireAnswer, ...]] = {}
        self._poke = trio.Event()
        self._met: trio.MemorySendChannel[wire.Met]
        self._meetings: trio.MemoryReceiveChannel[wire.Met]
        self._met, self._meetings = trio.open_memory_channel(1)
        self._error: NodeError | None = None
        self.closing = False
        """Its end is wanted, and no news."""

    @property
    def failure(self) -> str | None:
        return self._failure

    async def ask(self, asked: Sequence[Asked]) -> list[Answer]:
        return await self._ask([wire.to_wire(*one) for one in asked])

    async def weigh(self, role: KeyRole, struct: Signable, domain: Domain) -> None:
        (answer,) = await self._ask([wire.to_wire(role, struct, domain, dry=True)])
        if isinstance(answer, SignerRefused):
            raise answer

    async def _ask(self, asked: Sequence[wire.WireRequest]) -> list[Answer]:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._alive()
        number = self._next
        self._next += 1
        self._outbox.append((number, tuple(asked)))
        self._poke.set()
        answered = self._waiting[number] = trio.Event()
        try:
            await self._wait(answered)
        finally:
            self._waiting.pop(number, None)
        if number not in self._answers:
            self._alive()
        return [_answer(one) for one in self._answers.pop(number)]

    async def _wait(self, answered: trio.Event) -> None:
        """Returns when there is an answer, or none to come. Cancelled, it gives up after `GRACE_S`."""
        try:
            with trio.move_on_after(ASK_S):
                await answered.wait()
                return
            await self._a_moment(answered)
            if not answered.is_set():
                self._fail(SignerFailed(f"the signer has not answered for {ASK_S:g} s", hint="start again"))
        except trio.Cancelled:
            await self._a_moment(answered)
            if not answered.is_set():
                raise

    async def _a_moment(self, answered: trio.Event) -> None:
        with trio.move_on_after(GRACE_S, shield=True):
            await answered.wait()

    def ask_identity(self, role: KeyRole, data: bytes) -> bytes:
        self._alive()
        name = role.value.encode()
        try:
            with self._identity_lock:
                number = self._identity_next.to_bytes(8)
                self._identity_next += 1
                self._identity.sendall(encode_frame(number + bytes((len(name),)) + name + data, wire.LIMIT))
                said = self._one_frame()
        except OSError as error:
            self._fail(SignerFailed(f"the signer does not answer: {error}", hint="start again"))
        else:
            if said[:8] != number:
                self._fail(SignerFailed("the signer answered another question than it was asked", hint="start again"))
        self._alive()
        if said[8:9] != b"\1":
            raise SignerRefused(SigningReason.KIND, said[9:].decode(errors="replace"))
        return said[9:]

    def _one_frame(self) -> bytes:
        """Raises `OSError`."""
        reader = FrameReader(wire.LIMIT)
        while True:
            data = self._identity.recv(4096)
            if not data:
                raise ConnectionResetError("it has ended")
            for payload in reader.feed(data):
                return payload

    async def meet(
        self,
        channels: Iterable[KnownChannel],
        head: Mark,
        *,
        adopting: bool,
        lost: bool = False,
        words: Sequence[KnownWord] = (),
        following: Follow,
    ) -> list[Ahead]:
        self._alive()
        known = [wire.channel_to_wire(one) for one in channels]
        said = [wire.word_to_wire(one) for one in words]
        starts = range(0, max(len(known), len(said), 1), _PART)
        for start in starts:
            part, more = tuple(known[start : start + _PART]), tuple(said[start : start + _PART])
            last = start == starts[-1]
            await self._send(wire.Meet(part, more, head.value, head.digest, adopting, lost, last))
        try:
            with trio.fail_after(START_S):
                met = await self._meetings.receive()
        except trio.TooSlowError:
            self._fail(SignerFailed(f"the signer has not looked through the journal in {START_S:g} s"))
            self._alive()
            raise
        except trio.EndOfChannel:
            self._alive()
            raise SignerFailed("the signer has ended") from None
        self._following = following
        return [wire.ahead_from_wire(one) for one in met.ahead]

    # ------------------------------------------------------------------------------------------------------- the line

    async def run(self) -> None:
        """Carry asks and answers until the line ends; then let everybody who waits know."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._fail(SignerFailed(self._failure or "the signer has ended", hint="start again"))

    async def _write(self) -> None:
        while True:
            await self._poke.wait()
            self._poke = trio.Event()
            while self._outbox:
                asks, self._outbox = self._outbox[: wire.MAX_BATCH], self._outbox[wire.MAX_BATCH :]
                head = self._following.head()
                await self._send(wire.Batch(head.value, head.digest, tuple(asks)))

    async def _send(self, message: wire.ToSigner) -> None:
        try:
            await self._stream.send_all(wire.frame(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the reader hears of it, and of the reason

    async def _read(self) -> None:
        while True:
            try:
                data = await self._stream.receive_some(_READ)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                return
            try:
                for payload in self._reader.feed(bytes(data)):
                    self._take(wire.read_by_node(payload))
            except (msgspec.DecodeError, GristmillError) as error:
                self._fail(SignerFailed(f"the signer's line makes no sense: {error}"))
                return

    def _take(self, message: wire.ToNode) -> None:
        if self._failure is not None:  # what was asked has failed; it is not answered after all
            return
        match message:
            case wire.Answers():
                for number, answers in message.answers:
                    answered = self._waiting.pop(number, None)
                    if answered is not None:  # nobody waits any more for an ask that was given up
                        self._answers[number] = answers
                        answered.set()
            case wire.Met():
                self._met.send_nowait(message)
            case wire.Failed():
                self._fail(_error(message))
            case wire.Ready():
                raise SignerFailed("a signer that starts twice")

    def _fail(self, error: NodeError) -> None:
        if self._failure is None:
            self._failure, self._error = error.message, error
            if not self.closing:
                log.error("the signer is gone: %s", error.message)
        self._met.close()
        for answered in self._waiting.values():
            answered.set()
        self._waiting.clear()

    def _alive(self) -> None:
        if self._error is not None:
            raise type(self._error)(self._error.message, hint=self._error.hint)


@asynccontextmanager
async def open_process(
    keys: Mapping[KeyRole, KeySource], policy: Policy, path: Path | None
) -> AsyncIterator[ProcessSigners]:
    """A signer for the length of the block; its table is at `path`; None: in memory. Raises `KeyError_`, `SignerError`."""
    ours, theirs = socket.socketpair()
    identity, their_identity = socket.socketpair()
    identity.settimeout(IDENTITY_S)
    with ours, theirs, identity, their_identity:
        child = await _spawn(theirs, their_identity)
        theirs.close()
        their_identity.close()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        reader = FrameReader(wire.LIMIT)
        try:
            start = wire.Start({role.value: source for role, source in keys.items()}, policy, str(path or ""))
            signers = ProcessSigners(await _start(stream, reader, start), stream, identity, reader)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(signers.run)
                try:
                    yield signers
                finally:
                    signers.closing = True
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()  # the end of the line is the end of the process
                identity.close()
                await _reap(child)


async def _spawn(*sockets: socket.socket) -> subprocess.Popen[bytes]:
    """The same interpreter and the same tree as ours, nothing of our environment but what it needs."""
    root = str(Path(node.__file__).resolve().parents[1])
    env = environment(PYTHONPATH=root)
    descriptors = [one.fileno() for one in sockets]
    command = [sys.executable, "-P", "-m", "node.signer", *map(str, descriptors)]
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    try:
        return subprocess.Popen(command, pass_fds=descriptors, env=env, cwd="/", start_new_session=True, **options)
    except OSError as error:
        raise SignerError(f"the signer's process cannot be started: {error}") from error


async def _start(stream: trio.SocketStream, reader: FrameReader, start: wire.Start) -> wire.Ready:
    try:
        with trio.fail_after(START_S):
            await stream.send_all(wire.frame(start))
            while True:
                data = await stream.receive_some(_READ)
                if not data:
                    raise SignerFailed("the signer ended before it was ready")
                for payload in reader.feed(bytes(data)):
                    message = wire.read_by_node(payload)
                    if isinstance(message, wire.Ready):
                        return message
                    raise _error(message) if isinstance(message, wire.Failed) else SignerFailed("no start")
    except (trio.BrokenResourceError, msgspec.DecodeError) as error:
        raise SignerFailed(f"the signer ended before it was ready: {error}") from error
    except trio.TooSlowError:
        raise SignerFailed(f"the signer was not ready after {START_S:g} s") from None


async def _reap(child: subprocess.Popen[bytes]) -> None:
    with trio.move_on_after(5):
        while child.poll() is None:
            await trio.sleep(0.005)
        return
    child.kill()
    child.wait()


def _answer(answer: wire.WireAnswer) -> Answer:
    if answer.reason:
        return refused(SigningRefused(SigningReason(answer.reason), answer.detail))
    return answer.signature


def _error(failed: wire.Failed) -> NodeError:
    return _ERRORS.get(failed.code, SignerError)(failed.message, hint=failed.hint)


__all__ = ["NO_JOURNAL", "ProcessSigners", "open_process"]
