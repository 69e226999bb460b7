"""A chain's node without an EVM: blocks, a pool, nonces and reorganisations, and nothing that calls do. Product code: for tests
of whoever sends transactions.

It takes the signed transactions that `protocol.transactions` makes, in nonce order per account, and answers what a sender asks.
Several callers may share it, as several nodes share one chain (`node.testing.lying_rpc` in front of it spoils some of them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import trio

from node.chain.rpc import RpcError
from node.chain.values import hex_data, hex_quantity
from protocol.ids import Address, keccak256
from protocol.keys import recover
from protocol.transactions import TYPE_BYTE, rlp

BASE_FEE: Final = 10**9


@dataclass(frozen=True, slots=True)
class Sent:
    """A signed transaction, taken apart."""

    hash: bytes
    sender: Address
    nonce: int
    max_fee: int
    to: bytes
    value: int
    data: bytes

    @property
    def call(self) -> tuple[bytes, int, bytes]:
        return self.to, self.value, self.data


def decode(raw: bytes) -> Sent:
    """Raises `ValueError` for anything but an EIP-1559 transaction without an access list."""
    if raw[:1] != TYPE_BYTE:
        raise ValueError("not an EIP-1559 transaction")
    *fields, access, parity, r, s = _items(raw[1:])
    if len(fields) != 8 or access:
        raise ValueError("not a transaction of ours")
    _, nonce, _, max_fee, _, to, value, data = fields
    signature = r.rjust(32, b"\0") + s.rjust(32, b"\0") + bytes([27 + int.from_bytes(parity)])
    sender = recover(keccak256(TYPE_BYTE + rlp([*fields, []])), signature)
    number = int.from_bytes
    return Sent(keccak256(raw), sender, number(nonce), number(max_fee), to, number(value), data)


def _items(raw: bytes) -> list[bytes]:
    """The payloads of the items of one list."""
    start, length = _head(raw)
    body, items = raw[start : start + length], []
    while body:
        start, length = _head(body)
        items.append(body[start : start + length])
        body = body[start + length :]
    return items


def _head(raw: bytes) -> tuple[int, int]:
    """Where the payload of the first item starts, and how long it is."""
    first = raw[0]
    if first < 0x80:
        return 0, 1
    short, long = (0x80, 0xB7) if first < 0xC0 else (0xC0, 0xF7)
    if first <= long:
        return 1, first - short
    return 1 + first - long, int.from_bytes(raw[1 : 1 + first - long])


@dataclass(slots=True)
class _Block:
    hash: bytes
    txs: list[bytes] = field(default_factory=list)


class PoolNode:
    """A `node.chain.eth.Caller` and an honest one. `history`: empty blocks that there are already."""

    def __init__(self, history: int = 20) -> None:
        self.blocks = [_Block(keccak256(b"genesis"))]
        self.pool: dict[bytes, bytes] = {}
        """hash -> raw"""
        self.known: dict[bytes, Sent] = {}
        """Every transaction that was ever taken."""
        self._branch = 0
        for _ in range(history):
            self.mine()

    # ------------------------------------------------------------------------------------------------------ test knobs

    @property
    def landed(self) -> list[Sent]:
        """The transactions of the chain as it is now, in order."""
        return [self.known[tx] for block in self.blocks for tx in block.txs]

    def mine(self) -> None:
        """One block with everything that can be in it."""
        block = _Block(keccak256(self.blocks[-1].hash + self._branch.to_bytes(8)))
        self.blocks.append(block)
        progress = True
        while progress:
            progress = False
            for tx in sorted(self.pool, key=lambda tx: self.known[tx].nonce):
                one = self.known[tx]
                if one.nonce == self.count(one.sender) and one.max_fee >= BASE_FEE:
                    block.txs.append(tx)
                    del self.pool[tx]
                    progress = True
        self.pool = {
            tx: raw for tx, raw in self.pool.items() if self.known[tx].nonce >= self.count(self.known[tx].sender)
        }

    def reorg(self, depth: int, raws: dict[bytes, bytes] | None = None) -> None:
        """Replace the last `depth` blocks by empty ones. With `raws` (hash -> raw) their transactions are in the pool again."""
        orphans, self.blocks = self.blocks[-depth:], self.blocks[:-depth]
        self._branch += 1
        for _ in orphans:
            self.blocks.append(_Block(keccak256(self.blocks[-1].hash + self._branch.to_bytes(8))))
        for tx in (tx for block in orphans for tx in block.txs):
            if raws is not None:
                self.pool[tx] = raws[tx]

    def count(self, account: Address) -> int:
        return sum(one.sender == account for one in self.landed)

    # ------------------------------------------------------------------------------------------------------------- RPC

    async def submit(self, method: str, *params: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return hex_data(self._take(bytes.fromhex(params[0][2:])))

    def _take(self, raw: bytes) -> bytes:
        one = decode(raw)
        if one.hash in self.pool or any(one.hash in block.txs for block in self.blocks):
            raise RpcError("eth_sendRawTransaction", -32000, "already known", None)
        if one.nonce < self.count(one.sender):
            raise RpcError("eth_sendRawTransaction", -32000, "nonce too low", None)
        for tx in list(self.pool):
            other = self.known[tx]
            if (other.sender, other.nonce) == (one.sender, one.nonce):
                if one.max_fee * 100 < other.max_fee * 110:
                    raise RpcError("eth_sendRawTransaction", -32000, "replacement transaction underpriced", None)
                del self.pool[tx]
        self.known[one.hash], self.pool[one.hash] = one, raw
        return one.hash

    async def call(self, method: str, *params: Any) -> Any:
        await trio.lowlevel.checkpoint()
        match method:
            case "eth_chainId":
                return "0x7a69"
            case "eth_blockNumber":
                return hex_quantity(len(self.blocks) - 1)
            case "eth_getBlockByNumber":
                number = len(self.blocks) - 1 if params[0] in ("latest", "pending") else int(params[0], 16)
                return self._header(number)
            case "eth_getBlockByHash":
                found = [n for n, block in enumerate(self.blocks) if hex_data(block.hash) == params[0]]
                return self._header(found[0]) if found else None
            case "eth_getTransactionCount":
                return hex_quantity(self._count(Address(params[0]), params[1]))
            case "eth_getTransactionByHash":
                tx = bytes.fromhex(params[0][2:])
                return {"hash": params[0]} if tx in self.pool or any(tx in block.txs for block in self.blocks) else None
            case "eth_getTransactionReceipt":
                return self._receipt(bytes.fromhex(params[0][2:]))
            case "eth_estimateGas":
                return hex_quantity(21_000)
            case "eth_sendRawTransaction":
                return await self.submit(method, *params)
        raise RpcError(method, -32601, "no such method", None)

    def _count(self, account: Address, block: str) -> int:
        if block == "pending":
            count, waiting = self.count(account), {self.known[tx].nonce for tx in self.pool}
            while count in waiting:
                count += 1
            return count
        blocks = self.blocks if block == "latest" else self.blocks[: int(block, 16) + 1]
        return sum(self.known[tx].sender == account for one in blocks for tx in one.txs)

    def _header(self, number: int) -> dict[str, str] | None:
        if not 0 <= number < len(self.blocks):
            return None
        return {
            "number": hex_quantity(number),
            "hash": hex_data(self.blocks[number].hash),
            "parentHash": hex_data(self.blocks[number - 1].hash if number else bytes(32)),
            "timestamp": hex_quantity(number),
            "baseFeePerGas": hex_quantity(BASE_FEE),
        }

    def _receipt(self, tx: bytes) -> dict[str, Any] | None:
        for number, block in enumerate(self.blocks):
            if tx in block.txs:
                return {
                    "transactionHash": hex_data(tx),
                    "blockNumber": hex_quantity(number),
                    "blockHash": hex_data(block.hash),
                    "gasUsed": "0x5208",
                    "status": "0x1",
                    "contractAddress": None,
                }
        return None
