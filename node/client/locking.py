"""Locking money for a worker: a channel to it, opened or raised.

Rules
- A channel to a new worker is a signature of ours that the worker submits; we send no transaction.
- Nothing is signed that the vault does not hold: a signature counts for the day, whatever becomes of it.
- What is signed is journaled before it is sent; an allocation that is good still and only not locked yet is sent again.
- What the worker says is not enough: the contract says what is locked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import trio
from msgspec.structs import replace

from node.client.settings import ClientSettings
from node.errors import InsufficientFunds, NodeError, SignerRefused, WorkerFault
from node.network.drive import converse
from node.ports import Network
from node.store.faults import fault_point
from protocol.channel import AllocationRaised, ChannelOpened, ChannelState
from protocol.errors import RemoteProtocolError
from protocol.ids import Address, ChannelId, Hash32, PeerId
from protocol.messages import CHANNEL_PROTOCOL, ChannelStatus, OpenChannel, amount_to_wire, config_to_wire
from protocol.offers import Asset, Payment, VerifiedOffer
from protocol.signing import ChannelAllocation
from protocol.signing_history import Ahead
from protocol.typed_data import Allocation, ChannelConfig

if TYPE_CHECKING:
    from node.client.wallet import ClientWallet


class Locking:
    """Of one wallet."""

    def __init__(
        self,
        wallet: ClientWallet,
        network: Network,
        settings: ClientSettings,
        *,
        random32: Callable[[], bytes],
        now_s: Callable[[], int],
        ahead: Mapping[ChannelId, Ahead],
    ) -> None:
        self._wallet = wallet
        self._network = network
        self._settings = settings
        self._random32 = random32
        self._now_s = now_s
        self._allocated_before = {channel: one.allocation for channel, one in ahead.items()}
        """By channel, an allocation that was signed and is not in the journal: we died in between, or the channel had changed."""
        self._opening = {asset: trio.Lock() for asset in wallet.means}
        """One each: a chain that hangs holds up nothing on another."""

    def _channel_to(self, offer: VerifiedOffer, payment: Payment, needed: int) -> ChannelState | None:
        """An open channel to this worker in this asset with `needed` free."""
        for state in self._wallet.book.channels.values():
            if (
                _between(state, offer, payment)
                and not state.leaving
                and state.channel_id not in self._wallet.book.frozen
                and state.allocated == state.authorized
                and state.free >= needed
                and self._wallet.vouchers.usable(state, needed)
            ):
                return state
        return None

    async def channel(self, offer: VerifiedOffer, payment: Payment, needed: int) -> tuple[ChannelState, bytes]:
        """A channel with `needed` free, opened or raised if there is none; and the hash of the worker's transaction.

        Raises `InsufficientFunds`, `WorkerFault`, `NetworkError`, `Timeout`.
        """
        state = self._channel_to(offer, payment, needed)
        if state is not None:
            return state, b""
        async with self._opening[payment.asset]:  # many jobs at once open one channel, not many
            state = self._channel_to(offer, payment, needed)
            if state is not None:
                return state, b""
            return await self._open(offer, payment, needed)

    async def _open(self, offer: VerifiedOffer, payment: Payment, needed: int) -> tuple[ChannelState, bytes]:
        wanted = self._allocation(offer, payment, needed)
        channel_id = wanted.channel_id
        if isinstance(wanted, ChannelState):  # the worker may have submitted it and not have said so
            wanted = await self._wallet.refresh(channel_id)
        total = wanted.authorized if isinstance(wanted, ChannelState) else wanted.allocated
        more = max(0, total - self._allocated(channel_id))
        balance = await self._wallet.balance(payment.asset)
        if balance < more:  # before anything is signed: a signature counts for the day, whatever becomes of it
            raise InsufficientFunds(
                f"opening a channel to {offer.peer_id} needs {more}, the vault holds {balance} (smallest units)",
                hint="gristmill deposit AMOUNT",
            )
        if not isinstance(wanted, ChannelState):
            await self._journal(wanted)
        self._wallet.saw(payment.asset, balance - more)
        return await self.submit(offer.peer_id, channel_id)

    def _allocation(
        self, offer: VerifiedOffer, payment: Payment, needed: int
    ) -> ChannelOpened | AllocationRaised | ChannelState:
        """What to sign: more on a channel that exists, or a new channel. Or the channel whose last allocation is good still and
        only not locked yet: that one is sent again."""
        amount = max(self._wallet.means[payment.asset].allocation, needed, payment.min_allocation)
        valid_before = self._valid_before()
        for state in self._wallet.book.channels.values():
            usable = not state.leaving and state.channel_id not in self._wallet.book.frozen
            if _between(state, offer, payment) and usable and self._wallet.vouchers.usable(state, needed):
                enough = (
                    state.allocated < state.authorized and state.authorized - state.spent - state.reserved >= needed
                )
                if enough and state.valid_before > self._now_s() + self._settings.open_timeout_ms // 1000:
                    return state
                # What was signed and is in no journal was never sent: going past it by one is enough.
                before = self._allocated_before.get(state.channel_id, 0)
                more = max(1, payment.min_allocation) if enough else amount
                total = max(state.authorized + more, before + 1)
                return AllocationRaised(state.channel_id, total, valid_before, b"")
        config = ChannelConfig(
            payer=self._wallet.payer.address,
            payer_authorizer=self._wallet.session.address,
            receiver=offer.worker,
            receiver_authorizer=offer.worker,
            token=Address(payment.token),
            withdraw_delay=max(self._settings.withdraw_delay_s, payment.min_withdraw_delay),
            salt=Hash32(self._random32()),
        )
        domain = self._wallet.means[payment.asset].domain
        return ChannelOpened(config.channel_id(domain), config, amount, valid_before, b"", domain)

    async def _journal(self, wanted: ChannelOpened | AllocationRaised) -> None:
        """Sign an allocation and journal it. The signer goes on only above what it has signed, so a signature that misses the
        journal is remembered: the next allocation of its channel goes past it."""
        if isinstance(wanted, ChannelOpened):
            config, domain = wanted.config, wanted.domain
        else:
            state = self._wallet.book.channels[wanted.channel_id]
            config, domain = state.config, state.home
        if domain is None:
            raise NodeError(f"channel {wanted.channel_id} is on no chain that we know")
        allocation = Allocation(wanted.channel_id, wanted.allocated, wanted.valid_before)
        with trio.CancelScope(shield=True):
            try:
                signature = await self._wallet.payer.sign(ChannelAllocation(config, allocation), domain)
                await self._wallet.book.change([replace(wanted, signature=signature)])
            except SignerRefused:
                raise  # nothing was signed
            except Exception:
                self._allocated_before[wanted.channel_id] = wanted.allocated
                raise

    def _allocated(self, channel_id: ChannelId) -> int:
        state = self._wallet.book.get(channel_id)
        return state.allocated if state else 0

    async def submit(self, peer: PeerId, channel_id: ChannelId) -> tuple[ChannelState, bytes]:
        """Send the last allocation of a channel to its worker, and see it locked. Raises as `channel` does."""
        state = self._wallet.book.channels[channel_id]
        question = OpenChannel(
            chain_id=state.home.chain_id,
            contract=bytes(state.home.verifying_contract),
            config=config_to_wire(state.config),
            allocated=amount_to_wire(state.authorized),
            valid_before=state.valid_before,
            signature=state.allocation_signature,
        )
        timeout_s = self._settings.open_timeout_ms / 1000
        fault_point("send.allocation")
        try:
            reply = await converse(self._network, peer, CHANNEL_PROTOCOL, question, timeout_s=timeout_s)
        except RemoteProtocolError as error:
            raise WorkerFault(f"{peer} did not open the channel: {error}") from error
        if not isinstance(reply, ChannelStatus):
            raise WorkerFault(f"{peer} answered {type(reply).__name__} to an open request")
        # The worker's word is not enough: the contract says what is locked. Our servers may be some blocks behind the worker's.
        patience = trio.current_time() + self._settings.lock_wait_ms / 1000
        state = await self._wallet.refresh(channel_id)
        while state.allocated < state.authorized and trio.current_time() < patience:
            await trio.sleep(0.1)
            state = await self._wallet.refresh(channel_id)
        if state.allocated < state.authorized:
            raise WorkerFault(f"{peer} says the channel is open, but the contract has locked {state.allocated}")
        return state, reply.transaction

    def _valid_before(self) -> int:
        return self._now_s() + self._settings.allocation_valid_s


def _between(state: ChannelState, offer: VerifiedOffer, payment: Payment) -> bool:
    """Whether a channel pays this worker in this asset."""
    return (
        state.config.receiver == offer.worker
        and state.domain is not None
        and Asset.of(state.domain, state.config.token) == payment.asset
    )
