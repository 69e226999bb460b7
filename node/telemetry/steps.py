"""A trace of the engine's steps in Chrome's trace format, to be opened in Perfetto or chrome://tracing.

One event a step, with its parts below it, written by the engine's thread as it goes; the file is a JSON array whose closing
bracket may be missing after a crash, which the format allows. A trace ends by itself at `LIMIT` bytes: it must not fill a disk
that a journal needs.

Source: Trace Event Format (JSON array format, complete events).
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import IO, Final

from node.telemetry.engine import EngineStats

log = logging.getLogger(__name__)
LIMIT: Final = 256 << 20
_PARTS: Final = ("schedule", "forward", "sample")


class StepTrace:
    """One file for one engine. The file is replaced; only its owner may read it."""

    def __init__(self, path: Path, model_name: str, *, limit: int = LIMIT) -> None:
        """Raises `OSError`."""
        self._left = limit
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file: IO[str] | None = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1 << 16)
        self.path = path
        self.steps = 0
        self._write("[")
        name = {"name": "process_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": f"engine {model_name}"}}
        self._write(json.dumps(name))

    @property
    def over(self) -> bool:
        """It is closed, or came to its end by itself."""
        return self._file is None

    def stepped(self, stats: EngineStats | None, began: float, ended: float) -> None:
        """Seconds of `time.perf_counter`."""
        if self._file is None:
            return
        self.steps += 1
        shown = ("running", "waiting", "kv_blocks_used", "step_tokens")
        counts = {name: getattr(stats, name) for name in shown if hasattr(stats, name)}
        self._event(f"step {self.steps}", began, ended - began, counts)
        at = began
        for part in _PARTS:
            seconds = getattr(stats, f"{part}_seconds", None)
            if seconds is not None:
                self._event(part, at, seconds, {})
                at += seconds

    def close(self) -> None:
        if self._file is not None:
            self._file.write("]\n")
            self._file.close()
            self._file = None

    def _event(self, name: str, began: float, seconds: float, args: dict[str, int]) -> None:
        event = {
            "name": name,
            "ph": "X",
            "pid": 1,
            "tid": 1,
            "ts": round(began * 1e6, 1),
            "dur": round(seconds * 1e6, 1),
        }
        self._write("," + json.dumps({**event, "args": args} if args else event))

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        self._left -= len(line) + 1
        if self._left < 2:
            log.warning("the trace %s is full after %d steps", self.path, self.steps)
            self.close()
            return
        try:
            self._file.write(line + "\n")
        except OSError as error:  # a full disk ends the trace and nothing else
            log.warning("the trace %s ends after %d steps: %s", self.path, self.steps, error)
            self._file = None


class Tracing:
    """Whether one engine's steps are traced, and where: from its start on, or for a while that somebody asks for."""

    def __init__(self) -> None:
        self._trace: StepTrace | None = None

    @property
    def trace(self) -> StepTrace | None:
        """The one that is written now."""
        return None if self._trace is None or self._trace.over else self._trace

    def begin(self, path: Path, model_name: str) -> StepTrace:
        """In place of what is traced now. Raises `OSError`."""
        self.close()
        self._trace = StepTrace(path, model_name)
        return self._trace

    def stepped(self, stats: EngineStats | None, began: float, ended: float) -> None:
        if self._trace is not None:
            self._trace.stepped(stats, began, ended)

    def close(self) -> None:
        if self._trace is not None:
            self._trace.close()
            self._trace = None
