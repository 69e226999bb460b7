"""Whether a test notices a planted bug: it fails by what it asserts, or it waits in vain. Whatever else ends it is an accident.

    assert notices(lambda: run_market(within(400, test)))

A bug that makes a test wait for ever should not cost a minute, and on a machine that is busy with other things a short time limit
fails tests that are sound. So patience is counted in turns of the event loop: a process that gets little of the machine has as
few turns as it has time for its work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from node.errors import NodeError

World = TypeVar("World")
Result = TypeVar("Result")
TURN_S = 0.01
"""A turn lasts at least so long."""


def notices(watch: Callable[[], None]) -> bool:
    """Run a test. False when it passes; raises what is neither a failed assertion nor a wait that came to nothing."""
    try:
        watch()
    except BaseException as error:
        if all(_is_a_finding(leaf) for leaf in _leaves(error)):
            return True
        raise
    return False


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _is_a_finding(error: BaseException) -> bool:
    # `pytest.raises` that saw nothing is an assertion by another name; `pytest.fail` is also how a test is timed out.
    missed = type(error).__name__ == "Failed" and str(error).startswith("DID NOT RAISE")
    return isinstance(error, (AssertionError, trio.TooSlowError)) or missed


def within(turns: int, test: Callable[[World], Awaitable[None]]) -> Callable[[World], Awaitable[None]]:
    """The test, ended by `trio.TooSlowError` after so many turns of the event loop."""

    async def limited(world: World) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run_out, turns)
            await test(world)
            nursery.cancel_scope.cancel()

    return limited


async def _run_out(turns: int) -> None:
    for _ in range(turns):
        await trio.sleep(TURN_S)
    raise trio.TooSlowError


async def sound(doing: Awaitable[Result]) -> Result:
    """What must not fail: an error of the node here is a finding of the test."""
    try:
        return await doing
    except NodeError as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
