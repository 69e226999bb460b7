"""Our own commands, each in a process of its own, as a person would run them: for `demo`.

Rules
- Nothing reaches a process but its arguments and an environment without settings that are meant for another data dir.
- A process speaks JSON on stdout, one object a line; what it says of its error is what we say.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from node.errors import NodeError


class DemoFailed(NodeError):
    """A step failed, or two sides disagree."""

    code = "demo_failed"


class Processes:
    """Runs commands."""

    def __init__(self, own: Path, log: Path) -> None:
        """`own`: the data dir of who runs the demo; `log`: where the worker's stderr goes."""
        self.settings: Sequence[str] = ()
        """Options of every command in a data dir of the demo's: where the chain and the model are."""
        self.log = log
        self._own = own

    def argv(self, folder: Path | None, *words: str) -> list[str]:
        argv = [sys.executable, "-m", "node", "--json"]
        argv += ["--data-dir", str(folder)] if folder else ["--data-dir", str(self._own)]
        return [*argv, *(self.settings if folder else []), *words]

    async def run(self, folder: Path | None, *words: str, lines: bool = False, check: bool = True) -> Any:
        """Run one of our commands; its JSON object, or all its lines."""
        done = await trio.run_process(
            self.argv(folder, *words), capture_stdout=True, check=False, stdin=subprocess.DEVNULL, env=environment()
        )
        rows = json_lines(done.stdout)
        if check and done.returncode != 0:
            error = rows[-1].get("error", {}) if rows else {}
            message = error.get("message", f"status {done.returncode}")
            raise DemoFailed(f"`{' '.join(words[:2])}` failed: {message}", hint=error.get("hint", ""))
        return rows if lines else rows[-1]

    async def ready(self, process: trio.Process, seconds: float) -> dict[str, Any]:
        """What a worker says when it serves. Raises `DemoFailed` when it ends, or says nothing for so long."""
        if process.stdout is None:
            raise DemoFailed("the worker has no output")
        data = b""
        with trio.move_on_after(seconds):
            while b"\n" not in data:
                more = await process.stdout.receive_some()
                if not more:
                    break
                data += more
        first = json_lines(data)
        if not first or first[0].get("event") != "ready":
            detail = first[0]["error"]["message"] if first and "error" in first[0] else self.tail()
            raise DemoFailed(f"the worker did not start: {detail}")
        return first[0]

    def tail(self) -> str:
        """The last of the worker's log."""
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "no message"


def free_port() -> int:
    """A port nobody uses now, so that the client can be told the worker's address before the worker is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def json_lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def environment() -> dict[str, str]:
    """Ours without settings that are meant for another data dir."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GRISTMILL_") or name == "GRISTMILL_ANVIL"
    }
