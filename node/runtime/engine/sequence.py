"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from node.runtime.engine.constraint import Constraint


class FinishReason(StrEnum):
    STOP = "stop"
    """The model ended its answer by an end-of-sequence token, or its constraint did."""
    LENGTH = "length"
    """`max_tokens` were generated."""
    ERROR = "error"
    """The model computed no usable logits for this sequence, or its constraint allows nothing; the others go on."""


class Sampling(Protocol):
    """How tokens are drawn. `protocol.sampling.SamplingParams` is the definition and has this shape."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> tuple[tuple[int, float], ...]: ...
    @property
    def seed(self) -> int: ...
    @property
    def greedy(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Sequence:
    """One stream to generate. Values of `sampling` are checked by whoever made it."""

    id: Hashable
    """Names the stream until it ends; then it may be used again."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    """Generated tokens at most, those of `generated_ids` included."""
    generated_ids: tuple[int, ...] = ()
    """Tokens of this answer that were delivered before, here or by another worker; generation goes on after them."""
    eos_ids: frozenset[int] | None = None
    """Tokens that end the answer; None takes the model's own, an empty set ignores them."""
    logprobs: int = 0
    """Report each token's log probability, and those of so many that were likeliest; 0 reports none."""
    salt: bytes = b""
    """Names the tenant: only sequences of equal salts share what they have in common."""
    paid: bool = True
    """Its whole room is reserved when it is submitted, and it is never set back. Unpaid ones take room as they grow, wait when
    there is none, and give theirs up to paid ones; what they lose is computed again."""
    speculate: bool = True
    """May be sped up by looking ahead; the tokens are the same with and without."""
    constraint: Constraint | None = None
    """What may follow; it has seen `generated_ids`. Belongs to the engine from `submit` on."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One token of one sequence."""

    id: Hashable
    token_id: int
    """-1 when `finish_reason` is ERROR: there is no token."""
    position: int
    """Index of this token in prompt + generated, from 0: the position that the sampler's noise depends on."""
    finish_reason: FinishReason | None = None
    """Set on the sequence's last output."""
    logprob: float | None = None
    """ln of the model's own probability, before constraint, bias, penalties, temperature and filters."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the likeliest, likeliest first."""
