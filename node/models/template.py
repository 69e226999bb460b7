"""Chat templates: messages in, prompt text out, by a child process that can be killed.

Jinja has no way to stop a running template, and a loop within a loop is enough to hold a CPU for hours. So templates run
in one long-lived child per model (started at the first use, about 0.1 s; a call then costs well under a millisecond).
A call that passes its deadline kills the child; the next call starts another.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from node.errors import ModelError, PromptInvalid

MAX_TEMPLATE: Final = 1 << 18
MAX_INPUT: Final = 8 << 20
MAX_ANSWER: Final = 64 << 20
START_SECONDS: Final = 30.0

_CHILD: Final = Path(__file__).with_name("template_child.py")


class Renderer:
    """Renders one template. Safe to call from several threads; close it when the model is unloaded.

    Raises `ModelError` when the template itself is no good, `PromptInvalid` when it refuses the messages, breaks on
    them, or takes too long.
    """

    def __init__(self, template: str, constants: Mapping[str, str], *, seconds: float = 2.0) -> None:
        """`constants`: what the model adds to each call (``bos_token`` and so on). `seconds`: limit of one call."""
        if len(template) > MAX_TEMPLATE:
            raise ModelError(f"the chat template is longer than {MAX_TEMPLATE} characters")
        self._template = template
        self._constants = dict(constants)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation; `messages` hold ``role`` and ``content``."""
        variables = {
            **self._constants,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
        }
        try:
            line = json.dumps({"variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptInvalid(f"the messages are not plain values: {error}") from None
        if len(line) > MAX_INPUT:
            raise PromptInvalid(f"the messages are larger than {MAX_INPUT >> 20} MB")
        with self._lock:
            self._start()
            answer = self._call(line, self._seconds)
        if "ok" not in answer:
            raise PromptInvalid(f"the chat template refuses these messages: {answer.get('refused') or answer['error']}")
        return str(answer["ok"])

    def warm(self) -> None:
        """Start the child now, so that the first call does not wait for it."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the child. The renderer can be used again; it then starts another."""
        with self._lock:
            self._kill()

    def _start(self) -> None:
        if self._child is not None and self._child.poll() is None:
            return
        self._kill()
        # -I: neither the environment nor the current folder decides what is imported.
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        )
        self._call(b"", START_SECONDS)  # it says when it is ready: a slow start of Python is not the template's fault
        try:
            answer = self._call(json.dumps({"template": self._template}).encode() + b"\n", self._seconds)
        except PromptInvalid as error:
            raise ModelError(f"the chat template does not compile: {error.message}") from None
        if "ok" not in answer:
            self._kill()
            raise ModelError(f"the chat template does not compile: {answer.get('error')}")

    def _call(self, line: bytes, seconds: float) -> dict[str, Any]:
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            raise ModelError("the template process is not running")
        received = _exchange(child.stdin.fileno(), child.stdout.fileno(), line, time.monotonic() + seconds)
        if not received.endswith(b"\n"):
            self._kill()
            raise PromptInvalid(f"the chat template was stopped: over {seconds:g} s or out of memory")
        answer: dict[str, Any] = json.loads(received)
        return answer

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self._kill()


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
