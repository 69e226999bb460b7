"""EIP-1559 transactions: encode, hash, sign. Pure, and small enough to check by eye.

The hash is known before anything is sent, so a lost answer never hides a transaction. Signing goes through
`protocol.keys.PrivateKey`: the secret stays inside it. tests/effects compare every byte with eth-account.

Source: EIP-1559 (0x02 || rlp([...])), EIP-155 (chain id), EIP-2 (low s), Yellow Paper appendix B (RLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from protocol.ids import Address, keccak256
from protocol.keys import PrivateKey

Rlp: TypeAlias = "bytes | int | Sequence[Rlp]"
TYPE_BYTE: Final = b"\x02"
BUMP_PERCENT: Final = 13
"""Fee raise of a replacement: nodes want at least 10 %; 12.5 % rounded up so that small fees move too."""


def rlp(item: Rlp) -> bytes:
    """Recursive length prefix of bytes, a non-negative integer (no leading zeros) or a list."""
    if isinstance(item, int):
        item = item.to_bytes((item.bit_length() + 7) // 8)
    if isinstance(item, bytes):
        if len(item) == 1 and item[0] < 0x80:
            return item
        return _prefix(len(item), 0x80) + item
    body = b"".join(rlp(part) for part in item)
    return _prefix(len(body), 0xC0) + body


def _prefix(length: int, offset: int) -> bytes:
    if length < 56:
        return bytes((offset + length,))
    size = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes((offset + 55 + len(size),)) + size


@dataclass(frozen=True, slots=True)
class Transaction:
    """One unsigned dynamic-fee transaction."""

    chain_id: int
    nonce: int
    tip: int
    """maxPriorityFeePerGas, wei."""
    max_fee: int
    """maxFeePerGas, wei."""
    gas: int
    to: Address | None
    """None creates a contract."""
    value: int
    data: bytes

    def _fields(self) -> list[Rlp]:
        to = b"" if self.to is None else bytes(self.to)
        return [self.chain_id, self.nonce, self.tip, self.max_fee, self.gas, to, self.value, self.data, []]

    def sign(self, key: PrivateKey) -> SignedTransaction:
        signature = key.sign(keccak256(TYPE_BYTE + rlp(self._fields())))
        r, s, parity = int.from_bytes(signature[:32]), int.from_bytes(signature[32:64]), signature[64] - 27
        raw = TYPE_BYTE + rlp([*self._fields(), parity, r, s])
        return SignedTransaction(self, raw, keccak256(raw))

    def bumped(self, base_fee: int, cap: int) -> Transaction | None:
        """The replacement of this transaction: both fees raised; None when that would pass `cap` wei per gas."""
        tip = self.tip + -(-self.tip * BUMP_PERCENT // 100)
        max_fee = max(self.max_fee + -(-self.max_fee * BUMP_PERCENT // 100), 2 * base_fee + tip)
        if max_fee > cap:
            max_fee = cap
            if max_fee * 100 < self.max_fee * 110 or tip > max_fee:
                return None
        return replace(self, tip=tip, max_fee=max_fee)


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    transaction: Transaction
    raw: bytes
    """What is sent."""
    hash: bytes
