"""Attacks on Jobs and Disputes: batch jobs of all kinds, in any order, judged by hostile resolvers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from node.testing.attacker.crowd import (
    ANN,
    BOB,
    CLIENTS,
    CROWD,
    MALLORY,
    SESSION,
    WORKER,
    WORKERS,
    Dice,
    flaw_of,
    recovered,
)
from node.testing.contracts import config_tuple, quote_tuple, struct_tuple
from protocol import escrow
from protocol.escrow import Escrow, JobState, Outcome
from protocol.ids import UINT128_MAX, ZERO_ADDRESS, Hash32, JobId, ModelId, keccak256
from protocol.typed_data import Acceptance, Order, Quote, Receipt, Submission

if TYPE_CHECKING:
    from node.testing.attacker.attacker import Attacker

RESULTS = (Hash32(b"\7" * 32), Hash32(b"\x08" * 32), Hash32(b"\7" * 31 + b"\x08"))
NO_RESULTS = (Hash32(bytes(32)), Hash32((1).to_bytes(32)))
DAY = 86400


def new_quote(a: Attacker, dice: Dice) -> Quote:
    """Mostly one that can be opened."""
    now = a.now
    at_work = [hot for hot, worker in a.state.workers.items() if worker.active]
    quote = Quote(
        Hash32(keccak256(b"spec %d" % dice.randint(0, 2))),
        dice.choice((ANN, ANN, BOB, MALLORY)),
        dice.choice(at_work if at_work and dice.randint(0, 9) else WORKERS),
        dice.choice((a.tokens[0], *a.tokens)),
        dice.choice((1, 7, 99, 100, 301)),
        dice.choice((0, 1, 40, 100, 250)),
        now + dice.choice((1, 60, 600)),
        now + dice.choice((1, 60, 900, 3600, 3600, 86400)),
        dice.choice((900, 1800, 3600, DAY, 7 * DAY)),
        dice.choice((a.world.committee.address,) * 5 + (*a.resolvers, ZERO_ADDRESS, MALLORY)),
        Hash32(keccak256(b"salt %d" % dice.randint(0, 2**30))),
    )
    if dice.randint(0, 5) == 0:
        changes: tuple[dict[str, Any], ...] = (
            {"client": ZERO_ADDRESS},
            {"worker": ZERO_ADDRESS},
            {"amount": 0},
            {"amount": UINT128_MAX},
            {"penalty": UINT128_MAX},
            {"valid_before": now},
            {"deadline": now},
            {"deadline": now + 30 * DAY + 1},
            {"deadline": now + 30 * DAY},
            {"window": 899},
            {"window": 7 * DAY + 1},
        )
        quote = replace(quote, **dice.choice(changes))
    return quote


def pick(a: Attacker, dice: Dice, *states: JobState) -> Quote:
    """Mostly a job in one of these states."""
    if dice.randint(0, 9):
        found = [a.quotes[j] for j, job in a.state.jobs.items() if job.state in states and j in a.quotes]
        if found:
            return dice.choice(found)
    if a.quotes and dice.randint(0, 3):
        return dice.choice(list(a.quotes.values()))
    quote = new_quote(a, dice)
    a.add_quote(quote)
    return quote


def job_of(a: Attacker, quote: Quote) -> JobId:
    return quote.job_id(a.world.jobs_domain)


def open_job(a: Attacker, dice: Dice) -> None:
    quote = new_quote(a, dice)
    job_id = a.add_quote(quote)
    domain = a.world.jobs_domain
    flaw = flaw_of(dice)
    whose = dice.randint(0, 1)
    about = dice.choice(list(a.quotes.values())) if flaw == "about" else quote
    if flaw == "amount":
        about = replace(quote, penalty=quote.penalty ^ 1)
    theirs = about if flaw in ("about", "amount") else quote
    worker_signature = a.voices.sign(theirs if whose else quote, quote.worker, flaw if whose else "none", domain)
    ordered = JobId(theirs.digest(domain)) if not whose else job_id
    client_signature = a.voices.sign(Order(ordered), quote.client, "none" if whose else flaw, domain)
    sender = dice.choice((quote.client, MALLORY, *CLIENTS, WORKER))
    if quote.penalty and dice.randint(0, 3):
        sender = dice.choice((quote.worker, a.state.owner_of(quote.worker)))
    sender = sender if sender in CROWD else MALLORY
    worker_signer = recovered(quote, domain, worker_signature)
    client_signer = recovered(Order(job_id), domain, client_signature)
    a.step(
        sender,
        "Jobs.open",
        (quote_tuple(quote), worker_signature, client_signature),
        lambda s: escrow.open_job(s, a.now, sender, quote, worker_signer, client_signer),
        consent={quote.client} if quote.client in (sender, client_signer) else (),
        # Sent again by somebody else the order still counts, but then the sender is not the client.
        once=sender == quote.client,
    )


def submit(a: Attacker, dice: Dice) -> None:
    quote, flaw, domain = pick(a, dice, JobState.OPEN), flaw_of(dice), a.world.jobs_domain
    job_id = job_of(a, quote)
    result = dice.choice(RESULTS if dice.randint(0, 9) else NO_RESULTS)
    claimed = dice.choice((0, 1, quote.amount, quote.amount, quote.amount // 2, min(quote.amount + 1, UINT128_MAX)))
    if flaw == "time":
        a.maybe_wait(dice, quote.deadline)
    about = dice.choice(list(a.quotes)) if flaw == "about" else job_id
    struct = Submission(about, result, claimed ^ 1 if flaw == "amount" else claimed)
    signature = a.voices.sign(struct, quote.worker, flaw, domain)
    signer = recovered(Submission(job_id, result, claimed), domain, signature)
    sender = dice.choice((quote.worker, MALLORY, ANN))
    sender = sender if sender in CROWD else MALLORY
    model = lambda s: escrow.submit(s, a.now, sender, quote, result, claimed, signer)  # noqa: E731
    a.step(sender, "Jobs.submit", (quote_tuple(quote), result, claimed, signature), model)


def settle_job(a: Attacker, dice: Dice) -> None:
    quote, flaw, domain = pick(a, dice, JobState.SUBMITTED, JobState.OPEN), flaw_of(dice), a.world.jobs_domain
    job_id = job_of(a, quote)
    job = a.state.job(job_id)
    result = job.result_hash if dice.randint(0, 4) else dice.choice(RESULTS)
    if job.state is JobState.OPEN and dice.randint(0, 4):
        result = RESULTS[0]
    least = max(job.claimed - 1, 0)
    amount = dice.choice((quote.amount, quote.amount, job.claimed, least, min(quote.amount + 1, UINT128_MAX)))
    about = dice.choice(list(a.quotes)) if flaw == "about" else job_id
    struct = Acceptance(about, result, amount ^ 1 if flaw == "amount" else amount)
    signature = a.voices.sign(struct, quote.client, flaw, domain)
    signer = recovered(Acceptance(job_id, result, amount), domain, signature)
    sender = dice.choice((quote.client, MALLORY, WORKER))
    sender = sender if sender in CROWD else MALLORY
    model = lambda s: escrow.settle_job(s, a.now, sender, quote, result, amount, signer)  # noqa: E731
    a.step(sender, "Jobs.settle", (quote_tuple(quote), result, amount, signature), model)


def finalize(a: Attacker, dice: Dice) -> None:
    quote = pick(a, dice, JobState.SUBMITTED)
    a.maybe_wait(dice, a.state.job(job_of(a, quote)).window_end)
    model = lambda s: escrow.finalize(s, a.now, quote)  # noqa: E731
    a.step(dice.choice(CROWD), "Jobs.finalize", (quote_tuple(quote),), model)


def refund(a: Attacker, dice: Dice) -> None:
    quote, sender = pick(a, dice, JobState.OPEN), dice.choice(CROWD)
    a.maybe_wait(dice, quote.deadline)
    model = lambda s: escrow.refund(s, a.now, sender, quote)  # noqa: E731
    a.step(sender, "Jobs.refund", (quote_tuple(quote),), model, once=True)


def fail(a: Attacker, dice: Dice) -> None:
    quote = pick(a, dice, JobState.OPEN, JobState.SUBMITTED)
    sender = dice.choice((quote.worker, a.state.owner_of(quote.worker), MALLORY))
    sender = sender if sender in CROWD else MALLORY
    model = lambda s: escrow.fail(s, a.now, sender, quote)  # noqa: E731
    a.step(sender, "Jobs.fail", (quote_tuple(quote),), model)


# ------------------------------------------------------------------------------------------------------------ disputes


def open_dispute(a: Attacker, dice: Dice) -> None:
    quote = pick(a, dice, JobState.SUBMITTED)
    job_id = job_of(a, quote)
    sender = dice.choice((quote.client,) * 5 + (MALLORY, quote.worker))
    sender = sender if sender in CROWD else MALLORY
    if dice.randint(0, 5) == 0:
        a.maybe_wait(dice, a.state.job(job_id).window_end)
    evidence = RESULTS[1]
    if sender == quote.client and dice.randint(0, 15) == 0 and (rest := a.state.balance_of(quote.token, sender)):
        model = lambda s: escrow.withdraw(s, sender, quote.token, rest, sender)  # noqa: E731
        a.step(sender, "Vault.withdraw", (quote.token, rest, sender), model, consent={sender})
    gas = dice.choice((100_000, 300_000, 420_000, 470_000, 520_000, 600_000)) if dice.randint(0, 3) == 0 else None
    logs = a.step(
        sender,
        "Disputes.open",
        (quote_tuple(quote), evidence),
        lambda s: escrow.open_dispute(s, a.now, a.block, sender, quote, evidence),
        gas=gas,
        consent={sender} if sender == quote.client else (),
    )
    if logs is not None:
        took = next(v["resolverTook"] for name, v in a.evm.decode_events(logs) if name == "DisputeOpened")
        a.require(
            took == a.takes(quote.resolver), "a resolver was starved when the case began, or took what it can not"
        )
        a.quiet(quote.resolver)


def resolve_dispute(a: Attacker, dice: Dice) -> None:
    quote = pick(a, dice, JobState.DISPUTED)
    job_id = job_of(a, quote)
    if dice.randint(0, 3) == 0:
        a.maybe_wait(dice, a.state.case(job_id).reveal_ends or a.state.dispute(job_id).resolve_by)
    elif dice.randint(0, 9) == 0:
        a.maybe_wait(dice, a.state.dispute(job_id).resolve_by)
    gas = dice.choice((60_000, 120_000, 180_000, 260_000, 400_000)) if dice.randint(0, 3) == 0 else None
    model = lambda s: escrow.resolve_dispute(s, a.now, quote, a.says(s, quote))  # noqa: E731
    logs = a.step(dice.choice(CROWD), "Disputes.resolve", (quote_tuple(quote),), model, gas=gas)
    if logs is not None:
        a.outcomes["dispute", Outcome(a.state.dispute(job_id).outcome).name] += 1


def prove_equivocation(a: Attacker, dice: Dice) -> None:
    config, flaw, domain = dice.choice(a.good), flaw_of(dice), a.world.domain
    channel_id = config.channel_id(domain)
    zero = Hash32(bytes(32))
    rest = (ModelId(zero), zero, zero, zero, 1, 1)
    first = Receipt(JobId(zero), 0, channel_id, 1, *rest, dice.randint(0, 3), zero, 1, 2, 0)
    second = replace(first, cost=first.cost + dice.choice((0, 1)), sequence=first.sequence + (flaw == "amount"))
    if flaw == "about":
        second = replace(second, channel_id=dice.choice(a.good).channel_id(domain))
    by = dice.choice((config.receiver, config.receiver, config.receiver_authorizer, config.payer))
    signatures = (
        a.voices.sign(first, config.receiver, "none", domain),
        a.voices.sign(second, by, flaw, domain),
    )
    signers = (recovered(first, domain, signatures[0]), recovered(second, domain, signatures[1]))
    pair = [(first, signatures[0], signers[0]), (second, signatures[1], signers[1])]
    if dice.randint(0, 1):
        pair.reverse()
    (one, one_signature, one_signer), (two, two_signature, two_signer) = pair
    sender = dice.choice((ANN, MALLORY, SESSION))

    def model(s: Escrow) -> Escrow:
        return escrow.prove_equivocation(s, a.now, sender, config, one, one_signer, two, two_signer)

    args = (config_tuple(config), struct_tuple(one), one_signature, struct_tuple(two), two_signature)
    a.step(sender, "Disputes.proveEquivocation", args, model, once=True)


def resolver_mood(a: Attacker, dice: Dice) -> None:
    """Who judges changes its mind, breaks, or turns on the market from inside its call."""
    a.set_mood(dice, dice.choice(a.resolvers), dice.choice(list(Outcome)))
