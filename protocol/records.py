"""The journal's form of a change of a channel or a batch job: kind, subject and a typed, bounded msgpack body.

One codec for every change, derived from the fields once, so a new change needs no code here. Integers are 16 bytes (uint128)
because msgpack ends at 64 bits. Reading is on the way of every start, half a million times: each kind has a reader of its own.

A field that came later may be absent from records before it, and is None then; so old journals fold to what they folded to.

States have the same codec, for a snapshot of the fold. It is no record: whoever reads it must be able to fold instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final

import msgspec

from protocol import batch
from protocol.channel import CHANGES, Change, ChannelOpened, ChannelState, Role, apply, opened, placed
from protocol.errors import InvalidValue, LocalProtocolError
from protocol.ids import Address, ChannelId, Hash32, JobId
from protocol.typed_data import ChannelConfig, Domain

_INT_BYTES: Final = 16
_Reader = Callable[[Any], Any]


def kind_of(change: type[Change] | Change | type[batch.Change] | batch.Change) -> str:
    """``VoucherAdded`` -> ``voucher_added``."""
    name = change.__name__ if isinstance(change, type) else type(change).__name__
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


KINDS: Final[dict[str, type[Change]]] = {kind_of(c): c for c in CHANGES}
BATCH_KINDS: Final[dict[str, type[batch.Change]]] = {kind_of(c): c for c in batch.CHANGES}


def to_body(change: Change | batch.Change | ChannelState) -> dict[str, Any]:
    """Plain values for the journal."""
    values = {name: getattr(change, name) for name in change.__struct_fields__}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def decode_state(body: bytes) -> ChannelState:
    """Back from `msgspec.msgpack.encode(to_body(state))`. Raises `LocalProtocolError`."""
    try:
        state: ChannelState = _STATE(body)
        return state
    except (ValueError, msgspec.DecodeError, LocalProtocolError) as error:
        raise LocalProtocolError(f"the state of a channel is unreadable: {error}") from None


def encode_body(change: Change | batch.Change) -> bytes:
    return msgspec.msgpack.encode(to_body(change))


def decode_body(kind: str, body: bytes) -> Change:
    """Raises `LocalProtocolError` when the journal holds what this version cannot have written."""
    change: Change = _decode(_READERS, kind, body)
    return change


def decode_batch(kind: str, body: bytes) -> batch.Change:
    """The same for a record about a batch job."""
    change: batch.Change = _decode(_BATCH_READERS, kind, body)
    return change


def _decode(readers: dict[str, _Reader], kind: str, body: bytes) -> Any:
    try:
        return readers[kind](body)
    except (KeyError, ValueError, msgspec.DecodeError, LocalProtocolError) as error:
        raise LocalProtocolError(f"journal record of kind {kind!r} is unreadable: {error}") from None


def fold(
    role: Role, states: dict[ChannelId, ChannelState], change: Change, domains: Iterable[Domain] = ()
) -> ChannelState:
    """One step of the replay: put the next state of the change's channel into `states`, return it.

    `domains`: the chains that we know, for records that do not say on which one their channel is.
    """
    if isinstance(change, ChannelOpened):
        if change.channel_id in states:
            raise LocalProtocolError(f"channel {change.channel_id} opened twice")
        state = opened(role, placed(change, domains))
    elif change.channel_id in states:
        state, _ = apply(states[change.channel_id], change)
    else:
        raise LocalProtocolError(f"change for unknown channel {change.channel_id}")
    states[change.channel_id] = state
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, ChannelConfig):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Domain):
        return {name: _plain(getattr(value, name)) for name in _DOMAIN}
    if isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):  # parts under way
        return [(bytes(job_id), _plain(part), _plain(limit)) for (job_id, part), limit in value.items()]
    if isinstance(value, int):
        if not 0 <= value < 1 << 8 * _INT_BYTES:
            raise InvalidValue(f"{value} does not fit the journal's uint128")
        return value.to_bytes(_INT_BYTES)
    return bytes(value)


def _integer(value: bytes) -> int:
    if len(value) != _INT_BYTES:
        raise ValueError(f"an integer has {_INT_BYTES} bytes, not {len(value)}")
    return int.from_bytes(value)


_CONFIG: Final = {field.name: str(field.type) for field in fields(ChannelConfig)}
_DOMAIN: Final = {"chain_id": "int", "verifying_contract": "Address"}
_ABSENT: Final = ("Domain | None", "int | None")
"""Annotations of fields that a body may lack."""
_PARTS: Final = "Mapping[Part, int]"
_PLAIN_TYPES: Final[dict[str, Any]] = {"bool": bool, "str": str, "Role": str, _PARTS: list[tuple[bytes, bytes, bytes]]}
"""What a field is in the body, by its annotation; bytes unless it stands here."""
_TYPED: Final[dict[str, _Reader]] = {
    "ChannelId": ChannelId,
    "JobId": JobId,
    "Address": Address,
    "Hash32": Hash32,
    "bytes": bytes,
    "bool": bool,
    "str": str,
    "int": _integer,
    "Role": Role,
    _PARTS: lambda parts: {(JobId(job_id), _integer(part)): _integer(limit) for job_id, part, limit in parts},
}


def _wire(name: str, annotations: dict[str, str]) -> type[msgspec.Struct]:
    """The body as msgspec reads it: exactly these fields, each bytes, a text or a truth value."""
    types: list[Any] = []
    for field, annotation in annotations.items():
        kind = _PLAIN_TYPES.get(annotation, bytes)
        types.append((field, kind | msgspec.UnsetType, msgspec.UNSET) if annotation in _ABSENT else (field, kind))
    return msgspec.defstruct(name, types, forbid_unknown_fields=True, kw_only=True)


def _typed(cls: Callable[..., Any], annotations: dict[str, str]) -> _Reader:
    """From the fields as msgspec read them to the value."""
    converters = tuple(_TYPED[annotation] for annotation in annotations.values())
    names = tuple(annotations)
    values = attrgetter(*names) if len(names) > 1 else lambda wire: (getattr(wire, names[0]),)

    def typed(wire: Any) -> Any:
        return cls(*[convert(value) for convert, value in zip(converters, values(wire), strict=True)])

    return typed


def _reader(cls: type[Change] | type[batch.Change] | type[ChannelState]) -> _Reader:
    annotations = dict(cls.__annotations__)
    decoder = msgspec.msgpack.Decoder(_wire(cls.__name__, annotations))
    typed = _typed(cls, annotations)
    return lambda body: typed(decoder.decode(body))


def _absent(reader: _Reader) -> _Reader:
    return lambda value: None if value is msgspec.UNSET else reader(value)


_PLAIN_TYPES["Domain | None"] = _wire("Domain", _DOMAIN)
_TYPED["Domain | None"] = _absent(_typed(Domain, _DOMAIN))
_TYPED["int | None"] = _absent(_integer)
_PLAIN_TYPES["ChannelConfig"] = _wire("ChannelConfig", _CONFIG)
_TYPED["ChannelConfig"] = _typed(ChannelConfig, _CONFIG)
_READERS: Final[dict[str, _Reader]] = {kind: _reader(cls) for kind, cls in KINDS.items()}
_BATCH_READERS: Final[dict[str, _Reader]] = {kind: _reader(cls) for kind, cls in BATCH_KINDS.items()}
_STATE: Final = _reader(ChannelState)
