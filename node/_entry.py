"""The console script `node`, which never hides Node.js.

A script called `node` hides Node.js when its environment is first on PATH, and then npm and npx run ours. So this file
decides before any heavy import: our own words are ours, and so is a bare `node` on a terminal; anything else (a file, `-e`,
`--version`, piped stdin) becomes the next `node` on PATH. See docs/adr/0004-node-script-guard.md.

`execv` keeps the process id, which is what ends a loop between two guards, or between a guard and a version manager's shim: the
paths already tried travel in the environment together with that id, and mean nothing to any other process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from node.cli.commands import COMMANDS

OUR_OPTIONS = frozenset({"-h", "--help", "--json", "--data-dir"})
"""Options that may come before the command. Node.js has `-h` and `--help` too; a person who types them here wants ours."""

TRIED = "GRISTMILL_NODE_TRIED"
"""`<pid>:<path>:<path>...`: what this very process has been so far."""


def is_ours(arguments: Sequence[str], *, terminal: bool) -> bool:
    """Whether these arguments (without the program's name) are for Gristmill; `terminal`: stdin is one."""
    if not arguments:
        return terminal
    first = arguments[0]
    return first in COMMANDS or first == "help" or first.split("=", 1)[0] in OUR_OPTIONS


def tried(environment: Mapping[str, str], pid: int) -> list[str]:
    """The paths that process `pid` has already been; nothing when the note was left by a parent."""
    owner, *paths = environment.get(TRIED, "").split(os.pathsep)
    return paths if owner == str(pid) else []


def next_node(path: str, skip: Sequence[str]) -> str | None:
    """The first executable `node` in the search path that is none of `skip`, by file identity."""
    for folder in path.split(os.pathsep):
        candidate = Path(folder or ".", "node").absolute()
        if not candidate.is_file() or not os.access(candidate, os.X_OK):
            continue
        if not any(os.path.exists(other) and candidate.samefile(other) for other in skip):
            return str(candidate)
    return None


def become_node(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by the next `node` on PATH, or end with exit status 2 when there is none."""
    skip = [*tried(os.environ, os.getpid()), os.path.abspath(sys.argv[0])]
    target = next_node(os.environ.get("PATH", os.defpath), skip)
    if target is None:
        what = " ".join(arguments) or "a script on stdin"
        print(f"error: `{what}` is no command of Gristmill, and there is no Node.js on PATH\n", file=sys.stderr)
        print(
            "hint: `node help` lists the commands; `node version` is ours, `node --version` is Node.js's",
            file=sys.stderr,
        )
        sys.exit(2)
    environment = {**os.environ, TRIED: os.pathsep.join([str(os.getpid()), *skip, target])}
    os.execve(target, ["node", *arguments], environment)


def main() -> int:
    """Entry of the console script `node`."""
    arguments = sys.argv[1:]
    if is_ours(arguments, terminal=sys.stdin is not None and sys.stdin.isatty()):
        from node.cli.main import main as command_line

        return command_line()
    become_node(arguments)
