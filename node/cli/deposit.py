"""`deposit`: the only transaction a client needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from node.cli.assets import asset_options, chosen, show_in
from node.cli.connected import run
from node.cli.main import Command, Shared
from node.cli.options import password_options, request_option
from node.cli.params import AMOUNT
from protocol.ids import Address

if TYPE_CHECKING:
    from node.client.client import Client


@click.command(cls=Command)
@click.argument("amount", type=AMOUNT)
@asset_options
@request_option
@password_options
@click.pass_obj
def command(shared: Shared, amount: int, chain: str | None, token: str | None, request: str) -> None:
    """Put AMOUNT (smallest unit of the token) into the vault.

    Channels to workers are opened out of it by signature; it can be withdrawn at any time, less what is in channels.
    """

    async def work(client: Client) -> None:
        from node.cli.start import transaction

        asset = chosen(shared, client, chain, token)
        show = await show_in(client.wallet.chains, asset)
        shared.output.say(f"depositing {show(amount)} of {client.wallet.payer.address} into the vault")
        results = await client.deposit(amount, asset, request=request)
        balance = await client.balance(asset)
        data = {
            "chain": client.wallet.chains.name(asset.domain),
            "token": str(Address(asset.token)),
            "deposited": str(amount),
            "vault_balance": str(balance),
            "transactions": [transaction(result) for result in results],
        }
        gas = sum(result.gas_used for result in results)
        shared.output.result(data, f"deposited {show(amount)}, the vault holds {show(balance)} ({gas} gas)")

    run(shared, work, online=False)
