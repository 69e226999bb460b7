"""`juror`: a seat in the committee that judges disputes of batch jobs.

The juror is the key `owner`. Its votes are in the owner's journal: keep that with the key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from node.cli import passwords
from node.cli.assets import chain_option
from node.cli.main import Group, Shared
from node.cli.options import password_options, request_option
from node.cli.params import HASH
from node.config import DEFAULT
from protocol.ids import Hash32, JobId

if TYPE_CHECKING:
    from node.chain.client import EvmChain
    from node.chain.committee import EvmCommittee
    from node.juror import JurorAtWork, Tended
    from node.ports import TxResult
    from node.signer.sources import KeyFile

TICKETS = click.argument("tickets", type=click.IntRange(1, 1_000_000))
JOB = click.argument("job", metavar="JOB", type=HASH)


@click.group(cls=Group)
def command() -> None:
    """Sit in the committee that judges disputed batch jobs, with the key `owner`.

    A ticket is a bond. Each case draws some tickets; a drawn one that votes with the outcome shares the dispute's fee, one that
    commits and does not reveal loses a tenth of its bond. You run the job again yourself; how you get its documents is between
    you, the client and the worker.
    """


@command.command()
@TICKETS
@chain_option
@request_option
@password_options
@click.pass_obj
def enroll(shared: Shared, tickets: int, chain: str | None, request: str) -> None:
    """Buy TICKETS more tickets out of the owner's vault balance; what is missing there is deposited first."""
    import trio

    trio.run(_enroll, shared, passwords.source(shared, "owner"), tickets, chain, request)


@command.command()
@TICKETS
@chain_option
@request_option
@password_options
@click.pass_obj
def resign(shared: Shared, tickets: int, chain: str | None, request: str) -> None:
    """Give TICKETS tickets back. Their bond can be taken after a delay that outlasts every case they may sit in.

    Resigning again restarts the delay for all that is on its way.
    """
    import trio

    trio.run(_resign, shared, passwords.source(shared, "owner"), tickets, chain, request)


@command.command()
@chain_option
@password_options
@click.pass_obj
def withdraw(shared: Shared, chain: str | None) -> None:
    """Take the bond of tickets that were given back into the owner's vault balance, when its delay is over."""
    import trio

    trio.run(_withdraw, shared, passwords.source(shared, "owner"), chain)


@command.command()
@click.argument("job", metavar="[JOB]", type=HASH, required=False)
@chain_option
@click.pass_obj
def show(shared: Shared, job: Hash32 | None, chain: str | None) -> None:
    """Show the tickets, and the cases that are under way or were voted on; or one case. Needs no password."""
    import trio

    trio.run(_show, shared, None if job is None else JobId(job), chain or DEFAULT)


@command.command()
@JOB
@click.argument("verdict", type=click.Choice(["accept", "reject"]))
@click.option(
    "--result", type=HASH, help="SHA-256 of what your own run gave; by default, for reject, what was submitted."
)
@chain_option
@password_options
@click.pass_obj
def vote(shared: Shared, job: Hash32, verdict: str, result: Hash32 | None, chain: str | None) -> None:
    """Decide case JOB with all drawn tickets: accept: the client's challenge is right; reject: the worker's result is.

    The vote is kept on disk, then committed to under a secret; `juror tend` reveals it when the time has come, and must be run
    until then. A vote that a seat has committed to is final. As many of one as of the other is a draw.
    """
    import trio

    if not trio.run(_vote, shared, passwords.source(shared, "owner"), JobId(job), verdict, result, chain):
        raise click.exceptions.Exit(1)


@command.command()
@click.option(
    "--forfeit",
    is_flag=True,
    help="Also burn a tenth of a ticket's bond for every silent seat of others, never for our own; costs gas, pays nothing.",
)
@click.option(
    "--all", "everything", is_flag=True, help="Also cases voted on more than 90 days ago, if a fee is left there."
)
@chain_option
@password_options
@click.pass_obj
def tend(shared: Shared, forfeit: bool, everything: bool, chain: str | None) -> None:
    """Do what is due in the cases of the last 90 days: seal, commit, reveal, end the dispute, claim the fee. Safe to repeat; run
    it daily, and in every reveal window.
    """
    import trio

    if not trio.run(_tend, shared, passwords.source(shared, "owner"), chain, forfeit, everything):
        raise click.exceptions.Exit(1)


# ------------------------------------------------------------------------------------------------------------- pieces


@asynccontextmanager
async def _work(
    shared: Shared, owner: KeyFile, name: str | None
) -> AsyncIterator[tuple[EvmChain, EvmCommittee, JurorAtWork]]:
    from node.cli.staking import owner_books
    from node.juror import JurorAtWork
    from node.wiring import random32

    async with owner_books(shared, owner, name) as (books, chain):
        committee = _committee(chain)
        yield chain, committee, JurorAtWork(committee, books.ledger, chain.account, random32)


def _committee(chain: EvmChain) -> EvmCommittee:
    from node.chain.committee import EvmCommittee

    return EvmCommittee(chain)


async def _enroll(shared: Shared, owner: KeyFile, tickets: int, name: str | None, request: str) -> None:
    from node.cli.staking import days, to_deposit

    async with _work(shared, owner, name) as (chain, committee, _):
        terms = await committee.terms()
        info, once, done = await chain.token_info(terms.token), chain.once(request), list[Any]()
        bond = tickets * terms.seat_bond
        missing = 0
        if not once.has_answered(request, "enroll"):
            missing = await to_deposit(chain, info, bond, f"the bond of {tickets} tickets")
        shared.output.say(
            f"buying {tickets} tickets for {chain.account}: {info.show(bond)} of its vault balance become bond"
            + (f", {info.show(missing)} deposited first" if missing else "")
            + f"; it comes back {days(terms.leave_delay)} after `juror resign`, less what silence costs"
        )
        if missing:
            done += [result.sound() for result in await once.deposit(terms.token, missing)]
        done.append((await _committee(once).enroll(tickets)).sound())
        await _account(shared, chain, committee, done)


async def _resign(shared: Shared, owner: KeyFile, tickets: int, name: str | None, request: str) -> None:
    from node.cli.staking import days, moment
    from node.errors import ConfigError

    async with _work(shared, owner, name) as (chain, committee, _):
        terms, mine, once = await committee.terms(), await committee.juror(chain.account), chain.once(request)
        info, now = await chain.token_info(terms.token), (await chain.head()).timestamp
        if tickets > mine.tickets and not once.has_answered(request, "resign"):
            raise ConfigError(f"{chain.account} has {mine.tickets} tickets, not {tickets}")
        if mine.leaving and now < mine.free_at:
            shared.output.say(
                f"{info.show(mine.leaving)} are on their way already (until {moment(mine.free_at)}): their delay starts again"
            )
        shared.output.say(
            f"giving back {tickets} tickets of {chain.account}: {info.show(tickets * terms.seat_bond)} can be taken in "
            f"{days(terms.leave_delay)}"
        )
        await _account(shared, chain, committee, [(await _committee(once).resign(tickets)).sound()])


async def _withdraw(shared: Shared, owner: KeyFile, name: str | None) -> None:
    async with _work(shared, owner, name) as (chain, committee, _):
        mine, done = await committee.juror(chain.account), list[Any]()
        if mine.leaving and (await chain.head()).timestamp >= mine.free_at:
            info = await chain.token_info((await committee.terms()).token)
            shared.output.say(f"taking {info.show(mine.leaving)} of bond into the vault balance of {chain.account}")
            done.append((await committee.withdraw_bond()).sound())
        await _account(shared, chain, committee, done)


async def _vote(
    shared: Shared, owner: KeyFile, job_id: JobId, verdict: str, result: Hash32 | None, name: str | None
) -> bool:
    from protocol.escrow import Outcome

    async with _work(shared, owner, name) as (chain, committee, work):
        meaning = {
            "accept": "the challenge is right: everything goes back to the client, and the worker is slashed",
            "reject": "the result is right: the worker gets what it claimed",
        }
        shared.output.say(f"voting {verdict} on case {job_id}: {meaning[verdict]}")
        await work.vote(job_id, Outcome[verdict.upper()], result)
        return _report(shared, work, await work.tend(job_id, await _announcer(shared, chain, committee)))


async def _tend(shared: Shared, owner: KeyFile, name: str | None, forfeit: bool, everything: bool) -> bool:
    async with _work(shared, owner, name) as (chain, committee, work):
        announce, all_well = await _announcer(shared, chain, committee), True
        say = shared.output.say if forfeit else None
        for job_id in await work.cases(forfeit=forfeit, everything=everything):
            all_well &= _report(shared, work, await work.tend(job_id, announce, forfeit=say))
        return all_well


async def _show(shared: Shared, job_id: JobId | None, name: str) -> None:
    from node.cli.juror_text import case_data, case_text
    from node.juror import SLACK_S
    from node.store.ledger import Ledger
    from node.store.votes import votes
    from node.wiring import look_at_chain

    account, path = shared.keystore.address("owner"), shared.config.journal("owner")
    voted = {}
    if path.exists():
        with Ledger.open(path, chain_tag=bytes(account), read_only=True) as ledger:
            voted = votes(ledger)
    async with look_at_chain(shared.config, name) as chain:
        committee = _committee(chain)
        if job_id is None:
            terms = await committee.terms()
            cases = list(
                dict.fromkeys([*voted, *await committee.begun(terms.commit_window + terms.reveal_window + SLACK_S)])
            )
            await _account(shared, chain, committee, [], account)
        else:
            cases = [job_id]
        for one in cases:
            sight = await committee.sight(one, account)
            shared.output.row(case_data(sight, voted.get(one, [])), case_text(sight, voted.get(one, [])))


async def _account(
    shared: Shared, chain: EvmChain, committee: EvmCommittee, done: list[TxResult], account: Any = None
) -> None:
    from node.cli.juror_text import juror_data, juror_text
    from node.cli.start import transaction

    terms, who = await committee.terms(), account or chain.account
    mine, info = await committee.juror(who), await chain.token_info(terms.token)
    free, now = await chain.vault_balance(terms.token, who), (await chain.head()).timestamp
    data = {**juror_data(who, mine, terms, info, free), "transactions": [transaction(result) for result in done]}
    shared.output.result(data, juror_text(mine, terms, info, free, now))


async def _announcer(shared: Shared, chain: EvmChain, committee: EvmCommittee) -> Any:
    from node.cli.juror_text import will_do

    terms = await committee.terms()
    bond = (await chain.token_info(terms.token)).show(terms.seat_bond)

    async def announce(sight: Any, due: Any) -> None:
        shared.output.say(will_do(sight, due, bond))

    return announce


def _report(shared: Shared, work: JurorAtWork, tended: Tended) -> bool:
    """Whether all went well."""
    from node.cli.juror_text import case_data, case_text
    from node.cli.start import transaction

    for problem in tended.problems:
        shared.output.say(f"case {tended.sight.job_id}: {problem}")
    votes = work.votes(tended.sight.job_id)
    data = {
        **case_data(tended.sight, votes),
        "forfeited": [{"juror": str(juror), "ticket": ticket} for juror, ticket in tended.forfeited],
        "problems": tended.problems,
        "transactions": [{"ticket": due.ticket, **transaction(result)} for due, result in tended.done],
    }
    shared.output.row(data, case_text(tended.sight, votes))
    return not tended.problems
