"""Media on their way out of the client: cut to messages, never read ahead, never more than was declared."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from node.client.feed import SourceFailed, once, pieces
from node.client.sync import _lifted
from protocol.tasks import INPUT_BYTES, Shape, Task


def shape(size: int, task: Task = Task.TRANSCRIBE, given: int = 0) -> Shape:
    return Shape(task, 0, size, given=given, size=size)


async def all_of(source: AsyncIterator[bytes] | None, of: Shape) -> list[tuple[bytes, bool]]:
    return [piece async for piece in pieces(source, of)]


async def given(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.mark.parametrize(
    ("parts", "size", "wanted"),
    [
        ((b"ab", b"cd"), 100, [b"ab", b"cd"]),
        ((b"a", b"bc", b"d"), 100, [b"ab", b"cd"]),
        ((b"abc",), 100, [b"ab"]),
        ((b"abcdef",), 4, [b"abcd"]),
        ((b"ab", b"", b"cd"), 100, [b"ab", b"cd"]),
        ((), 100, []),
        ((bytes(INPUT_BYTES + 2),), 1 << 20, [bytes(INPUT_BYTES), bytes(2)]),
    ],
    ids=str,
)
def test_audio_is_cut_between_samples_and_at_the_declared_size(
    parts: tuple[bytes, ...], size: int, wanted: list[bytes]
) -> None:
    found = trio.run(all_of, given(*parts), shape(size))
    assert found == [*((data, False) for data in wanted), (b"", True)]


def test_images_have_no_samples() -> None:
    assert trio.run(all_of, once(b"abc"), shape(5, Task.OCR, given=2)) == [(b"abc", False), (b"", True)]
    assert trio.run(all_of, None, shape(5, Task.OCR)) == [(b"", True)]


def test_a_source_is_never_read_ahead_nor_beyond_what_was_declared() -> None:
    asked = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal asked
        while True:
            asked += 1
            yield b"ab"

    async def main() -> None:
        async for _ in pieces(source(), shape(6)):
            assert asked <= 3
        assert asked == 3

    trio.run(main)


def test_what_a_source_raises_is_the_cause() -> None:
    async def source() -> AsyncIterator[bytes]:
        yield b"ab"
        raise OSError("gone")

    async def main() -> None:
        with pytest.raises(SourceFailed) as caught:
            await all_of(source(), shape(100))
        assert isinstance(caught.value.__cause__, OSError)

    trio.run(main)


def test_a_blocking_source_becomes_an_async_one() -> None:
    def source() -> Iterator[bytes]:
        yield from (b"ab", b"cd")

    async def main() -> None:
        assert [piece async for piece in _lifted(source())] == [b"ab", b"cd"]

    trio.run(main)
