"""The JSON-RPC client against servers that are slow, hostile, restarted or of another chain."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from node.chain.eth import Eth
from node.chain.rpc import JsonRpc, Reverted, RpcError, RpcUnavailable, WrongChain
from node.chain.values import Header, Log, Receipt, blob, quantity
from node.errors import ChainError

Reply = Callable[[dict[str, Any]], bytes | None]
"""Request -> raw bytes of the answer; None closes the connection."""


def http(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def result(value: Any) -> Reply:
    return lambda request: http(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": value}).encode())


def error(body: Any) -> Reply:
    return lambda request: http(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": body}).encode())


class Server:
    """Answers each request with `reply`; counts requests and connections."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.delay = 0.0
        self.url = ""

    async def serve(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/path?key=secret"
        await trio.serve_listeners(self._one, listeners, task_status=task_status)

    async def _one(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        buffer = b""
        try:
            while True:
                while b"\r\n\r\n" not in buffer:
                    chunk = await stream.receive_some()
                    if not chunk:
                        return
                    buffer += chunk
                head, buffer = buffer.split(b"\r\n\r\n", 1)
                length = int(
                    next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(
                        b":"
                    )[1]
                )
                while len(buffer) < length:
                    buffer += await stream.receive_some()
                request, buffer = json.loads(buffer[:length]), buffer[length:]
                self.requests.append(request)
                await trio.sleep(self.delay)
                answer = self.reply(request)
                if answer is None:
                    await stream.aclose()
                    return
                await stream.send_all(answer)
        except trio.BrokenResourceError:
            pass


def run(main: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def timed() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await main(nursery)
                nursery.cancel_scope.cancel()

    trio.run(timed)


async def started(nursery: trio.Nursery, reply: Reply) -> Server:
    server = Server(reply)
    await nursery.start(server.serve)
    return server


def test_one_connection_serves_many_calls() -> None:
    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, result("0x7a69"))
        rpc = JsonRpc(server.url, chain_id=31337)
        assert [await Eth(rpc).chain_id() for _ in range(5)] == [31337] * 5
        assert server.connections == 1 and len(server.requests) == 6  # the first call asks for the chain id itself
        await rpc.aclose()

    run(main)


def test_another_chain_is_refused() -> None:
    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, result("0x1"))
        rpc = JsonRpc(server.url, chain_id=31337)
        with pytest.raises(WrongChain, match="of chain 1, not of chain 31337") as caught:
            await rpc.call("eth_blockNumber")
        assert not isinstance(caught.value, RpcUnavailable) and "secret" not in str(caught.value)
        assert [request["method"] for request in server.requests] == ["eth_chainId"]

    run(main)


def test_after_trouble_the_chain_id_is_asked_for_again() -> None:
    """Behind one URL there may stand another node tomorrow."""

    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, result("0x7a69"))
        rpc = JsonRpc(server.url, chain_id=31337)
        await rpc.call("eth_blockNumber")
        server.reply = lambda request: http(b"", status="503 Service Unavailable")
        with pytest.raises(RpcUnavailable):
            await rpc.call("eth_blockNumber")
        server.reply = result("0x1")
        with pytest.raises(WrongChain):
            await rpc.call("eth_blockNumber")
        server.reply = result("0x7a69")
        assert await rpc.call("eth_blockNumber") == "0x7a69"

    run(main)


@pytest.mark.parametrize(
    "reply",
    [
        lambda request: None,
        lambda request: b"SSH-2.0-OpenSSH\r\n\r\n",
        lambda request: http(b"<html>bad gateway</html>", status="502 Bad Gateway"),
        lambda request: http(b'{"error":{"code":-32005,"message":"slow down"}}', status="429 Too Many Requests"),
        lambda request: http(b'{"error":{"code":-32603,"message":"x"}}', status="503 Service Unavailable"),
        lambda request: http(b"[" * 100_000),
        lambda request: http(b'{"jsonrpc":"2.0","id":"x","result":1}'),
        lambda request: http(b'{"jsonrpc":"2.0","id":999999,"result":1}'),
        lambda request: http(b"7"),
        lambda request: http(b""),
    ],
)
def test_an_answer_that_is_none_is_unavailable(reply: Reply) -> None:
    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, reply)
        rpc = JsonRpc(server.url, timeout=5)
        with pytest.raises(RpcUnavailable) as caught:
            await rpc.call("eth_blockNumber")
        assert "secret" not in str(caught.value)

    run(main)


def test_an_answer_over_the_limit_is_cut_off() -> None:
    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, lambda request: http(b'"' + b"a" * 200_000 + b'"'))
        rpc = JsonRpc(server.url, max_response=100_000)
        with pytest.raises(ChainError, match="more than 100000 bytes"):
            await rpc.call("eth_getLogs")

    run(main)


def test_a_slow_node_times_out() -> None:
    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, result("0x1"))
        server.delay = 20
        rpc = JsonRpc(server.url, timeout=0.1)
        with pytest.raises(RpcUnavailable, match=r"within 0\.1 s"):
            await rpc.call("eth_blockNumber")

    run(main)


def test_a_connection_the_server_closed_is_replaced_for_reads_only() -> None:
    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, result("0x1"))
        rpc = JsonRpc(server.url)
        await rpc.call("eth_blockNumber")
        answers = iter([None, http(b'{"id":2,"result":"0x2"}')])
        server.reply = lambda request: next(answers)
        assert await rpc.call("eth_blockNumber") == "0x2"
        assert server.connections == 2
        server.reply = lambda request: None
        count = len(server.requests)
        with pytest.raises(RpcUnavailable):
            await rpc.submit("eth_sendRawTransaction", "0x00")
        assert len(server.requests) == count + 1, "a transaction was sent twice"

    run(main)


def test_errors_of_the_node_are_typed() -> None:
    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, error({"code": 3, "message": "execution reverted", "data": "0xdeadbeef"}))
        rpc = JsonRpc(server.url)
        with pytest.raises(Reverted) as caught:
            await rpc.call("eth_call")
        assert caught.value.data == bytes.fromhex("deadbeef")
        server.reply = error({"code": -32000, "message": "execution reverted", "data": {"data": "0x01"}})
        with pytest.raises(Reverted) as caught:
            await rpc.call("eth_call")
        assert caught.value.data == b"\x01"
        for body in ({"code": -32601, "message": "no"}, {"code": "x"}, "text", 5, {"data": "0xzz"}, {"message": None}):
            server.reply = error(body)
            with pytest.raises(RpcError) as plain:
                await rpc.call("eth_call")
            assert not isinstance(plain.value, Reverted)

    run(main)


def test_cancelling_a_call_leaves_the_client_usable() -> None:
    async def main(nursery: trio.Nursery) -> None:
        server = await started(nursery, result("0x1"))
        rpc = JsonRpc(server.url, max_connections=1)
        server.delay = 10
        with trio.move_on_after(0.05):
            await rpc.call("eth_blockNumber")
        server.delay = 0
        assert await rpc.call("eth_blockNumber") == "0x1"

    run(main)


@pytest.mark.parametrize(
    "url",
    ["", "ftp://x", "127.0.0.1:8545", "http://", "file:///etc/passwd", "http://a:b", "http://u:p@h", "http://[::1"],
)
def test_urls_are_checked(url: str) -> None:
    with pytest.raises(ChainError):
        JsonRpc(url)


@pytest.mark.parametrize("bad", [None, 5, "", "0x", "12", "0xzz", "0x" + "1" * 65, [], "0x-1", "0x1_0"])
def test_bad_quantities(bad: object) -> None:
    with pytest.raises(ChainError):
        quantity(bad)


@pytest.mark.parametrize("bad", [None, 5, "0x0", "0xzz", "00", "0x" + "00" * 33, "0x " + "00" * 32, {}])
def test_bad_data(bad: object) -> None:
    with pytest.raises(ChainError):
        blob(bad, size=32)
    with pytest.raises(ChainError):
        blob(bad, limit=1)


def test_objects_that_are_none_are_refused() -> None:
    for junk in (None, 5, "x", [], {}, {"number": "0x1"}, {"topics": ["0x"] * 9}):
        for parse in (Header.parse, Log.parse, Receipt.parse):
            with pytest.raises(ChainError):
                parse(junk)
    with pytest.raises(ChainError):
        Log.parse_list({})
