"""M6: an engine process that was taken over, whatever it says, can give its own streams tokens and do nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest
import trio

from node.errors import ModelError
from node.runtime import supervisor, wire
from node.runtime.child import Line
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput
from node.runtime.host import EngineHost
from node.runtime.launch import Child
from node.runtime.streams import BURST, Stream
from node.runtime.supervisor import Limits
from node.testing.planted import notices
from protocol.sampling import SamplingParams

LOAD = wire.Load("/nowhere", "cpu", "float32", 1, 1 << 20, 8, 0)
READY = wire.Ready(1000, 97, "0" * 32, (96,), 1000, 1000)
Script = Callable[[socket.socket, wire.Submit], None]


class Puppet:
    """Starts well, waits for the first submit, then does what the script says, over and over."""

    mode = "process"

    def __init__(self, script: Script, ready: wire.Ready = READY) -> None:
        self.script = script
        self.ready = ready

    @asynccontextmanager
    async def start(self, theirs: socket.socket, folder: str) -> AsyncIterator[Child]:
        def run() -> None:
            line = Line(theirs)
            with theirs:
                try:
                    line.receive(wait=True)
                    line.send(self.ready)
                    while True:
                        for message in line.receive(wait=True):
                            if isinstance(message, wire.Submit):
                                self.script(theirs, message)
                            if isinstance(message, wire.Ping):
                                line.send(wire.Pong(message.number))
                except Exception:  # the host hung up, which is what is tested
                    return

        threading.Thread(target=run, daemon=True).start()
        yield _Nobody()


class _Nobody:
    pid = None

    def kill(self) -> None:
        pass

    async def epitaph(self) -> str:
        return "a puppet"


def say(*outputs: wire.Output, room: int = 1000, submits: int = 1) -> bytes:
    return wire.TO_NODE.frame(wire.Stepped(outputs, room, submits))


def at(asked: wire.Submit, token: int = 5, ahead: int = 0, **changes: object) -> wire.Output:
    position = len(asked.prompt_ids) + len(asked.generated_ids) + ahead
    output = wire.Output(asked.number, token, position)
    return msgspec.structs.replace(output, **changes)


def death(script: Script, ready: wire.Ready = READY) -> str:
    """What the host says of the engine after one stream met it."""
    found: list[str] = []

    async def main() -> None:
        host = EngineHost(Puppet(script, ready), LOAD, limits=Limits(hang_s=5, backoff_s=0.01))
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                asked = Sequence("s", (1, 2, 3), SamplingParams(temperature=0), 500)
                with pytest.raises(ModelError, match="died 2 times"):
                    async with aclosing(host.generate(asked)) as batches:
                        async for outputs in batches:
                            assert all(0 <= output.token_id < 97 for output in outputs)
                assert host.running == 0
                found.append(host.last_death)
                nursery.cancel_scope.cancel()

    trio.run(main)
    return found[0]


@pytest.mark.parametrize(
    "lie",
    [
        lambda asked: at(asked, token=97),
        lambda asked: at(asked, token=-1),
        lambda asked: at(asked, token=2**31 - 1),
        lambda asked: at(asked, ahead=1),
        lambda asked: at(asked, position=0),
        lambda asked: at(asked, finish="paid"),
        lambda asked: at(asked, token=5, finish="error"),
    ],
)
def test_a_token_that_is_none_of_the_streams_ends_the_engine(lie: Callable[[wire.Submit], wire.Output]) -> None:
    assert "none of the stream's" in death(lambda sock, asked: sock.sendall(say(lie(asked))))


def test_a_host_that_believed_its_engine_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """M6, planted: no token is checked."""

    def believe(self: Stream, output: wire.Output, vocab_size: int) -> StepOutput:
        self.received.append(output.token_id)
        return StepOutput(self.sequence.id, output.token_id, output.position, FinishReason.LENGTH)

    def lie(sock: socket.socket, asked: wire.Submit) -> None:
        sock.sendall(say(at(asked, token=97, finish="length")))

    assert "none of the stream's" in death(lie)
    monkeypatch.setattr(Stream, "accept", believe)
    assert notices(lambda: death(lie) and None)


def test_an_engine_that_runs_ahead_of_its_reader_is_stopped() -> None:
    def flood(sock: socket.socket, asked: wire.Submit) -> None:
        sock.sendall(say(*(at(asked, ahead=n) for n in range(BURST + 8 + 1))))

    assert "none of the stream's" in death(flood)


def test_a_stream_gets_no_more_than_it_asked_for() -> None:
    def generous(sock: socket.socket, asked: wire.Submit) -> None:
        for n in range(501 - len(asked.generated_ids)):
            sock.sendall(say(at(asked, ahead=n)))

    assert "none of the stream's" in death(generous)


def test_counting_submits_that_were_not_made_ends_the_engine() -> None:
    assert "was not given" in death(lambda sock, asked: sock.sendall(say(submits=9)))


def test_an_engine_that_talks_and_does_not_listen_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves unread lies in our memory, and its chatter is no answer."""
    monkeypatch.setattr(supervisor, "UNREAD", 1 / 16)

    def chatter(sock: socket.socket, asked: wire.Submit) -> None:
        while True:
            sock.sendall(wire.TO_NODE.frame(wire.Pong(0)))
            time.sleep(0.02)

    async def main() -> None:
        host = EngineHost(Puppet(chatter), LOAD, limits=Limits(hang_s=1, backoff_s=0.01))

        async def ask(name: int) -> None:
            with pytest.raises(ModelError):
                async for _ in host.generate(Sequence(name, (50_000,) * 400_000, SamplingParams(temperature=0), 9)):
                    pass

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                async with trio.open_nursery() as streams:
                    for name in range(3):
                        streams.start_soon(ask, name)
                assert "bytes unread" in host.last_death
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_starting_twice_ends_the_engine() -> None:
    assert "started twice" in death(lambda sock, asked: sock.sendall(wire.TO_NODE.frame(READY)))


@pytest.mark.parametrize(
    "noise",
    [
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff" + bytes(64),
        b"\x00\x00\x00\x03abc",
        (lambda p: len(p).to_bytes(4) + p)(msgspec.msgpack.encode(["Stepped", [[1, "x", 3, ""]], 1, 1])),
        (lambda p: len(p).to_bytes(4) + p)(msgspec.msgpack.encode(["Submit", 1])),
        (lambda p: len(p).to_bytes(4) + p)(msgspec.msgpack.encode(["Refused", 1, "x" * 5000])),
    ],
)
def test_noise_ends_the_engine(noise: bytes) -> None:
    assert "rubbish" in death(lambda sock, asked: sock.sendall(noise))


def test_tokens_for_strangers_change_nothing() -> None:
    """A number that runs no more is a stream that was left; the engine hears of it with the next message."""

    async def main() -> None:
        def script(sock: socket.socket, asked: wire.Submit) -> None:
            sock.sendall(say(at(asked, number=77, position=0)))
            sock.sendall(say(at(asked, finish="length")))

        host = EngineHost(Puppet(script), LOAD)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                asked = Sequence("s", (1, 2, 3), SamplingParams(temperature=0), 500)
                assert [o.token_id async for outputs in host.generate(asked) for o in outputs] == [5]
                assert host.deaths == 0
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_what_it_says_of_itself_reaches_no_terminal() -> None:
    said = death(lambda sock, asked: sock.sendall(wire.TO_NODE.frame(wire.Failed("\x1b[2Jyou are\nhacked", False))))
    assert "\x1b" not in said and "\n" not in said


def test_another_model_after_a_death_is_noticed() -> None:
    puppet = Puppet(lambda sock, asked: sock.close())

    async def main() -> None:
        host = EngineHost(puppet, LOAD, limits=Limits(backoff_s=0.01))
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                puppet.ready = msgspec.structs.replace(READY, numerics_class="1" * 32)
                with pytest.raises(ModelError, match="another one"):
                    async for _ in host.generate(Sequence("s", (1, 2), SamplingParams(temperature=0), 9)):
                        pass
                nursery.cancel_scope.cancel()

    trio.run(main)
