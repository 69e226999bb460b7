"""Who takes part, what they sign, and what can be wrong with a signature.

Keys are derived from names, so a failing test prints the same addresses every time. Everything that a key really signs is
kept in `Voices`: a contract that acts for somebody without such a signature has broken I4, whatever the model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from node.testing.contracts import high_s, key, signer_of
from protocol.ids import ZERO_ADDRESS, Address, keccak256
from protocol.keys import PrivateKey
from protocol.typed_data import Domain

T = TypeVar("T")


class Dice(Protocol):
    """Where choices come from: a seeded generator, or hypothesis."""

    def choice(self, options: Sequence[T], /) -> T: ...

    def randint(self, low: int, high: int, /) -> int: ...


_NAMES = (
    *("ann", "bob", "session", "worker", "worker2", "worker3", "worker4", "owner", "owner2"),
    *("jack", "jill", "june", "guard", "eve", "mallory"),
)
KEYS = {key(name).address: key(name) for name in _NAMES}
(ANN, BOB, SESSION, WORKER, WORKER2, WORKER3, WORKER4, OWNER, OWNER2, JACK, JILL, JUNE, GUARD, EVE, MALLORY) = KEYS
CROWD = tuple(KEYS)
CLIENTS = (ANN, BOB)
WORKERS = (WORKER, WORKER2, WORKER3, WORKER4)
OWNERS = (OWNER, OWNER2)
JURORS = (JACK, JILL, JUNE)
PAYOUT = Address(b"\x99" * 20)
"""Where the owners send earnings; nobody here has its key."""
NAMES = {
    **dict(zip(KEYS, _NAMES, strict=True)),
    PAYOUT: "payout",
    ZERO_ADDRESS: "zero",
}
FLAWS = ("key", "chain", "contract", "about", "amount", "time", "high_s", "v", "v0", "short", "long", "zeros", "empty")
"""What can be wrong with a signed step. "about": signed for another channel, job or owner."""


def flaw_of(dice: Dice) -> str:
    """Mostly none."""
    return dice.choice(FLAWS) if dice.randint(0, 3) == 0 else "none"


def damaged(signature: bytes, flaw: str) -> bytes:
    if flaw == "high_s":
        return high_s(signature)
    if flaw == "v":
        return signature[:64] + bytes((55 - signature[64],))
    if flaw == "v0":
        return signature[:64] + bytes((signature[64] - 27,))
    return {"short": signature[:64], "long": signature + b"\0", "zeros": bytes(65), "empty": b""}.get(flaw, signature)


class Voices:
    """Signs for everybody and remembers what was really said."""

    def __init__(self, wrong_contract: Address) -> None:
        self._wrong = wrong_contract
        self._said: set[tuple[Address, bytes]] = set()
        self._cache: dict[tuple[Address, bytes], bytes] = {}

    def said(self, who: Address, digest: bytes) -> bool:
        return (who, digest) in self._said

    def sign_digest(self, who: Address, digest: bytes, flaw: str = "none") -> bytes:
        """By `who`, unless the flaw is the key."""
        by = MALLORY if flaw == "key" or who not in KEYS else who
        signature = self._cache.get((by, digest))
        if signature is None:
            signature = self._cache[by, digest] = KEYS[by].sign(digest)
        self._said.add((by, digest))
        return damaged(signature, flaw)

    def sign(self, struct: Any, who: Address, flaw: str, domain: Domain) -> bytes:
        """A signature of `who` over a typed struct, with `flaw`."""
        if flaw == "chain":
            domain = Domain(1, domain.verifying_contract)
        elif flaw == "contract":
            domain = Domain(domain.chain_id, self._wrong)
        return self.sign_digest(who, struct.digest(domain), flaw)


def recovered(struct: Any, domain: Domain, signature: bytes) -> Address | None:
    """Who signed the digest that the contract computes."""
    return signer_of(struct.digest(domain), signature)


_PERMIT = keccak256(b"Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)")
_RECEIVE = keccak256(
    b"ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,"
    b"bytes32 nonce)"
)


def _typed(separator: bytes, kind: bytes, *words: int | bytes) -> bytes:
    body = b"".join(w.to_bytes(32) if isinstance(w, int) else w.rjust(32, b"\0") for w in words)
    return keccak256(b"\x19\x01" + separator + keccak256(kind + body))


def permit_digest(separator: bytes, owner: Address, spender: Address, value: int, nonce: int, deadline: int) -> bytes:
    """EIP-2612."""
    return _typed(separator, _PERMIT, owner, spender, value, nonce, deadline)


def receive_digest(
    separator: bytes, sender: Address, to: Address, value: int, after: int, before: int, nonce: bytes
) -> bytes:
    """EIP-3009."""
    return _typed(separator, _RECEIVE, sender, to, value, after, before, nonce)


def split(signature: bytes) -> tuple[int, bytes, bytes]:
    """(v, r, s), of anything."""
    padded = signature.ljust(65, b"\0")
    return padded[64], padded[:32], padded[32:64]


def key_of(who: Address) -> PrivateKey:
    return KEYS[who]
