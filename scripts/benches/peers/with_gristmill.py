"""The project's own engine. As for every contender: no prefix cache, and no guessing ahead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import talk

from node.runtime.engine.engine import Engine
from node.runtime.engine.sequence import Sequence
from protocol.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class Gristmill:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.engine = Engine(asked["model"], "cpu", asked["format"], asked["threads"], prefix_cache=False, lookup=False)

    def run(self, prompts: list[list[int]], new_tokens: int, first: Callable[[int], None]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        for n, prompt in enumerate(prompts):
            self.engine.submit(Sequence(n, tuple(prompt), GREEDY, new_tokens, eos_ids=frozenset()))
        while not self.engine.idle:
            for output in self.engine.step():
                found[output.id].append(output.token_id)
                first(output.id)
        return found


def load(asked: dict[str, Any]) -> tuple[Gristmill, dict[str, str]]:
    return Gristmill(asked), {"torch": metadata.version("torch")}


if __name__ == "__main__":
    talk.serve(load)
