"""JSON-RPC over HTTP/1.1, on trio streams: one small client, no provider stack.

Rules:
- One `JsonRpc` is one node; several are held together by `node.chain.endpoints`.
- Reads are retried where a kept-alive connection turned out stale. A transaction is submitted at most once per call: the
  caller decides by receipt what became of it (`node.chain.txs`).
- An answer is bounded before it is parsed, and each exchange has one timeout. Cancelling a call closes its connection.
- A node must show the expected chain id before it is used, and again after each trouble: behind one URL there may stand
  another node tomorrow.
- URLs may hold API keys: messages name scheme, host and port only.

Why not web3.py: its providers are for threads or asyncio, import in two seconds, and all that is needed here is POST.
Source: JSON-RPC 2.0; EIP-1474 (methods and error codes); RFC 9112 through h11.
"""

from __future__ import annotations

import itertools
import ssl
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import h11
import msgspec
import trio

from node.chain.values import quantity
from node.errors import ChainError
from node.nesting import check_depth

MAX_RESPONSE: Final = 16 << 20
"""Most bytes of one answer's body."""
_READ_SIZE: Final = 1 << 16


class RpcUnavailable(ChainError):
    """No answer: refused, reset, timed out, or not JSON-RPC. What was asked may or may not have happened."""


class WrongChain(ChainError):
    """The node is one of another chain than ours."""


class RpcError(ChainError):
    """The node answered with an error object. Its text is for people; nothing is decided by it."""

    def __init__(self, method: str, rpc_code: int, message: str, data: bytes | None) -> None:
        super().__init__(f"{method}: {message[:300]} (code {rpc_code})")
        self.rpc_code = rpc_code
        self.data = data


class Reverted(RpcError):
    """The contract refused in a simulation; `data` is what it returned (selector and arguments of a custom error)."""

    data: bytes


class _Endpoint:
    """One URL: its parts, its idle connections, and whether it has shown its chain id."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ChainError(f"not a URL of a JSON-RPC node: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChainError("the URL of a JSON-RPC node must begin with http:// or https:// and name a host")
        if parts.username is not None:
            raise ChainError("a user name in the URL of a JSON-RPC node is not supported")
        self.tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = port or (443 if self.tls else 80)
        self.authority = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.name = f"{parts.scheme}://{self.authority}"
        self.idle: list[_Connection] = []
        self.verified = False


class _Connection:
    def __init__(self, stream: trio.abc.Stream, endpoint: _Endpoint) -> None:
        self._stream = stream
        self._endpoint = endpoint
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, endpoint: _Endpoint) -> _Connection:
        stream: trio.abc.Stream
        if endpoint.tls:
            context = ssl.create_default_context()
            tls = await trio.open_ssl_over_tcp_stream(
                endpoint.host, endpoint.port, ssl_context=context, https_compatible=True
            )
            await tls.do_handshake()
            stream = tls
        else:
            stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)  # trio sets TCP_NODELAY
        return cls(stream, endpoint)

    async def exchange(self, body: bytes, limit: int) -> tuple[int, bytes]:
        """POST `body`; status and body of the answer. Raises `ChainError` when it is over `limit`."""
        http = self._http
        headers = [
            ("Host", self._endpoint.authority),
            ("Content-Type", "application/json"),
            ("Accept", "application/json"),
            ("Content-Length", str(len(body))),
        ]
        request = http.send(h11.Request(method="POST", target=self._endpoint.target, headers=headers)) or b""
        data = http.send(h11.Data(data=body)) or b""
        end = http.send(h11.EndOfMessage()) or b""
        await self._stream.send_all(request + data + end)
        status, chunks, size = 0, [], 0
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await self._stream.receive_some(_READ_SIZE))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                size += len(event.data)
                if size > limit:
                    raise ChainError(f"{self._endpoint.name} answered with more than {limit} bytes")
                chunks.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                return status, b"".join(chunks)
            elif not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("the connection ended before the answer did")

    def reusable(self) -> bool:
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return True
        return False

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


class _Answer(msgspec.Struct):
    id: int | None = None
    result: Any = None
    error: Any = None


class JsonRpc:
    """Calls on one node. Safe to share between tasks; `aclose` when done.

    `timeout` is seconds for one exchange, connecting included. `chain_id` is what the node must answer to eth_chainId.
    """

    def __init__(
        self,
        url: str,
        *,
        chain_id: int | None = None,
        timeout: float = 20.0,
        max_response: int = MAX_RESPONSE,
        max_connections: int = 8,
    ) -> None:
        self._endpoint = _Endpoint(url)
        self._chain_id = chain_id
        self._timeout = timeout
        self._max_response = max_response
        self._limit = trio.CapacityLimiter(max_connections)
        self._ids = itertools.count(1)

    @property
    def name(self) -> str:
        """Scheme, host and port: what may stand in a message."""
        return self._endpoint.name

    async def call(self, method: str, *params: Any) -> Any:
        """An idempotent read. Raises `RpcError`, `RpcUnavailable` or `WrongChain`."""
        return await self._request(method, params, retry_stale=True)

    async def submit(self, method: str, *params: Any) -> Any:
        """A call with effects, sent once. After `RpcUnavailable` it may have happened."""
        return await self._request(method, params, retry_stale=False)

    async def aclose(self) -> None:
        while self._endpoint.idle:
            await self._endpoint.idle.pop().aclose()

    async def _request(self, method: str, params: Sequence[Any], *, retry_stale: bool) -> Any:
        endpoint = self._endpoint
        try:
            if not endpoint.verified and self._chain_id is not None:
                found = quantity(await self._exchange("eth_chainId", (), retry_stale=True), "chain id")
                if found != self._chain_id:
                    raise WrongChain(
                        f"{endpoint.name} is a node of chain {found}, not of chain {self._chain_id}",
                        hint="check chain.rpc_urls and the deployment file: they must be of one chain",
                    )
            endpoint.verified = True
            return await self._exchange(method, params, retry_stale=retry_stale)
        except RpcUnavailable:
            endpoint.verified = False
            raise

    async def _exchange(self, method: str, params: Sequence[Any], *, retry_stale: bool) -> Any:
        endpoint = self._endpoint
        number = next(self._ids)
        body = msgspec.json.encode({"jsonrpc": "2.0", "id": number, "method": method, "params": list(params)})
        async with self._limit:
            with trio.move_on_after(self._timeout):
                status, raw = await self._post(endpoint, body, retry_stale=retry_stale)
                return self._unwrap(endpoint, method, number, status, raw)
        raise RpcUnavailable(f"{endpoint.name} did not answer {method} within {self._timeout:g} s")

    async def _post(self, endpoint: _Endpoint, body: bytes, *, retry_stale: bool) -> tuple[int, bytes]:
        while True:
            reused = bool(endpoint.idle)
            connection: _Connection | None = endpoint.idle.pop() if reused else None
            kept = False
            try:
                if connection is None:
                    connection = await _Connection.open(endpoint)
                answer = await connection.exchange(body, self._max_response)
                kept = connection.reusable()
                if kept:
                    endpoint.idle.append(connection)
                return answer
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as error:
                if not (reused and retry_stale):
                    raise RpcUnavailable(f"{endpoint.name}: {str(error) or type(error).__name__}") from error
            finally:
                if connection is not None and not kept:
                    await connection.aclose()

    def _unwrap(self, endpoint: _Endpoint, method: str, number: int, status: int, raw: bytes) -> Any:
        if status == 429 or status >= 500:  # whatever the body says, the server did not get to our question
            raise RpcUnavailable(f"{endpoint.name} answered {method} with status {status}")
        try:
            check_depth(raw)
            answer = msgspec.json.decode(raw, type=_Answer)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise RpcUnavailable(f"{endpoint.name} answered {method} with status {status} and no JSON-RPC") from error
        if answer.error is not None:
            raise _rpc_error(method, answer.error)
        if answer.id != number:
            raise RpcUnavailable(f"{endpoint.name} answered another question than {method}")
        return answer.result


def _rpc_error(method: str, error: object) -> RpcError:
    fields = error if isinstance(error, dict) else {}
    code = fields.get("code")
    code = code if isinstance(code, int) else 0
    message = str(fields.get("message", error))
    data = fields.get("data")
    if isinstance(data, dict):  # some nodes nest it: {"data": {"data": "0x.."}}
        data = data.get("data")
    raw: bytes | None = None
    if isinstance(data, str) and data.startswith("0x") and len(data) <= 1 << 16:
        try:
            raw = bytes.fromhex(data[2:])
        except ValueError:
            raw = None
    if code == 3 or raw is not None:  # 3 is geth's "execution reverted"; others put -32000 beside the revert data
        return Reverted(method, code, message, raw or b"")
    return RpcError(method, code, message, None)
