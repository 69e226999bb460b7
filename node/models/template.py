"""Chat templates: messages in, prompt text out, by a child process that can be killed.

Jinja has no way to stop a running template, and a loop within a loop is enough to hold a CPU for hours. So templates run
in one long-lived child per model (started at the first use, about 0.1 s; a call then costs well under a millisecond).
A call that passes its deadline kills the child; the next call starts another.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from node.errors import ModelError, PromptInvalid
from node.models.child import Child

MAX_TEMPLATE: Final = 1 << 18
MAX_INPUT: Final = 8 << 20

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
        self._child: Child | None = None

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
        self._child = Child(_CHILD)
        if not self._child.ready():
            raise ModelError("the template process did not start")
        try:
            answer = self._call(json.dumps({"template": self._template}).encode() + b"\n", self._seconds)
        except PromptInvalid as error:
            raise ModelError(f"the chat template does not compile: {error.message}") from None
        if "ok" not in answer:
            self._kill()
            raise ModelError(f"the chat template does not compile: {answer.get('error')}")

    def _call(self, line: bytes, seconds: float) -> dict[str, Any]:
        answer = None if self._child is None else self._child.call(line, seconds)
        if answer is None:
            raise PromptInvalid(f"the chat template was stopped: over {seconds:g} s or out of memory")
        return answer

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self._kill()
