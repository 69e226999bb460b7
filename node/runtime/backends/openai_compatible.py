"""A model server that the operator already runs, behind the `Backend` port: anything that speaks OpenAI's completions API.

Rules:
- Token ids are what is counted, hashed and signed. They come from the server where it tells them, and are checked
  against its text; else they are the ids of its text under the model's own tokenizer
  (`node.runtime.backends.retokenise`).
- What the server says of itself decides no money: its usage is looked at when it is met, and never again. Our own
  count is billed.
- Only parameters that the server honours are offered; the sampler is not ours, so the numerics class is empty. A
  stream goes on elsewhere, or here, from prompt plus delivered tokens.
- A request is made again only while it has brought no token. Closing the generator closes the connection, which is the abort.
- Whatever the server sends or leaves out ends as tokens or as a `ModelError`, in bounded memory and time; never as an
  empty success.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from node.errors import ModelError, PromptInvalid
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.models.tokenizer import Detokenizer, Tokenizer
from node.ports import ModelInfo, Prompt, Step
from node.runtime.backends import openai_meeting as meeting
from node.runtime.backends.http_stream import HttpFailure, ServerAddress, request
from node.runtime.backends.openai_meeting import Acquaintance, ServerSettings
from node.runtime.backends.openai_wire import END, Piece, ServerBusy, ServerFault, metrics, parse_piece, require_ok
from node.runtime.backends.retokenise import Agreement, NotOurTokens, Retokeniser
from node.runtime.backends.sse import MAX_EVENT, BadEvents, EventReader
from node.runtime.stops import StopStrings
from protocol.ids import ModelId
from protocol.messages import ChatMessage, FinishReason, Params, ResponseFormat

log = logging.getLogger(__name__)
CACHE_FULL: Final = 0.97
"""Share of the server's cache in use from which on no new stream is taken."""
MAX_METRICS: Final = 4 << 20
_BYTES_PER_TOKEN: Final = 64 << 10
"""Most bytes of a stream for each token that may come, events and comments together, over a start of `_BYTES_TO_START`."""
_BYTES_TO_START: Final = 1 << 20
_BYTES_PER_ID: Final = 16
"""Most bytes of each token id of a prompt that a server tells back: one that tells ids does so in its first event."""
_USAGE_S: Final = 1.0
"""How long the end of a stream is waited for after its last token; nothing but a check depends on it."""


@dataclass(frozen=True, slots=True)
class _Served:
    info: ModelInfo
    tokenizer: Tokenizer
    known: Acquaintance


class OpenAIBackend:
    """Implements `node.ports.Backend` on one server. Made by `open_openai`."""

    def __init__(self, address: ServerAddress, settings: ServerSettings) -> None:
        self._address, self._settings = address, settings
        self._served: dict[ModelId, _Served] = {}
        self._active = 0
        self._full = False
        """What was seen last: the server is not there, requests wait there, or its cache is full."""

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        return {model: served.info for model, served in self._served.items()}

    @property
    def free_slots(self) -> int:
        return 0 if self._full else max(0, self._settings.max_streams - self._active)

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `PromptInvalid`."""
        tokenizer = self._get(model).tokenizer
        return Prompt(model, tuple(tokenizer.chat([{"role": m.role, "content": m.content} for m in messages])))

    def check_format(self, model: ModelId, wanted: ResponseFormat, resume: Sequence[int] = ()) -> None:
        """Raises `PromptInvalid`: no grammar is followed here, and none is offered."""
        raise PromptInvalid("response_format is not supported")

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        return not self._full and self.could_fit(prompt.model, len(prompt.token_ids) + max_tokens)

    def could_fit(self, model: ModelId, tokens: int) -> bool:
        return tokens <= self._get(model).info.context_length

    async def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        """Stream one completion. Raises `ModelError`, which names the server; closing the generator aborts the request."""
        served = self._get(prompt.model)
        left = params.max_tokens - len(resume)
        if left < 1:
            raise ModelError("nothing is left to generate")
        output = _Output(served, params, resume, left)
        if output.over:
            yield Step((), "", FinishReason.STOP_STRING)
            return
        self._active += 1
        try:
            async with aclosing(
                self._pieces(served, (*prompt.token_ids, *resume), params, left, prompt.salt)
            ) as pieces:
                async for piece in pieces:
                    step = output.push(piece)
                    if step.token_ids or step.text or step.finish_reason:
                        yield step
                    if step.finish_reason is not None:
                        return
            yield output.end()
        except (ServerFault, HttpFailure, NotOurTokens) as error:
            raise self._fault(error) from None
        finally:
            self._active -= 1

    async def _pieces(
        self, served: _Served, ids: Sequence[int], params: Params, left: int, salt: bytes = b""
    ) -> AsyncGenerator[Piece, None]:
        """The events of a completion, its request made again while nothing has come. Raises `ServerFault` or
        `HttpFailure`."""
        dialect = served.known.dialect
        body = {
            "model": served.known.name,
            "prompt": list(ids) if dialect.token_prompts else served.tokenizer.written_out(ids),
            "max_tokens": left,
            "stream": True,
            "stream_options": {"include_usage": True},
            **dialect.sampling(params),
        }
        if dialect.salt and salt:
            body[dialect.salt] = salt.hex()
        encoded = msgspec.json.encode(body)
        echo = _BYTES_PER_ID * len(ids) if dialect.tells_ids else 0
        for attempt in range(self._settings.retries + 1):
            begun = False
            try:
                async with aclosing(self._attempt(encoded, left, echo)) as pieces:
                    async for piece in pieces:
                        begun = begun or bool(piece.text or piece.token_ids or piece.finish_reason)
                        yield piece
                return
            except (HttpFailure, ServerBusy) as error:
                if begun or attempt == self._settings.retries:
                    raise
                log.info("%s: %s; asking again", self._address.name, error)
            await trio.sleep(0.2 * 2**attempt)

    async def _attempt(self, body: bytes, left: int, echo: int) -> AsyncGenerator[Piece, None]:
        """`left`: tokens that may come; `echo`: bytes in which the prompt may be told back."""
        settings, limit = self._settings, _BYTES_TO_START + left * _BYTES_PER_TOKEN + echo
        started = trio.current_time()
        times = {"connect_s": settings.connect_s, "answer_s": settings.first_token_s}
        accept = [("Accept", "text/event-stream")]
        async with request(self._address, "POST", "/v1/completions", body, headers=accept, **times) as answer:
            with trio.move_on_after(settings.stall_s):
                await require_ok(answer)
            if answer.status != 200 or not answer.content_type.startswith("text/event-stream"):
                raise ServerFault(
                    f"it answered with {answer.content_type[:40] or 'nothing'} where a stream was asked for"
                )
            reader, size, ended = EventReader(MAX_EVENT + echo), 0, False
            deadline = started + settings.first_token_s
            while True:
                data = None
                with trio.CancelScope(deadline=deadline):
                    data = await answer.receive()
                if data is None and not ended:
                    raise ServerFault("it sent no token in time")
                if not data:
                    return
                size += len(data)
                if size > limit:
                    raise ServerFault(f"it sent more than {limit} bytes")
                try:
                    events = reader.push(data)
                except BadEvents as error:
                    raise ServerFault(str(error)) from None
                for event in events:
                    if event.data == END:
                        return
                    piece = parse_piece(event)
                    if piece is None:
                        continue
                    if piece.text or piece.token_ids:  # all else may come for ever and bring an answer no nearer
                        deadline = trio.current_time() + settings.stall_s
                    if piece.finish_reason is not None and not ended:
                        ended, deadline = True, trio.current_time() + _USAGE_S
                    yield piece

    async def probe(self, known: Acquaintance, tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int | None, bool]:
        """A completion of one token: prompt tokens that the server counted, None when it does not tell, and whether
        it tells ids.

        Raises `ModelError`.
        """
        info = ModelInfo(ModelId.of_manifest(b""), known.name, 1, "", "")
        counted, tells_ids = None, False
        try:
            async with aclosing(self._pieces(_Served(info, tokenizer, known), ids, Params(max_tokens=1), 1)) as pieces:
                async for piece in pieces:
                    tells_ids = tells_ids or bool(piece.token_ids)
                    counted = piece.usage.prompt_tokens if piece.usage else counted
        except (ServerFault, HttpFailure) as error:
            raise self._fault(error) from None
        return counted, tells_ids

    async def watch_load(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look for ever whether the server is there and has room; one without metrics is only looked for."""
        dialects = [served.known.dialect for served in self._served.values()]
        waiting = next((one.waiting for one in dialects if one.waiting), "")
        used = next((one.cache_used for one in dialects if one.cache_used), "")
        times = {"connect_s": self._settings.connect_s, "answer_s": self._settings.connect_s}
        task_status.started()
        while True:
            try:
                with trio.fail_after(2 * self._settings.connect_s):
                    path = "/metrics" if waiting else "/v1/models"
                    async with request(self._address, "GET", path, **times) as answer:
                        await require_ok(answer)
                        page = (await answer.read(MAX_METRICS)).decode(errors="replace")
                found = metrics(page, (waiting, used)) if waiting else {}
                self._full = found.get(waiting, 0) > 0 or found.get(used, 0) >= CACHE_FULL
            except ServerFault as error:
                log.debug("%s: no metrics: %s", self._address.name, error)
                self._full = False
            except (HttpFailure, trio.TooSlowError) as error:
                log.warning("%s is not there: %s", self._address.name, error)
                self._full = True
            await trio.sleep(self._settings.poll_s)

    def _get(self, model: ModelId) -> _Served:
        try:
            return self._served[model]
        except KeyError:
            raise ModelError(f"model {model} is not loaded") from None

    def _fault(self, error: Exception) -> ModelError:
        return ModelError(f"the model server {self._address.name}: {error}")


class _Output:
    """One stream's pieces as steps: ids found or checked, text decoded, stop strings seen, the count kept."""

    def __init__(self, served: _Served, params: Params, resume: Sequence[int], left: int) -> None:
        self._tokenizer = served.tokenizer
        self._tells_ids = served.known.dialect.tells_ids
        self._retokeniser, self._agreement = Retokeniser(served.tokenizer), Agreement()
        self._detokenizer: Detokenizer = served.tokenizer.detokenizer(resume)
        self._plain: Detokenizer = served.tokenizer.detokenizer()
        self._stops = StopStrings(params.stop, served.tokenizer, resume)
        self._resumed, self._left, self._count = bool(resume), left, 0

    @property
    def over(self) -> bool:
        """A stop string has come."""
        return self._stops.hit

    def push(self, piece: Piece) -> Step:
        """Raises `NotOurTokens`, `ServerFault`. A step with a finish reason is the last."""
        if self._tells_ids:
            ids = self._told(piece)
        else:
            ids = self._retokeniser.push(piece.text, self._left - self._count)
            if piece.finish_reason is not None:
                ids += self._retokeniser.finish()
        return self._step(ids, piece.finish_reason)

    def end(self) -> Step:
        """The stream is over and has not said why."""
        raise ServerFault("it ended the answer without a reason")

    def _told(self, piece: Piece) -> list[int]:
        ids = piece.token_ids or []
        if ids and not 0 <= min(ids) <= max(ids) < self._tokenizer.vocab_size:
            raise NotOurTokens(f"a token id outside the vocabulary of {self._tokenizer.vocab_size}")
        self._agreement.check(self._plain.push(ids), piece.text)
        if piece.finish_reason is not None:
            self._agreement.finish(self._plain.finish())
        return ids

    def _step(self, ids: list[int], reason: FinishReason | None) -> Step:
        if len(ids) >= self._left - self._count and (reason is None or len(ids) > self._left - self._count):
            ids, reason = ids[: self._left - self._count], FinishReason.LENGTH
        if reason is FinishReason.STOP and not ids and not self._count and not self._resumed:
            raise ServerFault("it ended the answer before its first token")
        given: list[int] = []
        text = ""
        for token in ids:  # one by one: what is delivered and billed must not depend on how the server cut its chunks
            given.append(token)
            text += self._stops.push(self._detokenizer.push((token,)))
            if self._stops.hit:
                reason = FinishReason.STOP_STRING
                break
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            text += self._stops.push(self._detokenizer.finish())
            text += self._stops.finish()
            reason = FinishReason.STOP_STRING if self._stops.hit else reason
        self._count += len(given)
        return Step(tuple(given), text, reason)


@asynccontextmanager
async def open_openai(
    store: ModelStore,
    models: Sequence[Manifest],
    settings: ServerSettings,
    say: Callable[[str], None] = meeting.SAY_NOTHING,
) -> AsyncIterator[OpenAIBackend]:
    """Meet the server and serve these models of it while the block runs. Of each model only tokenizer and template
    are read here, and checked against its id; the weights are the server's. Raises `ModelError`."""
    try:
        address = ServerAddress.parse(settings.url, settings.secret)
    except HttpFailure as error:
        raise ModelError(str(error), hint="set openai.url") from None
    if not settings.dtype:
        raise ModelError(
            "the model server does not tell what it computes in, and clients must know what they buy",
            hint="set openai.dtype, for instance bfloat16, fp8 or q4_1",
        )
    backend = OpenAIBackend(address, settings)
    found = await meeting.list_models(address, settings)
    async with AsyncExitStack() as stack:
        for manifest, model in zip(
            models, meeting.pair(address, [one.name for one in models], settings.served, found), strict=True
        ):
            tokenizer = await trio.to_thread.run_sync(_tokenizer, store, manifest)
            stack.callback(tokenizer.close)

            async def complete(
                known: Acquaintance, ids: Sequence[int], own: Tokenizer = tokenizer
            ) -> tuple[int | None, bool]:
                return await backend.probe(known, own, ids)

            known = await meeting.meet(address, settings, model, tokenizer, complete, say)
            tokenizer.warm()
            info = ModelInfo(
                id=manifest.id,
                name=manifest.name,
                context_length=min(manifest.context_length, known.context_length or manifest.context_length),
                dtype=settings.dtype,
                numerics_class="",
                params=known.dialect.params,
            )
            backend._served[manifest.id] = _Served(info, tokenizer, known)
        async with trio.open_nursery() as nursery:
            await nursery.start(backend.watch_load)
            try:
                yield backend
            finally:
                nursery.cancel_scope.cancel()


def _tokenizer(store: ModelStore, manifest: Manifest) -> Tokenizer:
    for entry in manifest.files:
        if not entry.path.endswith(".safetensors"):
            store.verify_file(manifest.id, entry, lambda _: None)
    return Tokenizer(store.path(manifest.id))
