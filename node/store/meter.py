"""What is under way and not yet paid: running cost per channel, for either role; and the operator's total risk."""

from __future__ import annotations

from collections.abc import Mapping

from protocol.channel import ChannelState, Part
from protocol.ids import ChannelId
from protocol.payment import unsecured


class Meter:
    """Running costs of the parts under way. In memory only: a restart forgets work, never money (the vouchers are journaled)."""

    def __init__(self) -> None:
        self._running: dict[ChannelId, dict[Part, int]] = {}

    def set(self, channel: ChannelId, part: Part, cost: int) -> None:
        self._running.setdefault(channel, {})[part] = cost

    def drop(self, channel: ChannelId, part: Part) -> None:
        parts = self._running.get(channel)
        if parts is not None:
            parts.pop(part, None)
            if not parts:
                del self._running[channel]

    def running(self, channel: ChannelId, *, without: Part | None = None) -> int:
        """Cost so far of the channel's parts under way, in the smallest unit."""
        return sum(cost for part, cost in self._running.get(channel, {}).items() if part != without)

    def credit_in_use(self, channels: Mapping[ChannelId, ChannelState]) -> int:
        """Delivered and not covered, over all channels with work under way."""
        return sum(unsecured(channels[c], self.running(c)) for c in self._running if c in channels)

    @property
    def streams(self) -> int:
        return sum(len(parts) for parts in self._running.values())
