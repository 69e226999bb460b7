"""The table of commands. It imports nothing: the `node` guard reads it first, and `--help` needs no command loaded.

A command `why-no-jobs` lives in `node/cli/why_no_jobs.py` as the click command `command`. Each has a heading in
docs/reference/cli.md, which `scripts/gen-reference` writes.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "init": "Make the data dir: configuration file and keys.",
    "wallet": "Make, import and list keys.",
    "models": "The content-addressed model store.",
    "config": "Show the configuration.",
    "doctor": "Check this installation; each finding comes with the command that mends it.",
    "journal": "Read the journal.",
    "devnet": "A local chain with our contracts, for development.",
    "version": "Show the versions of Gristmill, Python and what matters below.",
    "completion": "Print a shell completion script.",
}
"""Name to one line of help, in the order of `--help`."""
