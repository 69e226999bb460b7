"""The normative sampler: which token follows, as a pure function of logits, parameters, history and position.

This file is the definition; the engine's tensor version must pick the same token. One definition serves three needs:
any worker can continue any stream at any position, an auditor can check every draw by one prefill, and a worker that
decodes with another model is seen. There is no state: a token's noise depends only on (seed, position, token id).

The rule, in order. All arithmetic is IEEE-754 binary64; logits are widened exactly from whatever the model produced.

0.  constraint   l[i] = -inf                                       for each token that the job's grammar forbids here
1.  bias         l[i] += bias[i]                                   for each declared token id
2.  repetition   l[i] = l[i] / r if l[i] > 0 else l[i] * r         for each i in prompt or generated
3.  frequency    l[i] -= f * n[i]                                  n[i] = occurrences in generated
4.  presence     l[i] -= p                                         where n[i] > 0
5.  greedy       temperature < 0.001: the largest l wins; of equals the lowest token id. Rules 6 to 10 do not apply.
6.  temperature  s[i] = l[i] / temperature
    rank         tokens ordered by s descending, then by id ascending (used by 7 and 8; decides every tie)
7.  top_k        k > 0: the first k of the ranking stay
8.  top_p        top_p < 1: among what is left, q[i] = floor(exp(s[i] - max s) * 2^40), an integer; with total = sum q,
                 the shortest prefix of the ranking with sum q >= ceil(top_p * float(total)) stays; the token that
                 reaches the threshold is included. Integers make the sums independent of their order.
9.  min_p        min_p > 0: among what is left, those with q[i] >= ceil(min_p * 2^40) stay (q relative to the same max)
10. draw         the largest s[i] + g[i] wins; of equals the lowest token id

The noise g is standard Gumbel: g = -ln(-ln(u)), u = (x + 0.5) / 2^32, where x is lane (i mod 4) of philox4x32-10 with
key = (seed low 32 bits, seed high 32 bits) and counter = (i div 4, position low 32, position high 32, DOMAIN).
`position` is the index of the token being chosen in prompt + generated, counted from 0, so that a stream continued
elsewhere from its delivered tokens draws the same noise.

What a grammar forbids follows from grammar, tokenizer and generated tokens alone, so rule 0 can be checked by whoever has
those; it decides about end-of-sequence tokens too. The n answers to one request differ in their seeds alone: `seed_of`.

exp and ln may differ in the last place between machines. Two scores closer than `SCORE_TOLERANCE` are therefore a tie
that an auditor accepts either way; the chance of meeting one is of the order of 1e-12 per token.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11 (philox and its known answers); Maddison et
al. 2014 (Gumbel-max); Holtzman et al. 2019 (top-p); Keskar et al. 2019, CTRL (repetition penalty).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.errors import InvalidValue

DOMAIN: Final = 0x474D5331
"""Fourth counter word: "GMS1". Keeps these draws apart from any other use of the same seed."""

SEED_DOMAIN: Final = 0x474D5332
"""Fourth counter word of `seed_of`: "GMS2"."""

WEIGHT_UNIT: Final = 1 << 40
"""Integer weight of the most likely token in rules 8 and 9. A vocabulary of 2^22 tokens still sums below 2^63."""

SCORE_TOLERANCE: Final = 1e-12
"""Scores (rule 10) this close count as equal in an audit: covers one unit in the last place of exp and ln."""

GREEDY_BELOW: Final = 0.001
"""A lower temperature would only lose precision: it is greedy."""

MAX_TEMPERATURE: Final = 10.0
MAX_TOP_K: Final = 1 << 20
MAX_BIASES: Final = 1024
MAX_TOKEN_ID: Final = (1 << 22) - 1

_MASK: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What decides the draw. Checked on construction; `InvalidValue` names the field that is out of range."""

    temperature: float = 1.0
    """0 to 10; below `GREEDY_BELOW` it is greedy."""
    top_p: float = 1.0
    """Above 0, at most 1; 1 is off."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    """0 to 1, relative to the most likely token; 0 is off."""
    repetition_penalty: float = 1.0
    """0.1 to 10; 1 is off. Counts prompt and generated tokens, each once."""
    frequency_penalty: float = 0.0
    """-2 to 2, per occurrence among the generated tokens."""
    presence_penalty: float = 0.0
    """-2 to 2, once for a token that was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias from -100 to 100), ascending ids, each once."""
    seed: int = 0
    """Unsigned 64 bits. Fixed by the client's signed request."""

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidValue("top_p must be above 0 (use temperature 0 for greedy decoding)")
        _within("top_k", self.top_k, 0, MAX_TOP_K)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.1, 10.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("seed", self.seed, 0, (1 << 64) - 1)
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidValue(f"logit_bias names {len(self.logit_bias)} tokens; at most {MAX_BIASES} are allowed")
        last = -1
        for token, bias in self.logit_bias:
            _within("logit_bias token id", token, 0, MAX_TOKEN_ID)
            _within("logit_bias value", bias, -100.0, 100.0)
            if token <= last:
                raise InvalidValue("logit_bias must name each token once, in ascending order")
            last = token

    @property
    def greedy(self) -> bool:
        """True when no noise is drawn (rule 5)."""
        return self.temperature < GREEDY_BELOW


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # written so that NaN fails
        raise InvalidValue(f"{name} must be from {low} to {high}, not {value}")


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """philox4x32 with ten rounds (SC11, section 3.3): four words of 32 bits from a counter and a key."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        left = a * 0xD2511F53
        right = c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k0, right & _MASK, (left >> 32) ^ d ^ k1, left & _MASK
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return a, b, c, d


def gumbel(seed: int, position: int, token: int) -> float:
    """Noise of one token at one position; between -3.14 and 22.88."""
    counter = (token >> 2, position & _MASK, position >> 32, DOMAIN)
    word = philox(counter, (seed & _MASK, seed >> 32))[token & 3]
    return -math.log(-math.log((word + 0.5) / 4294967296.0))


def seed_of(seed: int, index: int) -> int:
    """Seed of answer `index` among the n to one request, whose signed seed is that of answer 0. Below 2^63, as on the wire."""
    _within("seed", seed, 0, (1 << 64) - 1)
    _within("index", index, 0, _MASK)
    if index == 0:
        return seed
    low, high, _, _ = philox((index, 0, 0, SEED_DOMAIN), (seed & _MASK, seed >> 32))
    return (low | high << 32) & ((1 << 63) - 1)


def adjust(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    allowed: Collection[int] | None = None,
) -> list[float]:
    """Rules 0 to 4. `allowed`: the ids that rule 0 leaves, None for all.

    Raises `InvalidValue` when a logit is NaN or +inf, forbidden or not, when all that are allowed are -inf, or when a bias is
    outside the vocabulary.
    """
    out = [float(x) for x in logits]
    if any(math.isnan(x) or x == math.inf for x in out):
        raise InvalidValue("logits must be numbers below +inf")
    if allowed is not None:
        out = [x if token in allowed else -math.inf for token, x in enumerate(out)]
    if all(x == -math.inf for x in out):
        raise InvalidValue("of the logits that are allowed one must be finite")
    for token, bias in params.logit_bias:
        if token >= len(out):
            raise InvalidValue(f"logit_bias names token {token}; the vocabulary ends at {len(out) - 1}")
        out[token] += bias
    if params.repetition_penalty != 1:
        for token in {*prompt, *generated}:
            value = out[token]
            out[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token, count in Counter(generated).items():
        out[token] -= params.frequency_penalty * count
        out[token] -= params.presence_penalty
    return out


def survivors(scores: Sequence[float], params: SamplingParams) -> list[int]:
    """Rules 7 to 9 on scores already divided by the temperature: the token ids that may be drawn, in rank order."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    top = scores[ranked[0]]
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        weights = [_weight(scores[i], top) for i in ranked]
        threshold = math.ceil(params.top_p * float(sum(weights)))
        reached = 0
        for kept, weight in enumerate(weights, start=1):
            reached += weight
            if reached >= threshold:
                ranked = ranked[:kept]
                break
    if params.min_p > 0:
        floor = math.ceil(params.min_p * float(WEIGHT_UNIT))
        ranked = [i for i in ranked if _weight(scores[i], top) >= floor]
    return ranked


def _weight(score: float, top: float) -> int:
    return math.floor(math.exp(score - top) * WEIGHT_UNIT)


def sample(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    allowed: Collection[int] | None = None,
) -> int:
    """The token that follows prompt + generated. `logits` holds one value per token id. Arguments and errors as `adjust`."""
    adjusted = adjust(logits, params, prompt, generated, allowed)
    if params.greedy:
        return _first_largest(adjusted, range(len(adjusted)))
    scores = [value / params.temperature for value in adjusted]
    position = len(prompt) + len(generated)
    candidates = sorted(survivors(scores, params))
    return _first_largest({i: scores[i] + gumbel(params.seed, position, i) for i in candidates}, candidates)


def _first_largest(values: Sequence[float] | dict[int, float], ascending: Sequence[int]) -> int:
    return max(ascending, key=lambda i: values[i])  # max keeps the first of equals
