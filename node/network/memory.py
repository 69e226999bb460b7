"""An in-memory network: any number of `node.ports.Network`s in one process, with faults on demand.

For tests, simulations and the demo of a market on one machine. It keeps the promises of the libp2p host that callers can see:
connections before streams, `StreamClosed` after a reset, a cut or a partition, bytes before the news of the end, backpressure,
a handler that raises ends its own stream, gossip that stops at whoever refuses it. Time is trio's, so a mock clock rules it;
randomness is one seeded generator, so a run can be repeated.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from node.errors import NetworkError
from node.groups import plain_errors
from node.network.stats import NetworkStats
from node.ports import ByteStream, StreamClosed, StreamHandler
from protocol.errors import GristmillError
from protocol.ids import PeerId

log = logging.getLogger(__name__)

_LARGEST_GOSSIP = 64 * 1024


class _Pipe:
    """One direction of a stream: bytes on their way, then perhaps an end."""

    def __init__(self, hub: MemoryHub) -> None:
        self.hub = hub
        self.finished = False
        self.broken = ""
        self.deaf = False
        """The reader has closed its end and takes no more."""
        self._waiting = 0
        self._chunks: deque[tuple[float, bytearray]] = deque()
        self._changed = trio.lowlevel.ParkingLot()

    def wake(self) -> None:
        self._changed.unpark_all()

    async def put(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while True:
            if self.broken or self.finished or self.deaf:
                raise StreamClosed(
                    self.broken or ("the far end has closed" if self.deaf else "the stream was closed here")
                )
            if not view:
                return
            room = self.hub.buffer - self._waiting
            if room <= 0:
                await self._changed.park()
                continue
            part = view[:room]
            view = view[len(part) :]
            self._waiting += len(part)
            ready = trio.current_time() + self.hub.latency if self.hub.latency else 0.0
            if self._chunks and self._chunks[-1][0] == ready:
                self._chunks[-1][1].extend(part)
            else:
                self._chunks.append((ready, bytearray(part)))
            self.wake()

    async def take(self, most: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self._chunks:
                ready, chunk = self._chunks[0]
                if ready > trio.current_time():
                    await trio.sleep_until(ready)
                    continue
                n = self.hub.split(min(most, len(chunk)))
                data = bytes(chunk[:n])
                del chunk[:n]
                if not chunk:
                    self._chunks.popleft()
                self._waiting -= n
                self.wake()
                return data
            if self.broken:
                raise StreamClosed(self.broken)
            if self.finished:
                return b""
            await self._changed.park()

    def drop(self) -> None:
        self.deaf = True
        self._chunks.clear()
        self._waiting = 0
        self.wake()


class MemoryStream:
    """One end of an in-memory stream."""

    def __init__(self, remote_peer: PeerId, reads: _Pipe, writes: _Pipe, link: _Link) -> None:
        self.remote_peer = remote_peer
        self._reads = reads
        self._writes = writes
        self._link = link
        self.done = False
        """Whether this side has closed or reset the stream."""

    async def send_all(self, data: bytes) -> None:
        try:
            for part in self._link.allowed(data):
                await self._writes.put(part)
        except trio.Cancelled:
            self.done = True
            self._link.cut("a write was cancelled")
            raise

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if max_bytes < 1:
            raise ValueError("max_bytes is at least 1")
        if self._reads.deaf:
            raise StreamClosed("the stream was closed here")
        return await self._reads.take(max_bytes)

    async def aclose(self) -> None:
        self.leave()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self.done = True
        self._link.cut("the stream was reset")
        await trio.lowlevel.checkpoint()

    def leave(self) -> None:
        self.done = True
        if not self._writes.broken:
            self._writes.finished = True
        self._writes.wake()
        self._reads.drop()


class _Link:
    """What both ends of one stream share: who is on it, and when it will be cut."""

    def __init__(self, ends: frozenset[PeerId], pipes: tuple[_Pipe, _Pipe], cut_after: int | None) -> None:
        self.ends = ends
        self._pipes = pipes
        self._left = cut_after

    @property
    def over(self) -> bool:
        return all(pipe.broken or pipe.deaf for pipe in self._pipes)

    def allowed(self, data: bytes) -> list[bytes]:
        """The part of `data` that still gets through; the stream is cut behind it."""
        if self._left is None:
            return [data]
        through, self._left = data[: self._left], max(self._left - len(data), 0)
        if self._left:
            return [through]
        for pipe in self._pipes:
            pipe.hub.nursery.start_soon(self._cut_later)
        return [through]

    async def _cut_later(self) -> None:
        await trio.lowlevel.checkpoint()
        self.cut("the connection was cut")

    def cut(self, reason: str) -> None:
        for pipe in self._pipes:
            if not pipe.finished:
                pipe.broken = pipe.broken or reason
            pipe.wake()


class MemoryNetwork:
    """`node.ports.Network` inside a `MemoryHub`."""

    def __init__(self, hub: MemoryHub, peer_id: PeerId, address: str) -> None:
        self._hub = hub
        self._peer_id = peer_id
        self.addresses: tuple[str, ...] = (f"{address}/p2p/{peer_id}",)
        self.stats = NetworkStats()
        self.handlers: dict[str, StreamHandler] = {}
        self.topics: dict[str, tuple[Callable[[bytes], bool], trio.MemorySendChannel[bytes]]] = {}

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return self._hub.neighbours(self._peer_id)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self.handlers[protocol] = handler

    async def connect(self, multiaddr: str) -> PeerId:
        await trio.sleep(2 * self._hub.latency)
        self.stats.dials += 1
        try:
            return self._hub.link(self._peer_id, multiaddr)
        except NetworkError:
            self.stats.dials_failed += 1
            raise

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream:
        await trio.lowlevel.checkpoint()
        stream = self._hub.open(self._peer_id, peer, protocol)
        self.stats.streams_opened += 1
        return stream

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > _LARGEST_GOSSIP:
            raise NetworkError(f"a gossip message has at most {_LARGEST_GOSSIP} bytes, not {len(data)}")
        await trio.lowlevel.checkpoint()
        self._hub.gossip(self._peer_id, topic, data)

    async def subscribe(
        self, topic: str, accept: Callable[[bytes], bool], receive: Callable[[bytes], Awaitable[None]]
    ) -> None:
        await trio.lowlevel.checkpoint()
        if topic in self.topics:
            raise NetworkError(f"already subscribed to {topic}")
        send, channel = trio.open_memory_channel[bytes](1024)
        self.topics[topic] = (accept, send)
        self._hub.nursery.start_soon(self._deliver, topic, channel, receive)

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection with `peer`."""
        await trio.lowlevel.checkpoint()
        self._hub.unlink(self._peer_id, peer, "the connection was closed")

    async def serve(self, stream: MemoryStream, protocol: str) -> None:
        """Run the handler of `protocol`; what it raises ends the stream and nothing else."""
        self.stats.streams_served += 1
        try:
            await self.handlers[protocol](stream)
        except StreamClosed:
            await stream.reset()
        except Exception:  # the promise of the port: a handler's mistake ends its own stream
            self.stats.handler_errors += 1
            log.exception("the handler of %s failed; its stream with %s is reset", protocol, stream.remote_peer)
            await stream.reset()
        else:
            stream.leave()

    async def _deliver(
        self, topic: str, channel: trio.MemoryReceiveChannel[bytes], receive: Callable[[bytes], Awaitable[None]]
    ) -> None:
        async for data in channel:
            try:
                await receive(data)
            except Exception:  # a mistake in one message must not stop the topic
                log.exception("receiving from %s failed", topic)


class MemoryHub:
    """The wires between `MemoryNetwork`s, and the knobs that damage them. Use `open_hub`."""

    def __init__(
        self, nursery: trio.Nursery, *, seed: int | None = None, latency: float = 0.0, buffer: int = 256 * 1024
    ) -> None:
        self.nursery = nursery
        self.latency = latency
        """Seconds that bytes travel one way."""
        self.buffer = buffer
        """Bytes of one direction of a stream on their way; writers wait behind them."""
        self._random = None if seed is None else random.Random(seed)
        self._networks: dict[PeerId, MemoryNetwork] = {}
        self._joined = 0
        self._connections: set[frozenset[PeerId]] = set()
        self._partitions: set[frozenset[PeerId]] = set()
        self._links: list[_Link] = []
        self._cut_after: int | None = None

    def join(self, peer_id: PeerId) -> MemoryNetwork:
        """A new network for `peer_id`."""
        if peer_id in self._networks:
            raise NetworkError(f"{peer_id} has joined already")
        self._joined += 1
        network = MemoryNetwork(self, peer_id, f"/memory/{self._joined}")
        self._networks[peer_id] = network
        return network

    def leave(self, peer_id: PeerId) -> None:
        """The node is gone: its connections break, its address answers no more, and it may join again."""
        for other in self.neighbours(peer_id):
            self.unlink(peer_id, other, "the far end has gone")
        self._networks.pop(peer_id, None)

    # --- faults

    def partition(self, a: PeerId, b: PeerId) -> None:
        """Cut what is between two peers and refuse new connections until `heal`."""
        self._partitions.add(frozenset((a, b)))
        self.unlink(a, b, "the network is partitioned")

    def heal(self, a: PeerId, b: PeerId) -> None:
        self._partitions.discard(frozenset((a, b)))

    def cut_stream_after(self, n_bytes: int) -> None:
        """The next stream to be opened breaks once `n_bytes` have gone in, both directions together."""
        self._cut_after = n_bytes

    def split(self, n: int) -> int:
        """How many of `n` ready bytes a reader gets: all, or with a seed any number from 1."""
        return n if self._random is None else self._random.randint(1, n)

    # --- for the networks

    def neighbours(self, peer: PeerId) -> tuple[PeerId, ...]:
        return tuple(other for pair in self._connections if peer in pair for other in pair if other != peer)

    def link(self, source: PeerId, multiaddr: str) -> PeerId:
        address, _, name = multiaddr.partition("/p2p/")
        try:
            peer = PeerId(name)
        except GristmillError as error:
            raise NetworkError(f"not the address of a peer: {multiaddr!r} ({error})") from error
        owner = next((n for n in self._networks.values() if n.addresses[0].startswith(f"{address}/p2p/")), None)
        pair = frozenset((source, peer))
        if owner is None or pair in self._partitions:
            raise NetworkError(f"no answer from {multiaddr}", hint="is the node running?")
        if owner.peer_id != peer:
            raise NetworkError(f"{owner.peer_id} answers at {address}, not {peer}")
        if peer == source:
            raise NetworkError(f"{multiaddr} is this node itself")
        if pair not in self._connections:
            self._connections.add(pair)
            owner.stats.accepted += 1
        return peer

    def unlink(self, a: PeerId, b: PeerId, reason: str) -> None:
        pair = frozenset((a, b))
        self._connections.discard(pair)
        for link in self._links:
            if link.ends == pair:
                link.cut(reason)
        self._sweep()

    def open(self, source: PeerId, peer: PeerId, protocol: str) -> MemoryStream:
        pair = frozenset((source, peer))
        if pair not in self._connections:
            raise NetworkError(f"not connected to {peer}", hint="connect to one of its addresses first")
        target = self._networks[peer]
        if protocol not in target.handlers:
            raise NetworkError(f"{peer} did not open {protocol}: it does not speak it")
        there, back = _Pipe(self), _Pipe(self)
        link = _Link(pair, (there, back), self._cut_after)
        self._cut_after = None
        self._sweep()
        self._links.append(link)
        self.nursery.start_soon(target.serve, MemoryStream(source, there, back, link), protocol)
        return MemoryStream(peer, back, there, link)

    def gossip(self, source: PeerId, topic: str, data: bytes) -> None:
        """Spread from peer to peer; whoever refuses a message does not pass it on."""
        reached, frontier = {source}, deque([source])
        while frontier:
            for peer in self.neighbours(frontier.popleft()):
                network = self._networks[peer]
                if peer in reached or topic not in network.topics:
                    continue
                reached.add(peer)
                accept, channel = network.topics[topic]
                if not _accepted(accept, topic, data):
                    network.stats.gossip_refused += 1
                    continue
                try:
                    channel.send_nowait(data)
                except trio.WouldBlock:
                    log.info("%s is too slow for %s: a message is dropped", peer, topic)
                frontier.append(peer)

    @property
    def open_streams(self) -> int:
        """Streams that neither side has finished with."""
        self._sweep()
        return len(self._links)

    def _sweep(self) -> None:
        self._links = [link for link in self._links if not link.over]


def _accepted(accept: Callable[[bytes], bool], topic: str, data: bytes) -> bool:
    try:
        return accept(data)
    except Exception:  # `accept` must not raise; if it does, the message is refused and the mistake is ours to see
        log.exception("the validator of %s raised", topic)
        return False


@asynccontextmanager
async def open_hub(
    *, seed: int | None = None, latency: float = 0.0, buffer: int = 256 * 1024
) -> AsyncIterator[MemoryHub]:
    """A hub while the block runs; its handlers are cancelled at the end. `seed` turns on random splits of what readers get."""
    with plain_errors():
        async with trio.open_nursery() as nursery:
            yield MemoryHub(nursery, seed=seed, latency=latency, buffer=buffer)
            nursery.cancel_scope.cancel()
