"""Getting to know a model server before it serves anybody: what it is, what it takes, and that it reads a prompt as we do.

What cannot be known from outside is which weights it computes with: the operator answers for that, as for their
number format, which no server tells. What can be known is checked: the same tokens for the same text, the same count
for the same prompt, ids where it says ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import trio

from node.errors import ModelError
from node.models.tokenizer import Tokenizer
from node.runtime.backends.dialects import DIALECTS, Dialect, dialect_of
from node.runtime.backends.http_stream import HttpFailure, ServerAddress, request
from node.runtime.backends.openai_wire import ServedModel, ServerFault, read_models, read_tokens

PROBE = "The 12 capitals' names: Zürich, 東京 and\n\n  naïve “quotes” — don't   stop_here(x[0]) 🎉!"
"""A text in which tokenizers differ: digits, runs of spaces, contractions, several scripts."""
SAY_NOTHING: Callable[[str], None] = lambda _: None  # noqa: E731


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the operator says about a model server. All times are seconds."""

    url: str
    dtype: str
    """What the server computes in, declared to clients: it does not tell, and they must know what they buy."""
    served: Sequence[str] = ()
    """What the server calls the models, in their order; empty: by our names, or the only one that it has."""
    kind: str = "auto"
    context_length: int = 0
    """0: what the server tells."""
    secret: str = ""
    max_streams: int = 4
    connect_s: float = 5.0
    first_token_s: float = 120.0
    stall_s: float = 30.0
    retries: int = 2
    """How often a request is made again that has not brought a token."""
    poll_s: float = 2.0
    """How often the server's load is read."""


@dataclass(frozen=True, slots=True)
class Acquaintance:
    """What is known of one model of a server."""

    name: str
    dialect: Dialect
    """With `token_prompts` and `tells_ids` as they were seen, not as they are documented."""
    context_length: int
    """0: not told."""


async def list_models(address: ServerAddress, settings: ServerSettings) -> list[ServedModel]:
    """Raises `ModelError`."""
    try:
        async with request(
            address, "GET", "/v1/models", connect_s=settings.connect_s, answer_s=settings.connect_s
        ) as answer:
            with trio.fail_after(settings.stall_s):
                return await read_models(answer)
    except (HttpFailure, ServerFault, trio.TooSlowError) as error:
        raise _fault(address, f"cannot list its models: {error}") from None


def pair(
    address: ServerAddress, ours: Sequence[str], served: Sequence[str], found: Sequence[ServedModel]
) -> list[ServedModel]:
    """The server's model for each of ours. Raises `ModelError` when that is not plain."""
    by_name = {model.id: model for model in found}
    if served and len(served) != len(ours):
        raise ModelError(
            f"openai.served names {len(served)} models, the worker serves {len(ours)}",
            hint="name the server's models in the order of worker.models",
        )
    if not served and len(ours) == len(by_name) == 1 and ours[0] not in by_name:
        return list(by_name.values())
    missing = [name for name in (served or ours) if name not in by_name]
    if missing:
        known = ", ".join(repr(name[:80]) for name in sorted(by_name)[:8]) or "none"
        raise ModelError(
            f"{address.name} has no model {missing[0]!r} (it has {known})", hint="say what it is called: openai.served"
        )
    return [by_name[name] for name in (served or ours)]


async def meet(
    address: ServerAddress,
    settings: ServerSettings,
    model: ServedModel,
    tokenizer: Tokenizer,
    complete: Callable[[Acquaintance, Sequence[int]], object],
    say: Callable[[str], None] = SAY_NOTHING,
) -> Acquaintance:
    """Try what the server can do. `complete(known, prompt)` makes a completion of one token and returns (prompt
    tokens that the server counted, whether it told ids); see `OpenAIBackend`. Raises `ModelError`."""
    dialect = dialect_of(model.owned_by) if settings.kind == "auto" else DIALECTS[settings.kind]
    known = Acquaintance(model.id, dialect, settings.context_length or model.context_length)
    ids = tokenizer.encode(PROBE)
    if dialect.tokenize:
        theirs = await _tokenize(address, settings, model.id, dialect)
        if theirs is not None and theirs != ids:
            raise _fault(address, f"{model.id!r} has another tokenizer than the model in the store")
    for token_prompts in (True, False) if dialect.token_prompts or settings.kind == "auto" else (False,):
        trial = replace(known, dialect=replace(dialect, token_prompts=token_prompts))
        try:
            counted, tells_ids = await complete(trial, ids)  # type: ignore[misc]
        except ModelError as error:
            if token_prompts:
                say(f"{address.name} does not take prompts as token ids: {error}")
                continue
            raise
        if counted not in (None, len(ids)):
            raise _fault(
                address,
                f"it reads {counted} tokens where the model's tokenizer has {len(ids)}: "
                "another tokenizer, or it adds some of its own",
            )
        told = "its token ids" if tells_ids else "text only, whose ids are made by the model's own tokenizer"
        given = "token ids" if token_prompts else "text"
        say(f"{address.name} ({dialect.kind}), {model.id}: prompts as {given}, answers as {told}")
        return replace(trial, dialect=replace(trial.dialect, tells_ids=tells_ids))
    raise _fault(address, "it takes prompts neither as token ids nor as text")


async def _tokenize(address: ServerAddress, settings: ServerSettings, name: str, dialect: Dialect) -> list[int] | None:
    """The server's ids of the probe; None where it does not answer that question."""
    body = msgspec.json.encode({"model": name, dialect.tokenize: PROBE, **dialect.tokenize_extra})
    times = {"connect_s": settings.connect_s, "answer_s": settings.stall_s}
    try:
        async with request(address, "POST", "/tokenize", body, **times) as answer:
            with trio.fail_after(settings.stall_s):
                return await read_tokens(answer)
    except (HttpFailure, ServerFault, trio.TooSlowError):
        return None


def _fault(address: ServerAddress, what: str) -> ModelError:
    return ModelError(
        f"the model server {address.name}: {what}", hint="docs/operators/backends.md says what it must do"
    )
