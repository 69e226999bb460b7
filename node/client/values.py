"""What a caller sees of a chat."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ids import ChannelId, PeerId
from protocol.logprobs import TokenLogprobs, unpack
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
    """Rows of float32, of a task that answers with numbers; as they came, those of `logprobs`."""

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """One for each of `token_ids`, where the chat asks for them; unpacked when it is read."""
        return tuple(unpack(self.token_ids, self.data)) if self.token_ids else ()


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
