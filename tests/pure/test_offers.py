"""Offers from strangers, and the choice among them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from random import Random
from typing import Any

import base58
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.testing.pair import key
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.ids import Address, Hash32, ModelId, PeerId
from protocol.messages import OfferMessage, Params, encode
from protocol.offers import (
    CLOCK_SKEW_MS,
    OFFER_TTL_MAX_MS,
    ModelOffer,
    OfferDocument,
    VerifiedOffer,
    open_offer,
    sign_offer,
)
from protocol.pricing import Price
from protocol.selection import Exclusion, History, Policy, PriceLimit, Request, changed_params, choose
from protocol.typed_data import Domain, Offer

NOW = 1_800_000_000_000
DOMAIN = Domain(31337, Address(bytes(range(20))))
WORKER = key("worker")
MODEL = ModelId.of_manifest(b"model")


def model_offer(**changes: Any) -> ModelOffer:
    values: dict[str, Any] = {
        "model_id": bytes(MODEL),
        "name": "a model",
        "price": Price(5, 100_000, 400_000),
        "context_length": 2048,
        "max_tokens": 512,
        "dtype": "float32",
        "params": ("temperature", "top_p"),
    }
    return ModelOffer(**{**values, **changes})


def document(**changes: Any) -> OfferDocument:
    values: dict[str, Any] = {
        "peer_id": str(WORKER.peer_id),
        "addresses": ("/ip4/127.0.0.1/tcp/4001",),
        "chain_id": DOMAIN.chain_id,
        "contract": bytes(DOMAIN.verifying_contract),
        "token": bytes(20),
        "models": (model_offer(),),
        "issued": NOW - 1000,
        "expires": NOW + 60_000,
    }
    return OfferDocument(**{**values, **changes})


def signed(**changes: Any) -> OfferMessage:
    """Signed by the worker whatever the document says: `sign_offer` would refuse."""
    made = document(**changes)
    raw = encode(made)
    frame = Offer(WORKER.address, sha256(raw), made.issued, made.expires)
    return OfferMessage(raw, WORKER.sign(frame.digest(Domain(made.chain_id, Address(made.contract)))))


def sha256(raw: bytes) -> Hash32:
    return Hash32(hashlib.sha256(raw).digest())


GOOD = sign_offer(document(), WORKER, DOMAIN)


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
    "foreign chain": (signed(chain_id=1), WireCode.WRONG_DOMAIN),
    "foreign contract": (signed(contract=bytes(20)), WireCode.WRONG_DOMAIN),
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
    offer = open_offer(GOOD, domain=DOMAIN, now_ms=NOW, peer=WORKER.peer_id)
    assert offer.document == document()
    assert offer.worker == WORKER.address
    assert offer.peer_id == WORKER.peer_id
    assert offer.valid_at(NOW) and not offer.valid_at(NOW + 60_000)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_offer_is_its_senders_fault(name: str) -> None:
    message, code = BAD[name]
    with pytest.raises(RemoteProtocolError) as caught:
        open_offer(message, domain=DOMAIN, now_ms=NOW)
    assert caught.value.code is code


def test_an_offer_relayed_as_ones_own_is_refused() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        open_offer(GOOD, domain=DOMAIN, now_ms=NOW, peer=key("other").peer_id)
    assert caught.value.code is WireCode.BAD_SIGNATURE


def test_no_byte_of_an_offer_can_be_altered() -> None:
    """Every byte of document and signature, one random bit each: a typed refusal, never another offer."""
    random = Random(1)
    for place in range(len(GOOD.document)):
        raw = bytearray(GOOD.document)
        raw[place] ^= 1 << random.randrange(8)
        with pytest.raises(RemoteProtocolError):
            open_offer(OfferMessage(bytes(raw), GOOD.signature), domain=DOMAIN, now_ms=NOW)
    for place in range(65):
        raw = bytearray(GOOD.signature)
        raw[place] ^= 1 << random.randrange(8)
        with pytest.raises(RemoteProtocolError):
            open_offer(OfferMessage(GOOD.document, bytes(raw)), domain=DOMAIN, now_ms=NOW)


def test_we_do_not_sign_for_others_or_elsewhere() -> None:
    with pytest.raises(LocalProtocolError):
        sign_offer(document(), key("other"), DOMAIN)
    with pytest.raises(LocalProtocolError):
        sign_offer(document(), WORKER, replace(DOMAIN, chain_id=1))


# --------------------------------------------------------------------------------------------------------- selection

KEYS = [key(f"worker {n}") for n in range(6)]
PEERS = [k.peer_id for k in KEYS]


def offer(n: int, slots: int = 1, expires: int = NOW + 60_000, token: bytes = bytes(20), **model: Any) -> VerifiedOffer:
    made = document(
        peer_id=str(PEERS[n]),
        models=(model_offer(**model),),
        free_slots=slots,
        issued=NOW - 10,
        expires=expires,
        token=token,
    )
    raw = encode(made)
    return VerifiedOffer(made, OfferMessage(raw, bytes(65)), KEYS[n].address, sha256(raw))


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
    chosen = choose(offers, REQUEST, policy, history, NOW)
    shuffled = list(offers)
    random.shuffle(shuffled)
    assert choose(shuffled, REQUEST, policy, history, NOW) == chosen
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
    ranked = choose([first, second], REQUEST, Policy(weight_price=weight), {}, NOW).ranked
    assert ranked[0].cost <= ranked[1].cost


def test_one_unit_cheaper_is_enough() -> None:
    """Scores of large prices are equal as floats; the cost decides then, whatever the PeerIds are."""
    for a, b in ((0, 1), (1, 0)):
        offers = [offer(a, price=Price(request=2**62)), offer(b, price=Price(request=2**62 + 1))]
        best = choose(offers, REQUEST, Policy(), {}, NOW).best
        assert best is not None and best.offer.peer_id == PEERS[a]


@pytest.mark.parametrize("failures", [1, 2, 3, 7, 50])
def test_failures_back_off_and_are_forgiven(failures: int) -> None:
    policy = Policy(failure_backoff_ms=1000)
    wait = 1000 * 2 ** min(failures - 1, 6)
    for age, excluded in ((0, True), (wait - 1, True), (wait, False)):
        history = {PEERS[0]: History(failures=failures, last_failure_ms=NOW - age)}
        chosen = choose([offer(0)], REQUEST, policy, history, NOW)
        assert (chosen.rejected == {PEERS[0]: (Exclusion.RECENT_FAILURE,)}) is excluded


REASONS: dict[Exclusion, tuple[VerifiedOffer, Request, Policy, dict[PeerId, History]]] = {
    Exclusion.MODEL_UNKNOWN: (offer(0, model_id=bytes(32)), REQUEST, Policy(), {}),
    Exclusion.OFFER_EXPIRED: (offer(0, expires=NOW), REQUEST, Policy(), {}),
    Exclusion.CONTEXT_EXCEEDED: (offer(0, context_length=199), REQUEST, Policy(), {}),
    Exclusion.MAX_TOKENS_EXCEEDED: (offer(0, max_tokens=99), REQUEST, Policy(), {}),
    Exclusion.UNSUPPORTED_PARAM: (offer(0), replace(REQUEST, params=Params(max_tokens=100, min_p=0.1)), Policy(), {}),
    Exclusion.PRICE_TOO_HIGH: (offer(0, price=Price(request=11)), REQUEST, Policy(max_cost=10), {}),
    Exclusion.TOKEN_NOT_HELD: (offer(0), REQUEST, Policy(tokens=frozenset({Address(b"\1" * 20)})), {}),
    Exclusion.EXCLUDED_BY_POLICY: (offer(0), REQUEST, Policy(only=frozenset({PEERS[1]})), {}),
    Exclusion.RECENT_FAILURE: (offer(0), REQUEST, Policy(), {PEERS[0]: History(failures=1, last_failure_ms=NOW)}),
    Exclusion.BUSY: (offer(0, slots=0), REQUEST, Policy(), {}),
}


@pytest.mark.parametrize("field", ["request", "input", "output"])
def test_each_price_has_a_limit_of_its_own(field: str) -> None:
    one = offer(0, price=Price(**{field: 11}))
    for most, fits in ((None, True), (11, True), (10, False), (0, False)):
        found = choose([one], REQUEST, Policy(max_price=PriceLimit(**{field: most})), {}, NOW)
        assert found.rejected == ({} if fits else {PEERS[0]: (Exclusion.PRICE_TOO_HIGH,)})


@pytest.mark.parametrize("reason", Exclusion)
def test_every_reason_has_a_case_and_stands_alone(reason: Exclusion) -> None:
    one, request, policy, history = REASONS[reason]
    assert choose([one], request, policy, history, NOW).rejected == {PEERS[0]: (reason,)}


def test_defaults_need_no_support() -> None:
    assert changed_params(Params(max_tokens=3, seed=9)) == ()
    assert changed_params(Params(temperature=0.5, stop=("x",))) == ("temperature", "stop")
