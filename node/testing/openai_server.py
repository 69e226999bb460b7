"""An OpenAI-compatible server without a model, which answers as it is told, and badly where it is told to. Product
code: for tests.

Its "model" continues any prompt with one fixed answer, from where the prompt's end is already a part of it. That is
no language model, and it says so in its name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import h11
import trio

from node.models.tokenizer import Tokenizer

NAME: Final = "scripted"
_STREAM: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@dataclass(slots=True)
class Script:
    """How the server behaves; change it while it runs."""

    answer: Sequence[int] = ()
    """Ends with a token that ends the turn, which is told as an id and has no text."""
    owned_by: str = "vllm"
    takes_ids: bool = True
    tells_ids: bool = True
    max_model_len: int | None = 2048
    wound: str = ""
    """One of `WOUNDS`, for completions of more than one token; empty: none."""
    wounded: int = 1 << 30
    """How many of the next completions have the wound."""
    text_size: int = 0
    """Characters of one event where no ids are told; 0: a token each."""
    seconds_per_token: float = 0.0
    adds_tokens: int = 0
    """What it counts in a prompt beyond what was sent."""
    metrics: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Completions that were asked for."""
    aborted: int = 0
    """Streams whose reader closed the connection."""


@dataclass(slots=True)
class ScriptedServer:
    url: str
    script: Script
    tokenizer: Tokenizer


Wound = Callable[["_Reply"], Awaitable[None]]


@dataclass(slots=True)
class _Reply:
    """One completion under way."""

    stream: trio.SocketStream
    script: Script
    tokenizer: Tokenizer
    ids: Sequence[int]
    """What is left of the answer."""
    prompt_tokens: int
    most: int
    told_back: Sequence[int] = ()
    """The prompt, which vLLM tells in the first event where it tells ids."""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def event(self, body: object) -> None:
        await self.send(b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n")

    def chunk(self, text: str, ids: Sequence[int], reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        if self.script.tells_ids:
            choice["token_ids"] = list(ids)
            choice["prompt_token_ids"] = list(self.told_back) or None
            self.told_back = ()
        return {"id": "cmpl-1", "object": "text_completion", "model": NAME, "choices": [choice]}

    async def tokens(self, count: int) -> None:
        """The first of the answer, each an event."""
        detokenizer = self.tokenizer.detokenizer()
        for token in self.ids[:count]:
            await self.event(self.chunk(detokenizer.push([token]), [token]))

    async def whole(self, usage: int | None = None) -> None:
        """As a good server answers."""
        await self.send(_STREAM)
        given = list(self.ids[: self.most])
        detokenizer = self.tokenizer.detokenizer()
        ended = len(given) == len(self.ids)
        if self.script.tells_ids or not self.script.text_size:
            for token in given:
                await trio.sleep(self.script.seconds_per_token)
                await self.event(self.chunk(detokenizer.push([token]), [token]))
        else:
            text = self.tokenizer.decode(given)
            for start in range(0, len(text), self.script.text_size):
                await trio.sleep(self.script.seconds_per_token)
                await self.event(self.chunk(text[start : start + self.script.text_size], []))
        await self.event(self.chunk(detokenizer.finish(), [], "stop" if ended else "length"))
        completion = len(given) if usage is None else usage
        await self.event(
            {"choices": [], "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion}}
        )
        await self.send(b"data: [DONE]\n\n")


def _after(count: int, *raw: bytes, hold: bool = False) -> Wound:
    """So many tokens, then these bytes, then the end or nothing more."""

    async def reply(one: _Reply) -> None:
        await one.send(_STREAM)
        await one.tokens(count)
        for data in raw:
            await one.send(data)
        if hold:
            await trio.sleep_forever()

    return reply


def _raw(*raw: bytes, hold: bool = False) -> Wound:
    """These bytes instead of an answer."""

    async def reply(one: _Reply) -> None:
        for data in raw:
            await one.send(data)
        if hold:
            await trio.sleep_forever()

    return reply


def _for_ever(head: bytes, piece: bytes) -> Wound:
    async def reply(one: _Reply) -> None:
        await one.send(head)
        while True:
            await one.send(piece)

    return reply


def _chunks(make: Callable[[_Reply], Sequence[object]]) -> Wound:
    async def reply(one: _Reply) -> None:
        await one.send(_STREAM)
        for body in make(one):
            await one.event(body)
        await one.send(b"data: [DONE]\n\n")

    return reply


async def _cut_midway(one: _Reply) -> None:
    """A line that breaks: fewer bytes than the head has promised."""
    await one.send(_STREAM.replace(b"Connection: close", b"Content-Length: 99999"))
    await one.tokens(2)


async def _dripping_nothing(one: _Reply) -> None:
    """Too slow to fill anything, and never silent."""
    await one.send(_STREAM)
    while True:
        await one.event(one.chunk("", []))
        await trio.sleep(0.05)


async def _endless_tokens(one: _Reply) -> None:
    await one.send(_STREAM)
    for token in itertools.cycle(one.ids[:-1]):
        await one.event(one.chunk(one.tokenizer.decode([token]), [token]))


def _json(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _status(line: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {line}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


_ERROR: Final = {"error": {"message": "CUDA out of memory", "type": "server_error", "code": 500}}
WOUNDS: Final[Mapping[str, Wound]] = MappingProxyType(
    {
        "error": _after(0, _json(_ERROR)),
        "error midway": _after(2, _json(_ERROR)),
        "error with done": _after(2, _json(_ERROR), b"data: [DONE]\n\n"),
        "error of another form": _after(1, _json({"object": "error", "message": "engine dead", "code": 500})),
        "error by its name": _after(1, b"event: error\ndata: {}\n\n"),
        "no reason": _after(2, b"data: [DONE]\n\n"),
        "end without done": _after(2),
        "done only": _after(0, b"data: [DONE]\n\n"),
        "nothing": _after(0),
        "an end only": _chunks(lambda one: [one.chunk("", [], "stop")]),
        "aborted": _chunks(lambda one: [one.chunk("", one.ids[:1], "abort")]),
        "cut": _raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99999\r\n\r\n", b"data: {"),
        "cut midway": _cut_midway,
        "html": _raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<p/>"),
        "no stream": _raw(
            _status("200 OK", json.dumps({"choices": [{"text": "hi", "finish_reason": "stop"}]}).encode())
        ),
        "no http": _raw(b"\x00\x01\x02 what?\r\n\r\n"),
        "status 400": _raw(_status("400 Bad Request", json.dumps(_ERROR).encode())),
        "status 500": _raw(_status("500 Oops", b"\x1b[2J not JSON")),
        "status 503": _raw(_status("503 Later", b"")),
        "huge error": _for_ever(b"HTTP/1.1 500 Oops\r\nContent-Type: text/plain\r\n\r\n", b"x" * 65536),
        "endless head": _for_ever(b"HTTP/1.1 200 OK\r\n", b"X-Filler: " + b"y" * 1000 + b"\r\n"),
        "endless line": _for_ever(_STREAM + b"data: ", b"z" * 65536),
        "endless event": _for_ever(_STREAM, b"data: " + b"z" * 1000 + b"\n"),
        "endless comments": _for_ever(_STREAM, b": still here\n\n" * 1000),
        "endless nothing": _for_ever(_STREAM, _json({"choices": [{"index": 0, "text": ""}]})),
        "dripping nothing": _dripping_nothing,
        "huge text": _chunks(lambda one: [one.chunk("word " * 200_000, [1])]),
        "no utf-8": _after(1, b'data: {"choices": [{"index": 0, "text": "\xff\xfe"}]}\n\n'),
        "lone surrogate": _after(1, b'data: {"choices": [{"index": 0, "text": "\\ud800", "token_ids": [5]}]}\n\n'),
        "no json": _after(1, b"data: {'choices': 1}\n\n"),
        "deep json": _after(1, b'data: {"choices": ' + b"[" * 5000 + b"]" * 5000 + b"}\n\n"),
        "wrong types": _after(1, b'data: {"choices": [{"index": 0, "text": 7}]}\n\n'),
        "prompt of another": _chunks(lambda one: [one.chunk("", []) | {"prompt_token_ids": [1 << 19] * 60_000}]),
        "two choices": _chunks(lambda one: [{"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}]),
        "another choice": _chunks(lambda one: [{"choices": [{"index": 3, "text": "a"}]}]),
        "silent": _after(0, hold=True),
        "silent midway": _after(2, hold=True),
        "no head": _raw(hold=True),
    }
)
"""What a server may do to us, whether it tells ids or not; each must end as an error that names the server."""

ID_WOUNDS: Final[Mapping[str, Wound]] = MappingProxyType(
    {
        "id outside": _chunks(lambda one: [one.chunk("", [1 << 21], None)]),
        "id far outside": _chunks(lambda one: [one.chunk("", [1 << 80], None)]),
        "id negative": _chunks(lambda one: [one.chunk("", [-1], None)]),
        "wrong text": _chunks(lambda one: [one.chunk("surely not", one.ids[:1]), one.chunk("", [], "stop")]),
        "another text": _chunks(
            lambda one: [one.chunk(one.tokenizer.decode(one.ids[:9]).swapcase(), one.ids[:9], "stop")]
        ),
        "text without ids": _chunks(lambda one: [one.chunk(one.tokenizer.decode(one.ids), [], "stop")]),
        "ids without text": _chunks(lambda one: [one.chunk("", one.ids[:3], "stop")]),
    }
)
"""The same for a server that tells ids."""

HARMLESS: Final[Mapping[str, Wound]] = MappingProxyType(
    {"endless tokens": _endless_tokens, "wrong usage": lambda one: one.whole(usage=1_000_000)}
)
"""What costs nobody anything."""


@asynccontextmanager
async def open_scripted(tokenizer: Tokenizer, script: Script) -> AsyncGenerator[ScriptedServer, None]:
    """Serve on a free port of loopback while the block runs."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        server = ScriptedServer(f"http://127.0.0.1:{port}", script, tokenizer)

        async def handle(stream: trio.SocketStream) -> None:
            try:
                await _serve(server, stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                script.aborted += 1
            finally:
                await trio.aclose_forcefully(stream)

        await nursery.start(trio.serve_listeners, handle, listeners)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()


async def _serve(server: ScriptedServer, stream: trio.SocketStream) -> None:
    target, body = await _read(stream)
    script = server.script
    if target == "/v1/models":
        model = {"id": NAME, "object": "model", "owned_by": script.owned_by, "max_model_len": script.max_model_len}
        await stream.send_all(_status("200 OK", json.dumps({"object": "list", "data": [model]}).encode()))
    elif target == "/metrics" and script.metrics:
        await stream.send_all(_status("200 OK", script.metrics.encode()))
    elif target == "/v1/completions":
        asked = json.loads(body)
        script.requests.append(asked)
        await _complete(server, stream, asked)
    else:
        await stream.send_all(_status("404 Not Found", b'{"error": "no such page"}'))


async def _complete(server: ScriptedServer, stream: trio.SocketStream, asked: Mapping[str, Any]) -> None:
    script, prompt = server.script, asked["prompt"]
    if isinstance(prompt, list) and not script.takes_ids:
        await stream.send_all(_status("400 Bad Request", b'{"error": {"message": "prompt must be a string"}}'))
        return
    ids = prompt if isinstance(prompt, list) else server.tokenizer.encode(prompt)
    done = next(n for n in range(len(script.answer), -1, -1) if not n or list(script.answer[:n]) == ids[-n:])
    reply = _Reply(
        stream, script, server.tokenizer, script.answer[done:], len(ids) + script.adds_tokens, asked["max_tokens"], ids
    )
    if script.wound and asked["max_tokens"] > 1 and script.wounded > 0:
        script.wounded -= 1
        await {**WOUNDS, **ID_WOUNDS, **HARMLESS}[script.wound](reply)
    else:
        await reply.whole()


async def _read(stream: trio.SocketStream) -> tuple[str, bytes]:
    http, target, body = h11.Connection(h11.SERVER), "", bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(65536))
        elif isinstance(event, h11.Request):
            target = event.target.decode()
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return target, bytes(body)
        else:
            raise trio.BrokenResourceError("the reader went away")
