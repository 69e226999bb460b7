"""The client's money: its channels, opened and closed; what is in the vault.

A deposit is the only transaction a client ever needs. A channel to a new worker is a signature that the worker submits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from node.client.settings import ClientSettings
from node.errors import ChainError, InsufficientFunds, NodeError, WorkerFault
from node.network.drive import converse
from node.ports import Chain, Network, TxResult
from node.store.channels import ChannelBook, refresh
from protocol.channel import (
    AllocationRaised,
    Change,
    ChannelOpened,
    ChannelState,
    CloseSigned,
    JobEnded,
    JobOpened,
)
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import Address, ChannelId, Hash32, JobId, PeerId
from protocol.keys import PrivateKey, require_signer
from protocol.messages import (
    CHANNEL_PROTOCOL,
    ChannelStatus,
    CloseConsent,
    OpenChannel,
    RequestClose,
    amount_from_wire,
    amount_to_wire,
    config_to_wire,
)
from protocol.offers import VerifiedOffer
from protocol.typed_data import Allocation, ChannelConfig, Close, Domain

log = logging.getLogger(__name__)


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


class ClientWallet:
    def __init__(
        self,
        *,
        payer: PrivateKey,
        session: PrivateKey,
        chain: Chain,
        network: Network,
        book: ChannelBook,
        settings: ClientSettings,
        random32: Callable[[], bytes],
        now_s: Callable[[], int],
    ) -> None:
        self.payer = payer
        self.session = session
        self.chain = chain
        self.book = book
        self._network = network
        self._settings = settings
        self._random32 = random32
        self._now_s = now_s
        self._opening = trio.Lock()

    @property
    def domain(self) -> Domain:
        return self.chain.domain

    # ------------------------------------------------------------------------------------------------------ vault

    async def deposit(self, amount: int, token: Address | None = None) -> list[TxResult]:
        """Put tokens into the vault. Raises `ChainError` or `InsufficientFunds`."""
        token = token or self.chain.token
        held = await self.chain.token_balance(token, self.payer.address)
        if held < amount:
            raise InsufficientFunds(
                f"the account {self.payer.address} holds {held}, the deposit is {amount} (smallest units)",
                hint="send tokens to this account first",
            )
        return _all_ok(list(await self.chain.deposit(token, amount)))

    async def balance(self, token: Address | None = None) -> int:
        """Vault balance that is not allocated to any channel."""
        return await self.chain.vault_balance(token or self.chain.token, self.payer.address)

    async def withdraw(self, amount: int, to: Address | None = None, token: Address | None = None) -> TxResult:
        """From the vault to an account."""
        result = await self.chain.withdraw(token or self.chain.token, amount, to or self.payer.address)
        _all_ok([result])
        return result

    # --------------------------------------------------------------------------------------------------- channels

    def channel_to(self, offer: VerifiedOffer, needed: int) -> ChannelState | None:
        """An open channel to this worker in the offer's token with `needed` free."""
        for state in self.book.channels.values():
            if (
                state.config.receiver == offer.worker
                and state.config.token == offer.document.token
                and not state.leaving
                and state.channel_id not in self.book.frozen
                and state.allocated == state.authorized
                and state.free >= needed
            ):
                return state
        return None

    async def ensure_channel(self, offer: VerifiedOffer, needed: int) -> tuple[ChannelState, bytes]:
        """A channel with `needed` free, opened or raised if there is none; and the hash of the worker's transaction.

        Raises `InsufficientFunds`, `WorkerFault`, `NetworkError`, `Timeout`.
        """
        state = self.channel_to(offer, needed)
        if state is not None:
            return state, b""
        async with self._opening:  # many jobs at once open one channel, not many
            state = self.channel_to(offer, needed)
            if state is not None:
                return state, b""
            return await self._open(offer, needed)

    async def _open(self, offer: VerifiedOffer, needed: int) -> tuple[ChannelState, bytes]:
        change = self._allocation(offer, needed)
        more = change.allocated - self._allocated(change.channel_id)
        balance = await self.chain.vault_balance(Address(offer.document.token), self.payer.address)
        if balance < more:
            raise InsufficientFunds(
                f"opening a channel to {offer.peer_id} needs {more}, the vault holds {balance} (smallest units)",
                hint="gristmill deposit AMOUNT",
            )
        await self.book.change([change])
        return await self._submit(offer.peer_id, change.channel_id)

    def _allocation(self, offer: VerifiedOffer, needed: int) -> ChannelOpened | AllocationRaised:
        """The allocation to sign: more on a channel that exists, or a new channel."""
        amount = max(self._settings.allocation, needed)
        valid_before = self._valid_before()
        for state in self.book.channels.values():
            same = state.config.receiver == offer.worker and state.config.token == offer.document.token
            if same and not state.leaving and state.channel_id not in self.book.frozen:
                # Signed but not locked on chain (the worker never submitted it): the next one carries the missing part too.
                enough = (
                    state.allocated < state.authorized and state.authorized - state.spent - state.reserved >= needed
                )
                total = state.authorized + (1 if enough else amount)
                signature = self._sign(state.channel_id, total, valid_before)
                return AllocationRaised(state.channel_id, total, valid_before, signature)
        config = ChannelConfig(
            payer=self.payer.address,
            payer_authorizer=self.session.address,
            receiver=offer.worker,
            receiver_authorizer=offer.worker,
            token=Address(offer.document.token),
            withdraw_delay=max(self._settings.withdraw_delay_s, offer.document.min_withdraw_delay),
            salt=Hash32(self._random32()),
        )
        channel_id = config.channel_id(self.domain)
        return ChannelOpened(channel_id, config, amount, valid_before, self._sign(channel_id, amount, valid_before))

    def _sign(self, channel_id: ChannelId, allocated: int, valid_before: int) -> bytes:
        return self.payer.sign(Allocation(channel_id, allocated, valid_before).digest(self.domain))

    def _allocated(self, channel_id: ChannelId) -> int:
        state = self.book.get(channel_id)
        return state.allocated if state else 0

    async def _submit(self, peer: PeerId, channel_id: ChannelId) -> tuple[ChannelState, bytes]:
        state = self.book.channels[channel_id]
        question = OpenChannel(
            config=config_to_wire(state.config),
            allocated=amount_to_wire(state.authorized),
            valid_before=state.valid_before,
            signature=state.allocation_signature,
        )
        timeout_s = self._settings.open_timeout_ms / 1000
        try:
            reply = await converse(self._network, peer, CHANNEL_PROTOCOL, question, timeout_s=timeout_s)
        except RemoteProtocolError as error:
            raise WorkerFault(f"{peer} did not open the channel: {error}") from error
        if not isinstance(reply, ChannelStatus):
            raise WorkerFault(f"{peer} answered {type(reply).__name__} to an open request")
        # The worker's word is not enough: the contract says what is locked.
        state = await self.refresh(channel_id)
        if state.allocated < state.authorized:
            raise WorkerFault(f"{peer} says the channel is open, but the contract has locked {state.allocated}")
        return state, reply.transaction

    async def refresh(self, channel_id: ChannelId) -> ChannelState:
        """Bring one channel up to what the contract says now."""
        state, _ = await refresh(self.book, self.chain, channel_id)
        return state

    # --------------------------------------------------------------------------------------------------- farewell

    async def close(self, channel_id: ChannelId, peer: PeerId | None) -> Farewell:
        """End a channel: at once when the worker consents, else by the delayed withdrawal that nobody can refuse.

        Called again after the delay it takes the money home. Raises `ChainError`, or `NodeError` while jobs run on it.
        """
        state = await self.refresh(channel_id)
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
        result = await self.chain.initiate_withdraw(state.config)
        _all_ok([result])
        state = await self.refresh(channel_id)
        note = f"the worker did not consent ({reason}); the delayed withdrawal has begun"
        return Farewell(channel_id, False, 0, state.withdraw_at, [result], note)

    async def _finish(self, state: ChannelState) -> Farewell:
        head = await self.chain.head()
        if head.timestamp < state.withdraw_at:
            wait = state.withdraw_at - head.timestamp
            return Farewell(state.channel_id, False, 0, state.withdraw_at, note=f"{wait} s of the delay are left")
        result = await self.chain.finalize_withdraw(state.config)
        _all_ok([result])
        after = await self.refresh(state.channel_id)
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
        consent = Close(state.channel_id, final).digest(self.domain)
        require_signer(consent, reply.signature, state.config.receiver_authorizer, "close")
        changes: list[Change] = [CloseSigned(state.channel_id, final, reply.signature)]
        if final > max(state.spent, state.claimed):
            changes = [*_conceded(state, final), *changes]
        if state.final is None:
            await self.book.change(changes)
        result = await self.chain.close_channel(
            state.config, final, state.cumulative, state.voucher_signature, reply.signature
        )
        _all_ok([result])
        await self.refresh(state.channel_id)
        return Farewell(state.channel_id, True, state.allocated - final, 0, [result])

    async def _ask_close(self, state: ChannelState, peer: PeerId, final: int) -> CloseConsent:
        wish = Close(state.channel_id, final)
        question = RequestClose(
            channel_id=bytes(state.channel_id),
            final=amount_to_wire(final),
            signature=self.session.sign(wish.digest(self.domain)),
        )
        reply = await converse(self._network, peer, CHANNEL_PROTOCOL, question, timeout_s=10)
        if not isinstance(reply, CloseConsent):
            raise RemoteProtocolError(WireCode.UNEXPECTED, f"{type(reply).__name__} is no consent")
        return reply

    def _valid_before(self) -> int:
        return self._now_s() + self._settings.allocation_valid_s


def _conceded(state: ChannelState, final: int) -> list[Change]:
    """The worker counts more than we do, within what is vouched for: booked as a part of no job, so the journal says so."""
    more = final - state.spent
    part = (JobId(bytes(32)), 0)
    return [JobOpened(state.channel_id, *part, 0, more), JobEnded(state.channel_id, *part, more, 0, b"")]


def _all_ok(results: list[TxResult]) -> list[TxResult]:
    for result in results:
        if not result.ok:
            raise ChainError(
                f"the {result.purpose} transaction was refused by the contract: {result.error or 'no reason given'}"
            )
    return results
