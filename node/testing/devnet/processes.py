"""Start a child that announces itself on stdout, and end it by its pid."""

from __future__ import annotations

import math
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import IO, TypeVar

import trio

from node.errors import ChainError

T = TypeVar("T")


@asynccontextmanager
async def announced(
    command: Sequence[str], ready: Callable[[str], T | None], *, name: str, timeout: float = 60.0
) -> AsyncIterator[tuple[T, int]]:
    """Run `command` until the block ends: (what `ready` made of a line of its output, its pid).

    Raises `ChainError` when the child ends or `timeout` seconds pass before such a line. The rest of its output is read and
    thrown away, so that a full pipe never stops it.
    """
    process = await trio.to_thread.run_sync(
        partial(
            subprocess.Popen,
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    )
    try:
        seen: list[str] = []
        found: T | None = None
        with trio.move_on_after(timeout):
            found = await trio.to_thread.run_sync(_until, process.stdout, ready, seen, abandon_on_cancel=True)
        if found is None:
            raise ChainError(f"{name} did not start: {''.join(seen[-5:]).strip()[-500:] or 'no output'}")
        threading.Thread(target=_discard, args=(process.stdout,), daemon=True).start()
        yield found, process.pid
    finally:
        with trio.CancelScope(shield=True, deadline=math.inf):
            process.kill()  # it keeps no state that a softer end would save
            await trio.to_thread.run_sync(process.wait)


def _until(stream: IO[str], ready: Callable[[str], T | None], seen: list[str]) -> T | None:
    for line in stream:
        seen.append(line)
        found = ready(line)
        if found is not None:
            return found
    return None


def _discard(stream: IO[str]) -> None:
    for _ in stream:
        pass
