"""`slash`: penalties of workers, between the verdict and the money."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli import passwords
from node.cli.assets import chain_option
from node.cli.main import Group, Shared
from node.cli.options import password_options, request_option
from node.cli.params import ADDRESS
from node.config import DEFAULT
from protocol.ids import Address

if TYPE_CHECKING:
    from node.chain.client import EvmChain
    from node.ports import TokenInfo, TxResult
    from protocol.escrow import Slash

ID = click.IntRange(1, 2**63 - 1)
KEYS = click.Choice(["payer", "owner"])
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
LAST = click.option(
    "--last", type=click.IntRange(1), default=1000, show_default=True, help="Look at so many, newest first."
)


@click.group(cls=Group)
def command() -> None:
    """Penalties of workers: see them, move them when they are due, prove what is due, cancel as a guardian.

    A broken word books a slash of the owner's stake. For a week a guardian may cancel it; after that anybody may move it: half
    goes to the victim, a quarter to the reporter, the rest is burnt. A client moves what is due to it for its jobs by itself,
    whenever it runs (client.slash_min says from which share on).
    """


@command.command("list")
@click.option("--account", "accounts", type=ADDRESS, multiple=True, help="Instead of the keys of this data dir.")
@click.option("--all", "everybody", is_flag=True, help="Those of everybody.")
@LAST
@chain_option
@click.pass_obj
def list_(shared: Shared, accounts: tuple[Address, ...], everybody: bool, last: int, chain: str | None) -> None:
    """List the slashes in which a key here is owner, victim or reporter, newest last. Needs no password."""
    import trio

    store = shared.keystore
    ours = set(accounts) or {store.address(name) for name in store.names()}
    trio.run(_list, shared, ours, everybody, last, chain or DEFAULT)


@command.command()
@click.argument("number", metavar="[ID]", type=ID, required=False)
@click.option("--key", type=KEYS, default="payer", show_default=True, help="Who pays.")
@LAST
@chain_option
@password_options
@click.pass_obj
def move(shared: Shared, number: int | None, key: str, last: int, chain: str | None) -> None:
    """Pay out slash ID; without ID all that are due and of which the key gets a share.

    Each share lands in its account's vault balance, whoever sends the transaction. What has moved is not moved again. What is
    refused is told, and the others are moved all the same.
    """
    import trio

    if not trio.run(_move, shared, number, key, last, chain):
        raise click.exceptions.Exit(1)


@command.command()
@click.argument("number", metavar="ID", type=ID)
@click.option(
    "--key", type=click.Choice(["owner", "deployer"]), default="owner", show_default=True, help="The guardian's key."
)
@chain_option
@request_option
@password_options
@click.pass_obj
def cancel(shared: Shared, number: int, key: str, chain: str | None, request: str) -> None:
    """As a guardian of the vault, before it moves: give slash ID back to the owner's stake, and to nobody else."""
    import trio

    trio.run(_cancel, shared, number, key, chain, request)


@command.command()
@click.argument("first", type=FILE, required=False)
@click.argument("second", type=FILE, required=False)
@click.option("--key", type=KEYS, default="payer", show_default=True, help="Who reports, with two files.")
@chain_option
@password_options
@click.pass_obj
def prove(shared: Shared, first: Path | None, second: Path | None, key: str, chain: str | None) -> None:
    """Convict a worker that signed two different receipts with one number: its key is retired for ever, its owner slashed.

    Without files every contradiction in this client's journal is proved. FIRST and SECOND are receipts of anybody's, as
    `chat --json` prints them in its last line; half of the slash is for the channel's payer, a quarter for who reports.
    """
    import trio

    from node.cli import slash_prove

    if first is None:
        if key != "payer":
            raise click.UsageError("the journal is the payer's: --key is for two files")
        trio.run(slash_prove.from_journal, shared, chain)
    elif second is None:
        raise click.UsageError("one receipt contradicts nothing: name two files, or none")
    else:
        trio.run(slash_prove.from_files, shared, first, second, key, chain)


# ------------------------------------------------------------------------------------------------------------- pieces


async def _list(shared: Shared, ours: set[Address], everybody: bool, last: int, name: str) -> None:
    from node.wiring import look_at_chain

    async with look_at_chain(shared.config, name) as chain:
        now, infos = (await chain.head()).timestamp, dict[Address, Any]()
        for slash_id, slash in await _newest(chain, last):
            if everybody or ours & {slash.owner, slash.victim, slash.reporter}:
                info = infos[slash.token] = infos.get(slash.token) or await chain.token_info(slash.token)
                shared.output.row(slash_data(slash_id, slash, info), slash_text(slash_id, slash, info, now, ours))


async def _move(shared: Shared, number: int | None, key: str, last: int, name: str | None) -> bool:
    """Whether all went well. Raises what is wrong with the one that was asked for."""
    from node.cli.start import transaction
    from node.errors import ChainError, SignerError
    from protocol.escrow import SlashState
    from protocol.slashing import is_due, share_for

    async with as_key(shared, key, name) as chain:
        head = (await chain.head()).timestamp
        done: list[TxResult] = []
        problems: list[str] = []
        if number is None:
            found = [
                one for one in await _newest(chain, last) if is_due(one[1], head) and share_for(one[1], chain.account)
            ]
        else:
            found = [(number, _there(number, await chain.slashes.get(number)))]
        for slash_id, slash in found:
            if slash.state is SlashState.MOVED:
                continue
            try:
                done += await _move_one(shared, chain, slash_id, slash, head)
            except (ChainError, SignerError) as error:
                if number is not None:
                    raise
                problems.append(f"slash {slash_id}: {error}")
                shared.output.say(problems[-1])
        rows = [(n, await chain.slashes.get(n)) for n, _ in found]
        shown = [(n, slash, await chain.token_info(slash.token)) for n, slash in rows]
        data = {
            "slashes": [slash_data(*one) for one in shown],
            "problems": problems,
            "transactions": [transaction(result) for result in done],
        }
        text = "\n".join(slash_text(*one, head, {chain.account}) for one in shown)
        shared.output.result(data, text or "nothing that is due has a share for this key")
        return not problems


async def _move_one(shared: Shared, chain: EvmChain, slash_id: int, slash: Slash, head: int) -> list[TxResult]:
    from protocol.escrow import SlashState

    info = await chain.token_info(slash.token)
    _check_due(slash_id, slash, head)
    shared.output.say(f"moving slash {slash_id}: {_who_gets(slash, info, {chain.account})}")
    result = await chain.slashes.move(slash_id)
    if not result.ok and (await chain.slashes.get(slash_id)).state is SlashState.MOVED:  # somebody was first
        return []
    return [result.sound()]


async def _cancel(shared: Shared, number: int, key: str, name: str | None, request: str) -> None:
    from node.cli.start import transaction
    from node.errors import ChainError
    from protocol.escrow import SlashState

    async with as_key(shared, key, name) as chain:
        slash = _there(number, await chain.slashes.get(number))
        info, done = await chain.token_info(slash.token), []
        if slash.state is not SlashState.CANCELLED:
            if slash.state is SlashState.MOVED:
                raise ChainError(f"slash {number} has moved", hint="gristmill slash list --all")
            if not await chain.slashes.is_guardian(chain.account):
                raise ChainError(
                    f"{chain.account} is no guardian of this vault",
                    hint="the guardian is who `gristmill deploy hand-over` named; import its key as `owner`",
                )
            shared.output.say(
                f"cancelling slash {number}: {info.show(slash.amount)} go back to the stake of {slash.owner}"
            )
            done.append((await chain.once(request).slashes.cancel(number)).sound())
            slash = await chain.slashes.get(number)
        now = (await chain.head()).timestamp
    data = {"slash": slash_data(number, slash, info), "transactions": [transaction(result) for result in done]}
    shared.output.result(data, slash_text(number, slash, info, now, set()))


@asynccontextmanager
async def as_key(shared: Shared, key: str, name: str | None) -> AsyncIterator[EvmChain]:
    """The chain of this name as the account of a key, with that account's journal."""
    from node.cli.connected import connected
    from node.cli.staking import owner_chain
    from node.signer.bare import Bare
    from node.wiring import open_chain, open_journal

    if key == "owner":
        async with owner_chain(shared, passwords.source(shared, "owner"), name) as chain:
            yield chain
    elif key == "payer":
        async with connected(shared, online=False) as client:
            yield client.wallet.chains.named(name or DEFAULT)  # type: ignore[misc]
    else:
        deployer = passwords.unlock(shared, "deployer")
        with open_journal(shared.config, "deployer", deployer.address) as ledger:
            async with open_chain(shared.config, Bare(deployer), ledger, name or DEFAULT) as chain:
                yield chain


async def _newest(chain: EvmChain, last: int) -> list[tuple[int, Slash]]:
    """The last slashes, oldest first."""
    from node.chain.slashes import newest, page_below, read

    first = await newest(chain.slashes)
    lowest, found = max(1, first - last + 1), list[tuple[int, Any]]()
    while first >= lowest:
        found += await read(chain.slashes, page_below(first, lowest))
        first = found[-1][0] - 1
    return found[::-1]


def _there(slash_id: int, slash: Slash) -> Slash:
    from node.errors import ChainError
    from protocol.escrow import SlashState

    if slash.state is SlashState.NONE:
        raise ChainError(f"there is no slash {slash_id}", hint="gristmill slash list --all")
    return slash


def _check_due(slash_id: int, slash: Slash, head: int) -> None:
    from node.cli.staking import moment
    from node.errors import ChainError
    from protocol.escrow import SlashState

    if slash.state is SlashState.CANCELLED:
        raise ChainError(f"slash {slash_id} was cancelled by a guardian", hint="it went back to the owner's stake")
    if head < slash.moves_at:
        raise ChainError(
            f"slash {slash_id} can not be moved before {moment(slash.moves_at)}",
            hint="until then a guardian may cancel it",
        )


def slash_data(slash_id: int, slash: Slash, info: TokenInfo) -> dict[str, Any]:
    from protocol.slashing import shares_of

    shares = shares_of(slash)
    return {
        "id": slash_id,
        "state": slash.state,
        "amount": str(slash.amount),
        "token": str(slash.token),
        "symbol": info.symbol,
        "decimals": info.decimals,
        "owner": str(slash.owner),
        "victim": str(slash.victim),
        "to_victim": str(shares.victim),
        "reporter": str(slash.reporter),
        "to_reporter": str(shares.reporter),
        "burnt": str(shares.burnt),
        "moves_at": slash.moves_at,
        "cause": slash.cause,
    }


def slash_text(slash_id: int, slash: Slash, info: TokenInfo, now: int, ours: Iterable[Address]) -> str:
    from node.cli.staking import moment
    from protocol.escrow import SlashState

    when = {
        SlashState.BOOKED: "can be moved now" if now >= slash.moves_at else f"moves from {moment(slash.moves_at)} on",
        SlashState.MOVED: "has moved",
        SlashState.CANCELLED: "was cancelled: it went back to the owner's stake",
    }
    return (
        f"slash {slash_id}: {info.show(slash.amount)} of the stake of {slash.owner}, {when.get(slash.state, 'unknown')}\n"
        f"  {_who_gets(slash, info, ours)}; for {slash.cause}"
    )


def _who_gets(slash: Slash, info: TokenInfo, ours: Iterable[Address]) -> str:
    from protocol.slashing import shares_of

    shares, parts = shares_of(slash), []
    for account, amount, role in (
        (slash.victim, shares.victim, "victim"),
        (slash.reporter, shares.reporter, "reporter"),
    ):
        if amount:
            parts.append(f"{info.show(amount)} to the {role} {account}{' (ours)' if account in set(ours) else ''}")
    return ", ".join([*parts, f"{info.show(shares.burnt)} burnt"])
