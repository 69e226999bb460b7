"""The in-memory network's faults, under mock time: they happen when asked, and only then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from node.errors import NetworkError
from node.network.memory import MemoryHub, MemoryNetwork, open_hub
from node.ports import ByteStream, StreamClosed
from protocol.keys import PrivateKey

ECHO = "/test/echo/1"


def run(test: Callable[[MemoryHub, MemoryNetwork, MemoryNetwork], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        with trio.fail_after(1000):
            async with open_hub(**options) as hub:  # type: ignore[arg-type]
                a, b = join(hub, 1), join(hub, 2)
                b.handle(ECHO, echo)
                await a.connect(b.addresses[0])
                await test(hub, a, b)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def join(hub: MemoryHub, number: int) -> MemoryNetwork:
    return hub.join(PrivateKey(bytes([number]) * 32).peer_id)


async def echo(stream: ByteStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


def test_partition_cuts_and_refuses_until_healed() -> None:
    async def test(hub: MemoryHub, a: MemoryNetwork, b: MemoryNetwork) -> None:
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        hub.partition(a.peer_id, b.peer_id)
        with pytest.raises(StreamClosed, match="partitioned"):
            await stream.receive_some()
        assert a.peers == b.peers == ()
        with pytest.raises(NetworkError):
            await a.connect(b.addresses[0])
        with pytest.raises(NetworkError):
            await b.connect(a.addresses[0])
        hub.heal(a.peer_id, b.peer_id)
        await a.connect(b.addresses[0])
        assert hub.open_streams == 0

    run(test)


def test_cut_after_n_bytes_delivers_exactly_those() -> None:
    async def test(hub: MemoryHub, a: MemoryNetwork, b: MemoryNetwork) -> None:
        got = bytearray()

        async def collect(stream: ByteStream) -> None:
            while data := await stream.receive_some():
                got.extend(data)

        b.handle("/test/collect/1", collect)
        for n in (1, 7, 100):
            got.clear()
            hub.cut_stream_after(n)
            stream = await a.open_stream(b.peer_id, "/test/collect/1")
            with pytest.raises(StreamClosed):
                while True:
                    await stream.send_all(b"0123456789")
            await trio.testing.wait_all_tasks_blocked()
            assert bytes(got) == (b"0123456789" * 10)[:n]
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"the next stream is whole")
        assert await stream.receive_some() == b"the next stream is whole"

    run(test)


def test_latency_makes_a_question_cost_one_round_trip() -> None:
    async def test(hub: MemoryHub, a: MemoryNetwork, b: MemoryNetwork) -> None:
        begun = trio.current_time()
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"ask")
        assert await stream.receive_some() == b"ask"
        assert trio.current_time() - begun == pytest.approx(0.1)

    run(test, latency=0.05)


def test_equal_seeds_split_equally() -> None:
    async def pieces(seed: int) -> list[int]:
        async with open_hub(seed=seed) as hub:
            a, b = join(hub, 1), join(hub, 2)
            sizes: list[int] = []

            async def measure(stream: ByteStream) -> None:
                while data := await stream.receive_some():
                    sizes.append(len(data))

            b.handle(ECHO, measure)
            await a.connect(b.addresses[0])
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send_all(bytes(10_000))
            await stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
            return sizes

    runs = [trio.run(pieces, seed, clock=trio.testing.MockClock(autojump_threshold=0)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert sum(runs[0]) == 10_000 and len(runs[0]) > 3


def test_gossip_stops_at_whoever_refuses_it() -> None:
    async def test(hub: MemoryHub, a: MemoryNetwork, b: MemoryNetwork) -> None:
        c = join(hub, 3)
        await b.connect(c.addresses[0])
        received: dict[str, list[bytes]] = {"b": [], "c": []}

        async def at_b(data: bytes) -> None:
            received["b"].append(data)

        async def at_c(data: bytes) -> None:
            received["c"].append(data)

        await b.subscribe("t", lambda data: data != b"bad", at_b)
        await c.subscribe("t", lambda data: True, at_c)
        for data in (b"good", b"bad"):
            await a.publish("t", data)
        await trio.testing.wait_all_tasks_blocked()
        assert received == {"b": [b"good"], "c": [b"good"]}
        assert b.stats.gossip_refused == 1

    run(test)


def test_an_identity_joins_once() -> None:
    async def test(hub: MemoryHub, a: MemoryNetwork, b: MemoryNetwork) -> None:
        with pytest.raises(NetworkError, match="joined already"):
            hub.join(a.peer_id)

    run(test)
