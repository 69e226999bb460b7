"""`channels`: this client's payment channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from node.cli.assets import chain_option, on_chain, token_info
from node.cli.connected import client_options, run
from node.cli.main import Group, Shared
from node.cli.options import password_options
from node.cli.params import CHANNEL
from node.errors import ConfigError

if TYPE_CHECKING:
    from node.client.client import Client
    from protocol.ids import ChannelId


@click.group(cls=Group)
def command() -> None:
    """This client's payment channels.

    A channel locks part of the vault balance for one worker. Closing it returns what was not spent: at once when the
    worker consents, else after the channel's delay, which nobody can refuse.
    """


@command.command("list")
@chain_option
@password_options
@click.pass_obj
def list_(shared: Shared, chain: str | None) -> None:
    """List the channels, with what was locked, signed, spent and claimed."""

    async def work(client: Client) -> None:
        chains = client.wallet.chains
        for state in client.book.channels.values():
            if not on_chain(chains, state, chain):
                continue
            show = (await token_info(chains, state.domain, state.config.token)).show
            status = "closed" if state.closed else "leaving" if state.leaving else "open"
            data = {
                "channel": state.channel_id,
                "chain": chains.name(state.domain),
                "token": str(state.config.token),
                "receiver": str(state.config.receiver),
                "status": status,
                "allocated": str(state.allocated),
                "cumulative": str(state.cumulative),
                "spent": str(state.spent),
                "claimed": str(state.claimed),
                "withdraw_at": state.withdraw_at,
            }
            where = chains.name(state.domain)
            text = (
                f"{state.channel_id}  {where:<8} {status:<8} spent {show(state.spent)} of {show(state.allocated)}, "
                f"claimed {show(state.claimed)}"
            )
            shared.output.row(data, text)

    run(shared, work, online=False)


@command.command()
@click.argument("channel", type=CHANNEL, required=False)
@chain_option
@client_options
@click.pass_obj
def close(shared: Shared, channel: ChannelId | None, chain: str | None, workers: tuple[str, ...]) -> None:
    """Close CHANNEL, or every channel when none is named. Run it again after the delay to finish a delayed one."""

    async def work(client: Client) -> None:
        from node.cli.start import transaction

        chains = client.wallet.chains
        if channel is not None and channel not in client.book.channels:
            raise ConfigError(f"{channel} is not a channel of this client", hint="gristmill channels list")
        peers = {offer.worker: offer.peer_id for offer in client.offers.current()}
        for state in list(client.book.channels.values()):
            if state.closed or (channel is not None and state.channel_id != channel):
                continue
            if not on_chain(chains, state, chain):
                continue
            if chains.get(state.domain) is None and channel is None:
                shared.output.say(f"{state.channel_id} is left alone: {chains.name(state.domain)}")
                continue
            show = (await token_info(chains, state.domain, state.config.token)).show
            if not state.withdraw_at:
                shared.output.say(
                    f"closing {state.channel_id}: up to {show(state.allocated - max(state.spent, state.claimed))} of "
                    f"{show(state.allocated)} come back to the vault balance, at once if the worker consents, else "
                    f"{state.config.withdraw_delay} s after the withdrawal begins; the payer's key pays the gas"
                )
            done = await client.wallet.close(state.channel_id, peers.get(state.config.receiver))
            data = {
                "channel": done.channel_id,
                "cooperative": done.cooperative,
                "returned": str(done.returned),
                "available_at": done.available_at,
                "note": done.note,
                "transactions": [transaction(result) for result in done.transactions],
            }
            when = (
                f"available from {done.available_at} (chain seconds)"
                if done.available_at
                else f"{show(done.returned)} returned"
            )
            shared.output.row(data, f"{done.channel_id}  {when}" + (f"  ({done.note})" if done.note else ""))

    run(shared, work, workers)
