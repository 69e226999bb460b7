"""Replicas of the engine over a Ray cluster, behind the `Backend` port: for an operator whose GPUs outgrow one machine.

Rules:
- A stream lives on one replica at a time. When that is lost (its process, its node, or it stops answering) the stream
  goes on at another, from the tokens that were delivered; the engine goes on token for token. What the reader notices
  is a pause.
- Tokens come from replicas, text is made here, so that a stream that moves has no seam in its text or its stop strings.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Final

import msgspec
import trio

from node.errors import ModelError, PromptInvalid
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.models.tokenizer import Tokenizer
from node.ports import ModelInfo, Prompt, Step
from node.runtime.backends.ray_cluster import Connection, NoAnswer, ReplicaGone, first_line, place
from node.runtime.backends.ray_pool import Member, Place, RayPool, RaySettings
from node.runtime.backends.ray_replica import BUSY, Batch
from node.runtime.backends.ray_said import Listener, Nonsense
from node.runtime.stops import StopStrings
from protocol.ids import ModelId
from protocol.logprobs import row_bytes
from protocol.messages import ChatMessage, FinishReason, Params, ResponseFormat

log = logging.getLogger(__name__)
LOSSES: Final = 5
"""A stream that was lost so often without a token between is given up: then it is the stream that kills replicas."""
CONNECT_S: Final = 60.0
"""Until the cluster must be there; Ray itself would try for many minutes."""
FORMAT_S: Final = 30.0
"""Until a replica must have looked at a grammar; what bounds that itself is `node.runtime.grammar`."""
BUSY_S: Final = 0.1
"""Between two questions to a replica that has no memory free."""


class _Lost(Exception):
    """The replica of a stream is gone."""


class RayBackend:
    """Implements `node.ports.Backend`. Made by `open_ray` when the first replica has told what it serves."""

    def __init__(self, pool: RayPool, tokenizers: Mapping[ModelId, Tokenizer]) -> None:
        self.pool: Final = pool
        self._tokenizers = tokenizers
        self._infos: dict[ModelId, ModelInfo] = {}
        self._largest: dict[ModelId, int] = {}
        self._ids = itertools.count()
        for name, told in (pool.told or {"models": {}})["models"].items():
            model = ModelId.from_cid(name)
            fields = ("name", "context_length", "dtype", "numerics_class")
            self._infos[model] = ModelInfo(model, *(told[field] for field in fields), params=tuple(told["params"]))
            self._largest[model] = told["largest"]

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        return dict(self._infos)

    @property
    def free_slots(self) -> int:
        return self.pool.free_slots

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `PromptInvalid`."""
        tokenizer = self._tokenizers[self._known(model)]
        return Prompt(model, tuple(tokenizer.chat([{"role": m.role, "content": m.content} for m in messages])))

    def check_format(self, model: ModelId, wanted: ResponseFormat, resume: Sequence[int] = ()) -> None:
        """Asks a replica, for as long as that takes. Raises `PromptInvalid`, and `ModelError` when none answers."""
        call = (str(self._known(model)), msgspec.msgpack.encode(wanted), tuple(resume))
        for member in list(self.pool.members):
            try:
                reason = member.placed.check_format(*call, timeout_s=FORMAT_S)
            except (ReplicaGone, NoAnswer) as error:
                log.warning("a replica did not look at a grammar: %s", error)
                continue
            if reason:
                raise PromptInvalid(reason[:300])
            return
        raise ModelError("no replica answers")

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """Which replica has memory is found out by asking it, so this says only whether one could have it."""
        return self.could_fit(prompt.model, len(prompt.token_ids) + max_tokens)

    def could_fit(self, model: ModelId, tokens: int) -> bool:
        return tokens <= self._largest[self._known(model)]

    async def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        """Stream one completion. Raises `ModelError`; closing the generator ends it on its replica within a step."""
        tokenizer = self._tokenizers[self._known(prompt.model)]
        detokenizer, stops = tokenizer.detokenizer(resume), StopStrings(params.stop, tokenizer, resume)
        if stops.hit:
            yield Step((), "", FinishReason.STOP_STRING)
            return
        delivered, losses = list(resume), 0
        width = 0 if params.likeliest is None else row_bytes(params.likeliest)
        while True:
            member = await self.pool.take()
            try:
                async with aclosing(self._batches(member, prompt, params, delivered)) as batches:
                    async for ids, finish, rows in batches:
                        losses = 0
                        reason = FinishReason(finish) if finish else None
                        given, text = [], ""
                        for token in ids:  # one by one: what is delivered must not depend on how a replica batches
                            given.append(token)
                            text += stops.push(detokenizer.push((token,)))
                            if stops.hit:
                                reason = FinishReason.STOP_STRING
                                break
                        if reason in (FinishReason.STOP, FinishReason.LENGTH):
                            text += stops.push(detokenizer.finish())
                            text += stops.finish()
                            reason = FinishReason.STOP_STRING if stops.hit else reason
                        delivered += given
                        yield Step(tuple(given), text, reason, rows[: len(given) * width])
                        if reason is not None:
                            return
            except _Lost:
                losses += 1
                log.warning("a replica was lost under a stream of %d tokens; it goes on at another", len(delivered))
                if losses > LOSSES:
                    raise ModelError("replicas are lost again and again under this stream") from None
            finally:
                self.pool.give_back(member)

    async def _batches(
        self, member: Member, prompt: Prompt, params: Params, delivered: Sequence[int]
    ) -> AsyncGenerator[tuple[tuple[int, ...], int, bytes], None]:
        """Token ids, a finish reason or 0, and rows of log probabilities, from one replica.

        Raises `_Lost`, or `ModelError` when the engine says so."""
        plain = msgspec.msgpack.encode(msgspec.structs.replace(params, stop=()))
        while True:
            number = next(self._ids)
            send, receive = trio.open_memory_channel[Batch](2)
            call = (number, str(prompt.model), prompt.token_ids, prompt.salt, plain, tuple(delivered))
            member.streams.add(send)
            heard = Listener(params.max_tokens - len(delivered), params.likeliest)
            self.pool.nursery.start_soon(self._read, member, call, heard, send)
            over = busy = False
            try:
                async for ids, finish, fault, rows in receive:
                    busy = fault == BUSY
                    if fault and not busy:
                        over = True
                        raise ModelError(fault)
                    over = bool(finish or busy)
                    if ids or finish:
                        yield ids, finish, rows
                    if over:
                        break
            finally:
                member.streams.discard(send)
                receive.close()
                if not over and not member.lost:
                    self._tell(member, number)
            if not over:
                raise _Lost
            if not busy:
                return
            await trio.sleep(BUSY_S)  # it has no memory free: one of its streams must end first

    async def _read(
        self, member: Member, call: tuple[Any, ...], heard: Listener, send: trio.MemorySendChannel[Batch]
    ) -> None:
        """Carries what a replica yields into trio, until it ends, is lost, or nobody reads it."""

        def carry() -> None:
            for batch in member.placed.stream(*call):
                trio.from_thread.run(send.send, heard(batch))

        with send:
            try:
                await trio.to_thread.run_sync(carry, abandon_on_cancel=True, limiter=self.pool.limiter)
            except (trio.BrokenResourceError, trio.ClosedResourceError):  # the reader has left
                return
            except (ReplicaGone, Nonsense) as error:
                self.pool.lose(member, str(error))

    def _tell(self, member: Member, number: int) -> None:
        """Have a replica stop a stream; nobody waits for it."""
        try:
            member.placed.stop(number)
        except Exception as error:  # of Ray, which has no one kind for it; the replica is then noticed as lost
            log.debug("cannot stop a stream: %s", error)

    def _known(self, model: ModelId) -> ModelId:
        if model not in self._infos:
            raise ModelError(f"model {model} is not loaded")
        return model


@asynccontextmanager
async def open_replicas(
    store: ModelStore,
    models: Sequence[Manifest],
    settings: RaySettings,
    say: Callable[[str], None] = lambda _: None,
    start: Place = place,
) -> AsyncIterator[RayBackend]:
    """Serve on a cluster that is connected; the first replica is ready when the block begins. Raises `ModelError`."""
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        tokenizers = {}
        for manifest in models:
            tokenizers[manifest.id] = tokenizer = Tokenizer(store.path(manifest.id))
            stack.callback(tokenizer.close)
            tokenizer.warm()
        pool = RayPool(settings, str(store.root), [str(manifest.id) for manifest in models], nursery, start)
        nursery.start_soon(pool.supervise)
        say(f"Ray: starting {settings.scale.least} replicas")
        try:
            with trio.move_on_after(settings.load_s):
                while not pool.members and not pool.failure:
                    await trio.sleep(0.05)
            if not pool.members:
                raise ModelError(pool.failure or f"no replica was ready after {settings.load_s:g} s")
            yield RayBackend(pool, tokenizers)
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await pool.close()


@asynccontextmanager
async def open_ray(
    store: ModelStore, models: Sequence[Manifest], settings: RaySettings, say: Callable[[str], None] = lambda _: None
) -> AsyncIterator[RayBackend]:
    """Join or start a cluster and serve these models on it while the block runs.

    The store must be at the same path on every node. Raises `ModelError`.
    """
    connection = Connection(settings.address)
    try:
        with trio.fail_after(CONNECT_S):
            await trio.to_thread.run_sync(connection.wait, abandon_on_cancel=True)
    except ImportError:
        raise ModelError(
            "the back end `ray` needs Ray, which is not installed", hint="pip install 'gristmill[ray]'"
        ) from None
    except trio.TooSlowError:
        connection.leave()
        raise ModelError(f"no Ray cluster answered within {CONNECT_S:g} s", hint="see ray.address") from None
    except Exception as error:  # of Ray, which has no one kind for it
        raise ModelError(f"no Ray cluster: {first_line(error)}", hint="see docs/operators/ray.md") from None
    try:
        async with open_replicas(store, models, settings, say) as backend:
            yield backend
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(connection.close)
