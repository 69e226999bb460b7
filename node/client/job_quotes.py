"""Asking workers for quotes of a batch job, best first, and holding each answer against what was asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from node.errors import InsufficientFunds, NodeError, NoWorker, Refused, VerificationFailed, WorkerFault
from node.network.drive import converse
from node.store.batch_keeper import JobsChain
from protocol.batch import QUOTE_LIFE
from protocol.errors import RefusalReason, RemoteProtocolError
from protocol.escrow import most_beside_bond
from protocol.ids import ZERO_ADDRESS, Address, PeerId
from protocol.keys import require_signer
from protocol.messages import (
    BATCH_PROTOCOL,
    BatchRefusal,
    ChatMessage,
    QuoteMessage,
    RequestQuote,
    amount_to_wire,
    quote_from_wire,
)
from protocol.offers import Asset, ModelOffer
from protocol.pricing import Price
from protocol.selection import Candidate, Policy
from protocol.typed_data import Domain, Quote
from protocol.workload import BatchSpec, Terms, Wish, check_quote, content_hash

if TYPE_CHECKING:
    from node.client.client import Client

log = logging.getLogger(__name__)
QUOTE_S: Final = 120.0
"""A worker tokenises megabytes before it answers, one asker after the other."""
Count = Callable[[ModelOffer, Sequence[ChatMessage], int], tuple[int, bool]]
"""Prompt tokens of messages, and whether that is exact or an upper bound."""


@dataclass(frozen=True, slots=True)
class JobWish:
    """What a job should be like. Seconds are from now on."""

    reward: int | None = None
    """The most that it may cost, smallest unit; None: whatever the best offer asks, as far as the vault reaches."""
    asset: Asset | None = None
    """To be paid in this; None: what we pay with first when there is a reward, else anything that we pay with."""
    deadline_s: int = 3600
    window_s: int = 900
    resolver: Address = ZERO_ADDRESS
    min_penalty: int = 0
    open_s: float = 90.0
    """How long to wait for the worker to open it."""

    def against(self, quote: Quote, domain: Domain) -> list[str]:
        """In what a quote is not what is wished, in words. The deadline was counted from when it was ordered, so it is no
        part of this."""
        found = []
        if self.reward is not None and quote.amount > self.reward:
            found.append(f"it may cost {quote.amount}, not {self.reward} at most")
        if quote.penalty < self.min_penalty:
            found.append(f"{quote.penalty} of stake answers for it, not {self.min_penalty}")
        if quote.resolver != self.resolver:
            names = [str(one) if any(one) else "nobody" for one in (quote.resolver, self.resolver)]
            found.append(f"{names[0]} judges a dispute, not {names[1]}")
        if quote.window != self.window_s:
            found.append(f"its window is {quote.window} s, not {self.window_s}")
        if self.asset is not None and (self.asset.chain_id, self.asset.token) != (domain.chain_id, bytes(quote.token)):
            found.append(f"it is paid in {quote.token} on chain {domain.chain_id}")
        return found


@dataclass(frozen=True, slots=True)
class Quoted:
    """A quote that is what was asked for."""

    quote: Quote
    domain: Domain
    signature: bytes
    terms: Terms
    raw_terms: bytes
    peer: PeerId
    address: str


async def best(client: Client, model: str, spec: BatchSpec, raw: bytes, wish: JobWish, policy: Policy) -> Quoted:
    """Ask the workers of the offer book, best first, until one quotes what was asked.

    With a resolver the bond of a dispute stays free beside the amount. Raises `NoWorker` with every worker's reason, or
    `InsufficientFunds`.
    """
    longest = max(range(len(spec.inputs)), key=lambda index: len(spec.inputs[index]))
    only = wish.asset or (None if wish.reward is None else client.wallet.preferred)
    reasons: dict[str, tuple[str, ...]] = {}
    short: int | None = None
    for candidate in client.choosing.takers(model, spec.prompt(longest), spec.params, policy):
        asset, name = candidate.payment.asset, str(candidate.offer.peer_id)
        chain = client.jobs.chain_of(asset.domain)
        if only not in (None, asset) or chain is None:
            reasons.setdefault(name, ("no batch jobs in what we pay with",))
            continue
        balance = await client.wallet.balance(asset)
        # Who may dispute needs the bond for it: money that the job itself locks is not there when the result is wrong.
        free = balance if wish.resolver == ZERO_ADDRESS else most_beside_bond(balance)
        most = free if wish.reward is None else min(free, wish.reward)
        try:
            await client.reach(candidate.offer)
            return await ask(client, candidate, chain, spec, raw, wish, most)
        except NodeError as error:
            reasons[name] = (str(error),)
            over = isinstance(error, Refused) and error.reason is RefusalReason.OVER_BUDGET
            if over and (wish.reward is None or free < wish.reward):
                short = max(short or 0, balance)
    if short is not None:
        beside = "" if wish.resolver == ZERO_ADDRESS else ", with the bond of a dispute, a tenth of it,"
        raise InsufficientFunds(
            f"the vault holds {short} (smallest unit), which the job{beside} can cost more than",
            hint="gristmill deposit AMOUNT",
        )
    raise NoWorker(
        "no worker takes this job",
        reasons,
        hint="; ".join(f"{peer[-8:]}: {', '.join(why)}" for peer, why in list(reasons.items())[:4]),
    )


async def ask(
    client: Client, candidate: Candidate, chain: JobsChain, spec: BatchSpec, raw: bytes, wish: JobWish, most: int
) -> Quoted:
    """One worker's quote. Raises `Refused`, `WorkerFault`, `VerificationFailed`, `NetworkError`, `Timeout` or `ChainError`."""
    await chain.clock.look()
    offer, domain, now = candidate.offer, chain.jobs.domain, chain.clock.now
    asked = Wish(
        spec_hash=content_hash(raw),
        inputs=len(spec.inputs),
        max_tokens=spec.params.max_tokens,
        client=client.wallet.payer.address,
        worker=offer.worker,
        token=Address(candidate.payment.token),
        max_amount=most,
        min_penalty=wish.min_penalty,
        deadline=now + wish.deadline_s,
        window=wish.window_s,
        resolver=wish.resolver,
    )
    question = RequestQuote(
        spec=raw,
        client=bytes(asked.client),
        chain_id=domain.chain_id,
        contract=bytes(domain.verifying_contract),
        token=bytes(asked.token),
        max_amount=amount_to_wire(asked.max_amount),
        min_penalty=amount_to_wire(asked.min_penalty),
        deadline=asked.deadline,
        window=asked.window,
        resolver=bytes(asked.resolver),
    )
    try:
        reply = await converse(client.network, offer.peer_id, BATCH_PROTOCOL, question, timeout_s=QUOTE_S)
    except RemoteProtocolError as error:
        raise WorkerFault(f"{offer.peer_id} does not quote: {error}") from error
    if isinstance(reply, BatchRefusal):
        raise Refused(reply.reason, reply.detail)
    if not isinstance(reply, QuoteMessage):
        raise WorkerFault(f"{offer.peer_id} answered {type(reply).__name__} to a request for a quote")
    quote = quote_from_wire(reply.quote)
    try:
        terms = check_quote(quote, reply.terms, asked)
        require_signer(quote.digest(domain), reply.signature, asked.worker, "quote")
    except RemoteProtocolError as error:
        raise VerificationFailed(f"{offer.peer_id}: {error.detail}") from error
    if not now < quote.valid_before <= now + QUOTE_LIFE:
        raise VerificationFailed(f"{offer.peer_id}: its quote stands until {quote.valid_before}, now is {now}")
    await trio.to_thread.run_sync(_check_counts, candidate, spec, terms, client.choosing.counted)
    return Quoted(
        quote, domain, reply.signature, terms, reply.terms, offer.peer_id, next(iter(offer.document.addresses), "")
    )


def _check_counts(candidate: Candidate, spec: BatchSpec, terms: Terms, count: Count) -> None:
    """No higher price than was offered, and no more prompt tokens than there are. Raises `VerificationFailed`."""
    peer = candidate.offer.peer_id
    if _dearer(terms.price, candidate.price):
        raise VerificationFailed(f"{peer}: its quote is dearer than its offer")
    for index, claimed in enumerate(terms.input_tokens):
        known, exact = count(candidate.model, spec.prompt(index), spec.params.max_tokens)
        if claimed > known or (exact and claimed != known):
            raise VerificationFailed(f"{peer}: input {index} has {known} prompt tokens, the quote counts {claimed}")


def _dearer(asked: Price, offered: Price) -> bool:
    return asked.request > offered.request or asked.input > offered.input or asked.output > offered.output
