"""py-libp2p's swarm, assembled from its public parts: Noise over our sockets, our muxer, no resource manager, no auto-dialer.

It holds no secret of the identity: what libp2p wants signed is asked of whoever holds the key. The Noise static key is made anew
at each start and signed for once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio
from libp2p import create_yamux_muxer_option
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.crypto.keys import KeyPair, KeyType, PrivateKey, PublicKey
from libp2p.crypto.secp256k1 import Secp256k1PublicKey
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.upgrader import TransportUpgrader

from node.network.guards import NetworkLimits
from node.network.sockets import Dialer
from node.network.yamux import Mux, MuxStream
from node.ports import Identity

_KEPT = 4
"""Signatures remembered: over the static key and our first peer records."""


def quiet_libp2p() -> None:
    """py-libp2p warns of every failed handshake of a stranger; keep it silent unless LIBP2P_DEBUG asks for its log."""
    if not os.environ.get("LIBP2P_DEBUG"):
        for name in ("libp2p", "libp2p.network.auto_connector"):  # the second sets a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class _NoAutoConnector(AutoConnector):
    """py-libp2p's dials whomever identify has told it of; whom we connect to is decided above this package."""

    async def maybe_connect(self) -> None:
        await trio.lowlevel.checkpoint()


class _Muxers(MuxerMultistream):
    """Muxer negotiation that makes our `Mux`; py-libp2p's makes its own for this protocol whatever it is told."""

    def __init__(self, limits: NetworkLimits, timeout: int, on_stream: Callable[[MuxStream], None]) -> None:
        super().__init__(create_yamux_muxer_option(), timeout)
        self._limits = limits
        self._on_stream = on_stream

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return Mux(conn, peer_id, self._limits, self._on_stream)


class HeldElsewhere(PrivateKey):
    """An identity key as libp2p sees it, whose secret is not here."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._public = Secp256k1PublicKey.from_bytes(identity.public_key)
        self._signed: dict[bytes, bytes] = {}

    def sign(self, data: bytes) -> bytes:
        """Asks the holder. What is asked for at every connection, the static key, is asked of it once."""
        known = self._signed.get(data)
        if known is None:
            known = self._identity.sign_identity(data)
            if len(self._signed) < _KEPT and len(data) < 256:
                self._signed[data] = known
        return known

    def get_public_key(self) -> PublicKey:
        return self._public

    def get_type(self) -> KeyType:
        return KeyType.Secp256k1

    def to_bytes(self) -> bytes:
        raise TypeError("the secret of this key is held elsewhere")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldElsewhere) and other._public.to_bytes() == self._public.to_bytes()

    __hash__ = None  # type: ignore[assignment]


def build_swarm(identity: Identity, limits: NetworkLimits, on_stream: Callable[[MuxStream], None]) -> Swarm:
    """A swarm that dials; the peers' streams go to `on_stream`."""
    key = HeldElsewhere(identity)
    pair = KeyPair(key, key.get_public_key())
    timeout = max(1, round(limits.handshake_timeout))
    noise = Noise(pair, noise_privkey=create_noise_key_pair().private_key)
    upgrader = TransportUpgrader({NOISE: noise}, create_yamux_muxer_option(), timeout)
    upgrader.muxer_multistream = _Muxers(limits, timeout, on_stream)
    peerstore = PeerStore()
    own = ID.from_pubkey(pair.public_key)
    peerstore.add_key_pair(own, pair)
    most = 2 * limits.connections + 64  # `guards` limits inbound connections; outbound ones are ours to count
    config = ConnectionConfig(
        max_connections=most,
        min_connections=0,
        low_watermark=0,
        high_watermark=most,
        max_connections_per_peer=limits.connections_per_peer,
        outbound_upgrade_timeout=limits.dial_timeout,
        inbound_upgrade_timeout=limits.handshake_timeout,
    )
    swarm = Swarm(own, peerstore, upgrader, [Dialer()], RetryConfig(max_retries=0), config)
    swarm.auto_connector = _NoAutoConnector(swarm)
    return swarm
