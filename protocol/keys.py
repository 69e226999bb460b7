"""secp256k1 keys: sign a 32-byte digest, recover the signer. Nothing here reads a clock, a file or entropy.

A signature is 65 bytes r || s || v with v in {27, 28} and s in the lower half of the order, as the contracts demand;
anything else is refused, so one message has one signature form. RFC 6979 nonces: signing needs no randomness.
"""

from __future__ import annotations

from typing import Final

import coincurve

from protocol.errors import InvalidValue, RemoteProtocolError, WireCode
from protocol.identity import IdentityMessage
from protocol.ids import Address, PeerId, address_of, keccak256

SIGNATURE_BYTES: Final = 65
_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_HALF_ORDER: Final = _ORDER // 2


class PrivateKey:
    """A signing key. Its bytes never appear in repr, str or pickles."""

    __slots__ = ("_key", "address", "peer_id", "public_key")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32 or not 0 < int.from_bytes(secret) < _ORDER:
            raise InvalidValue("a private key is 32 bytes between 1 and the order of secp256k1")
        self._key = coincurve.PrivateKey(secret)
        self.public_key: bytes = self._key.public_key.format(compressed=True)
        self.address: Address = address_of(self.public_key)
        self.peer_id: PeerId = PeerId.from_public_key(self.public_key)

    def sign(self, digest: bytes) -> bytes:
        """Signature over a 32-byte digest: 65 bytes r || s || v."""
        if len(digest) != 32:
            raise InvalidValue("only 32-byte digests are signed")
        raw = self._key.sign_recoverable(digest, hasher=None)
        return raw[:64] + bytes((27 + raw[64],))

    def sign_der(self, digest: bytes) -> bytes:
        """Signature over a 32-byte digest in DER, the form of libp2p."""
        if len(digest) != 32:
            raise InvalidValue("only 32-byte digests are signed")
        return self._key.sign(digest, hasher=None)

    def sign_identity(self, data: bytes) -> bytes:
        """Signature of one of libp2p's messages, DER. Raises `InvalidValue` for anything else."""
        return self.sign_der(IdentityMessage.decode(data).digest())

    def secret_bytes(self) -> bytes:
        """The 32 secret bytes, for the keystore and for a signer's pipe only."""
        return bytes(self._key.secret)

    def __repr__(self) -> str:
        return f"PrivateKey({self.address})"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not serialised by accident")


def recover(digest: bytes, signature: bytes) -> Address:
    """Address that signed `digest`. Raises `RemoteProtocolError(BAD_SIGNATURE)` for every malformed signature."""
    if len(signature) != SIGNATURE_BYTES:
        raise RemoteProtocolError(WireCode.BAD_SIGNATURE, f"a signature has 65 bytes, not {len(signature)}")
    v = signature[64]
    if v not in (27, 28):
        raise RemoteProtocolError(WireCode.BAD_SIGNATURE, f"recovery byte is {v}, not 27 or 28")
    if int.from_bytes(signature[32:64]) > _HALF_ORDER:
        raise RemoteProtocolError(WireCode.BAD_SIGNATURE, "s is in the upper half of the order (malleable)")
    try:
        point = coincurve.PublicKey.from_signature_and_message(signature[:64] + bytes((v - 27,)), digest, hasher=None)
    except Exception as error:  # libsecp256k1 raises bare Exception or ValueError by release; both mean "no such point"
        raise RemoteProtocolError(WireCode.BAD_SIGNATURE, "no key can have made this signature") from error
    return Address(keccak256(point.format(compressed=False)[1:])[12:])


def require_signer(digest: bytes, signature: bytes, expected: Address, what: str) -> None:
    """Check that `expected` signed `digest`. Raises `RemoteProtocolError(BAD_SIGNATURE)` naming `what`."""
    signer = recover(digest, signature)
    if signer != expected:
        raise RemoteProtocolError(WireCode.BAD_SIGNATURE, f"{what} is signed by {signer}, not by {expected}")
