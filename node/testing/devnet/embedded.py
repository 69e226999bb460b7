"""The embedded chain as a JSON-RPC server: ``python -m node.testing.devnet.embedded --port 0``.

For machines with nothing but Python. Prints one JSON line ``{"url", "chain_id", "pid", "kind"}`` on stdout when it serves, then
stays silent. Serves 127.0.0.1 only, the methods that we use and a few that wallets ask at connect. Answers are written in one
piece with TCP_NODELAY: without both, each answer waits for the other side's delayed ACK.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, TypeVar

from node.testing.devnet.evm_chain import (
    CHAIN_ID,
    EVM_RECURSION,
    GAS_LIMIT,
    Call,
    CallFailed,
    EvmChain,
    MinedTx,
    Refused,
)
from node.testing.devnet.keys import FUNDED_KEYS, FUNDED_WEI
from protocol.ids import Address

T = TypeVar("T")
MAX_BODY: Final = 8 << 20
_CLIENT: Final = "gristmill-embedded (py-evm, simulated chain)"


class _Failure(Exception):
    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.body: dict[str, Any] = {"code": code, "message": message}
        if data is not None:
            self.body["data"] = data


def _bytes(value: Any, size: int | None = None) -> bytes:
    try:
        raw = bytes.fromhex(value.removeprefix("0x"))
    except (AttributeError, ValueError):
        raise _Failure(-32602, "expected 0x and hex digits") from None
    if size is not None and len(raw) != size:
        raise _Failure(-32602, f"expected {size} bytes")
    return raw


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value, 16)
    except (TypeError, ValueError):
        raise _Failure(-32602, "expected a quantity") from None


class Methods:
    """JSON-RPC methods over one `EvmChain`. `__call__` dispatches; every failure is a `_Failure`."""

    def __init__(self, chain: EvmChain) -> None:
        self._chain = chain
        self._table: Mapping[str, Callable[..., Any]] = {
            "web3_clientVersion": lambda: _CLIENT,
            "net_version": lambda: str(chain.chain_id),
            "eth_chainId": lambda: hex(chain.chain_id),
            "eth_accounts": list,
            "eth_syncing": lambda: False,
            "eth_blockNumber": lambda: hex(chain.head.block_number),
            "eth_gasPrice": lambda: hex(chain.head.base_fee_per_gas + 10**9),
            "eth_maxPriorityFeePerGas": lambda: hex(10**9),
            "eth_getBlockByNumber": lambda tag, full=False: self._block(self._number(tag)),
            "eth_getBlockByHash": lambda h, full=False: self._block(chain.number_of.get(_bytes(h, 32))),
            "eth_getBalance": lambda a, tag="latest": hex(self._state(tag).get_balance(_bytes(a, 20))),
            "eth_getTransactionCount": lambda a, tag="latest": hex(self._state(tag).get_nonce(_bytes(a, 20))),
            "eth_getCode": lambda a, tag="latest": "0x" + self._state(tag).get_code(_bytes(a, 20)).hex(),
            "eth_call": lambda call, tag="latest": "0x" + self._simulate(chain.call, call, tag)[0].hex(),
            "eth_estimateGas": lambda call, tag="latest": hex(self._simulate(chain.estimate, call, tag)),
            "eth_sendRawTransaction": self._send_raw,
            "eth_getTransactionByHash": lambda h: self._transaction(chain.txs.get(_bytes(h, 32))),
            "eth_getTransactionReceipt": lambda h: self._receipt(chain.txs.get(_bytes(h, 32))),
            "eth_getLogs": self._logs,
            "evm_mine": lambda *_: self._mine(),
            "evm_increaseTime": self._increase_time,
            "evm_snapshot": lambda: hex(chain.head.block_number),
            "evm_revert": self._revert,
        }

    def __call__(self, method: str, params: Any) -> Any:
        function = self._table.get(method)
        if function is None:
            raise _Failure(-32601, f"the embedded chain has no method {method}")
        if not isinstance(params, list):
            raise _Failure(-32602, "params must be a list")
        try:
            return function(*params)
        except TypeError as error:
            raise _Failure(-32602, f"{method}: {error}") from error

    def _number(self, tag: Any) -> int | None:
        head = self._chain.head.block_number
        if tag in ("latest", "pending", "safe", "finalized", None):
            return head
        if isinstance(tag, dict) and "blockHash" in tag:  # EIP-1898
            return self._chain.number_of.get(_bytes(tag["blockHash"], 32))
        number = 0 if tag == "earliest" else _int(tag)
        return number if 0 <= number <= head else None

    def _state(self, tag: Any) -> Any:
        number = self._number(tag)
        if number is None:
            raise _Failure(-32000, "unknown block")
        return self._chain.state(number)

    def _block(self, number: int | None) -> Mapping[str, Any] | None:
        if number is None:
            return None
        header = self._chain.headers[number]
        return {
            "number": hex(number),
            "hash": "0x" + header.hash.hex(),
            "parentHash": "0x" + header.parent_hash.hex(),
            "sha3Uncles": "0x" + header.uncles_hash.hex(),
            "miner": "0x" + header.coinbase.hex(),
            "stateRoot": "0x" + header.state_root.hex(),
            "transactionsRoot": "0x" + header.transaction_root.hex(),
            "receiptsRoot": "0x" + header.receipt_root.hex(),
            "logsBloom": f"0x{header.bloom:0512x}",
            "difficulty": hex(header.difficulty),
            "gasLimit": hex(header.gas_limit),
            "gasUsed": hex(header.gas_used),
            "timestamp": hex(header.timestamp),
            "extraData": "0x" + header.extra_data.hex(),
            "mixHash": "0x" + header.mix_hash.hex(),
            "nonce": "0x" + header.nonce.hex(),
            "baseFeePerGas": hex(header.base_fee_per_gas),
            "withdrawalsRoot": "0x" + header.withdrawals_root.hex(),
            "blobGasUsed": hex(header.blob_gas_used),
            "excessBlobGas": hex(header.excess_blob_gas),
            "parentBeaconBlockRoot": "0x" + header.parent_beacon_block_root.hex(),
            "transactions": ["0x" + tx.hash.hex() for tx in self._chain.block_txs[number]],
        }

    def _simulate(self, how: Callable[[Call, int | None], T], call: Any, tag: Any) -> T:
        if not isinstance(call, dict):
            raise _Failure(-32602, "a call is an object")
        request = Call(
            sender=_bytes(call.get("from") or "0x" + "00" * 20, 20),
            to=_bytes(call.get("to") or "0x"),
            data=_bytes(call.get("input") or call.get("data") or "0x"),
            value=_int(call.get("value") or "0x0"),
            gas=min(_int(call.get("gas") or hex(GAS_LIMIT)), GAS_LIMIT),
        )
        number = self._number(tag)
        if number is None:
            raise _Failure(-32000, "unknown block")
        try:
            return how(request, None if number == self._chain.head.block_number else number)
        except CallFailed as error:
            if error.data is None:
                raise _Failure(-32000, str(error)) from error
            raise _Failure(3, str(error), "0x" + error.data.hex()) from error

    def _send_raw(self, raw: Any) -> str:
        try:
            return "0x" + self._chain.send_raw(_bytes(raw)).hex()
        except Refused as error:
            raise _Failure(-32000, str(error)) from error

    def _transaction(self, tx: MinedTx | None) -> Mapping[str, Any] | None:
        if tx is None:
            return None
        return {
            "hash": "0x" + tx.hash.hex(),
            "type": "0x2",
            "from": "0x" + tx.sender.hex(),
            "to": "0x" + tx.to.hex() if tx.to else None,
            "nonce": hex(tx.nonce),
            "value": hex(tx.value),
            "input": "0x" + tx.data.hex(),
            "blockNumber": hex(tx.block),
            "blockHash": "0x" + self._chain.headers[tx.block].hash.hex(),
            "transactionIndex": "0x0",
        }

    def _receipt(self, tx: MinedTx | None) -> Mapping[str, Any] | None:
        if tx is None:
            return None
        return {
            "transactionHash": "0x" + tx.hash.hex(),
            "transactionIndex": "0x0",
            "blockNumber": hex(tx.block),
            "blockHash": "0x" + self._chain.headers[tx.block].hash.hex(),
            "from": "0x" + tx.sender.hex(),
            "to": "0x" + tx.to.hex() if tx.to else None,
            "contractAddress": None if tx.created is None else "0x" + tx.created.hex(),
            "gasUsed": hex(tx.gas_used),
            "cumulativeGasUsed": hex(tx.gas_used),
            "effectiveGasPrice": hex(tx.gas_price),
            "status": hex(int(tx.ok)),
            "type": "0x2",
            "logs": self._chain.tx_logs(tx),
        }

    def _logs(self, query: Any) -> list[Mapping[str, Any]]:
        if not isinstance(query, dict):
            raise _Failure(-32602, "a filter is an object")
        wanted = query.get("address") or []
        addresses = {_bytes(a, 20) for a in ([wanted] if isinstance(wanted, str) else wanted)}
        topics = query.get("topics") or [None]
        if len(topics) > 1 or not (topics[0] is None or isinstance(topics[0], str)):
            raise _Failure(-32602, "the embedded chain filters by one first topic at most")
        topic = None if topics[0] is None else _bytes(topics[0], 32)
        if "blockHash" in query:
            number = self._chain.number_of.get(_bytes(query["blockHash"], 32))
            if number is None:
                raise _Failure(-32000, "unknown block")
            first = last = number
        else:
            head = self._chain.head.block_number
            first, last = (
                head if (found := self._number(query.get(key, "latest"))) is None else found
                for key in ("fromBlock", "toBlock")
            )
        return self._chain.logs(first, last, addresses, topic)

    def _mine(self) -> str:
        self._chain.mine()
        return "0x0"

    def _increase_time(self, seconds: Any) -> str:
        return hex(self._chain.increase_time(_int(seconds)))

    def _revert(self, snapshot: Any) -> bool:
        number = self._number(snapshot)
        if number is None:
            return False
        self._chain.rewind(number)
        return True


def _answer(methods: Methods, lock: threading.Lock, request: Any) -> dict[str, Any]:
    if not isinstance(request, dict) or not isinstance(request.get("method"), str):
        return {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "not a request"}}
    answer: dict[str, Any] = {"jsonrpc": "2.0", "id": request.get("id")}
    try:
        with lock:
            answer["result"] = methods(request["method"], request.get("params", []))
    except _Failure as failure:
        answer["error"] = failure.body
    except Exception as error:  # boundary: one bad request must not end the chain
        answer["error"] = {"code": -32603, "message": f"{type(error).__name__}: {error}"}
    return answer


def make_server(port: int, chain: EvmChain) -> ThreadingHTTPServer:
    methods, lock = Methods(chain), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_BODY:
                self.close_connection = True
                self.send_error(413)
                return
            body = self.rfile.read(int(length))
            try:
                request = json.loads(body)
            except (ValueError, RecursionError):
                request = None
            if isinstance(request, list):
                result: Any = [_answer(methods, lock, item) for item in request[:1000]]
            else:
                result = _answer(methods, lock, request)
            encoded = json.dumps(result).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the parent's name
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    return Server(("127.0.0.1", port), Handler)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A simulated chain behind JSON-RPC, on 127.0.0.1 only.")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--chain-id", type=int, default=CHAIN_ID)
    options = parser.parse_args(argv)
    sys.setrecursionlimit(EVM_RECURSION)
    accounts: list[Address] = [key.address for key in FUNDED_KEYS]
    server = make_server(options.port, EvmChain([bytes(a) for a in accounts], FUNDED_WEI, options.chain_id))
    ready = {
        "url": f"http://127.0.0.1:{server.server_address[1]}",
        "chain_id": options.chain_id,
        "pid": os.getpid(),
        "kind": "embedded",
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    try:
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
