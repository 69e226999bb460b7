"""Many attacks of many calls: spread over processes, counted, and shrunk when one finds something.

Every step has dice of its own, made of the seed and the step's number. So a step rolls the same whatever steps stand before
it, and a failing run can be cut down to the steps that matter.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from node.testing.attacker.attacker import Attacker
from node.testing.attacker.drain import drain
from node.testing.attacker.judge import Disagreement
from node.testing.evm import ARTIFACTS, Reverted

SHRINK_SECONDS = 120


@dataclass(frozen=True)
class Zoo:
    """Where the contracts are."""

    artifacts: Path = ARTIFACTS
    strange: Path = Path()
    """Folder with the artifacts of what is strange on purpose."""
    trusts_model: bool = True
    """False: the invariants alone decide."""


@dataclass
class Report:
    """What a fuzz run did."""

    runs: int = 0
    calls: int = 0
    seconds: float = 0.0
    """CPU seconds over all processes."""
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failure: str = ""
    """The first failure with its shortest replay; empty when there was none."""


def play(zoo: Zoo, seed: int, steps: Sequence[int], outcomes: Counter[tuple[str, str]]) -> Attacker:
    """The steps of a seed, then the drain. Raises `Disagreement`, with the calls that led to it."""
    attacker = Attacker(zoo.artifacts, outcomes, zoo.strange, trusts_model=zoo.trusts_model)
    try:
        for step in steps:
            attacker.act(random.Random(seed * 1_000_003 + step))
        drain(attacker)
    except Reverted as reverted:  # not a refused step: a view, or a call that the attacker only looks at
        found = Disagreement("what must never fail reverts", str(reverted))
        found.trace = attacker.trace
        raise found from reverted
    except Disagreement as found:
        found.trace = attacker.trace
        raise
    return attacker


def failing(zoo: Zoo, seed: int, steps: Sequence[int]) -> Disagreement | None:
    try:
        play(zoo, seed, steps, Counter())
    except Disagreement as found:
        return found
    return None


def shrink(zoo: Zoo, seed: int, steps: Sequence[int], seconds: float = SHRINK_SECONDS) -> list[int]:
    """The fewest steps that still fail, as far as `seconds` go: delta debugging (Zeller 2002)."""
    left, size, end = list(steps), max(len(steps) // 2, 1), time.monotonic() + seconds
    while True:
        start, before = 0, len(left)
        while start < len(left) and time.monotonic() < end:
            fewer = left[:start] + left[start + size :]
            if failing(zoo, seed, fewer):
                left = fewer
            else:
                start += size
        if time.monotonic() >= end or (size == 1 and len(left) == before):
            return left
        size = max(size // 2, 1)


def explain(zoo: Zoo, seed: int, steps: Sequence[int]) -> str:
    """The failure and the calls that lead to it."""
    found = failing(zoo, seed, steps)
    if found is None:
        return f"seed {seed} does not fail any more"
    lines = [f"seed {seed}: {found}", f"again: fuzz.failing(zoo, {seed}, {list(steps)})"]
    start = found.trace[0].at if found.trace else 0
    lines += [f"  {step.at - start:>9} s  {step}" for step in found.trace[-60:]]
    return "\n".join(lines)


def hunt(zoo: Zoo, runs: int, steps: int, first: int = 0) -> tuple[int, Disagreement] | None:
    """The first failure of the short attacks from seed `first` up to `runs`, in this process, and its seed."""
    for seed in range(first, runs):
        if found := failing(zoo, seed, range(steps)):
            return seed, found
    return None


def _one(zoo: Zoo, seed: int, steps: int) -> tuple[int, float, Counter[tuple[str, str]], bool]:
    outcomes: Counter[tuple[str, str]] = Counter()
    begun = time.process_time()
    try:
        calls = play(zoo, seed, range(steps), outcomes).count
    except Disagreement:
        return 0, time.process_time() - begun, outcomes, True
    return calls, time.process_time() - begun, outcomes, False


def run(
    zoo: Zoo,
    runs: int,
    steps: int,
    *,
    first: int = 0,
    processes: int | None = None,
    shrinking: float = SHRINK_SECONDS,
    tick: Callable[[], object] = lambda: None,
) -> Report:
    """`runs` sequences of `steps` calls each; ends at the first failure, shrunk for `shrinking` seconds and explained.

    `tick` is called after each sequence.
    """
    report, seeds = Report(), range(first, first + runs)
    processes = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for seed, (calls, seconds, outcomes, failed) in zip(
            seeds, pool.map(_one, repeat(zoo), seeds, repeat(steps)), strict=False
        ):
            report.runs += 1
            report.calls += calls
            report.seconds += seconds
            report.outcomes.update(outcomes)
            tick()
            if failed:
                pool.shutdown(cancel_futures=True)
                report.failure = explain(zoo, seed, shrink(zoo, seed, range(steps), shrinking))
                break
    return report
