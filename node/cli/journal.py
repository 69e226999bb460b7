"""`journal`: read what the journal says. Never writes, and works beside a running node."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import click

from node.cli.main import Group, Shared


@click.group(cls=Group)
def command() -> None:
    """Read the journal."""


@command.command()
@click.option("--role", type=click.Choice(["worker", "client"]), default="worker", help="Whose journal.")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="A journal file instead.")
@click.option("--after", type=click.IntRange(0), default=0, metavar="N", help="Only records with a number over N.")
@click.pass_obj
def dump(shared: Shared, role: str, file: Path | None, after: int) -> None:
    """Print every record, in order, as NDJSON. The journal is verified first."""
    from node.store import database, errors
    from node.store.dump import dump as lines
    from node.store.ledger import Ledger

    path = (file or shared.config.journal(role)).absolute()
    if not path.exists():
        raise errors.LedgerMissing(f"there is no journal at {path}")
    try:
        with closing(database.connect(path, read_only=True)) as connection:
            database.check_structure(connection)
            (tag,) = connection.execute("SELECT chain_tag FROM about").fetchone()
    except sqlite3.Error as error:
        raise database.blame(error) from error
    with Ledger.open(path, chain_tag=tag, read_only=True) as ledger:
        for line in lines(ledger, after):
            shared.output.line(line)


@command.command()
@click.pass_obj
def points(shared: Shared) -> None:
    """List the points at which GRISTMILL_FAULT=point:n can kill the process (only where GRISTMILL_TESTING=1)."""
    from node.store.faults import POINTS

    for name, where in POINTS.items():
        shared.output.row({"point": name, "where": where}, f"{name:<28} {where}")
