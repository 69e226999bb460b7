"""The offer book: who sells what now. Fed by gossip and by asking peers; every entry is verified before it is kept.

Bounded: one offer per peer, at most `capacity` peers, and expired ones go first. An offer that is older than the one we hold is
ignored, so a replayed gossip message cannot bring back an old price.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from node.errors import NetworkError, Timeout
from node.network.drive import converse
from node.ports import Network
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import PeerId
from protocol.messages import OFFER_PROTOCOL, OFFER_TOPIC, GetOffer, OfferMessage, decode, encode
from protocol.offers import VerifiedOffer, open_offer

log = logging.getLogger(__name__)


class OfferBook:
    """Verified offers by peer."""

    def __init__(self, now_ms: Callable[[], int], capacity: int = 10_000) -> None:
        self._now_ms = now_ms
        self._capacity = capacity
        self._offers: dict[PeerId, VerifiedOffer] = {}
        self.refused: Counter[str] = Counter()
        """Wire codes of offers that were not taken, for `status`."""

    def learn(self, message: OfferMessage, *, peer: PeerId | None = None) -> VerifiedOffer:
        """Verify and keep. Raises `RemoteProtocolError`; `peer` is the worker itself when it gave us the offer."""
        try:
            offer = open_offer(message, now_ms=self._now_ms(), peer=peer)
        except RemoteProtocolError as error:
            self.refused[error.code.name.lower()] += 1
            raise
        held = self._offers.get(offer.peer_id)
        if held is not None and held.document.issued >= offer.document.issued:
            return held
        self._offers.pop(offer.peer_id, None)
        if len(self._offers) >= self._capacity:
            self._make_room()
        self._offers[offer.peer_id] = offer
        return offer

    def accepts(self, data: bytes) -> bool:
        """The gossip validator: what is not a sound offer is not passed on. Never raises."""
        try:
            self.learn(_from_gossip(data))
        except RemoteProtocolError as error:
            log.debug("gossiped offer refused: %s", error)
            return False
        return True

    def forget(self, peer: PeerId) -> None:
        self._offers.pop(peer, None)

    def __len__(self) -> int:
        return len(self._offers)

    def current(self) -> list[VerifiedOffer]:
        """Offers that are valid now."""
        now = self._now_ms()
        return [offer for offer in self._offers.values() if offer.valid_at(now)]

    def of(self, peer: PeerId) -> VerifiedOffer | None:
        return self._offers.get(peer)

    def _make_room(self) -> None:
        now = self._now_ms()
        self._offers = {peer: offer for peer, offer in self._offers.items() if offer.valid_at(now)}
        while len(self._offers) >= self._capacity:
            self._offers.pop(next(iter(self._offers)))


async def follow_gossip(network: Network, book: OfferBook) -> None:
    """Fill the book from the topic for as long as the network lives."""

    async def received(data: bytes) -> None:
        book.accepts(data)

    await network.subscribe(OFFER_TOPIC, book.accepts, received)


async def announce(network: Network, offer: OfferMessage) -> None:
    await network.publish(OFFER_TOPIC, encode(offer))


async def fetch_offer(network: Network, book: OfferBook, peer: PeerId, *, timeout_s: float = 10) -> VerifiedOffer:
    """Ask a peer for its offer. Raises `NetworkError`, `Timeout` or `RemoteProtocolError`."""
    reply = await converse(network, peer, OFFER_PROTOCOL, GetOffer(), timeout_s=timeout_s)
    if not isinstance(reply, OfferMessage):
        raise RemoteProtocolError(WireCode.UNEXPECTED, f"{peer} answered {type(reply).__name__} instead of its offer")
    return book.learn(reply, peer=peer)


async def discover(
    network: Network, book: OfferBook, bootstrap: tuple[str, ...], *, timeout_s: float = 10
) -> list[str]:
    """Dial every bootstrap address and fetch what it sells; returns what failed, in words. Some may only pass gossip on."""
    failures = []
    for address in bootstrap:
        try:
            peer = await network.connect(address)
            await fetch_offer(network, book, peer, timeout_s=timeout_s)
        except (NetworkError, Timeout, RemoteProtocolError) as error:
            failures.append(f"{address}: {error}")
    return failures


def _from_gossip(data: bytes) -> OfferMessage:
    message = decode(OFFER_PROTOCOL, data)
    if not isinstance(message, OfferMessage):
        raise RemoteProtocolError(WireCode.UNEXPECTED, "only offers are gossiped on this topic")
    return message
