"""`deposit`: the only transaction a client needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from node.cli.assets import asset_options, chosen, show_in
from node.cli.connected import run
from node.cli.main import Command, Shared
from node.cli.options import password_options
from node.cli.params import AMOUNT
from protocol.ids import Address

if TYPE_CHECKING:
    from node.client.client import Client


@click.command(cls=Command)
@click.argument("amount", type=AMOUNT)
@asset_options
@password_options
@click.pass_obj
def command(shared: Shared, amount: int, chain: str | None, token: str | None) -> None:
    """Put AMOUNT (smallest unit of the token) into the vault.

    Channels to workers are opened out of it by signature; it can be withdrawn at any time, less what is in channels.
    """

    async def work(client: Client) -> None:
        from node.cli.start import transaction

        asset = chosen(shared, client, chain, token)
        results = await client.deposit(amount, asset)
        balance = await client.balance(asset)
        show = await show_in(client.wallet.chains, asset)
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
