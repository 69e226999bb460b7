"""I9, I12: paused, without anybody's goodwill, time and calls empty every lock.

What needs no key is done by a stranger. The rest are the ways out of those whose money it is, by their own hand. What is
left to do is read from the contracts, not from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from node.testing.attacker.crowd import CROWD, MALLORY
from node.testing.contracts import config_tuple, quote_tuple
from protocol import escrow
from protocol.escrow import Escrow, JobState, Module, Outcome, SeatState, SlashState
from protocol.escrow.workers import EARNINGS_WINDOW
from protocol.ids import Address

if TYPE_CHECKING:
    from node.testing.attacker.attacker import Attacker

BLOCK_GAS = 2**24
"""The most that a transaction may use (EIP-7825)."""


def drain(a: Attacker) -> None:
    """Raises `Disagreement` when something stays locked."""
    a.evm.gas_limit = BLOCK_GAS
    a.numbers.read(full=True)
    a.step(a.world.admin, "Vault.setPaused", (True,), lambda s: escrow.set_paused(s, True))
    for way_out in (_jobs, _disputes, _channels, _earnings, _slashes, _seats, _jurors, _stakes, _balances):
        way_out(a)
    changed = {kind for kind, _ in a.numbers.read(full=True)} - {"locked stake"}
    a.require(not changed, "I6: what had ended changed after all", str(sorted(changed)))
    for token in a.tokens:
        for module in Module:
            left = a.numbers.values["locked", (module, token)][0]
            a.require(left == 0, f"I12: {module.name} still holds something", str(left))
        nobodys = sum(_balance(a, token, who) for who in a.accounts if who not in CROWD)
        a.require(a.numbers.values["liabilities", token][0] == nobodys, "I12: something stayed in the vault")
        a.require(_balance(a, token, a.world.committee.address) == 0, "I11: a fee was not shared out whole")


def _balance(a: Attacker, token: Address, who: Address) -> int:
    return a.numbers.values["balance", (token, who)][0]


def _must(
    a: Attacker, sender: Address, call: str, args: tuple[Any, ...], model: Callable[[Escrow], Escrow], at: int = 0
) -> None:
    """Done at `at`, and tried a second before, when only what was decided by then may end."""
    consent = {sender, a.world.committee.address}
    if at > a.now:
        a.wait_until(at - 1)
        if a.step(sender, call, args, model, consent=consent) is not None:
            return
        a.wait_until(at)
    logs = a.step(sender, call, args, model, consent=consent)
    a.require(logs is not None, f"I12: {call} is no way out", a.trace[-1].outcome)


def _jobs(a: Attacker) -> None:
    """Open ones are refunded, submitted ones finalized."""
    for job_id, words in list(a.numbers.of("job").items()):
        quote = a.quotes[job_id]
        args = (quote_tuple(quote),)
        if words[0] == JobState.OPEN:
            model = lambda s, q=quote: escrow.refund(s, a.now, MALLORY, q)  # noqa: E731
            _must(a, MALLORY, "Jobs.refund", args, model, quote.deadline)
        elif words[0] == JobState.SUBMITTED:
            model = lambda s, q=quote: escrow.finalize(s, a.now, q)  # noqa: E731
            _must(a, MALLORY, "Jobs.finalize", args, model, words[1])


def _disputes(a: Attacker) -> None:
    """By what the resolver said in time, or by its silence."""
    for job_id, words in list(a.numbers.of("job").items()):
        if words[0] == JobState.DISPUTED:
            quote = a.quotes[job_id]
            at = a.numbers.values["dispute", job_id][1]
            model = lambda s, q=quote: escrow.resolve_dispute(s, a.now, q, a.says(s, q))  # noqa: E731
            _must(a, MALLORY, "Disputes.resolve", (quote_tuple(quote),), model, at)


def _channels(a: Attacker) -> None:
    for channel_id, words in list(a.numbers.of("channel").items()):
        config = a.configs[channel_id]
        args = (config_tuple(config),)
        if not words[0] or words[3]:
            continue
        if not words[2]:
            model = lambda s, c=config: escrow.initiate_withdraw(s, a.now, c.payer, c)  # noqa: E731
            _must(a, config.payer, "Channels.initiateWithdraw", args, model)
        at = a.numbers.values["channel", channel_id][2]
        model = lambda s, c=config: escrow.finalize_withdraw(s, a.now, c)  # noqa: E731
        _must(a, MALLORY, "Channels.finalizeWithdraw", args, model, at)
    for (receiver, token), words in list(a.numbers.of("owed").items()):
        if words[0]:
            model = lambda s, r=receiver, t=token: escrow.settle(s, a.now, r, t)  # noqa: E731
            _must(a, MALLORY, "Channels.settle", (receiver, token), model)


def _earnings(a: Attacker) -> None:
    """What was paid just now locks to the last second of the next window."""
    end = (a.now // EARNINGS_WINDOW + 2) * EARNINGS_WINDOW
    for moment in (end - 1, end):
        a.wait_until(moment)
        a.look()


def _slashes(a: Attacker) -> None:
    for slash_id, words in list(a.numbers.of("slash").items()):
        if words[6] == SlashState.BOOKED:
            model = lambda s, n=slash_id: escrow.move_slash(s, a.now, n)  # noqa: E731
            _must(a, MALLORY, "Workers.moveSlash", (slash_id,), model, words[5])


def _seats(a: Attacker) -> None:
    """Silent ones are forfeited by a stranger, those that won take their share of the fee."""
    for (job_id, juror, ticket), words in list(a.numbers.of("seat").items()):
        quote, dispute = a.quotes[job_id], a.numbers.values["dispute", job_id]
        if words[1] == SeatState.COMMITTED:
            at = a.numbers.values["case", job_id][3]
            model = lambda s, k=(job_id, juror, ticket): escrow.forfeit(s, a.now, a.block, *k)  # noqa: E731
            _must(a, MALLORY, "Committee.forfeit", (job_id, juror, ticket), model, at)
        elif dispute[4] and escrow.wins(SeatState(words[1]), Outcome(dispute[3])):
            model = lambda s, j=juror, q=quote, t=ticket: escrow.claim_fee(s, j, q, t)  # noqa: E731
            _must(a, juror, "Committee.claimFee", (quote_tuple(quote), ticket), model)


def _jurors(a: Attacker) -> None:
    for juror, words in list(a.numbers.of("juror").items()):
        if words[0]:
            model = lambda s, j=juror, n=words[0]: escrow.resign(s, a.now, a.block, j, n)  # noqa: E731
            _must(a, juror, "Committee.resign", (words[0],), model)
    for juror, words in list(a.numbers.of("juror").items()):
        if words[1]:
            model = lambda s, j=juror: escrow.withdraw_bond(s, a.now, j)  # noqa: E731
            _must(a, juror, "Committee.withdrawBond", (), model, words[2])


def _stakes(a: Attacker) -> None:
    for (owner, token), words in list(a.numbers.of("stake").items()):
        if words[0]:
            model = lambda s, o=owner, t=token, n=words[0]: escrow.unstake(s, a.now, o, t, n)  # noqa: E731
            _must(a, owner, "Workers.unstake", (token, words[0]), model)
    for (owner, token), words in list(a.numbers.of("stake").items()):
        if words[1]:
            model = lambda s, o=owner, t=token: escrow.withdraw_stake(s, a.now, o, t)  # noqa: E731
            _must(a, owner, "Workers.withdrawStake", (token,), model, words[4])


def _balances(a: Attacker) -> None:
    for (token, person), words in list(a.numbers.of("balance").items()):
        if person in CROWD and words[0]:
            model = lambda s, p=person, t=token, n=words[0]: escrow.withdraw(s, p, t, n, p)  # noqa: E731
            _must(a, person, "Vault.withdraw", (token, words[0], person), model)
