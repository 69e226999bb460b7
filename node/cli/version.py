"""`version`: what is running."""

from __future__ import annotations

import platform
from importlib import metadata

import click

import node
from node.cli.main import Command, Shared

BELOW = ("libp2p", "trio", "torch")
"""Distributions whose version decides how we behave."""


@click.command(cls=Command)
@click.pass_obj
def command(shared: Shared) -> None:
    """Show the versions of Gristmill, Python and what matters below."""
    below: dict[str, str | None] = {}
    for name in BELOW:
        try:
            below[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            below[name] = None
    data = {"version": node.__version__, "python": platform.python_version(), "platform": platform.platform(), **below}
    installed = ", ".join(f"{name} {version}" for name, version in below.items() if version)
    shared.output.result(data, f"gristmill {node.__version__} (Python {platform.python_version()}, {installed})")
