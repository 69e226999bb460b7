"""The journal's form of a channel change: kind, subject and a typed, bounded msgpack body.

One codec for every change, derived from the dataclass fields, so a new change needs no code here. Integers are 16 bytes
(uint128) because msgpack ends at 64 bits.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Final

import msgspec

from protocol.channel import CHANGES, Change, ChannelOpened, ChannelState, Role, apply, opened
from protocol.errors import InvalidValue, LocalProtocolError
from protocol.ids import Address, ChannelId, Hash32, JobId
from protocol.typed_data import ChannelConfig

_INT_BYTES: Final = 16


def kind_of(change: type[Change] | Change) -> str:
    """``VoucherAdded`` -> ``voucher_added``."""
    name = change.__name__ if isinstance(change, type) else type(change).__name__
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


KINDS: Final[dict[str, type[Change]]] = {kind_of(c): c for c in CHANGES}


def to_body(change: Change) -> dict[str, Any]:
    """Plain values for the journal."""
    return {f.name: _plain(getattr(change, f.name)) for f in fields(change)}


def from_body(kind: str, body: dict[str, Any]) -> Change:
    """Raises `LocalProtocolError` when the journal holds what this version cannot have written."""
    try:
        cls = KINDS[kind]
        _same_fields(cls, body)
        return cls(**{f.name: _typed(f.name, str(f.type), body[f.name]) for f in fields(cls)})
    except (KeyError, TypeError, ValueError, LocalProtocolError) as error:
        raise LocalProtocolError(f"journal record of kind {kind!r} is unreadable: {error}") from None


def encode_body(change: Change) -> bytes:
    return msgspec.msgpack.encode(to_body(change))


def fold(role: Role, states: dict[ChannelId, ChannelState], change: Change) -> ChannelState:
    """One step of the replay: put the next state of the change's channel into `states`, return it."""
    if isinstance(change, ChannelOpened):
        if change.channel_id in states:
            raise LocalProtocolError(f"channel {change.channel_id} opened twice")
        state = opened(role, change)
    elif change.channel_id in states:
        state, _ = apply(states[change.channel_id], change)
    else:
        raise LocalProtocolError(f"change for unknown channel {change.channel_id}")
    states[change.channel_id] = state
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, ChannelConfig):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not 0 <= value < 1 << 8 * _INT_BYTES:
            raise InvalidValue(f"{value} does not fit the journal's uint128")
        return value.to_bytes(_INT_BYTES)
    return bytes(value)


_TYPES: Final[dict[str, Any]] = {
    "ChannelId": ChannelId,
    "JobId": JobId,
    "Address": Address,
    "Hash32": Hash32,
    "bytes": bytes,
    "int": int.from_bytes,
}


def _typed(name: str, annotation: str, value: Any) -> Any:
    if annotation == "ChannelConfig":
        _same_fields(ChannelConfig, value)
        return ChannelConfig(**{f.name: _typed(f.name, str(f.type), value[f.name]) for f in fields(ChannelConfig)})
    if annotation == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{name} is not a truth value")
        return value
    if not isinstance(value, bytes):
        raise ValueError(f"{name} is not bytes")
    if annotation == "int" and len(value) != _INT_BYTES:
        raise ValueError(f"{name} is not an integer of {_INT_BYTES} bytes")
    return _TYPES[annotation](value)


def _same_fields(cls: type[Any], body: dict[str, Any]) -> None:
    names = {f.name for f in fields(cls)}
    if set(body) != names:
        raise ValueError(f"fields {sorted(map(str, set(body) ^ names))} are missing or unknown")
