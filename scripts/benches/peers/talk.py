"""How the benchmark talks to an engine that runs in an environment of its own: JSON lines on stdin and stdout.

    {"do": "load", "model": DIR, "gguf": FILE, "scratch": DIR, "threads": N, "streams": N, **options}
        ->  {"versions": {...}, "load_seconds": S}
    {"do": "run", "prompts": [[token id, ...], ...], "new_tokens": N}
        ->  {"tokens": [[token id, ...], ...], "wall": S, "cpu": S, "first": [S or null, ...]}
    {"do": "exit"}
        ->  nothing, the process ends

Rules:
- Only the standard library is imported here: the peers' environments share nothing else.
- `run` generates exactly `new_tokens` greedy tokens for every prompt, all prompts at once, end-of-sequence ignored. A driver
  that returns another number of tokens has failed, and says so.
- `cpu` is what the process, all its threads, and its living and reaped descendants took, system time included. `first` are
  the seconds until each stream's first token; null where the engine does not show them.
- The engine may print what it likes: its stdout goes to stderr, the answers to a descriptor of their own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

TICK = os.sysconf("SC_CLK_TCK")


class Driver(Protocol):
    """One engine with the model loaded."""

    def run(self, prompts: list[list[int]], new_tokens: int, first: Callable[[int], None]) -> list[list[int]]:
        """Generate for all prompts at once; call `first(n)` when prompt n has its first token, if that shows."""
        ...


def serve(load: Callable[[dict[str, Any]], tuple[Driver, dict[str, str]]]) -> None:
    """Answer requests until the end. `load` returns the engine and the versions of what it consists of."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    driver: Driver | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["do"] == "exit":
                break
            if asked["do"] == "load":
                began = time.perf_counter()
                driver, versions = load(asked)
                answer: dict[str, Any] = {"versions": versions, "load_seconds": time.perf_counter() - began}
            elif driver is None:
                raise RuntimeError("nothing is loaded")
            else:
                answer = _measured(driver, asked["prompts"], asked["new_tokens"])
        except Exception as error:  # a peer's failure is a result: told by name, and the others go on
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
    answers.close()
    os._exit(0)  # some engines hang in their own atexit handlers


def _measured(driver: Driver, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    first: list[float | None] = [None] * len(prompts)

    def seen(n: int) -> None:
        if first[n] is None:
            first[n] = time.perf_counter() - clock

    cpu, clock = cpu_seconds(), time.perf_counter()
    tokens = driver.run(prompts, new_tokens, seen)
    wall, cpu = time.perf_counter() - clock, cpu_seconds() - cpu
    if [len(answer) for answer in tokens] != [new_tokens] * len(prompts):
        raise RuntimeError(f"asked for {new_tokens} tokens each, got {[len(answer) for answer in tokens]}")
    return {"tokens": tokens, "wall": wall, "cpu": cpu, "first": first}


def cpu_seconds() -> float:
    """Of this process with all its threads, of the children it has reaped, and of every living descendant."""
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + reaped.ru_utime + reaped.ru_stime
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    for pid in parents:
        above = parents[pid]
        while above not in (0, os.getpid()):
            above = parents.get(above, 0)
        total += ticks[pid] / TICK if above else 0
    return total
