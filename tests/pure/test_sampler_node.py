"""The sampler's third implementation, in JavaScript, agrees with the reference: on the vectors, and on random cases.

The engine's tensors are held to the same vectors in tests/engine.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest

import node.testing
from node.testing.sampler_vectors import params_of
from protocol.sampling import SamplingParams, adjust, gumbel, sample, seed_of, survivors

VECTORS = json.loads((Path(__file__).resolve().parents[1] / "vectors/sampler.json").read_text())
NODEJS = shutil.which("node")
pytestmark = pytest.mark.skipif(
    NODEJS is None or "v" not in subprocess.run([NODEJS, "--version"], capture_output=True, text=True).stdout[:1],
    reason="Node.js is not installed",
)


def ask(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """One answer for each (what, case), from one process."""
    script = Path(node.testing.__file__).parent / "sampler.mjs"
    lines = "".join(json.dumps(case) + "\n" for case in cases)
    done = subprocess.run([str(NODEJS), script], input=lines, capture_output=True, text=True, check=True, timeout=300)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_vectors() -> None:
    """M2."""
    words = ask([("words", case) for case in VECTORS["philox"]])
    assert words == [case["words"] for case in VECTORS["philox"]]
    noise = ask([("gumbel", case) for case in VECTORS["gumbel"]])
    assert noise == pytest.approx([case["value"] for case in VECTORS["gumbel"]], abs=1e-12)
    assert ask([("seed_of", case) for case in VECTORS["seeds"]]) == [case["value"] for case in VECTORS["seeds"]]
    drawn = ask([("draw", case) for case in VECTORS["draws"]])
    assert drawn == [{"token": case["token"], "survivors": case["survivors"]} for case in VECTORS["draws"]]


def some_case(random: Random) -> dict[str, Any]:
    """Logits with many ties or none, some -inf; any parameters, history and constraint; a seed with all its bits."""
    vocab = random.choice([1, 2, 5, 30, 200])
    coarse = random.random() < 0.5
    logits = [random.randint(-12, 12) / 2 if coarse else random.uniform(-30, 30) for _ in range(vocab)]
    if random.random() < 0.3:
        logits = [x if random.random() < 0.7 else -math.inf for x in logits[:-1]] + logits[-1:]
    ids = range(vocab)

    def maybe(off: float, on: float) -> float:
        return off if random.random() < 0.4 else on

    bias = {random.choice(ids): random.uniform(-100, 100) for _ in range(random.choice([0, 0, 3]))}
    params = SamplingParams(
        temperature=maybe(0.0, random.uniform(0.01, 10)),
        top_p=maybe(1.0, random.uniform(0.001, 1)),
        top_k=random.choice([0, 1, random.randint(1, 250)]),
        min_p=maybe(0.0, random.random()),
        repetition_penalty=maybe(1.0, random.uniform(0.1, 10)),
        frequency_penalty=maybe(0.0, random.uniform(-2, 2)),
        presence_penalty=maybe(0.0, random.uniform(-2, 2)),
        logit_bias=tuple(sorted(bias.items())),
        seed=random.getrandbits(64),
    )
    allowed = None
    if random.random() < 0.3:
        allowed = sorted({vocab - 1, *random.choices(ids, k=vocab // 2)})
    return {
        "logits": logits,
        "params": {**asdict(params), "seed": str(params.seed)},
        "prompt": random.choices(ids, k=random.randint(1, 20)),
        "generated": random.choices(ids, k=random.randint(0, 20)),
        "allowed": allowed,
    }


@pytest.mark.parametrize("part", range(4))
def test_random_cases(part: int) -> None:
    random = Random(part)
    cases = [some_case(random) for _ in range(500)]
    lines = [{**case, "logits": [None if x == -math.inf else x for x in case["logits"]]} for case in cases]
    for case, answer in zip(cases, ask([("draw", line) for line in lines]), strict=True):
        params = params_of(case)
        arguments = case["logits"], params, case["prompt"], case["generated"], case["allowed"]
        assert answer["token"] == sample(*arguments), case
        if not params.greedy:
            assert answer["survivors"] == len(survivors([x / params.temperature for x in adjust(*arguments)], params))


def test_random_noise_and_seeds() -> None:
    random = Random(9)
    noise = [(random.getrandbits(64), random.getrandbits(random.choice([5, 32, 40])), n) for n in range(200)]
    found = ask([("gumbel", {"seed": str(s), "position": str(p), "token": token}) for s, p, token in noise])
    assert found == pytest.approx([gumbel(*case) for case in noise], abs=1e-12)
    seeds = [(seed, random.getrandbits(32)) for seed, _, _ in noise]
    answers = ask([("seed_of", {"seed": str(seed), "index": index}) for seed, index in seeds])
    assert answers == [str(seed_of(*case)) for case in seeds]
