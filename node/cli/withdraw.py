"""`withdraw`: vault balance back to an account."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from node.cli.connected import run
from node.cli.main import Command, Shared
from node.cli.options import password_options
from node.cli.params import ADDRESS, AMOUNT
from protocol.ids import Address

if TYPE_CHECKING:
    from node.client.client import Client


@click.command(cls=Command)
@click.argument("amount", type=AMOUNT, required=False)
@click.option("--to", type=ADDRESS, help="Account that gets it; by default the payer itself.")
@password_options
@click.pass_obj
def command(shared: Shared, amount: int | None, to: Address | None) -> None:
    """Take AMOUNT (smallest unit; by default everything) out of the vault.

    Money inside channels comes back first by `channels close`.
    """

    async def work(client: Client) -> None:
        from node.cli.start import transaction
        from node.errors import InsufficientFunds

        held = await client.balance()
        chain = client.wallet.chain
        show = (await chain.token_info(chain.token)).show
        wanted = held if amount is None else amount
        if wanted > held:
            raise InsufficientFunds(
                f"the vault holds {show(held)}, not {show(wanted)}",
                hint="gristmill channels close brings channels home",
            )
        transactions = [] if wanted == 0 else [transaction(await client.wallet.withdraw(wanted, to))]
        data = {"withdrawn": str(wanted), "vault_balance": str(held - wanted), "transactions": transactions}
        shared.output.result(data, f"withdrawn {show(wanted)}, the vault holds {show(held - wanted)}")

    run(shared, work, online=False)
