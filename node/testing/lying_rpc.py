"""A JSON-RPC node that fails and lies as it is told to, in front of an honest one. Product code: for tests of whoever asks nodes.

    liar = LyingRpc(honest)                 # a `Caller`, and a `node.chain.endpoints.Node`
    liar.faults = Faults(status=503)        # switched while it runs
    async with served(liar) as url: ...     # the same behind HTTP, for a client of its own

Each fault stands for something that real servers do: a proxy that answers 503, a replica that stopped following, an index that
misses logs, a pool that forgets, a server that was bought. `requests` and `submitted` say what it was asked.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import h11
import trio

from node.chain.artifacts import contract
from node.chain.eth import Caller
from node.chain.rpc import Reverted, RpcError, RpcUnavailable
from node.chain.values import hex_data, hex_quantity, quantity
from node.ports import ChannelOnChain
from protocol.ids import ChannelId, keccak256

log = logging.getLogger(__name__)
MAX_REQUEST: Final = 8 << 20
PATIENCE_S: Final = 20.0
"""As that of `node.chain.rpc.JsonRpc`."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with the node. The default is nothing."""

    refuse: bool = False
    """The connection ends before an answer. (For a port that nobody listens on, stop serving.)"""
    hang: bool = False
    """It reads the question and never answers; the asker's patience ends after `PATIENCE_S`."""
    status: int = 0
    """Every answer is this HTTP status and no JSON."""
    garbage: bytes = b""
    """Every answer has this body."""
    huge: int = 0
    """Every answer has a body of so many bytes."""
    slow_s: float = 0.0
    """So many seconds pass before each answer."""
    error: int = 0
    """Every question is answered by an error of this code."""
    chain_id: int = 0
    """It says that it is of this chain."""
    frozen: int | None = None
    """It stopped following at this block: no later one exists for it, and no transaction in one."""
    ahead: int = 0
    """It names a latest block so many blocks above the true one."""
    forked_from: int | None = None
    """From this block on its blocks have other hashes than everybody's."""
    drop_logs: bool = False
    """No logs exist for it."""
    invented_logs: tuple[Mapping[str, Any], ...] = ()
    """Logs that it adds to every answer, in the block that was asked about."""
    channels: Mapping[ChannelId, ChannelOnChain] = field(default_factory=dict)
    """What it says of these channels, whatever the contract says."""
    forget_transactions: bool = False
    """It takes transactions and forgets them."""
    sit_on_transactions: bool = False
    """It takes transactions, says that it knows them, and passes them to nobody."""
    refuse_transactions: str = ""
    """It answers every transaction with this error."""
    invented_receipts: bool = False
    """Every transaction it was given succeeded, it says."""
    no_receipts: bool = False
    """No transaction ever landed, it says."""
    nonce_offset: int = 0
    """Added to every count of an account's transactions."""
    revert: bytes = b""
    """Every simulation reverts with this data."""


class LyingRpc:
    """Asks `inner` and spoils the answers by `faults`."""

    def __init__(self, inner: Caller, name: str = "liar", faults: Faults | None = None) -> None:
        self._inner = inner
        self.name = name
        self.faults = faults or Faults()
        self.requests: Counter[str] = Counter()
        self.submitted: list[bytes] = []
        """Raw transactions in the order in which they came."""

    def set(self, **faults: Any) -> None:
        """Change some faults and leave the others."""
        self.faults = replace(self.faults, **faults)

    async def freeze(self) -> None:
        """Follow the chain no further than it is now."""
        self.set(frozen=quantity(await self._inner.call("eth_blockNumber")))

    async def aclose(self) -> None:
        """Nothing of its own to close."""

    async def call(self, method: str, *params: Any) -> Any:
        return await self._answer(method, params, self._inner.call)

    async def submit(self, method: str, *params: Any) -> Any:
        return await self._answer(method, params, self._inner.submit)

    async def _answer(self, method: str, params: tuple[Any, ...], ask: Callable[..., Any]) -> Any:
        await trio.lowlevel.checkpoint()
        self.requests[method] += 1
        faults = self.faults
        if faults.hang:
            await trio.sleep(PATIENCE_S)
            raise RpcUnavailable(f"{self.name} did not answer {method} within {PATIENCE_S:g} s")
        await trio.sleep(faults.slow_s)
        if faults.refuse or faults.status or faults.garbage or faults.huge:
            raise RpcUnavailable(f"{self.name} does not answer")
        if faults.error:
            raise RpcError(method, faults.error, "something went wrong", None)
        special = getattr(self, f"_{method}", None)
        return await (special(ask, *params) if special else ask(method, *params))

    # ---------------------------------------------------------------------------------------------------------- blocks

    async def _eth_chainId(self, ask: Callable[..., Any]) -> Any:
        return hex_quantity(self.faults.chain_id) if self.faults.chain_id else await ask("eth_chainId")

    async def _eth_blockNumber(self, ask: Callable[..., Any]) -> Any:
        return hex_quantity(await self._height(ask))

    async def _height(self, ask: Callable[..., Any]) -> int:
        if self.faults.frozen is not None:
            return self.faults.frozen
        return quantity(await ask("eth_blockNumber")) + self.faults.ahead

    def _at(self, block: Any) -> Any:
        """The block that it means by a tag."""
        frozen = self.faults.frozen
        return hex_quantity(frozen) if frozen is not None and block in ("latest", "pending", "safe") else block

    async def _eth_getBlockByNumber(self, ask: Callable[..., Any], block: Any, full: bool = False) -> Any:
        faults = self.faults
        if faults.ahead and block == "latest":
            truth = await ask("eth_getBlockByNumber", "latest", full)
            number = quantity(truth["number"]) + faults.ahead
            return {**truth, "number": hex_quantity(number), "hash": _other(truth["hash"]), "parentHash": truth["hash"]}
        found = await ask("eth_getBlockByNumber", self._at(block), full)
        return self._own(found)

    async def _eth_getBlockByHash(self, ask: Callable[..., Any], block_hash: Any, full: bool = False) -> Any:
        for candidate in (block_hash, _other(block_hash)):
            own = self._own(await ask("eth_getBlockByHash", candidate, full))
            if own is not None and own["hash"] == block_hash:
                return own
        return None

    def _own(self, block: Any) -> Any:
        """The block as this node has it: None above where it stopped, another one on its own branch."""
        faults = self.faults
        if block is None:
            return None
        number = quantity(block["number"])
        if faults.frozen is not None and number > faults.frozen:
            return None
        if faults.forked_from is not None and number >= faults.forked_from:
            parent = block["parentHash"] if number == faults.forked_from else _other(block["parentHash"])
            return {**block, "hash": _other(block["hash"]), "parentHash": parent}
        return block

    # ------------------------------------------------------------------------------------------------------- contracts

    async def _eth_call(self, ask: Callable[..., Any], call: Any, block: Any = "latest") -> Any:
        channels = contract("Channels")
        function = channels.functions["channel"]
        data = bytes.fromhex(call.get("data", "0x")[2:])
        if data[:4] == function.selector and ChannelId(data[4:36]) in self.faults.channels:
            lie = self.faults.channels[ChannelId(data[4:36])]
            words = (lie.allocated, lie.claimed, lie.withdraw_at, int(lie.closed))
            return hex_data(b"".join(word.to_bytes(32) for word in words))
        if isinstance(block, Mapping):
            return await ask("eth_call", call, {"blockHash": await self._true_hash(ask, block["blockHash"])})
        return await ask("eth_call", call, self._at(block))

    async def _true_hash(self, ask: Callable[..., Any], block_hash: str) -> str:
        """The honest node's name of a block that this node knows. Raises `RpcError` for one that it does not know."""
        for candidate in (block_hash, _other(block_hash)):
            own = self._own(await ask("eth_getBlockByHash", candidate, False))
            if own is not None and own["hash"] == block_hash:
                return candidate
        raise RpcError("eth_call", -32000, "header not found", None)

    async def _eth_estimateGas(self, ask: Callable[..., Any], call: Any, *block: Any) -> Any:
        if self.faults.revert:
            raise Reverted("eth_estimateGas", 3, "execution reverted", self.faults.revert)
        return await ask("eth_estimateGas", call, *block)

    async def _eth_getLogs(self, ask: Callable[..., Any], query: Any) -> Any:
        found = [] if self.faults.drop_logs else list(await ask("eth_getLogs", query))
        for invented in self.faults.invented_logs:
            block_hash = query.get("blockHash", "0x" + "ab" * 32)
            height = quantity(await ask("eth_blockNumber"))
            where = {"blockHash": block_hash, "blockNumber": hex_quantity(height), "logIndex": hex_quantity(len(found))}
            found.append({**invented, **where})
        return found

    # ---------------------------------------------------------------------------------------------------- transactions

    async def _eth_sendRawTransaction(self, ask: Callable[..., Any], raw: str) -> Any:
        signed = bytes.fromhex(raw[2:])
        self.submitted.append(signed)
        faults = self.faults
        if faults.refuse_transactions:
            raise RpcError("eth_sendRawTransaction", -32000, faults.refuse_transactions, None)
        if faults.forget_transactions or faults.sit_on_transactions or faults.frozen is not None:
            return hex_data(keccak256(signed))
        return await ask("eth_sendRawTransaction", raw)

    async def _eth_getTransactionByHash(self, ask: Callable[..., Any], tx: str) -> Any:
        ours = any(hex_data(keccak256(raw)) == tx for raw in self.submitted)
        if self.faults.forget_transactions and ours:
            return None
        if self.faults.sit_on_transactions and ours:
            return {"hash": tx}
        return await ask("eth_getTransactionByHash", tx)

    async def _eth_getTransactionReceipt(self, ask: Callable[..., Any], tx: str) -> Any:
        faults = self.faults
        if faults.no_receipts:
            return None
        if faults.invented_receipts and any(hex_data(keccak256(raw)) == tx for raw in self.submitted):
            height = await self._height(ask)
            return {
                "transactionHash": tx,
                "blockNumber": hex_quantity(height),
                "blockHash": _other("0x" + "00" * 32),
                "gasUsed": "0x5208",
                "status": "0x1",
                "contractAddress": None,
            }
        found = await ask("eth_getTransactionReceipt", tx)
        late = (
            isinstance(found, Mapping) and faults.frozen is not None and quantity(found["blockNumber"]) > faults.frozen
        )
        return None if late else found

    async def _eth_getTransactionCount(self, ask: Callable[..., Any], account: str, block: Any = "latest") -> Any:
        count = quantity(await ask("eth_getTransactionCount", account, self._at(block)))
        return hex_quantity(max(0, count + self.faults.nonce_offset))


def _other(block_hash: str) -> str:
    """Another hash, the same for the same one; twice is the hash itself."""
    return hex_data(bytes(byte ^ 0xFF for byte in bytes.fromhex(block_hash[2:])))


# ------------------------------------------------------------------------------------------------------------------ HTTP


@asynccontextmanager
async def served(rpc: LyingRpc, port: int = 0) -> AsyncIterator[str]:
    """Serve it on 127.0.0.1 for the length of the block; the URL. Faults of the connection happen on the connection."""
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, lambda stream: _serve(rpc, stream), listeners)
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def _serve(rpc: LyingRpc, stream: trio.SocketStream) -> None:
    http = h11.Connection(h11.SERVER)
    try:
        while True:
            body = await _request(http, stream)
            if body is None:
                return
            status, answer = await _reply(rpc, body)
            if answer is None:
                return
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))]
            out = http.send(h11.Response(status_code=status, headers=headers)) or b""
            out += http.send(h11.Data(data=answer)) or b""
            await stream.send_all(out + (http.send(h11.EndOfMessage()) or b""))
            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return
            http.start_next_cycle()
    except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
        pass
    finally:
        await trio.aclose_forcefully(stream)


async def _request(http: h11.Connection, stream: trio.SocketStream) -> bytes | None:
    body = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(65536))
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_REQUEST:
                return None
        elif isinstance(event, h11.EndOfMessage):
            return body
        elif isinstance(event, h11.ConnectionClosed):
            return None


async def _reply(rpc: LyingRpc, body: bytes) -> tuple[int, bytes | None]:
    """Status and body of the answer; no body closes the connection."""
    try:
        question = json.loads(body)
        number, method, params = question["id"], question["method"], question["params"]
    except (ValueError, KeyError, TypeError):
        return 400, b"not a question"
    faults = rpc.faults
    try:
        ask = rpc.submit if method.startswith(("eth_send", "evm_", "anvil_")) else rpc.call
        result = await ask(method, *params)
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": number, "result": result}
    except RpcError as error:
        shown: dict[str, Any] = {"code": error.rpc_code, "message": error.message}
        if error.data is not None:
            shown["data"] = hex_data(error.data)
        answer = {"jsonrpc": "2.0", "id": number, "error": shown}
    except RpcUnavailable:
        if faults.status:
            return faults.status, b"<html>out of order</html>"
        if faults.garbage or faults.huge:
            return 200, faults.garbage or b'"' + b"a" * faults.huge + b'"'
        return 500, None
    return 200, json.dumps(answer).encode()
