"""Errors by blame, and the closed vocabularies that cross the wire.

Two names answer "whose fault is it?" for the whole protocol: `LocalProtocolError` (our caller broke a rule) and
`RemoteProtocolError` (the other side did). Pure code raises Local for what it was asked to do and Remote for what it was
given to read; a driver answers the second with its `WireCode`, ends that stream and keeps the process.

Numbers are the wire's: never reuse or renumber one, only append.
"""

from __future__ import annotations

from enum import IntEnum


class WireCode(IntEnum):
    """Why a stream ended early. Sent in `Abort`; each has a heading in docs/spec/errors.md."""

    INTERNAL = 1
    """The sender failed for a reason of its own; nothing the peer did."""
    MALFORMED = 2
    """Bytes that are no message: bad length, bad msgpack, unknown field, wrong type, out of bounds."""
    TOO_LARGE = 3
    """A frame over the limit of its kind."""
    UNEXPECTED = 4
    """A well-formed message that the transition table has no key for in this state."""
    BAD_SIGNATURE = 5
    """A signature that is malformed, malleable (high s) or by the wrong key."""
    WRONG_DOMAIN = 6
    """Signed for another chain, contract or channel."""
    BAD_VOUCHER = 7
    """A voucher that is lower than the last, over the allocation, or for another channel."""
    EXPIRED = 8
    """An offer, ask or allocation past its time."""
    BAD_RECEIPT = 9
    """A receipt that does not follow from the stream: digest, counts, cost or bindings differ."""
    DEADLINE = 10
    """The agreed deadline passed."""
    UNPAID = 11
    """The credit window was used up and no voucher came in time."""
    CANCELLED = 12
    """The client no longer wants the result."""
    DRAINING = 13
    """The worker is shutting down."""
    BACKEND = 14
    """The model runtime failed."""


class RefusalReason(IntEnum):
    """Why a worker does not take a job. A closed set: signed, countable, and each with a fix in the docs."""

    MODEL_UNKNOWN = 1
    CONTEXT_EXCEEDED = 2
    MAX_TOKENS_EXCEEDED = 3
    UNSUPPORTED_PARAM = 4
    OFFER_EXPIRED = 5
    OFFER_UNKNOWN = 6
    PRICE_CHANGED = 7
    CHANNEL_UNKNOWN = 8
    CHANNEL_CLOSING = 9
    ALLOCATION_INSUFFICIENT = 10
    VOUCHER_INSUFFICIENT = 11
    VOUCHER_INVALID = 12
    SIGNER_MISMATCH = 13
    WRONG_WORKER = 14
    WRONG_DOMAIN = 15
    DEADLINE_INVALID = 16
    BUSY = 17
    QUEUE_FULL = 18
    CREDIT_EXHAUSTED = 19
    CHAIN_STALE = 20
    DRAINING = 21
    DUPLICATE_JOB = 22
    PROMPT_INVALID = 23
    INTERNAL = 24
    DEPOSIT_INSUFFICIENT = 25
    DELAY_TOO_SHORT = 26

    @property
    def code(self) -> str:
        """The reason as users and JSON see it, for instance ``context_exceeded``."""
        return self.name.lower()


class GristmillError(Exception):
    """Root of every error that Gristmill raises on purpose."""


class ProtocolError(GristmillError):
    """A rule of the protocol was broken; the subclass says by whom."""


class LocalProtocolError(ProtocolError):
    """Our own side asked for something the protocol does not allow. The state is unchanged."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something the protocol does not allow."""

    def __init__(self, code: WireCode, message: str) -> None:
        super().__init__(f"{code.name.lower()}: {message}")
        self.code = code
        """What to send back, and what to count."""
        self.detail = message


class InvalidValue(LocalProtocolError):
    """A value that cannot exist (an address of 19 bytes, a negative amount). Decoders turn it into Remote."""
