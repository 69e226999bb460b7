"""`claim`: turn vouchers into vault balance, now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from node.cli import passwords
from node.cli.assets import shown, sums
from node.cli.main import Command, Shared
from node.cli.options import password_options
from node.signer.sources import KeyFile


@click.command(cls=Command)
@password_options
@click.pass_obj
def command(shared: Shared) -> None:
    """Claim what clients owe this worker, and settle it to the payout account's vault balance.

    Asks the running worker when there is one; otherwise opens the journal itself. A worker claims by its own policy too
    (`worker.claim_min`, `worker.claim_every_s`, a client that leaves); this is for the impatient.
    """
    import trio

    from node.worker import control

    async def ask() -> dict[str, Any]:
        path = shared.config.data_dir / "control.sock"
        _announce(shared, (await control.ask(path, "status"))["assets"])
        return await control.ask(path, "claim", timeout_s=180)

    try:
        done = trio.run(ask)
    except control.NotRunning:
        done = trio.run(_alone, shared, passwords.source(shared, "worker"))
    lines = [f"claimed  {shown(one, 'amount')} ({one['chain']})" for one in done["totals"]] or ["claimed  nothing"]
    lines += [f"{item['purpose']:<8} {item['hash']}  {item['gas']} gas" for item in done["transactions"]]
    shared.output.result(done, "\n".join(lines))


def _announce(shared: Shared, assets: Sequence[Mapping[str, Any]]) -> None:
    """What will be done, before it is."""
    for one in assets:
        shared.output.say(
            f"claiming {shown(one, 'claimable')} on {one['chain']}, and settling what is claimed to the payout account; "
            "the worker's key pays the gas"
        )


async def _alone(shared: Shared, key: KeyFile) -> dict[str, Any]:
    """Claim without a running worker: journal and chains, no network and no model."""
    from node.books import open_books
    from node.cli.start import claim_report
    from node.store.channels import follow
    from node.wiring import now_s, open_chains
    from node.worker.claims import Claimer, ClaimPolicy, claim_all
    from protocol.ids import ChannelId
    from protocol.signing import KeyRole

    async with open_books(shared.config, "worker", {KeyRole.WORKER: key}) as books:
        hot, book = books.signers[KeyRole.WORKER], books.book
        async with open_chains(shared.config, hot, books.ledger) as chains:

            async def look(channel_id: ChannelId) -> None:
                await follow(book, chains, channel_id)  # who is leaving is claimed in this very round

            for state in list(book.channels.values()):
                if not state.closed and chains.get(state.domain) is not None:
                    await look(state.channel_id)
            amounts = {"claimable": lambda state: state.claimable}
            _announce(shared, await sums(chains, book.channels.values(), amounts))
            claimers = [
                Claimer(book=book, chain=chain, policy=ClaimPolicy(), follow=look, now_s=now_s, receiver=hot.address)
                for chain in chains
            ]
            return await claim_report(chains, book, await claim_all(claimers))
