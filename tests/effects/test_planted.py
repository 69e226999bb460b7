"""What counts as noticing a planted bug (`node.testing.planted`), and what does not."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from node.errors import ChainError
from node.testing.planted import notices, sound, within


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [AssertionError(), trio.TooSlowError(), ExceptionGroup("", [ExceptionGroup("", [AssertionError()])])]
)
def test_a_failed_assertion_and_a_wait_in_vain_are_findings(error: BaseException) -> None:
    assert notices(lambda: raising(error))


def test_an_error_that_was_expected_and_did_not_come_is_a_finding() -> None:
    def watch() -> None:
        with pytest.raises(ValueError):
            pass

    assert notices(watch)


@pytest.mark.parametrize(
    "error",
    [
        AttributeError(),
        KeyboardInterrupt(),
        ChainError("away"),
        ExceptionGroup("", [AssertionError(), AttributeError()]),
    ],
    ids=repr,
)
def test_an_accident_is_none(error: BaseException) -> None:
    with pytest.raises(type(error)):
        notices(lambda: raising(error))


def test_a_test_that_was_timed_out_is_none() -> None:
    with pytest.raises(pytest.fail.Exception, match="Timeout"):
        notices(lambda: pytest.fail("Timeout >60s"))


def test_what_passes_notices_nothing() -> None:
    assert not notices(lambda: None)


def test_patience_is_counted_in_turns() -> None:
    async def quick(_: int) -> None:
        await trio.sleep(0.45)

    async def never(_: int) -> None:
        await trio.sleep_forever()

    def run(test: object) -> None:
        clock = trio.testing.MockClock(autojump_threshold=0)
        trio.run(within(50, test), 0, clock=clock)  # type: ignore[arg-type]

    assert not notices(lambda: run(quick))
    assert notices(lambda: run(never))


def test_an_error_of_the_node_where_none_may_be_is_a_finding() -> None:
    async def away() -> None:
        raise ChainError("away")

    assert notices(lambda: trio.run(sound, away()))
