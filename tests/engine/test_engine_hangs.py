"""M6: an engine that is silent for much longer than its steps took is ended soon; one that is slow, or heard late, is not.

Time is trio's mock clock; the engines are played in the same loop, on real sockets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
import trio
import trio.testing
from msgspec.structs import replace

pytest.importorskip("torch", reason="torch is not installed: the engine's types need it")

from node.runtime import hangs, wire
from node.runtime.engine.sequence import Sequence
from node.runtime.host import EngineHost
from node.runtime.supervisor import Limits
from node.testing.planted import notices
from node.testing.played_engine import Actor
from protocol.messages import ResponseFormat
from protocol.sampling import SamplingParams

LOAD = wire.Load("/nowhere", "cpu", "float32", 1, 1 << 20, 64, 0)
LIMITS = Limits(hang_s=30, backoff_s=0.01)
PROMPT = 100
SOON = LIMITS.floor_s + 3 * LIMITS.look_s
Part = Callable[[Actor, wire.Submit], Awaitable[None]]


def play(actor: Actor, work: Callable[[EngineHost, Any], Awaitable[None]], load: wire.Load = LOAD) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0.01)

    async def main() -> None:
        host = EngineHost(actor, load, limits=LIMITS)
        with trio.fail_after(2000):
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                await work(host, clock)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


def sequence(n: int, max_tokens: int = 6, prompt: int = PROMPT) -> Sequence:
    return Sequence(n, (1,) * prompt, SamplingParams(temperature=0), max_tokens, paid=True)


async def tokens(host: EngineHost, asked: Sequence, wanted: ResponseFormat | None = None) -> list[int]:
    return [output.token_id async for outputs in host.generate(asked, wanted) for output in outputs]


def paced(*seconds: float, then: float | None = None) -> Part:
    """A token after each of so many seconds; then, unless the answer is complete, all others at once after so many more, or
    never a word again."""

    async def part(actor: Actor, asked: wire.Submit) -> None:
        for n in range(len(asked.generated_ids), asked.max_tokens):
            k = n - len(asked.generated_ids)
            wait = seconds[k] if k < len(seconds) else then if k == len(seconds) else 0.0
            last = "length" if n + 1 == asked.max_tokens else ""
            output = wire.Output(asked.number, n, len(asked.prompt_ids) + n, last)
            await actor.long_step(1e6 if wait is None else wait, output, tokens=len(asked.prompt_ids) if k == 0 else 1)

    return part


QUICK = (0.05,) * 5


def test_one_whose_steps_were_quick_is_ended_soon_and_its_stream_goes_on() -> None:
    async def work(host: EngineHost, clock: Any) -> None:
        async with aclosing(host.generate(sequence(0))) as batches:
            got: list[int] = []
            while len(got) < 5:
                got += [output.token_id for output in await anext(batches)]
            began = trio.current_time()
            got += [output.token_id async for outputs in batches for output in outputs]
            assert LIMITS.floor_s <= trio.current_time() - began <= SOON
        assert got == list(range(6))
        assert host.deaths == 1
        assert "no step has ended and no question was answered for 3 s" in host.last_death

    play(Actor(paced(*QUICK), paced(then=0.05)), work)


@pytest.mark.parametrize("multiple", [None, 1])
def test_one_that_is_slow_and_gets_slower_is_not_ended(multiple: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(host: EngineHost, clock: Any) -> None:
        assert await tokens(host, sequence(0)) == list(range(6))
        assert host.deaths == 0

    def check() -> None:
        play(Actor(paced(2, 2, 4, 4, 6, 6), paced(then=0.05)), work)

    if multiple is None:
        check()
    else:  # planted
        monkeypatch.setattr("node.runtime.tempo.MULTIPLE", multiple)
        assert notices(check)


def test_the_setting_is_the_end_of_it() -> None:
    async def work(host: EngineHost, clock: Any) -> None:
        async with aclosing(host.generate(sequence(0))) as batches:
            got: list[int] = []
            while len(got) < 3:
                got += [output.token_id for output in await anext(batches)]
            began = trio.current_time()
            got += [output.token_id async for outputs in batches for output in outputs]
            assert LIMITS.hang_s <= trio.current_time() - began <= LIMITS.hang_s + 3 * LIMITS.look_s
        assert got == list(range(6)) and host.deaths == 1

    play(Actor(paced(6, 6, 6), paced(then=0.05)), work)


def test_an_idle_one_that_does_not_answer_is_ended_soon() -> None:
    async def work(host: EngineHost, clock: Any) -> None:
        assert await tokens(host, sequence(0)) == list(range(6))
        began = trio.current_time()
        async with actor._lock:  # it says nothing
            while not host.deaths:
                await trio.sleep(0.1)
        assert LIMITS.floor_s <= trio.current_time() - began <= SOON

    actor = Actor(paced(*QUICK, then=0.05))
    play(actor, work)


def test_the_first_long_prompt_after_short_ones_is_no_hang() -> None:
    async def part(actor: Actor, asked: wire.Submit) -> None:
        await paced(20 if len(asked.prompt_ids) > PROMPT else 0.05, then=0.05)(actor, asked)

    async def work(host: EngineHost, clock: Any) -> None:
        await tokens(host, sequence(0))
        await tokens(host, sequence(1, prompt=3 * PROMPT))
        assert host.deaths == 0

    play(Actor(part), work)


@pytest.mark.parametrize("believed", [True, False])
def test_steps_that_are_read_together_took_what_the_engine_says(
    believed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We were busy during a step, and read its end together with what was said before it: it seems to have taken nothing,
    and the next prompt is to be as quick."""

    async def part(actor: Actor, asked: wire.Submit) -> None:
        if asked.number != 1:
            await paced(5 if asked.number else 0.05, then=0.05)(actor, asked)
            return
        first = wire.Output(asked.number, 0, len(asked.prompt_ids), "")
        said = wire.Stepped((first,), 1000, actor.submits, 1.2, wire.Stats(1, step_tokens=PROMPT))
        async with actor._lock:
            await trio.sleep(1.2)
            assert actor._stream is not None
            await actor._stream.send_all(wire.TO_NODE.frame(wire.Pong(0)) + wire.TO_NODE.frame(said))
        await paced(then=0.05)(actor, replace(asked, generated_ids=(0,)))

    async def work(host: EngineHost, clock: Any) -> None:
        await tokens(host, sequence(0, prompt=1))
        await tokens(host, sequence(1))
        await tokens(host, sequence(2, prompt=2 * PROMPT))
        assert host.deaths == 0

    if believed:
        play(Actor(part), work)
    else:  # planted
        heard = hangs.Hangs.heard
        monkeypatch.setattr(hangs.Hangs, "heard", lambda self, *told: heard(self, *told[:4]))
        assert notices(lambda: play(Actor(part), work))


def test_many_prompts_at_once_are_no_hang() -> None:
    """The step of all of them takes as much longer as they have more tokens."""

    async def part(actor: Actor, asked: wire.Submit) -> None:
        if asked.number:
            await trio.sleep(0.01)  # all have come
        await paced(0.5 if asked.number == 0 else 4 if asked.number == 1 else 0, then=0.05)(actor, asked)

    async def work(host: EngineHost, clock: Any) -> None:
        await tokens(host, sequence(0))
        async with trio.open_nursery() as nursery:
            for n in range(1, 9):
                nursery.start_soon(tokens, host, sequence(n))
        assert host.deaths == 0

    play(Actor(part), work)


@pytest.mark.parametrize("believed", [True, False])
def test_a_step_of_a_stream_that_was_left_is_no_hang(believed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def part(actor: Actor, asked: wire.Submit) -> None:
        await paced(10 if asked.number else 0.05, then=0.05)(actor, asked)

    async def work(host: EngineHost, clock: Any) -> None:
        await tokens(host, sequence(0))
        with trio.move_on_after(1):
            await tokens(host, sequence(1, prompt=3 * PROMPT))
        assert host.running == 0
        await trio.sleep(20)
        assert host.deaths == 0
        async with actor._lock:  # and it is forgotten then
            began = trio.current_time()
            while not host.deaths:
                await trio.sleep(0.1)
        assert trio.current_time() - began <= SOON

    actor = Actor(part)
    if believed:
        play(actor, work)
    else:  # planted
        monkeypatch.setattr(hangs.Hangs, "leaves", lambda *_: None)
        assert notices(lambda: play(actor, work))


@pytest.mark.parametrize("draft", ["/nowhere", ""])
def test_a_draft_model_that_catches_up_is_no_hang(draft: str) -> None:
    """It computes the prompts of answers that have begun: as many tokens as the model did before."""

    async def part(actor: Actor, asked: wire.Submit) -> None:
        await paced(1.0, 0.05, 6.0, then=0.05)(actor, asked)

    async def work(host: EngineHost, clock: Any) -> None:
        await tokens(host, sequence(0))
        assert host.deaths == (0 if draft else 1)  # without one there was nothing that could take so long

    play(Actor(part, paced(then=0.05)), work, replace(LOAD, draft_folder=draft))


def test_a_grammar_that_compiles_is_no_hang() -> None:
    async def part(actor: Actor, asked: wire.Submit) -> None:
        await paced(10 if asked.response_format else 0.05, then=0.05)(actor, asked)

    async def work(host: EngineHost, clock: Any) -> None:
        await tokens(host, sequence(0))
        await tokens(host, sequence(1), ResponseFormat("regex", "a+"))
        assert host.deaths == 0

    play(Actor(part), work)


def test_what_stands_still_with_us_is_no_hang() -> None:
    """The machine slept, or both were stopped."""

    async def work(host: EngineHost, clock: Any) -> None:
        async with aclosing(host.generate(sequence(0))) as batches:
            for _ in range(3):
                await anext(batches)
            await trio.sleep(0.02)
            clock.jump(1000)
            assert [output.token_id async for outputs in batches for output in outputs][-1] == 5
        assert host.deaths == 0

    play(Actor(paced(*QUICK, then=0.05)), work)


@pytest.mark.parametrize("measured", [True, False])
def test_where_we_are_always_late_an_engine_may_be_too(measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(host: EngineHost, clock: Any) -> None:
        async def late() -> None:
            while True:
                await trio.sleep(LIMITS.look_s / 2)
                clock.jump(LIMITS.look_s)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(late)
            assert await tokens(host, sequence(0)) == list(range(6))
            assert host.deaths == 0
            nursery.cancel_scope.cancel()

    def check() -> None:
        play(Actor(paced(*QUICK, then=8), paced(then=0.05)), work)

    if measured:
        check()
    else:  # planted
        look = hangs.Hangs.look
        monkeypatch.setattr(hangs.Hangs, "look", lambda self, now, late, *rest: look(self, now, 0.0, *rest))
        assert notices(check)


def test_one_that_hangs_is_ended_also_where_we_are_always_late() -> None:
    async def work(host: EngineHost, clock: Any) -> None:
        async def late() -> None:
            while True:
                await trio.sleep(LIMITS.look_s / 2)
                clock.jump(4 * LIMITS.look_s)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(late)
            assert await tokens(host, sequence(0)) == list(range(6))
            assert host.deaths == 1
            assert "no question was answered for 30 s" in host.last_death
            nursery.cancel_scope.cancel()

    play(Actor(paced(*QUICK), paced(then=0.05)), work)


@pytest.mark.parametrize("patient", [True, False])
def test_a_machine_that_stalls_again_and_again_is_no_storm_of_kills(
    patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in the midst of each answer takes 10 s: of two engines that is taken for a hang, of no third."""

    async def stalling(actor: Actor, asked: wire.Submit) -> None:
        await paced(*QUICK, *(() if asked.generated_ids else (10,)), then=0.05)(actor, asked)

    async def work(host: EngineHost, clock: Any) -> None:
        for n in range(6):
            await tokens(host, sequence(n, 12))
        assert host.deaths == 2

    if patient:
        play(Actor(stalling), work)
    else:  # planted
        monkeypatch.setattr("node.runtime.tempo.BACK_OFF", 1)
        assert notices(lambda: play(Actor(stalling), work))


def test_no_stream_ends_for_haste() -> None:
    """One that has seen an engine die would end with the next."""

    async def work(host: EngineHost, clock: Any) -> None:
        assert await tokens(host, sequence(0, 12)) == list(range(12))
        assert host.deaths == 1

    play(Actor(paced(*QUICK, 20, then=0.05)), work)


def test_an_engine_in_a_thread_has_the_limit() -> None:
    """Nothing can be ended there."""

    async def work(host: EngineHost, clock: Any) -> None:
        assert await tokens(host, sequence(0)) == list(range(6))
        assert host.deaths == 0

    actor = Actor(paced(*QUICK, then=20))
    actor.mode = "thread"
    play(actor, work)
