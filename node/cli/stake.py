"""`stake`: money that answers for a worker."""

from __future__ import annotations

from typing import Any

import click

from node.cli import passwords
from node.cli.assets import chain_option
from node.cli.main import Command, Shared
from node.cli.options import password_options, request_option
from node.cli.params import AMOUNT
from node.cli.staking import owner_chain, stake_data, stake_text, to_deposit
from node.signer.sources import KeyFile


@click.command(cls=Command)
@click.argument("amount", type=AMOUNT, required=False)
@click.option("--exposure", type=AMOUNT, help="Set the most that open jobs may hold of it, smallest unit.")
@chain_option
@request_option
@password_options
@click.pass_obj
def command(shared: Shared, amount: int | None, exposure: int | None, chain: str | None, request: str) -> None:
    """Stake AMOUNT (smallest unit of the chain's token) for this owner's workers; without AMOUNT show the stake.

    It comes out of the owner's vault balance; what is missing there is deposited first from the owner's account. It goes
    out again by `unstake`, after the unbonding time. A job with a penalty holds part of it, never more than --exposure,
    which is zero until you set it. Each slash uses exposure up; set it again after one.
    """
    import trio

    if amount == 0:
        raise click.UsageError("nothing to stake: AMOUNT is 0")
    if request and amount is None and exposure is None:
        raise click.UsageError("--id names a request, and nothing is asked for: say AMOUNT or --exposure")
    owner = passwords.source(shared, "owner")
    data, text = trio.run(_stake, shared, owner, amount, exposure, chain, request)
    shared.output.result(data, text)


async def _stake(
    shared: Shared, owner: KeyFile, amount: int | None, exposure: int | None, name: str | None, request: str
) -> tuple[dict[str, Any], str]:
    from node.chain.stakes import Stakes
    from node.cli.start import transaction

    async with owner_chain(shared, owner, name) as chain:
        info = await chain.token_info(chain.token)
        once = chain.once(request)
        stakes, done = Stakes(once), []
        if amount is not None:
            missing = 0
            if not once.has_answered(request, "stake"):
                missing = await to_deposit(chain, info, amount, f"staking {info.show(amount)}")
            shared.output.say(
                f"staking {info.show(amount)} of {chain.account}"
                + (f", {info.show(missing)} of it deposited first" if missing else "")
                + f"; it comes back {await stakes.unbonding_seconds() // 86_400} days after `unstake`"
            )
            if missing:
                done += [result.sound() for result in await once.deposit(chain.token, missing)]
            done.append((await stakes.stake(chain.token, amount)).sound())
        if exposure is not None:
            shared.output.say(f"open jobs may hold up to {info.show(exposure)}")
            done.append((await stakes.expose(chain.token, exposure)).sound())
        stake = await stakes.of(chain.account, chain.token)
        now = (await chain.head()).timestamp
    data = {
        "owner": str(chain.account),
        "stake": stake_data(stake, info),
        "transactions": [transaction(result) for result in done],
    }
    return data, stake_text(stake, info, now)
