"""What a signer is asked for, what it remembers, and what it may do: the values of `protocol.signing_policy`.

A request is a typed struct with its domain, never a digest. A mark is what is remembered of what was signed: a high-water mark, a
digest under a number, a sum of a day. A policy is data, given once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Annotated, Any, Final, NamedTuple, Protocol

import msgspec

from protocol.errors import LocalProtocolError
from protocol.identity import IdentityMessage
from protocol.ids import Address
from protocol.messages import Bytes20
from protocol.transactions import Transaction
from protocol.typed_data import (
    Acceptance,
    Allocation,
    Ask,
    Benchmark,
    ChannelConfig,
    Close,
    Domain,
    HotKey,
    Offer,
    Order,
    Quote,
    Receipt,
    Refusal,
    Struct,
    Submission,
    Voucher,
)


class KeyRole(StrEnum):
    """Whose key it is: what it may sign follows from that."""

    WORKER = "worker"
    OWNER = "owner"
    PAYER = "payer"
    SESSION = "session"


class SigningReason(StrEnum):
    """Why something is not signed."""

    KIND = "kind"
    """This key does not sign this kind of struct."""
    DOMAIN = "domain"
    """Another chain or contract than those that are allowed."""
    NOT_OURS = "not_ours"
    """It speaks for another account than the key's, or names one that may not be named."""
    UNKNOWN_CHANNEL = "unknown_channel"
    """Nothing was allocated to this channel by this signer."""
    NOT_HIGHER = "not_higher"
    """A total that only rises does not rise."""
    OVER_CEILING = "over_ceiling"
    """More than was allocated or ordered, or than one channel may hold."""
    OVER_DAY = "over_day"
    """More than is allowed on one day."""
    EQUIVOCATION = "equivocation"
    """Something else was signed under this number or name."""
    CLOSED = "closed"
    """The channel's close is signed."""
    CALL = "call"
    """A transaction to a contract, or with a call, that is not allowed."""
    FEE = "fee"
    """A transaction that may cost more than is allowed."""
    TIME = "time"
    """It would be good for too long, or from a time that has not come."""


class SigningRefused(LocalProtocolError):
    """The policy says no; nothing was signed and no mark has moved."""

    def __init__(self, reason: SigningReason, detail: str) -> None:
        super().__init__(f"not signed ({reason.value}): {detail}")
        self.reason = reason
        self.detail = detail


# ---------------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class ChannelAllocation:
    """An `Allocation` with the channel that it is for: what is signed is the allocation, what is checked is both."""

    config: ChannelConfig
    allocation: Allocation

    def encode(self) -> bytes:
        return self.config.encode() + self.allocation.encode()

    @classmethod
    def decode(cls, encoded: bytes) -> ChannelAllocation:
        return cls(ChannelConfig.decode(encoded[:-96]), Allocation.decode(encoded[-96:]))

    def digest(self, domain: Domain) -> bytes:
        return self.allocation.digest(domain)


@dataclass(frozen=True, slots=True)
class QuotedOrder:
    """An `Order` with the quote whose amount it locks."""

    quote: Quote
    order: Order

    def encode(self) -> bytes:
        return self.quote.encode() + self.order.encode()

    @classmethod
    def decode(cls, encoded: bytes) -> QuotedOrder:
        return cls(Quote.decode(encoded[:-32]), Order.decode(encoded[-32:]))

    def digest(self, domain: Domain) -> bytes:
        return self.order.digest(domain)


Signable = Struct | ChannelAllocation | QuotedOrder | Transaction | IdentityMessage
KINDS: Final[tuple[type[Any], ...]] = (
    Voucher,
    Ask,
    Receipt,
    Close,
    ChannelAllocation,
    Offer,
    Refusal,
    HotKey,
    Quote,
    QuotedOrder,
    Submission,
    Acceptance,
    Transaction,
    IdentityMessage,
    Benchmark,
)
"""What can be asked for. The position is the number on the signer's line."""


DOMAINLESS: Final = (Transaction, IdentityMessage)
"""What has no EIP-712 domain."""


@dataclass(frozen=True, slots=True)
class Request:
    role: KeyRole
    struct: Any
    """One of `KINDS`."""
    domain: Domain | None
    """None for what is `DOMAINLESS`."""
    digest: bytes
    """What will be signed; always made by `request`, never taken from outside."""


def request(role: KeyRole, struct: Any, domain: Domain | None) -> Request:
    digest = struct.digest() if domain is None else struct.digest(domain)
    return Request(role, struct, domain, digest)


# ------------------------------------------------------------------------------------------------------------- marks


class Scope(IntEnum):
    """What a mark is about. Numbers are the table's: only append."""

    JOURNAL = 1
    """The highest record of the caller's journal that we were told of: number and hash."""
    CHANNEL = 2
    """By channel: allocated, digest of the allocation."""
    TOKEN = 3
    """By channel: chain id; the digest is the token's address."""
    VOUCHER = 4
    """By channel: highest cumulative, digest of the voucher."""
    RECEIPTS = 5
    """By channel: highest number."""
    RECEIPT_FLOOR = 6
    """By channel: numbers up to this one were given before the table began."""
    RECEIPT = 7
    """By channel and number: digest."""
    CLOSE = 8
    """By channel: final total, digest."""
    ORDER = 9
    """By job: amount locked, digest."""
    SUBMISSION = 10
    """By job: amount asked for, digest."""
    ACCEPTANCE = 11
    """By job: amount granted, digest."""
    TRANSACTION = 12
    """By chain and nonce: the most it can cost in fees, digest."""
    DAY_VOUCHERS = 13
    """By token and day: what vouchers added."""
    DAY_LOCKED = 14
    """By token and day: what allocations and orders added."""
    DAY_FEES = 15
    """By chain and day: the most that transactions can cost in fees."""


class Mark(NamedTuple):
    value: int
    digest: bytes = b""


MarkKey = tuple[Scope, bytes]


def transaction_mark(tx: Transaction) -> tuple[MarkKey, Mark]:
    """By chain and nonce: the most that it can cost in fees."""
    key = (Scope.TRANSACTION, tx.chain_id.to_bytes(8) + tx.nonce.to_bytes(32))
    return key, Mark(tx.gas * tx.max_fee, tx.digest())


Changes = tuple[tuple[MarkKey, Mark], ...]


class Marks(Protocol):
    def get(self, key: MarkKey, /) -> Mark | None: ...


# ------------------------------------------------------------------------------------------------------------ policy

_Meta = msgspec.Meta
_Amount = Annotated[int, _Meta(ge=0, le=2**63 - 1)]
_ChainId = Annotated[int, _Meta(ge=1, le=2**63 - 1)]


class DomainRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of struct and one contract for which it is signed."""

    kind: str
    chain_id: Annotated[int, _Meta(ge=0, le=2**63 - 1)]
    """0 with the zero contract is `MARKET_DOMAIN`, for offers, refusals and benchmarks alone."""
    contract: Bytes20


class TokenRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token that may be spent, and how much of it. 0: no limit."""

    chain_id: _ChainId
    token: Bytes20
    channel: _Amount = 0
    """Most that one channel may hold over its life."""
    day_vouchers: _Amount = 0
    day_locked: _Amount = 0


OWN_ACCOUNT: Final = b"own"
"""In `CallRule.words`: the account of the key that is asked."""


class CallRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Calls of one contract that may be sent."""

    chain_id: _ChainId
    contract: Bytes20
    selector: Annotated[bytes, _Meta(max_length=4)] = b""
    """Of one function; empty: every function that has no rule of its own."""
    words: tuple[tuple[Annotated[int, _Meta(ge=0, le=63)], tuple[bytes, ...]], ...] = ()
    """Arguments that must be one of these words, by position."""
    payable: bool = False


class FeeRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What transactions on one chain may cost."""

    chain_id: _ChainId
    max_fee: _Amount
    """Wei per gas."""
    day: _Amount = 0
    """Wei of fees on one day; 0: no limit."""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Given once, when a signer starts. Nothing that can be asked of it later loosens it."""

    domains: tuple[DomainRule, ...] = ()
    tokens: tuple[TokenRule, ...] = ()
    calls: tuple[CallRule, ...] = ()
    fees: tuple[FeeRule, ...] = ()
    identity: bool = False
    """Whether libp2p's messages are signed."""


class Rulebook:
    """A policy and the accounts of the keys, made ready to be asked."""

    def __init__(self, policy: Policy, accounts: Mapping[KeyRole, Address]) -> None:
        self.accounts = dict(accounts)
        self.identity = policy.identity
        self.domains = {(rule.kind, rule.chain_id, rule.contract) for rule in policy.domains}
        self.tokens = {(rule.chain_id, rule.token): rule for rule in policy.tokens}
        self.calls = {(rule.chain_id, rule.contract, rule.selector): rule for rule in policy.calls}
        self.fees = {rule.chain_id: rule for rule in policy.fees}

    def allows(self, kind: str, domain: Domain) -> bool:
        return (kind, domain.chain_id, domain.verifying_contract) in self.domains
