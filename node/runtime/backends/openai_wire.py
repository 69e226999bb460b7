"""What an OpenAI-compatible server says, typed and bounded before anything uses it.

An error is never taken for an answer: not with status 200, not in the middle of a stream, not as an end without a
reason. Source: OpenAI's API reference (completions, models, streaming); the extensions of vLLM (`token_ids`,
`max_model_len`) and llama.cpp (`meta`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from node.nesting import check_depth
from node.runtime.backends.http_stream import Answer, HttpFailure
from node.runtime.backends.sse import Event
from protocol.messages import FinishReason
from protocol.tame import one_line

MAX_BODY: Final = 1 << 20
"""Most bytes of an answer that is no stream."""
MAX_MODELS: Final = 1024
MAX_TEXT: Final = 16_384
"""Most characters of one event. Tokens are found in a text character by character, and the worker's loop waits meanwhile."""
END: Final = "[DONE]"
_FINISH: Final = {
    "stop": FinishReason.STOP,
    "eos_token": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "length": FinishReason.LENGTH,
}


class ServerFault(Exception):
    """The server answered, and what it answered is an error or nonsense."""


class ServerBusy(ServerFault):
    """It says that it cannot now (429, 502, 503, 504)."""


class _Choice(msgspec.Struct):
    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None
    object: str = ""
    message: Any = None


class Piece(msgspec.Struct, frozen=True):
    """One event of a completion."""

    text: str
    token_ids: list[int] | None
    finish_reason: FinishReason | None
    usage: Usage | None


class _Meta(msgspec.Struct):
    n_ctx: int = 0


class ServedModel(msgspec.Struct):
    """One entry of /v1/models."""

    id: str
    owned_by: str = ""
    max_model_len: int | None = None
    meta: _Meta | None = None

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together; 0 when the server does not tell."""
        return max(self.max_model_len or 0, self.meta.n_ctx if self.meta else 0, 0)


class _Models(msgspec.Struct):
    data: list[ServedModel]


class _Tokens(msgspec.Struct):
    tokens: list[int]


def parse_piece(event: Event) -> Piece | None:
    """One event; None for one that says nothing. Raises `ServerFault` for an error in-band and for what is no chunk
    of a completion."""
    chunk = decode(event.data.encode(), _Chunk)
    if event.name == "error" or chunk.error is not None or chunk.object == "error":
        raise ServerFault(f"it broke off: {_said(chunk.error or chunk.message or event.data)}")
    if not chunk.choices:
        return None if chunk.usage is None else Piece("", None, None, chunk.usage)
    if len(chunk.choices) != 1 or chunk.choices[0].index != 0:
        raise ServerFault("it answers with choices that nobody asked for")
    (choice,) = chunk.choices
    if len(choice.text) > MAX_TEXT:
        raise ServerFault(f"it sends {len(choice.text)} characters in one event")
    reason = None
    if choice.finish_reason:
        reason = _FINISH.get(choice.finish_reason)
        if reason is None:
            raise ServerFault(f"it ended the answer for the reason {_said(choice.finish_reason)}")
    return Piece(choice.text, choice.token_ids, reason, chunk.usage)


def decode(raw: bytes, kind: type[Any]) -> Any:
    """JSON of a known form. Raises `ServerFault`."""
    try:
        check_depth(raw)
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ServerFault(f"what it answers is not what it should be: {_said(error)}") from None


async def read_models(answer: Answer) -> list[ServedModel]:
    await require_ok(answer)
    models: list[ServedModel] = decode(await answer.read(MAX_BODY), _Models).data
    if len(models) > MAX_MODELS:
        raise ServerFault(f"it lists more than {MAX_MODELS} models")
    return models


async def read_tokens(answer: Answer) -> list[int]:
    await require_ok(answer)
    tokens: list[int] = decode(await answer.read(MAX_BODY), _Tokens).tokens
    return tokens


async def require_ok(answer: Answer) -> None:
    """Raises `ServerFault`, or `ServerBusy`, with what the server said, when the status is not 200."""
    if answer.status == 200:
        return
    try:
        said = _said((await answer.read(MAX_BODY)).decode(errors="replace"))
    except HttpFailure:
        said = "nothing readable"
    kind = ServerBusy if answer.status in (429, 502, 503, 504) else ServerFault
    raise kind(f"status {answer.status}: {said}")


def metrics(page: str, names: tuple[str, ...]) -> Mapping[str, float]:
    """Sums over all labels of some series of a Prometheus page; what is absent or no number is left out."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        bare = name.partition("{")[0].strip()
        if bare in names:
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                found[bare] = found.get(bare, 0.0) + number
    return found


def _said(what: object) -> str:
    return one_line(str(what)[:2000])[:200]
