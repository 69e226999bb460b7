"""TCP under libp2p: exact buffered reads, dialing without a head start, listening without sharing the port.

py-libp2p reads a Noise message in two system calls and gives up when one arrives in more than a hundred pieces; a buffer
here makes both untrue. Its listener sets SO_REUSEPORT, so a second node on the same port would take half of the connections
without an error; ours does not.
"""

from __future__ import annotations

import trio
from libp2p.abc import IListener, IRawConnection
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

_CHUNK = 128 * 1024


class BufferedSocket(ReadWriteCloser):
    """A TCP stream as libp2p wants it: `read(n)` waits for exactly n bytes, `read()` returns what there is."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()
        try:
            peer = stream.socket.getpeername()
            self._remote: tuple[str, int] | None = (peer[0], peer[1])
        except OSError:
            self._remote = None

    async def read(self, n: int | None = None) -> bytes:
        while len(self._buffer) < (1 if n is None else n):
            try:
                data = await self.stream.receive_some(_CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError(f"TCP connection lost: {error}", transport="tcp") from error
            if not data:
                n = None
                break
            self._buffer += data
        taken = bytes(self._buffer[: len(self._buffer) if n is None else n])
        del self._buffer[: len(taken)]
        return taken

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"TCP connection lost: {error}", transport="tcp") from error

    async def close(self) -> None:
        await trio.aclose_forcefully(self.stream)

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._remote


class Dialer(TCP):
    """py-libp2p's TCP transport (names, DNS) over our sockets. It only dials."""

    async def _dial_resolved(self, maddr: Multiaddr, source: tuple[str, int] | None = None) -> IRawConnection:
        host, port = host_and_port(maddr)
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError as error:
            raise OpenConnectionError(f"{host}:{port}: {error}") from error
        return RawConnection(BufferedSocket(stream), True)


class Listening(IListener):
    """What libp2p is told of our listening sockets: their addresses, for identify. Accepting is the host's."""

    def __init__(self, addresses: tuple[Multiaddr, ...]) -> None:
        self._addresses = addresses

    async def listen(self, maddr: Multiaddr) -> None:
        raise NotImplementedError("the host listens")

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return self._addresses

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


def host_and_port(address: Multiaddr) -> tuple[str, int]:
    """IP address and TCP port of a multiaddr. Raises `OpenConnectionError` when it has none."""
    values: dict[str, str] = {}
    for protocol in address.protocols():
        if protocol.name in ("ip4", "ip6", "tcp"):
            values.setdefault(protocol.name, str(address.value_for_protocol(protocol.name)))
    host = values.get("ip4") or values.get("ip6")
    if host is None or "tcp" not in values:
        raise OpenConnectionError(f"{address} is not an address of the form /ip4/1.2.3.4/tcp/4001")
    return host, int(values["tcp"])


def address_of_socket(socket: trio.socket.SocketType) -> Multiaddr:
    name = socket.getsockname()
    return Multiaddr(f"/{'ip6' if ':' in name[0] else 'ip4'}/{name[0]}/tcp/{name[1]}")
