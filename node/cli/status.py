"""`status`: what a running worker is doing."""

from __future__ import annotations

import time
from typing import Any

import click

from node.cli.assets import chain_option, shown
from node.cli.main import Command, Shared


@click.command(cls=Command)
@click.option("--watch", is_flag=True, help="Show it again every second until interrupted.")
@chain_option
@click.pass_obj
def command(shared: Shared, watch: bool, chain: str | None) -> None:
    """What a running worker is doing. With --chain, its money and its sight of that chain alone."""
    import trio

    from node.worker import control

    async def ask() -> dict[str, Any]:
        return await control.ask(shared.config.data_dir / "control.sock", "status")

    while True:
        status = trio.run(ask)
        if chain is not None:
            shared.config.chain_named(chain)
            status["assets"] = [one for one in status["assets"] if one["chain"] == chain]
            status["chains"] = [one for one in status["chains"] if one["name"] == chain]
        shared.output.row(status, _text(status))
        if not watch:
            return
        time.sleep(1)


def _asset(one: dict[str, Any]) -> str:
    amounts = {name: shown(one, name) for name in ("earned", "claimed", "claimable", "unpaid")}
    return (
        f"earned    {amounts['earned']} on {one['chain']} (claimed {amounts['claimed']}, claimable {amounts['claimable']}; "
        f"{amounts['unpaid']} unpaid under way)"
    )


def _model(one: dict[str, Any]) -> str:
    if "phase" not in one:
        return f"model     {one['name']}"
    test = one["self_test"]
    parts = [
        f"model     {one['name']}  {one['phase']}" + (f" ({one['stage']})" if one["stage"] else ""),
        f"{one['streams']} streams",
        f"{one['memory_bytes'] / (1 << 20):.0f} MiB" + ("" if one["in_memory"] else " when loaded"),
        "" if test is None else "self-test passed" if test["passed"] else "self-test NOT passed",
        f"engine {one['isolation']}" if one["isolation"] else "",
        f"died {one['deaths']} times, last: {one['last_death']}" if one["deaths"] else "",
        f"steps traced to {one['trace']}" if one["trace"] else "",
        f"TROUBLE: {one['trouble']}" if one["trouble"] else "",
    ]
    return ", ".join(part for part in parts if part)


def _job(one: dict[str, Any]) -> str:
    failure = f", given up: {one['failure']}" if one["failure"] else ""
    return f"batch     {one['job'][:12]}  {one['state']}, {one['done']} of {one['total']} inputs done{failure}"


def _text(status: dict[str, Any]) -> str:
    refused = ", ".join(f"{reason} {count}" for reason, count in status["refused"].items()) or "none"
    return "\n".join(
        [
            f"worker    {status['peer_id']}" + ("  (draining)" if status["draining"] else ""),
            *(_model(one) for one in (*status["models"], *status["tasks"])),
            f"streams   {status['streams']} now, {status['accepted']} accepted, {status['finished']} finished",
            f"tokens    {status['output_tokens']}",
            f"refused   {refused}",
            f"channels  {status['channels']}",
            *(_asset(one) for one in status["assets"]),
            *(_job(one) for one in status["batch"]),
            *(f"chain     {one['name']} seen {one['age_ms']} ms ago" for one in status["chains"]),
        ]
    )
