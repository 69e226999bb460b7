"""Choose a worker: a pure function of offers, what we measured ourselves, and the client's policy.

Every candidate gets a verdict: a rank with its score and the terms of that score, or the reasons that exclude it. Nothing is
chosen or dropped silently, so "why not them" is an answer, not a guess. Advertised speed is believed only until our own
history says otherwise; self-reported figures never beat measured ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from protocol.ids import Address, ModelId, PeerId
from protocol.messages import Params
from protocol.offers import ModelOffer, VerifiedOffer
from protocol.pricing import Price, cost


class Exclusion(StrEnum):
    """Why an offer is not considered."""

    MODEL_UNKNOWN = "model_unknown"
    """It does not sell the model."""
    OFFER_EXPIRED = "offer_expired"
    """Its time is over; the worker's next offer will do."""
    CONTEXT_EXCEEDED = "context_exceeded"
    """Prompt and `max_tokens` together are longer than its context."""
    MAX_TOKENS_EXCEEDED = "max_tokens_exceeded"
    """`max_tokens` is over what it sells in one part."""
    UNSUPPORTED_PARAM = "unsupported_param"
    """The request sets a parameter that it does not list."""
    PRICE_TOO_HIGH = "price_too_high"
    """The job could cost more than `Policy.max_cost` here, or one of its prices is over `Policy.max_price`."""
    TOKEN_NOT_HELD = "token_not_held"  # noqa: S105 (a reason, not a secret)
    """It is paid in a token that is not in `Policy.tokens`."""
    EXCLUDED_BY_POLICY = "excluded_by_policy"
    """`Policy.only` or `Policy.exclude` says so."""
    RECENT_FAILURE = "recent_failure"
    """It failed us, and the time of `Policy.failure_backoff_ms` is not over."""
    BUSY = "busy"
    """It had no free slot when the offer was signed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the choice depends on."""

    model: ModelId
    input_tokens: int
    """An upper estimate when no tokenizer is at hand."""
    params: Params


@dataclass(frozen=True, slots=True)
class PriceLimit:
    """The highest prices that are accepted, in the units of `Price`; None = no limit."""

    request: int | None = None
    input: int | None = None
    output: int | None = None

    def admits(self, price: Price) -> bool:
        pairs = ((self.request, price.request), (self.input, price.input), (self.output, price.output))
        return all(most is None or asked <= most for most, asked in pairs)


@dataclass(frozen=True, slots=True)
class Policy:
    """The client's wishes."""

    max_cost: int | None = None
    """Most for the whole job, smallest unit."""
    max_price: PriceLimit | None = None
    tokens: frozenset[Address] = frozenset()
    """Tokens we can pay with; empty means any."""
    only: frozenset[PeerId] = frozenset()
    exclude: frozenset[PeerId] = frozenset()
    weight_price: float = 1.0
    """Score is a weighted product, so only ratios of weights matter."""
    weight_speed: float = 0.5
    failure_backoff_ms: int = 30_000
    """A worker that failed us is left out this long after one failure, doubled by each further one (at most 64 times)."""


@dataclass(frozen=True, slots=True)
class History:
    """What we measured of one worker."""

    tokens_per_second: float = 0.0
    completed: int = 0
    failures: int = 0
    """Since the last success."""
    last_failure_ms: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    offer: VerifiedOffer
    model: ModelOffer
    cost: int
    """Upper bound of this job's cost here."""
    tokens_per_second: float
    """Measured when we have history, else advertised; 0 = unknown."""
    score: float


@dataclass(frozen=True, slots=True)
class Selection:
    ranked: tuple[Candidate, ...]
    """Best first; the second is the fail-over."""
    rejected: Mapping[PeerId, tuple[Exclusion, ...]] = field(default_factory=dict)

    @property
    def best(self) -> Candidate | None:
        return self.ranked[0] if self.ranked else None


def changed_params(params: Params) -> tuple[str, ...]:
    """Names of the parameters that differ from their defaults; `max_tokens` and `seed` are always honoured."""
    default = Params()
    return tuple(
        name
        for name in Params.__struct_fields__
        if name not in ("max_tokens", "seed") and getattr(params, name) != getattr(default, name)
    )


def choose(
    offers: Iterable[VerifiedOffer],
    request: Request,
    policy: Policy,
    history: Mapping[PeerId, History],
    now_ms: int,
) -> Selection:
    """Rank every offer that can take the request. Deterministic: ties go to the cheaper, then to the lower PeerId."""
    rejected: dict[PeerId, tuple[Exclusion, ...]] = {}
    fit: list[tuple[VerifiedOffer, ModelOffer, int, float]] = []
    for offer in offers:
        seen = history.get(offer.peer_id, History())
        model = offer.document.model(request.model)
        reasons = _exclusions(offer, model, request, policy, seen, now_ms)
        if reasons or model is None:
            rejected[offer.peer_id] = reasons
            continue
        fit.append((offer, model, _upper_cost(model, request), seen.tokens_per_second))
    if not fit:
        return Selection((), rejected)
    cheapest = min(price for _, _, price, _ in fit)
    measured = max(speed for _, _, _, speed in fit)
    speeds = [speed or _believed(model.tokens_per_second, measured) for _, model, _, speed in fit]
    fastest = max(speeds)
    candidates = [
        Candidate(offer, model, price, speed, _score(price, cheapest, speed, fastest, policy))
        for (offer, model, price, _), speed in zip(fit, speeds, strict=True)
    ]
    candidates.sort(key=lambda c: (-c.score, c.cost, c.offer.peer_id, c.offer.hash))
    return Selection(tuple(candidates), rejected)


def _exclusions(
    offer: VerifiedOffer,
    model: ModelOffer | None,
    request: Request,
    policy: Policy,
    seen: History,
    now_ms: int,
) -> tuple[Exclusion, ...]:
    reasons = []
    if model is None:
        reasons.append(Exclusion.MODEL_UNKNOWN)
    else:
        if request.input_tokens + request.params.max_tokens > model.context_length:
            reasons.append(Exclusion.CONTEXT_EXCEEDED)
        if request.params.max_tokens > model.max_tokens:
            reasons.append(Exclusion.MAX_TOKENS_EXCEEDED)
        if set(changed_params(request.params)) - set(model.params):
            reasons.append(Exclusion.UNSUPPORTED_PARAM)
        dear = policy.max_cost is not None and _upper_cost(model, request) > policy.max_cost
        if dear or (policy.max_price is not None and not policy.max_price.admits(model.price)):
            reasons.append(Exclusion.PRICE_TOO_HIGH)
    if not offer.valid_at(now_ms):
        reasons.append(Exclusion.OFFER_EXPIRED)
    if policy.tokens and offer.document.token not in policy.tokens:
        reasons.append(Exclusion.TOKEN_NOT_HELD)
    if offer.peer_id in policy.exclude or (policy.only and offer.peer_id not in policy.only):
        reasons.append(Exclusion.EXCLUDED_BY_POLICY)
    if seen.failures:
        backoff = policy.failure_backoff_ms * 2 ** min(seen.failures - 1, 6)
        if now_ms < seen.last_failure_ms + backoff:
            reasons.append(Exclusion.RECENT_FAILURE)
    if offer.document.free_slots == 0:
        reasons.append(Exclusion.BUSY)
    return tuple(reasons)


def _upper_cost(model: ModelOffer, request: Request) -> int:
    return cost(model.price, request.input_tokens, request.params.max_tokens)


def _believed(advertised: float, measured: float) -> float:
    """A claim counts for no more than the fastest worker we measured: else one lie makes everybody else look slow."""
    return min(advertised, measured) if measured else advertised


def _score(price: int, cheapest: int, speed: float, fastest: float, policy: Policy) -> float:
    """Weighted product of two ratios in (0, 1]; an unknown speed counts as half of the fastest known."""
    cheap = (cheapest + 1) / (price + 1)
    swift = speed / fastest if speed and fastest else 0.5
    return float(cheap**policy.weight_price * swift**policy.weight_speed)
