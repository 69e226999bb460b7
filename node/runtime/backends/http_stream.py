"""HTTP/1.1 to a model server, on trio streams: one connection, one request, an answer that is read as it comes.

Rules:
- What the server sends is hostile until bounded: its head by h11, a whole body by the reader's limit, a stream by
  whoever reads it.
- Closing the connection is how a request is aborted, so no connection is ever used twice.
- Names in messages are scheme, host and port. Keys stand in headers, and headers are never shown.

Why not httpx: it costs 0.2 s and 19 MB at import where h11, which the chain's client has loaded anyway, costs
nothing, and a pool is of no use to one who aborts by closing. Source: RFC 9112 through h11.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import h11
import trio

READ_SIZE: Final = 1 << 16
MAX_HEAD: Final = 64 << 10
"""Most bytes of an answer's status line and headers."""


class HttpFailure(Exception):
    """No usable answer: refused, reset, not HTTP, too large, or too late. Says which server, never what was sent to it."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is. Made by `parse`."""

    name: str
    """Scheme, host and port: what may stand in a message."""
    host: str
    port: int
    tls: bool
    prefix: str
    """Path that stands before every target, without a slash at its end."""
    secret: str = field(default="", repr=False)
    """Goes out as a bearer token; empty: nothing does."""

    @classmethod
    def parse(cls, url: str, secret: str = "") -> ServerAddress:
        """Raises `HttpFailure` for what is no http or https address."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise HttpFailure(f"not the address of a model server: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.query:
            raise HttpFailure("the address of a model server is http(s)://host[:port][/path] and nothing more")
        tls = parts.scheme == "https"
        host, port = parts.hostname, port or (443 if tls else 80)
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return cls(f"{parts.scheme}://{shown}", host, port, tls, parts.path.rstrip("/"), secret)

    @property
    def authority(self) -> str:
        return self.name.partition("://")[2]


class Answer:
    """The head of an answer that has come, and its body as it comes."""

    def __init__(
        self, address: ServerAddress, stream: trio.abc.Stream, http: h11.Connection, head: h11.Response
    ) -> None:
        self._name, self._stream, self._http = address.name, stream, http
        self.status: Final = head.status_code
        self.content_type: Final = (
            next((v for k, v in head.headers if k == b"content-type"), b"").decode("latin-1").lower()
        )

    async def receive(self) -> bytes:
        """Some bytes of the body, ``b""`` at its end. Raises `HttpFailure`, also when it is cut short."""
        event = await _next(self._name, self._stream, self._http)
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises `HttpFailure` when it is over `limit`."""
        body = bytearray()
        while data := await self.receive():
            body += data
            if len(body) > limit:
                raise HttpFailure(f"{self._name} answered with more than {limit} bytes")
        return bytes(body)


@asynccontextmanager
async def request(
    address: ServerAddress,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    connect_s: float,
    answer_s: float,
    headers: Sequence[tuple[str, str]] = (),
) -> AsyncGenerator[Answer, None]:
    """Send a request and wait for the head of its answer; the connection is closed when the block ends.

    `connect_s`: most seconds until the connection stands, TLS included; `answer_s`: from then to the head. Raises
    `HttpFailure`.
    """
    stream = await _connect(address, connect_s)
    try:
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        fields = [("Host", address.authority), ("Accept-Encoding", "identity"), ("Connection", "close"), *headers]
        if body:
            fields += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        if address.secret:
            fields.append(("Authorization", f"Bearer {address.secret}"))
        out = http.send(h11.Request(method=method, target=address.prefix + path, headers=fields)) or b""
        out += (http.send(h11.Data(data=body)) or b"") if body else b""
        out += http.send(h11.EndOfMessage()) or b""
        head = None
        with trio.move_on_after(answer_s):
            try:
                await stream.send_all(out)
            except (OSError, trio.BrokenResourceError) as error:
                raise HttpFailure(f"{address.name}: {_why(error)}") from None
            event = await _next(address.name, stream, http)
            head = event if isinstance(event, h11.Response) else None
        if head is None:
            raise HttpFailure(f"{address.name} did not answer {path} within {answer_s:g} s")
        yield Answer(address, stream, http, head)
    finally:
        await trio.aclose_forcefully(stream)


async def _connect(address: ServerAddress, limit_s: float) -> trio.abc.Stream:
    with trio.move_on_after(limit_s):
        try:
            if not address.tls:
                return await trio.open_tcp_stream(address.host, address.port)
            tls = await trio.open_ssl_over_tcp_stream(
                address.host, address.port, ssl_context=ssl.create_default_context(), https_compatible=True
            )
            await tls.do_handshake()
            return tls
        except (OSError, trio.BrokenResourceError) as error:
            raise HttpFailure(f"{address.name} cannot be reached: {_why(error)}") from None
    raise HttpFailure(f"{address.name} cannot be reached within {limit_s:g} s")


async def _next(name: str, stream: trio.abc.Stream, http: h11.Connection) -> h11.Event:
    """The next of Response, Data and EndOfMessage."""
    try:
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await stream.receive_some(READ_SIZE))
            elif isinstance(event, h11.Response | h11.EndOfMessage) or (isinstance(event, h11.Data) and event.data):
                return event
            elif not isinstance(event, h11.InformationalResponse | h11.Data):
                raise HttpFailure(f"{name} closed the connection before its answer was over")
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as error:
        raise HttpFailure(f"{name}: {_why(error)}") from None


def _why(error: BaseException) -> str:
    return (str(error) or str(error.__cause__ or "") or type(error).__name__)[:200]
