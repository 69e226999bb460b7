"""Our Yamux against a peer that speaks raw frames, most of them wrong. Time is mocked."""

from __future__ import annotations

import random
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamReset

from node.network.guards import NetworkLimits
from node.network.yamux import Mux, StreamLimit

DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
KIB = 1024


class FakeSecured:
    """A secured connection over a memory stream, as Noise gives it: whole messages in, whole messages out."""

    is_initiator = True

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self.stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def close(self) -> None:
        await self.stream.aclose()

    def get_remote_address(self) -> tuple[str, int]:
        return "192.0.2.1", 4001


class RawPeer:
    """The far end, by hand."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.buffer = bytearray()

    async def send(
        self, kind: int, flags: int, stream_id: int, length: int = 0, body: bytes = b"", version: int = 0
    ) -> None:
        await self.stream.send_all(struct.pack("!BBHII", version, kind, flags, stream_id, length) + body)

    async def data(self, stream_id: int, body: bytes, flags: int = 0) -> None:
        await self.send(DATA, flags, stream_id, len(body), body)

    async def frame(self) -> tuple[int, int, int, int, bytes]:
        await self._fill(12)
        _, kind, flags, stream_id, length = struct.unpack_from("!BBHII", self.buffer)
        size = length if kind == DATA else 0
        await self._fill(12 + size)
        body = bytes(self.buffer[12 : 12 + size])
        del self.buffer[: 12 + size]
        return kind, flags, stream_id, length, body

    async def wait_for(self, kind: int, flags: int, stream_id: int) -> tuple[int, int, int, int, bytes]:
        while True:
            frame = await self.frame()
            if frame[:3] == (kind, flags, stream_id):
                return frame

    async def _fill(self, n: int) -> None:
        while len(self.buffer) < n:
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            self.buffer += data


def run(
    test: Callable[[Mux, RawPeer], Awaitable[None]], limits: NetworkLimits | None = None, buffered: bool = True
) -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair() if buffered else trio.testing.lockstep_stream_pair()
        mux = Mux(FakeSecured(near), None, limits or NetworkLimits(keepalive=10_000))  # type: ignore[arg-type]
        with trio.fail_after(50_000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mux.start)
                await mux.event_started.wait()
                await test(mux, RawPeer(far))
                nursery.cancel_scope.cancel()
        assert mux.event_closed.is_set()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


def test_frames_both_ways() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        stream = mux.open()
        await stream.write(b"hello")
        assert await peer.frame() == (WINDOW, SYN, 1, 0, b"")
        assert await peer.frame() == (DATA, 0, 1, 5, b"hello")
        await peer.send(WINDOW, ACK, 1)
        await peer.data(1, b"world", FIN)
        assert await stream.read_exactly(5) == b"world"
        with pytest.raises(MuxedStreamEOF):
            await stream.read()
        await stream.close_write()
        assert await peer.frame() == (WINDOW, FIN, 1, 0, b"")
        assert mux.streams == {}

    run(test)


def test_accepts_data_with_the_opening_frame_and_grants_more_as_it_is_read() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        await peer.data(2, bytes(200 * KIB), SYN)
        stream = await mux.accept_stream()
        await peer.wait_for(WINDOW, ACK, 2)
        assert len(await stream.read_exactly(200 * KIB)) == 200 * KIB
        granted = (await peer.wait_for(WINDOW, 0, 2))[3]
        assert granted == 200 * KIB + 256 * KIB, "what was read, and the window doubled"

    run(test)


def test_window_stops_at_the_bound() -> None:
    limits = NetworkLimits(stream_receive_buffer=300 * KIB, keepalive=10_000)

    async def test(mux: Mux, peer: RawPeer) -> None:
        await peer.send(WINDOW, SYN, 2)
        stream = await mux.accept_stream()
        for _ in range(20):
            await peer.data(2, bytes(100 * KIB))
            await stream.read_exactly(100 * KIB)
            assert stream._window <= 300 * KIB

    run(test, limits)


def test_a_writer_that_ignores_flow_control_is_reset_and_others_go_on() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        await peer.send(WINDOW, SYN, 2)
        await peer.send(WINDOW, SYN, 4)
        bad, good = await mux.accept_stream(), await mux.accept_stream()
        for _ in range(1000):
            await peer.data(2, bytes(64 * KIB))
            assert mux.unread <= 256 * KIB
        await peer.wait_for(WINDOW, RST, 2)
        await trio.testing.wait_all_tasks_blocked()
        assert mux.unread == 0 and len(bad._buffer) == 0
        with pytest.raises(MuxedStreamReset):
            await bad.read()
        await peer.data(4, b"fine")
        assert await good.read() == b"fine"

    run(test)


def test_unread_bytes_of_a_connection_are_bounded() -> None:
    limits = NetworkLimits(connection_receive_buffer=1024 * KIB, keepalive=10_000)

    async def test(mux: Mux, peer: RawPeer) -> None:
        for stream_id in range(2, 60, 2):
            await peer.data(stream_id, bytes(250 * KIB), SYN)
            await trio.testing.wait_all_tasks_blocked()
            assert mux.unread <= 1024 * KIB
        assert len(mux.streams) == 4

    run(test, limits)


def test_streams_of_the_peer_are_bounded_and_slots_come_back() -> None:
    limits = NetworkLimits(streams_per_connection=4, keepalive=10_000)

    async def test(mux: Mux, peer: RawPeer) -> None:
        for stream_id in range(2, 14, 2):
            await peer.send(WINDOW, SYN, stream_id)
        frames = [await peer.frame() for _ in range(6)]
        assert [flags for _, flags, *_ in frames] == [ACK] * 4 + [RST] * 2
        first = await mux.accept_stream()
        await peer.send(WINDOW, RST, first.stream_id)
        await peer.send(WINDOW, SYN, 20)
        await peer.wait_for(WINDOW, ACK, 20)
        for _ in range(4):
            mux.open()
        with pytest.raises(StreamLimit):
            mux.open()

    run(test, limits)


@pytest.mark.parametrize(
    "frame",
    [
        (DATA, SYN, 3, 0),  # our parity
        (DATA, SYN, 0, 0),
        (7, 0, 2, 0),
        (DATA, 0, 2, 2**31),
    ],
)
def test_what_breaks_the_protocol_ends_the_connection(frame: tuple[int, int, int, int]) -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        stream = mux.open()
        await peer.send(*frame)
        with pytest.raises(MuxedStreamReset):
            await stream.read()
        await mux.event_closed.wait()
        with pytest.raises(MuxedConnUnavailable):
            mux.open()
        with pytest.raises(MuxedConnUnavailable):
            await mux.accept_stream()

    run(test)


def test_wrong_version_ends_the_connection() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        await peer.send(DATA, 0, 2, 0, version=1)
        await mux.event_closed.wait()

    run(test)


def test_pings_are_answered() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        await peer.send(PING, SYN, 0, 12345)
        assert await peer.frame() == (PING, ACK, 0, 12345, b"")

    run(test)


def test_a_peer_that_no_longer_answers_is_given_up() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        stream = mux.open()
        with pytest.raises(MuxedStreamReset, match="no longer answers"):
            await stream.read()

    run(test, NetworkLimits(keepalive=30))


def test_a_socket_that_takes_nothing_is_given_up() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        stream = mux.open()
        with pytest.raises(MuxedStreamReset):
            while True:
                await stream.write(bytes(64 * KIB))

    run(test, NetworkLimits(keepalive=10_000, write_timeout=5), buffered=False)


def test_a_peer_that_pings_and_never_reads_is_given_up() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await peer.stream.send_all(struct.pack("!BBHII", 0, PING, SYN, 0, 1) * 5000)
        assert len(mux._outbox) < 2 * 1024 * KIB

    run(test, buffered=False)


def test_good_bye_flushes_what_was_written() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        stream = mux.open()
        await stream.write(b"last words")
        await mux.close()
        assert (await peer.wait_for(DATA, 0, 1))[4] == b"last words"
        assert (await peer.frame())[0] == GO_AWAY
        with pytest.raises(EOFError):
            await peer.frame()

    run(test)


def test_good_bye_of_the_peer_comes_after_its_bytes() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        stream = mux.open()
        await peer.data(1, b"last words")
        await peer.send(GO_AWAY, 0, 0, 0)
        await mux.event_closed.wait()
        assert await stream.read() == b"last words"
        with pytest.raises(MuxedStreamReset):
            await stream.read()

    run(test)


def test_a_closed_stream_does_not_wait_for_ever() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        async def answer_pings() -> None:
            while True:
                kind, flags, _, value, _ = await peer.frame()
                if kind == PING and flags == SYN:
                    await peer.send(PING, ACK, 0, value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_pings)
            stream = mux.open()
            stream.leave()
            assert len(mux.streams) == 1
            await trio.sleep(100)
            assert mux.streams == {} and not mux.ended
            nursery.cancel_scope.cancel()

    run(test, NetworkLimits(keepalive=30, linger=30))


def test_bytes_for_a_closed_stream_reset_it() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        stream = mux.open()
        stream.leave()
        await peer.data(1, b"too late")
        await peer.wait_for(WINDOW, FIN, 1)
        await peer.wait_for(WINDOW, RST, 1)
        assert mux.streams == {} and mux.unread == 0

    run(test)


def test_a_connection_cut_inside_a_frame() -> None:
    async def test(mux: Mux, peer: RawPeer) -> None:
        stream = mux.open()
        await peer.stream.send_all(struct.pack("!BBHII", 0, DATA, 0, 1, 1000) + b"half")
        await peer.stream.aclose()
        assert await stream.read() == b"half"
        with pytest.raises(MuxedStreamReset):
            await stream.read()

    run(test)


def wild_frame(rng: random.Random) -> bytes:
    kind = rng.choice([DATA, DATA, DATA, WINDOW, WINDOW, PING, rng.choice([DATA, GO_AWAY, 9])])
    flags = rng.choice([0, 0, SYN, SYN, ACK, FIN, RST, SYN | FIN, SYN | RST, FIN | RST, rng.randrange(65536)])
    length = rng.choice([0, 9] if rng.random() < 0.8 else [1, 64 * KIB, 300 * KIB, rng.randrange(2**32)])
    body = rng.randbytes(min(length, 300 * KIB)) if kind == DATA else b""
    return struct.pack("!BBHII", 0, kind, flags, 2 * rng.randrange(0, 20), length) + body


def careful_frame(rng: random.Random, fresh: Iterator[int]) -> bytes:
    """Hostile, but within the rules for which a connection ends."""
    kind = rng.choice([DATA, DATA, WINDOW, PING])
    flags = rng.choice([0, SYN, SYN, ACK, FIN, RST, SYN | FIN, SYN | RST, FIN | RST]) if kind != PING else SYN
    stream_id = next(fresh) if flags & SYN else rng.randrange(40)
    body = rng.randbytes(rng.choice([0, 9, 64 * KIB, 300 * KIB])) if kind == DATA else b""
    return (
        struct.pack("!BBHII", 0, kind, flags, stream_id, len(body) or rng.choice([0, 2**32 - 1]) * (kind == WINDOW))
        + body
    )


def test_random_frames_never_raise_and_stay_bounded() -> None:
    limits = NetworkLimits(streams_per_connection=16, connection_receive_buffer=512 * KIB, keepalive=10_000)
    outcomes = {"ended": 0, "alive": 0}

    def one(seed: int) -> None:
        rng = random.Random(seed)
        careful = bool(seed % 2)
        fresh = iter(range(2, 10_000, 2))

        async def test(mux: Mux, peer: RawPeer) -> None:
            async def drain() -> None:
                try:
                    while True:
                        await peer.frame()
                except (EOFError, trio.ClosedResourceError, trio.BrokenResourceError):
                    pass

            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain)
                try:
                    for _ in range(60):
                        blob = careful_frame(rng, fresh) if careful else wild_frame(rng)
                        cut = rng.randrange(len(blob) + 1)
                        await peer.stream.send_all(blob[:cut])
                        await peer.stream.send_all(blob[cut:])
                        if rng.random() < 0.2 and not mux.ended:
                            mux.open().leave()
                        await trio.lowlevel.checkpoint()
                        assert mux.unread <= 512 * KIB
                        assert mux.unread == sum(len(stream._buffer) for stream in mux.streams.values())
                        assert len(mux.streams) <= 32
                except (trio.BrokenResourceError, StreamLimit):
                    pass
                await trio.testing.wait_all_tasks_blocked()
                outcomes["ended" if mux.ended else "alive"] += 1
                nursery.cancel_scope.cancel()

        run(test, limits)

    for seed in range(100):
        one(seed)
    assert outcomes["ended"] > 30 and outcomes["alive"] > 30, outcomes
