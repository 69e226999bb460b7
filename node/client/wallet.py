"""The client's money: its channels, opened and closed; what is in the vaults.

A deposit is the only transaction a client ever needs. A channel to a new worker is a signature that the worker submits.

The client may pay with several assets (`Means`), on several chains. Every channel is on one chain, and all that is signed about
it is signed in that chain's domain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import trio
from msgspec.structs import replace

from node.chains import Chains
from node.client.settings import ClientSettings, Means
from node.client.vouchers import Vouchers
from node.errors import ConfigError, InsufficientFunds, NodeError, SignerRefused, WorkerFault
from node.network.drive import converse
from node.ports import Chain, Network, Signer, TxResult
from node.store.channels import ChannelBook, refresh
from node.store.faults import fault_point
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
from protocol.keys import require_signer
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
from protocol.offers import Asset, Payment, VerifiedOffer
from protocol.selection import Purse
from protocol.signing import ChannelAllocation
from protocol.signing_history import Ahead
from protocol.typed_data import Allocation, ChannelConfig, Close

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
        payer: Signer,
        session: Signer,
        chains: Chains,
        means: Sequence[Means],
        network: Network,
        book: ChannelBook,
        settings: ClientSettings,
        random32: Callable[[], bytes],
        now_s: Callable[[], int],
        ahead: Mapping[ChannelId, Ahead] = MappingProxyType({}),
    ) -> None:
        """`ahead`: what was signed and is not in the journal (`node.signer.journal.attach`)."""
        self.payer = payer
        self.session = session
        self.chains = chains
        self.means = {one.asset: one for one in means}
        """What is paid with, the preferred one first."""
        if not means or len(self.means) != len(means):
            raise ConfigError(
                "a client pays with at least one token, and with each once",
                hint="look at client.pay_with and [tokens.NAME]",
            )
        self.book = book
        self.vouchers = Vouchers(session, book, {channel: one.voucher for channel, one in ahead.items()})
        self._allocated_before = {channel: one.allocation for channel, one in ahead.items()}
        """By channel, an allocation that was signed and is not in the journal: we died in between, or the channel had changed."""
        self._network = network
        self._settings = settings
        self._random32 = random32
        self._now_s = now_s
        self._opening = {asset: trio.Lock() for asset in self.means}
        """One each: a chain that hangs holds up nothing on another."""
        self._seen: dict[Asset, int] = {}
        """What the vaults held when last looked at, less what was allocated since."""

    @property
    def chain(self) -> Chain:
        """The one of the preferred means."""
        return self.chains.of(self.preferred.domain)

    @property
    def preferred(self) -> Asset:
        """What amounts are in where nobody says otherwise."""
        return next(iter(self.means))

    def purses(self) -> list[Purse]:
        """What a job can be paid with, as `protocol.selection` sees it."""
        free: dict[Asset, dict[Address, int]] = {}
        for state in self.book.channels.values():
            usable = not state.leaving and state.channel_id not in self.book.frozen
            if state.domain is not None and usable and state.allocated == state.authorized:
                held = free.setdefault(Asset.of(state.domain, state.config.token), {})
                held[state.config.receiver] = max(state.free, held.get(state.config.receiver, 0))
        return [
            Purse(
                asset=asset,
                rate=one.rate,
                max_cost=one.max_cost or None,
                max_price=one.max_price,
                allocation=one.allocation,
                available=self._seen.get(asset),
                free=free.get(asset, {}),
            )
            for asset, one in self.means.items()
        ]

    # ------------------------------------------------------------------------------------------------------ vault

    async def look(self) -> None:
        """See what the vaults hold of everything that we pay with. Raises `ChainError`."""
        for asset in self.means:
            await self.balance(asset)

    async def deposit(self, amount: int, asset: Asset | None = None, *, request: str = "") -> list[TxResult]:
        """Put tokens into the vault. Raises `ChainError` or `InsufficientFunds`.

        `request`: an id of the caller's, under which this happens once however often it is asked for.
        """
        chain, token = self._chain_and_token(asset)
        held = await chain.token_balance(token, self.payer.address)
        if held < amount and not (request and chain.has_answered(request, "deposit")):
            raise InsufficientFunds(
                f"the account {self.payer.address} holds {held}, the deposit is {amount} (smallest units)",
                hint="send tokens to this account first",
            )
        self._seen.pop(asset or self.preferred, None)
        return [result.sound() for result in await chain.once(request).deposit(token, amount)]

    async def balance(self, asset: Asset | None = None) -> int:
        """Vault balance that is not allocated to any channel."""
        chain, token = self._chain_and_token(asset)
        held = self._seen[asset or self.preferred] = await chain.vault_balance(token, self.payer.address)
        return held

    async def withdraw(
        self, amount: int, to: Address | None = None, asset: Asset | None = None, *, request: str = ""
    ) -> TxResult:
        """From the vault to an account. `request` as for `deposit`."""
        chain, token = self._chain_and_token(asset)
        self._seen.pop(asset or self.preferred, None)
        result = await chain.once(request).withdraw(token, amount, to or self.payer.address)
        result.sound()
        return result

    def _chain_and_token(self, asset: Asset | None) -> tuple[Chain, Address]:
        asset = asset or self.preferred
        return self.chains.of(asset.domain), Address(asset.token)

    # --------------------------------------------------------------------------------------------------- channels

    def channel_to(self, offer: VerifiedOffer, payment: Payment, needed: int) -> ChannelState | None:
        """An open channel to this worker in this asset with `needed` free."""
        for state in self.book.channels.values():
            if (
                _between(state, offer, payment)
                and not state.leaving
                and state.channel_id not in self.book.frozen
                and state.allocated == state.authorized
                and state.free >= needed
                and self.vouchers.usable(state, needed)
            ):
                return state
        return None

    async def ensure_channel(self, offer: VerifiedOffer, payment: Payment, needed: int) -> tuple[ChannelState, bytes]:
        """A channel with `needed` free, opened or raised if there is none; and the hash of the worker's transaction.

        Raises `InsufficientFunds`, `WorkerFault`, `NetworkError`, `Timeout`.
        """
        state = self.channel_to(offer, payment, needed)
        if state is not None:
            return state, b""
        async with self._opening[payment.asset]:  # many jobs at once open one channel, not many
            state = self.channel_to(offer, payment, needed)
            if state is not None:
                return state, b""
            return await self._open(offer, payment, needed)

    async def _open(self, offer: VerifiedOffer, payment: Payment, needed: int) -> tuple[ChannelState, bytes]:
        wanted = self._allocation(offer, payment, needed)
        channel_id = wanted.channel_id
        if isinstance(wanted, ChannelState):  # the worker may have submitted it and not have said so
            wanted = await self.refresh(channel_id)
        total = wanted.authorized if isinstance(wanted, ChannelState) else wanted.allocated
        more = max(0, total - self._allocated(channel_id))
        balance = await self.balance(payment.asset)
        if balance < more:  # before anything is signed: a signature counts for the day, whatever becomes of it
            raise InsufficientFunds(
                f"opening a channel to {offer.peer_id} needs {more}, the vault holds {balance} (smallest units)",
                hint="gristmill deposit AMOUNT",
            )
        if not isinstance(wanted, ChannelState):
            await self._journal(wanted)
        self._seen[payment.asset] = balance - more
        return await self._submit(offer.peer_id, channel_id)

    def _allocation(
        self, offer: VerifiedOffer, payment: Payment, needed: int
    ) -> ChannelOpened | AllocationRaised | ChannelState:
        """What to sign: more on a channel that exists, or a new channel. Or the channel whose last allocation is good still and
        only not locked yet: that one is sent again."""
        amount = max(self.means[payment.asset].allocation, needed, payment.min_allocation)
        valid_before = self._valid_before()
        for state in self.book.channels.values():
            usable = not state.leaving and state.channel_id not in self.book.frozen
            if _between(state, offer, payment) and usable and self.vouchers.usable(state, needed):
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
            payer=self.payer.address,
            payer_authorizer=self.session.address,
            receiver=offer.worker,
            receiver_authorizer=offer.worker,
            token=Address(payment.token),
            withdraw_delay=max(self._settings.withdraw_delay_s, payment.min_withdraw_delay),
            salt=Hash32(self._random32()),
        )
        domain = self.means[payment.asset].domain
        return ChannelOpened(config.channel_id(domain), config, amount, valid_before, b"", domain)

    async def _journal(self, wanted: ChannelOpened | AllocationRaised) -> None:
        """Sign an allocation and journal it. The signer goes on only above what it has signed, so a signature that misses the
        journal is remembered: the next allocation of its channel goes past it."""
        if isinstance(wanted, ChannelOpened):
            config, domain = wanted.config, wanted.domain
        else:
            state = self.book.channels[wanted.channel_id]
            config, domain = state.config, state.home
        if domain is None:
            raise NodeError(f"channel {wanted.channel_id} is on no chain that we know")
        allocation = Allocation(wanted.channel_id, wanted.allocated, wanted.valid_before)
        with trio.CancelScope(shield=True):
            try:
                signature = await self.payer.sign(ChannelAllocation(config, allocation), domain)
                await self.book.change([replace(wanted, signature=signature)])
            except SignerRefused:
                raise  # nothing was signed
            except Exception:
                self._allocated_before[wanted.channel_id] = wanted.allocated
                raise

    def _allocated(self, channel_id: ChannelId) -> int:
        state = self.book.get(channel_id)
        return state.allocated if state else 0

    async def _submit(self, peer: PeerId, channel_id: ChannelId) -> tuple[ChannelState, bytes]:
        state = self.book.channels[channel_id]
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
        state = await self.refresh(channel_id)
        while state.allocated < state.authorized and trio.current_time() < patience:
            await trio.sleep(0.1)
            state = await self.refresh(channel_id)
        if state.allocated < state.authorized:
            raise WorkerFault(f"{peer} says the channel is open, but the contract has locked {state.allocated}")
        return state, reply.transaction

    async def refresh(self, channel_id: ChannelId) -> ChannelState:
        """Bring one channel up to what the contract says now."""
        state, _ = await refresh(self.book, self.chains, channel_id)
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
        result = await self.chains.of(state.domain).initiate_withdraw(state.config)
        result.sound()
        state = await self.refresh(channel_id)
        note = f"the worker did not consent ({reason}); the delayed withdrawal has begun"
        return Farewell(channel_id, False, 0, state.withdraw_at, [result], note)

    async def _finish(self, state: ChannelState) -> Farewell:
        chain = self.chains.of(state.domain)
        head = await chain.head()
        if head.timestamp < state.withdraw_at:
            wait = state.withdraw_at - head.timestamp
            return Farewell(state.channel_id, False, 0, state.withdraw_at, note=f"{wait} s of the delay are left")
        result = await chain.finalize_withdraw(state.config)
        result.sound()
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
        consent = Close(state.channel_id, final).digest(state.home)
        require_signer(consent, reply.signature, state.config.receiver_authorizer, "close")
        changes: list[Change] = [CloseSigned(state.channel_id, final, reply.signature)]
        if final > max(state.spent, state.claimed):
            changes = [*_conceded(state, final), *changes]
        if state.final is None:
            await self.book.change(changes)
        result = await self.chains.of(state.domain).close_channel(
            state.config, final, state.cumulative, state.voucher_signature, reply.signature
        )
        result.sound()
        await self.refresh(state.channel_id)
        return Farewell(state.channel_id, True, state.allocated - final, 0, [result])

    async def _ask_close(self, state: ChannelState, peer: PeerId, final: int) -> CloseConsent:
        wish = Close(state.channel_id, final)
        question = RequestClose(
            channel_id=bytes(state.channel_id),
            final=amount_to_wire(final),
            signature=await self.session.sign(wish, state.home),
        )
        reply = await converse(self._network, peer, CHANNEL_PROTOCOL, question, timeout_s=10)
        if not isinstance(reply, CloseConsent):
            raise RemoteProtocolError(WireCode.UNEXPECTED, f"{type(reply).__name__} is no consent")
        return reply

    def _valid_before(self) -> int:
        return self._now_s() + self._settings.allocation_valid_s


def _between(state: ChannelState, offer: VerifiedOffer, payment: Payment) -> bool:
    """Whether a channel pays this worker in this asset."""
    return (
        state.config.receiver == offer.worker
        and state.domain is not None
        and Asset.of(state.domain, state.config.token) == payment.asset
    )


def _conceded(state: ChannelState, final: int) -> list[Change]:
    """The worker counts more than we do, within what is vouched for: booked as a part of no job, so the journal says so."""
    more = final - state.spent
    part = (JobId(bytes(32)), 0)
    return [JobOpened(state.channel_id, *part, 0, more), JobEnded(state.channel_id, *part, more, 0, b"")]
