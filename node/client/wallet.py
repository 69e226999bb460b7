"""The client's money: what is in the vaults and what it can pay with. `locking.py` opens its channels, `farewell.py` ends them.

Rules
- A deposit is the only transaction a client ever needs.
- It may pay with several assets (`Means`), on several chains. Every channel is on one chain, and all that is signed about it is
  signed in that chain's domain.
- What the vaults held when last looked at is a hint for the choice of a worker; before money is locked they are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from node.chains import Chains
from node.client.farewell import Farewell, Parting
from node.client.locking import Locking
from node.client.settings import ClientSettings, Means
from node.client.vouchers import Vouchers
from node.errors import ConfigError, InsufficientFunds
from node.ports import Chain, Network, Signer, TxResult
from node.store.channels import ChannelBook, refresh
from protocol.channel import ChannelState
from protocol.ids import Address, ChannelId, PeerId
from protocol.offers import Asset, Payment, VerifiedOffer
from protocol.selection import Purse
from protocol.signing_history import Ahead


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
        self.locking = Locking(self, network, settings, random32=random32, now_s=now_s, ahead=ahead)
        self._parting = Parting(self, network)
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
        held = await chain.vault_balance(token, self.payer.address)
        self.saw(asset or self.preferred, held)
        return held

    def saw(self, asset: Asset, held: int) -> None:
        """So much is in the vault, as far as we know now."""
        self._seen[asset] = held

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

    async def ensure_channel(self, offer: VerifiedOffer, payment: Payment, needed: int) -> tuple[ChannelState, bytes]:
        """A channel with `needed` free; see `node.client.locking.Locking.channel`."""
        return await self.locking.channel(offer, payment, needed)

    async def close(self, channel_id: ChannelId, peer: PeerId | None) -> Farewell:
        """End a channel; see `node.client.farewell.Parting.close`."""
        return await self._parting.close(channel_id, peer)

    async def refresh(self, channel_id: ChannelId) -> ChannelState:
        """Bring one channel up to what the contract says now."""
        state, _ = await refresh(self.book, self.chains, channel_id)
        return state
