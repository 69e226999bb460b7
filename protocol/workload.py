"""The documents of a batch job: what is asked, on which terms, what came back. Canonical bytes, hashed, bounded, checked.

Rules of this file:

1. A document is the msgpack bytes that were hashed. Whoever reads one checks that encoding what was read gives the same bytes,
   so one meaning has one hash.
2. Every bound that decides how much work or memory a document can cause is checked here, before anything is computed.
3. What a job costs follows from the terms and the token ids alone (`claim_of`): both sides, and a resolver, compute it.

The quote that is signed and locked on chain commits to all three: `spec_hash` is the specification's sha256, the salt is the
terms' hash, and the submission carries the result's sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from protocol.errors import InvalidValue, RemoteProtocolError, WireCode
from protocol.ids import Address, Hash32
from protocol.messages import (
    RESULT_LIMIT,
    SPEC_LIMIT,
    TERMS_LIMIT,
    TEXT_LIMIT,
    Bytes16,
    Bytes32,
    ChatMessage,
    Count32,
    FinishReason,
    Params,
    TokenId,
    checked,
    decode_value,
    encode,
    sampling_params,
)
from protocol.pricing import TOKENS_MAX, Price, batch_cost
from protocol.typed_data import Quote

INPUTS_LIMIT: Final = 10_000
MESSAGES_LIMIT: Final = 64
"""Messages around one input."""
RENDERED_LIMIT: Final = 8 << 20
"""Characters of all prompts together: a short template with many places must not make megabytes into gigabytes."""
OUTPUT_LIMIT: Final = 1_000_000
"""Tokens that a whole job may generate: with `TOKEN_ROOM` bytes for each no result is larger than `RESULT_LIMIT`."""
TOKEN_ROOM: Final = 128
"""Bytes of a result set aside for one token: its id, and the longest text that vocabularies have for one. (A client can force
the longest one by `logit_bias`, so an average would not do.)"""
ITEM_ROOM: Final = 16
PLACE: Final = "{input}"
"""Where the input goes in the messages."""

_Meta = msgspec.Meta
_T = TypeVar("_T", bound=msgspec.Struct)


class BatchSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked: one model, one set of parameters, the same messages around each input."""

    model_id: Bytes32
    params: Params
    messages: Annotated[tuple[ChatMessage, ...], _Meta(min_length=1, max_length=MESSAGES_LIMIT)]
    """In each, `{input}` stands for the input."""
    inputs: Annotated[
        tuple[Annotated[str, _Meta(max_length=TEXT_LIMIT)], ...], _Meta(min_length=1, max_length=INPUTS_LIMIT)
    ]
    version: Literal[1] = 1
    task: Literal["chat"] = "chat"

    def prompt(self, index: int) -> tuple[ChatMessage, ...]:
        """The messages of one input."""
        text = self.inputs[index]
        return tuple(ChatMessage(role=m.role, content=m.content.replace(PLACE, text)) for m in self.messages)


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a quote's amount came about. The quote's salt is the hash of these bytes, so the worker has signed them."""

    price: Price
    input_tokens: Annotated[tuple[Count32, ...], _Meta(min_length=1, max_length=INPUTS_LIMIT)]
    """Prompt tokens of each input, in order."""
    max_tokens: Annotated[int, _Meta(ge=1, le=OUTPUT_LIMIT)]
    """Most that is generated for one input."""
    nonce: Bytes16
    """Makes two equal jobs two."""
    version: Literal[1] = 1

    @property
    def amount(self) -> int:
        """The most that the job can cost."""
        count = len(self.input_tokens)
        return batch_cost(self.price, count, sum(self.input_tokens), count * self.max_tokens)

    @property
    def room(self) -> int:
        """Bytes that the result can have."""
        count = len(self.input_tokens)
        return min(RESULT_LIMIT, 128 + count * (ITEM_ROOM + self.max_tokens * TOKEN_ROOM))


class ResultItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one input gave."""

    token_ids: Annotated[tuple[TokenId, ...], _Meta(max_length=OUTPUT_LIMIT)]
    text: Annotated[str, _Meta(max_length=RESULT_LIMIT)]
    finish_reason: FinishReason
    """`cancelled` without tokens: never begun, not charged."""


class BatchResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What came back, in the order of the inputs."""

    spec_hash: Bytes32
    items: Annotated[tuple[ResultItem, ...], _Meta(min_length=1, max_length=INPUTS_LIMIT)]
    version: Literal[1] = 1

    @property
    def output_tokens(self) -> int:
        return sum(len(item.token_ids) for item in self.items)


NOT_BEGUN: Final = ResultItem(token_ids=(), text="", finish_reason=FinishReason.CANCELLED)


# --------------------------------------------------------------------------------------------------------------- bytes


def content_hash(raw: bytes) -> Hash32:
    """Name of a specification or a result."""
    return Hash32(hashlib.sha256(raw).digest())


def terms_hash(raw: bytes) -> Hash32:
    """The salt of a quote on these terms."""
    return Hash32(hashlib.sha256(b"gristmill/terms/1" + raw).digest())


def encode_spec(spec: BatchSpec) -> bytes:
    """Raises `InvalidValue` for one that no worker may take."""
    spec = checked(spec)
    raw = encode(spec)
    if len(raw) > SPEC_LIMIT:
        raise InvalidValue(f"the specification has {len(raw)} bytes, at most {SPEC_LIMIT} fit; post several jobs")
    _check_spec(spec)
    return raw


def decode_spec(raw: bytes) -> BatchSpec:
    """Raises `RemoteProtocolError`."""
    if len(raw) > SPEC_LIMIT:
        raise RemoteProtocolError(WireCode.TOO_LARGE, f"a specification of {len(raw)} bytes, limit {SPEC_LIMIT}")
    spec = _canonical(BatchSpec, raw)
    try:
        _check_spec(spec)
    except InvalidValue as error:
        raise RemoteProtocolError(WireCode.MALFORMED, str(error)) from None
    return spec


def encode_terms(terms: Terms) -> bytes:
    """Raises `InvalidValue`."""
    raw = encode(checked(terms))
    if len(raw) > TERMS_LIMIT:
        raise InvalidValue(f"terms of {len(raw)} bytes, at most {TERMS_LIMIT} fit")
    return raw


def decode_terms(raw: bytes) -> Terms:
    """Raises `RemoteProtocolError`."""
    terms = _canonical(Terms, raw)
    most = len(terms.input_tokens) * terms.max_tokens
    if sum(terms.input_tokens) > TOKENS_MAX or most > OUTPUT_LIMIT:
        raise RemoteProtocolError(WireCode.MALFORMED, "the terms count more tokens than a job can have")
    return terms


def encode_result(result: BatchResult) -> bytes:
    """Raises `InvalidValue`."""
    raw = encode(result)
    if len(raw) > RESULT_LIMIT:
        raise InvalidValue(f"a result of {len(raw)} bytes, at most {RESULT_LIMIT} fit")
    return raw


def _canonical(kind: type[_T], raw: bytes) -> _T:
    value = decode_value(kind, raw)
    if encode(value) != raw:
        raise RemoteProtocolError(WireCode.MALFORMED, f"the {kind.__name__} is not in its canonical form")
    return value


def _check_spec(spec: BatchSpec) -> None:
    sampling_params(spec.params)
    places = sum(message.content.count(PLACE) for message in spec.messages)
    if not places:
        raise InvalidValue(f"no message has a place for the input: write {PLACE} where it goes")
    around = sum(len(message.content) for message in spec.messages)
    rendered = around * len(spec.inputs) + places * sum(map(len, spec.inputs))
    if rendered > RENDERED_LIMIT:
        raise InvalidValue(f"the prompts have {rendered} characters in all, at most {RENDERED_LIMIT} are taken")
    most = len(spec.inputs) * spec.params.max_tokens
    if most > OUTPUT_LIMIT:
        raise InvalidValue(f"up to {most} tokens are asked for, one job gives at most {OUTPUT_LIMIT}; lower max_tokens")


# --------------------------------------------------------------------------------------------------------------- price


def claim_of(terms: Terms, items: Sequence[ResultItem]) -> int:
    """What these items cost: each input that was begun is one request, with its prompt and what it gave."""
    begun = [index for index, item in enumerate(items) if item != NOT_BEGUN]
    inputs = sum(terms.input_tokens[index] for index in begun)
    return batch_cost(terms.price, len(begun), inputs, sum(len(items[index].token_ids) for index in begun))


# -------------------------------------------------------------------------------------------------------------- checks


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client asked for, to hold a quote against."""

    spec_hash: Hash32
    inputs: int
    max_tokens: int
    client: Address
    worker: Address
    token: Address
    max_amount: int
    min_penalty: int
    deadline: int
    window: int
    resolver: Address


def check_quote(quote: Quote, raw_terms: bytes, wish: Wish) -> Terms:
    """Client: is this quote what was asked for, and does its amount follow from its terms?

    Raises `RemoteProtocolError` (BAD_RECEIPT) naming what differs. The signature and the times are the caller's.
    """
    asked = (wish.spec_hash, wish.client, wish.worker, wish.token, wish.deadline, wish.window, wish.resolver)
    got = (quote.spec_hash, quote.client, quote.worker, quote.token, quote.deadline, quote.window, quote.resolver)
    if got != asked:
        raise RemoteProtocolError(WireCode.BAD_RECEIPT, "the quote is for something else than was asked")
    if quote.salt != terms_hash(raw_terms):
        raise RemoteProtocolError(WireCode.BAD_RECEIPT, "the quote's salt is not the hash of its terms")
    terms = decode_terms(raw_terms)
    if (len(terms.input_tokens), terms.max_tokens) != (wish.inputs, wish.max_tokens):
        raise RemoteProtocolError(
            WireCode.BAD_RECEIPT, "the quote's terms count other inputs or tokens than were asked"
        )
    if quote.amount != terms.amount:
        raise RemoteProtocolError(WireCode.BAD_RECEIPT, f"the quote says {quote.amount}, its terms make {terms.amount}")
    if quote.amount > wish.max_amount:
        raise RemoteProtocolError(
            WireCode.BAD_RECEIPT, f"the quote says {quote.amount}, at most {wish.max_amount} was asked"
        )
    if quote.penalty < wish.min_penalty:
        raise RemoteProtocolError(
            WireCode.BAD_RECEIPT, f"the penalty is {quote.penalty}, {wish.min_penalty} was asked for"
        )
    return terms


def check_result(raw: bytes, *, quote: Quote, terms: Terms, result_hash: Hash32, claimed: int, partial: bool) -> int:
    """Client: do these bytes fulfil the job, and are they worth what is claimed? Returns what they cost.

    `partial`: the client has cancelled, so unfinished inputs are no fault. Raises `RemoteProtocolError` (BAD_RECEIPT).
    """
    if content_hash(raw) != result_hash:
        raise RemoteProtocolError(WireCode.BAD_RECEIPT, "the bytes are not those of the result hash")
    try:
        result = _canonical(BatchResult, raw)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(WireCode.BAD_RECEIPT, f"the result is unreadable: {error.detail}") from None
    if result.spec_hash != quote.spec_hash:
        raise RemoteProtocolError(WireCode.BAD_RECEIPT, "the result is of another job")
    if len(result.items) != len(terms.input_tokens):
        raise RemoteProtocolError(
            WireCode.BAD_RECEIPT, f"{len(result.items)} items for {len(terms.input_tokens)} inputs"
        )
    for index, item in enumerate(result.items):
        _check_item(index, item, terms.max_tokens, partial=partial)
    cost = claim_of(terms, result.items)
    if claimed > cost:
        raise RemoteProtocolError(WireCode.BAD_RECEIPT, f"{claimed} is claimed for a result that costs {cost}")
    return cost


def _check_item(index: int, item: ResultItem, max_tokens: int, *, partial: bool) -> None:
    count, reason = len(item.token_ids), item.finish_reason
    if count > max_tokens:
        raise RemoteProtocolError(
            WireCode.BAD_RECEIPT, f"item {index} has {count} tokens, at most {max_tokens} are due"
        )
    if reason is FinishReason.CANCELLED:
        if not partial:
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, f"item {index} is not finished")
        if count == 0 and item.text:
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, f"item {index} has text and no tokens")
    elif count == 0:
        raise RemoteProtocolError(WireCode.BAD_RECEIPT, f"item {index} has no tokens")
    elif reason is FinishReason.LENGTH and count != max_tokens:
        raise RemoteProtocolError(
            WireCode.BAD_RECEIPT, f"item {index} ends for its length after {count} of {max_tokens} tokens"
        )


def read_result(raw: bytes) -> BatchResult:
    """A result that was checked before. Raises `RemoteProtocolError`."""
    return _canonical(BatchResult, raw)
