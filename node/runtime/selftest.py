"""The job that a model must answer before it is sold, by the way that every job takes: template, tokenizer, engine, text."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from node.errors import ModelError
from node.ports import Prompt, Speed, Step
from protocol.messages import ChatMessage, Params

TOKENS: Final = 8
QUESTION: Final = (ChatMessage(role="user", content="Say hello."),)
_UNMEASURED: Final = Speed()


@dataclass(frozen=True, slots=True)
class SelfTest:
    """How the last self-test of a model went."""

    passed: bool
    at: int
    """Unix seconds."""
    reason: str = ""
    """Why it did not pass."""
    tokens: int = 0
    speed: Speed = _UNMEASURED


async def self_test(
    prepare: Callable[[], Prompt], generate: Callable[[Prompt, Params], AsyncGenerator[Step, None]]
) -> SelfTest:
    """Never raises `ModelError`: a job that fails is a result."""
    at, began = int(time.time()), time.perf_counter()
    first, count, finish = 0.0, 0, None
    try:
        async with aclosing(generate(prepare(), Params(max_tokens=TOKENS))) as steps:
            async for step in steps:
                first = first or time.perf_counter() - began
                count += len(step.token_ids)
                finish = step.finish_reason or finish
    except ModelError as error:
        return SelfTest(False, at, error.message, count)
    if not count or finish is None:
        return SelfTest(False, at, f"it ended after {count} tokens without a reason", count)
    decoding = time.perf_counter() - began - first
    rate = (count - 1) / decoding if count > 1 and decoding > 0 else 0.0
    return SelfTest(True, at, "", count, Speed(round(rate, 2), round(first * 1000, 2)))
