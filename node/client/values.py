"""What a caller sees of a chat."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ids import ChannelId, PeerId
from protocol.typed_data import Receipt


@dataclass(frozen=True, slots=True)
class Usage:
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """Some output, as it came."""

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    """So far."""
    cost: int
    """So far, smallest unit."""
    data: bytes = b""
    """Rows of float32, of a task that answers with numbers."""


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What one worker served, with its verified receipt; `receipt` is None when it broke off."""

    worker: PeerId
    channel_id: ChannelId
    receipt: Receipt | None
    signature: bytes
    cost: int


@dataclass(slots=True)
class Timings:
    """Seconds since the call, by trio's clock."""

    asked: float = 0.0
    accepted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
