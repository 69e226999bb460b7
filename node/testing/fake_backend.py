"""A model runtime without a model: deterministic, instant, and able to misbehave. Product code: our tests and yours use it.

The "model" answers with words made from a hash of the prompt, one token each. It is no language model and says so in its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from node.errors import ModelError, PromptInvalid
from node.ports import SAMPLING_PARAMS, ModelInfo, Prompt, Step
from node.testing.pair import fake_row
from protocol.ids import ModelId
from protocol.messages import ChatMessage, FinishReason, Params, ResponseFormat

FAKE_MODEL = ModelId.of_manifest(b"gristmill fake model")


@dataclass(slots=True)
class FakeSettings:
    """How the fake behaves; change it while it runs."""

    tokens: int = 40
    """Length of an answer that is not cut by `max_tokens`."""
    seconds_per_token: float = 0.0
    prefill_seconds: float = 0.0
    fail_after: int | None = None
    """Raise `ModelError` after so many tokens."""
    slots: int = 64
    formats: frozenset[str] | None = None
    """Grammars that it says it follows; its words are the same. None: it does not offer the parameter."""
    logprobs: bool = False
    """Offer log probabilities, made from hashes like the words."""
    change: Callable[[Step], Step] = lambda step: step
    """What is said instead of each step."""
    room: int | None = None
    """Tokens of prompt and answer that fit into its memory; None = any."""
    in_service: bool = True
    """False: its model is not sold now, as when an engine is started again."""


class FakeBackend:
    """Implements `node.ports.Backend`."""

    def __init__(self, settings: FakeSettings | None = None) -> None:
        self.settings = settings or FakeSettings()
        self.produced = 0
        """Tokens handed out since the start: what work a client caused."""
        self.aborted = 0
        """Streams that ended before their last token."""
        self._active = 0
        self._info = ModelInfo(FAKE_MODEL, "fake", 8192, "none", "fake")

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        formats = () if self.settings.formats is None else ("response_format",)
        honoured = (*SAMPLING_PARAMS, *formats, *(("logprobs",) if self.settings.logprobs else ()))
        return {FAKE_MODEL: replace(self._info, params=honoured)} if self.settings.in_service else {}

    @property
    def free_slots(self) -> int:
        return self.settings.slots - self._active

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        if model != FAKE_MODEL:
            raise ModelError(f"model {model} is not loaded")
        text = "\n".join(f"{m.role}: {m.content}" for m in messages)
        if not any(m.content.strip() for m in messages):
            raise PromptInvalid("the messages are empty")
        return Prompt(model, tuple(len(word) for word in text.split()))

    def check_format(self, model: ModelId, wanted: ResponseFormat, resume: Sequence[int] = ()) -> None:
        if self.settings.formats is None or wanted.text not in self.settings.formats:
            raise PromptInvalid("the fake model follows no grammar that it was not told of")

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        return self.settings.room is None or len(prompt.token_ids) + max_tokens <= self.settings.room

    def could_fit(self, model: ModelId, tokens: int) -> bool:
        return self.settings.room is None or tokens <= self.settings.room

    async def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        settings = self.settings
        total = min(settings.tokens, params.max_tokens)
        seed = hashlib.sha256(repr((prompt.token_ids, params.seed)).encode()).digest()
        self._active += 1
        done = False
        try:
            await trio.sleep(settings.prefill_seconds)
            for position in range(len(resume), total):
                await trio.sleep(settings.seconds_per_token)
                if settings.fail_after is not None and position >= settings.fail_after:
                    raise ModelError("the fake model was told to fail")
                token = int.from_bytes(hashlib.sha256(seed + position.to_bytes(4)).digest()[:2])
                self.produced += 1
                last = position == total - 1
                reason = None
                if last:
                    reason = FinishReason.LENGTH if total == params.max_tokens else FinishReason.STOP
                    done = True
                row = b"" if params.likeliest is None else fake_row(token, params.likeliest)
                yield settings.change(Step((token,), f"w{token} ", reason, row))
        finally:
            self._active -= 1
            self.aborted += not done
