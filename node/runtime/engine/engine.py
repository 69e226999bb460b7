"""The engine: sequences in, tokens out, one forward pass for all of them at each step.

Rules:
- One thread owns an engine. `step` is the only call that computes; it is schedule, run, draw, and nothing else.
- Memory for a paid sequence is reserved by `submit`; `step` never fails for lack of it.
- Tokens depend on a sequence alone: not on who runs beside it, on how prompts were cut, on what was cached or guessed.
  In float32 that holds but for rounding, which the tests have not seen decide a token. With `exact` it holds bit for bit:
  linear layers always see tiles of 16 rows, and attention never sees another sequence.

Set ``OMP_WAIT_POLICY=PASSIVE`` in the environment before torch is imported: with more than one thread, and any other
busy process on the machine, OpenMP's spinning makes torch 20 to 60 times slower.
"""

from __future__ import annotations

import time
from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from node.runtime.engine import probe, sampler, weights
from node.runtime.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from node.runtime.engine.draft import DraftModel
from node.runtime.engine.errors import CacheFull, ContextOverflow, EngineError, InvalidSequence
from node.runtime.engine.graphs import DecodeGraphs
from node.runtime.engine.history import History
from node.runtime.engine.kernels.book import BOOK
from node.runtime.engine.lookup import Lookup
from node.runtime.engine.paged import PagedCache
from node.runtime.engine.passes import TILE, Passes
from node.runtime.engine.sampler import Draw, Picked, Scratch
from node.runtime.engine.scheduler import Running, Scheduler, Work
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput

LOOKUP_STREAMS = 3
"""With more answers at once, guesses cost more than they bring."""


@dataclass(slots=True)
class EngineStats:
    """Counted since the engine was made; seconds are of the last step."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_queries: int = 0
    """Tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    prompt_tokens: int = 0
    """Computed; what the prefix cache had is not among them."""
    generation_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    schedule_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    step_tokens: int = 0
    """Tokens that the last step computed."""


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
        token_budget: int = 512,
        exact: bool = False,
        prefix_cache: bool = True,
        lookup: bool = True,
        draft_dir: Path | str | None = None,
        draft_cache_bytes: int = 1 << 28,
        graph_bytes: int = 512 << 20,
    ) -> None:
        """`dtype`: of the linear layers, one of `linear.FORMATS`. `threads`: of torch, for the whole process. `cache_bytes`:
        KV cache of all sequences together. `prefill_chunk`: prompt tokens that one step computes for one sequence;
        `token_budget`: for all of them. `lookup`: guess by prompt lookup. `draft_dir`: a smaller model of the same
        vocabulary that guesses where lookup does not. `graph_bytes`: for CUDA graphs, on a GPU; 0: none."""
        if threads < 1 or prefill_chunk < 1 or token_budget < 1 or cache_bytes < 0:
            raise EngineError("threads, prefill_chunk and token_budget must be at least 1, cache_bytes at least 0")
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        self.step_tokens = token_budget
        """Of prompts in one step, at most."""
        self._lookup = lookup
        self._model, self.eos_ids = weights.load(Path(model_dir), self._device, dtype, tile=TILE if exact else 0)
        config = self._model.config
        self.dtype = dtype
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.block_bytes = (
            2 * config.layers * config.kv_heads * config.head_dim * BLOCK_TOKENS * self._model.dtype.itemsize
        )
        """Bytes of one KV block, all layers together."""
        self._pool = BlockPool(cache_bytes // self.block_bytes, prefix_cache=prefix_cache)
        try:
            self._cache = PagedCache(
                config.layers,
                config.kv_heads,
                config.head_dim,
                self._pool.total + 1,  # one block more than is handed out: padding writes there
                self._model.dtype,
                self._device,
                self._model.kernels,
            )
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, plain RuntimeError on a CPU
            raise CacheFull(f"the machine has no {cache_bytes} bytes for the KV cache: {error}"[:300]) from None
        self._passes = Passes(self._model, self._cache, self._device, exact=exact, chunk=prefill_chunk)
        self._graphs: DecodeGraphs | None = None
        if self._device.type == "cuda" and not exact and graph_bytes:
            self._graphs = DecodeGraphs(self._model, self._cache, spare=self._pool.total, budget=graph_bytes)
        self._scheduler = Scheduler(self._pool, token_budget=token_budget, prefill_chunk=prefill_chunk)
        self._home = sampler.home(self._device)
        self._scratch = Scratch(self.vocab_size, self._home) if self._home.type == "cpu" else None
        self._clock = time.thread_time if self._device.type == "cpu" else time.perf_counter
        """What a step costs, undisturbed by other processes where that can be told."""
        self._draft: DraftModel | None = None
        if draft_dir is not None:
            self._draft = DraftModel(
                Path(draft_dir),
                self._device,
                dtype,
                vocab_size=self.vocab_size,
                cache_bytes=draft_cache_bytes,
                chunk=prefill_chunk,
            )
        self.starved = False
        """The last step found no memory for anybody who was not held. So will the next, until one comes, leaves or is read on."""
        self._arrivals = 0
        self._stats = EngineStats(kv_blocks_total=self._pool.total)

    @property
    def compiled(self) -> tuple[str, ...]:
        """Names of the kernels that this process has compiled itself so far."""
        return tuple(BOOK.compiled)

    @property
    def idle(self) -> bool:
        """True when there is nothing to step."""
        return not self._scheduler.running and not self._scheduler.waiting

    @property
    def running(self) -> int:
        """Sequences that are not finished."""
        return len(self._scheduler.running) + len(self._scheduler.waiting)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held, packed copies included."""
        return self._model.nbytes

    @property
    def draft_bytes(self) -> tuple[int, int]:
        """Bytes of the draft model's weights and of its KV cache; (0, 0) where there is none."""
        return (self._draft.weight_bytes, self._draft.cache_bytes) if self._draft is not None else (0, 0)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache as it was made."""
        return (self._pool.total + 1) * self.block_bytes

    @property
    def cache_used(self) -> int:
        """Bytes of KV cache held by sequences."""
        return self._pool.held * self.block_bytes

    @property
    def cache_free(self) -> int:
        """Bytes of KV cache that can still be reserved."""
        return self._pool.available * self.block_bytes

    @property
    def stats(self) -> EngineStats:
        """The counters as they are now. Only reads numbers: callable from any thread."""
        stats = self._stats
        stats.running, stats.waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        stats.kv_blocks_used, stats.preemptions = self._pool.held, self._scheduler.preemptions
        stats.prefix_queries, stats.prefix_hits = self._pool.queries, self._pool.hits
        return stats

    @property
    def room(self) -> int:
        """Tokens that all sequences yet to come may have together, each rounded up to whole blocks but for its last token."""
        return self._pool.available * BLOCK_TOKENS

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a sequence of this size would be accepted now. Only reads numbers: callable from any thread."""
        within = prompt_tokens + max_tokens <= self.context_length
        return within and blocks_for(prompt_tokens + max_tokens - 1) <= self._pool.available

    def could_fit(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens, prompt and answer together, would be accepted by an idle engine."""
        return tokens <= self.context_length and blocks_for(tokens - 1) <= self._pool.total

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence and reserve its memory; tokens come from `step`.

        Raises `InvalidSequence`, `ContextOverflow` or `CacheFull`; the engine is then as before.
        """
        eos_ids = self.eos_ids if sequence.eos_ids is None else sequence.eos_ids
        self._check(sequence, eos_ids)
        self._arrivals += 1
        running = Running(sequence, eos_ids, self._arrivals, [*sequence.prompt_ids, *sequence.generated_ids])
        running.history = History(sequence.sampling, sequence.prompt_ids, sequence.generated_ids, self._home)
        if (self._lookup or self._draft is not None) and sequence.speculate and sequence.constraint is None:
            running.lookup = Lookup()
        self._scheduler.submit(running)

    def _check(self, sequence: Sequence, eos_ids: frozenset[int]) -> None:
        prompt, generated = sequence.prompt_ids, sequence.generated_ids
        if self._scheduler.find(sequence.id) is not None:
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
        if self._draft is not None:
            self._draft.forget(sequence_id)
        return self._scheduler.remove(sequence_id)

    @torch.inference_mode()
    def step(self, hold: Container[Hashable] = ()) -> list[StepOutput]:
        """Advance every running sequence once, except those in `hold` (their consumer is behind, or has not paid).

        Sequences still in their prompt give no output; one whose guesses were right gives several.
        """
        begun = time.perf_counter()
        self._guess(hold)
        work = self._scheduler.plan(hold)
        self.starved = not work
        if not work:
            return []
        planned, effort = time.perf_counter(), self._clock()
        logits = self._forward(work)
        computed = time.perf_counter()
        prompts = sum(item.span.count for item in work if item.prompt)
        outputs = self._draw(work, logits)
        self._stats.schedule_seconds, self._stats.sample_seconds = planned - begun, time.perf_counter() - computed
        self._stats.forward_seconds = computed - planned
        self._account(work, prompts, self._clock() - effort)  # a GPU has computed only now
        return outputs

    def _guess(self, hold: Container[Hashable]) -> None:
        answering = [one for one in self._scheduler.running.values() if one.sequence.id not in hold]
        if len(answering) > LOOKUP_STREAMS:
            return
        ready = [one for one in answering if one.lookup is not None and one.computed == len(one.tokens) - 1]
        for one in ready:
            one.draft = (
                one.lookup.propose(one.tokens, one.room - len(one.tokens)) if one.lookup and self._lookup else []
            )
            one.drafted = False
        if self._draft is not None:
            unguessed = [one for one in ready if not one.draft]
            self._draft.propose(unguessed)
            for one in unguessed:
                one.drafted = True

    def _forward(self, work: list[Work]) -> Tensor:
        """Float32 [rows, vocab]: the rows of each item, in order."""
        tokens: list[int] = []
        rows: list[int] = []
        for item in work:
            one, span = item.running, item.span
            end = span.start + span.count
            tokens += one.tokens[span.start : end]
            tokens += one.draft[: max(end - len(one.tokens), 0)]
            rows += range(len(tokens) - item.rows, len(tokens))
        spans = [item.span for item in work]
        plan = self._passes.plan(spans)
        if self._graphs is not None and len(rows) == len(tokens):
            logits = self._graphs.run(spans, torch.tensor(tokens, device=self._device), plan)
            if logits is not None:
                return logits
        return self._passes.logits(tokens, plan, rows)

    def _draw(self, work: list[Work], logits: Tensor) -> list[StepOutput]:
        picked = iter(sampler.pick_rows(logits, [draw for item in work for draw in _draws(item)], self._scratch))
        outputs: list[StepOutput] = []
        for item in work:
            one = item.running
            made = _follow(one, [next(picked) for _ in range(item.rows)])
            outputs += made
            if one.drafted and self._draft is not None:
                self._draft.learn(one.sequence.id, len(one.draft), len(made) - 1)
            elif one.lookup is not None:
                one.lookup.learn(len(one.draft), len(made) - 1)
            self._stats.guessed_tokens += len(one.draft)
            self._stats.accepted_tokens += max(len(made) - 1, 0)
            self._stats.generation_tokens += len(made)
            self._scheduler.advance(item, [output.token_id for output in made if output.token_id >= 0])
            if made and made[-1].finish_reason is not None:
                self.abort(one.sequence.id)
        return outputs

    def _account(self, work: list[Work], prompts: int, effort: float) -> None:
        stats = self._stats
        stats.steps += 1
        stats.step_tokens = sum(item.span.count for item in work)
        stats.prompt_tokens += prompts
        self._scheduler.pace.learn(prompts, stats.step_tokens - prompts, effort)

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
        return self._passes.all_logits(token_ids, start, self._pool)

    def numerics_probe(self) -> bytes:
        """sha256 of the exact logits of a fixed text. Raises as `probe.numerics`."""
        return probe.numerics(self._passes, self._pool, fmt=self.dtype, context=self.context_length)

    def check_integrity(self) -> None:
        """Compare the engine's books with themselves. Raises `IntegrityError`; cheap enough to run whenever idle."""
        self._scheduler.check_integrity()
        if self._draft is not None:
            self._draft.check_integrity([one.sequence.id for one in self._scheduler.everyone()])


def _draws(item: Work) -> Iterator[Draw]:
    """What the sampler needs for each of the item's rows, as if all guesses before it were right."""
    one, sequence = item.running, item.running.sequence
    for n in range(item.rows):
        mask = None if sequence.constraint is None else sequence.constraint.mask()
        history = None if one.history is None else one.history.ahead(one.draft[:n])
        yield Draw(sequence.sampling, one.tokens, one.draft[:n], mask, sequence.logprobs, history)


def _follow(one: Running, picked: list[Picked]) -> list[StepOutput]:
    """The tokens that follow, as far as the guesses were right: one at least, where there is a row."""
    sequence, outputs = one.sequence, list[StepOutput]()
    for n, pick in enumerate(picked):
        token, position = pick.token, len(one.tokens) + n
        if pick.unusable:
            return [*outputs, StepOutput(sequence.id, -1, position, FinishReason.ERROR)]
        if one.history is not None:
            one.history.extend(token)
        if sequence.constraint is not None:
            sequence.constraint.accept(token)
        reason = None
        if token in one.eos_ids or (sequence.constraint is not None and sequence.constraint.ended):
            reason = FinishReason.STOP
        elif position + 1 >= len(sequence.prompt_ids) + sequence.max_tokens:
            reason = FinishReason.LENGTH
        outputs.append(StepOutput(sequence.id, token, position, reason, pick.logprob, pick.top_logprobs))
        if reason is not None or n >= len(one.draft) or token != one.draft[n]:
            break
    return outputs
