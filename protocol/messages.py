"""Every message of the wire: typed, bounded, versioned by protocol id, unknown fields refused.

Four conversations, each one protocol id and one union of messages:

- ``/gristmill/offer/3``: `GetOffer` -> `OfferMessage`
- ``/gristmill/channel/2``: `OpenChannel` or `QueryChannel` -> `ChannelStatus`; `RequestClose` -> `CloseConsent`
- ``/gristmill/job/3``: `AskMessage`, then vouchers and perhaps input one way and chunks the other, ended by receipt and ack
  (`protocol.job`)
- ``/gristmill/batch/1``: `RequestQuote` -> `QuoteMessage`; `OpenJob`, `QueryJob`, `AcceptJob` or `RequestCancel` -> `JobStatus`;
  `GetResult` -> `ResultChunk`; or `BatchRefusal` to any of them

`Abort` may end any of them. The schema page docs/spec/messages.md is generated from these classes. A message is a msgpack
map whose ``t`` field names it. Amounts are 16 bytes big-endian (uint128), because msgpack integers end at 64 bits.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from protocol.errors import InvalidValue, LocalProtocolError, RefusalReason, RemoteProtocolError, WireCode
from protocol.ids import Address, Hash32
from protocol.logprobs import LOGPROBS_LIMIT
from protocol.sampling import SamplingParams
from protocol.tasks import INPUT_BYTES, TaskRequest
from protocol.tasks import TEXT_LIMIT as TEXT_LIMIT
from protocol.tasks import ChatMessage as ChatMessage
from protocol.typed_data import ChannelConfig, Quote

OFFER_PROTOCOL: Final = "/gristmill/offer/3"
CHANNEL_PROTOCOL: Final = "/gristmill/channel/2"
JOB_PROTOCOL: Final = "/gristmill/job/3"
BATCH_PROTOCOL: Final = "/gristmill/batch/1"
OFFER_TOPIC: Final = "/gristmill/offers/3"

OFFER_LIMIT: Final = 32 * 1024
"""Bytes of one offer document."""
GRAMMAR_LIMIT: Final = 16 * 1024
"""Characters of a grammar that binds an answer."""
TOKENS_PER_CHUNK: Final = 4096
DATA_PER_CHUNK: Final = 256 * 1024
"""Bytes of numbers in one chunk."""
TOKENS_LIMIT: Final = 131_072
"""Tokens one part may generate, or resume from."""
SPEC_LIMIT: Final = 3_670_016
"""Bytes of a batch job's specification (3.5 MiB, so that it fits into a data frame with what surrounds it)."""
TERMS_LIMIT: Final = 64 * 1024
"""Bytes of a quote's terms."""
PIECE_LIMIT: Final = 512 * 1024
"""Bytes of a batch job's result in one `ResultChunk`."""
RESULT_LIMIT: Final = 128 << 20
"""Bytes of a batch job's whole result."""

_Meta = msgspec.Meta
Bytes16 = Annotated[bytes, _Meta(min_length=16, max_length=16)]
Bytes20 = Annotated[bytes, _Meta(min_length=20, max_length=20)]
Bytes32 = Annotated[bytes, _Meta(min_length=32, max_length=32)]
SignatureBytes = Annotated[bytes, _Meta(min_length=65, max_length=65)]
Millis = Annotated[int, _Meta(ge=0, le=2**53)]
Seconds40 = Annotated[int, _Meta(ge=0, le=2**40 - 1)]
Count32 = Annotated[int, _Meta(ge=0, le=2**32 - 1)]
ChainNumber = Annotated[int, _Meta(ge=1, le=2**63 - 1)]
TokenId = Annotated[int, _Meta(ge=0, le=2**32 - 1)]


class FinishReason(IntEnum):
    """Why generation ended; signed in the receipt."""

    STOP = 1
    """The model ended its turn."""
    LENGTH = 2
    """`max_tokens` or the context length was reached."""
    STOP_STRING = 3
    """A string of `Params.stop` appeared; the text ends before it."""
    CANCELLED = 4
    """The client cancelled, stopped paying or went away; the receipt covers what was delivered."""

    @property
    def code(self) -> str:
        return self.name.lower()


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value inside messages."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    """A message; subclasses name their tag."""


# ------------------------------------------------------------------------------------------------------------ values


class ResponseFormat(_Value, frozen=True):
    """A grammar that the answer's text must follow: rule 0 of `protocol.sampling`."""

    kind: Literal["json_schema", "regex", "lark"]
    text: Annotated[str, _Meta(min_length=1, max_length=GRAMMAR_LIMIT)]
    """The JSON schema, the regular expression or the grammar."""


class Params(_Value, frozen=True):
    """What decides the tokens besides prompt and model. `protocol.sampling` says in which order."""

    max_tokens: Annotated[int, _Meta(ge=1, le=TOKENS_LIMIT)] = 256
    temperature: Annotated[float, _Meta(ge=0, le=2)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, _Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, _Meta(ge=0, le=2**20)] = 0
    """0 keeps every token."""
    min_p: Annotated[float, _Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, _Meta(ge=0.1, le=10)] = 1.0
    frequency_penalty: Annotated[float, _Meta(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, _Meta(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        tuple[tuple[TokenId, Annotated[float, _Meta(ge=-100, le=100)]], ...], _Meta(max_length=300)
    ] = ()
    """Pairs (token id, bias): ids rising, each once."""
    stop: Annotated[tuple[Annotated[str, _Meta(min_length=1, max_length=64)], ...], _Meta(max_length=16)] = ()
    seed: Annotated[int, _Meta(ge=0, le=2**63 - 1)] = 0
    """Fixed by the client's signature, so that every draw can be replayed."""
    response_format: ResponseFormat | msgspec.UnsetType = msgspec.UNSET
    """Left out when the text is free, so that what was signed before there were grammars keeps its hash."""
    logprobs: Annotated[int, _Meta(ge=0, le=LOGPROBS_LIMIT)] | msgspec.UnsetType = msgspec.UNSET
    """Tell each token's log probability, and those of so many that were likeliest (`protocol.logprobs`). Left out when nobody
    asks, for the same reason."""

    @property
    def likeliest(self) -> int | None:
        """`logprobs`; None when nobody asks."""
        return None if isinstance(self.logprobs, msgspec.UnsetType) else self.logprobs


class ChannelConfigWire(_Value, frozen=True):
    """`typed_data.ChannelConfig` on the wire."""

    payer: Bytes20
    payer_authorizer: Bytes20
    receiver: Bytes20
    receiver_authorizer: Bytes20
    token: Bytes20
    withdraw_delay: Seconds40
    salt: Bytes32


class ReceiptWire(_Value, frozen=True):
    """`typed_data.Receipt` on the wire."""

    job_id: Bytes32
    part: Count32
    channel_id: Bytes32
    sequence: Annotated[int, _Meta(ge=0, le=2**63 - 1)]
    model_id: Bytes32
    request_hash: Bytes32
    params_hash: Bytes32
    output_digest: Bytes32
    input_tokens: Count32
    output_tokens: Count32
    cost: Bytes16
    commitment: Bytes32
    started: Millis
    finished: Millis
    finish_reason: FinishReason


# ------------------------------------------------------------------------------------------------------------- offer


class GetOffer(_Message, frozen=True, tag="get_offer"):
    """Client: what do you sell now?"""


class OfferMessage(_Message, frozen=True, tag="offer"):
    """A signed offer, as gossiped on the topic and as answered to `GetOffer`."""

    document: Annotated[bytes, _Meta(min_length=1, max_length=OFFER_LIMIT)]
    """msgpack of `protocol.offers.OfferDocument`; the signature is over exactly these bytes."""
    signature: SignatureBytes


# ----------------------------------------------------------------------------------------------------------- channel


class OpenChannel(_Message, frozen=True, tag="open_channel"):
    """Client: serve me on this channel; here is the payer's signed allocation for you to submit."""

    chain_id: ChainNumber
    contract: Bytes20
    """The Channels contract: with the chain id the domain of the channel's id and of every signature about it."""
    config: ChannelConfigWire
    allocated: Bytes16
    valid_before: Seconds40
    signature: SignatureBytes
    """The payer's, over `typed_data.Allocation`."""


class QueryChannel(_Message, frozen=True, tag="query_channel"):
    """Client: where do we stand? Asked after a restart."""

    channel_id: Bytes32


class ChannelStatus(_Message, frozen=True, tag="channel_status"):
    """Worker: the channel as it is journaled here."""

    channel_id: Bytes32
    allocated: Bytes16
    """Confirmed on chain."""
    claimed: Bytes16
    cumulative: Bytes16
    """Highest voucher held."""
    voucher_signature: Annotated[bytes, _Meta(max_length=65)]
    """That voucher's signature, so a client that lost its journal can check it; empty when there is none."""
    spent: Bytes16
    """Sum of all receipts."""
    sequence: Annotated[int, _Meta(ge=0, le=2**63 - 1)]
    """Receipts signed so far."""
    transaction: Annotated[bytes, _Meta(max_length=32)]
    """Hash of the allocation's transaction when this call submitted one, else empty."""


class RequestClose(_Message, frozen=True, tag="request_close"):
    """Client: let us end this channel now, at what I owe you."""

    channel_id: Bytes32
    final: Bytes16
    """The total that the client counts as spent."""
    signature: SignatureBytes
    """The session key's, over `typed_data.Close`: a stranger cannot end a channel."""


class CloseConsent(_Message, frozen=True, tag="close_consent"):
    """Worker: agreed; either side may submit this with the voucher it names."""

    channel_id: Bytes32
    final: Bytes16
    signature: SignatureBytes


# --------------------------------------------------------------------------------------------------------------- job


class AskMessage(_Message, frozen=True, tag="ask"):
    """Client: run this. Carries the request, its signature and the first voucher: one write, no round trip before prefill."""

    job_id: Bytes32
    part: Count32
    channel_id: Bytes32
    worker: Bytes20
    model_id: Bytes32
    offer_hash: Bytes32
    deadline: Millis
    request: TaskRequest
    params: Params
    signature: SignatureBytes
    """The session key's, over `typed_data.Ask`."""
    cumulative: Bytes16
    voucher_signature: SignatureBytes
    resume: Annotated[tuple[TokenId, ...], _Meta(max_length=TOKENS_LIMIT)] = ()
    """Token ids that earlier parts delivered; generation goes on after them. Billed as input. Only for chats."""


class Input(_Message, frozen=True, tag="input"):
    """Client: more of the media that the ask announced. Paid for before it is sent; `tasks.INPUT_WINDOW` ahead at most."""

    sequence: Annotated[int, _Meta(ge=1, le=2**32 - 1)]
    """From 1, without a gap."""
    data: Annotated[bytes, _Meta(max_length=INPUT_BYTES)]
    last: bool = False
    """Nothing follows. Only this one may be empty."""


class VoucherMessage(_Message, frozen=True, tag="voucher"):
    """Client: a higher cumulative amount, written as the stream goes without waiting for anything."""

    cumulative: Bytes16
    signature: SignatureBytes


class Cancel(_Message, frozen=True, tag="cancel"):
    """Client: stop. The worker answers with the receipt for what it delivered."""


class Ack(_Message, frozen=True, tag="ack"):
    """Client: receipt verified and journaled; with the voucher that pays the rest. The worker may forget the result."""

    cumulative: Bytes16
    signature: SignatureBytes


class Accept(_Message, frozen=True, tag="accept"):
    """Worker: taken. Sent before prefill, so the client knows the prompt's price before the first token."""

    input_tokens: Count32
    """Input units of what came with the ask (`tasks.UNITS`): of a chat, tokens of the prompt."""
    sequence: Annotated[int, _Meta(ge=1, le=2**63 - 1)]
    """The number the receipt will carry."""
    started: Millis


class Refuse(_Message, frozen=True, tag="refuse"):
    """Worker: no, for this signed reason; with the current offer, so that a retry needs no question."""

    reason: RefusalReason
    detail: Annotated[str, _Meta(max_length=500)]
    at: Millis
    signature: SignatureBytes
    offer: OfferMessage | None = None


class Chunk(_Message, frozen=True, tag="chunk"):
    """Worker: some output, coalesced over 10 to 20 ms, or news of the input."""

    token_ids: Annotated[tuple[TokenId, ...], _Meta(max_length=TOKENS_PER_CHUNK)]
    text: Annotated[str, _Meta(max_length=64 * 1024)]
    data: Annotated[bytes, _Meta(max_length=DATA_PER_CHUNK)] = b""
    """Whole rows: of float32, little-endian, of a task that answers with numbers; or one for each of `token_ids`, of a chat that
    asks for `Params.logprobs`."""
    taken: Count32 = 0
    """How many `Input` messages the worker has taken by now: billed, covered by its receipt, and room for as many more."""


class ReceiptMessage(_Message, frozen=True, tag="receipt"):
    """Worker: the signed result. Ends what the worker has to say."""

    receipt: ReceiptWire
    signature: SignatureBytes


# ------------------------------------------------------------------------------------------------------------- batch


class QuoteWire(_Value, frozen=True):
    """`typed_data.Quote` on the wire."""

    spec_hash: Bytes32
    client: Bytes20
    worker: Bytes20
    token: Bytes20
    amount: Bytes16
    penalty: Bytes16
    valid_before: Seconds40
    deadline: Seconds40
    window: Seconds40
    resolver: Bytes20
    salt: Bytes32


class RequestQuote(_Message, frozen=True, tag="request_quote"):
    """Client: would you run this job, and for how much at most? Nothing is owed by asking."""

    spec: Annotated[bytes, _Meta(min_length=1, max_length=SPEC_LIMIT)]
    """msgpack of `protocol.workload.BatchSpec`; its sha256 is the quote's `spec_hash`."""
    client: Bytes20
    """Whose vault balance will pay."""
    chain_id: Annotated[int, _Meta(ge=1, le=2**63 - 1)]
    contract: Bytes20
    """The Jobs contract."""
    token: Bytes20
    max_amount: Bytes16
    """A dearer quote is not wanted."""
    min_penalty: Bytes16
    """Least stake of the worker's owner that must answer for the job."""
    deadline: Seconds40
    """Chain time before which the result must be submitted."""
    window: Seconds40
    """Seconds after the submission in which the client may dispute."""
    resolver: Bytes20
    """Who would judge a dispute; zero for nobody."""


class QuoteMessage(_Message, frozen=True, tag="quote"):
    """Worker: yes, on these terms, until `quote.valid_before`. The quote's digest is the job's id."""

    quote: QuoteWire
    signature: SignatureBytes
    """The worker's, over `typed_data.Quote`."""
    terms: Annotated[bytes, _Meta(min_length=1, max_length=TERMS_LIMIT)]
    """msgpack of `protocol.workload.Terms`: how the amount came about. The quote's salt is its hash."""


class BatchRefusal(_Message, frozen=True, tag="refused"):
    """Worker: no, for this reason."""

    reason: RefusalReason
    detail: Annotated[str, _Meta(max_length=500)] = ""


class OpenJob(_Message, frozen=True, tag="open_job"):
    """Client: I take the quote; here is my order for you to submit. Sent again it changes nothing."""

    job_id: Bytes32
    order: SignatureBytes
    """The client's, over `typed_data.Order`."""


class QueryJob(_Message, frozen=True, tag="query_job"):
    """Client: how far is it?"""

    job_id: Bytes32


class JobStatus(_Message, frozen=True, tag="job_status"):
    """Worker: the job as it is journaled here. What counts is what the contract says."""

    job_id: Bytes32
    state: Annotated[int, _Meta(ge=0, le=5)]
    """As last seen on chain: 0 none, 1 open, 2 submitted, 3 disputed, 4 settled, 5 refunded."""
    done: Count32
    """Inputs that are finished."""
    total: Count32
    result_hash: Annotated[bytes, _Meta(max_length=32)] = b""
    """Empty until the result is there."""
    size: Annotated[int, _Meta(ge=0, le=RESULT_LIMIT)] = 0
    """Bytes of the result."""
    claimed: Bytes16 = bytes(16)
    """What the worker asks for it."""
    submission: Annotated[bytes, _Meta(max_length=65)] = b""
    """The worker's signature over `typed_data.Submission`."""
    window_end: Seconds40 = 0
    """After the submission: until when the client may dispute."""
    failure: Annotated[str, _Meta(max_length=200)] = ""
    """Why the worker gives the job up, when it does."""
    transaction: Annotated[bytes, _Meta(max_length=32)] = b""
    """Hash of the transaction that this question caused, else empty."""


class GetResult(_Message, frozen=True, tag="get_result"):
    """Client: the result's bytes from here on."""

    job_id: Bytes32
    offset: Annotated[int, _Meta(ge=0, le=RESULT_LIMIT)]


class ResultChunk(_Message, frozen=True, tag="result_chunk"):
    """Worker: a piece of the result. Empty at its end."""

    job_id: Bytes32
    offset: Annotated[int, _Meta(ge=0, le=RESULT_LIMIT)]
    data: Annotated[bytes, _Meta(max_length=PIECE_LIMIT)]


class AcceptJob(_Message, frozen=True, tag="accept_job"):
    """Client: the result is verified and kept; here is what pays for it at once. The worker may forget it."""

    job_id: Bytes32
    result_hash: Bytes32
    amount: Bytes16
    signature: SignatureBytes
    """The client's, over `typed_data.Acceptance`."""


class RequestCancel(_Message, frozen=True, tag="request_cancel"):
    """Client: stop. What is finished by then is the result, and all that is claimed."""

    job_id: Bytes32


class Abort(_Message, frozen=True, tag="abort"):
    """Either side: this conversation is over, and why."""

    code: WireCode
    detail: Annotated[str, _Meta(max_length=500)] = ""


OfferConversation = GetOffer | OfferMessage | Abort
ChannelConversation = OpenChannel | QueryChannel | ChannelStatus | RequestClose | CloseConsent | Abort
JobConversation = AskMessage | Input | VoucherMessage | Cancel | Ack | Accept | Refuse | Chunk | ReceiptMessage | Abort
BatchConversation = (
    RequestQuote
    | QuoteMessage
    | OpenJob
    | QueryJob
    | JobStatus
    | GetResult
    | ResultChunk
    | AcceptJob
    | RequestCancel
    | BatchRefusal
    | Abort
)
Message = OfferConversation | ChannelConversation | JobConversation | BatchConversation

CONVERSATIONS: Final[dict[str, Any]] = {
    OFFER_PROTOCOL: OfferConversation,
    CHANNEL_PROTOCOL: ChannelConversation,
    JOB_PROTOCOL: JobConversation,
    BATCH_PROTOCOL: BatchConversation,
}


def _plain(value: object) -> object:
    """Addresses, hashes and PeerIds travel as the bytes and text that they are."""
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, str):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no form on the wire")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    name: msgspec.msgpack.Decoder(union) for name, union in CONVERSATIONS.items()
}
_T = TypeVar("_T")


def encode(message: msgspec.Struct) -> bytes:
    """msgpack bytes; fields in declared order, so equal values give equal bytes. Raises `InvalidValue`."""
    return _pack(message)


def decode(protocol: str, payload: bytes) -> Any:
    """A message of that conversation. Raises `RemoteProtocolError(MALFORMED)` for anything else, whatever it is."""
    try:
        return _decoders[protocol].decode(payload)
    except KeyError:
        raise LocalProtocolError(f"no conversation is called {protocol}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, OverflowError) as error:
        raise RemoteProtocolError(WireCode.MALFORMED, _short(error)) from None


def decode_value(kind: type[_T], payload: bytes) -> _T:
    """Decode one bounded value (an offer document, say) with the same blame."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, OverflowError) as error:
        raise RemoteProtocolError(WireCode.MALFORMED, _short(error)) from None


def checked(message: _T) -> _T:
    """The value as the other side will decode it (an int in a float's place becomes a float), proved to be within its
    bounds: Struct constructors do not check. Raises `InvalidValue`."""
    try:
        return msgspec.convert(msgspec.to_builtins(message, builtin_types=(bytes,), enc_hook=_plain), type(message))
    except (msgspec.ValidationError, TypeError, OverflowError) as error:
        raise InvalidValue(str(error)) from None


def amount_to_wire(amount: int) -> bytes:
    if isinstance(amount, bool) or not 0 <= amount < 1 << 128:
        raise InvalidValue(f"amount {amount} does not fit uint128")
    return amount.to_bytes(16)


def amount_from_wire(raw: bytes) -> int:
    return int.from_bytes(raw)


def config_from_wire(wire: ChannelConfigWire) -> ChannelConfig:
    return ChannelConfig(
        payer=Address(wire.payer),
        payer_authorizer=Address(wire.payer_authorizer),
        receiver=Address(wire.receiver),
        receiver_authorizer=Address(wire.receiver_authorizer),
        token=Address(wire.token),
        withdraw_delay=wire.withdraw_delay,
        salt=Hash32(wire.salt),
    )


def config_to_wire(config: ChannelConfig) -> ChannelConfigWire:
    return ChannelConfigWire(
        payer=bytes(config.payer),
        payer_authorizer=bytes(config.payer_authorizer),
        receiver=bytes(config.receiver),
        receiver_authorizer=bytes(config.receiver_authorizer),
        token=bytes(config.token),
        withdraw_delay=config.withdraw_delay,
        salt=bytes(config.salt),
    )


def quote_from_wire(wire: QuoteWire) -> Quote:
    return Quote(
        spec_hash=Hash32(wire.spec_hash),
        client=Address(wire.client),
        worker=Address(wire.worker),
        token=Address(wire.token),
        amount=amount_from_wire(wire.amount),
        penalty=amount_from_wire(wire.penalty),
        valid_before=wire.valid_before,
        deadline=wire.deadline,
        window=wire.window,
        resolver=Address(wire.resolver),
        salt=Hash32(wire.salt),
    )


def quote_to_wire(quote: Quote) -> QuoteWire:
    return QuoteWire(
        spec_hash=bytes(quote.spec_hash),
        client=bytes(quote.client),
        worker=bytes(quote.worker),
        token=bytes(quote.token),
        amount=amount_to_wire(quote.amount),
        penalty=amount_to_wire(quote.penalty),
        valid_before=quote.valid_before,
        deadline=quote.deadline,
        window=quote.window,
        resolver=bytes(quote.resolver),
        salt=bytes(quote.salt),
    )


def sampling_params(params: Params) -> SamplingParams:
    """The parameters as the normative sampler takes them. Raises `InvalidValue` for what it does not define."""
    return SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
    )


def request_hash(request: TaskRequest, resume: tuple[int, ...] = ()) -> Hash32:
    """What the ask signs as the request: sha256 over a tag and the canonical msgpack of the request and resumed ids."""
    return Hash32(hashlib.sha256(b"gristmill/request/2" + _pack((request, resume))).digest())


def params_hash(params: Params) -> Hash32:
    """What the receipt binds as the parameters. Both sides hash the checked form, so ``temperature=1`` and ``1.0`` agree."""
    return Hash32(hashlib.sha256(b"gristmill/params/1" + _pack(checked(params))).digest())


def _pack(value: object) -> bytes:
    try:
        return _encoder.encode(value)
    except (TypeError, ValueError, OverflowError) as error:  # a lone surrogate, an int beyond 64 bits
        raise InvalidValue(f"cannot be put on the wire: {_short(error)}") from None


def _short(error: Exception) -> str:
    return str(error)[:200]
