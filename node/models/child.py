"""A child process that does one risky thing, a line of JSON at a time, and can be killed.

For work on what others wrote that no library can stop: templates that loop, grammars that explode. The script limits its own
memory; who calls limits its time. One caller at a time.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

MAX_ANSWER: Final = 64 << 20
START_SECONDS: Final = 30.0


class Child:
    """A running script. It says that it is ready by a first line of its own."""

    def __init__(self, script: Path, *arguments: str) -> None:
        # -I: neither the environment nor the current folder decides what is imported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        )

    def ready(self) -> bool:
        """Wait for the first line: a slow start of Python is nobody's fault. False: it did not start."""
        return self._exchange(b"", START_SECONDS) is not None

    def call(self, request: bytes, seconds: float) -> dict[str, Any] | None:
        """The answer to one line; None when none came in time, or the child died. It is then ended."""
        return self._exchange(request, seconds)

    def poll(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _exchange(self, data: bytes, seconds: float) -> dict[str, Any] | None:
        to_child, from_child = self._process.stdin, self._process.stdout
        if to_child is None or from_child is None or to_child.closed:
            return None
        received = _exchange(to_child.fileno(), from_child.fileno(), data, time.monotonic() + seconds)
        if not received.endswith(b"\n"):
            self.end()
            return None
        answer: dict[str, Any] = json.loads(received)
        return answer


def _exchange(to_child: int, from_child: int, data: bytes, deadline: float) -> bytes:
    """Write `data` and read one line, both until `deadline`; what came by then is returned."""
    received = bytearray()
    os.set_blocking(to_child, False)
    with selectors.DefaultSelector() as selector:
        selector.register(from_child, selectors.EVENT_READ)
        if data:
            selector.register(to_child, selectors.EVENT_WRITE)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fd == to_child:
                    try:
                        data = data[os.write(to_child, data[:65536]) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        return bytes(received)
                    if not data:
                        selector.unregister(to_child)
                else:
                    block = os.read(from_child, 1 << 16)
                    received += block
                    if not block or block.endswith(b"\n") or len(received) > MAX_ANSWER:
                        return bytes(received)
    return bytes(received)
