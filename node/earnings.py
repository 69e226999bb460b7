"""What a worker has earned, day by day, folded from its journal: nothing here is counted twice or kept anywhere else.

A day is a UTC day of the worker's own clock (`Record.at_ms`), which is good enough to read and decides nothing. Amounts are in
the smallest unit of each token; sums of different tokens are never added, nor those of one address on two chains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from node.store.channels import fold_record
from node.store.ledger import Record
from protocol.channel import ChannelState, JobEnded, Role
from protocol.ids import ZERO_ADDRESS, ChannelId
from protocol.messages import JOB_PROTOCOL, ReceiptMessage, decode
from protocol.offers import Asset
from protocol.records import kind_of
from protocol.typed_data import Domain

DAY_MS = 24 * 3600 * 1000


@dataclass(slots=True)
class Day:
    """One token on one day."""

    parts: int = 0
    """Parts of jobs that ended, paid or not."""
    broken: int = 0
    """Those without a receipt: the other side broke off, or we did."""
    input_tokens: int = 0
    output_tokens: int = 0
    earned: int = 0


@dataclass(slots=True)
class Earnings:
    days: dict[tuple[int, Asset], Day] = field(default_factory=dict)
    """(days since 1970, what was earned)"""
    channels: dict[ChannelId, ChannelState] = field(default_factory=dict)

    @property
    def assets(self) -> list[Asset]:
        return sorted({asset_of(state) for state in self.channels.values()})

    def total(self, asset: Asset, amount: str) -> int:
        """Sum of one of `ChannelState`'s amounts over the channels in `asset`."""
        return sum(int(getattr(s, amount)) for s in self.channels.values() if asset_of(s) == asset)


def asset_of(state: ChannelState) -> Asset:
    """Chain id 0 where the journal is from before it named its chain, and no chain that we know fits."""
    return Asset.of(state.domain or Domain(0, ZERO_ADDRESS), state.config.token)


def earnings(records: Iterable[Record], domains: Sequence[Domain] = ()) -> Earnings:
    """Fold a worker's journal. Raises `LocalProtocolError` when it holds what this version cannot have written."""
    found = Earnings()
    ended = kind_of(JobEnded)
    for record in records:
        before = found.channels.get(ChannelId(record.subject)) if record.kind == ended else None
        fold_record(Role.WORKER, found.channels, record, domains)
        if before is None:
            continue
        day = found.days.setdefault((record.at_ms // DAY_MS, asset_of(before)), Day())
        day.parts += 1
        day.earned += found.channels[before.channel_id].spent - before.spent
        receipt = _receipt(record)
        if receipt is None:
            day.broken += 1
        else:
            day.input_tokens += receipt.receipt.input_tokens
            day.output_tokens += receipt.receipt.output_tokens
    return found


def _receipt(record: Record) -> ReceiptMessage | None:
    raw = msgspec.msgpack.decode(record.body)["receipt"]
    if not raw:
        return None
    message = decode(JOB_PROTOCOL, raw)
    return message if isinstance(message, ReceiptMessage) else None
