"""M6: an engine that answers every question and computes nothing is a hang too; one that is slow, or has nothing to do, is none.

Time is trio's mock clock; the engines are played in the same loop, on real sockets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
import trio
import trio.testing

pytest.importorskip("torch", reason="torch is not installed: the engine's types need it")

from node.errors import ModelError
from node.runtime import wire
from node.runtime.engine.sequence import Sequence
from node.runtime.host import EngineHost
from node.runtime.supervisor import Limits
from node.testing.played_engine import Actor
from protocol.sampling import SamplingParams

LOAD = wire.Load("/nowhere", "cpu", "float32", 1, 1 << 20, 8, 0)
LIMITS = Limits(hang_s=30, backoff_s=0.01, look_s=7.5)  # each look is a jump of the clock, which takes a moment
PROMPT = 1000


async def nothing(actor: Actor, asked: wire.Submit) -> None:
    pass


async def answer(actor: Actor, asked: wire.Submit) -> None:
    done = len(asked.generated_ids)
    for n in range(done, asked.max_tokens):
        position = len(asked.prompt_ids) + n
        await actor.step(wire.Output(asked.number, n, position, "length" if n + 1 == asked.max_tokens else ""))


async def empty_steps(actor: Actor, asked: wire.Submit) -> None:
    while True:
        await trio.sleep(10)
        await actor.step()


async def lies(actor: Actor, asked: wire.Submit) -> None:
    """It claims more and more of a prompt that has an end."""
    claimed = 0
    while True:
        await trio.sleep(10)
        claimed += PROMPT
        await actor.step(prompt_tokens=claimed)


async def slowly(actor: Actor, asked: wire.Submit) -> None:
    """A long prompt, a piece every 25 s: ten times what an engine may stand still."""
    for n in range(25):
        await trio.sleep(25)
        await actor.step(prompt_tokens=(n + 1) * PROMPT // 25)
    await answer(actor, asked)


def play(actor: Actor, work: Callable[[EngineHost], Awaitable[None]]) -> None:
    async def main() -> None:
        host = EngineHost(actor, LOAD, limits=LIMITS)
        with trio.fail_after(4000):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                await work(host)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.02))


def sequence(n: int, max_tokens: int = 6, *, paid: bool = True) -> Sequence:
    return Sequence(n, (1,) * PROMPT, SamplingParams(temperature=0), max_tokens, paid=paid)


async def tokens(host: EngineHost, asked: Sequence) -> list[int]:
    return [output.token_id async for outputs in host.generate(asked) for output in outputs]


@pytest.mark.parametrize("part", [nothing, empty_steps, lies], ids=lambda part: part.__name__)
def test_one_that_answers_and_computes_nothing_is_started_again(part: Any) -> None:
    async def work(host: EngineHost) -> None:
        began = trio.current_time()
        assert await tokens(host, sequence(0)) == list(range(6))
        assert host.deaths == 1
        assert "nothing came of its work" in host.last_death
        assert trio.current_time() - began < 4 * LIMITS.hang_s

    play(Actor(part, answer), work)


def test_a_stream_that_no_engine_goes_on_with_ends() -> None:
    async def work(host: EngineHost) -> None:
        with pytest.raises(ModelError, match="died 2 times while this sequence ran"):
            await tokens(host, sequence(0))

    play(Actor(nothing), work)


def test_one_that_stops_in_the_middle_is_noticed_and_its_stream_goes_on() -> None:
    async def three(actor: Actor, asked: wire.Submit) -> None:
        for n in range(3):
            await actor.step(wire.Output(asked.number, n, PROMPT + n))

    async def work(host: EngineHost) -> None:
        assert await tokens(host, sequence(0)) == list(range(6))
        assert host.deaths == 1

    play(Actor(three, answer), work)


def test_a_long_prompt_on_a_slow_device_is_progress() -> None:
    async def work(host: EngineHost) -> None:
        assert await tokens(host, sequence(0)) == list(range(6))
        assert host.deaths == 0

    play(Actor(slowly), work)


def test_a_second_prompt_after_one_that_was_left_is_progress_too() -> None:
    """What the first one claimed before it was left does not count against the second."""
    claimed = 0

    async def piecewise(actor: Actor, asked: wire.Submit) -> None:
        nonlocal claimed
        for _ in range(25):
            await trio.sleep(25)
            claimed += PROMPT // 25
            await actor.step(prompt_tokens=claimed)
        if asked.number:
            await answer(actor, asked)

    async def work(host: EngineHost) -> None:
        with trio.move_on_after(26 * 25):
            await tokens(host, sequence(0))
        assert await tokens(host, sequence(1)) == list(range(6))
        assert host.deaths == 0

    play(Actor(piecewise), work)


def test_one_whose_reader_is_behind_owes_nothing() -> None:
    async def work(host: EngineHost) -> None:
        async with aclosing(host.generate(sequence(0, 12))) as batches:
            got = [output.token_id for output in await anext(batches)]
            await trio.sleep(20 * LIMITS.hang_s)
            assert host.deaths == 0
            got += [output.token_id async for outputs in batches for output in outputs]
        assert got == list(range(12))

    async def windowed(actor: Actor, asked: wire.Submit) -> None:
        for n in range(12):
            if n == LOAD.window:
                await actor.read.wait()
            await actor.step(wire.Output(asked.number, n, PROMPT + n, "length" if n == 11 else ""))

    play(Actor(windowed), work)


def test_an_unpaid_one_may_wait_for_memory_while_a_reader_is_behind() -> None:
    async def work(host: EngineHost) -> None:
        async with aclosing(host.generate(sequence(0, 12))) as batches:
            await anext(batches)
            with trio.move_on_after(20 * LIMITS.hang_s):
                await tokens(host, sequence(1, paid=False))
            assert host.deaths == 0

    async def first_only(actor: Actor, asked: wire.Submit) -> None:
        if not asked.number:
            for n in range(1 + LOAD.window):  # one is read, the others are not
                await actor.step(wire.Output(asked.number, n, PROMPT + n))
                await trio.sleep(1)

    play(Actor(first_only), work)
