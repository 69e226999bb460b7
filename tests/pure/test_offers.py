"""Offers from strangers, and the choice among them."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import replace
from fractions import Fraction
from random import Random
from typing import Any

import base58
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.testing.pair import key
from protocol import selection as selection_module
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.ids import Address, Hash32, ModelId, PeerId
from protocol.messages import OfferMessage, Params, ResponseFormat, encode
from protocol.offers import (
    CLOCK_SKEW_MS,
    OFFER_TTL_MAX_MS,
    Asset,
    ModelOffer,
    OfferDocument,
    Payment,
    VerifiedOffer,
    open_offer,
    sign_offer,
)
from protocol.pricing import Price
from protocol.selection import Exclusion, History, Policy, PriceLimit, Purse, Request, changed_params, choose
from protocol.tasks import Task
from protocol.typed_data import MARKET_DOMAIN, Domain, Offer

NOW = 1_800_000_000_000
DOMAIN = Domain(31337, Address(bytes(range(20))))
WORKER = key("worker")
MODEL = ModelId.of_manifest(b"model")


def model_offer(**changes: Any) -> ModelOffer:
    values: dict[str, Any] = {
        "model_id": bytes(MODEL),
        "name": "a model",
        "prices": (Price(5, 100_000, 400_000),),
        "context_length": 2048,
        "max_tokens": 512,
        "dtype": "float32",
        "params": ("temperature", "top_p"),
    }
    if "price" in changes:
        changes["prices"] = (changes.pop("price"),)
    return ModelOffer(**{**values, **changes})


def payment(chain_id: int = DOMAIN.chain_id, token: bytes = bytes(20), **changes: Any) -> Payment:
    values: dict[str, Any] = {"contract": bytes(DOMAIN.verifying_contract), **changes}
    return Payment(chain_id=chain_id, token=token, **values)


def document(**changes: Any) -> OfferDocument:
    values: dict[str, Any] = {
        "peer_id": str(WORKER.peer_id),
        "addresses": ("/ip4/127.0.0.1/tcp/4001",),
        "accepts": (payment(),),
        "models": (model_offer(),),
        "issued": NOW - 1000,
        "expires": NOW + 60_000,
    }
    return OfferDocument(**{**values, **changes})


def signed(domain: Domain = MARKET_DOMAIN, **changes: Any) -> OfferMessage:
    """Signed by the worker whatever the document says: `sign_offer` would refuse."""
    made = document(**changes)
    raw = encode(made)
    frame = Offer(WORKER.address, sha256(raw), made.issued, made.expires)
    return OfferMessage(raw, WORKER.sign(frame.digest(domain)))


def sha256(raw: bytes) -> Hash32:
    return Hash32(hashlib.sha256(raw).digest())


GOOD = sign_offer(document(), WORKER)


def off_curve() -> str:
    return base58.b58encode(bytes.fromhex("002508021221") + b"\x02" + b"\xff" * 32).decode()


BAD: dict[str, tuple[OfferMessage, WireCode]] = {
    "unsigned": (msgspec.structs.replace(GOOD, signature=bytes(65)), WireCode.BAD_SIGNATURE),
    "signed by another key": (
        msgspec.structs.replace(GOOD, signature=key("thief").sign(bytes(32))),
        WireCode.BAD_SIGNATURE,
    ),
    "another peer's name": (signed(peer_id=str(key("other").peer_id)), WireCode.BAD_SIGNATURE),
    "expired": (signed(issued=NOW - 2000, expires=NOW - 1), WireCode.EXPIRED),
    "expires now": (signed(expires=NOW), WireCode.EXPIRED),
    "from the future": (
        signed(issued=NOW + CLOCK_SKEW_MS + 1, expires=NOW + CLOCK_SKEW_MS + 2),
        WireCode.EXPIRED,
    ),
    "ends before it begins": (signed(issued=NOW + 10, expires=NOW + 5), WireCode.MALFORMED),
    "lives too long": (signed(issued=NOW, expires=NOW + OFFER_TTL_MAX_MS + 1), WireCode.MALFORMED),
    "embeds without a width": (signed(models=(model_offer(tasks=(Task.EMBED,)),)), WireCode.MALFORMED),
    "a width without vectors": (signed(models=(model_offer(dimensions=8),)), WireCode.MALFORMED),
    "does nothing": (signed(models=(model_offer(tasks=()),)), WireCode.MALFORMED),
    "signed in a chain's domain": (signed(DOMAIN), WireCode.BAD_SIGNATURE),
    "no payment": (signed(accepts=(), models=(model_offer(prices=()),)), WireCode.MALFORMED),
    "17 payments": (
        signed(accepts=tuple(payment(n + 1) for n in range(17)), models=(model_offer(prices=(Price(),) * 17),)),
        WireCode.MALFORMED,
    ),
    "one asset twice": (
        signed(accepts=(payment(), payment()), models=(model_offer(prices=(Price(1), Price(2))),)),
        WireCode.MALFORMED,
    ),
    "one asset twice on other terms": (
        signed(accepts=(payment(), payment(min_allocation=5)), models=(model_offer(prices=(Price(1), Price(2))),)),
        WireCode.MALFORMED,
    ),
    "a price too few": (signed(accepts=(payment(), payment(2))), WireCode.MALFORMED),
    "a price too many": (signed(models=(model_offer(prices=(Price(), Price())),)), WireCode.MALFORMED),
    "chain id 0": (signed(accepts=(payment(0),)), WireCode.MALFORMED),
    "no models": (signed(models=()), WireCode.MALFORMED),
    "65 models": (signed(models=(model_offer(),) * 65), WireCode.MALFORMED),
    "not a PeerId": (signed(peer_id="nonsense 0OIl"), WireCode.MALFORMED),
    "an ed25519 PeerId": (signed(peer_id="12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"), WireCode.MALFORMED),
    "a PeerId off the curve": (signed(peer_id=off_curve()), WireCode.MALFORMED),
    "a PeerId with a space": (signed(peer_id=str(WORKER.peer_id) + " "), WireCode.MALFORMED),
    "a negative price": (signed(models=(model_offer(price=Price(output=-1)),)), WireCode.MALFORMED),
    "a price of 2^63": (signed(models=(model_offer(price=Price(output=2**63)),)), WireCode.MALFORMED),
    "a speed of nan": (signed(models=(model_offer(tokens_per_second=float("nan")),)), WireCode.MALFORMED),
    "an endless name": (signed(models=(model_offer(name="x" * 129),)), WireCode.MALFORMED),
    "no document": (OfferMessage(b"\xc0", GOOD.signature), WireCode.MALFORMED),
    "bytes behind it": (msgspec.structs.replace(GOOD, document=GOOD.document + b"\xc0"), WireCode.MALFORMED),
}


def test_a_good_offer_opens() -> None:
    offer = open_offer(GOOD, now_ms=NOW, peer=WORKER.peer_id)
    assert offer.document == document()
    assert offer.worker == WORKER.address
    assert offer.peer_id == WORKER.peer_id
    assert offer.valid_at(NOW) and not offer.valid_at(NOW + 60_000)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_offer_is_its_senders_fault(name: str) -> None:
    message, code = BAD[name]
    with pytest.raises(RemoteProtocolError) as caught:
        open_offer(message, now_ms=NOW)
    assert caught.value.code is code


def test_an_offer_relayed_as_ones_own_is_refused() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        open_offer(GOOD, now_ms=NOW, peer=key("other").peer_id)
    assert caught.value.code is WireCode.BAD_SIGNATURE


def test_no_byte_of_an_offer_can_be_altered() -> None:
    """Every byte of document and signature, one random bit each: a typed refusal, never another offer."""
    random = Random(1)
    for place in range(len(GOOD.document)):
        raw = bytearray(GOOD.document)
        raw[place] ^= 1 << random.randrange(8)
        with pytest.raises(RemoteProtocolError):
            open_offer(OfferMessage(bytes(raw), GOOD.signature), now_ms=NOW)
    for place in range(65):
        raw = bytearray(GOOD.signature)
        raw[place] ^= 1 << random.randrange(8)
        with pytest.raises(RemoteProtocolError):
            open_offer(OfferMessage(GOOD.document, bytes(raw)), now_ms=NOW)


def test_we_do_not_sign_for_others_nor_what_nobody_takes() -> None:
    with pytest.raises(LocalProtocolError, match="by the key of the peer"):
        sign_offer(document(), key("other"))
    with pytest.raises(LocalProtocolError, match="each asset once"):
        sign_offer(document(accepts=(payment(), payment()), models=(model_offer(prices=(Price(), Price())),)), WORKER)
    with pytest.raises(LocalProtocolError, match="one price for each payment"):
        sign_offer(document(accepts=(payment(), payment(2))), WORKER)
    many = tuple(payment(n + 1) for n in range(16))
    prices = (Price(2**62, 2**62, 2**62),) * 16
    with pytest.raises(LocalProtocolError, match="at most 32768 bytes"):
        sign_offer(document(accepts=many, models=(model_offer(prices=prices, name="m" * 128),) * 64), WORKER)
    full = sign_offer(document(accepts=many, models=(model_offer(prices=prices),) * 24), WORKER)
    assert open_offer(full, now_ms=NOW).document.position(Asset(16, DOMAIN.verifying_contract, bytes(20))) == 15


def test_an_offer_of_the_time_of_one_chain_is_none() -> None:
    """The first version named one chain, one token, one price, and was signed in the chain's domain."""
    values = {name: getattr(document(), name) for name in OfferDocument.__struct_fields__ if name != "accepts"}
    model = {name: getattr(model_offer(), name) for name in ModelOffer.__struct_fields__ if name != "prices"}
    old = msgspec.msgpack.encode(
        {
            **values,
            "models": [{**model, "price": {"output": 1}}],
            "chain_id": DOMAIN.chain_id,
            "contract": bytes(DOMAIN.verifying_contract),
            "token": bytes(20),
        }
    )
    frame = Offer(WORKER.address, sha256(old), NOW - 1000, NOW + 60_000)
    with pytest.raises(RemoteProtocolError) as caught:
        open_offer(OfferMessage(old, WORKER.sign(frame.digest(DOMAIN))), now_ms=NOW)
    assert caught.value.code is WireCode.MALFORMED


# --------------------------------------------------------------------------------------------------------- selection

KEYS = [key(f"worker {n}") for n in range(6)]
PEERS = [k.peer_id for k in KEYS]


def offer(
    n: int, slots: int = 1, expires: int = NOW + 60_000, accepts: tuple[Payment, ...] = (payment(),), **model: Any
) -> VerifiedOffer:
    made = document(
        peer_id=str(PEERS[n]),
        models=(model_offer(**model),),
        free_slots=slots,
        issued=NOW - 10,
        expires=expires,
        accepts=accepts,
    )
    raw = encode(made)
    return VerifiedOffer(made, OfferMessage(raw, bytes(65)), KEYS[n].address, sha256(raw))


PURSE = Purse(payment().asset, rate=Fraction(1))
REQUEST = Request(MODEL, input_tokens=100, params=Params(max_tokens=100))

prices = st.builds(Price, st.integers(0, 10**6), st.integers(0, 10**12), st.integers(0, 2**62))
histories = st.builds(
    History,
    tokens_per_second=st.sampled_from([0.0, 5.0, 80.0]),
    failures=st.integers(0, 70),
    last_failure_ms=st.integers(NOW - 10**7, NOW),
)
offer_lists = st.permutations(range(6)).flatmap(
    lambda order: st.tuples(
        *(
            st.builds(
                offer,
                st.just(n),
                slots=st.integers(0, 2),
                expires=st.sampled_from([NOW, NOW + 1]),
                price=prices,
                tokens_per_second=st.sampled_from([0.0, 1.0, 100.0, 1e9]),
                context_length=st.sampled_from([150, 4096]),
            )
            for n in order
        )
    )
)
policies = st.builds(
    Policy,
    max_cost=st.none() | st.integers(0, 10**9),
    exclude=st.frozensets(st.sampled_from(PEERS), max_size=2),
    only=st.frozensets(st.sampled_from(PEERS), max_size=2),
    weight_price=st.sampled_from([0.0, 1.0, 3.0]),
    weight_speed=st.sampled_from([0.0, 0.5, 2.0]),
)
known = st.dictionaries(st.sampled_from(PEERS), histories)


@given(offer_lists, policies, known, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_the_choice_is_complete_ordered_and_independent_of_order(
    offers: tuple[VerifiedOffer, ...], policy: Policy, history: dict[PeerId, History], random: Random
) -> None:
    chosen = choose(offers, REQUEST, [PURSE], policy, history, NOW)
    shuffled = list(offers)
    random.shuffle(shuffled)
    assert choose(shuffled, REQUEST, [PURSE], policy, history, NOW) == chosen
    ranked = [c.offer.peer_id for c in chosen.ranked]
    assert sorted([*ranked, *chosen.rejected]) == sorted(PEERS), "everyone is ranked or rejected, nobody both"
    assert all(chosen.rejected.values()), "no rejection without a reason"
    assert [c.score for c in chosen.ranked] == sorted((c.score for c in chosen.ranked), reverse=True)
    for candidate in chosen.ranked:
        assert candidate.offer.valid_at(NOW)
        assert candidate.offer.peer_id not in policy.exclude
        assert policy.max_cost is None or candidate.cost <= policy.max_cost
        assert 0 <= candidate.score <= 1
    assert chosen.best is (chosen.ranked[0] if ranked else None)


@given(prices, prices, st.permutations([0, 1]), st.sampled_from([0.0, 50.0]), st.sampled_from([0.0, 1.0]))
@settings(deadline=None)
def test_the_cheaper_of_two_equals_is_never_second(
    a: Price, b: Price, order: list[int], speed: float, weight: float
) -> None:
    first, second = offer(order[0], price=a, tokens_per_second=speed), offer(order[1], price=b, tokens_per_second=speed)
    ranked = choose([first, second], REQUEST, [PURSE], Policy(weight_price=weight), {}, NOW).ranked
    assert ranked[0].cost <= ranked[1].cost


def test_one_unit_cheaper_is_enough() -> None:
    """Scores of large prices are equal as floats; the cost decides then, whatever the PeerIds are."""
    for a, b in ((0, 1), (1, 0)):
        offers = [offer(a, price=Price(request=2**62)), offer(b, price=Price(request=2**62 + 1))]
        best = choose(offers, REQUEST, [PURSE], Policy(), {}, NOW).best
        assert best is not None and best.offer.peer_id == PEERS[a]


@pytest.mark.parametrize("failures", [1, 2, 3, 7, 50])
def test_failures_back_off_and_are_forgiven(failures: int) -> None:
    policy = Policy(failure_backoff_ms=1000)
    wait = 1000 * 2 ** min(failures - 1, 6)
    for age, excluded in ((0, True), (wait - 1, True), (wait, False)):
        history = {PEERS[0]: History(failures=failures, last_failure_ms=NOW - age)}
        chosen = choose([offer(0)], REQUEST, [PURSE], policy, history, NOW)
        assert (chosen.rejected == {PEERS[0]: (Exclusion.RECENT_FAILURE,)}) is excluded


ELSEWHERE = Purse(payment(chain_id=1).asset)
OTHER_TOKEN = Purse(payment(token=b"\1" * 20).asset)
BLIND = Purse(payment().asset)
"""No rate."""
REASONS: dict[Exclusion, tuple[VerifiedOffer, Request, Policy, dict[PeerId, History]]] = {
    Exclusion.MODEL_UNKNOWN: (offer(0, model_id=bytes(32)), REQUEST, Policy(), {}),
    Exclusion.OFFER_EXPIRED: (offer(0, expires=NOW), REQUEST, Policy(), {}),
    Exclusion.TASK_UNSUPPORTED: (offer(0), replace(REQUEST, task=Task.EMBED, rows=3), Policy(), {}),
    Exclusion.CONTEXT_EXCEEDED: (offer(0, context_length=199), REQUEST, Policy(), {}),
    Exclusion.MAX_TOKENS_EXCEEDED: (offer(0, max_tokens=99), REQUEST, Policy(), {}),
    Exclusion.UNSUPPORTED_PARAM: (offer(0), replace(REQUEST, params=Params(max_tokens=100, min_p=0.1)), Policy(), {}),
    Exclusion.PRICE_TOO_HIGH: (offer(0, price=Price(request=11)), REQUEST, Policy(max_cost=10), {}),
    Exclusion.NO_COMMON_CHAIN: (offer(0), REQUEST, Policy(), {}),
    Exclusion.TOKEN_NOT_HELD: (offer(0), REQUEST, Policy(), {}),
    Exclusion.NO_FUNDS: (offer(0), REQUEST, Policy(), {}),
    Exclusion.NOT_COMPARABLE: (offer(0), REQUEST, Policy(max_cost=10**9), {}),
    Exclusion.EXCLUDED_BY_POLICY: (offer(0), REQUEST, Policy(only=frozenset({PEERS[1]})), {}),
    Exclusion.RECENT_FAILURE: (offer(0), REQUEST, Policy(), {PEERS[0]: History(failures=1, last_failure_ms=NOW)}),
    Exclusion.BUSY: (offer(0, slots=0), REQUEST, Policy(), {}),
}


PURSES = {
    Exclusion.NO_COMMON_CHAIN: ELSEWHERE,
    Exclusion.TOKEN_NOT_HELD: OTHER_TOKEN,
    Exclusion.NO_FUNDS: replace(PURSE, available=0),
    Exclusion.NOT_COMPARABLE: BLIND,
}


@pytest.mark.parametrize("field", ["request", "input", "output"])
def test_each_price_has_a_limit_of_its_own(field: str) -> None:
    one = offer(0, price=Price(**{field: 11}))
    for most, fits in ((None, True), (11, True), (10, False), (0, False)):
        found = choose([one], REQUEST, [PURSE], Policy(max_price=PriceLimit(**{field: most})), {}, NOW)
        assert found.rejected == ({} if fits else {PEERS[0]: (Exclusion.PRICE_TOO_HIGH,)})


@pytest.mark.parametrize("reason", Exclusion)
def test_every_reason_has_a_case_and_stands_alone(reason: Exclusion) -> None:
    one, request, policy, history = REASONS[reason]
    assert choose([one], request, [PURSES.get(reason, PURSE)], policy, history, NOW).rejected == {PEERS[0]: (reason,)}


def test_limits_on_the_price_of_tokens_say_nothing_about_seconds_of_audio() -> None:
    policy = Policy(max_price=PriceLimit(request=5, input=10, output=10))
    dear = {"price": Price(5, 1_000, 1_000), "dimensions": 0}
    heard = replace(REQUEST, task=Task.TRANSCRIBE)
    assert choose([offer(0, tasks=(Task.TRANSCRIBE,), **dear)], heard, [PURSE], policy, {}, NOW).ranked
    read = replace(REQUEST, task=Task.RERANK, rows=2)
    found = choose([offer(0, tasks=(Task.RERANK,), **dear)], read, [PURSE], policy, {}, NOW)
    assert found.rejected == {PEERS[0]: (Exclusion.PRICE_TOO_HIGH,)}
    dear["price"] = Price(request=6)
    found = choose([offer(0, tasks=(Task.TRANSCRIBE,), **dear)], heard, [PURSE], policy, {}, NOW)
    assert found.rejected == {PEERS[0]: (Exclusion.PRICE_TOO_HIGH,)}


@pytest.mark.parametrize(
    ("task", "input_tokens", "fits"),
    [
        (Task.CHAT, 100, True),
        (Task.CHAT, 101, False),
        (Task.TRANSCRIBE, 200, True),
        (Task.TRANSCRIBE, 201, False),
        (Task.OCR, 201, False),
        (Task.EMBED, 10_000, True),
    ],
)
def test_what_a_context_bounds_depends_on_the_task(task: Task, input_tokens: int, fits: bool) -> None:
    request = Request(MODEL, input_tokens, Params(max_tokens=100), task, rows=int(task is Task.EMBED))
    assert request.fits(200) is fits


def test_rows_are_what_numbers_cost() -> None:
    many = replace(REQUEST, task=Task.EMBED, rows=3_000_000)
    one = offer(0, tasks=(Task.EMBED,), dimensions=4, price=Price(output=2_000_000))
    best = choose([one], many, [PURSE], Policy(), {}, NOW).best
    assert best is not None and best.cost == 6_000_000


def test_parameters_of_chats_are_of_chats_only() -> None:
    odd = replace(REQUEST, task=Task.RERANK, rows=1, params=Params(temperature=0.5))
    both = offer(0, tasks=(Task.CHAT, Task.RERANK))
    assert choose([both], odd, [PURSE], Policy(), {}, NOW).rejected == {PEERS[0]: (Exclusion.UNSUPPORTED_PARAM,)}
    assert choose([both], replace(odd, task=Task.CHAT), [PURSE], Policy(), {}, NOW).ranked


def test_defaults_need_no_support() -> None:
    assert changed_params(Params(max_tokens=3, seed=9)) == ()
    assert changed_params(Params(response_format=ResponseFormat("regex", "a"))) == ("response_format",)
    assert changed_params(Params(temperature=0.5, stop=("x",))) == ("temperature", "stop")


# ------------------------------------------------------------------------------------------------------ several assets

ASSETS = [payment(), payment(2), payment(token=b"\2" * 20)]
rates = st.none() | st.sampled_from([Fraction(1), Fraction(3, 7), Fraction(10**12), Fraction(1, 10**12)])


def purse(n: int, rate: Fraction | None = None, **values: Any) -> Purse:
    return Purse(ASSETS[n].asset, rate=rate, **values)


@st.composite
def bazaars(draw: st.DrawFn) -> tuple[list[VerifiedOffer], list[Purse]]:
    """Workers that take some of three assets, at prices without a rounding; a client that holds some of them."""
    offers = []
    for n in range(draw(st.integers(1, 5))):
        taken = draw(st.lists(st.sampled_from(range(3)), min_size=1, max_size=3, unique=True))
        asked = tuple(Price(request=draw(st.integers(0, 50))) for _ in taken)
        speed = draw(st.sampled_from([0.0, 1.0, 100.0]))
        offers.append(offer(n, accepts=tuple(ASSETS[t] for t in taken), prices=asked, tokens_per_second=speed))
    held = draw(st.permutations(range(3)))[: draw(st.integers(1, 3))]
    purses = [
        purse(
            n,
            draw(rates),
            max_cost=draw(st.none() | st.integers(0, 50)),
            available=draw(st.none() | st.integers(0, 50)),
        )
        for n in held
    ]
    return offers, purses


@given(bazaars(), st.none() | st.integers(0, 50))
@settings(deadline=None)
def test_every_pair_is_payable_and_every_worker_accounted_for(
    bazaar: tuple[list[VerifiedOffer], list[Purse]], most: int | None
) -> None:
    offers, purses = bazaar
    chosen = choose(offers, REQUEST, purses, Policy(max_cost=most), {}, NOW)
    ranked = {c.offer.peer_id for c in chosen.ranked}
    assert ranked | set(chosen.rejected) == {o.peer_id for o in offers} and not ranked & set(chosen.rejected)
    assert all(chosen.rejected.values())
    pairs = [(c.offer.peer_id, c.payment.asset) for c in chosen.ranked]
    assert len(set(pairs)) == len(pairs)
    held = {one.asset: one for one in purses}
    for candidate in chosen.ranked:
        one = held[candidate.payment.asset]
        position = candidate.offer.document.position(candidate.payment.asset)
        assert position is not None and candidate.price == candidate.model.prices[position]
        assert candidate.cost == candidate.price.request
        assert one.max_cost is None or candidate.cost <= one.max_cost
        assert one.available is None or candidate.cost <= one.available
        assert most is None or (one.rate is not None and candidate.cost * one.rate <= most)


@given(bazaars(), st.integers(0, 2), st.sampled_from([1000, 10**16]))
@settings(deadline=None)
def test_a_tokens_smallest_unit_is_its_own_affair(
    bazaar: tuple[list[VerifiedOffer], list[Purse]], scaled: int, factor: int
) -> None:
    """C12: the same world, in which one token has more decimals: the choice is the same. A choice that compares bare units of
    two tokens anywhere cannot pass this."""
    offers, purses = bazaar
    asset = ASSETS[scaled].asset
    finer = []
    for n, one in enumerate(offers):
        document, (model,) = one.document, one.document.models
        prices = tuple(
            Price(request=price.request * factor) if taken.asset == asset else price
            for taken, price in zip(document.accepts, model.prices, strict=True)
        )
        finer.append(offer(n, accepts=document.accepts, prices=prices, tokens_per_second=model.tokens_per_second))
    other = [
        replace(
            one,
            rate=None if one.rate is None else one.rate / factor,
            max_cost=None if one.max_cost is None else one.max_cost * factor,
            available=None if one.available is None else one.available * factor,
        )
        if one.asset == asset
        else one
        for one in purses
    ]
    # Without the price in the score, whose "+ 1" keeps free offers apart by one smallest unit of the unit of account.
    policy = Policy(weight_price=0.0)
    before = choose(offers, REQUEST, purses, policy, {}, NOW)
    after = choose(finer, REQUEST, other, policy, {}, NOW)
    assert [(c.offer.peer_id, c.payment) for c in after.ranked] == [(c.offer.peer_id, c.payment) for c in before.ranked]
    assert after.rejected == before.rejected


def test_without_a_rate_preference_comes_before_price() -> None:
    """C12."""
    dear, cheap = Price(request=1000), Price(request=1)
    both = offer(0, accepts=(ASSETS[0], ASSETS[1]), prices=(dear, cheap))
    only = offer(1, accepts=(ASSETS[1],), prices=(cheap,))
    for first, second in ((0, 1), (1, 0)):
        ranked = choose([both, only], REQUEST, [purse(first), purse(second)], Policy(), {}, NOW).ranked
        tiers = [[first, second].index(next(n for n in range(2) if ASSETS[n] == c.payment)) for c in ranked]
        assert tiers == sorted(tiers) and len(ranked) == 3


def test_purses_with_a_rate_stand_together_where_the_first_of_them_does() -> None:
    one = offer(0, accepts=tuple(ASSETS), prices=(Price(request=10), Price(request=10), Price(request=10)))
    purses = [purse(0), purse(1, Fraction(2)), purse(2, Fraction(1, 2))]
    ranked = choose([one], REQUEST, purses, Policy(), {}, NOW).ranked
    assert [c.payment for c in ranked] == [ASSETS[0], ASSETS[2], ASSETS[1]]
    assert [c.score for c in ranked][:2] == [1.0 * 0.5**0.5] * 2, "each is the cheapest of its kind"
    ranked = choose([one], REQUEST, purses[1:] + purses[:1], Policy(), {}, NOW).ranked
    assert [c.payment for c in ranked] == [ASSETS[2], ASSETS[1], ASSETS[0]]


def test_rates_are_exact() -> None:
    """18 decimals against 6: one smallest unit of the coarse token decides."""
    fine, coarse = purse(0, Fraction(1)), purse(1, Fraction(10**12))
    for difference, first in ((-1, 0), (0, 0), (1, 1)):
        price = Price(request=10**12 * 5 + difference)
        one = offer(0, accepts=(ASSETS[0], ASSETS[1]), prices=(price, Price(request=5)))
        ranked = choose([one], REQUEST, [fine, coarse], Policy(), {}, NOW).ranked
        assert ranked[0].payment == ASSETS[first], difference


def test_a_purse_pays_out_of_a_channel_or_out_of_the_vault() -> None:
    one = offer(0, price=Price(request=100), accepts=(payment(min_allocation=300),))

    def fits(**values: Any) -> bool:
        found = choose([one], REQUEST, [purse(0, **values)], Policy(), {}, NOW)
        assert found.rejected in ({}, {PEERS[0]: (Exclusion.NO_FUNDS,)})
        return bool(found.ranked)

    assert fits(available=None) and fits(available=300) and not fits(available=299)
    assert fits(available=0, free={one.worker: 100}) and not fits(available=0, free={one.worker: 99})
    assert not fits(available=0, free={KEYS[1].address: 10**9}), "another worker's channel"
    assert fits(available=500, allocation=500) and not fits(available=499, allocation=500)


def test_reasons_against_one_purse_do_not_count_where_another_pays() -> None:
    one = offer(0, slots=0, accepts=(ASSETS[0], ASSETS[1]), prices=(Price(request=9), Price(request=1)))
    purses = [purse(0, max_cost=1), purse(1)]
    assert choose([one], REQUEST, purses, Policy(), {}, NOW).rejected == {PEERS[0]: (Exclusion.BUSY,)}
    purses = [purse(0, max_cost=1), purse(1, available=0)]
    assert choose([one], REQUEST, purses, Policy(), {}, NOW).rejected == {
        PEERS[0]: (Exclusion.BUSY, Exclusion.PRICE_TOO_HIGH, Exclusion.NO_FUNDS)
    }


# -------------------------------------------------------------------------------------------------------- planted bugs

SOURCE = inspect.getsource(selection_module)
PLANTED = {
    "bare units are compared": ("(p, n, 1) if p.rate is None", "(p, together, 1) if p.rate is None"),
    "the rate is not used": ("seen.tokens_per_second, tier, most * rate)", "seen.tokens_per_second, tier, most)"),
    "a limit needs no rate": (
        "        if purse.rate is None:\n            reasons",
        "        if False:\n            reasons",
    ),
    "the vault is not looked into": ("if not purse.holds(offer.worker, payment, most):", "if False:"),
    "any channel of the asset pays": (
        "self.free.get(worker, 0) >= needed",
        "max(self.free.values(), default=0) >= needed",
    ),
    "an address is an asset": ("position = document.position(purse.asset)", "position = 0"),
    "every reason against every purse": ("(*reasons, *(() if pairs else against))", "(*reasons, *against)"),
}
WATCHERS = [
    test_without_a_rate_preference_comes_before_price,
    test_purses_with_a_rate_stand_together_where_the_first_of_them_does,
    test_rates_are_exact,
    test_a_purse_pays_out_of_a_channel_or_out_of_the_vault,
    test_reasons_against_one_purse_do_not_count_where_another_pays,
    *(lambda reason=reason: test_every_reason_has_a_case_and_stands_alone(reason) for reason in PURSES),
]


def noticed() -> bool:
    for watch in WATCHERS:
        try:
            watch()
        except (AssertionError, TypeError):
            return True
    return False


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_in_the_choice_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = PLANTED[name]
    assert SOURCE.count(old) == 1, f"the source has changed: {name!r} must be planted anew"
    # The classes stay the real ones, so that what the tests make is what the planted code takes.
    space = dict(vars(selection_module))
    planted: dict[str, Any] = {"__name__": "protocol.selection"}
    exec(compile(SOURCE.replace(old, new), "planted", "exec"), planted)
    for one in ("_pairs", "_against", "_tiers", "choose"):
        monkeypatch.setattr(selection_module, one, _moved(planted[one]))
    monkeypatch.setattr(Purse, "holds", _moved(planted["Purse"].holds))
    monkeypatch.setitem(globals(), "choose", selection_module.choose)
    assert space["Purse"] is Purse and noticed()


def _moved(function: Any) -> Any:
    """The planted code on the real module's names."""
    return type(function)(
        function.__code__, vars(selection_module), function.__name__, function.__defaults__, function.__closure__
    )


def test_without_a_planted_bug_nothing_is_noticed() -> None:
    assert not noticed()
