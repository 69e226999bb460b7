"""Who may take how much of the host: admission of inbound connections, and every limit of the network in one place.

The rules:
- A socket that has not finished its handshake costs a *half-open* slot. Slots are capped per source address, so one address
  cannot take them all, and in total; when the total is reached the oldest half-open socket gives way, because an honest
  handshake takes milliseconds and a silent socket stays. A half-open socket ends by itself after `handshake_timeout`.
- A finished connection costs a *connection* slot. They are capped per neighbourhood (/24 for IPv4, /56 for IPv6, about what
  one customer of a provider gets), per peer and in total; the last `reserved` slots are for peers that we know, so that
  strangers cannot lock out the peers we work with.

Not covered: an attacker with many neighbourhoods can fill the slots that are not reserved; the cost of the Noise handshake
itself (about 2 ms of one core) is bounded only by the caps on half-open sockets, not by a proof of work; the kernel's accept
queue is shared by all sources, so a SYN flood is the operating system's affair. Gossip's own per-peer limits are py-libp2p's.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NetworkLimits:
    """Every cap and time-out of the host. Times in seconds, sizes in bytes."""

    connections: int = 300
    """Inbound connections in all, reserved ones included."""
    reserved: int = 50
    """Of these, how many only known peers can take."""
    connections_per_subnet: int = 64
    connections_per_peer: int = 2
    """Two, because both sides may dial at the same moment."""
    half_open: int = 128
    half_open_per_address: int = 16
    handshake_timeout: float = 5.0
    dial_timeout: float = 10.0
    negotiation_timeout: float = 10.0
    """From the first byte of a stream to its protocol being known."""
    streams_per_connection: int = 128
    """Streams that the far end may have open at once; as many for us."""
    stream_receive_buffer: int = 1024 * 1024
    """Most unread bytes of one stream; whoever sends more than it was granted has the stream reset."""
    connection_receive_buffer: int = 16 * 1024 * 1024
    """Most unread bytes of all streams of one connection; the stream that passes it is reset."""
    connection_send_buffer: int = 128 * 1024
    """Writers wait while more than this is queued for the socket."""
    write_timeout: float = 20.0
    """A socket that takes no byte for so long is dead; its connection ends."""
    keepalive: float = 30.0
    """Seconds between pings, and how long an answer may take."""
    linger: float = 30.0
    """How long a stream that we closed waits for the far end to close it too."""
    gossip_message: int = 64 * 1024
    """Largest gossip message."""


def subnet_of(address: str) -> str:
    """The neighbourhood that an address is counted in: /24 of IPv4 (also when mapped into IPv6), /56 of IPv6."""
    try:
        ip = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 56), strict=False))


@dataclass(eq=False, slots=True)
class Ticket:
    """One inbound socket's claim on the host, from accept to close."""

    address: str
    subnet: str
    evict: Callable[[], None]
    """Ends the socket; called when an older half-open socket must give way."""
    peer: str | None = None
    """Set once the handshake has told who it is."""


@dataclass(eq=False, slots=True)
class Guards:
    """Counts inbound sockets and decides. Synchronous and exact: there is no await between a check and its count."""

    limits: NetworkLimits
    known: set[str] = field(default_factory=set)
    """Peers for whom slots are reserved."""
    refused: Counter[str] = field(default_factory=Counter)
    """How often each rule refused or evicted, by rule."""
    _half_open: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)
    _half_open_by_address: Counter[str] = field(default_factory=Counter)
    _established: set[Ticket] = field(default_factory=set)
    _by_subnet: Counter[str] = field(default_factory=Counter)
    _by_peer: Counter[str] = field(default_factory=Counter)

    @property
    def half_open(self) -> int:
        return len(self._half_open)

    @property
    def established(self) -> int:
        return len(self._established)

    def admit(self, address: str, evict: Callable[[], None]) -> Ticket | None:
        """A new socket from `address`: its ticket, or None when the address has too many unfinished ones."""
        if self._half_open_by_address[address] >= self.limits.half_open_per_address:
            self.refused["half_open_per_address"] += 1
            return None
        if len(self._half_open) >= self.limits.half_open:
            oldest = next(iter(self._half_open))
            self._leave_half_open(oldest)
            self.refused["half_open"] += 1
            oldest.evict()
        ticket = Ticket(address, subnet_of(address), evict)
        self._half_open[ticket] = None
        self._half_open_by_address[address] += 1
        return ticket

    def establish(self, ticket: Ticket, peer: str) -> bool:
        """The handshake has told that this is `peer`: may it stay?"""
        self._leave_half_open(ticket)
        rule = self._refusal(ticket, peer)
        if rule:
            self.refused[rule] += 1
            return False
        ticket.peer = peer
        self._established.add(ticket)
        self._by_subnet[ticket.subnet] += 1
        self._by_peer[peer] += 1
        return True

    def release(self, ticket: Ticket) -> None:
        """The socket is gone. May be called more than once."""
        self._leave_half_open(ticket)
        if ticket in self._established and ticket.peer is not None:
            self._established.discard(ticket)
            _decrement(self._by_subnet, ticket.subnet)
            _decrement(self._by_peer, ticket.peer)

    def _refusal(self, ticket: Ticket, peer: str) -> str:
        limits = self.limits
        if self._by_peer[peer] >= limits.connections_per_peer:
            return "connections_per_peer"
        if peer in self.known:
            return "connections" if len(self._established) >= limits.connections else ""
        if len(self._established) >= limits.connections - limits.reserved:
            return "connections"
        return "connections_per_subnet" if self._by_subnet[ticket.subnet] >= limits.connections_per_subnet else ""

    def _leave_half_open(self, ticket: Ticket) -> None:
        if ticket in self._half_open:
            del self._half_open[ticket]
            _decrement(self._half_open_by_address, ticket.address)


def _decrement(counter: Counter[str], key: str) -> None:
    """Count down and forget zeros: a scan of the address space must leave nothing behind."""
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
