"""`deploy`: put the contracts on a chain, and hand them over to their users."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli import passwords
from node.cli.assets import chain_option
from node.cli.main import Group, Shared
from node.cli.options import password_options
from node.cli.params import ADDRESS, AMOUNT
from protocol.ids import Address
from protocol.keys import PrivateKey

if TYPE_CHECKING:
    from node.chain.eth import Eth
    from node.chain.txs import TxSender

DAY = 24 * 3600
DEPLOYMENT = click.option(
    "--deployment",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="The file that `deploy contracts` wrote.",
)


def days(name: str, default: float, text: str, most: int = 60) -> Any:
    return click.option(name, type=click.FloatRange(0.05, most), default=default, show_default=True, help=text)


@click.group(cls=Group)
def command() -> None:
    """Put the contracts on a chain, and hand them over.

    For whoever starts a network; workers and clients only need its deployment file. Every command is signed and paid by the
    key `deployer` (`gristmill wallet new deployer`). docs/operators/network.md goes through it.
    """


@command.command()
@click.option("--chain-id", type=click.IntRange(1, 2**63 - 1), required=True, help="The chain that it must be.")
@click.option("--token", "tokens", type=ADDRESS, multiple=True, help="ERC-20 to allow; the first is the default token.")
@click.option("--seat-bond", type=AMOUNT, help="With a committee: what a juror's ticket costs, in the default token.")
@click.option(
    "--seats", type=click.IntRange(1, 1000), default=15, show_default=True, help="Jurors of a case, on average."
)
@click.option("--quorum", type=click.IntRange(1, 1000), default=8, show_default=True, help="Fewer votes are none.")
@days("--commit-days", 3, "Time to run the job and commit; the seed's 128 blocks are part of it.", 6)
@days("--reveal-days", 1, "Time to reveal after that.", 6)
@days("--leave-days", 21, "Between resigning and the bond.", 90)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The deployment file.")
@chain_option
@password_options
@click.pass_obj
def contracts(
    shared: Shared,
    chain_id: int,
    tokens: tuple[Address, ...],
    seat_bond: int | None,
    seats: int,
    quorum: int,
    commit_days: float,
    reveal_days: float,
    leave_days: float,
    out: Path,
    chain: str | None,
) -> None:
    """Deploy all contracts and seal the vault with its modules, for ever.

    Without --seat-bond there is no committee, and none can be added to this vault later.
    """
    import trio

    from node.chain.deploy import deploy
    from node.chain.deployment import Deployment
    from node.errors import ConfigError
    from node.ports import TxResult
    from protocol.escrow import CommitteeTerms

    if out.exists():
        raise click.UsageError(f"{out} is there already: a deployment file is never written over")
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder {out.absolute().parent} to write {out.name} to")
    committee = None
    if seat_bond is not None:
        # As the contract will: a refusal there comes after most of the gas is spent.
        windows = [round(DAY * span) for span in (commit_days, reveal_days, leave_days)]
        if seat_bond < 10 or quorum > seats or windows[2] < windows[0] + windows[1] + 7 * DAY:
            raise click.UsageError(
                "a committee needs a seat bond of at least 10, a quorum of at most the seats, and a leave delay of both "
                "windows and a week"
            )
        committee = CommitteeTerms(
            seat_bond=seat_bond,
            seats=seats,
            quorum=quorum,
            commit_window=windows[0],
            reveal_window=windows[1],
            leave_delay=windows[2],
        )
    deployer = passwords.unlock(shared, "deployer")

    async def run() -> tuple[Deployment, list[TxResult]]:
        async with _sender(shared, deployer, chain, chain_id) as (eth, sender):
            for token in tokens:
                if not await eth.code(token):
                    raise ConfigError(f"there is no contract at {token} to be a token", hint="check --token")
            return await deploy(sender, chain_id, tokens=tokens, committee=committee)

    made, steps = trio.run(run)
    made.save(out)
    data = {**made.describe(), "file": str(out), "gas_used": sum(step.gas_used for step in steps)}
    lines = [f"{name:<13}{value}" for name, value in made.describe().items() if name != "version"]
    shared.output.result(data, "\n".join([*lines, f"{'file':<13}{out}"]))


@command.command("hand-over")
@DEPLOYMENT
@click.option("--votes-to", type=ADDRESS, required=True, help="Gets the whole supply of votes, to hand out.")
@click.option("--guardian", type=ADDRESS, required=True, help="May pause deposits; best a wallet of several people.")
@days("--timelock-days", 2, "Between a decision and its execution.")
@days("--voting-delay-days", 1, "Between a proposal and the moment whose votes count.")
@days("--voting-days", 5, "Of voting.")
@click.option("--threshold", type=AMOUNT, default=10**24, show_default=True, help="Votes that a proposer needs.")
@click.option("--quorum-percent", type=click.IntRange(1, 100), default=4, show_default=True, help="Of the supply.")
@chain_option
@password_options
@click.pass_obj
def hand_over(
    shared: Shared,
    deployment: Path,
    votes_to: Address,
    guardian: Address,
    timelock_days: float,
    voting_delay_days: float,
    voting_days: float,
    threshold: int,
    quorum_percent: int,
    chain: str | None,
) -> None:
    """Give the vault's roles to a timelock under a governor, and to a guardian.

    Afterwards the deployer holds the admin's role only, and only until somebody runs `deploy accept`, after the delays.
    """
    import trio

    from node.chain import governance
    from node.chain.deployment import Deployment
    from node.ports import TxResult

    terms = governance.Terms(
        holder=votes_to,
        guardian=guardian,
        timelock_delay=round(DAY * timelock_days),
        voting_delay=round(DAY * voting_delay_days),
        voting_period=round(DAY * voting_days),
        threshold=threshold,
        quorum_percent=quorum_percent,
    )
    where = Deployment.load(deployment)
    deployer = passwords.unlock(shared, "deployer")

    async def run() -> tuple[governance.Governance, list[TxResult]]:
        async with _sender(shared, deployer, chain, where.chain_id) as (eth, sender):
            return await governance.hand_over(sender, eth, where.vault, terms)

    made, steps = trio.run(run)
    places = {"votes": str(made.token), "timelock": str(made.timelock), "governor": str(made.governor)}
    data = {**places, "gas_used": sum(step.gas_used for step in steps)}
    lines = [f"{name:<10}{value}" for name, value in data.items()]
    shared.output.result(data, "\n".join(lines))
    shared.output.say(
        f"after the delays anyone runs: gristmill deploy accept {made.timelock} --deployment {deployment}"
    )


@command.command()
@click.argument("timelock", type=ADDRESS)
@DEPLOYMENT
@chain_option
@password_options
@click.pass_obj
def accept(shared: Shared, timelock: Address, deployment: Path, chain: str | None) -> None:
    """The last step of a hand-over: TIMELOCK becomes the vault's admin. Anyone may send it, after the delays."""
    import trio

    from node.chain import governance
    from node.chain.deployment import Deployment
    from node.ports import TxResult

    where = Deployment.load(deployment)
    deployer = passwords.unlock(shared, "deployer")

    async def run() -> TxResult:
        async with _sender(shared, deployer, chain, where.chain_id) as (_, sender):
            return await governance.accept(sender, where.vault, timelock)

    result = trio.run(run)
    data = {"admin": str(timelock), "transaction": "0x" + result.hash.hex()}
    shared.output.result(data, f"the vault at {where.vault} belongs to the timelock {timelock}")


@asynccontextmanager
async def _sender(
    shared: Shared, deployer: PrivateKey, name: str | None, chain_id: int
) -> AsyncIterator[tuple[Eth, TxSender]]:
    """Raises `ConfigError` without a chain, `InsufficientFunds` without a coin for gas."""
    from node.config import DEFAULT
    from node.errors import ConfigError, InsufficientFunds
    from node.signer.bare import Bare
    from node.wiring import open_journal, open_sender

    chain = name or DEFAULT
    if not shared.config.chain_named(chain).rpc_urls:
        section = "chain" if chain == DEFAULT else f"chains.{chain}"
        raise ConfigError(f"no chain is configured: {section}.rpc_urls is empty", hint="set it to the URL of a node")
    with open_journal(shared.config, "deployer", deployer.address) as ledger:
        async with open_sender(shared.config, Bare(deployer), ledger, chain, chain_id) as (eth, sender):
            if not await eth.balance(deployer.address):
                raise InsufficientFunds(
                    f"the deployer's account {deployer.address} has nothing to pay gas with",
                    hint="send it some of the chain's coin",
                )
            yield eth, sender
