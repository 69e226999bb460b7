"""`audit`: refold the journal and compare it with the chain."""

from __future__ import annotations

import click

from node.cli import passwords
from node.cli.assets import chain_option
from node.cli.main import Command, Shared
from node.cli.options import password_options
from node.errors import LedgerError

KEYS = {"worker": "worker", "client": "payer"}
ROLES = (*KEYS, "owner")


@click.command(cls=Command)
@click.option("--role", type=click.Choice(ROLES), help="Which journal; by default every one that exists.")
@chain_option
@password_options
@click.pass_obj
def command(shared: Shared, role: str | None, chain: str | None) -> None:
    """Refold the whole journal, check every signature in it, and compare it with the chains.

    Exit 0 only when every invariant holds. Needs the journal to itself: stop the worker first. With --chain, channels, batch
    jobs and the vault are compared on that chain alone; everything that needs no chain is checked all the same. The journal of
    an owner holds transactions and a juror's votes: they are checked without a chain, and without the owner's key.
    """
    import trio

    roles = [role] if role else [name for name in ROLES if shared.config.journal(name).exists()]
    found: dict[str, list[str]] = {}
    for name in roles:
        found[name] = _audit_owner(shared) if name == "owner" else trio.run(_audit, shared, name, chain)
    data = {name: findings or "ok" for name, findings in found.items()}
    lines = [f"{name:<7} " + ("ok" if not findings else "") for name, findings in found.items()]
    lines += [f"  {finding}" for findings in found.values() for finding in findings]
    shared.output.result({"audit": data}, "\n".join(lines) or "there is no journal to audit")
    if any(found.values()):
        raise click.exceptions.Exit(1)


async def _audit(shared: Shared, role: str, only: str | None) -> list[str]:
    from node.audit import audit
    from node.wiring import look_at_chains, open_journal
    from protocol.channel import Role

    if not shared.config.journal(role).exists():
        raise LedgerError(f"there is no journal of a {role} in {shared.config.data_dir}")
    account = passwords.unlock(shared, KEYS[role]).address
    with open_journal(shared.config, role, account) as ledger:
        async with look_at_chains(shared.config) as chains:
            return await audit(ledger, Role(role), chains, None if only is None else chains.named(only))


def _audit_owner(shared: Shared) -> list[str]:
    """Read as it lies, without the key: that is meant to be on another machine."""
    from node.audit import audit_owner
    from node.store.dump import read

    with read(shared.config.journal("owner").absolute()) as ledger:
        return audit_owner(ledger)
