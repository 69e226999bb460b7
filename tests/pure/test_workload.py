"""The documents of a batch job: one form, one hash, bounds before work, and a price that both sides compute."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as change

import protocol.workload as real
from protocol.errors import InvalidValue, RemoteProtocolError, WireCode
from protocol.ids import ZERO_ADDRESS, Address, Hash32
from protocol.messages import SPEC_LIMIT, ChatMessage, FinishReason, Params, encode
from protocol.pricing import TOKENS_MAX, Price, batch_cost, cost
from protocol.typed_data import Quote
from protocol.workload import (
    INPUTS_LIMIT,
    NOT_BEGUN,
    OUTPUT_LIMIT,
    PLACE,
    RENDERED_LIMIT,
    BatchResult,
    BatchSpec,
    ResultItem,
    Terms,
    Wish,
    check_quote,
    check_result,
    claim_of,
    content_hash,
    decode_spec,
    decode_terms,
    encode_result,
    encode_spec,
    encode_terms,
    terms_hash,
)

WIRE = json.loads((Path(__file__).parents[1] / "vectors" / "wire.json").read_text(encoding="utf-8"))["batch"]
SPEC = BatchSpec(
    model_id=bytes(32),
    params=Params(max_tokens=4),
    messages=(ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=f"Sum up: {PLACE}")),
    inputs=("one", "two", "three"),
)
TERMS = Terms(price=Price(10, 1_000_000, 20_000_000), input_tokens=(3, 4, 5), max_tokens=4, nonce=bytes(16))
ITEMS = (
    ResultItem((1, 2), "a b", FinishReason.STOP),
    ResultItem((1, 2, 3, 4), "abcd", FinishReason.LENGTH),
    ResultItem((9,), "", FinishReason.STOP_STRING),
)
QUOTE = Quote(
    spec_hash=content_hash(encode_spec(SPEC)),
    client=Address(b"\x01" * 20),
    worker=Address(b"\x02" * 20),
    token=Address(b"\x03" * 20),
    amount=TERMS.amount,
    penalty=7,
    valid_before=100,
    deadline=1000,
    window=900,
    resolver=ZERO_ADDRESS,
    salt=terms_hash(encode_terms(TERMS)),
)
WISH = Wish(QUOTE.spec_hash, 3, 4, QUOTE.client, QUOTE.worker, QUOTE.token, TERMS.amount, 7, 1000, 900, ZERO_ADDRESS)


def result(*items: ResultItem, spec_hash: bytes = bytes(QUOTE.spec_hash)) -> bytes:
    return encode_result(BatchResult(spec_hash=spec_hash, items=items))


def judge(raw: bytes, claimed: int = 0, *, partial: bool = False, hash_: Hash32 | None = None) -> int:
    return check_result(
        raw, quote=QUOTE, terms=TERMS, result_hash=hash_ or content_hash(raw), claimed=claimed, partial=partial
    )


# ------------------------------------------------------------------------------------------------------- specification


def test_what_is_read_is_what_was_hashed() -> None:
    raw = encode_spec(SPEC)
    assert decode_spec(raw) == SPEC
    assert [m.content for m in SPEC.prompt(1)] == ["Be brief.", "Sum up: two"]
    assert encode_spec(change(SPEC, params=Params(max_tokens=4, temperature=1))) == encode_spec(
        change(SPEC, params=Params(max_tokens=4, temperature=1.0))
    )


def test_another_form_of_the_same_is_refused() -> None:
    plain = msgspec.msgpack.decode(encode_spec(SPEC))
    shuffled = msgspec.msgpack.encode(dict(reversed(plain.items())))
    short = msgspec.msgpack.encode({k: v for k, v in plain.items() if k != "version"})
    loose = msgspec.msgpack.encode({**plain, "params": {**plain["params"], "temperature": 0}})
    for raw in (shuffled, short, loose, encode_spec(SPEC) + b"\0", b"", b"\xc1", b"\x80" * 100):
        with pytest.raises(RemoteProtocolError) as caught:
            decode_spec(raw)
        assert caught.value.code is WireCode.MALFORMED


BAD_SPECS: list[Any] = [
    change(SPEC, inputs=()),
    change(SPEC, inputs=("x",) * (INPUTS_LIMIT + 1)),
    change(SPEC, messages=(ChatMessage(role="user", content="no place"),)),
    change(SPEC, messages=(ChatMessage(role="user", content=PLACE + "x" * 600),), inputs=("y" * 300,) * 10_000),
    change(SPEC, messages=(ChatMessage(role="user", content=PLACE * 100),), inputs=("y" * 90_000,)),
    change(SPEC, params=Params(max_tokens=OUTPUT_LIMIT // 10), inputs=("x",) * 11),
    change(SPEC, params=Params(max_tokens=0)),
    change(SPEC, inputs=("x" * (SPEC_LIMIT // 8),) * 9),
    change(SPEC, inputs=("\ud800",)),
    change(SPEC, version=2),
    change(SPEC, task="embed"),
]


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_what_no_worker_may_take(spec: Any) -> None:
    with pytest.raises(InvalidValue):
        encode_spec(spec)
    try:
        raw = encode(spec)
    except InvalidValue:
        return
    with pytest.raises(RemoteProtocolError):
        decode_spec(raw)


def test_a_small_specification_cannot_mean_gigabytes() -> None:
    bomb = change(SPEC, messages=(ChatMessage(role="user", content=PLACE * 50_000),), inputs=("x" * 300,) * 10_000)
    raw = encode(bomb)
    assert len(raw) < SPEC_LIMIT
    assert RENDERED_LIMIT * 1000 < 50_000 * 300 * 10_000
    with pytest.raises(RemoteProtocolError, match="characters in all"):
        decode_spec(raw)


# --------------------------------------------------------------------------------------------------------------- price


prices = st.builds(Price, *(st.integers(0, 2**40),) * 3)
tokens = st.integers(0, 2**20)


@given(prices, st.lists(st.tuples(tokens, tokens), min_size=1, max_size=20))
def test_many_together_cost_no_more_than_one_by_one_and_at_least_all_but_a_unit_each(
    price: Price, counts: list[tuple[int, int]]
) -> None:
    together = batch_cost(price, len(counts), sum(a for a, _ in counts), sum(b for _, b in counts))
    apart = sum(cost(price, a, b) for a, b in counts)
    assert apart - len(counts) < together <= apart
    assert batch_cost(price, 1, *counts[0]) == cost(price, *counts[0])


@given(
    st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=4), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_no_result_costs_more_than_the_quote(ids: list[list[int]], begun: list[bool]) -> None:
    items = [ResultItem(tuple(i), "x", FinishReason.STOP) if b else NOT_BEGUN for i, b in zip(ids, begun, strict=True)]
    claim = claim_of(TERMS, items)
    assert 0 <= claim <= TERMS.amount
    assert claim == batch_cost(
        TERMS.price,
        sum(begun),
        sum(c for c, b in zip(TERMS.input_tokens, begun, strict=True) if b),
        sum(len(i) for i, b in zip(ids, begun, strict=True) if b),
    )


def test_a_result_always_fits_the_room_set_aside() -> None:
    longest = "\U0001f600" * 32  # 128 bytes
    items = tuple(ResultItem((2**32 - 1,) * 4, longest * 3, FinishReason.LENGTH) for _ in range(3))
    assert len(result(*items)) <= TERMS.room


# --------------------------------------------------------------------------------------------------------------- checks


def test_a_quote_that_is_what_was_asked() -> None:
    assert check_quote(QUOTE, encode_terms(TERMS), WISH) == TERMS
    assert check_quote(QUOTE, encode_terms(TERMS), replace(WISH, max_amount=10**9, min_penalty=0)) == TERMS


BAD_QUOTES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"spec_hash": Hash32(bytes(32))}, {}, {}),
    ({"client": ZERO_ADDRESS}, {}, {}),
    ({"worker": ZERO_ADDRESS}, {}, {}),
    ({"token": ZERO_ADDRESS}, {}, {}),
    ({"deadline": 1001}, {}, {}),
    ({"window": 901}, {}, {}),
    ({"resolver": Address(b"\x09" * 20)}, {}, {}),
    ({"salt": Hash32(bytes(32))}, {}, {}),
    ({"amount": TERMS.amount - 1}, {}, {}),
    ({"amount": TERMS.amount + 1}, {}, {}),
    ({"penalty": 6}, {}, {}),
    ({}, {}, {"max_amount": TERMS.amount - 1}),
    ({}, {"max_tokens": 5}, {}),
    ({}, {"input_tokens": (3, 4)}, {}),
    ({}, {"input_tokens": (3, 4, TOKENS_MAX)}, {}),
    ({}, {"max_tokens": OUTPUT_LIMIT}, {"max_tokens": OUTPUT_LIMIT}),
]


@pytest.mark.parametrize(("quote", "terms", "wish"), BAD_QUOTES)
def test_a_quote_that_is_not(quote: dict[str, Any], terms: dict[str, Any], wish: dict[str, Any]) -> None:
    theirs = change(TERMS, **terms)
    raw = encode_terms(theirs)
    bound: dict[str, Any] = {}
    if terms and sum(theirs.input_tokens) <= TOKENS_MAX:  # everything else is as it should be
        bound = {"salt": terms_hash(raw), "amount": theirs.amount}
        wish = {"max_amount": 2**100, **wish}
    with pytest.raises(RemoteProtocolError):
        check_quote(replace(QUOTE, **{**bound, **quote}), raw, replace(WISH, **wish))


def test_a_result_that_is_owed() -> None:
    raw = result(*ITEMS)
    worth = claim_of(TERMS, ITEMS)
    assert judge(raw, worth) == judge(raw, 0) == worth == 3 * 10 + 12 + 20 * 7
    part = result(ITEMS[0], NOT_BEGUN, NOT_BEGUN)
    assert judge(part, 0, partial=True) == 10 + 3 + 40


BAD_RESULTS: list[tuple[bytes, bool, str]] = [
    (result(*ITEMS[:2]), False, "2 items for 3"),
    (result(*ITEMS, ITEMS[0]), False, "4 items for 3"),
    (result(*ITEMS, spec_hash=bytes(32)), False, "another job"),
    (result(*ITEMS[:2], NOT_BEGUN), False, "not finished"),
    (result(*ITEMS[:2], ResultItem((), "free", FinishReason.CANCELLED)), True, "text and no tokens"),
    (result(*ITEMS[:2], ResultItem((), "", FinishReason.STOP)), False, "no tokens"),
    (result(*ITEMS[:2], ResultItem((), "", FinishReason.STOP)), True, "no tokens"),
    (result(*ITEMS[:2], ResultItem((1,) * 5, "", FinishReason.LENGTH)), False, "at most 4"),
    (result(*ITEMS[:2], ResultItem((1,) * 3, "", FinishReason.LENGTH)), False, "ends for its length"),
    (result(*ITEMS) + b"\0", False, "unreadable"),
    (b"\xc1", False, "unreadable"),
]


@pytest.mark.parametrize(("raw", "partial", "what"), BAD_RESULTS)
def test_a_result_that_is_not(raw: bytes, partial: bool, what: str) -> None:
    with pytest.raises(RemoteProtocolError, match=what) as caught:
        judge(raw, partial=partial)
    assert caught.value.code is WireCode.BAD_RECEIPT


def test_greed_and_other_bytes_are_refused() -> None:
    raw = result(*ITEMS)
    with pytest.raises(RemoteProtocolError, match="is claimed"):
        judge(raw, claim_of(TERMS, ITEMS) + 1)
    with pytest.raises(RemoteProtocolError, match="not those of the result hash"):
        judge(raw[:-1] + b"x", hash_=content_hash(raw))


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 2**16), st.integers(0, 255))
def test_whatever_comes_is_read_or_refused(noise: bytes, at: int, byte: int) -> None:
    for good, read in (
        (encode_spec(SPEC), decode_spec),
        (encode_terms(TERMS), decode_terms),
        (result(*ITEMS), lambda raw: judge(raw)),
    ):
        spoiled = bytearray(good)
        spoiled[at % len(good)] = byte
        for raw in (noise, bytes(spoiled), good[: at % len(good)]):
            try:
                read(raw)
            except RemoteProtocolError:
                pass


def test_the_committed_documents() -> None:
    spec, terms = bytes.fromhex(WIRE["spec"]), decode_terms(bytes.fromhex(WIRE["terms"]))
    assert str(content_hash(spec)) == WIRE["specHash"] and decode_spec(spec).params.max_tokens == 16
    assert (str(terms_hash(bytes.fromhex(WIRE["terms"]))), str(terms.amount)) == (WIRE["salt"], WIRE["amount"])
    raw = bytes.fromhex(WIRE["result"])
    assert str(content_hash(raw)) == WIRE["resultHash"]


# ------------------------------------------------------------------------------------------------------ planted bugs

SOURCE = inspect.getsource(real)
PLANTED = {
    "another form is taken": ("if encode(value) != raw:", "if False:"),
    "a job without a place": ("if not places:", "if False:"),
    "prompts without end": ("if rendered > RENDERED_LIMIT:", "if False:"),
    "output without end": ("    if most > OUTPUT_LIMIT:\n", "    if False:\n"),
    "terms without end": ("if sum(terms.input_tokens) > TOKENS_MAX or most > OUTPUT_LIMIT:", "if False:"),
    "what was not begun is charged": ("if item != NOT_BEGUN]", "if True]"),
    "a quote for something else": ("if got != asked:", "if False:"),
    "terms that nobody signed": ("if quote.salt != terms_hash(raw_terms):", "if False:"),
    "other counts": ("if (len(terms.input_tokens), terms.max_tokens) != (wish.inputs, wish.max_tokens):", "if False:"),
    "an amount out of the air": ("if quote.amount != terms.amount:", "if False:"),
    "a dear quote": ("if quote.amount > wish.max_amount:", "if False:"),
    "a small penalty": ("if quote.penalty < wish.min_penalty:", "if False:"),
    "other bytes": ("if content_hash(raw) != result_hash:", "if False:"),
    "another job's result": ("if result.spec_hash != quote.spec_hash:", "if False:"),
    "too few items": ("if len(result.items) != len(terms.input_tokens):", "if len(result.items) > len(terms.input_tokens):"),
    "greed": ("if claimed > cost:", "if claimed > cost + 1:"),
    "too many tokens": ("if count > max_tokens:", "if False:"),
    "unfinished items": ("if not partial:", "if False:"),
    "text for nothing": ("if count == 0 and item.text:", "if False:"),
    "nothing for money": ("elif count == 0:", "elif False:"),
    "a length that is none": ("elif reason is FinishReason.LENGTH and count != max_tokens:", "elif False:"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = PLANTED[name]
    assert SOURCE.count(old) == 1, f"the source has changed: {old!r} must be planted anew"
    space: dict[str, Any] = {"__name__": "protocol.workload"}
    exec(compile(SOURCE.replace(old, new), "planted", "exec"), space)  # our own source
    kinds = {k: v for k, v in vars(real).items() if isinstance(v, type)}
    space.update(kinds, NOT_BEGUN=NOT_BEGUN)
    for function in ("check_quote", "check_result", "claim_of", "decode_spec", "decode_terms", "encode_spec"):
        monkeypatch.setitem(globals(), function, space[function])
    with pytest.raises((AssertionError, pytest.fail.Exception, InvalidValue, IndexError)):
        suite()


def test_the_suite_passes_without_a_bug() -> None:
    suite()


def suite() -> None:
    test_another_form_of_the_same_is_refused()
    test_a_small_specification_cannot_mean_gigabytes()
    for spec in BAD_SPECS:
        test_what_no_worker_may_take(spec)
    for bad_quote in BAD_QUOTES:
        test_a_quote_that_is_not(*bad_quote)
    test_a_result_that_is_owed()
    for bad_result in BAD_RESULTS:
        test_a_result_that_is_not(*bad_result)
    test_greed_and_other_bytes_are_refused()
