"""`drain`: let a running worker finish its jobs and stop."""

from __future__ import annotations

import click

from node.cli.main import Command, Shared


@click.command(cls=Command)
@click.pass_obj
def command(shared: Shared) -> None:
    """Let a running worker finish its jobs and stop. New asks are refused with `draining`."""
    import trio

    from node.worker import control

    async def ask() -> dict[str, object]:
        return await control.ask(shared.config.data_dir / "control.sock", "drain")

    shared.output.result(trio.run(ask), "draining")
