"""EIP-1559 transactions: encode, hash, put the signature in. Pure, and small enough to check by eye.

The hash is known before anything is sent, so a lost answer never hides a transaction. `encode` and `decode` are the form in which
a signer is asked: fixed words and the calldata, nothing to parse. tests/effects compare every signed byte with eth-account.

Source: EIP-1559 (0x02 || rlp([...])), EIP-155 (chain id), EIP-2 (low s), Yellow Paper appendix B (RLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from protocol.errors import InvalidValue
from protocol.ids import Address, keccak256

Rlp: TypeAlias = "bytes | int | Sequence[Rlp]"
TYPE_BYTE: Final = b"\x02"
MAX_DATA: Final = 1 << 17
"""Bytes of calldata; nodes take no transaction of more than 128 KiB."""
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

    def digest(self) -> bytes:
        """The 32 bytes that are signed."""
        return keccak256(TYPE_BYTE + rlp(self._fields()))

    def encode(self) -> bytes:
        """Six words, whether there is a `to`, the `to`, the calldata. Raises `InvalidValue` for a number out of range."""
        numbers = (self.chain_id, self.nonce, self.tip, self.max_fee, self.gas, self.value)
        if not all(0 <= number < 1 << 256 for number in numbers) or len(self.data) > MAX_DATA:
            raise InvalidValue("a number of the transaction does not fit a word, or its calldata is too long")
        to = bytes(21) if self.to is None else b"\x01" + self.to
        return b"".join(number.to_bytes(32) for number in numbers) + to + self.data

    @classmethod
    def decode(cls, encoded: bytes) -> Transaction:
        """The one transaction that encodes to these bytes. Raises `InvalidValue` when none does."""
        head = 6 * 32 + 21
        if not head <= len(encoded) <= head + MAX_DATA:
            raise InvalidValue(f"a transaction has {head} bytes and its calldata, not {len(encoded)}")
        numbers = [int.from_bytes(encoded[n : n + 32]) for n in range(0, 6 * 32, 32)]
        chain_id, nonce, tip, max_fee, gas, value = numbers
        there, to = encoded[head - 21], encoded[head - 20 : head]
        if there > 1 or (not there and any(to)):
            raise InvalidValue("a transaction either has a receiver or makes a contract")
        return cls(chain_id, nonce, tip, max_fee, gas, Address(to) if there else None, value, encoded[head:])

    def signed(self, signature: bytes) -> SignedTransaction:
        """With the signature of `digest()`, 65 bytes r || s || v."""
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


def signature_of(transaction: Transaction, raw: bytes) -> bytes:
    """The signature in these bytes, r || s || v: the other way than `Transaction.signed`.

    Raises `InvalidValue` when the bytes are not this transaction with a signature behind it.
    """
    ahead = b"".join(rlp(part) for part in transaction._fields())
    rest = raw[2 + max(0, raw[1] - 0xF7) + len(ahead) :] if len(raw) > 1 else b""
    numbers: list[int] = []
    while rest and len(numbers) < 3:
        start, end = (1, 1 + rest[0] - 0x80) if rest[0] >= 0x80 else (0, 1)
        numbers.append(int.from_bytes(rest[start:end]))
        rest = rest[end:]
    if len(numbers) == 3 and numbers[0] <= 1 and max(numbers) < 1 << 256:
        parity, r, s = numbers
        signature = r.to_bytes(32) + s.to_bytes(32) + bytes((27 + parity,))
        if transaction.signed(signature).raw == raw:  # so nothing that was parsed needs to be trusted
            return signature
    raise InvalidValue("these bytes are not that transaction, signed")


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    transaction: Transaction
    raw: bytes
    """What is sent."""
    hash: bytes
