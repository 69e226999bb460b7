"""The client's vouchers: signed one at a time per channel, each on record at the signer and in the journal before it is sent.

Between the look at a channel and the signature others may pay on it, so look, signature and journal entry are one turn. What
was signed and did not reach the journal (a crash in between) never left, but the signer goes no lower: the next voucher is that
one or a higher one, as soon as the jobs on the channel can cost so much (L4).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from node.ports import Signer
from node.store.channels import ChannelBook
from protocol.channel import Change, ChannelState, VoucherAdded
from protocol.errors import LocalProtocolError
from protocol.ids import ChannelId
from protocol.signing import Signable
from protocol.typed_data import Domain, Voucher

log = logging.getLogger(__name__)
Target = Callable[[ChannelState], int | None]
"""The total to vouch for, seen from the channel as it is now; None when the last voucher will do."""


@dataclass(frozen=True, slots=True)
class Signed:
    """The channel's highest voucher, ready to be sent, and what was signed beside it."""

    cumulative: int
    signature: bytes
    beside: tuple[bytes, ...] = ()


class Vouchers:
    def __init__(self, session: Signer, book: ChannelBook, floors: Mapping[ChannelId, int]) -> None:
        """`floors`: what was signed on a channel and is not in the journal (`node.signer.journal.attach`)."""
        self._session = session
        self._book = book
        self._floors = dict(floors)
        self._turns: dict[ChannelId, trio.Lock] = {}

    def usable(self, state: ChannelState, needed: int) -> bool:
        """Whether a job that costs up to `needed` lets us go on above what was signed before a crash."""
        floor = self._floors.get(state.channel_id, 0)
        return floor <= max(state.cumulative, state.spent + state.reserved + needed)

    async def add(
        self,
        channel_id: ChannelId,
        target: Target,
        *,
        beside: Sequence[tuple[Signable, Domain]] = (),
        then: Sequence[Change] = (),
    ) -> Signed:
        """Vouch for `target`, journal it with what is to come `then`, and sign what is wanted `beside` it in the same breath.

        A voucher that the channel does not take any more is left out; `then` is journaled in any case. Raises `SignerError`,
        `LedgerError`, and `LocalProtocolError` when `then` breaks a rule.
        """
        async with self._turns.setdefault(channel_id, trio.Lock()):
            state = self._book.channels[channel_id]
            cumulative = self._choose(state, target(state))
            asked = list(beside)
            if cumulative > state.cumulative or not state.voucher_signature:
                asked.insert(0, (Voucher(channel_id, cumulative), state.home))
            signatures = await self._session.sign_all(asked) if asked else []
            self._floors[channel_id] = max(cumulative, self._floors.get(channel_id, 0))
            own = signatures.pop(0) if len(asked) > len(beside) else state.voucher_signature
            signed = Signed(cumulative, own, tuple(signatures))
            changes: list[Change] = list(then)
            if cumulative > state.cumulative:
                changes.insert(0, VoucherAdded(channel_id, cumulative, own))
            try:
                posted = self._book.begin(changes)
            except LocalProtocolError as error:
                if len(changes) == len(then):
                    raise
                log.info("voucher of %d is not needed any more: %s", cumulative, error)
                now = self._book.channels[channel_id]
                signed = Signed(now.cumulative, now.voucher_signature, signed.beside)
                posted = self._book.begin(then)
        await posted.durable()
        return signed

    def _choose(self, state: ChannelState, wanted: int | None) -> int:
        """What to vouch for: as wanted, never below what was signed, never above what the jobs can cost."""
        floor = self._floors.get(state.channel_id, 0)
        if wanted is None or wanted <= state.cumulative:
            return state.cumulative
        if wanted < floor <= state.spent + state.reserved:
            return floor
        if wanted < floor:
            log.warning(
                "channel %s: %d was signed before a crash, the jobs on it can cost %d; nothing can be vouched for",
                state.channel_id,
                floor,
                state.spent + state.reserved,
            )
            return state.cumulative
        return wanted
