"""I9, I12: paused, without anybody's goodwill, time and calls empty every lock.

What needs no key is done by a stranger. The rest are the ways out of those whose money it is, by their own hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.testing.attacker.crowd import CROWD, JURORS, MALLORY, WORKERS
from node.testing.attacker.invariants import LIVE
from node.testing.contracts import config_tuple, quote_tuple
from protocol import escrow
from protocol.escrow import Escrow, JobState, Module, SeatState, SlashState
from protocol.escrow.workers import EARNINGS_WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.testing.attacker.attacker import Attacker
    from protocol.ids import Address

BLOCK_GAS = 2**24
"""The most that a transaction may use (EIP-7825)."""


def drain(a: Attacker) -> None:
    """Raises `Disagreement` when something stays locked."""
    a.evm.gas_limit = BLOCK_GAS
    a.step(a.world.admin, "Vault.setPaused", (True,), lambda s: escrow.set_paused(s, True))
    _jobs(a)
    _channels(a)
    _slashes(a)
    _committee(a)
    _stakes(a)
    for token in a.tokens:
        for module in Module:
            left = a.numbers.values["locked", (module, token)][0]
            a.require(left == 0, f"I12: {module.name} still holds {left}")
        for person in CROWD:
            if balance := a.state.balance_of(token, person):
                _must(a, person, "Vault.withdraw", (token, balance, person), _withdraw(person, token, balance))
        nobodys = sum(a.state.balance_of(token, who) for who in a.accounts if who not in CROWD)
        a.require(a.numbers.values["liabilities", token][0] == nobodys, "I12: something stayed in the vault")
        at_home = a.state.balance_of(token, a.world.committee.address)
        a.require(at_home == 0 or a.unclaimed(token), "I11: fees of a case were not shared out whole")


def _must(a: Attacker, sender: Address, call: str, args: tuple[object, ...], model: Callable[[Escrow], Escrow]) -> None:
    logs = a.step(sender, call, args, model, consent={sender})
    a.require(logs is not None, f"I12: {call} is no way out: {a.trace[-1][-1]}")


def _withdraw(person: Address, token: Address, balance: int) -> Callable[[Escrow], Escrow]:
    return lambda s: escrow.withdraw(s, person, token, balance, person)


def _jobs(a: Attacker) -> None:
    """Open ones are refunded, submitted ones finalized, disputed ones end by silence or by what the resolver said."""
    live = [(j, a.quotes[j]) for j, job in a.state.jobs.items() if job.state in LIVE]
    for job_id, quote in live:
        args, job = (quote_tuple(quote),), a.state.job(job_id)
        if job.state is JobState.OPEN:
            a.wait_until(quote.deadline)
            _must(a, MALLORY, "Jobs.refund", args, lambda s, q=quote: escrow.refund(s, a.now, MALLORY, q))
        elif job.state is JobState.SUBMITTED:
            a.wait_until(job.window_end)
            _must(a, MALLORY, "Jobs.finalize", args, lambda s, q=quote: escrow.finalize(s, a.now, q))
    for job_id, quote in live:
        if a.state.job(job_id).state is JobState.DISPUTED:
            a.wait_until(a.state.dispute(job_id).resolve_by)
            model = lambda s, q=quote: escrow.resolve_dispute(s, a.now, q, a.says(s, q))  # noqa: E731
            _must(a, MALLORY, "Disputes.resolve", (quote_tuple(quote),), model)


def _channels(a: Attacker) -> None:
    for config in a.good:
        args, channel_id = (config_tuple(config),), config.channel_id(a.world.domain)
        channel = a.state.channel(channel_id)
        if not channel.allocated or channel.closed:
            continue
        if not channel.withdraw_at:
            model = lambda s, c=config: escrow.initiate_withdraw(s, a.now, c.payer, c)  # noqa: E731
            _must(a, config.payer, "Channels.initiateWithdraw", args, model)
        a.wait_until(a.state.channel(channel_id).withdraw_at)
        model = lambda s, c=config: escrow.finalize_withdraw(s, a.now, c)  # noqa: E731
        _must(a, MALLORY, "Channels.finalizeWithdraw", args, model)
    for receiver in WORKERS:
        for token in a.tokens:
            if a.state.owed_to(receiver, token):
                model = lambda s, r=receiver, t=token: escrow.settle(s, a.now, r, t)  # noqa: E731
                _must(a, MALLORY, "Channels.settle", (receiver, token), model)


def _slashes(a: Attacker) -> None:
    for slash_id, slash in list(a.state.slashes.items()):
        if slash.state is SlashState.BOOKED:
            a.wait_until(slash.moves_at)
            model = lambda s, n=slash_id: escrow.move_slash(s, a.now, n)  # noqa: E731
            _must(a, MALLORY, "Workers.moveSlash", (slash_id,), model)


def _committee(a: Attacker) -> None:
    for (job_id, juror, ticket), seat in list(a.state.seats.items()):
        quote, dispute = a.quotes[job_id], a.state.dispute(job_id)
        if seat.state is SeatState.COMMITTED:
            a.wait_until(a.state.case(job_id).reveal_ends)
            model = lambda s, k=(job_id, juror, ticket): escrow.forfeit(s, a.now, a.block, *k)  # noqa: E731
            _must(a, MALLORY, "Committee.forfeit", (job_id, juror, ticket), model)
        elif dispute.fee and escrow.wins(seat.state, dispute.outcome):
            model = lambda s, j=juror, q=quote, t=ticket: escrow.claim_fee(s, j, q, t)  # noqa: E731
            args = (quote_tuple(quote), ticket)
            a.require(
                a.step(juror, "Committee.claimFee", args, model, consent={a.world.committee.address}) is not None,
                "I9: a fee can not be claimed",
            )
    for juror in (*JURORS, MALLORY):
        if tickets := a.state.juror(juror).tickets:
            model = lambda s, j=juror, n=tickets: escrow.resign(s, a.now, a.block, j, n)  # noqa: E731
            _must(a, juror, "Committee.resign", (tickets,), model)
    for juror in (*JURORS, MALLORY):
        if a.state.juror(juror).leaving:
            a.wait_until(a.state.juror(juror).free_at)
            _must(a, juror, "Committee.withdrawBond", (), lambda s, j=juror: escrow.withdraw_bond(s, a.now, j))


def _stakes(a: Attacker) -> None:
    for owner, token in list(a.state.stakes):
        if active := a.state.stake_of(owner, token).active:
            model = lambda s, o=owner, t=token, n=active: escrow.unstake(s, a.now, o, t, n)  # noqa: E731
            _must(a, owner, "Workers.unstake", (token, active), model)
    a.wait_until((a.now // EARNINGS_WINDOW + 2) * EARNINGS_WINDOW)  # what was paid just now still locks
    for owner, token in list(a.state.stakes):
        if a.state.stake_of(owner, token).unbonding:
            a.wait_until(a.state.stake_of(owner, token).free_at)
            model = lambda s, o=owner, t=token: escrow.withdraw_stake(s, a.now, o, t)  # noqa: E731
            _must(a, owner, "Workers.withdrawStake", (token,), model)
