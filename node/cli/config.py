"""`config`: the effective settings and where each came from."""

from __future__ import annotations

import click

from node.cli.init import toml_value
from node.cli.main import Group, Shared


@click.group(cls=Group)
def command() -> None:
    """Show the configuration."""


@command.command()
@click.argument("keys", nargs=-1)
@click.option("--origin", is_flag=True, help="Also where each value came from.")
@click.pass_obj
def show(shared: Shared, keys: tuple[str, ...], origin: bool) -> None:
    """Show every effective setting, or only KEYS, as TOML that could be put into a file."""
    config = shared.config
    known = [key.name for key in config.keys_in_use()]
    for key in keys:
        if key not in known:
            raise click.BadParameter(f"no setting is called {key!r}", param_hint="KEYS")
    names = keys or tuple(known)
    if shared.output.json:
        plain = {name: config.get(name) for name in names}
        if origin:
            shared.output.result({name: {"value": plain[name], "origin": config.origins[name]} for name in names})
        else:
            shared.output.result(plain)
        return
    lines = [f"{name} = {toml_value(config.get(name))}" for name in names]
    if origin:
        width = max(map(len, lines))
        lines = [f"{line:<{width}}  # {config.origins[name]}" for line, name in zip(lines, names, strict=True)]
    shared.output.result({}, "\n".join(lines))
