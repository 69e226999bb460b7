"""JSON-RPC values, typed and bounded before anything else sees them.

A node is a remote program that may be wrong or hostile: every quantity, byte string and object that it answers passes one of
these functions, and what does not fit raises `ChainError` naming the field. Sizes are bounded here and, before that, by the
response limit of `node.chain.rpc`.

Source: Ethereum JSON-RPC, "Conventions" (QUANTITY and DATA encodings).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from node.errors import ChainError
from protocol.errors import InvalidValue
from protocol.ids import Address

MAX_LOGS: Final = 20_000
"""Most logs accepted in one answer."""
_QUANTITY: Final = re.compile(r"0x[0-9a-fA-F]{1,64}")  # int() alone would take signs and underscores


def quantity(value: object, what: str = "quantity") -> int:
    """A QUANTITY: ``0x`` and at most 64 hex digits."""
    if isinstance(value, str) and _QUANTITY.fullmatch(value):
        return int(value[2:], 16)
    raise ChainError(f"the chain's node answered with a bad {what}: {str(value)[:80]!r}")


def blob(value: object, what: str = "data", size: int | None = None, limit: int = 1 << 20) -> bytes:
    """DATA: ``0x`` and hex pairs; exactly `size` bytes when given, never more than `limit`."""
    if isinstance(value, str) and value.startswith("0x") and len(value) <= 2 + 2 * limit:
        try:
            raw = bytes.fromhex(value[2:])
        except ValueError:
            raw = None
        # fromhex skips blanks: the length says whether there were any
        if raw is not None and 2 * len(raw) == len(value) - 2 and size in (None, len(raw)):
            return raw
    raise ChainError(f"the chain's node answered with bad {what}: {str(value)[:80]!r}")


def hex_quantity(value: int) -> str:
    return hex(value)


def hex_data(value: bytes) -> str:
    return "0x" + value.hex()


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ChainError(f"the chain's node answered with a bad {what}: {type(value).__name__} instead of an object")
    return value


def _address(value: object, what: str) -> Address:
    try:
        return Address(blob(value, what, 20))
    except InvalidValue as error:  # pragma: no cover - blob() has checked the size
        raise ChainError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Header:
    """The part of a block header that following a chain needs."""

    number: int
    hash: bytes
    parent: bytes
    timestamp: int
    """Unix seconds, chain time."""
    base_fee: int = 0
    """Wei per gas; 0 on chains without EIP-1559."""

    @classmethod
    def parse(cls, value: object) -> Header:
        block = _object(value, "block")
        return cls(
            number=quantity(block.get("number"), "block number"),
            hash=blob(block.get("hash"), "block hash", 32),
            parent=blob(block.get("parentHash"), "parent hash", 32),
            timestamp=quantity(block.get("timestamp"), "block timestamp"),
            base_fee=quantity(block.get("baseFeePerGas") or "0x0", "base fee"),
        )


@dataclass(frozen=True, slots=True)
class Log:
    """One raw log as the node gives it."""

    address: Address
    topics: tuple[bytes, ...]
    data: bytes
    block_number: int
    block_hash: bytes
    index: int
    """Position in the block; with the block hash it names the log."""

    @classmethod
    def parse(cls, value: object) -> Log:
        log = _object(value, "log")
        topics = log.get("topics")
        if not isinstance(topics, list) or len(topics) > 4:
            raise ChainError("the chain's node answered with a log of bad topics")
        return cls(
            address=_address(log.get("address"), "log address"),
            topics=tuple(blob(topic, "topic", 32) for topic in topics),
            data=blob(log.get("data"), "log data", limit=1 << 16),
            block_number=quantity(log.get("blockNumber"), "log block number"),
            block_hash=blob(log.get("blockHash"), "log block hash", 32),
            index=quantity(log.get("logIndex"), "log index"),
        )

    @classmethod
    def parse_list(cls, value: object) -> Sequence[Log]:
        if not isinstance(value, list) or len(value) > MAX_LOGS:
            raise ChainError(f"the chain's node answered with a bad list of logs (at most {MAX_LOGS} are taken)")
        return [cls.parse(item) for item in value]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a transaction. The only thing that decides whether it happened."""

    hash: bytes
    block_number: int
    block_hash: bytes
    gas_used: int
    ok: bool
    created: Address | None

    @classmethod
    def parse(cls, value: object) -> Receipt:
        receipt = _object(value, "receipt")
        created = receipt.get("contractAddress")
        return cls(
            hash=blob(receipt.get("transactionHash"), "transaction hash", 32),
            block_number=quantity(receipt.get("blockNumber"), "receipt block number"),
            block_hash=blob(receipt.get("blockHash"), "receipt block hash", 32),
            gas_used=quantity(receipt.get("gasUsed"), "gas used"),
            ok=quantity(receipt.get("status"), "receipt status") == 1,
            created=None if created is None else _address(created, "contract address"),
        )
