"""`unstake`: the way out for a stake, in two steps with a delay between them."""

from __future__ import annotations

from typing import Any

import click

from node.cli import passwords
from node.cli.assets import chain_option
from node.cli.main import Command, Shared
from node.cli.options import password_options, request_option
from node.cli.params import AMOUNT
from node.cli.staking import moment, owner_chain, stake_data, stake_text
from node.signer.sources import KeyFile


@click.command(cls=Command)
@click.argument("amount", type=AMOUNT, required=False)
@chain_option
@request_option
@password_options
@click.pass_obj
def command(shared: Shared, amount: int | None, chain: str | None, request: str) -> None:
    """Start the way out for AMOUNT (smallest unit) of the stake; without AMOUNT take home what is ready.

    What is on its way can still be slashed until it is taken. Naming another AMOUNT restarts the delay for all that is on
    its way. What comes home lands in the owner's vault balance.
    """
    import trio

    if amount == 0:
        raise click.UsageError("nothing to unstake: AMOUNT is 0")
    if request and amount is None:
        raise click.UsageError("--id names one request: say which AMOUNT (taking home is safe to repeat without it)")
    owner = passwords.source(shared, "owner")
    data, text = trio.run(_unstake, shared, owner, amount, chain, request)
    shared.output.result(data, text)


async def _unstake(
    shared: Shared, owner: KeyFile, amount: int | None, name: str | None, request: str
) -> tuple[dict[str, Any], str]:
    from node.chain.stakes import Stakes
    from node.cli.start import transaction
    from node.errors import InsufficientFunds

    async with owner_chain(shared, owner, name) as chain:
        once = chain.once(request)
        info, stakes, done = await chain.token_info(chain.token), Stakes(once), []
        stake = await stakes.of(chain.account, chain.token)
        now = (await chain.head()).timestamp
        note = ""
        if amount is not None:
            again = bool(request) and once.has_answered(request, "unstake")
            if amount > stake.active and not again:
                raise InsufficientFunds(
                    f"{info.show(stake.active)} are staked, not {info.show(amount)}", hint="gristmill stake shows it"
                )
            if stake.unbonding and now < stake.free_at and not again:
                shared.output.say(
                    f"{info.show(stake.unbonding)} are on their way already (until {moment(stake.free_at)}): "
                    "their delay starts again"
                )
            days = await stakes.unbonding_seconds() // 86_400
            shared.output.say(
                f"{info.show(amount)} of {chain.account}'s stake start their way out; they can be taken home {days} days "
                "later, and slashed until then"
            )
            done.append((await stakes.unstake(chain.token, amount)).sound())
        elif stake.withdrawable and now >= stake.free_at:
            shared.output.say(f"taking {info.show(stake.withdrawable)} home into the vault balance of {chain.account}")
            done.append((await stakes.withdraw(chain.token)).sound())
            note = f"taken home  {info.show(stake.withdrawable)}, now in the owner's vault balance\n"
        elif not stake.unbonding:
            note = "nothing is on its way out\n"
        elif now < stake.free_at:
            note = f"nothing is ready before {moment(stake.free_at)}\n"
        else:
            note = "open jobs or recent earnings still lock what has come free\n"
        stake = await stakes.of(chain.account, chain.token)
    data = {
        "owner": str(chain.account),
        "stake": stake_data(stake, info),
        "transactions": [transaction(result) for result in done],
    }
    return data, note + stake_text(stake, info, now)
