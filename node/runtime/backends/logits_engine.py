"""An engine around any model that computes logits: streams in turns, tokens by the normative sampler.

Rules:
- A step is one forward pass: a piece of one prompt, or one token of each answer that the model computes together. Whoever was
  in it goes to the end of the queue, so nobody waits for more than one step of each other, and an abort takes effect within a
  step.
- Pieces of prompts end at fixed places, so what is computed of a stream does not depend on who came when.
- Room for a whole sequence is reserved when it comes; a step never fails for lack of it. Unpaid sequences are no exception.
- No prefixes are kept and nothing is guessed ahead: that is what our own engine is for (`node.runtime.engine`).

It has the shape of `node.runtime.stepper.StepEngine` and lives in the process of one engine (`node.runtime.child`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch

from node.runtime.engine import sampler
from node.runtime.engine.blocks import BLOCK_TOKENS, blocks_for
from node.runtime.engine.errors import CacheFull, ContextOverflow, IntegrityError, InvalidSequence
from node.runtime.engine.history import History
from node.runtime.engine.sampler import Draw, Scratch
from node.runtime.engine.sequence import FinishReason, StepOutput
from node.runtime.engine.sequence import Sequence as EngineSequence

PROBE_TOKENS: Final = 40


@dataclass(eq=False, slots=True)
class Kept:
    """What a model keeps of the tokens of one pass's sequences, in its own form."""

    values: Any
    lengths: Sequence[int]
    """Tokens of each sequence, by row."""


@dataclass(frozen=True, slots=True)
class Past:
    """One sequence's part of that."""

    kept: Kept
    row: int = 0

    @property
    def tokens(self) -> int:
        return self.kept.lengths[self.row]


class LogitsModel(Protocol):
    """A model of some library. Every method blocks; one thread."""

    name: str
    """Library and number format: with the logits, the class of its numerics."""
    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]
    bytes_per_token: int
    """Of keys and values, every copy counted that a pass makes."""
    weight_bytes: int
    piece: int
    """Tokens of a prompt that one pass computes."""
    together: bool
    """One token of several sequences can be computed in one pass, each as if it were alone."""

    def forward(
        self, rows: Sequence[Sequence[int]], pasts: Sequence[Past | None], *, logits: bool = True
    ) -> tuple[torch.Tensor | None, Kept]:
        """Feed each row its tokens, as many as every other row, after its past. Float32 [rows, vocab] on the CPU, of what follows
        the last of them, if wanted; and what is kept of all, row by row."""

    def apart(self, past: Past) -> Past:
        """A copy that holds nothing of the other rows."""


@dataclass(slots=True)
class LogitsStats:
    """As `node.runtime.engine.engine.EngineStats`, as far as it means anything here."""

    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    schedule_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0


@dataclass(eq=False, slots=True)
class _Running:
    sequence: EngineSequence
    eos_ids: frozenset[int]
    history: History
    blocks: int
    tokens: list[int] = field(default_factory=list)
    """Prompt and everything generated."""
    past: Past | None = None

    @property
    def computed(self) -> int:
        return 0 if self.past is None else self.past.tokens

    @property
    def answering(self) -> bool:
        return 0 < self.computed == len(self.tokens) - 1


class LogitsEngine:
    """One model and its running sequences."""

    def __init__(self, model: LogitsModel, cache_bytes: int) -> None:
        self._model = model
        self._running: dict[Hashable, _Running] = {}
        """Whose turn is next comes first."""
        self._total = self._free = cache_bytes // (BLOCK_TOKENS * model.bytes_per_token)
        self.vocab_size, self.context_length, self.eos_ids = model.vocab_size, model.context_length, model.eos_ids
        self.step_tokens = model.piece
        self._home = torch.device("cpu")
        self._scratch = Scratch(model.vocab_size, self._home)
        self.stats = LogitsStats(kv_blocks_total=self._total)

    @property
    def idle(self) -> bool:
        return not self._running

    @property
    def room(self) -> int:
        """Tokens for sequences yet to come."""
        return self._free * BLOCK_TOKENS

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    @property
    def cache_bytes(self) -> int:
        return self._total * BLOCK_TOKENS * self._model.bytes_per_token

    draft_bytes = (0, 0)
    """There is no draft model."""
    starved = False
    """Room is reserved, so whoever came can go on."""

    def could_fit(self, tokens: int) -> bool:
        return tokens <= self.context_length and blocks_for(tokens - 1) <= self._total

    def submit(self, sequence: EngineSequence) -> None:
        """Raises `EngineError`."""
        eos_ids = self.eos_ids if sequence.eos_ids is None else sequence.eos_ids
        self._check(sequence, eos_ids)
        blocks = blocks_for(len(sequence.prompt_ids) + sequence.max_tokens - 1)
        if blocks > self._free:
            raise CacheFull(f"{blocks} blocks of KV cache are needed; {self._free} are free")
        history = History(sequence.sampling, sequence.prompt_ids, sequence.generated_ids, self._home)
        tokens = [*sequence.prompt_ids, *sequence.generated_ids]
        self._free -= blocks
        self._running[sequence.id] = _Running(sequence, eos_ids, history, blocks, tokens)
        self._count()

    def _check(self, sequence: EngineSequence, eos_ids: frozenset[int]) -> None:
        prompt, generated = sequence.prompt_ids, sequence.generated_ids
        if sequence.id in self._running:
            raise InvalidSequence(f"sequence {sequence.id!r} is already running")
        if not prompt or sequence.max_tokens <= len(generated) or not eos_ids.isdisjoint(generated):
            raise InvalidSequence("the prompt is empty, or the answer is over already")
        if len(prompt) + sequence.max_tokens > self.context_length:
            raise ContextOverflow(f"prompt and answer pass the context of {self.context_length} tokens")
        for token in (*prompt, *generated, *(token for token, _ in sequence.sampling.logit_bias)):
            if not 0 <= token < self.vocab_size:
                raise InvalidSequence(f"a token id is outside the vocabulary of {self.vocab_size}")

    def abort(self, sequence_id: Hashable) -> bool:
        one = self._running.pop(sequence_id, None)
        if one is None:
            return False
        self._free += one.blocks
        self._take_apart((one,))
        self._count()
        return True

    def step(self, hold: Container[Hashable] = ()) -> list[StepOutput]:
        """Advance whose turn it is, but nobody in `hold`. Raises what the library raises; the engine is then of no more use."""
        began = time.perf_counter()
        ready = [one for one in self._running.values() if one.sequence.id not in hold]
        if not ready:
            return []
        group = self._group(ready)
        rows = [one.tokens[one.computed :][: self._model.piece] for one in group]
        ends = group[0].computed + len(rows[0]) == len(group[0].tokens)
        pasts = [one.past for one in group]
        self._take_apart(group)
        planned = time.perf_counter()
        logits, kept = self._model.forward(rows, pasts, logits=ends)
        computed = time.perf_counter()
        for row, one in enumerate(group):
            one.past = Past(kept, row)
            self._running[one.sequence.id] = self._running.pop(one.sequence.id)
        outputs = [] if logits is None else self._draw(group, logits)
        stats = self.stats
        stats.steps += 1
        stats.step_tokens = sum(map(len, rows))
        stats.prompt_tokens += stats.step_tokens - len(outputs)
        stats.generation_tokens += len(outputs)
        stats.schedule_seconds, stats.forward_seconds = planned - began, computed - planned
        stats.sample_seconds = time.perf_counter() - computed
        return outputs

    def _group(self, ready: list[_Running]) -> list[_Running]:
        """Who steps: the first, and with it all answers of about its length. What the rows of one pass keep is as long as the
        longest of them, so no row may be a third shorter than that."""
        first = ready[0]
        if not (self._model.together and first.answering):
            return [first]
        near = [one for one in ready if one.answering and 2 * one.computed <= 3 * first.computed]
        longest = max(one.computed for one in near)
        return [one for one in near if 3 * one.computed >= 2 * longest]

    def _take_apart(self, leaving: Iterable[_Running]) -> None:
        """Before these go on or go: whoever stays behind in what was kept of a pass gets a copy of its own, so that memory which
        nobody has reserved is not held by one row of many."""
        group = set(leaving)
        broken = {one.past.kept for one in group if one.past is not None and len(one.past.kept.lengths) > 1}
        for one in self._running.values():
            if one.past is not None and one.past.kept in broken and one not in group:
                one.past = self._model.apart(one.past)

    def _draw(self, group: list[_Running], logits: torch.Tensor) -> list[StepOutput]:
        draws = []
        for one in group:
            sequence = one.sequence
            mask = None if sequence.constraint is None else sequence.constraint.mask()
            draws.append(Draw(sequence.sampling, one.tokens, (), mask, sequence.logprobs, one.history))
        outputs = []
        for one, picked in zip(group, sampler.pick_rows(logits, draws, self._scratch), strict=True):
            sequence, position, reason = one.sequence, len(one.tokens), None
            if picked.unusable:
                reason = FinishReason.ERROR
            else:
                one.tokens.append(picked.token)
                one.history.extend(picked.token)
                if sequence.constraint is not None:
                    sequence.constraint.accept(picked.token)
                if picked.token in one.eos_ids or (sequence.constraint is not None and sequence.constraint.ended):
                    reason = FinishReason.STOP
                elif len(one.tokens) == len(sequence.prompt_ids) + sequence.max_tokens:
                    reason = FinishReason.LENGTH
            outputs.append(StepOutput(sequence.id, picked.token, position, reason, picked.logprob, picked.top_logprobs))
        for output in outputs:
            if output.finish_reason is not None:
                self.abort(output.id)
        return outputs

    def _count(self) -> None:
        self.stats.running, self.stats.kv_blocks_used = len(self._running), self._total - self._free

    def numerics_probe(self) -> bytes:
        """sha256 of the logits after a fixed token sequence. Never equal to that of our own engine: other code computes it."""
        tokens = [(7 * n * n + 3) % self.vocab_size for n in range(min(PROBE_TOKENS, self.context_length))]
        logits, _ = self._model.forward([tokens], [None])
        digest = hashlib.sha256(f"{self._model.name} {self._model.piece}".encode())
        digest.update(b"" if logits is None else logits.numpy().tobytes())
        return digest.digest()

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless the books balance."""
        held = sum(one.blocks for one in self._running.values())
        if held + self._free != self._total:
            raise IntegrityError(f"{held} blocks held and {self._free} free are not {self._total}")
