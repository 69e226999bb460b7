"""The offer desk: makes, signs and renews this worker's offer, and remembers the ones that clients may still ask under."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace

import trio

from node.ports import ModelInfo, Signer, Speed
from node.worker.accepted import AcceptedAssets
from protocol.ids import Hash32, ModelId
from protocol.messages import OfferMessage
from protocol.offers import ModelOffer, OfferDocument, Payment, VerifiedOffer, offer_frame, open_offer
from protocol.tasks import Task
from protocol.typed_data import MARKET_DOMAIN


@dataclass(frozen=True, slots=True)
class Terms:
    """What the operator decides about an offer."""

    accepted: AcceptedAssets
    ttl_ms: int
    tick_tokens: int
    tick_ms: int
    credit_tokens: int
    min_withdraw_delay: int
    max_tokens: int
    version: str


def merged(chats: Mapping[ModelId, ModelInfo], others: Mapping[ModelId, ModelInfo]) -> dict[ModelId, ModelInfo]:
    """What both runtimes serve. A model that is in both does what either does for it; its tasks share one price."""
    models = {**chats, **others}
    for both in chats.keys() & others.keys():
        tasks = tuple(dict.fromkeys((*chats[both].tasks, *others[both].tasks)))
        models[both] = replace(chats[both], tasks=tasks, dimensions=others[both].dimensions)
    return models


class OfferDesk:
    """`current()` is always an offer with at least half of its life left."""

    def __init__(
        self,
        key: Signer,
        terms: Terms,
        models: Callable[[], Mapping[ModelId, ModelInfo]],
        speeds: Mapping[ModelId, Speed],
        addresses: Callable[[], tuple[str, ...]],
        free_slots: Callable[[], int],
        now_ms: Callable[[], int],
    ) -> None:
        self._key = key
        self._terms = terms
        self._models = models
        self._speeds = speeds
        self._addresses = addresses
        self._free_slots = free_slots
        self._now_ms = now_ms
        self._current: VerifiedOffer | None = None
        self._last: tuple[ModelInfo, ...] = ()
        """Models of the last offer that had any."""
        self._made_of: Set[ModelId] = frozenset()
        """Models that were ready when the offer of now was made."""
        self._valid: dict[Hash32, VerifiedOffer] = {}
        self._signing = trio.Lock()

    @property
    def valid(self) -> Mapping[Hash32, VerifiedOffer]:
        """Offers by hash that have not expired: what an ask may name."""
        return self._valid

    async def current(self) -> OfferMessage:
        """The offer of now, signed anew when half of its life is over or other models are sold. Raises `SignerError`."""
        async with self._signing:
            now = self._now_ms()
            held = self._current
            if held is not None and now < (held.document.issued + held.document.expires) // 2 and not self.outdated:
                return held.message
            return await self.renew()

    @property
    def outdated(self) -> bool:
        """Whether the offer of now sells other models than we do."""
        return self._current is None or self._models().keys() != self._made_of

    async def renew(self) -> OfferMessage:
        """Sign a fresh offer, for instance because the free places changed."""
        now = self._now_ms()
        document, frame = offer_frame(self._document(now), self._key.peer_id)
        message = OfferMessage(document=document, signature=await self._key.sign(frame, MARKET_DOMAIN))
        offer = open_offer(message, now_ms=now)
        self._valid = {h: o for h, o in self._valid.items() if o.valid_at(now)}
        self._valid[offer.hash] = offer
        self._current = offer
        return message

    def _document(self, now: int) -> OfferDocument:
        terms = self._terms
        # An offer names at least one model. While none is ready, the last ones stand in it, without a place for anybody.
        ready = self._models()
        self._last, self._made_of = tuple(ready.values()) or self._last, frozenset(ready)
        return OfferDocument(
            peer_id=str(self._key.peer_id),
            addresses=self._addresses(),
            accepts=tuple(
                Payment(
                    chain_id=one.domain.chain_id,
                    contract=bytes(one.domain.verifying_contract),
                    token=bytes(one.token),
                    min_withdraw_delay=terms.min_withdraw_delay,
                    min_allocation=one.min_allocation,
                )
                for one in terms.accepted
            ),
            models=tuple(self._model(info) for info in self._last),
            issued=now,
            expires=now + terms.ttl_ms,
            tick_tokens=terms.tick_tokens,
            tick_ms=terms.tick_ms,
            credit_tokens=terms.credit_tokens,
            free_slots=max(0, self._free_slots()) if ready else 0,
            version=terms.version,
        )

    def _model(self, info: ModelInfo) -> ModelOffer:
        speed = self._speeds.get(info.id, Speed())
        return ModelOffer(
            model_id=bytes(info.id),
            name=info.name,
            prices=tuple(one.price_of(info.tasks[0]) for one in self._terms.accepted),
            context_length=info.context_length,
            max_tokens=min(self._terms.max_tokens, info.context_length),
            dtype=info.dtype,
            numerics_class=info.numerics_class,
            params=info.params if Task.CHAT in info.tasks else (),
            tokens_per_second=speed.tokens_per_second,
            ttft_ms=speed.ttft_ms,
            tasks=info.tasks,
            dimensions=info.dimensions,
        )
