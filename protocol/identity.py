"""What the identity key signs for libp2p: three kinds of messages, each behind a prefix of its own, and nothing else.

A worker's hot key is its libp2p identity too. libp2p signs the sha256 of a message that begins with its purpose, so nothing
signed here can be read as an EIP-712 struct or a transaction, whose digests are keccak. A connection proves the identity by a
signature over the Noise static key: made once per start, it lets a process speak as this peer without holding the key.

Sources: libp2p specs noise (static key), pubsub (message signing), RFC 0002 (signed envelopes), RFC 0003 (peer records).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from protocol.errors import InvalidValue

MAX_BYTES: Final = 1 << 20


class Purpose(IntEnum):
    NOISE_KEY = 1
    """The static key of our side of all connections: 32 bytes."""
    GOSSIP = 2
    """A message of ours in a topic."""
    PEER_RECORD = 3
    """Our addresses."""


_PREFIXES: Final[dict[Purpose, bytes]] = {
    Purpose.NOISE_KEY: b"noise-libp2p-static-key:",
    Purpose.GOSSIP: b"libp2p-pubsub:",
    Purpose.PEER_RECORD: b"\x12libp2p-peer-record\x02\x03\x01",
}


@dataclass(frozen=True, slots=True)
class IdentityMessage:
    """A whole message as libp2p wants it signed, its prefix included."""

    purpose: Purpose
    data: bytes

    @classmethod
    def decode(cls, data: bytes) -> IdentityMessage:
        """Raises `InvalidValue` for anything but the three kinds."""
        if len(data) > MAX_BYTES:
            raise InvalidValue(f"a message of {len(data)} bytes is not signed by the identity key")
        for purpose, prefix in _PREFIXES.items():
            if data.startswith(prefix):
                if purpose is Purpose.NOISE_KEY and len(data) != len(prefix) + 32:
                    raise InvalidValue("a Noise static key has 32 bytes")
                return cls(purpose, data)
        raise InvalidValue("the identity key signs Noise keys, gossip and peer records only")

    def encode(self) -> bytes:
        return self.data

    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()
