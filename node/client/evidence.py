"""What workers have signed to this client, watched for two receipts that contradict each other.

Rules
- Every receipt of this process is known by channel, number and digest, the refused ones too. When a number does not rise above
  all that the channel has paid for, or the channel has refused one, the journal is asked for its older ones, once per channel.
- Jobs run side by side, so a number that does not rise is no fault by itself.
- Who contradicts itself is told of and avoided. Both receipts are in the journal: `gristmill slash prove` convicts by them.
"""

from __future__ import annotations

import logging

import trio

from node.store.evidence import channels_that_refused, keep_refused, receipts
from node.store.ledger import Ledger
from protocol.channel import ChannelState
from protocol.errors import GristmillError
from protocol.ids import ChannelId
from protocol.job import receipt_from_wire
from protocol.keys import recover
from protocol.messages import ReceiptMessage
from protocol.typed_data import Receipt

log = logging.getLogger(__name__)


class Evidence:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: dict[tuple[ChannelId, int], bytes] = {}
        self._read: set[ChannelId] = set()
        self._refusing: set[ChannelId] | None = None
        """Channels with refused receipts in the journal: those do not raise the channel's number. None before it was asked."""
        self._reading = trio.Lock()
        self.told: list[str] = []
        """What was found, in words."""

    async def accepted(self, state: ChannelState, receipt: Receipt) -> bool:
        """A verified receipt, before its end is journaled. Whether it contradicts another one."""
        contradicts = self._note(state, receipt)
        if not contradicts and (receipt.sequence <= state.sequence or await self._has_refused(state.channel_id)):
            await self._recall(state)
            contradicts = self._note(state, receipt)
        return contradicts

    async def refused(self, state: ChannelState, message: ReceiptMessage) -> bool:
        """A receipt that was not verified: kept when the worker has signed it for this channel. Whether it contradicts another.

        Raises `LedgerError`.
        """
        receipt = receipt_from_wire(message.receipt)
        try:
            signer = recover(receipt.digest(state.home), message.signature)
        except GristmillError:
            return False
        if signer != state.config.receiver or receipt.channel_id != state.channel_id:
            return False
        await keep_refused(self._ledger, message)
        return await self.accepted(state, receipt)

    def _note(self, state: ChannelState, receipt: Receipt) -> bool:
        digest = receipt.digest(state.home)
        first = self._known.setdefault((state.channel_id, receipt.sequence), digest)
        if first == digest:
            return False
        text = (
            f"worker {state.config.receiver} has signed two different receipts with number {receipt.sequence} on channel "
            f"{state.channel_id}: gristmill slash prove"
        )
        if text not in self.told:
            self.told.append(text)
            log.warning("%s", text)
        return True

    async def _has_refused(self, channel_id: ChannelId) -> bool:
        async with self._reading:
            if self._refusing is None:
                self._refusing = await trio.to_thread.run_sync(channels_that_refused, self._ledger)
        return channel_id in self._refusing

    async def _recall(self, state: ChannelState) -> None:
        """What the journal has of this channel. Older ones win: what contradicts them is the news, even when it is kept already.

        Under a lock: a second part beside the first one is not judged before the older ones are known.
        """
        async with self._reading:
            if state.channel_id in self._read:
                return
            found = await trio.to_thread.run_sync(lambda: list(receipts(self._ledger, state.channel_id)))
            older: dict[tuple[ChannelId, int], bytes] = {}
            for one in found:
                older.setdefault((state.channel_id, one.receipt.sequence), one.receipt.digest(state.home))
            self._known |= older
            self._read.add(state.channel_id)
