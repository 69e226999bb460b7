"""A tiny HTTP/1.1 server for `GET /metrics` and `GET /healthz`, and nothing else. Off unless it is asked for.

Rules:
- Bounded: so many connections, so many bytes of a request's head, so many seconds of silence. What passes a bound is closed.
- It reads nothing but heads: a request with a body is answered and its connection closed.

Source: RFC 9112 through h11.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import h11
import trio

from node.errors import NetworkError
from node.telemetry.exposition import CONTENT_TYPE

log = logging.getLogger(__name__)
CONNECTIONS: Final = 16
HEAD_LIMIT: Final = 8192
SILENCE_S: Final = 10.0
REQUESTS: Final = 1000
"""On one connection."""
_TEXT: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Health:
    ok: bool
    text: str = "ok"


class MetricsServer:
    """Serves what `page` writes and what `health` says; both must be quick, and neither may wait."""

    def __init__(self, page: Callable[[], bytes], health: Callable[[], Health]) -> None:
        self._page = page
        self._health = health
        self._open = 0
        self.address = ""
        """`HOST:PORT` once it listens."""

    async def serve(
        self, host: str, port: int, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Until cancelled. Raises `NetworkError` when it cannot listen there."""
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            raise NetworkError(f"metrics cannot be served on {host}:{port}: {error.strerror or error}") from None
        bound = listeners[0].socket.getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"
        task_status.started(self.address)
        await trio.serve_listeners(self._connection, listeners)

    async def _connection(self, stream: trio.SocketStream) -> None:
        async with stream:
            if self._open >= CONNECTIONS:
                return
            self._open += 1
            try:
                await self._requests(stream)
            except (OSError, trio.BrokenResourceError, trio.TooSlowError, h11.RemoteProtocolError) as error:
                log.debug("a reader of the metrics: %s", error)
            finally:
                self._open -= 1

    async def _requests(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
        for _ in range(REQUESTS):
            with trio.fail_after(SILENCE_S):
                try:
                    request = await _head(http, stream)
                    if request is None:
                        return
                    head_only = request.method == b"HEAD"
                    status, content_type, body = self._answer(request)
                except h11.RemoteProtocolError as error:
                    head_only = False
                    status, content_type, body = error.error_status_hint, _TEXT, b"bad request\n"
                await _reply(http, stream, status, content_type, body, head_only=head_only)
            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return
            http.start_next_cycle()

    def _answer(self, request: h11.Request) -> tuple[int, str, bytes]:
        path = request.target.partition(b"?")[0]
        if request.method not in (b"GET", b"HEAD"):
            return 405, _TEXT, b"GET only\n"
        if path == b"/metrics":
            return 200, CONTENT_TYPE, self._page()
        if path == b"/healthz":
            health = self._health()
            return (200 if health.ok else 503), _TEXT, health.text.encode() + b"\n"
        return 404, _TEXT, b"/metrics and /healthz\n"


async def _head(http: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """The next request with its end; None when the peer is done, or sends a body."""
    request = None
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(HEAD_LIMIT))
        elif isinstance(event, h11.Request):
            request = event
            if http.their_state is h11.SEND_BODY and _has_body(event):
                return request
        elif isinstance(event, h11.EndOfMessage):
            return request
        else:
            return None


def _has_body(request: h11.Request) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in request.headers
    )


async def _reply(
    http: h11.Connection, stream: trio.SocketStream, status: int, content_type: str, body: bytes, *, head_only: bool
) -> None:
    if http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
    if http.their_state is not h11.DONE:
        headers.append(("Connection", "close"))
    data = http.send(h11.Response(status_code=status, headers=headers)) or b""
    if http.our_state is h11.SEND_BODY:
        if not head_only:
            data += http.send(h11.Data(data=body)) or b""
        data += http.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
