"""`withdraw`: vault balance back to an account."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from node.cli.assets import asset_options, chosen, show_in
from node.cli.connected import run
from node.cli.main import Command, Shared
from node.cli.options import password_options, request_option
from node.cli.params import ADDRESS, AMOUNT
from protocol.ids import Address

if TYPE_CHECKING:
    from node.client.client import Client


@click.command(cls=Command)
@click.argument("amount", type=AMOUNT, required=False)
@asset_options
@click.option("--to", type=ADDRESS, help="Account that gets it; by default the payer itself.")
@request_option
@password_options
@click.pass_obj
def command(
    shared: Shared, amount: int | None, to: Address | None, chain: str | None, token: str | None, request: str
) -> None:
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
        if request and amount is None:
            raise click.UsageError("--id names one request: say which AMOUNT")
        again = bool(request) and client.wallet.chains.of(asset.domain).has_answered(request, "withdraw")
        if wanted > held and not again:
            raise InsufficientFunds(
                f"the vault holds {show(held)}, not {show(wanted)}",
                hint="gristmill channels close brings channels home",
            )
        shared.output.say(f"withdrawing {show(wanted)} to {to or client.wallet.payer.address}")
        done = [] if wanted == 0 else [await client.wallet.withdraw(wanted, to, asset, request=request)]
        left = held if again else held - wanted
        data = {
            "chain": client.wallet.chains.name(asset.domain),
            "token": str(Address(asset.token)),
            "withdrawn": str(wanted),
            "vault_balance": str(left),
            "transactions": [transaction(result) for result in done],
        }
        shared.output.result(data, f"withdrawn {show(wanted)}, the vault holds {show(left)}")

    run(shared, work, online=False, payees=[to] if to else [])
