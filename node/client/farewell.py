"""Ending a channel: at once when the worker consents, else by the delayed withdrawal that nobody can refuse.

Rules
- What the worker earned it gets: it may claim what is vouched for, whatever we count.
- Its consent is checked and journaled before the transaction is sent.
- Where it does not consent, or is not there, the withdrawal begins; after the delay the same call takes the money home.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from node.errors import NodeError
from node.network.drive import converse
from node.ports import Network, TxResult
from protocol.channel import Change, ChannelState, CloseSigned, JobEnded, JobOpened
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import ChannelId, JobId, PeerId
from protocol.keys import require_signer
from protocol.messages import CHANNEL_PROTOCOL, CloseConsent, RequestClose, amount_from_wire, amount_to_wire
from protocol.typed_data import Close

if TYPE_CHECKING:
    from node.client.wallet import ClientWallet


@dataclass(slots=True)
class Farewell:
    """How one channel ended, or began to."""

    channel_id: ChannelId
    cooperative: bool
    returned: int
    """Back in the vault now."""
    available_at: int
    """Chain seconds from which the rest can be taken; 0 when it is back already."""
    transactions: list[TxResult] = field(default_factory=list)
    note: str = ""


class Parting:
    """Of one wallet."""

    def __init__(self, wallet: ClientWallet, network: Network) -> None:
        self._wallet = wallet
        self._network = network

    async def close(self, channel_id: ChannelId, peer: PeerId | None) -> Farewell:
        """End a channel: at once when the worker consents, else by the delayed withdrawal that nobody can refuse.

        Called again after the delay it takes the money home. Raises `ChainError`, or `NodeError` while jobs run on it.
        """
        state = await self._wallet.refresh(channel_id)
        if state.open_jobs:
            raise NodeError(
                f"{len(state.open_jobs)} jobs are under way on this channel", hint="wait until they end, or cancel them"
            )
        if state.closed:
            return Farewell(channel_id, False, 0, 0, note="closed already")
        if state.allocated == 0:
            return Farewell(channel_id, False, 0, 0, note="nothing is locked on this channel")
        if state.withdraw_at:
            return await self._finish(state)
        reason = "the worker's address is not known"
        if peer is not None:
            try:
                return await self._cooperate(state, peer)
            except NodeError as error:
                reason = str(error)
            except RemoteProtocolError as error:
                reason = str(error)
        result = await self._wallet.chains.of(state.domain).initiate_withdraw(state.config)
        result.sound()
        state = await self._wallet.refresh(channel_id)
        note = f"the worker did not consent ({reason}); the delayed withdrawal has begun"
        return Farewell(channel_id, False, 0, state.withdraw_at, [result], note)

    async def _finish(self, state: ChannelState) -> Farewell:
        chain = self._wallet.chains.of(state.domain)
        head = await chain.head()
        if head.timestamp < state.withdraw_at:
            wait = state.withdraw_at - head.timestamp
            return Farewell(state.channel_id, False, 0, state.withdraw_at, note=f"{wait} s of the delay are left")
        result = await chain.finalize_withdraw(state.config)
        result.sound()
        after = await self._wallet.refresh(state.channel_id)
        return Farewell(state.channel_id, False, state.allocated - after.claimed, 0, [result])

    async def _cooperate(self, state: ChannelState, peer: PeerId) -> Farewell:
        owed = max(state.spent, state.claimed)
        try:
            reply = await self._ask_close(state, peer, owed)
        except RemoteProtocolError as error:
            # A stream that broke leaves the two sides with different counts. What is vouched for the worker can claim anyway.
            if error.code is not WireCode.BAD_VOUCHER or state.cumulative <= owed:
                raise
            owed = state.cumulative
            reply = await self._ask_close(state, peer, owed)
        final = amount_from_wire(reply.final)
        if final > owed:
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, f"the worker wants {final}, we owe {owed}")
        consent = Close(state.channel_id, final).digest(state.home)
        require_signer(consent, reply.signature, state.config.receiver_authorizer, "close")
        changes: list[Change] = [CloseSigned(state.channel_id, final, reply.signature)]
        if final > max(state.spent, state.claimed):
            changes = [*_conceded(state, final), *changes]
        if state.final is None:
            await self._wallet.book.change(changes)
        result = await self._wallet.chains.of(state.domain).close_channel(
            state.config, final, state.cumulative, state.voucher_signature, reply.signature
        )
        result.sound()
        await self._wallet.refresh(state.channel_id)
        return Farewell(state.channel_id, True, state.allocated - final, 0, [result])

    async def _ask_close(self, state: ChannelState, peer: PeerId, final: int) -> CloseConsent:
        wish = Close(state.channel_id, final)
        question = RequestClose(
            channel_id=bytes(state.channel_id),
            final=amount_to_wire(final),
            signature=await self._wallet.session.sign(wish, state.home),
        )
        reply = await converse(self._network, peer, CHANNEL_PROTOCOL, question, timeout_s=10)
        if not isinstance(reply, CloseConsent):
            raise RemoteProtocolError(WireCode.UNEXPECTED, f"{type(reply).__name__} is no consent")
        return reply


def _conceded(state: ChannelState, final: int) -> list[Change]:
    """The worker counts more than we do, within what is vouched for: booked as a part of no job, so the journal says so."""
    more = final - state.spent
    part = (JobId(bytes(32)), 0)
    return [JobOpened(state.channel_id, *part, 0, more), JobEnded(state.channel_id, *part, more, 0, b"")]
