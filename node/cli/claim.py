"""`claim`: turn vouchers into vault balance, now."""

from __future__ import annotations

from typing import Any

import click

from node.cli import passwords
from node.cli.main import Command, Shared
from node.cli.options import password_options
from protocol.keys import PrivateKey


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
        return await control.ask(shared.config.data_dir / "control.sock", "claim", timeout_s=180)

    try:
        done = trio.run(ask)
    except control.NotRunning:
        done = trio.run(_alone, shared, passwords.unlock(shared, "worker"))
    lines = [f"{item['purpose']:<8} {item['hash']}  {item['gas']} gas" for item in done["transactions"]]
    shared.output.result(done, "\n".join([f"claimed  {done['total']} (smallest unit)", *lines]))


async def _alone(shared: Shared, key: PrivateKey) -> dict[str, Any]:
    """Claim without a running worker: journal and chain, no network and no model."""
    from node.cli.start import claim_report
    from node.wiring import now_s, open_chain, open_journal
    from node.worker.channels import ChannelDesk, ChannelRules
    from node.worker.claims import Claimer, ClaimPolicy
    from protocol.channel import Role

    from node.store.channels import ChannelBook  # isort: skip

    with open_journal(shared.config, "worker", key) as ledger:
        async with open_chain(shared.config, key, ledger) as chain:
            book = ChannelBook.restore(ledger, Role.WORKER)
            desk = ChannelDesk(
                key=key,
                domain=chain.domain,
                book=book,
                chain=chain,
                rules=ChannelRules(chain.token, 0, 0),
                now_s=now_s,
                claim_now=lambda _: None,
            )
            for state in list(book.channels.values()):
                if not state.closed:
                    await desk.follow(state.channel_id)
            claimer = Claimer(
                book=book, chain=chain, policy=ClaimPolicy(), follow=desk.follow, now_s=now_s, receiver=key.address
            )
            return claim_report(await claimer.claim(everything=True))
