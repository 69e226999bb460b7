"""The table of commands. It imports nothing: the `node` guard reads it first, and `--help` needs no command loaded.

A command `why-no-jobs` lives in `node/cli/why_no_jobs.py` as the click command `command`. Each has a heading in
docs/reference/cli.md.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "version": "Show the versions of Gristmill, Python and what matters below.",
}
"""Name to one line of help, in the order of `--help`."""
