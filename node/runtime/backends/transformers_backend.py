"""The slow fallback for architectures that our own engine lacks: `transformers` computes logits, our sampler draws from them.

Rules:
- One sequence a step, in turns: a step is one chunk of a prompt or one token, so nobody waits for more than one step
  of each other, and leaving a stream ends it within a step. Nothing is batched: that is what our own engine is for.
- The sampler is the normative one on the same token history, so a stream goes on here or elsewhere from any token,
  and an audit can check it.
- Only safetensors from the store, no code of the model's own, nothing from any network.
- Memory for a whole sequence is reserved before its first step.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from node.errors import ModelError, PromptInvalid
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.models.tokenizer import Tokenizer
from node.ports import SAMPLING_PARAMS, ModelInfo, Prompt, Step, offered_logprobs
from node.runtime.stops import StopStrings
from protocol.ids import ModelId
from protocol.logprobs import pack
from protocol.messages import ChatMessage, FinishReason, Params, ResponseFormat, sampling_params

if TYPE_CHECKING:
    import torch

FORMATS: Final = ("float32", "bfloat16", "float16")
"""What it can compute in here."""
CHUNK: Final = 256
"""Tokens of a prompt that one step computes."""
_PROBE_TOKENS: Final = 40


@dataclass(frozen=True, slots=True)
class TransformersSettings:
    device: str = "cpu"
    """As `engine.device`: `auto`, or a kind with or without an index."""
    dtype: str = "float32"
    threads: int = 1
    cache_bytes: int = 1 << 30
    """For the keys and values of all running sequences of one model."""
    max_streams: int = 4


class CausalModel:
    """A model of `transformers`, asked for logits only. Every method blocks; one thread at a time."""

    def __init__(self, folder: Path, settings: TransformersSettings) -> None:
        """Raises `ModelError` for a folder that `transformers` cannot run as a causal language model without foreign code."""
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(settings.threads)
        self._torch = torch
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=getattr(torch, settings.dtype),
            )
        except (
            Exception
        ) as error:  # the library raises whatever its parts raise; the folder is at fault, and stays unserved
            raise ModelError(f"transformers cannot load this model: {type(error).__name__}: {error}"[:300]) from None
        self._model = model.to(settings.device).eval()
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.dtype = settings.dtype
        heads = config.num_attention_heads
        self.bytes_per_token: int = (
            2
            * config.num_hidden_layers
            * (getattr(config, "num_key_value_heads", None) or heads)
            * (getattr(config, "head_dim", None) or config.hidden_size // heads)
            * getattr(torch, settings.dtype).itemsize
        )
        """An upper bound for architectures that keep a cache of keys and values: layers that keep fewer keep less."""
        ends = model.generation_config.eos_token_id
        self.eos_ids = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        _, cache = self.forward([0], None)
        if cache is None:
            raise ModelError(f"models of type {config.model_type!r} keep no cache that a stream could go on from")

    def forward(self, tokens: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits after the last of `tokens`, float32 [vocab] on the CPU, and the cache with them in it."""
        torch = self._torch
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([list(tokens)], device=self._model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return out.logits[0, -1].float().cpu(), out.past_key_values

    def numerics_probe(self) -> str:
        """Hash of the logits after a fixed token sequence. Never equal to that of our own engine: other code computes it."""
        tokens = [(7 * n * n + 3) % self.vocab_size for n in range(_PROBE_TOKENS)]
        logits, _ = self.forward(tokens, None)
        digest = hashlib.sha256(f"transformers {self.dtype} {CHUNK}".encode())
        digest.update(logits.numpy().tobytes())
        return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Loaded:
    info: ModelInfo
    tokenizer: Tokenizer
    model: CausalModel
    turn: trio.CapacityLimiter
    """One step at a time; who waits is served in the order of coming."""


class TransformersBackend:
    """Implements `node.ports.Backend`. Made by `open_transformers`."""

    def __init__(self, settings: TransformersSettings) -> None:
        self._settings = settings
        self._loaded: dict[ModelId, _Loaded] = {}
        self._reserved: dict[ModelId, int] = {}
        self._active = 0

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        return {model: loaded.info for model, loaded in self._loaded.items()}

    @property
    def free_slots(self) -> int:
        return max(0, self._settings.max_streams - self._active)

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `PromptInvalid`."""
        ids = self._get(model).tokenizer.chat([{"role": m.role, "content": m.content} for m in messages])
        return Prompt(model=model, token_ids=tuple(ids))

    def check_format(self, model: ModelId, wanted: ResponseFormat, resume: Sequence[int] = ()) -> None:
        """Raises `PromptInvalid`: no grammar is followed here, and none is offered."""
        raise PromptInvalid("response_format is not supported")

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        size = len(prompt.token_ids) + max_tokens
        free = self._settings.cache_bytes - self._reserved[prompt.model]
        return self.could_fit(prompt.model, size) and size * self._get(prompt.model).model.bytes_per_token <= free

    def could_fit(self, model: ModelId, tokens: int) -> bool:
        loaded = self._get(model)
        whole = tokens * loaded.model.bytes_per_token <= self._settings.cache_bytes
        return whole and tokens <= loaded.info.context_length

    async def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        """Stream one completion. Raises `ModelError`; closing the generator ends it within a step."""
        loaded = self._get(prompt.model)
        named = (*prompt.token_ids, *resume, *(token for token, _ in params.logit_bias))
        bad = [token for token in named if not 0 <= token < loaded.model.vocab_size]
        if bad or len(resume) >= params.max_tokens or not prompt.token_ids:
            raise ModelError("the sequence is empty, over, or holds a token that the model has not")
        if not self.fits(prompt, params.max_tokens):
            raise ModelError("no memory is free for a sequence of this size")
        size = (len(prompt.token_ids) + params.max_tokens) * loaded.model.bytes_per_token
        self._reserved[prompt.model] += size
        self._active += 1
        try:
            detokenizer = loaded.tokenizer.detokenizer(resume)
            stops = StopStrings(params.stop, loaded.tokenizer, resume)
            if stops.hit:
                yield Step((), "", FinishReason.STOP_STRING)
                return
            sequence = _Sequence(loaded.model, prompt, params, resume)
            reason = None
            while reason is None:
                picked = await trio.to_thread.run_sync(sequence.step, limiter=loaded.turn)
                if picked is None:
                    continue
                token, row = picked
                text = stops.push(detokenizer.push((token,)))
                if stops.hit:
                    reason = FinishReason.STOP_STRING
                elif token in loaded.model.eos_ids or len(sequence.generated) == params.max_tokens:
                    reason = FinishReason.STOP if token in loaded.model.eos_ids else FinishReason.LENGTH
                    text += stops.push(detokenizer.finish())
                    text += stops.finish()
                    reason = FinishReason.STOP_STRING if stops.hit else reason
                yield Step((token,), text, reason, row)
        finally:
            self._active -= 1
            self._reserved[prompt.model] -= size

    def _get(self, model: ModelId) -> _Loaded:
        try:
            return self._loaded[model]
        except KeyError:
            raise ModelError(f"model {model} is not loaded") from None


class _Sequence:
    """One stream: its tokens, and the cache of all of them but the last."""

    def __init__(self, model: CausalModel, prompt: Prompt, params: Params, resume: Sequence[int]) -> None:
        self._model, self._prompt, self._sampling = model, prompt.token_ids, sampling_params(params)
        self._likeliest = params.likeliest
        self.generated = list(resume)
        self._due: list[int] = [*prompt.token_ids, *resume]
        self._cache: Any = None

    def step(self) -> tuple[int, bytes] | None:
        """Compute what is due, a chunk at most; once nothing is, the token that follows and the row of its log probabilities,
        empty where nobody asks. In a worker thread. Raises `ModelError`."""
        from node.runtime.engine import sampler

        chunk, self._due = self._due[:CHUNK], self._due[CHUNK:]
        try:
            logits, self._cache = self._model.forward(chunk, self._cache)
            if self._due:
                return None
            asked = 0 if self._likeliest is None else max(1, self._likeliest)  # the sampler's 0 is none at all
            draw = sampler.Draw(self._sampling, self._prompt, self.generated, logprobs=asked)
            (picked,) = sampler.pick_rows(logits[None], [draw])
        except (RuntimeError, IndexError, ValueError) as error:  # torch's own, out of memory too: only this stream ends
            raise ModelError(f"the model failed: {error}"[:300]) from None
        if picked.unusable:
            raise ModelError("the model computed no usable logits")
        self.generated.append(picked.token)
        self._due = [picked.token]
        row = b"" if picked.logprob is None else pack(picked.logprob, picked.top_logprobs[: self._likeliest])
        return picked.token, row


Watch = Callable[[Manifest], AbstractContextManager[Progress]]
"""Sees a model being hashed."""


@asynccontextmanager
async def open_transformers(
    store: ModelStore,
    models: Sequence[Manifest],
    settings: TransformersSettings,
    watch: Watch = lambda _: nullcontext(lambda _: None),
) -> AsyncIterator[TransformersBackend]:
    """Load models and serve them while the block runs. Raises `ModelError`, also for bytes that its id does not commit to."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: whatever the library would like to look up, it does not
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ModelError(
            "the back end `transformers` needs a package that is not installed",
            hint="pip install 'gristmill[transformers]'",
        ) from None
    from node.runtime.hal.probe import chosen

    choice = await trio.to_thread.run_sync(chosen, settings.device)
    settings = replace(settings, device=choice.device.torch_name)
    backend = TransformersBackend(settings)
    async with AsyncExitStack() as stack:
        for manifest in models:
            folder = store.path(manifest.id)
            with watch(manifest) as progress:
                for entry in manifest.files:
                    await trio.to_thread.run_sync(store.verify_file, manifest.id, entry, progress)
            model = await trio.to_thread.run_sync(CausalModel, folder, settings)
            tokenizer = Tokenizer(folder)
            stack.callback(tokenizer.close)
            tokenizer.warm()
            info = ModelInfo(
                id=manifest.id,
                name=manifest.name,
                context_length=manifest.context_length,
                dtype=settings.dtype,
                numerics_class=await trio.to_thread.run_sync(model.numerics_probe),
                params=(*SAMPLING_PARAMS, *offered_logprobs(model.vocab_size)),
            )
            backend._loaded[manifest.id] = _Loaded(info, tokenizer, model, trio.CapacityLimiter(1))
            backend._reserved[manifest.id] = 0
        yield backend
