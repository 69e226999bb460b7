"""What a key may sign: `check(rulebook, marks, request, now)` gives the new marks, or raises with a reason from a closed set.

Rules of this file:

1. What no rule knows is refused (K1).
2. `check` reads marks, returns those that change and changes nothing itself. Whoever signs stores them first; so a restart, a
   second caller and a bug meet the same memory.
3. The very same struct again changes no mark: it may get the same signature again. Nonces are RFC 6979, so it is the same.
4. No clock and no I/O: `now` is given, in Unix seconds. Days are UTC.

A new kind of struct is a line in `protocol.signing.KINDS`, a line in `RULES` and a function. Invariants K1 to K8:
docs/invariants.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from protocol.identity import IdentityMessage
from protocol.ids import Address, ChannelId
from protocol.offers import CLOCK_SKEW_MS, OFFER_TTL_MAX_MS
from protocol.signing import (
    DOMAINLESS,
    OWN_ACCOUNT,
    Changes,
    ChannelAllocation,
    KeyRole,
    Mark,
    MarkKey,
    Marks,
    QuotedOrder,
    Request,
    Rulebook,
    Scope,
    SigningReason,
    SigningRefused,
    TokenRule,
    transaction_mark,
)
from protocol.transactions import Transaction
from protocol.typed_data import (
    MARKET_DOMAIN,
    Acceptance,
    Ask,
    Benchmark,
    Close,
    HotKey,
    Offer,
    Quote,
    Receipt,
    Refusal,
    Submission,
    Voucher,
)

DAY_S: Final = 86_400
CONSENT_MAX_S: Final = DAY_S
"""A hot key's consent to be registered is good for a day at most."""
BENCHMARK_AGE_MAX_S: Final = 600
"""A benchmark is signed when it ends, and not for a time long past: its time stamps are to mean something."""
MARKET_KINDS: Final = (Offer, Refusal, Benchmark)
"""Signed in `MARKET_DOMAIN` and nowhere else, whatever a policy names; and nothing else is signed there."""
MAX_GAS: Final = 1 << 24
"""Of one transaction (EIP-7825)."""


def check(rulebook: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """The marks to store before `asked.digest` is signed. Raises `SigningRefused`; then nothing is stored or signed."""
    kind = type(asked.struct)
    rule = RULES[asked.role].get(kind)
    if rule is None or asked.role not in rulebook.accounts:
        raise SigningRefused(SigningReason.KIND, f"the {asked.role.value} key signs no {kind.__name__}")
    if asked.domain is None:
        if kind not in DOMAINLESS:
            raise SigningRefused(SigningReason.DOMAIN, f"a {kind.__name__} needs a domain")
    elif (
        kind in DOMAINLESS
        or (asked.domain == MARKET_DOMAIN) != (kind in MARKET_KINDS)
        or not rulebook.allows(kind.__name__, asked.domain)
    ):
        raise SigningRefused(
            SigningReason.DOMAIN,
            f"no {kind.__name__} for contract {asked.domain.verifying_contract} on chain {asked.domain.chain_id}",
        )
    return rule(rulebook, marks, asked, now)


# ------------------------------------------------------------------------------------------------------------- rules


def _voucher(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """K2, K3, K4."""
    voucher: Voucher = asked.struct
    key = (Scope.VOUCHER, voucher.channel_id)
    allocated = _known(marks, voucher.channel_id)
    last = marks.get(key)
    if last is not None:
        if last.digest == asked.digest:
            return ()
        if voucher.cumulative <= last.value:
            raise SigningRefused(
                SigningReason.NOT_HIGHER, f"a voucher of {voucher.cumulative} after one of {last.value}"
            )
    if voucher.cumulative > allocated.value:
        raise SigningRefused(
            SigningReason.OVER_CEILING,
            f"a voucher of {voucher.cumulative} on a channel that {allocated.value} was allocated to",
        )
    added = voucher.cumulative - (last.value if last else 0)
    token = marks.get((Scope.TOKEN, voucher.channel_id)) or Mark(0)
    rule = book.tokens.get((token.value, token.digest))
    day = _add(marks, Scope.DAY_VOUCHERS, _token_day(token, now), added, rule.day_vouchers if rule else 0)
    return ((key, Mark(voucher.cumulative, asked.digest)), day)


def _channel_allocation(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """K3, K4: the channel is ours on both ends of the client's side, its token may be spent, its total only rises."""
    both: ChannelAllocation = asked.struct
    config, total, channel = both.config, both.allocation.allocated, both.allocation.channel_id
    if asked.domain is None or config.channel_id(asked.domain) != channel:
        raise SigningRefused(SigningReason.NOT_OURS, f"{channel} is another channel than the one that is shown")
    _ours(book, KeyRole.PAYER, config.payer)
    _ours(book, KeyRole.SESSION, config.payer_authorizer)
    token = Mark(asked.domain.chain_id, bytes(config.token))
    rule = _spendable(book, token)
    key = (Scope.CHANNEL, channel)
    last = marks.get(key)
    if last is not None and last.digest == asked.digest:
        return ()
    if total <= (last.value if last else 0):
        raise SigningRefused(
            SigningReason.NOT_HIGHER, f"an allocation of {total} after one of {last.value if last else 0}"
        )
    if rule.channel and total > rule.channel:
        raise SigningRefused(SigningReason.OVER_CEILING, f"{total} on one channel, {rule.channel} is allowed")
    added = total - (last.value if last else 0)
    day = _add(marks, Scope.DAY_LOCKED, _token_day(token, now), added, rule.day_locked)
    return ((key, Mark(total, asked.digest)), ((Scope.TOKEN, channel), token), day)


def _ask(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """An ask moves no money: the voucher in it does."""
    _known(marks, asked.struct.channel_id)
    return ()


def _close_wish(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """The client's side only asks for a close with it; the contract heeds the worker's."""
    _known(marks, asked.struct.channel_id)
    return ()


def _receipt(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """K5: two different receipts with one number are proof of fraud, so nobody gets this key to make them."""
    receipt: Receipt = asked.struct
    channel, number = receipt.channel_id, receipt.sequence
    key = (Scope.RECEIPT, channel + number.to_bytes(8))
    given = marks.get(key)
    if given is not None:
        if given.digest == asked.digest:
            return ()
        raise SigningRefused(
            SigningReason.EQUIVOCATION, f"another receipt {number} of channel {channel} was signed before"
        )
    floor = marks.get((Scope.RECEIPT_FLOOR, channel))
    if number < 1 or (floor is not None and number <= floor.value):
        raise SigningRefused(
            SigningReason.EQUIVOCATION, f"receipt number {number} of channel {channel} may have been given before"
        )
    if marks.get((Scope.CLOSE, channel)) is not None:
        raise SigningRefused(SigningReason.CLOSED, f"a receipt on channel {channel}, whose close is signed")
    new: Changes = ((key, Mark(number, asked.digest)),)
    high = marks.get((Scope.RECEIPTS, channel))
    if high is None or number > high.value:
        new += (((Scope.RECEIPTS, channel), Mark(number)),)
    return new


def _close(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """K6."""
    close: Close = asked.struct
    return _once(marks, (Scope.CLOSE, close.channel_id), Mark(close.claimed, asked.digest), "close of this channel")


def _offer(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    offer: Offer = asked.struct
    _ours(book, asked.role, offer.worker)
    if not offer.issued < offer.expires <= offer.issued + OFFER_TTL_MAX_MS:
        raise SigningRefused(SigningReason.TIME, "an offer lives between 0 and 3600 seconds")
    if offer.issued > now * 1000 + CLOCK_SKEW_MS:
        raise SigningRefused(SigningReason.TIME, "an offer from the future")
    return ()


def _refusal(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    return ()


def _benchmark(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    measured: Benchmark = asked.struct
    _ours(book, asked.role, measured.worker)
    if not measured.started < measured.finished <= measured.started + DAY_S * 1000:
        raise SigningRefused(SigningReason.TIME, "a benchmark ends after it begins, within a day")
    if measured.finished > now * 1000 + CLOCK_SKEW_MS:
        raise SigningRefused(SigningReason.TIME, "a benchmark from the future")
    if measured.finished < (now - BENCHMARK_AGE_MAX_S) * 1000:
        raise SigningRefused(SigningReason.TIME, f"a benchmark that ended more than {BENCHMARK_AGE_MAX_S} s ago")
    return ()


def _consent(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    consent: HotKey = asked.struct
    _ours(book, asked.role, consent.hot_key)
    if consent.deadline > now + CONSENT_MAX_S:
        raise SigningRefused(SigningReason.TIME, "a consent that is good for more than a day")
    return ()


def _quote(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    _ours(book, asked.role, asked.struct.worker)
    return ()


def _order(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """K4, K7: an order locks its quote's amount, once."""
    quote: Quote = asked.struct.quote
    job = asked.struct.order.job_id
    if asked.domain is None or quote.job_id(asked.domain) != job:
        raise SigningRefused(SigningReason.NOT_OURS, f"{job} is another job than the one that is shown")
    _ours(book, asked.role, quote.client)
    token = Mark(asked.domain.chain_id, bytes(quote.token))
    rule = _spendable(book, token)
    new = _once(marks, (Scope.ORDER, job), Mark(quote.amount, asked.digest), "order of this job")
    if not new:
        return ()
    return (*new, _add(marks, Scope.DAY_LOCKED, _token_day(token, now), quote.amount, rule.day_locked))


def _submission(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """K7."""
    word: Submission = asked.struct
    return _once(marks, (Scope.SUBMISSION, word.job_id), Mark(word.claimed, asked.digest), "submission of this job")


def _acceptance(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """K7."""
    word: Acceptance = asked.struct
    order = marks.get((Scope.ORDER, word.job_id))
    if order is None or word.amount > order.value:
        ordered = "nothing" if order is None else str(order.value)
        raise SigningRefused(SigningReason.OVER_CEILING, f"{word.amount} for a job that {ordered} was ordered for")
    return _once(marks, (Scope.ACCEPTANCE, word.job_id), Mark(word.amount, asked.digest), "acceptance of this job")


def _transaction(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    """K8: only calls that are allowed, at a price that is allowed; every nonce on record."""
    tx: Transaction = asked.struct
    fees = book.fees.get(tx.chain_id)
    if fees is None:
        raise SigningRefused(SigningReason.DOMAIN, f"no transaction on chain {tx.chain_id}")
    if tx.to is None:
        raise SigningRefused(SigningReason.CALL, "no contract is made with this key")
    selector = tx.data[:4]
    rule = book.calls.get((tx.chain_id, tx.to, selector)) or book.calls.get((tx.chain_id, tx.to, b""))
    if rule is None or len(selector) != 4 or (tx.value and not rule.payable):
        raise SigningRefused(
            SigningReason.CALL, f"call 0x{selector.hex()} of {tx.to} with {tx.value} wei is not allowed"
        )
    for position, allowed in rule.words:
        word = tx.data[4 + 32 * position : 36 + 32 * position]
        if word not in allowed and not (OWN_ACCOUNT in allowed and word == bytes(12) + book.accounts[asked.role]):
            raise SigningRefused(
                SigningReason.CALL, f"argument {position} of call 0x{selector.hex()} of {tx.to} is 0x{word.hex()}"
            )
    if tx.gas > MAX_GAS or tx.max_fee > fees.max_fee or tx.tip > tx.max_fee:
        raise SigningRefused(SigningReason.FEE, f"{tx.gas} gas at up to {tx.max_fee} wei")
    return _spending(marks, asked, fees.day, now)


def _spending(marks: Marks, asked: Request, limit: int, now: int) -> Changes:
    """A replacement at the same nonce counts for what it can cost more: only one of them is mined."""
    key, mark = transaction_mark(asked.struct)
    chain = asked.struct.chain_id.to_bytes(8)
    last = marks.get(key)
    if last is not None and last.digest == asked.digest:
        return ()
    cost = max(mark.value, last.value if last else 0)
    day = chain + (now // DAY_S).to_bytes(8)
    return (
        (key, Mark(cost, asked.digest)),
        _add(marks, Scope.DAY_FEES, day, cost - (last.value if last else 0), limit),
    )


def _identity(book: Rulebook, marks: Marks, asked: Request, now: int) -> Changes:
    if not book.identity:
        raise SigningRefused(SigningReason.KIND, "this key is no network identity here")
    return ()


Rule = Callable[[Rulebook, Marks, Request, int], Changes]
RULES: Final[Mapping[KeyRole, Mapping[type, Rule]]] = {
    KeyRole.WORKER: {
        Receipt: _receipt,
        Close: _close,
        Offer: _offer,
        Refusal: _refusal,
        Benchmark: _benchmark,
        HotKey: _consent,
        Quote: _quote,
        Submission: _submission,
        Transaction: _transaction,
        IdentityMessage: _identity,
    },
    KeyRole.OWNER: {Transaction: _transaction},
    KeyRole.PAYER: {
        ChannelAllocation: _channel_allocation,
        QuotedOrder: _order,
        Acceptance: _acceptance,
        Transaction: _transaction,
    },
    KeyRole.SESSION: {Voucher: _voucher, Ask: _ask, Close: _close_wish, IdentityMessage: _identity},
}
"""Role and kind to rule. Of these a policy opens the kinds whose domains it names."""


# ------------------------------------------------------------------------------------------------------- shared parts


def _ours(book: Rulebook, role: KeyRole, named: Address) -> None:
    if book.accounts.get(role) != named:
        raise SigningRefused(SigningReason.NOT_OURS, f"{named} is not the {role.value} of this signer")


def _known(marks: Marks, channel: ChannelId) -> Mark:
    found = marks.get((Scope.CHANNEL, channel))
    if found is None:
        raise SigningRefused(SigningReason.UNKNOWN_CHANNEL, f"this signer has allocated nothing to channel {channel}")
    return found


def _spendable(book: Rulebook, token: Mark) -> TokenRule:
    rule = book.tokens.get((token.value, token.digest))
    if rule is None:
        raise SigningRefused(
            SigningReason.NOT_OURS, f"token {Address(token.digest)} on chain {token.value} is not to be spent"
        )
    return rule


def _once(marks: Marks, key: MarkKey, mark: Mark, what: str) -> Changes:
    """One struct under this name, ever."""
    last = marks.get(key)
    if last is None:
        return ((key, mark),)
    if last.digest == mark.digest:
        return ()
    raise SigningRefused(SigningReason.EQUIVOCATION, f"another {what} was signed before, at {last.value}")


def _add(marks: Marks, scope: Scope, subject: bytes, added: int, limit: int) -> tuple[MarkKey, Mark]:
    """The day's sum with `added`. Raises when that passes `limit`; 0 is no limit."""
    key = (scope, subject)
    before = marks.get(key)
    total = added + (before.value if before else 0)
    if limit and total > limit:
        raise SigningRefused(SigningReason.OVER_DAY, f"{total} on one day, {limit} is allowed")
    return key, Mark(total)


def _token_day(token: Mark, now: int) -> bytes:
    return token.value.to_bytes(8) + token.digest + (now // DAY_S).to_bytes(8)
