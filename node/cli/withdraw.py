"""`withdraw`: vault balance back to an account."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from node.cli.assets import asset_options, chosen, show_in
from node.cli.connected import run
from node.cli.main import Command, Shared
from node.cli.options import password_options
from node.cli.params import ADDRESS, AMOUNT
from protocol.ids import Address

if TYPE_CHECKING:
    from node.client.client import Client


@click.command(cls=Command)
@click.argument("amount", type=AMOUNT, required=False)
@asset_options
@click.option("--to", type=ADDRESS, help="Account that gets it; by default the payer itself.")
@password_options
@click.pass_obj
def command(shared: Shared, amount: int | None, to: Address | None, chain: str | None, token: str | None) -> None:
    """Take AMOUNT (smallest unit of the token; by default everything) out of the vault.

    Money inside channels comes back first by `channels close`.
    """

    async def work(client: Client) -> None:
        from node.cli.start import transaction
        from node.errors import InsufficientFunds

        asset = chosen(shared, client, chain, token)
        held = await client.balance(asset)
        show = await show_in(client.wallet.chains, asset)
        wanted = held if amount is None else amount
        if wanted > held:
            raise InsufficientFunds(
                f"the vault holds {show(held)}, not {show(wanted)}",
                hint="gristmill channels close brings channels home",
            )
        transactions = [] if wanted == 0 else [transaction(await client.wallet.withdraw(wanted, to, asset))]
        data = {
            "chain": client.wallet.chains.name(asset.domain),
            "token": str(Address(asset.token)),
            "withdrawn": str(wanted),
            "vault_balance": str(held - wanted),
            "transactions": transactions,
        }
        shared.output.result(data, f"withdrawn {show(wanted)}, the vault holds {show(held - wanted)}")

    run(shared, work, online=False)
