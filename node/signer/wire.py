"""The line between a node and its signer: every message, typed and bounded. msgpack arrays in length-prefixed frames.

One socket pair carries batches of requests both ways, answers in order of the asks. Secrets cross it once, in `Start`, and never
an argument or the environment. What is asked for crosses as the very words that are hashed, and is decoded strictly.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Final

import msgspec

from node.signer.sources import KeySource
from protocol.errors import InvalidValue
from protocol.frames import DATA_LIMIT, encode_frame
from protocol.ids import Address, ChannelId
from protocol.messages import Bytes20, Bytes32
from protocol.signing import DOMAINLESS, KINDS, KeyRole, Mark, Policy, Request, Scope, Signable, request
from protocol.signing_history import Ahead, KnownChannel, KnownWord
from protocol.typed_data import Domain

LIMIT: Final = DATA_LIMIT
MAX_REQUEST: Final = (1 << 20) + 4096
MAX_BATCH: Final = 512
"""Requests that share one commit."""

_Meta = msgspec.Meta
_U128 = Annotated[bytes, _Meta(min_length=16, max_length=16)]
_ChainId = Annotated[int, _Meta(ge=0, le=2**63 - 1)]
_Role = Annotated[int, _Meta(ge=0, le=3)]
_ROLES: Final = tuple(KeyRole)
_NO_CONTRACT: Final = bytes(20)


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


# ------------------------------------------------------------------------------------------------------- to the signer


class Start(_Message):
    keys: dict[str, KeySource]
    """By role."""
    policy: Policy
    table: str
    """Path; empty for one that the end of the process forgets."""


class WireChannel(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`KnownChannel`."""

    channel_id: Bytes32
    token: Bytes20
    chain_id: _ChainId
    contract: Bytes20
    authorized: _U128
    valid_before: _ChainId
    cumulative: _U128
    signed: _ChainId
    given: _ChainId
    final: _U128 | None


class WireWord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`KnownWord`."""

    scope: Scope
    subject: Annotated[bytes, _Meta(max_length=40)]
    value: _U128
    digest: Bytes32


class Meet(_Message):
    """The caller's journal, in parts; `last` on the last one."""

    channels: Annotated[tuple[WireChannel, ...], _Meta(max_length=4096)]
    words: Annotated[tuple[WireWord, ...], _Meta(max_length=4096)]
    seq: _ChainId
    hash: Bytes32
    adopting: bool
    lost: bool
    last: bool


class WireRequest(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    role: _Role
    kind: Annotated[int, _Meta(ge=0, lt=len(KINDS))]
    chain_id: _ChainId
    """0 for what has no domain, and for the market's."""
    contract: Bytes20
    encoded: Annotated[bytes, _Meta(max_length=MAX_REQUEST)]
    dry: bool = False
    """Only whether it would be signed."""


class Batch(_Message):
    seq: _ChainId
    hash: Bytes32
    """The last durable record of the caller's journal; 0 while there is none."""
    asks: Annotated[tuple[tuple[int, tuple[WireRequest, ...]], ...], _Meta(max_length=MAX_BATCH)]
    """Each ask has a number and is answered whole."""


# ------------------------------------------------------------------------------------------------------ to the node


class Ready(_Message):
    public_keys: dict[str, bytes]
    """By role."""
    table: Annotated[bytes, _Meta(min_length=16, max_length=16)]
    empty: bool
    seq: _ChainId
    hash: Annotated[bytes, _Meta(max_length=32)]
    """The journal's record that must still be there."""


class WireAhead(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    channel_id: Bytes32
    voucher: _U128
    allocation: _U128


class Met(_Message):
    ahead: tuple[WireAhead, ...]


class WireAnswer(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    signature: Annotated[bytes, _Meta(max_length=80)]
    """Empty for a refusal, and for what was asked dry."""
    reason: str = ""
    detail: str = ""


class Answers(_Message):
    answers: tuple[tuple[int, tuple[WireAnswer, ...]], ...]


class Failed(_Message):
    """The last word of a signer."""

    code: str
    message: str
    hint: str


ToSigner = Start | Meet | Batch
ToNode = Ready | Met | Answers | Failed
_encoder = msgspec.msgpack.Encoder()
_to_signer = msgspec.msgpack.Decoder(ToSigner)
_to_node = msgspec.msgpack.Decoder(ToNode)


def frame(message: ToSigner | ToNode) -> bytes:
    return encode_frame(_encoder.encode(message), LIMIT)


def read_by_signer(payload: bytes) -> ToSigner:
    """Raises `msgspec.DecodeError`."""
    return _to_signer.decode(payload)


def read_by_node(payload: bytes) -> ToNode:
    """Raises `msgspec.DecodeError`."""
    return _to_node.decode(payload)


# ----------------------------------------------------------------------------------------------------------- values

_KIND: Final = {kind: number for number, kind in enumerate(KINDS)}
_ROLE: Final = {role: number for number, role in enumerate(_ROLES)}


def to_wire(role: KeyRole, struct: Signable, domain: Domain | None, *, dry: bool = False) -> WireRequest:
    """Raises `InvalidValue` for a struct that is never signed."""
    kind = _KIND.get(type(struct))
    if kind is None:
        raise InvalidValue(f"a {type(struct).__name__} is never signed")
    if domain is None:
        return WireRequest(_ROLE[role], kind, 0, _NO_CONTRACT, struct.encode(), dry)
    return WireRequest(_ROLE[role], kind, domain.chain_id, bytes(domain.verifying_contract), struct.encode(), dry)


def from_wire(asked: WireRequest) -> Request:
    """Raises `InvalidValue` for words that encode nothing.

    Chain 0 and the zero contract are the market domain, or nothing for the kinds that have no domain: the kind says which.
    """
    kind = KINDS[asked.kind]
    domain = None if kind in DOMAINLESS else _domain(asked.chain_id, asked.contract)
    return request(_ROLES[asked.role], kind.decode(asked.encoded), domain)


@lru_cache(maxsize=64)
def _domain(chain_id: int, contract: bytes) -> Domain:
    return Domain(chain_id, Address(contract))


def channel_to_wire(known: KnownChannel) -> WireChannel:
    return WireChannel(
        channel_id=bytes(known.channel_id),
        token=bytes(known.token),
        chain_id=known.domain.chain_id,
        contract=bytes(known.domain.verifying_contract),
        authorized=known.authorized.to_bytes(16),
        valid_before=known.valid_before,
        cumulative=known.cumulative.to_bytes(16),
        signed=known.signed,
        given=known.given,
        final=None if known.final is None else known.final.to_bytes(16),
    )


def channel_from_wire(wire: WireChannel) -> KnownChannel:
    return KnownChannel(
        channel_id=ChannelId(wire.channel_id),
        token=Address(wire.token),
        domain=_domain(wire.chain_id, wire.contract),
        authorized=int.from_bytes(wire.authorized),
        valid_before=wire.valid_before,
        cumulative=int.from_bytes(wire.cumulative),
        signed=wire.signed,
        given=wire.given,
        final=None if wire.final is None else int.from_bytes(wire.final),
    )


def word_to_wire(word: KnownWord) -> WireWord:
    (scope, subject), (value, digest) = word.key, word.mark
    return WireWord(scope, bytes(subject), value.to_bytes(16), digest)


def word_from_wire(wire: WireWord) -> KnownWord:
    return KnownWord((wire.scope, wire.subject), Mark(int.from_bytes(wire.value), wire.digest))


def ahead_to_wire(ahead: Ahead) -> WireAhead:
    return WireAhead(bytes(ahead.channel_id), ahead.voucher.to_bytes(16), ahead.allocation.to_bytes(16))


def ahead_from_wire(wire: WireAhead) -> Ahead:
    return Ahead(ChannelId(wire.channel_id), int.from_bytes(wire.voucher), int.from_bytes(wire.allocation))
