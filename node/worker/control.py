"""The operator's line to a running worker: a Unix socket in its data dir, one JSON question, one JSON answer.

Only the owner of the data dir can reach it (0700 folder). The journal has one writer, so commands that need it ask the process
that holds it instead of opening it a second time.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from node import nesting
from node.errors import NodeError, Timeout

log = logging.getLogger(__name__)
QUESTION_LIMIT = 64 * 1024
ANSWER_LIMIT = 16 << 20
Handler = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]


class NotRunning(NodeError):
    """Nobody listens on the control socket."""

    code = "not_running"


class ControlFailed(NodeError):
    """The running worker answered with an error; code and hint are its own."""


async def serve(path: Path, handlers: Mapping[str, Handler]) -> None:
    """Answer questions until cancelled. The socket file is replaced: the journal's lock says who may serve."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(_reachable(path))
    path.chmod(0o600)
    listener.listen(16)
    try:
        await trio.serve_listeners(lambda stream: _answer(stream, handlers), [trio.SocketListener(listener)])
    finally:
        path.unlink(missing_ok=True)


async def ask(path: Path, command: str, *, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
    """One question to the running worker. Raises `NotRunning`, `Timeout` or `ControlFailed`."""
    with trio.move_on_after(timeout_s):
        try:
            stream = await trio.open_unix_socket(_reachable(path))
        except OSError:
            raise NotRunning("no worker is running on this data dir", hint="gristmill start") from None
        async with stream:
            await stream.send_all(json.dumps({"command": command, **arguments}).encode() + b"\n")
            answer: dict[str, Any] = nesting.loads(await _line(stream, ANSWER_LIMIT))
        if "error" in answer:
            error = ControlFailed(str(answer["error"].get("message")), hint=str(answer["error"].get("hint", "")))
            raise error
        return answer
    raise Timeout(f"the worker did not answer `{command}` within {timeout_s:g} s")


async def _answer(stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
    async with stream:
        try:
            question = nesting.loads(await _line(stream, QUESTION_LIMIT))
            answer = await handlers[question.pop("command")](question)
        except NodeError as error:
            answer = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            answer = {"error": {"code": "usage", "message": f"not a question: {error}"}}
        except trio.BrokenResourceError:
            return
        try:
            await stream.send_all(json.dumps(answer).encode() + b"\n")
        except trio.BrokenResourceError:
            log.info("the asker left before its answer")


async def _line(stream: trio.SocketStream, limit: int) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = await stream.receive_some(65536)
        if not more:
            break
        data += more
        if len(data) > limit:
            raise ValueError("too long")
    return data


def _reachable(path: Path) -> str:
    """Unix socket names end at 107 bytes: a longer path is named relative to the working directory when that helps."""
    name = str(path)
    if len(name.encode()) > 100:
        relative = os.path.relpath(name)
        if len(relative.encode()) < len(name.encode()):
            name = relative
    if len(name.encode()) > 107:
        raise NodeError(
            f"the data dir's path is too long for a control socket: {path}", hint="use a shorter --data-dir"
        )
    return name
