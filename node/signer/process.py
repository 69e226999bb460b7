"""The signer's process: it holds the keys, and does nothing but read requests, judge them, store marks and sign.

Rules
- No secret is an argument or in the environment: `Start` brings password or key over an inherited socket, once.
- The process is not dumpable: no core file, and no debugger of the same user reads its memory. It opens no network socket.
- It dies with its node: the end of the line is the end of the process. Ctrl-C is the node's to handle.
- The first message sets the policy. Nothing that comes later changes it.
- What the node sends is typed and bounded; what is not understood ends the process, since the node has gone wrong.

All requests that wait share one commit. libp2p's messages have a line of their own, on which the node waits for the answer;
each question has a number of 8 bytes, and its answer begins with it.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from node.errors import NodeError, SignerError, SignerFailed
from node.hardening import harden
from node.signer import wire
from node.signer.core import Answer, Core
from node.signer.sources import open_key
from node.signer.table import Table
from protocol.errors import GristmillError, InvalidValue
from protocol.frames import FrameReader, encode_frame
from protocol.identity import MAX_BYTES, IdentityMessage
from protocol.signing import KeyRole, Mark, Request, SigningReason, SigningRefused, request
from protocol.signing_history import KnownChannel, KnownWord

IDENTITY_LIMIT: Final = MAX_BYTES + 64
_READ: Final = 1 << 18


class Line:
    """The signer's end of the socket to its node."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._reader = FrameReader(wire.LIMIT)

    def receive(self) -> Iterator[wire.ToSigner]:
        """The messages of one read. Raises `EOFError` when the node is gone, `SignerFailed` when it makes no sense."""
        data = self.sock.recv(_READ)
        if not data:
            raise EOFError
        try:
            for payload in self._reader.feed(data):
                yield wire.read_by_signer(payload)
        except (msgspec.DecodeError, GristmillError) as error:
            raise SignerFailed(f"the node sent what is no message: {type(error).__name__}") from None

    def first(self) -> wire.Start:
        """The first message, alone."""
        while True:
            for message in self.receive():
                if not isinstance(message, wire.Start):
                    raise SignerFailed("the first message is not a start")
                return message

    def send(self, message: wire.ToNode) -> None:
        self.sock.sendall(wire.frame(message))


def open_core(start: wire.Start) -> Core:
    """Open the keys and the table. Raises `NodeError`."""
    keys = {KeyRole(role): open_key(source) for role, source in start.keys.items()}
    accounts = {role: key.address for role, key in keys.items()}
    table = Table.open(Path(start.table), accounts) if start.table else Table.in_memory(accounts)
    return Core(keys, start.policy, table, time.time)


def ready(core: Core) -> wire.Ready:
    witness = core.witness or Mark(0)
    public = {role.value: key.public_key for role, key in core.keys.items()}
    return wire.Ready(public, core.table.identity, core.table.empty, witness.value, witness.digest)


class Server:
    """Serves one node until it is gone."""

    def __init__(self, core: Core, line: Line, identity: socket.socket) -> None:
        self._core = core
        self._line = line
        self._identity = identity
        self._identity_reader = FrameReader(IDENTITY_LIMIT)
        self._known: list[KnownChannel] = []
        self._words: list[KnownWord] = []

    def run(self) -> None:
        """Returns when the node is gone. Raises `NodeError`."""
        poll = select.poll()
        for one in (self._line.sock, self._identity):
            poll.register(one, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                try:
                    if descriptor == self._identity.fileno():
                        self._serve_identity()
                    else:
                        self._serve()
                except EOFError:
                    return

    def _serve(self) -> None:
        batches: list[wire.Batch] = []
        for message in self._line.receive():
            match message:
                case wire.Batch():
                    batches.append(message)
                case wire.Meet():
                    self._meet(message)
                case _:
                    raise SignerFailed("a signer is started once")
        if batches:
            self._line.send(self._answer(batches))

    def _meet(self, message: wire.Meet) -> None:
        self._known += map(wire.channel_from_wire, message.channels)
        self._words += map(wire.word_from_wire, message.words)
        if message.last:
            known, self._known = self._known, []
            words, self._words = self._words, []
            head = Mark(message.seq, message.hash)
            ahead = self._core.meet(known, head, adopting=message.adopting, lost=message.lost, words=words)
            self._line.send(wire.Met(tuple(map(wire.ahead_to_wire, ahead))))

    def _answer(self, batches: list[wire.Batch]) -> wire.Answers:
        asks = [(number, [self._read(one) for one in asked]) for batch in batches for number, asked in batch.asks]
        sound = [one for _, asked in asks for one in asked if isinstance(one, Request)]
        witness = Mark(batches[-1].seq, batches[-1].hash)
        done = iter(self._core.handle(sound, witness))
        return wire.Answers(
            tuple(
                (number, tuple(_written(next(done) if isinstance(one, Request) else one) for one in asked))
                for number, asked in asks
            )
        )

    def _read(self, asked: wire.WireRequest) -> Request | Answer:
        """What is to be signed, or the answer already. What is asked dry is judged by what was stored before its batch."""
        try:
            found = wire.from_wire(asked)
        except InvalidValue as error:
            return SigningRefused(SigningReason.KIND, str(error))
        return (self._core.weigh(found) or b"") if asked.dry else found

    def _serve_identity(self) -> None:
        data = self._identity.recv(_READ)
        if not data:
            raise EOFError
        for payload in self._identity_reader.feed(data):
            number, payload = payload[:8], payload[8:]
            role, rest = KeyRole(payload[1 : 1 + payload[0]].decode()), payload[1 + payload[0] :]
            try:
                asked = request(role, IdentityMessage.decode(rest), None)
                answer = self._core.handle([asked])[0]
            except InvalidValue as error:
                answer = SigningRefused(SigningReason.KIND, str(error))
            said = b"\0" + str(answer).encode()[:1000] if isinstance(answer, SigningRefused) else b"\1" + answer
            self._identity.sendall(encode_frame(number + said, IDENTITY_LIMIT))


def _written(answer: Answer) -> wire.WireAnswer:
    if isinstance(answer, SigningRefused):
        return wire.WireAnswer(b"", answer.reason.value, answer.detail[:500])
    return wire.WireAnswer(answer)


def main(line: socket.socket, identity: socket.socket) -> int:
    """The whole life of a signer; returns its exit status."""
    harden()
    node = Line(line)
    core: Core | None = None
    try:
        core = open_core(node.first())
        node.send(ready(core))
        Server(core, node, identity).run()
        return 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except (GristmillError, ValueError) as error:
        known = error if isinstance(error, NodeError) else SignerError(str(error)[:300])
        try:
            node.send(wire.Failed(known.code, known.message, known.hint))
        except OSError:
            pass
        return 1
    finally:
        if core is not None:
            core.table.close()
