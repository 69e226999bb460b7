"""`payout`: where the worker's earnings go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from node.cli import passwords
from node.cli.assets import chain_option
from node.cli.main import Group, Shared
from node.cli.options import password_options
from node.cli.params import ADDRESS
from node.config import DEFAULT
from protocol.ids import ZERO_ADDRESS, Address

if TYPE_CHECKING:
    from node.ports import TxResult
    from node.signer.sources import KeyFile

WORKER = click.option("--worker", type=ADDRESS, help="The worker's address; by default that of the key `worker` here.")


@click.group(cls=Group)
def command() -> None:
    """Show and set where a worker's earnings go.

    Until it is set they go to the worker's own account, whose key is on the worker's machine. The key `owner` decides
    once it has registered the worker; keep its file elsewhere afterwards.
    """


@command.command()
@WORKER
@chain_option
@click.pass_obj
def show(shared: Shared, worker: Address | None, chain: str | None) -> None:
    """Show the payout account, as the contract has it; by default that of the default chain. Needs no password."""
    import trio

    data = trio.run(_look, shared, worker or shared.keystore.address("worker"), chain or DEFAULT)
    lines = [
        f"worker  {data['worker']}",
        f"payout  {data['payout']}",
        f"owner   {data['owner'] or 'none: not registered'}",
    ]
    shared.output.result(data, "\n".join(lines))


@command.command("set")
@click.argument("address", type=ADDRESS)
@WORKER
@chain_option
@password_options
@click.pass_obj
def set_(shared: Shared, address: Address, worker: Address | None, chain: str | None) -> None:
    """Send the earnings to ADDRESS from now on; on one chain, by default the default one.

    Signed and paid by the key `owner` (`gristmill wallet new owner`), which needs some coins of the chain for gas. The
    first time registers the worker, with the consent of the key `worker`; after that only the owner is needed, on any
    machine: name the worker with --worker there.
    """
    import trio

    worker = worker or shared.keystore.address("worker")
    owner = passwords.source(shared, "owner")
    shared.output.say(
        f"sending what worker {worker} settles from now on to {address}, on the chain {chain or DEFAULT}; "
        f"the owner {shared.keystore.address('owner')} signs and pays the gas"
    )
    result = trio.run(_set, shared, owner, worker, address, chain or DEFAULT)
    data = {
        "chain": chain or DEFAULT,
        "worker": str(worker),
        "owner": str(shared.keystore.address("owner")),
        "payout": str(address),
        "changed": result is not None,
        "transactions": [],
    }
    if result is not None:
        from node.cli.start import transaction

        data["transactions"] = [transaction(result)]
    shared.output.result(data, f"earnings of {worker} go to {address}" + ("" if result else " already"))


async def _look(shared: Shared, worker: Address, name: str) -> dict[str, Any]:
    from node.wiring import look_at_chain

    async with look_at_chain(shared.config, name) as chain:
        owner = (await chain.worker(worker)).owner
        return {
            "chain": name,
            "worker": str(worker),
            "payout": str(await chain.payout_of(worker)),
            "owner": None if owner == ZERO_ADDRESS else str(owner),
            "setting": shared.config.worker.payout or None,
        }


async def _set(shared: Shared, owner: KeyFile, worker: Address, payout: Address, name: str) -> TxResult | None:
    from node.books import open_consent
    from node.cli.staking import owner_chain
    from node.worker.payout import needs_consent, set_payout

    async with owner_chain(shared, owner, name) as chain:
        if not await needs_consent(chain, worker):
            return await set_payout(chain, worker, payout)
        async with open_consent(shared.config, passwords.source(shared, "worker")) as hot_key:
            return await set_payout(chain, worker, payout, hot_key)
