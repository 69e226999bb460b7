"""The torch back end: model store + tokenizer + engine host, behind the `Backend` port.

``OMP_WAIT_POLICY=PASSIVE`` is set by `node.runtime` itself, before anything here can import torch.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from msgspec import UnsetType

from node.errors import ModelError, PromptInvalid
from node.models.manifest import FileEntry, Manifest
from node.models.store import ModelStore, Progress
from node.models.tokenizer import Tokenizer
from node.ports import SAMPLING_PARAMS, ModelInfo, Prompt, Step
from node.runtime.engine.sequence import FinishReason as EngineFinish
from node.runtime.engine.sequence import Sequence as EngineSequence
from node.runtime.host import EngineHost
from node.runtime.stops import StopStrings
from node.telemetry.engine import EngineMetrics
from node.telemetry.exposition import Sample
from node.telemetry.steps import StepTrace
from protocol.ids import ModelId
from protocol.messages import ChatMessage, FinishReason, Params, ResponseFormat, sampling_params

if TYPE_CHECKING:
    from node.runtime.engine.engine import Engine
    from node.runtime.grammar import GrammarConstraint, Grammars
    from node.runtime.hal.devices import Choice

Watch = Callable[[Manifest], AbstractContextManager[Progress]]
"""Sees a model being hashed."""
_FINISH = {EngineFinish.STOP: FinishReason.STOP, EngineFinish.LENGTH: FinishReason.LENGTH}


@dataclass(frozen=True, slots=True)
class EngineSettings:
    device: str = "cpu"
    """`auto`, or a kind of `node.runtime.hal` with or without an index."""
    dtype: str = "float32"
    threads: int = 1
    cache_bytes: int = 1 << 30
    max_streams: int = 4
    trace: Path | None = None
    """Where each model's steps are traced: its name is put before the file's suffix when there are several models."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    info: ModelInfo
    tokenizer: Tokenizer
    grammars: Grammars
    host: EngineHost
    engine: Engine
    """Belongs to the host's thread; from here only what may be read at any time."""


class TorchBackend:
    """Models that are loaded and ready. Made by `open_backend`."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._loaded: dict[ModelId, _Loaded] = {}
        self._active = 0
        self._ids = itertools.count()

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        return {model: loaded.info for model, loaded in self._loaded.items()}

    @property
    def free_slots(self) -> int:
        return max(0, self._settings.max_streams - self._active)

    def samples(self) -> Iterator[Sample]:
        """What all engines count, for `node.telemetry`."""
        for loaded in self._loaded.values():
            yield from loaded.host.metrics.samples()

    def tokenizer(self, model: ModelId) -> Tokenizer:
        return self._get(model).tokenizer

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `PromptInvalid`."""
        tokenizer = self._get(model).tokenizer
        ids = tokenizer.chat([{"role": m.role, "content": m.content} for m in messages])
        return Prompt(model=model, token_ids=tuple(ids))

    def check_format(self, model: ModelId, wanted: ResponseFormat, resume: Sequence[int] = ()) -> None:
        """Raises `PromptInvalid`."""
        self._get(model).grammars.start(wanted, resume)

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        return self._get(prompt.model).engine.fits(len(prompt.token_ids), max_tokens)

    def could_fit(self, model: ModelId, tokens: int) -> bool:
        return self._get(model).engine.could_fit(tokens)

    async def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        """Stream one completion. Raises `ModelError`; closing the generator aborts within a step."""
        loaded = self._get(prompt.model)
        constraint: GrammarConstraint | None = None
        if not isinstance(params.response_format, UnsetType):
            start = loaded.grammars.start
            constraint = await trio.to_thread.run_sync(start, params.response_format, tuple(resume))
        sequence = EngineSequence(
            id=next(self._ids),
            prompt_ids=prompt.token_ids,
            sampling=sampling_params(params),
            max_tokens=params.max_tokens,
            generated_ids=tuple(resume),
            constraint=constraint,
        )
        detokenizer = loaded.tokenizer.detokenizer(resume)
        stops = StopStrings(params.stop)
        self._active += 1
        try:
            async with aclosing(loaded.host.generate(sequence)) as batches:
                async for outputs in batches:
                    ids: list[int] = []
                    text = ""
                    for (
                        output
                    ) in outputs:  # one by one: what is delivered and billed must not depend on how steps were batched
                        if output.finish_reason is EngineFinish.ERROR:
                            if constraint is not None and constraint.failure:
                                raise PromptInvalid(f"the client's grammar passed a limit: {constraint.failure}"[:300])
                            raise ModelError("the model computed no usable logits")
                        ids.append(output.token_id)
                        text += stops.push(detokenizer.push((output.token_id,)))
                        if output.finish_reason is not None and not stops.hit:
                            text += stops.push(detokenizer.finish())
                            text += stops.finish()
                        if stops.hit:
                            loaded.host.satisfied(sequence.id)
                            yield Step(tuple(ids), text, FinishReason.STOP_STRING)
                            return
                        if output.finish_reason is not None:
                            yield Step(tuple(ids), text, _FINISH[output.finish_reason])
                            return
                    yield Step(tuple(ids), text)
        finally:
            self._active -= 1

    def _get(self, model: ModelId) -> _Loaded:
        try:
            return self._loaded[model]
        except KeyError:
            raise ModelError(f"model {model} is not loaded") from None


@asynccontextmanager
async def open_backend(
    store: ModelStore,
    models: Sequence[Manifest],
    settings: EngineSettings,
    watch: Watch = lambda _: nullcontext(lambda _: None),
    heard: Callable[[Choice], None] = lambda _: None,
) -> AsyncIterator[TorchBackend]:
    """Load models, one engine thread each. `heard` is told which device they run on, and why.

    Raises `DeviceNotFound`, and `ModelError`, also for bytes that its model id does not commit to (M1).
    """
    from node.runtime.hal.probe import chosen

    choice = await trio.to_thread.run_sync(chosen, settings.device)
    heard(choice)
    settings = replace(settings, device=choice.device.torch_name)
    backend = TorchBackend(settings)
    async with AsyncExitStack() as stack:
        for manifest in models:
            folder = store.path(manifest.id)
            with watch(manifest) as progress:
                await _verify(store, manifest.id, progress)
            metrics = EngineMetrics(manifest.name, manifest.context_length)
            observers = []
            if settings.trace is not None:
                path = settings.trace
                if len(models) > 1:
                    path = path.with_name(f"{path.stem}-{manifest.name}{path.suffix}")
                trace = _open_trace(path, manifest.name)
                stack.callback(trace.close)
                observers.append(trace)
            host = EngineHost(partial(load_engine, folder, settings), metrics=metrics, observers=observers)
            engine = await host.start()
            metrics.stats = partial(getattr, engine, "stats", None)
            stack.push_async_callback(host.stop)
            tokenizer = Tokenizer(folder)
            stack.callback(tokenizer.close)
            tokenizer.warm()
            grammars = _grammars(folder, engine)
            stack.callback(grammars.close)
            info = ModelInfo(
                id=manifest.id,
                name=manifest.name,
                context_length=engine.context_length,
                dtype=settings.dtype,
                numerics_class=_numerics_class(engine),
                params=(*SAMPLING_PARAMS, "response_format"),
            )
            backend._loaded[manifest.id] = _Loaded(info, tokenizer, grammars, host, engine)
        yield backend


async def _verify(store: ModelStore, model: ModelId, progress: Progress) -> None:
    """`store.verify` in as many threads as there are processors, since one reads slower than a disk can; cancelled, they end
    with the block that they are at."""
    one_at_a_time, limit = threading.Lock(), trio.CapacityLimiter(os.cpu_count() or 1)
    damaged: list[ModelError] = []

    def tick(count: int) -> None:
        trio.from_thread.check_cancelled()
        with one_at_a_time:
            progress(count)

    async def verify(entry: FileEntry) -> None:
        try:
            await trio.to_thread.run_sync(store.verify_file, model, entry, tick, limiter=limit)
        except ModelError as error:
            damaged.append(error)
            nursery.cancel_scope.cancel()

    manifest = await trio.to_thread.run_sync(store.verify_names, model)
    async with trio.open_nursery() as nursery:
        for entry in manifest.files:
            nursery.start_soon(verify, entry)
    if damaged:
        raise damaged[0]


def _grammars(folder: Path, engine: Engine) -> Grammars:
    from node.runtime.grammar import Grammars

    return Grammars(folder, engine.eos_ids)


def _numerics_class(engine: Engine) -> str:
    """Hash of a golden probe: workers of one class compute bit for bit alike. Runs before the first stream."""
    return engine.numerics_probe().hex()[:32]


def _open_trace(path: Path, name: str) -> StepTrace:
    try:
        return StepTrace(path, name)
    except OSError as error:
        raise ModelError(f"the trace cannot be written to {path}: {error.strerror}") from None


def load_engine(folder: Path, settings: EngineSettings) -> Engine:
    """An engine on the model in that folder, in this thread. `settings.device` is one of torch's names. Raises `EngineError`."""
    from node.runtime.engine.engine import Engine

    return Engine(folder, settings.device, settings.dtype, settings.threads, cache_bytes=settings.cache_bytes)
