"""What every `Network` promises, checked on the libp2p host and on its in-memory twin alike."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio

from node.errors import NetworkError
from node.network.guards import NetworkLimits
from node.network.host import open_host
from node.network.memory import open_hub
from node.ports import ByteStream, StreamClosed
from protocol.keys import PrivateKey

ECHO = "/test/echo/1"
MIB = 1024 * 1024

Pair = Callable[[], AbstractAsyncContextManager[tuple[Any, Any]]]


@asynccontextmanager
async def libp2p_pair() -> AsyncIterator[tuple[Any, Any]]:
    limits = NetworkLimits(keepalive=60)
    async with (
        open_host(PrivateKey(os.urandom(32)), limits=limits) as a,
        open_host(PrivateKey(os.urandom(32)), limits=limits) as b,
    ):
        yield a, b


@asynccontextmanager
async def memory_pair() -> AsyncIterator[tuple[Any, Any]]:
    async with open_hub() as hub:
        yield hub.join(PrivateKey(b"\1" * 32).peer_id), hub.join(PrivateKey(b"\2" * 32).peer_id)


@asynccontextmanager
async def split_memory_pair() -> AsyncIterator[tuple[Any, Any]]:
    async with open_hub(seed=7) as hub:
        yield hub.join(PrivateKey(b"\1" * 32).peer_id), hub.join(PrivateKey(b"\2" * 32).peer_id)


@pytest.fixture(params=[libp2p_pair, memory_pair, split_memory_pair], ids=["libp2p", "memory", "memory-split"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


def run(pair: Pair, test: Callable[[Any, Any], Awaitable[None]], seconds: float = 60) -> None:
    """`test(client, server)`, connected, the server echoing."""

    async def main() -> None:
        with trio.fail_after(seconds):
            async with pair() as (client, server):
                server.handle(ECHO, echo)
                await client.connect(server.addresses[0])
                await test(client, server)

    trio.run(main)


async def echo(stream: ByteStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def read_exactly(stream: ByteStream, n: int) -> bytes:
    got = bytearray()
    while len(got) < n:
        data = await stream.receive_some(n - len(got))
        if not data:
            raise AssertionError(f"end of stream after {len(got)} of {n} bytes")
        got += data
    return bytes(got)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.01)


def test_echo_and_identities(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        seen: list[str] = []

        async def whoami(stream: ByteStream) -> None:
            seen.append(stream.remote_peer)
            await echo(stream)

        server.handle("/test/who/1", whoami)
        stream = await client.open_stream(server.peer_id, "/test/who/1")
        await stream.send_all(b"hello")
        assert await read_exactly(stream, 5) == b"hello"
        assert stream.remote_peer == server.peer_id
        assert seen == [client.peer_id]
        assert client.peers == (server.peer_id,)
        await until(lambda: server.peers == (client.peer_id,))
        assert all(address.endswith(f"/p2p/{server.peer_id}") for address in server.addresses)

    run(pair, test)


def test_connect_twice_is_one_connection(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(client.connect, server.addresses[0])
        await until(lambda: server.stats.accepted == 1)
        assert client.peers == (server.peer_id,)

    run(pair, test)


def test_eight_mebibytes_each_way_at_once(pair: Pair) -> None:
    block = os.urandom(MIB)

    async def test(client: Any, server: Any) -> None:
        stream = await client.open_stream(server.peer_id, ECHO)
        sent, received = hashlib.sha256(), hashlib.sha256()

        async def send() -> None:
            for _ in range(8):
                sent.update(block)
                await stream.send_all(block)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            for _ in range(8):
                received.update(await read_exactly(stream, MIB))
        assert received.digest() == sent.digest()

    run(pair, test, 120)


def test_close_is_the_end_for_the_reader_after_all_bytes(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        got = bytearray()
        ended = trio.Event()

        async def collect(stream: ByteStream) -> None:
            while data := await stream.receive_some():
                got.extend(data)
            assert await stream.receive_some() == b""
            ended.set()

        server.handle("/test/collect/1", collect)
        stream = await client.open_stream(server.peer_id, "/test/collect/1")
        await stream.send_all(b"x" * 100_000)
        await stream.aclose()
        await ended.wait()
        assert bytes(got) == b"x" * 100_000
        assert stream.done
        with pytest.raises(StreamClosed):
            await stream.send_all(b"more")
        with pytest.raises(StreamClosed):
            await stream.receive_some()
        await stream.aclose()

    run(pair, test)


def test_answer_then_close_reaches_an_asker_that_has_not_read_yet(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        async def answer(stream: ByteStream) -> None:
            await stream.send_all(b"answer")
            await stream.aclose()

        server.handle("/test/answer/1", answer)
        stream = await client.open_stream(server.peer_id, "/test/answer/1")
        await trio.sleep(0.1)
        assert await read_exactly(stream, 6) == b"answer"
        assert await stream.receive_some() == b""

    run(pair, test)


def test_writer_learns_that_the_far_end_closed(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        async def leave(stream: ByteStream) -> None:
            await stream.aclose()

        server.handle("/test/leave/1", leave)
        stream = await client.open_stream(server.peer_id, "/test/leave/1")
        with pytest.raises(StreamClosed):
            while True:
                await stream.send_all(b"anyone?")
                await trio.sleep(0.01)

    run(pair, test)


def test_reset_reaches_the_far_end(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        failed = trio.Event()

        async def wait(stream: ByteStream) -> None:
            try:
                while await stream.receive_some():
                    pass
            except StreamClosed:
                failed.set()

        server.handle("/test/wait/1", wait)
        stream = await client.open_stream(server.peer_id, "/test/wait/1")
        await stream.send_all(b"hello")
        await stream.reset()
        await failed.wait()
        with pytest.raises(StreamClosed):
            await stream.send_all(b"more")

    run(pair, test)


def test_bytes_before_a_reset_are_delivered(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        async def tokens_then_crash(stream: ByteStream) -> None:
            await stream.send_all(b"tokens")
            await stream.reset()

        server.handle("/test/tokens/1", tokens_then_crash)
        stream = await client.open_stream(server.peer_id, "/test/tokens/1")
        await trio.sleep(0.1)
        assert await read_exactly(stream, 6) == b"tokens"
        with pytest.raises(StreamClosed):
            await stream.receive_some()

    run(pair, test)


def test_a_handler_that_raises_ends_only_its_stream(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: Any, server: Any) -> None:
        async def bad(stream: ByteStream) -> None:
            await stream.receive_some()
            raise ZeroDivisionError("a mistake")

        server.handle("/test/bad/1", bad)
        good = await client.open_stream(server.peer_id, ECHO)
        for _ in range(10):
            stream = await client.open_stream(server.peer_id, "/test/bad/1")
            await stream.send_all(b"x")
            with pytest.raises(StreamClosed):
                await stream.receive_some()
        await good.send_all(b"still here")
        assert await read_exactly(good, 10) == b"still here"
        assert server.stats.handler_errors == 10

    with caplog.at_level(logging.ERROR, logger="node.network"):
        run(pair, test)
    assert sum("/test/bad/1" in record.getMessage() for record in caplog.records) == 10


def test_a_cancelled_read_resumes(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        stream = await client.open_stream(server.peer_id, ECHO)
        for i in range(100):
            with trio.move_on_after(0.0005 * (i % 4)):
                await stream.receive_some()
                raise AssertionError("nothing was sent yet")
        await stream.send_all(b"0123456789")
        got = b""
        while len(got) < 10:
            with trio.move_on_after(0.0005):
                got += await stream.receive_some(3)
        assert got == b"0123456789"

    run(pair, test)


def test_a_cancelled_write_ends_the_stream_and_not_the_connection(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        async def never_read(stream: ByteStream) -> None:
            await trio.sleep_forever()

        server.handle("/test/deaf/1", never_read)
        steady = await client.open_stream(server.peer_id, ECHO)
        for _ in range(10):
            stream = await client.open_stream(server.peer_id, "/test/deaf/1")
            with trio.move_on_after(0.02) as scope:
                await stream.send_all(bytes(4 * MIB))
            assert scope.cancelled_caught
            with pytest.raises(StreamClosed):
                await stream.send_all(b"x")
            await steady.send_all(b"ping")
            assert await read_exactly(steady, 4) == b"ping"
        assert client.peers == (server.peer_id,)

    run(pair, test)


def test_a_writer_waits_for_a_slow_reader(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        go = trio.Event()
        got = [0]

        async def slow(stream: ByteStream) -> None:
            await go.wait()
            while data := await stream.receive_some():
                got[0] += len(data)
            await stream.send_all(b"done")

        server.handle("/test/slow/1", slow)
        stream = await client.open_stream(server.peer_id, "/test/slow/1")
        sent = [0]

        async def send() -> None:
            for _ in range(64):
                await stream.send_all(bytes(64 * 1024))
                sent[0] += 64 * 1024

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(0.3)
            assert sent[0] <= MIB, "the far end holds no more than its window, we no more than our send buffer"
            go.set()
        await stream.aclose()
        await until(lambda: got[0] == 4 * MIB)

    run(pair, test)


def test_two_hundred_streams_leave_nothing_behind(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        for i in range(200):
            stream = await client.open_stream(server.peer_id, ECHO)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            await (stream.aclose() if i % 3 else stream.reset())
        await until(lambda: open_streams(client, server) == 0)
        assert client.stats.streams_opened == server.stats.streams_served == 200

    run(pair, test)


def test_opening_cancelled_at_random_leaks_nothing(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        for i in range(150):
            with trio.move_on_after(0.00005 * (i % 30)):
                stream = await client.open_stream(server.peer_id, ECHO)
                await stream.aclose()
        await until(lambda: open_streams(client, server) == 0)
        stream = await client.open_stream(server.peer_id, ECHO)
        await stream.send_all(b"fine")
        assert await read_exactly(stream, 4) == b"fine"

    run(pair, test)


def open_streams(client: Any, server: Any) -> int:
    hub = getattr(client, "_hub", None)
    if hub is not None:
        return int(hub.open_streams)
    return sum(len(network._live(peer).streams) - 2 for network, peer in muxes(client, server))  # two are gossip's


def muxes(client: Any, server: Any) -> list[tuple[Any, Any]]:
    return [(network, next(iter(network._swarm.connections))) for network in (client, server)]


def test_unknown_protocol(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        with pytest.raises(NetworkError, match="/test/nobody/1"):
            await client.open_stream(server.peer_id, "/test/nobody/1")
        stream = await client.open_stream(server.peer_id, ECHO)
        await stream.send_all(b"fine")
        assert await read_exactly(stream, 4) == b"fine"

    run(pair, test)


def test_not_connected(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        with pytest.raises(NetworkError, match="not connected"):
            await client.open_stream(PrivateKey(b"\7" * 32).peer_id, ECHO)

    run(pair, test)


def test_bad_addresses(pair: Pair) -> None:
    stranger = PrivateKey(b"\7" * 32).peer_id

    async def test(client: Any, server: Any) -> None:
        wrong = server.addresses[0].replace(server.peer_id, stranger)
        for address in (
            wrong,
            "",
            "nonsense",
            "/ip4/127.0.0.1/tcp/1",
            f"/p2p/{stranger}",
            client.addresses[0],
            "/x" * 999,
        ):
            with pytest.raises(NetworkError):
                await client.connect(address)
        assert client.peers == (server.peer_id,)

    run(pair, test)


def test_peer_that_goes_away(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        stream = await client.open_stream(server.peer_id, ECHO)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        await server.disconnect(client.peer_id)
        with pytest.raises(StreamClosed):
            await stream.receive_some()
        with pytest.raises(StreamClosed):
            await stream.send_all(b"x")
        await until(lambda: client.peers == () and server.peers == ())
        await client.connect(server.addresses[0])
        stream = await client.open_stream(server.peer_id, ECHO)
        await stream.send_all(b"again")
        assert await read_exactly(stream, 5) == b"again"

    run(pair, test)


def test_gossip_delivers_what_is_accepted_and_refuses_the_rest(pair: Pair) -> None:
    async def test(client: Any, server: Any) -> None:
        received: list[bytes] = []
        own: list[bytes] = []

        async def receive(data: bytes) -> None:
            received.append(data)
            if data == b"good poison":
                raise ZeroDivisionError("a mistake in one message")

        async def receive_own(data: bytes) -> None:
            own.append(data)

        await server.subscribe("/test/offers/1", lambda data: data.startswith(b"good"), receive)
        await client.subscribe("/test/offers/1", lambda data: True, receive_own)
        with pytest.raises(NetworkError):
            await server.subscribe("/test/offers/1", lambda data: True, receive)
        round_ = 0
        while b"good last" not in received:  # the mesh takes a moment to form
            round_ += 1
            for data in (b"bad %d" % round_, b"good poison", b"good %d" % round_, b"good last"):
                await client.publish("/test/offers/1", data)
            await trio.sleep(0.1)
        assert all(data.startswith(b"good") for data in received)
        assert server.stats.gossip_refused >= 1
        assert own == []
        with pytest.raises(NetworkError, match="at most"):
            await client.publish("/test/offers/1", bytes(64 * 1024 + 1))

    run(pair, test)


def test_gossip_validator_that_raises_refuses(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: Any, server: Any) -> None:
        async def receive(data: bytes) -> None:
            raise AssertionError("must not be delivered")

        def accept(data: bytes) -> bool:
            raise ZeroDivisionError

        await server.subscribe("/test/offers/1", accept, receive)
        await until_gossip(client, server)
        stream = await client.open_stream(server.peer_id, ECHO)
        await stream.send_all(b"fine")
        assert await read_exactly(stream, 4) == b"fine"

    async def until_gossip(client: Any, server: Any) -> None:
        while not server.stats.gossip_refused:
            await client.publish("/test/offers/1", b"x")
            await trio.sleep(0.1)

    run(pair, test)
