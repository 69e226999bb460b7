"""Signed, expiring offers: what a worker sells, what it takes for it, until when.

The document is msgpack bytes; the signature covers exactly those bytes through their sha256, so nobody re-encodes what
was signed. `open_offer` is the only way in: bounds, signature, signer = peer and time are checked there, each with its own wire
code.

One offer is for every chain that the worker is paid on, so it is signed under no chain's domain but `MARKET_DOMAIN`. An amount
of one token says nothing about another: every price stands beside the payment that it is a price in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

import msgspec

from protocol.errors import InvalidValue, LocalProtocolError, RemoteProtocolError, WireCode
from protocol.ids import Address, Hash32, ModelId, PeerId
from protocol.keys import PrivateKey, require_signer
from protocol.messages import (
    OFFER_LIMIT,
    Bytes20,
    Bytes32,
    ChainNumber,
    Millis,
    OfferMessage,
    Seconds40,
    decode_value,
    encode,
)
from protocol.pricing import PRICE_MAX, Price
from protocol.tasks import WIDTH_LIMIT, Task
from protocol.typed_data import MARKET_DOMAIN, Domain, Offer

OFFER_TTL_MAX_MS: Final = 3_600_000
"""An offer that promises a price for longer than an hour is refused: prices and hardware change."""
CLOCK_SKEW_MS: Final = 120_000
"""How far in the future an offer may be issued before it counts as not yet valid."""

ACCEPTS_MAX: Final = 16
"""Payments that one offer may name."""

_Meta = msgspec.Meta


class Asset(NamedTuple):
    """What is paid with: a token on one chain, by channels of one contract. Amounts of two assets are never compared as such."""

    chain_id: int
    contract: bytes
    token: bytes

    @classmethod
    def of(cls, domain: Domain, token: Address) -> Asset:
        return cls(domain.chain_id, domain.verifying_contract, token)

    @property
    def domain(self) -> Domain:
        return Domain(self.chain_id, Address(self.contract))


class Payment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One asset in which the worker is paid, and on what terms it opens channels in it."""

    chain_id: ChainNumber
    contract: Bytes20
    """The Channels contract: with the chain id the domain of everything signed about a channel."""
    token: Bytes20
    """The zero address is the chain's own coin."""
    min_withdraw_delay: Seconds40 = 900
    """Channels whose payer can leave sooner are refused."""
    min_allocation: Annotated[int, _Meta(ge=0, le=PRICE_MAX)] = 1
    """Smallest unit: what an allocation must add."""

    @property
    def asset(self) -> Asset:
        return Asset(self.chain_id, self.contract, self.token)


class ModelOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model that the worker serves now."""

    model_id: Bytes32
    name: Annotated[str, _Meta(min_length=1, max_length=128)]
    prices: Annotated[tuple[Price, ...], _Meta(min_length=1, max_length=ACCEPTS_MAX)]
    """One for each of `OfferDocument.accepts`, in that order and each in that asset's smallest unit."""
    context_length: Annotated[int, _Meta(ge=1, le=2**24)]
    """What it bounds depends on the task (`tasks.UNITS`); for a chat, prompt and output tokens together."""
    max_tokens: Annotated[int, _Meta(ge=1, le=2**20)]
    dtype: Annotated[str, _Meta(max_length=16)]
    """What the weights are computed in: quantisation is declared, because a client must know what it buys."""
    numerics_class: Annotated[str, _Meta(max_length=64)] = ""
    params: Annotated[tuple[Annotated[str, _Meta(max_length=32)], ...], _Meta(max_length=32)] = ()
    """Names of `Params` fields that are honoured; a request that sets another one is refused, never trimmed."""
    tokens_per_second: Annotated[float, _Meta(ge=0, le=1e9)] = 0.0
    """Measured by this worker for one stream; 0 = not measured. A claim, until receipts confirm it."""
    ttft_ms: Annotated[float, _Meta(ge=0, le=1e9)] = 0.0
    """Measured time to first token of a short prompt; 0 = not measured."""
    tasks: Annotated[tuple[Task, ...], _Meta(min_length=1, max_length=16)] = (Task.CHAT,)
    """What may be asked of it; prices are per unit of the task."""
    dimensions: Annotated[int, _Meta(ge=0, le=WIDTH_LIMIT)] = 0
    """Numbers in one vector; 0 for a model that does not embed."""


class OfferDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a client needs to choose and to ask."""

    peer_id: Annotated[str, _Meta(max_length=64)]
    addresses: Annotated[tuple[Annotated[str, _Meta(max_length=256)], ...], _Meta(max_length=16)]
    """Multiaddrs to dial."""
    accepts: Annotated[tuple[Payment, ...], _Meta(min_length=1, max_length=ACCEPTS_MAX)]
    """Any one of these is taken; each asset stands here once."""
    models: Annotated[tuple[ModelOffer, ...], _Meta(min_length=1, max_length=64)]
    issued: Millis
    expires: Millis
    tick_tokens: Annotated[int, _Meta(ge=1, le=65536)] = 64
    """A voucher is due at least every so many tokens ..."""
    tick_ms: Annotated[int, _Meta(ge=10, le=60_000)] = 2000
    """... or so many milliseconds."""
    credit_tokens: Annotated[int, _Meta(ge=0, le=65536)] = 64
    """Output tokens the worker delivers beyond what vouchers cover: its loss, at most."""
    free_slots: Annotated[int, _Meta(ge=0, le=65536)] = 1
    """Streams that could start at once when the offer was signed."""
    version: Annotated[str, _Meta(max_length=32)] = ""

    def model(self, model_id: bytes) -> ModelOffer | None:
        return next((m for m in self.models if m.model_id == model_id), None)

    def position(self, asset: Asset) -> int | None:
        """Where `accepts` and every `prices` say what this asset is taken for; None when it is not."""
        return next((n for n, payment in enumerate(self.accepts) if payment.asset == asset), None)


@dataclass(frozen=True, slots=True)
class VerifiedOffer:
    """An offer that has passed every check that does not need the network."""

    document: OfferDocument
    message: OfferMessage
    worker: Address
    hash: Hash32
    """sha256 of the document; asks name the offer by it."""

    @property
    def peer_id(self) -> PeerId:
        return str.__new__(PeerId, self.document.peer_id)  # `open_offer` has checked it; selection asks for it often

    def valid_at(self, now_ms: int) -> bool:
        return now_ms < self.document.expires


def offer_frame(document: OfferDocument, peer: PeerId) -> tuple[bytes, Offer]:
    """The document's bytes and the struct to sign for them, in `MARKET_DOMAIN`.

    Raises `LocalProtocolError` for a document that is not about this peer, or that nobody would take.
    """
    if document.peer_id != peer:
        raise LocalProtocolError("an offer is signed by the key of the peer it names")
    wrong = _wrong(document)
    if wrong:
        raise LocalProtocolError(wrong)
    raw = encode(document)
    if len(raw) > OFFER_LIMIT:
        raise LocalProtocolError(
            f"an offer has at most {OFFER_LIMIT} bytes, this one {len(raw)}: offer fewer models or payments"
        )
    return raw, _frame(document, raw)


def sign_offer(document: OfferDocument, key: PrivateKey) -> OfferMessage:
    """`offer_frame`, signed with a key in hand. Raises as it does."""
    raw, frame = offer_frame(document, key.peer_id)
    return OfferMessage(document=raw, signature=key.sign(frame.digest(MARKET_DOMAIN)))


def open_offer(message: OfferMessage, *, now_ms: int, peer: PeerId | None = None) -> VerifiedOffer:
    """Check an offer from anywhere. `peer`: who it was fetched from, when it came from the worker itself.

    An offer that names no chain of ours is sound all the same: others may want it, and `protocol.selection` says why we do not.
    Raises `RemoteProtocolError`: MALFORMED, EXPIRED or BAD_SIGNATURE.
    """
    document = decode_value(OfferDocument, message.document)
    try:
        named = PeerId(document.peer_id)
    except InvalidValue as error:
        raise RemoteProtocolError(WireCode.MALFORMED, str(error)) from None
    if peer is not None and named != peer:
        raise RemoteProtocolError(WireCode.BAD_SIGNATURE, f"{peer} sent an offer of {named} as its own")
    wrong = _wrong(document)
    if wrong:
        raise RemoteProtocolError(WireCode.MALFORMED, wrong)
    if not document.issued < document.expires <= document.issued + OFFER_TTL_MAX_MS:
        raise RemoteProtocolError(WireCode.MALFORMED, "an offer lives between 0 and 3600 seconds")
    if now_ms >= document.expires:
        raise RemoteProtocolError(WireCode.EXPIRED, f"offer expired {(now_ms - document.expires) / 1000:.1f} s ago")
    if document.issued > now_ms + CLOCK_SKEW_MS:
        raise RemoteProtocolError(WireCode.EXPIRED, "offer is issued in the future: a clock is wrong")
    frame = _frame(document, message.document)
    require_signer(frame.digest(MARKET_DOMAIN), message.signature, named.address, "offer")
    return VerifiedOffer(document=document, message=message, worker=named.address, hash=frame.document_hash)


def _wrong(document: OfferDocument) -> str:
    """What the bounds of the fields do not say, in words; empty when nothing is wrong."""
    if len({payment.asset for payment in document.accepts}) != len(document.accepts):
        return "an offer names each asset once: two prices for one would be no price"
    if any(len(model.prices) != len(document.accepts) for model in document.models):
        return "a model has one price for each payment that is accepted"
    if any((Task.EMBED in model.tasks) != (model.dimensions > 0) for model in document.models):
        return "a model that embeds says how many numbers a vector has, and no other does"
    return ""


def _frame(document: OfferDocument, raw: bytes) -> Offer:
    return Offer(
        worker=PeerId(document.peer_id).address,
        document_hash=Hash32(hashlib.sha256(raw).digest()),
        issued=document.issued,
        expires=document.expires,
    )


def model_id(offer: ModelOffer) -> ModelId:
    return ModelId(offer.model_id)
