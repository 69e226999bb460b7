"""The JSON-RPC methods that we use, typed: one thin function each, over anything that can `call` and `submit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from node.chain.values import Header, Log, Receipt, blob, hex_data, hex_quantity, quantity
from node.errors import ChainError
from protocol.ids import Address

MAX_CODE = 49_152
"""Most bytes of runtime code looked at: twice the limit of EIP-170."""


class Caller(Protocol):
    """The two ways to ask a node; `node.chain.rpc.JsonRpc`, `node.chain.endpoints.Endpoints` and the fakes have them."""

    async def call(self, method: str, *params: Any) -> Any: ...

    async def submit(self, method: str, *params: Any) -> Any: ...


class Eth:
    """Every method may raise `RpcError`, `RpcUnavailable` or `ChainError` for an answer that does not parse."""

    def __init__(self, rpc: Caller) -> None:
        self.rpc = rpc

    def expect(self, number: int) -> None:
        """A transaction of ours is in block `number`. With one node the next answer has it."""

    async def chain_id(self) -> int:
        return quantity(await self.rpc.call("eth_chainId"), "chain id")

    async def header(self, block: int | bytes | str = "latest") -> Header | None:
        """By number, hash or tag. None when the node does not know it."""
        if isinstance(block, bytes):
            found = await self.rpc.call("eth_getBlockByHash", hex_data(block), False)
        else:
            tag = hex_quantity(block) if isinstance(block, int) else block
            found = await self.rpc.call("eth_getBlockByNumber", tag, False)
        return None if found is None else Header.parse(found)

    async def base_fee(self) -> int:
        """Of the latest block, wei per gas."""
        header = await self.header("latest")
        if header is None:
            raise ChainError("the chain's node has no latest block")
        return header.base_fee

    async def balance(self, account: Address, block: str | bytes = "latest") -> int:
        at = {"blockHash": hex_data(block)} if isinstance(block, bytes) else block
        return quantity(await self.rpc.call("eth_getBalance", str(account), at), "balance")

    async def nonce(self, account: Address, tag: str = "latest") -> int:
        return quantity(await self.rpc.call("eth_getTransactionCount", str(account), tag), "nonce")

    async def code(self, account: Address) -> bytes:
        return blob(await self.rpc.call("eth_getCode", str(account), "latest"), "code", limit=MAX_CODE)

    async def eth_call(
        self,
        to: Address | None,
        data: bytes,
        *,
        sender: Address | None = None,
        value: int = 0,
        block: str | bytes = "latest",
    ) -> bytes:
        """At a tag, a number in hex, or a block named by its hash (EIP-1898). Raises `Reverted` with the contract's answer."""
        at = {"blockHash": hex_data(block)} if isinstance(block, bytes) else block
        return blob(await self.rpc.call("eth_call", _call_object(to, data, sender, value), at), "call result")

    async def estimate_gas(self, to: Address | None, data: bytes, *, sender: Address, value: int = 0) -> int:
        """Also a simulation: raises `Reverted` when the transaction would."""
        return quantity(await self.rpc.call("eth_estimateGas", _call_object(to, data, sender, value)), "gas estimate")

    async def send_raw(self, raw: bytes) -> None:
        await self.rpc.submit("eth_sendRawTransaction", hex_data(raw))

    async def receipt(self, tx: bytes) -> Receipt | None:
        found = await self.rpc.call("eth_getTransactionReceipt", hex_data(tx))
        # Some nodes answer a pending transaction with an object without a block.
        pending = isinstance(found, dict) and found.get("blockNumber") is None
        return None if found is None or pending else Receipt.parse(found)

    async def knows(self, tx: bytes) -> bool:
        """Whether the node has the transaction, mined or pending."""
        return await self.rpc.call("eth_getTransactionByHash", hex_data(tx)) is not None

    async def logs_of_block(self, addresses: Sequence[Address], block_hash: bytes) -> Sequence[Log]:
        query = {"address": [str(address) for address in addresses], "blockHash": hex_data(block_hash)}
        return Log.parse_list(await self.rpc.call("eth_getLogs", query))

    async def logs_between(
        self, addresses: Sequence[Address], first: int, last: int, topics: Sequence[bytes] = ()
    ) -> Sequence[Log]:
        """Both ends included. `topics`: only logs that begin with these."""
        query: dict[str, Any] = {
            "address": [str(address) for address in addresses],
            "fromBlock": hex_quantity(first),
            "toBlock": hex_quantity(last),
        }
        if topics:
            query["topics"] = [hex_data(topic) for topic in topics]
        return Log.parse_list(await self.rpc.call("eth_getLogs", query))


def _call_object(to: Address | None, data: bytes, sender: Address | None, value: int) -> dict[str, str]:
    call = {"data": hex_data(data), "value": hex_quantity(value)}
    if to is not None:
        call["to"] = str(to)
    if sender is not None:
        call["from"] = str(sender)
    return call
