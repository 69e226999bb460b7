"""The engine's own measures: shared prefixes, copying, a long prompt's arrival, overhead, exact mode.

Everything runs in this process. What is compared takes turns; medians are reported. Ratios are of CPU time, which neighbours
do not spoil; `*_wall` beside them is by the clock.

- `prefix_ttft_ratio`: time to first token behind a 512-token prefix that was seen before, over one that was not.
- `lookup_speedup`: tokens per second of one greedy stream that copies code, with prompt lookup over without, prefill included;
  the outputs must be the same. `lookup_speedup_decode`: prefill left out.
- `gap_p99_ratio`: a prompt of 1,500 tokens arrives beside 16 streams: the 99th percentile of their gaps between tokens while
  it is computed, over their median gap before.
- `overhead_share`: scheduling and sampling as a share of a decoding step of 16 greedy streams, `overhead_share_sampled` of 16
  that draw. By the clock of the engine's own counters.
- `exact_mode_cost`: CPU time of a full batch of 16 streams in exact mode over the fast mode.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from node.runtime.engine.engine import Engine
from node.runtime.engine.sequence import Sequence as Stream
from protocol.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, top_k=40, seed=7)
STREAMS = 16
PROMPT, ANSWER = 128, 64
PREFIX, SUFFIX, PAIRS = 512, 32, 9
LONG = 1500
COPY_TOKENS = 128
CODE = '''def settle(channels, now):
    """Close every channel whose window has passed and return what each side gets."""
    paid = {}
    for channel in channels:
        if channel.closing is None or now < channel.closing + channel.window:
            continue
        worker = min(channel.claimed, channel.deposit)
        client = channel.deposit - worker
        paid[channel.id] = (worker, client)
        channel.deposit = 0
        channel.claimed = 0
    return paid
'''
COPY = (
    f"<|im_start|>user\nRepeat this code exactly:\n```python\n{CODE}```<|im_end|>\n<|im_start|>assistant\n```python\n"
)


class Clock:
    """Seconds since it was made, by the clock and of CPU time."""

    def __init__(self) -> None:
        self.began = (time.perf_counter(), time.process_time())

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]


class Prompts:
    """English of the size asked for, no two beginning at the same place."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._starts = iter(random.Random(5).sample(range(len(tokens) - PREFIX - LONG), 2000))

    def take(self, size: int) -> list[int]:
        start = next(self._starts)
        return list(self._tokens[start : start + size])


def measure(
    model: Path, tokens: Sequence[int], formats: dict[str, str], rounds: int = 3, threads: int = 1
) -> dict[str, float]:
    """All figures. `tokens`: of a text that prompts are cut from. `formats`: our name -> the engine's; figures that depend on
    the format carry our name, except those of the first."""
    prompts = Prompts(tokens)
    engine = Engine(model, dtype="float32", threads=threads)
    found = prefix(engine, prompts) | lookup(engine, model, rounds)
    del engine
    for name, dtype in formats.items():
        options: dict[str, Any] = {"dtype": dtype, "threads": threads, "lookup": False, "prefix_cache": False}
        fast = Engine(model, **options)
        figures = gaps(fast, prompts) | overhead(fast, prompts)
        figures |= exact_cost(fast, Engine(model, exact=True, **options), prompts, rounds)
        ending = "" if name == next(iter(formats)) else f"_{name}"
        found |= {key + ending: value for key, value in figures.items()}
    return {key: round(value, 4) for key, value in found.items()}


def stream(name: Any, prompt: Sequence[int], new_tokens: int, how: SamplingParams = GREEDY, **options: Any) -> Stream:
    return Stream(name, tuple(prompt), how, new_tokens, eos_ids=frozenset(), **options)


def finish(engine: Engine) -> dict[Any, list[int]]:
    """Step until idle; the tokens of each stream."""
    found: dict[Any, list[int]] = {}
    while not engine.idle:
        for output in engine.step():
            found.setdefault(output.id, []).append(output.token_id)
    return found


def prefix(engine: Engine, prompts: Prompts) -> dict[str, float]:
    """Cold and warm first tokens in turns, each pair with a prefix of its own."""

    def first_token(prompt: Sequence[int]) -> tuple[float, float]:
        clock = Clock()
        engine.submit(stream("one", prompt, 1))
        finish(engine)
        return clock.read()

    cold, warm = [], []
    for _ in range(PAIRS):
        shared = prompts.take(PREFIX)
        cold.append(first_token(shared + prompts.take(SUFFIX)))
        warm.append(first_token(shared + prompts.take(SUFFIX)))
    (cold_wall, cold_cpu), (warm_wall, warm_cpu) = (map(median, zip(*some, strict=True)) for some in (cold, warm))
    return {
        "prefix_ttft_ratio": warm_cpu / cold_cpu,
        "prefix_ttft_ratio_wall": warm_wall / cold_wall,
        "prefix_ttft_cold_ms": 1000 * cold_wall,
        "prefix_ttft_warm_ms": 1000 * warm_wall,
    }


def lookup(engine: Engine, model: Path, rounds: int) -> dict[str, float]:
    """With and without guesses in turns. Raises RuntimeError when the tokens differ."""
    from tokenizers import Tokenizer

    prompt = Tokenizer.from_file(str(model / "tokenizer.json")).encode(COPY, add_special_tokens=False).ids
    taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    said: dict[bool, list[int]] = {}
    for turn in range(rounds):
        for guess in (True, False):
            # A salt of its own: what one turn leaves in the prefix cache serves no other.
            asked = stream("copy", prompt, COPY_TOKENS, speculate=guess, salt=bytes([turn, guess]))
            clock = Clock()
            engine.submit(asked)
            said[guess] = []
            first = 0.0
            while not engine.idle:
                said[guess] += [output.token_id for output in engine.step()]
                first = first or (clock.read()[1] if said[guess] else 0.0)
            whole = clock.read()[1]
            taken[guess].append((whole, whole - first))
    if said[True] != said[False]:
        raise RuntimeError("with prompt lookup the answer is another one")
    (with_whole, with_decode), (whole, decode) = (
        map(median, zip(*taken[guess], strict=True)) for guess in (True, False)
    )
    return {"lookup_speedup": whole / with_whole, "lookup_speedup_decode": decode / with_decode}


def gaps(engine: Engine, prompts: Prompts) -> dict[str, float]:
    """A long prompt beside 16 running streams."""
    for n in range(STREAMS):
        engine.submit(stream(n, prompts.take(PROMPT), 1024))
    seen: dict[int, tuple[float, float]] = {}
    found: dict[str, list[tuple[float, float]]] = {"before": [], "beside": []}
    clock, phase = Clock(), "before"

    def step() -> bool:
        """Note the gaps that end here. Whether the long prompt has its first token."""
        outputs, now = engine.step(), clock.read()
        for output in outputs:
            if output.id == "long":
                continue
            if output.id in seen:
                then = seen[output.id]
                found[phase].append((now[0] - then[0], now[1] - then[1]))
            seen[output.id] = now
        return any(output.id == "long" for output in outputs)

    while len(seen) < STREAMS:
        step()
    found["before"].clear()
    while len(found["before"]) < 40 * STREAMS:
        step()
    phase = "beside"
    engine.submit(stream("long", prompts.take(LONG), 1))
    arrived = clock.read()
    while not step():
        pass
    waited = clock.read()[0] - arrived[0]
    for n in range(STREAMS):
        engine.abort(n)
    if not engine.idle or not found["beside"]:
        raise RuntimeError("the streams did not run beside the long prompt")
    figures = {"gap_long_ttft_ms": 1000 * waited}
    for at, ending in ((1, ""), (0, "_wall")):
        usual = median(gap[at] for gap in found["before"])
        figures[f"gap_p99_ratio{ending}"] = quantiles([gap[at] for gap in found["beside"]], n=100)[98] / usual
    return figures


def overhead(engine: Engine, prompts: Prompts) -> dict[str, float]:
    """Steps that only decode, all streams in each."""
    figures = {}
    for how, ending in ((GREEDY, ""), (DRAWN, "_sampled")):
        for n in range(STREAMS):
            engine.submit(stream(n, prompts.take(PROMPT), ANSWER, how))
        shares = []
        while not engine.idle:
            began = time.perf_counter()
            outputs = engine.step()
            took = time.perf_counter() - began
            if len(outputs) == STREAMS == engine.stats.step_tokens:
                shares.append(1 - engine.stats.forward_seconds / took)
        figures[f"overhead_share{ending}"] = median(shares)
    return figures


def exact_cost(fast: Engine, exact: Engine, prompts: Prompts, rounds: int) -> dict[str, float]:
    """The same full batch by both, in turns."""
    ratios = []
    for _ in range(rounds):
        asked = [prompts.take(PROMPT) for _ in range(STREAMS)]
        taken = []
        for engine in (fast, exact):
            clock = Clock()
            for n, prompt in enumerate(asked):
                engine.submit(stream(n, prompt, ANSWER))
            finish(engine)
            taken.append(clock.read()[1])
        ratios.append(taken[1] / taken[0])
    return {"exact_mode_cost": median(ratios)}
