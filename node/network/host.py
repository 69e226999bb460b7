"""The libp2p host behind `node.ports.Network`: TCP, Noise, Yamux, identify, gossipsub.

The rules:
- One secp256k1 key is the peer and the signer: the PeerId that libp2p proves in the handshake is the PeerId of our key.
- A handler that raises ends its own stream and nothing else.
- A connection is dialled by one address, authenticated by the PeerId in that address, and kept; streams cost no connection.
- Opening a stream never waits for the network once the peer is known to speak the protocol (`streams`).

py-libp2p 0.8.1 is used through its public constructors and `Swarm.dial_addr` / `Swarm.add_conn`; its resource manager is left
out, because `guards` counts exactly, and its listener too, because it never gives back the slot of an inbound connection.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio
from libp2p.abc import IMuxedConn
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.net_stream import NetStream, StreamState
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from node.errors import NetworkError
from node.groups import plain_errors
from node.network.gossip import Gossip, open_gossip
from node.network.guards import Guards, NetworkLimits
from node.network.sockets import BufferedSocket, Listening, address_of_socket, host_and_port
from node.network.stats import NetworkStats
from node.network.streams import HostStream, NegotiationFailed, agree, expect_line, propose
from node.network.swarm import build_swarm, quiet_libp2p
from node.network.yamux import Mux, MuxStream, StreamLimit
from node.ports import ByteStream, Identity, StreamClosed, StreamHandler
from protocol.errors import GristmillError
from protocol.ids import PeerId

log = logging.getLogger(__name__)

_BACKLOG = 512
_RETRY_FIRST, _RETRY_LONGEST = 1.0, 30.0


class HostNetwork:
    """`node.ports.Network` on libp2p. Use `open_host`."""

    def __init__(self, identity: Identity, limits: NetworkLimits) -> None:
        self.limits = limits
        self.guards = Guards(limits)
        self.stats = NetworkStats()
        self._peer_id = identity.peer_id
        self._swarm = build_swarm(identity, limits, self._take_stream)
        self._host = BasicHost(self._swarm)
        self._handlers: dict[str, StreamHandler] = {}
        self._addresses: tuple[str, ...] = ()
        self._proven: dict[ID, set[str]] = {}
        """Protocols that a peer has confirmed on this connection."""
        self._denied: dict[ID, set[str]] = {}
        """Protocols that identify promised and the peer then refused."""
        self._dialing: dict[ID, trio.Lock] = {}
        self._gossip: Gossip | None = None
        self._tasks: trio.Nursery | None = None

    # --- the port

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    @property
    def peers(self) -> tuple[PeerId, ...]:
        found = (_peer_id(peer) for peer in list(self._swarm.connections) if self._live(peer) is not None)
        return tuple(peer for peer in found if peer is not None)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve `protocol`: each stream is one call of `handler` and is closed when it returns, reset when it raises."""
        self._handlers[protocol] = handler
        self._host.get_mux().add_handler(TProtocol(protocol), None)  # so that identify names it

    async def connect(self, multiaddr: str) -> PeerId:
        address, peer = parse_multiaddr(multiaddr)
        if peer == self._peer_id:
            raise NetworkError(f"{multiaddr} is this node itself")
        peer_id = ID.from_string(peer)
        lock = self._dialing.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                if self._live(peer_id) is None:
                    await self._dial(address, peer_id)
        finally:
            if not lock.locked():
                self._dialing.pop(peer_id, None)
        return peer

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream:
        """Raises `NetworkError` when there is no connection or the peer does not speak `protocol`.

        A peer that stops speaking a protocol it had announced shows as `StreamClosed` at the first read.
        """
        peer_id = ID.from_string(peer)
        mux = self._live(peer_id)
        if mux is None:
            raise NetworkError(f"not connected to {peer}", hint="connect to one of its addresses first")
        try:
            stream = mux.open()
        except (MuxedConnUnavailable, StreamLimit) as error:
            raise NetworkError(f"no stream to {peer}: {error}") from error
        try:
            awaited = await propose(stream, protocol)
            if not self._speaks(peer_id, protocol):
                self.stats.negotiation_round_trips += 1
                with trio.fail_after(self.limits.negotiation_timeout):
                    for line in awaited:
                        await expect_line(stream, line)
                awaited = ()
                self._proven.setdefault(peer_id, set()).add(protocol)
                self._denied.get(peer_id, set()).discard(protocol)
        except (NegotiationFailed, MuxedStreamError, trio.TooSlowError) as error:
            stream.abort()
            detail = "no answer in time" if isinstance(error, trio.TooSlowError) else str(error)
            raise NetworkError(f"{peer} did not open {protocol}: {detail}") from error
        except trio.Cancelled:
            stream.abort()
            raise
        self.stats.streams_opened += 1
        return HostStream(stream, peer, awaited, lambda: self._deny(peer_id, protocol))

    async def publish(self, topic: str, data: bytes) -> None:
        await self._running_gossip().publish(topic, data)

    async def subscribe(
        self, topic: str, accept: Callable[[bytes], bool], receive: Callable[[bytes], Awaitable[None]]
    ) -> None:
        await self._running_gossip().subscribe(topic, accept, receive)

    # --- beyond the port

    def reserve(self, peer: PeerId) -> None:
        """Count `peer` as known: the reserved connection slots are for it."""
        self.guards.known.add(peer)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection with `peer`."""
        async with trio.open_nursery() as nursery:
            for connection in self._swarm.get_connections(ID.from_string(peer)):
                nursery.start_soon(connection.close)

    # --- dialing

    async def _dial(self, address: Multiaddr, peer_id: ID) -> None:
        self.stats.dials += 1
        try:
            with trio.fail_after(self.limits.dial_timeout):
                connection = await self._swarm.dial_addr(address, peer_id)
        except trio.TooSlowError:
            self.stats.dials_failed += 1
            raise NetworkError(
                f"no answer from {address} within {self.limits.dial_timeout:g} s",
                hint="is the node running, and its port open to you?",
            ) from None
        except (
            Exception
        ) as error:  # py-libp2p raises its own and foreign exceptions here; each means that we are not connected
            self.stats.dials_failed += 1
            raise NetworkError(f"cannot connect to {address}: {_root_cause(error)}", hint=_hint(error)) from error
        self._watch(connection.muxed_conn, peer_id)

    def _live(self, peer_id: ID) -> Mux | None:
        for connection in self._swarm.get_connections(peer_id):
            mux = connection.muxed_conn
            if isinstance(mux, Mux) and mux.is_established:
                return mux
        return None

    def _speaks(self, peer_id: ID, protocol: str) -> bool:
        if protocol in self._proven.get(peer_id, ()):
            return True
        if protocol in self._denied.get(peer_id, ()):
            return False
        try:
            return protocol in self._host.get_peerstore().get_protocols(peer_id)
        except PeerStoreError:
            return False

    def _deny(self, peer_id: ID, protocol: str) -> None:
        self._proven.get(peer_id, set()).discard(protocol)
        self._denied.setdefault(peer_id, set()).add(protocol)

    def _watch(self, mux: IMuxedConn, peer_id: ID) -> None:
        """Forget what we learnt of a peer when its last connection ends: it may come back as another version."""
        if self._tasks is not None and isinstance(mux, Mux):
            self._tasks.start_soon(self._forget_at_end, mux, peer_id)

    async def _forget_at_end(self, mux: Mux, peer_id: ID) -> None:
        await mux.event_closed.wait()
        if self._live(peer_id) is None:
            self._proven.pop(peer_id, None)
            self._denied.pop(peer_id, None)
            self._host.get_peerstore().clear_protocol_data(peer_id)

    # --- serving

    async def _accept(self, socket: trio.SocketStream) -> None:
        """One inbound socket, from accept to close."""
        raw = BufferedSocket(socket)
        remote = raw.get_remote_address()
        if remote is None:
            return
        scope = trio.CancelScope()
        ticket = self.guards.admit(remote[0], scope.cancel)
        if ticket is None:
            return
        try:
            with scope:
                try:
                    with trio.fail_after(self.limits.handshake_timeout):
                        connection = RawConnection(raw, False)
                        secured = await self._swarm.upgrader.upgrade_security(connection, False)
                        peer_id = secured.get_remote_peer()
                        if not self.guards.establish(ticket, str(peer_id)):
                            return
                        mux = await self._swarm.upgrader.upgrade_connection(secured, peer_id)
                        await self._swarm.add_conn(mux, direction="inbound")
                except (
                    Exception
                ) as error:  # a handshake can fail in any way that a stranger likes; it ends this socket only
                    log.debug("handshake with %s failed: %r", remote[0], error)
                    return
                self.stats.accepted += 1
                if isinstance(mux, Mux):
                    await self._forget_at_end(mux, peer_id)
        finally:
            self.guards.release(ticket)
            await trio.aclose_forcefully(socket)

    def _take_stream(self, stream: MuxStream) -> None:
        """A peer has opened a stream. Not a task of its connection: handlers are told that it ended, not cancelled."""
        if self._tasks is None:
            stream.abort("the host is closing")
        else:
            self._tasks.start_soon(self._serve, stream)

    async def _serve(self, mux: MuxStream) -> None:
        """One inbound stream: agree on a protocol, run its handler, let nothing escape."""
        peer_id = mux.muxed_conn.peer_id
        try:
            with trio.fail_after(self.limits.negotiation_timeout):
                protocol = await agree(mux, self._host.get_mux().handlers)
        except (NegotiationFailed, MuxedStreamError, trio.TooSlowError) as error:
            log.debug("no protocol on a stream of %s: %s", peer_id, error)
            mux.abort()
            return
        handler = self._handlers.get(protocol)
        if handler is None:
            await self._serve_libp2p(mux, TProtocol(protocol))
            return
        peer = _peer_id(peer_id)
        if peer is None:
            mux.abort("only peers with a secp256k1 key are served")
            return
        self.stats.streams_served += 1
        await self._run_handler(handler, HostStream(mux, peer), mux, protocol)

    async def _run_handler(self, handler: StreamHandler, stream: HostStream, mux: MuxStream, protocol: str) -> None:
        try:
            await handler(stream)
        except StreamClosed as error:
            log.debug("%s with %s ended: %s", protocol, stream.remote_peer, error)
            mux.abort()
        except Exception:  # the rule of the module: a handler's mistake ends its own stream
            self.stats.handler_errors += 1
            log.exception("the handler of %s failed; its stream with %s is reset", protocol, stream.remote_peer)
            mux.abort()
        except BaseException:
            mux.abort()
            raise
        else:
            mux.leave()

    async def _serve_libp2p(self, mux: MuxStream, protocol: TProtocol) -> None:
        handler = self._host.get_mux().handlers.get(protocol)
        stream = NetStream(mux, None, None)
        await stream.set_state(StreamState.OPEN)
        stream.set_protocol(protocol)
        try:
            if handler is not None:
                await handler(stream)
        except Exception as error:  # py-libp2p's own handlers: identify, ping, gossip
            log.debug("%s failed: %r", protocol, error)
            mux.abort()
        else:
            mux.leave()

    # --- life

    async def _listen(self, listen: Sequence[str], nursery: trio.Nursery) -> None:
        """Bind every address. Raises `NetworkError` when one cannot be had."""
        found: list[Multiaddr] = []
        for text in listen:
            try:
                host, port = host_and_port(Multiaddr(text))
                listeners = await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
            except Exception as error:  # malformed multiaddr or an address that is taken: both are the caller's to mend
                raise NetworkError(
                    f"cannot listen on {text}: {_root_cause(error)}", hint="another port, or 0 for a free one"
                ) from error
            found += [address_of_socket(listener.socket) for listener in listeners]
            nursery.start_soon(trio.serve_listeners, self._accept, listeners)
        if found:
            self._swarm.listeners[str(found[0])] = Listening(tuple(found))
        self._addresses = tuple(f"{address}/p2p/{self._peer_id}" for address in found)

    async def _keep_connected(self, multiaddr: str) -> None:
        """Stay connected to a bootstrap peer, trying again ever more slowly."""
        delay = _RETRY_FIRST
        while True:
            try:
                peer = await self.connect(multiaddr)
            except NetworkError as error:
                log.info("bootstrap peer: %s", error)
                await trio.sleep(delay)
                delay = min(delay * 2, _RETRY_LONGEST)
                continue
            self.reserve(peer)
            delay = _RETRY_FIRST
            mux = self._live(ID.from_string(peer))
            if mux is not None:
                await mux.event_closed.wait()
            await trio.sleep(delay)

    async def _close_connections(self) -> None:
        with trio.move_on_after(3, shield=True):
            async with trio.open_nursery() as nursery:
                for connection in self._swarm.get_connections():
                    nursery.start_soon(_close_quietly, connection.muxed_conn)

    def _running_gossip(self) -> Gossip:
        if self._gossip is None:
            raise NetworkError("the network is not open")
        return self._gossip


@asynccontextmanager
async def open_host(
    identity: Identity,
    *,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    limits: NetworkLimits | None = None,
    bootstrap: Sequence[str] = (),
) -> AsyncIterator[HostNetwork]:
    """Run a host while the block runs.

    `identity` signs for the peer and keeps its secret.
    Listens on `listen` (multiaddrs; port 0 takes a free one; none makes a client) and stays connected to `bootstrap`.
    Raises `NetworkError` when an address cannot be listened on or a bootstrap address is malformed.
    """
    quiet_libp2p()
    for multiaddr in bootstrap:
        parse_multiaddr(multiaddr)
    network = HostNetwork(identity, limits or NetworkLimits())
    with plain_errors():
        async with (
            background_trio_service(network._swarm),
            open_gossip(network._host, network.limits, network.stats) as gossip,
            trio.open_nursery() as nursery,
        ):
            network._gossip = gossip
            network._tasks = nursery
            try:
                await network._listen(listen, nursery)
                for multiaddr in bootstrap:
                    nursery.start_soon(network._keep_connected, multiaddr)
                yield network
            finally:
                network._tasks = None
                await network._close_connections()
                nursery.cancel_scope.cancel()
                with trio.move_on_after(3, shield=True):
                    await network._host.close()


def parse_multiaddr(text: str) -> tuple[Multiaddr, PeerId]:
    """Address and peer of ``/ip4/.../tcp/.../p2p/16Uiu2...``. Raises `NetworkError`."""
    hint = "a multiaddr looks like /ip4/192.0.2.7/tcp/4001/p2p/16Uiu2HA..."
    if len(text) > 512:
        raise NetworkError("a multiaddr of more than 512 characters", hint=hint)
    try:
        address = Multiaddr(text)
        peer = address.value_for_protocol("p2p")
    except Exception as error:  # the multiaddr package raises many types for malformed text
        raise NetworkError(f"not the address of a peer: {text!r} ({_root_cause(error)})", hint=hint) from error
    try:
        return address, PeerId(str(peer))
    except GristmillError as error:
        raise NetworkError(str(error), hint=hint) from error


def _peer_id(peer_id: ID) -> PeerId | None:
    try:
        return PeerId(str(peer_id))
    except GristmillError:
        return None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _hint(error: BaseException) -> str:
    text = f"{error} {_root_cause(error)}".lower()
    if "mismatch" in text or "peer id" in text:
        return "another node answers at this address: take its current address from where you had it"
    return "is the node running, and its port open to you?"


async def _close_quietly(mux: IMuxedConn) -> None:
    try:
        await mux.close()
    except Exception as error:  # closing goes on with the others
        log.debug("closing a connection: %r", error)
