"""The engine: sequences in, one token per sequence and step out.

Rules:
- One thread owns an engine. `step` is the only call that computes; each step gives every running sequence either one
  chunk of its prompt or one token, so a long prompt delays a running stream by one chunk and no more.
- A sequence is its tokens. Whatever part of them is not in its cache yet is computed next: a prompt, a prompt with an
  answer begun elsewhere, and the last token of a running answer are the same case.
- Memory for the whole sequence is reserved by `submit`; `step` allocates no cache and never fails for lack of it.

Today a step runs its sequences one after the other. Continuous batching (one forward pass for all of them) belongs into
`step` and `Llama.forward`, behind a paged cache; `submit`, `step`, `abort` and the outputs stay as they are.

Set ``OMP_WAIT_POLICY=PASSIVE`` in the environment before torch is imported: with more than one thread, and any other
busy process on the machine, OpenMP's spinning makes torch 20 to 60 times slower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from node.runtime.engine import sampler, weights
from node.runtime.engine.errors import ContextOverflow, EngineError, IntegrityError, InvalidSequence
from node.runtime.engine.kv_cache import CachePool, SequenceCache
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput


@dataclass(slots=True)
class _Running:
    sequence: Sequence
    eos_ids: frozenset[int]
    tokens: list[int]
    """Prompt and everything generated."""
    cache: SequenceCache

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.sequence.prompt_ids) :]


class Engine:
    """One model on one device. Raises `UnsupportedModel` when the folder cannot be run."""

    def __init__(
        self,
        model_dir: Path | str,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
        *,
        cache_bytes: int = 1 << 30,
        prefill_chunk: int = 256,
    ) -> None:
        """`dtype`: float32 or bfloat16. `threads`: of torch, for the whole process. `cache_bytes`: KV cache of all
        sequences together. `prefill_chunk`: prompt tokens that one step computes for one sequence."""
        if threads < 1 or prefill_chunk < 1 or cache_bytes < 0:
            raise EngineError("threads and prefill_chunk must be at least 1, cache_bytes at least 0")
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        self._chunk = prefill_chunk
        self._model, self.eos_ids = weights.load(Path(model_dir), self._device, dtype)
        config = self._model.config
        self.dtype = dtype
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self._pool = CachePool(
            config.layers, config.kv_heads, config.head_dim, weights.DTYPES[dtype], self._device, cache_bytes
        )
        self._running: dict[Hashable, _Running] = {}

    @property
    def idle(self) -> bool:
        """True when there is nothing to step."""
        return not self._running

    @property
    def running(self) -> int:
        """Sequences that are not finished."""
        return len(self._running)

    @property
    def cache_used(self) -> int:
        """Bytes of KV cache reserved."""
        return self._pool.used

    @property
    def cache_free(self) -> int:
        """Bytes of KV cache that can still be reserved."""
        return self._pool.budget - self._pool.used

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a sequence of this size would be accepted now. Only reads two numbers: callable from any thread."""
        within = prompt_tokens + max_tokens <= self.context_length
        return within and self._pool.bytes_for(prompt_tokens + max_tokens - 1) <= self.cache_free

    def could_fit(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens, prompt and answer together, would be accepted by an idle engine."""
        return tokens <= self.context_length and self._pool.bytes_for(tokens - 1) <= self._pool.budget

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence and reserve its memory; tokens come from `step`.

        Raises `InvalidSequence`, `ContextOverflow` or `CacheFull`; the engine is then as before.
        """
        eos_ids = self.eos_ids if sequence.eos_ids is None else sequence.eos_ids
        self._check(sequence, eos_ids)
        # The last token is never fed back, so it needs no room.
        cache = self._pool.allocate(len(sequence.prompt_ids) + sequence.max_tokens - 1)
        tokens = [*sequence.prompt_ids, *sequence.generated_ids]
        self._running[sequence.id] = _Running(sequence, eos_ids, tokens, cache)

    def _check(self, sequence: Sequence, eos_ids: frozenset[int]) -> None:
        prompt, generated = sequence.prompt_ids, sequence.generated_ids
        if sequence.id in self._running:
            raise InvalidSequence(f"sequence {sequence.id!r} is already running")
        if not prompt:
            raise InvalidSequence("the prompt is empty")
        if len(prompt) + sequence.max_tokens > self.context_length:
            raise ContextOverflow(
                f"{len(prompt)} prompt tokens and {sequence.max_tokens} to generate pass the context of "
                f"{self.context_length}"
            )
        if sequence.max_tokens <= len(generated):
            raise InvalidSequence(
                f"nothing left to generate: {len(generated)} of {sequence.max_tokens} tokens are there"
            )
        for tokens in (prompt, generated, [token for token, _ in sequence.sampling.logit_bias]):
            if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
                raise InvalidSequence(f"a token id is outside the vocabulary of {self.vocab_size}")
        if not eos_ids.isdisjoint(generated):
            raise InvalidSequence("the answer has ended already: its tokens hold an end-of-sequence token")

    def abort(self, sequence_id: Hashable) -> bool:
        """Drop a sequence and free its memory at once; no output follows. False when it is not running."""
        running = self._running.pop(sequence_id, None)
        if running is not None:
            self._pool.release(running.cache)
        return running is not None

    @torch.inference_mode()
    def step(self, hold: Container[Hashable] = ()) -> list[StepOutput]:
        """Advance every running sequence once, except those in `hold` (their consumer is behind, or has not paid).

        Sequences still in their prompt give no output.
        """
        outputs = []
        for running in list(self._running.values()):
            if running.sequence.id in hold:
                continue
            logits = self._advance(running.cache, running.tokens)
            if logits is None:
                continue
            output = self._next_token(running, logits)
            if output.finish_reason is not None:
                self.abort(running.sequence.id)
            outputs.append(output)
        return outputs

    def _advance(self, cache: SequenceCache, tokens: list[int]) -> Tensor | None:
        """Compute the next chunk of `tokens` that is not cached; float32 [vocab] once all of them are."""
        chunk = tokens[cache.length : cache.length + self._chunk]
        hidden = self._model.forward(torch.tensor(chunk, device=self._device), cache)
        return self._model.logits(hidden[-1:])[0] if cache.length == len(tokens) else None

    def _next_token(self, running: _Running, logits: Tensor) -> StepOutput:
        sequence, position = running.sequence, len(running.tokens)
        generated = running.generated
        try:
            token = sampler.pick(logits, sequence.sampling, sequence.prompt_ids, generated)
        except sampler.UnusableLogits:
            return StepOutput(sequence.id, -1, position, FinishReason.ERROR)
        running.tokens.append(token)
        reason = None
        if token in running.eos_ids:
            reason = FinishReason.STOP
        elif len(generated) + 1 >= sequence.max_tokens:
            reason = FinishReason.LENGTH
        logprob = float(logits.log_softmax(0)[token]) if sequence.logprobs else None
        return StepOutput(sequence.id, token, position, reason, logprob)

    def prefill_logits(self, token_ids: list[int] | tuple[int, ...], start: int = 0) -> Tensor:
        """Logits at every position from `start` on: float32 [len(token_ids) - start, vocab], for audits and tests.

        Row i holds what the model says of the token after token_ids[start + i]. The result needs
        4 * rows * vocab bytes. Raises like `submit`.
        """
        if not token_ids or not 0 <= start < len(token_ids):
            raise InvalidSequence("no position to compute")
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            raise InvalidSequence(f"a token id is outside the vocabulary of {self.vocab_size}")
        if len(token_ids) > self.context_length:
            raise ContextOverflow(f"{len(token_ids)} tokens pass the context of {self.context_length}")
        return torch.cat(list(self._all_logits(list(token_ids), start)))

    @torch.inference_mode()
    def _all_logits(self, tokens: list[int], start: int) -> Iterator[Tensor]:
        cache = self._pool.allocate(len(tokens))
        try:
            for begin in range(0, len(tokens), self._chunk):
                chunk = torch.tensor(tokens[begin : begin + self._chunk], device=self._device)
                hidden = self._model.forward(chunk, cache)[max(start - begin, 0) :]
                if len(hidden):
                    yield self._model.logits(hidden)
        finally:
            self._pool.release(cache)

    def numerics_probe(self) -> bytes:
        """sha256 of the exact logits of a fixed token sequence: equal on machines that compute bit for bit alike."""
        tokens = [(7 * n * n + 3) % self.vocab_size for n in range(min(self.context_length, 40))]
        digest = hashlib.sha256(f"{self.dtype} {self._chunk}".encode())
        digest.update(self.prefill_logits(tokens, len(tokens) - 8 if len(tokens) > 8 else 0).cpu().numpy().tobytes())
        return digest.digest()

    def check_integrity(self) -> None:
        """Compare the engine's books with themselves. Raises `IntegrityError`; cheap enough to run whenever idle."""
        self._pool.check_integrity()
        reserved = sum(running.cache.nbytes for running in self._running.values())
        if reserved != self._pool.used:
            raise IntegrityError(f"sequences hold {reserved} bytes of cache, the pool counts {self._pool.used}")
        for running in self._running.values():
            if not running.cache.length <= len(running.tokens) <= running.cache.capacity + 1:
                raise IntegrityError(f"sequence {running.sequence.id!r}: cache and tokens disagree")
