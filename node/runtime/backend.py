"""The torch back end behind the `Backend` port: tokenizer and text here, tokens from engines that may die, models of a fleet.

Nothing is computed in the node's process.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from msgspec import UnsetType

from node.errors import ModelError
from node.groups import plain_errors
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.models.tokenizer import Tokenizer
from node.ports import ModelInfo, Prompt, Speed, Step
from node.runtime.engine.sequence import FinishReason as EngineFinish
from node.runtime.engine.sequence import Sequence as EngineSequence
from node.runtime.engine_settings import EngineSettings
from node.runtime.fleet import Fleet, Watch
from node.runtime.kernels import compiled_kernels
from node.runtime.launch import Launcher, launcher
from node.runtime.memory import MemoryBudget
from node.runtime.resident import Resident
from node.runtime.selftest import QUESTION, SelfTest, self_test
from node.runtime.stops import StopStrings
from node.telemetry.exposition import Sample
from protocol.ids import ModelId
from protocol.logprobs import pack
from protocol.messages import ChatMessage, FinishReason, Params, ResponseFormat, sampling_params

if TYPE_CHECKING:
    from node.runtime.engine.engine import Engine
    from node.runtime.hal.devices import Choice

_FINISH = {EngineFinish.STOP: FinishReason.STOP, EngineFinish.LENGTH: FinishReason.LENGTH}


class TorchBackend:
    """Models that are loaded, tested and ready. Made by `open_backend`."""

    def __init__(self, settings: EngineSettings, fleet: Callable[[Callable[[Resident], Any]], Fleet]) -> None:
        self._settings = settings
        self._active = 0
        self._ids = itertools.count()
        self.fleet = fleet(self._self_test)

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        return self.fleet.sold

    @property
    def speeds(self) -> Mapping[ModelId, Speed]:
        """By the last self-test of each model; changes as they do."""
        return self.fleet.keeper.speeds

    def samples(self) -> Iterator[Sample]:
        """What all engines count, for `node.telemetry`."""
        for one in self.fleet.residents.values():
            if one.metrics is not None:
                yield from one.metrics.samples()

    def check_format(self, model: ModelId, wanted: ResponseFormat, resume: Sequence[int] = ()) -> None:
        """Raises `PromptInvalid`."""
        grammars = self.fleet.get(model).grammars
        if grammars is None:
            raise ModelError(f"model {model} is not loaded")
        grammars.start(wanted, resume)

    @property
    def free_slots(self) -> int:
        return max(0, self._settings.max_streams - self._active)

    def tokenizer(self, model: ModelId) -> Tokenizer:
        tokenizer = self.fleet.get(model).tokenizer
        if tokenizer is None:
            raise ModelError(f"model {model} is not loaded")
        return tokenizer

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `PromptInvalid`."""
        ids = self.tokenizer(model).chat([{"role": m.role, "content": m.content} for m in messages])
        return Prompt(model=model, token_ids=tuple(ids))

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        one = self.fleet.get(prompt.model)
        if one.ready:
            return one.engine().fits(len(prompt.token_ids), max_tokens)
        return self.fleet.on_sale(one) and self.fleet.could_warm(one)

    def could_fit(self, model: ModelId, tokens: int) -> bool:
        return tokens <= self.fleet.get(model).capacity

    async def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        """Stream one completion. Raises `ModelError`; closing the generator aborts within a step."""
        one = self.fleet.get(prompt.model)
        self._active += 1
        try:
            with one.using():
                self.fleet.touch(one)
                await self.fleet.warm(one)
                async with aclosing(self._stream(one, prompt, params, resume)) as steps:
                    async for step in steps:
                        yield step
        finally:
            self._active -= 1

    async def _stream(
        self, one: Resident, prompt: Prompt, params: Params, resume: Sequence[int] = ()
    ) -> AsyncGenerator[Step, None]:
        sequence = EngineSequence(
            id=next(self._ids),
            prompt_ids=prompt.token_ids,
            sampling=sampling_params(params),
            max_tokens=params.max_tokens,
            generated_ids=tuple(resume),
            logprobs=0 if params.likeliest is None else max(1, params.likeliest),  # the engine's 0 is none at all
            salt=prompt.salt,
            paid=True,  # by a voucher of its channel, or by the lock of its batch job
        )
        wanted = None if isinstance(params.response_format, UnsetType) else params.response_format
        if wanted is not None:  # the engine takes only what was found good here, in time and memory
            await trio.to_thread.run_sync(self.check_format, prompt.model, wanted, tuple(resume))
        host, tokenizer = one.engine(), self.tokenizer(prompt.model)
        detokenizer, stops = tokenizer.detokenizer(resume), StopStrings(params.stop, tokenizer, resume)
        if stops.hit:
            yield Step((), "", FinishReason.STOP_STRING)
            return
        async with aclosing(host.generate(sequence, wanted)) as batches:
            async for outputs in batches:
                ids: list[int] = []
                text, rows = "", b""
                for (
                    output
                ) in outputs:  # one by one: what is delivered and billed must not depend on how steps were batched
                    if output.finish_reason is EngineFinish.ERROR:
                        raise ModelError("the model computed no usable logits")
                    ids.append(output.token_id)
                    if params.likeliest is not None and output.logprob is not None:
                        rows += pack(output.logprob, output.top_logprobs[: params.likeliest])
                    text += stops.push(detokenizer.push((output.token_id,)))
                    if output.finish_reason is not None and not stops.hit:
                        text += stops.push(detokenizer.finish())
                        text += stops.finish()
                    if stops.hit:
                        host.satisfied(sequence.id)
                        yield Step(tuple(ids), text, FinishReason.STOP_STRING, rows)
                        return
                    if output.finish_reason is not None:
                        yield Step(tuple(ids), text, _FINISH[output.finish_reason], rows)
                        return
                yield Step(tuple(ids), text, data=rows)

    async def _self_test(self, one: Resident) -> SelfTest:
        """The way of every job, for a model that is not sold yet."""
        model = one.manifest.id

        async def generate(prompt: Prompt, params: Params) -> AsyncGenerator[Step, None]:
            host = one.engine()
            while host.running and not host.fits(len(prompt.token_ids), params.max_tokens):
                host.go_on()
                await trio.sleep(0.05)  # streams that go on after a death have the room; one of them will end
            async with aclosing(self._stream(one, prompt, params)) as steps:
                async for step in steps:
                    yield step

        return await self_test(lambda: self.prepare(model, QUESTION), generate)

    def report(self) -> list[dict[str, Any]]:
        """For `status`: every model that is or was wanted."""
        return [one.report() for one in self.fleet.residents.values()]


@asynccontextmanager
async def open_backend(
    store: ModelStore,
    models: Sequence[Manifest],
    settings: EngineSettings,
    watch: Watch = lambda _: nullcontext(lambda _: None),
    heard: Callable[[Choice], None] = lambda _: None,
    *,
    launch: Launcher | None = None,
    say: Callable[[str], None] = lambda _: None,
    memory: MemoryBudget | None = None,
) -> AsyncIterator[TorchBackend]:
    """Load and test models, each with an engine of its own, for the length of the block. `heard` is told which device they run
    on, and why. A model that fails is left out, and `say` hears of it. `memory`: shared with models that are not among these.

    Raises `DeviceNotFound`, and `ModelError` when no model is left, also for bytes that their id does not commit to (M1).
    """
    from node.runtime.hal.probe import chosen

    choice = await trio.to_thread.run_sync(chosen, settings.device)
    heard(choice)
    settings = replace(settings, device=choice.device.torch_name)
    memory = memory or MemoryBudget(settings.memory_budget)
    memory.limit = memory.limit or choice.device.memory_total
    launch = launch or await launcher(settings.isolation)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            kernels = await compiled_kernels(settings.kernels, launch)
            backend = TorchBackend(
                settings, lambda test: Fleet(store, settings, launch, nursery, test, watch, memory, kernels)
            )
            try:
                await _load_all(backend, models, say, evict=settings.lazy)
                yield backend
            finally:
                for one in backend.fleet.residents.values():
                    one.close()
                nursery.cancel_scope.cancel()


def load_engine(folder: Path, settings: EngineSettings) -> Engine:
    """An engine on the model in that folder, in this thread, for measurements. `settings.device` is one of torch's names.
    Raises `EngineError`."""
    from node.runtime.engine.engine import Engine

    return Engine(
        folder,
        settings.device,
        settings.dtype,
        settings.threads,
        cache_bytes=settings.cache_bytes,
        exact=settings.exact,
    )


async def _load_all(backend: TorchBackend, models: Sequence[Manifest], say: Callable[[str], None], evict: bool) -> None:
    failed: list[ModelError] = []
    for manifest in models:
        try:
            one = await backend.fleet.load(manifest, evict=evict)
        except ModelError as error:
            failed.append(error)
            say(f"{manifest.name} is not sold: {error.message}")
            continue
        if one.test and one.host and one.host.facts:
            speed = one.test.speed
            say(f"{manifest.name}: engine {one.report()['isolation']}")
            say(
                f"{manifest.name}: self-test passed, {speed.tokens_per_second} tokens/s, first token {speed.ttft_ms} ms"
            )
    if failed and not backend.models:
        raise failed[0]
