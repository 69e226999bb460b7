"""`journal`: read what the journal says, beside a running node. Only `adopt` writes."""

from __future__ import annotations

from pathlib import Path

import click

from node.cli import passwords
from node.cli.main import Group, Shared
from node.cli.options import password_options
from node.errors import LedgerError

KEYS = {"worker": "worker", "client": "payer"}
"""Whose key a role's journal belongs to."""


@click.group(cls=Group)
def command() -> None:
    """Read the journal; go on with an old one."""


@command.command()
@click.option("--role", type=click.Choice(["worker", "client"]), default="worker", help="Whose journal.")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="A journal file instead.")
@click.option("--after", type=click.IntRange(0), default=0, metavar="N", help="Only records with a number over N.")
@click.pass_obj
def dump(shared: Shared, role: str, file: Path | None, after: int) -> None:
    """Print every record, in order, as NDJSON. The journal is verified first."""
    from node.store.dump import dump as lines
    from node.store.dump import read

    path = (file or shared.config.journal(role)).absolute()
    try:
        with read(path) as ledger:
            for line in lines(ledger, after):
                shared.output.line(line)
    except LedgerError as error:  # whichever file it was
        if str(path) not in error.message:
            error.message = f"{path}: {error.message}"
        raise


@command.command()
@click.option("--role", type=click.Choice(list(KEYS)), required=True, help="Whose journal.")
@click.option("--accept-loss", is_flag=True, help="Do it. Without this flag nothing changes, and the refusal is shown.")
@password_options
@click.pass_obj
def adopt(shared: Shared, role: str, accept_loss: bool) -> None:
    """Go on with a journal that is refused as an old copy (`journal_fenced`), when the later one is lost for good.

    This journal does not know what the lost one signed. So that nothing is signed twice, the channels in it are frozen: no
    job is opened on them any more. A worker claims what its old vouchers cover, a client closes its channels and opens new
    ones. What was earned or paid on them after the copy was made is lost to this side.

    Never do this while the later journal exists, here or on another machine: two journals with one key sign against each
    other, and a worker's stake can be slashed for it.
    """
    from node.store.fence import Fence
    from node.store.ledger import Ledger

    key = passwords.unlock(shared, KEYS[role])
    fence = Fence(shared.config.fence(role, str(key.address)), adopt=accept_loss)
    path = shared.config.journal(role)
    with Ledger.open(path, chain_tag=bytes(key.address), create=accept_loss, fence=fence) as ledger:
        data = {"adopted": fence.adopted, "epoch": ledger.epoch, "records": ledger.head.seq}
    said = f"adopted {path}" if fence.adopted else f"{path} is the last journal of this key; nothing was to be adopted"
    shared.output.result(data, said)


@command.command("forget-signer")
@click.option("--role", type=click.Choice([*KEYS, "owner"]), required=True, help="Whose journal.")
@password_options
@click.pass_obj
def forget_signer(shared: Shared, role: str) -> None:
    """Make a new signer's table from this journal, when the one that belongs to it is lost or is an old copy.

    The table remembers what the keys have signed. All that has left this machine is in the journal too, so with the newest
    journal nothing is signed twice. With an older one it would be: then `journal adopt` comes first.

    What is left of the table is kept beside the new one, under another name. The next start makes the new one.
    """
    from node.signer.journal import forget
    from node.wiring import open_journal

    account = passwords.unlock(shared, KEYS.get(role, role)).address
    table = shared.config.signer_table(role)
    with open_journal(shared.config, role, account) as ledger:
        kept = forget(ledger, table)
    data = {"journal": str(ledger.path), "kept": None if kept is None else str(kept)}
    shared.output.result(
        data, f"the next start makes {table} from {ledger.path}" + (f"; the old one is {kept}" if kept else "")
    )


@command.command()
@click.pass_obj
def points(shared: Shared) -> None:
    """List the points at which GRISTMILL_FAULT=point:n can kill the process (only where GRISTMILL_TESTING=1)."""
    from node.store.faults import POINTS

    for name, where in POINTS.items():
        shared.output.row({"point": name, "where": where}, f"{name:<28} {where}")
