"""Media on their way out: whatever pieces a source gives, cut to what one message holds."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable

from protocol.tasks import INPUT_BYTES, Shape, Task


class SourceFailed(Exception):
    """The caller's own source raised; its error is the cause."""


async def pieces(source: AsyncIterable[bytes] | None, shape: Shape) -> AsyncGenerator[tuple[bytes, bool], None]:
    """Data, and whether it is the last: at the end of the source, or where the declared size is reached.

    Audio is cut between samples. A source is never read ahead, so that live sound leaves as it comes. Raises `SourceFailed`.
    """
    grain = 2 if shape.task is Task.TRANSCRIBE else 1
    left = shape.size - shape.given
    held = b""
    if source is not None:
        iterator = aiter(source)
        while left:
            try:
                held += bytes(await anext(iterator))
            except StopAsyncIteration:
                break
            except Exception as error:
                raise SourceFailed from error
            while left and len(held) >= grain:
                size = min(len(held) // grain * grain, left, INPUT_BYTES)
                left -= size
                yield held[:size], False
                held = held[size:]
    yield b"", True


async def once(data: bytes) -> AsyncGenerator[bytes, None]:
    """A source of what is there already."""
    yield data
