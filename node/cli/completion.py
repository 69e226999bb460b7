"""`completion`: scripts that complete our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from node.cli.main import Command, Shared, cli


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_obj
def command(shared: Shared, shell: str) -> None:
    """Print a completion script for SHELL.

    For bash: `gristmill completion bash >> ~/.bashrc`. It completes `gristmill`; the word `node` stays Node.js's.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.BadParameter(f"no completion for {shell}")
    script = kind(cli, {}, "gristmill", "_GRISTMILL_COMPLETE").source()
    shared.output.result({"shell": shell, "script": script}, script)
