"""What a case of tests/vectors/sampler.json stands for: logits, prompt and allowed tokens by recipes that anyone can follow.

``logits``: 16 bits of philox per token (``bits`` of them where the case wants ties), as multiples from -8 to 8 of ``step``;
with ``hidden`` n every n-th token is -inf. ``prompt``: token ids, or a length, for 0, 1, 2 and so on. ``allowed``: null, or
n for the tokens whose id n divides.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from protocol.sampling import SamplingParams, philox


def logits_of(case: Mapping[str, Any]) -> list[float]:
    recipe = case["logits"]
    vocab, bits, hidden = recipe["vocab"], recipe.get("bits", 16), recipe.get("hidden", 0)
    words = (philox((i >> 2, 0, 0, 0), (recipe["seed"], 0))[i & 3] for i in range(vocab))
    logits = [((word >> (32 - bits)) * 16 / (1 << bits) - 8) * recipe["step"] for word in words]
    return [-math.inf if hidden and i % hidden == 0 else logit for i, logit in enumerate(logits)]


def prompt_of(case: Mapping[str, Any]) -> Sequence[int]:
    prompt = case["prompt"]
    return range(prompt) if isinstance(prompt, int) else prompt


def allowed_of(case: Mapping[str, Any]) -> Collection[int] | None:
    step = case["allowed"]
    return None if step is None else range(0, case["logits"]["vocab"], step)


def params_of(case: Mapping[str, Any]) -> SamplingParams:
    raw = case["params"]
    return SamplingParams(**{**raw, "seed": int(raw["seed"]), "logit_bias": tuple(map(tuple, raw["logit_bias"]))})
