"""Names of things: addresses, peers, jobs, models. Each is one canonical value with one text form.

One secp256k1 key is a peer, a signer and an address at once: a libp2p PeerId of such a key inlines the compressed
public key (identity multihash), so the address follows from the PeerId without a message.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final

import base58
import coincurve
from sha3 import keccak_256 as _keccak_256  # type: ignore[import-untyped]

from protocol.errors import InvalidValue

# protobuf PublicKey{Type: Secp256k1 = 2, Data: 33 bytes} behind an identity multihash of 37 bytes (libp2p peer-ids spec)
_PEER_PREFIX: Final = bytes.fromhex("0025") + bytes.fromhex("08021221")
_PEER_LENGTH: Final = len(_PEER_PREFIX) + 33
# CIDv1, codec raw (0x55), multihash sha2-256 of 32 bytes (multiformats CID spec)
_CID_PREFIX: Final = bytes.fromhex("01551220")

UINT128_MAX: Final = 2**128 - 1


def keccak256(data: bytes) -> bytes:
    """Ethereum's Keccak-256 of `data`: 32 bytes."""
    return bytes(_keccak_256(data).digest())


class Address(bytes):
    """An Ethereum account: 20 bytes; text form is the EIP-55 checksum."""

    __slots__ = ()

    def __new__(cls, value: bytes | str) -> Address:
        if isinstance(value, str):
            value = _address_bytes(value)
        if len(value) != 20:
            raise InvalidValue(f"an address has 20 bytes, not {len(value)}")
        return super().__new__(cls, value)

    def __str__(self) -> str:
        digits = self.hex()
        marks = keccak256(digits.encode()).hex()
        return "0x" + "".join(d.upper() if int(m, 16) >= 8 else d for d, m in zip(digits, marks, strict=False))

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"


ZERO_ADDRESS: Final = Address(bytes(20))


def _address_bytes(text: str) -> bytes:
    if len(text) != 42 or not text.startswith("0x"):
        raise InvalidValue(f"not an address: {text[:64]!r} (expected 0x and 40 hex digits)")
    try:
        raw = bytes.fromhex(text[2:])
    except ValueError:
        raise InvalidValue(f"not an address: {text!r} (not hexadecimal)") from None
    mixed = text[2:] not in (text[2:].lower(), text[2:].upper())
    if mixed and str(Address(raw)) != text:
        raise InvalidValue(f"address {text} fails its EIP-55 checksum: a digit is wrong")
    return raw


class Hash32(bytes):
    """Any 32-byte name: a job id, a channel id, a digest. Text form is 0x hex."""

    __slots__ = ()

    def __new__(cls, value: bytes | str) -> Hash32:
        if isinstance(value, str):
            digits = value.removeprefix("0x")
            try:
                value = bytes.fromhex(digits)
            except ValueError:
                raise InvalidValue(f"not hexadecimal: {value[:70]!r}") from None
            if len(digits) != 2 * len(value):  # bytes.fromhex skips white space
                raise InvalidValue(f"not hexadecimal: {digits[:70]!r}")
        if len(value) != 32:
            raise InvalidValue(f"expected 32 bytes, got {len(value)}")
        return bytes.__new__(cls, value)  # not super(): a start makes a million of these

    def __str__(self) -> str:
        return "0x" + self.hex()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class JobId(Hash32):
    """One job across retry, restart and fail-over: 32 random bytes chosen by the client of a stream, or the EIP-712 digest
    of a batch job's `Quote`."""

    __slots__ = ()


class ChannelId(Hash32):
    """EIP-712 digest of a `ChannelConfig`: chain and contract are inside it."""

    __slots__ = ()


ZERO_HASH: Final = Hash32(bytes(32))


class ModelId(Hash32):
    """sha256 of a model's canonical manifest; text form is a CIDv1 (raw, sha2-256, base32)."""

    __slots__ = ()

    @classmethod
    def of_manifest(cls, manifest: bytes) -> ModelId:
        return cls(hashlib.sha256(manifest).digest())

    @classmethod
    def from_cid(cls, text: str) -> ModelId:
        """Parse the text form. Raises `InvalidValue` for anything but CIDv1 raw sha2-256 in lower-case base32."""
        body = text[1:].upper()
        try:
            raw = base64.b32decode(body + "=" * (-len(body) % 8))
        except ValueError:
            raw = b""
        if len(raw) == 36 and raw.startswith(_CID_PREFIX):
            model = cls(raw[len(_CID_PREFIX) :])
            if str(model) == text:  # base32 has spare bits and padding: only the form that we write counts
                return model
        raise InvalidValue(f"not a model id: {text[:80]!r} (expected a CIDv1 like bafkrei...)")

    def __str__(self) -> str:
        return "b" + base64.b32encode(_CID_PREFIX + self).decode().lower().rstrip("=")


class PeerId(str):
    """A libp2p peer with an inlined secp256k1 key, in base58btc (``16Uiu2HA...``)."""

    __slots__ = ()

    def __new__(cls, text: str) -> PeerId:
        if len(text) > 64:
            raise InvalidValue("a PeerId of a secp256k1 key has at most 64 characters")
        try:
            raw = base58.b58decode(text)
        except ValueError:
            raise InvalidValue(f"not a PeerId: {text!r} (not base58)") from None
        if len(raw) != _PEER_LENGTH or not raw.startswith(_PEER_PREFIX):
            raise InvalidValue(f"PeerId {text!r} does not inline a secp256k1 key; Gristmill peers sign with theirs")
        if base58.b58encode(raw).decode() != text:  # b58decode drops trailing white space
            raise InvalidValue(f"PeerId {text!r} is not in its canonical form")
        _point(raw[len(_PEER_PREFIX) :])
        return super().__new__(cls, text)

    @classmethod
    def from_public_key(cls, compressed: bytes) -> PeerId:
        if len(compressed) != 33:
            raise InvalidValue("a compressed secp256k1 key has 33 bytes")
        return cls(base58.b58encode(_PEER_PREFIX + compressed).decode())

    @property
    def public_key(self) -> bytes:
        """Compressed secp256k1 key, 33 bytes."""
        return base58.b58decode(str(self))[len(_PEER_PREFIX) :]

    @property
    def address(self) -> Address:
        return address_of(self.public_key)


def address_of(public_key: bytes) -> Address:
    """Account of a secp256k1 public key (33 or 65 bytes). Raises `InvalidValue` when it is no point of the curve."""
    return Address(keccak256(_point(public_key).format(compressed=False)[1:])[12:])


def _point(public_key: bytes) -> coincurve.PublicKey:
    try:
        return coincurve.PublicKey(public_key)
    except ValueError:
        raise InvalidValue("not a point of secp256k1") from None
