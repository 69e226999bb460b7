"""`status`: what a running worker is doing."""

from __future__ import annotations

import time
from typing import Any

import click

from node.cli.main import Command, Shared


@click.command(cls=Command)
@click.option("--watch", is_flag=True, help="Show it again every second until interrupted.")
@click.pass_obj
def command(shared: Shared, watch: bool) -> None:
    """What a running worker is doing."""
    import trio

    from node.worker import control

    async def ask() -> dict[str, Any]:
        return await control.ask(shared.config.data_dir / "control.sock", "status")

    while True:
        status = trio.run(ask)
        shared.output.row(status, _text(status))
        if not watch:
            return
        time.sleep(1)


def _text(status: dict[str, Any]) -> str:
    refused = ", ".join(f"{reason} {count}" for reason, count in status["refused"].items()) or "none"
    return "\n".join(
        [
            f"worker    {status['peer_id']}" + ("  (draining)" if status["draining"] else ""),
            f"models    {', '.join(model['name'] for model in status['models'])}",
            f"streams   {status['streams']} now, {status['accepted']} accepted, {status['finished']} finished",
            f"tokens    {status['output_tokens']}",
            f"refused   {refused}",
            f"earned    {status['earned']} (claimed {status['claimed']}, claimable {status['claimable']}), smallest unit",
            f"unpaid    {status['unpaid']} under way",
            f"channels  {status['channels']}",
            f"chain     seen {status['chain_age_ms']} ms ago",
        ]
    )
