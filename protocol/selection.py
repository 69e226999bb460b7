"""Choose a worker and what to pay it with: a pure function of offers, purses, what we measured, and the client's policy.

Every candidate gets a verdict: a rank with its score and the terms of that score, or the reasons that exclude it. Nothing is
chosen or dropped silently, so "why not them" is an answer, not a guess. Advertised speed is believed only until our own
history says otherwise; self-reported figures never beat measured ones.

A candidate is a worker *and* one of the assets that it takes and we hold. Costs in two assets are compared by the client's rates
and never as bare numbers: where there is no rate, the order of the purses decides before any price does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Final

from protocol.ids import Address, ModelId, PeerId
from protocol.messages import Params
from protocol.offers import Asset, ModelOffer, Payment, VerifiedOffer
from protocol.pricing import Price, cost
from protocol.tasks import UNITS, Task

Amount = int | Fraction
"""Money in some unit of account; whole where that unit is the token's own."""


class Exclusion(StrEnum):
    """Why an offer is not considered."""

    MODEL_UNKNOWN = "model_unknown"
    """It does not sell the model."""
    OFFER_EXPIRED = "offer_expired"
    """Its time is over; the worker's next offer will do."""
    TASK_UNSUPPORTED = "task_unsupported"
    """The model does something else."""
    CONTEXT_EXCEEDED = "context_exceeded"
    """Prompt and `max_tokens` together are longer than its context; for other tasks, the input is more than it takes."""
    MAX_TOKENS_EXCEEDED = "max_tokens_exceeded"
    """`max_tokens` is over what it sells in one part."""
    UNSUPPORTED_PARAM = "unsupported_param"
    """The request sets a parameter that it does not list."""
    PRICE_TOO_HIGH = "price_too_high"
    """The job could cost more here than the purse or the request allows, or one of its prices is over a limit."""
    NO_COMMON_CHAIN = "no_common_chain"
    """It is paid by no contract on any chain that we have a purse on."""
    TOKEN_NOT_HELD = "token_not_held"  # noqa: S105 (a reason, not a secret)
    """It is paid on a chain of ours, but in no token that we have a purse of there."""
    NO_FUNDS = "no_funds"
    """Neither a channel to it nor the vault holds what the job may cost, in any token that it takes."""
    NOT_COMPARABLE = "not_comparable"
    """The request has a limit, and no rate says what it is in the token that it would be paid in (`tokens.NAME.rate`)."""
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
    """Input units; an upper estimate when no tokenizer is at hand."""
    params: Params
    task: Task = Task.CHAT
    rows: int = 0
    """Rows of numbers in a complete answer; 0: the answer is text of up to `params.max_tokens`."""

    @property
    def output_limit(self) -> int:
        return self.rows or self.params.max_tokens

    def fits(self, context_length: int) -> bool:
        """Whether the input is within a model's context. What is bounded text by text only the worker can tell."""
        match self.task:
            case Task.CHAT:
                return self.input_tokens + self.params.max_tokens <= context_length
            case Task.TRANSCRIBE | Task.OCR:
                return self.input_tokens <= context_length
            case _:
                return True


@dataclass(frozen=True, slots=True)
class PriceLimit:
    """The highest prices that are accepted, in the units of `Price`; None = no limit."""

    request: int | None = None
    input: int | None = None
    output: int | None = None

    def admits(self, price: Price, rate: Amount = 1, *, tokens: bool = True) -> bool:
        """`rate`: what one unit of the price is worth in the unit of the limits. `tokens`: whether what is priced are tokens;
        limits on the price of tokens say nothing about seconds of audio."""
        pairs = [(self.request, price.request)]
        if tokens:
            pairs += [(self.input, price.input), (self.output, price.output)]
        return all(most is None or asked * rate <= most for most, asked in pairs)


NO_LIMIT: Final = PriceLimit()


@dataclass(frozen=True, slots=True)
class Purse:
    """One asset that we can pay with. Amounts are in its smallest unit."""

    asset: Asset
    rate: Fraction | None = None
    """What one smallest unit is worth in the client's unit of account; None = not known."""
    max_cost: int | None = None
    """Most for one job."""
    max_price: PriceLimit = NO_LIMIT
    allocation: int = 0
    """What opening a channel takes out of the vault, at least."""
    available: int | None = None
    """In the vault, when last seen; None = not looked at, and taken for enough."""
    free: Mapping[Address, int] = field(default_factory=dict)
    """By worker: the most that one open channel to it still holds."""

    def holds(self, worker: Address, payment: Payment, needed: int) -> bool:
        """Whether a job of up to `needed` can be paid for without a deposit."""
        if self.available is None or self.free.get(worker, 0) >= needed:
            return True
        return self.available >= max(needed, self.allocation, payment.min_allocation)


@dataclass(frozen=True, slots=True)
class Policy:
    """The client's wishes for one request."""

    max_cost: int | None = None
    """Most for the whole job, in the unit of account: the smallest unit of a purse whose rate is 1."""
    max_price: PriceLimit | None = None
    """Instead of the purses' own limits, in the unit of account."""
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
    """A worker, paid in one asset."""

    offer: VerifiedOffer
    model: ModelOffer
    payment: Payment
    price: Price
    cost: int
    """Upper bound of this job's cost here, in the smallest unit of `payment`'s token."""
    tokens_per_second: float
    """Measured when we have history, else advertised; 0 = unknown."""
    score: float
    """Among the candidates whose costs can be compared with this one's."""


@dataclass(frozen=True, slots=True)
class Selection:
    ranked: tuple[Candidate, ...]
    """Best first; the next of another worker is the fail-over."""
    rejected: Mapping[PeerId, tuple[Exclusion, ...]] = field(default_factory=dict)
    """Workers without a candidate. Where several payments were looked at, the reasons of all of them."""

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


def honoured(model: ModelOffer, task: Task) -> frozenset[str]:
    """Names of the parameters that may be changed: how to draw tokens says nothing to a task that draws none."""
    return frozenset(model.params) if task is Task.CHAT else frozenset()


@dataclass(frozen=True, slots=True)
class _Fit:
    """A pair that nothing excludes, before it is compared with others."""

    offer: VerifiedOffer
    model: ModelOffer
    payment: Payment
    price: Price
    cost: int
    speed: float
    """Measured; 0 = not yet."""
    tier: int
    """Costs of one tier can be compared; a lower tier is preferred whatever the costs."""
    value: Amount
    """Cost in the unit of the tier."""


def choose(
    offers: Iterable[VerifiedOffer],
    request: Request,
    purses: Sequence[Purse],
    policy: Policy,
    history: Mapping[PeerId, History],
    now_ms: int,
) -> Selection:
    """Rank every pair of an offer and a purse that can take the request. `purses`: the preferred one first.

    Deterministic: ties go to the cheaper, then to the lower PeerId, then to the purse that stands first.
    """
    rejected: dict[PeerId, tuple[Exclusion, ...]] = {}
    fit: list[_Fit] = []
    tiers = _tiers(purses)
    for offer in offers:
        seen = history.get(offer.peer_id, History())
        model = offer.document.model(request.model)
        reasons = _exclusions(offer, model, request, policy, seen, now_ms)
        pairs, against = _pairs(offer, model, request, tiers, policy, seen) if model is not None else ([], [])
        if pairs and not reasons:
            fit += pairs
        else:
            rejected[offer.peer_id] = tuple(dict.fromkeys((*reasons, *(() if pairs else against))))
    return Selection(tuple(_ranked(fit, policy)), rejected)


def _ranked(fit: Sequence[_Fit], policy: Policy) -> list[Candidate]:
    if not fit:
        return []
    cheapest: dict[int, Amount] = {}
    for one in fit:
        cheapest[one.tier] = min(one.value, cheapest.get(one.tier, one.value))
    measured = max(one.speed for one in fit)
    speeds = [one.speed or _believed(one.model.tokens_per_second, measured) for one in fit]
    fastest = max(speeds)
    scored = [
        (one, speed, _score(one.value, cheapest[one.tier], speed, fastest, policy))
        for one, speed in zip(fit, speeds, strict=True)
    ]
    # Sorting is stable: what is equal in all this stays in the order of the purses.
    scored.sort(key=lambda item: (item[0].tier, -item[2], item[0].value, item[0].offer.peer_id, item[0].offer.hash))
    return [
        Candidate(one.offer, one.model, one.payment, one.price, one.cost, speed, score) for one, speed, score in scored
    ]


def _exclusions(
    offer: VerifiedOffer,
    model: ModelOffer | None,
    request: Request,
    policy: Policy,
    seen: History,
    now_ms: int,
) -> tuple[Exclusion, ...]:
    """What speaks against the worker, whatever it is paid with."""
    reasons = []
    if model is None:
        reasons.append(Exclusion.MODEL_UNKNOWN)
    else:
        if request.task not in model.tasks:
            reasons.append(Exclusion.TASK_UNSUPPORTED)
        elif not request.fits(model.context_length):
            reasons.append(Exclusion.CONTEXT_EXCEEDED)
        if not request.rows and request.params.max_tokens > model.max_tokens:
            reasons.append(Exclusion.MAX_TOKENS_EXCEEDED)
        if set(changed_params(request.params)) - honoured(model, request.task):
            reasons.append(Exclusion.UNSUPPORTED_PARAM)
    if not offer.valid_at(now_ms):
        reasons.append(Exclusion.OFFER_EXPIRED)
    if offer.peer_id in policy.exclude or (policy.only and offer.peer_id not in policy.only):
        reasons.append(Exclusion.EXCLUDED_BY_POLICY)
    if seen.failures:
        backoff = policy.failure_backoff_ms * 2 ** min(seen.failures - 1, 6)
        if now_ms < seen.last_failure_ms + backoff:
            reasons.append(Exclusion.RECENT_FAILURE)
    if offer.document.free_slots == 0:
        reasons.append(Exclusion.BUSY)
    return tuple(reasons)


def _pairs(
    offer: VerifiedOffer, model: ModelOffer, request: Request, tiers: Sequence[_Tier], policy: Policy, seen: History
) -> tuple[list[_Fit], list[Exclusion]]:
    """The purses that this offer can be paid from, and what speaks against the others."""
    fitting: list[_Fit] = []
    against: list[Exclusion] = []
    document = offer.document
    for purse, tier, rate in tiers:
        position = document.position(purse.asset)
        if position is None:
            continue
        payment, price = document.accepts[position], model.prices[position]
        most = cost(price, request.input_tokens, request.output_limit)
        reasons = _against(offer, payment, price, most, purse, policy, tokens=UNITS[request.task].priced_as_tokens)
        against += reasons
        if not reasons:
            fitting.append(_Fit(offer, model, payment, price, most, seen.tokens_per_second, tier, most * rate))
    if not fitting and not against:
        ours = {purse.asset[:2] for purse, _, _ in tiers}
        shared = any(payment.asset[:2] in ours for payment in document.accepts)
        against.append(Exclusion.TOKEN_NOT_HELD if shared else Exclusion.NO_COMMON_CHAIN)
    return fitting, against


def _against(
    offer: VerifiedOffer, payment: Payment, price: Price, most: int, purse: Purse, policy: Policy, *, tokens: bool
) -> list[Exclusion]:
    reasons = []
    dear = purse.max_cost is not None and most > purse.max_cost
    if policy.max_price is None:
        dear = dear or not purse.max_price.admits(price, tokens=tokens)
    if policy.max_cost is not None or policy.max_price not in (None, NO_LIMIT):
        if purse.rate is None:
            reasons.append(Exclusion.NOT_COMPARABLE)
        else:
            dear = dear or (policy.max_cost is not None and most * purse.rate > policy.max_cost)
            dear = dear or (
                policy.max_price is not None and not policy.max_price.admits(price, purse.rate, tokens=tokens)
            )
    if dear:
        reasons.append(Exclusion.PRICE_TOO_HIGH)
    if not purse.holds(offer.worker, payment, most):
        reasons.append(Exclusion.NO_FUNDS)
    return reasons


_Tier = tuple[Purse, int, Amount]


def _tiers(purses: Sequence[Purse]) -> list[_Tier]:
    """Each purse, where it stands, and what its unit is worth there. Those with a rate stand together, where the first does."""
    together = next((n for n, purse in enumerate(purses) if purse.rate is not None), 0)
    return [(p, n, 1) if p.rate is None else (p, together, 1 if p.rate == 1 else p.rate) for n, p in enumerate(purses)]


def _believed(advertised: float, measured: float) -> float:
    """A claim counts for no more than the fastest worker we measured: else one lie makes everybody else look slow."""
    return min(advertised, measured) if measured else advertised


def _score(value: Amount, cheapest: Amount, speed: float, fastest: float, policy: Policy) -> float:
    """Weighted product of two ratios in (0, 1]; an unknown speed counts as half of the fastest known."""
    cheap = float((cheapest + 1) / (value + 1))
    swift = speed / fastest if speed and fastest else 0.5
    return float(cheap**policy.weight_price * swift**policy.weight_speed)
