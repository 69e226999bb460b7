"""Rows of log probabilities: their form, every lie that can be seen in one, and that the receipt is about them."""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocol.logprobs as module
from node.testing.pair import JobPair, fake_row
from protocol.channel import Role
from protocol.errors import InvalidValue, RemoteProtocolError, WireCode
from protocol.job import JobClient, receipt_to_wire
from protocol.logprobs import LOGPROBS_LIMIT, TokenLogprobs, check, fault, pack, row_bytes, unpack
from protocol.messages import (
    DATA_PER_CHUNK,
    Accept,
    AskMessage,
    Chunk,
    FinishReason,
    Params,
    ReceiptMessage,
    checked,
    decode_value,
    encode,
    params_hash,
)

NAN, INF = math.nan, math.inf
GOOD = ((7, -0.5), (3, -1.5), (9, -2.5))


def test_a_row_as_it_stands_in_the_rules() -> None:
    row = pack(-0.5, GOOD)
    assert row == struct.pack("<f", -0.5) + b"".join(struct.pack("<If", *pair) for pair in GOOD)
    assert len(row) == row_bytes(3) == 4 + 3 * 8
    assert list(unpack((7, 3), row + pack(-1.5, GOOD))) == [TokenLogprobs(7, -0.5, GOOD), TokenLogprobs(3, -1.5, GOOD)]
    assert list(unpack((5,), pack(-3.0, ()))) == [TokenLogprobs(5, -3.0, ())]
    assert list(unpack((), b"")) == list(unpack((1, 2), b"")) == []
    assert 1024 * row_bytes(LOGPROBS_LIMIT) < DATA_PER_CHUNK, "a chunk that is served again from memory"


@pytest.mark.parametrize("top", [((1, -1.0),) * 21, ((-1, -1.0),), ((2**32, -1.0),), ((1, -1e300),)], ids=str)
def test_what_does_not_fit_into_a_row_is_no_row(top: Any) -> None:
    with pytest.raises(InvalidValue):
        pack(-1.0, top)


LIES: dict[str, tuple[int, Any, Any]] = {
    "likeliest tokens where": (7, -0.5, GOOD[:2]),
    "likeliest tokens where 3": (7, None, GOOD),
    "outside the vocabulary": (10, -0.5, GOOD),
    "outside the vocabulary, of the likeliest": (7, -0.5, (*GOOD[:2], (10, -2.5))),
    "not a number of 0 or less: NaN": (7, NAN, GOOD),
    "not a number of 0 or less: NaN of the likeliest": (7, -0.5, (*GOOD[:2], (9, NAN))),
    "not a number of 0 or less: inf": (7, INF, GOOD),
    "not a number of 0 or less: above": (5, 0.5, GOOD),
    "not a number of 0 or less: above, of the likeliest": (5, -9.0, ((7, 1e-9), *GOOD[1:])),
    "not in order": (5, -9.0, (GOOD[1], GOOD[0], GOOD[2])),
    "twice": (5, -9.0, ((7, -1.5), (7, -1.5), (9, -2.5))),
    "two log probabilities for one token": (3, -1.25, GOOD),
    "likelier than the likeliest": (5, -2.0, GOOD),
    "more than 1 together": (5, -9.0, ((7, -0.5), (3, -0.5), (9, -2.5))),
    "more than 1 together: with the token's own": (5, -1.2, ((7, -1.1), (3, -1.15), (9, -1.2))),
    "less than 1, were all others": (5, -9.0, ((7, -0.5), (3, -9.0), (9, -9.0))),
    "less than 1, were all others: none has any": (7, -INF, ((7, -INF), (3, -INF), (9, -INF))),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_seen_and_named(name: str) -> None:
    """C16."""
    token, logprob, top = LIES[name]
    said = name.partition(":")[0].partition(",")[0]
    assert said in fault(token, logprob, top, 3, vocabulary=10)
    if logprob is not None and len(top) == 3:
        with pytest.raises(InvalidValue, match=said):
            check((token,), pack(logprob, top), 3, vocabulary=10)


@pytest.mark.parametrize(
    ("token", "logprob", "top"),
    [
        (7, -0.5, GOOD),
        (9, -2.5, GOOD),
        (5, -2.5, GOOD),
        (5, -INF, GOOD),
        (0, -0.1 - math.log(10), tuple((one, -math.log(10)) for one in (7, 3, 9))),
        (7, 0.0, ((7, 0.0), (3, -INF), (9, -INF))),
        (7, -0.0, ((7, -0.0), (3, -100.0), (9, -100.0))),
        (2, math.log(1 / 3), ((9, math.log(1 / 3)), (2, math.log(1 / 3)), (4, math.log(1 / 3)))),
    ],
    ids=str,
)
def test_what_a_model_may_compute_is_believed(token: int, logprob: float, top: Any) -> None:
    assert fault(token, logprob, top, 3, vocabulary=10) == ""
    check((token,), pack(logprob, top), 3, vocabulary=10)


@given(st.lists(st.floats(-60, 60, width=32), min_size=25, max_size=40), st.integers(0, 20), st.data())
def test_the_figures_of_any_logits_are_believed(logits: list[float], count: int, data: st.DataObject) -> None:
    total = max(logits) + math.log(math.fsum(math.exp(one - max(logits)) for one in logits))
    figures = [struct.unpack("<f", struct.pack("<f", min(0.0, one - total)))[0] for one in logits]
    order = sorted(range(len(logits)), key=lambda token: (-figures[token], token))[:count]
    token = data.draw(st.integers(0, len(logits) - 1))
    check((token,), pack(figures[token], tuple((one, figures[one]) for one in order)), count, vocabulary=len(logits))


# ------------------------------------------------------------------------------------------------------- on the wire


def asked(count: int = 3) -> Params:
    return Params(max_tokens=32, logprobs=count)


def test_who_does_not_ask_signs_what_was_signed_before() -> None:
    assert b"logprobs" not in encode(Params()) and Params().likeliest is None
    made = [Params(), *(Params(logprobs=count) for count in range(LOGPROBS_LIMIT + 1))]
    assert len({params_hash(params) for params in made}) == LOGPROBS_LIMIT + 2
    assert all(decode_value(Params, encode(params)) == params for params in made)
    for bad in (-1, 21, True, 1.5, "3", None):
        with pytest.raises(InvalidValue):
            checked(Params(logprobs=bad))  # type: ignore[arg-type]


def running(params: Params) -> JobPair:
    pair = JobPair(params=params)
    for role, kind in ((Role.CLIENT, AskMessage), (Role.WORKER, Accept)):
        pair.say(role, kind)
        pair.settle()
    return pair


@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_chat_with_rows_ends_in_a_receipt_about_them(count: int) -> None:
    pair, plain = running(asked(count)), running(Params(max_tokens=32))
    for _ in range(4):
        pair.say(Role.WORKER, Chunk)
        pair.settle()
    pair.say(Role.WORKER, ReceiptMessage)
    pair.settle()
    receipt = pair.client.receipt
    assert receipt is not None and receipt.output_tokens == pair.client.digest.count > 0
    said = [one for one in pair.heard[Role.CLIENT] if isinstance(one, Chunk)]
    plain.put(Role.WORKER, b"".join(plain.worker.deliver(one.token_ids, one.text) for one in said))
    plain.settle()
    assert plain.client.digest.value != receipt.output_digest, "what is signed has the rows in it"
    assert plain.client.spent == receipt.cost, "and they cost nothing"


def said(*chunks: Chunk, params: Params | None = None, vocabulary: int = 1 << 32) -> RemoteProtocolError | None:
    """What an honest client says of these chunks."""
    pair = running(params or asked())
    pair.client._vocabulary = vocabulary
    for chunk in chunks:
        pair.put(Role.WORKER, pair.worker.send(chunk))
    try:
        pair.settle()
    except RemoteProtocolError as error:
        return error
    return None


ROW = fake_row(7, 3)
CHEATS: dict[str, Callable[[], RemoteProtocolError | None]] = {
    "no rows": lambda: said(Chunk((7,), "a")),
    "rows that nobody asked for": lambda: said(Chunk((7,), "a", ROW), params=Params(max_tokens=32)),
    "too few rows": lambda: said(Chunk((7, 7), "a", ROW)),
    "too many rows": lambda: said(Chunk((7,), "a", ROW + ROW)),
    "rows before their tokens": lambda: said(Chunk((), "", ROW), Chunk((7,), "a")),
    "half a row": lambda: said(Chunk((7,), "a", ROW[:-1])),
    "rows of another width": lambda: said(Chunk((7,), "a", fake_row(7, 4))),
    "NaN": lambda: said(Chunk((7,), "a", struct.pack("<f", NAN) + ROW[4:])),
    "+inf": lambda: said(Chunk((7,), "a", struct.pack("<f", INF) + ROW[4:])),
    "above 0": lambda: said(Chunk((7,), "a", struct.pack("<f", 0.25) + ROW[4:])),
    "out of order": lambda: said(Chunk((7,), "a", ROW[:4] + ROW[12:20] + ROW[4:12] + ROW[20:])),
    "rows of another token": lambda: said(Chunk((8,), "a", ROW)),
    "an id outside the vocabulary": lambda: said(Chunk((7,), "a", ROW), vocabulary=9),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_worker_that_lies_is_named(name: str) -> None:
    """C16."""
    error = CHEATS[name]()
    assert error is not None and error.code is WireCode.BAD_OUTPUT, error
    assert said(Chunk((7,), "a", ROW), vocabulary=10) is None


def test_other_rows_than_were_sent_are_in_no_receipt() -> None:
    pair = running(asked())
    pair.put(Role.WORKER, pair.worker.deliver((7, 7), "a", ROW + ROW))
    pair.settle()
    digest = pair.worker.digest.value
    pair.worker.digest.extend((), "", b"\x00")
    receipt = pair.worker.make_receipt(FinishReason.STOP, finished=1_700_000_001_000)
    assert receipt.output_digest != digest
    signature = pair.parties.worker.sign(receipt.digest(pair.parties.domain))
    pair.put(Role.WORKER, pair.worker.send(ReceiptMessage(receipt=receipt_to_wire(receipt), signature=signature)))
    with pytest.raises(RemoteProtocolError, match="output_digest"):
        pair.settle()


# ------------------------------------------------------------------------------------------------------ planted bugs

PLANTED: dict[str, tuple[str, str]] = {
    "the count is not held": ("if logprob is None or len(top) != count:", "if False:"),
    "the vocabulary is not held": ("0 <= token < vocabulary and all(0 <= one < vocabulary for one in ids)", "True"),
    "figures may be anything": ("if not all(figure <= 0 for figure in (logprob, *figures)):", "if False:"),
    "the order is not held": ("if any(after > before for before, after in pairwise(figures)):", "if False:"),
    "a token may stand twice": ("if len(set(ids)) != count:", "if False:"),
    "one token may have two figures": ("if figures[ids.index(token)] != logprob:", "if False:"),
    "a token may be likelier than the likeliest": ("elif figures and logprob > figures[-1]:", "elif False:"),
    "probabilities may be any": ("if told + (0.0 if token in ids else math.exp(logprob)) > 1 + _SLACK:", "if False:"),
    "the token's own does not count": ("(0.0 if token in ids else math.exp(logprob))", "0.0"),
    "probabilities may be too small": ("if figures and told + (vocabulary - count)", "if False and (vocabulary - count)"),
    "bytes are not counted": ("if len(data) != wanted:", "if False:"),
    "rows that nobody asked for": ("        if data:\n            raise", "        if False:\n            raise"),
}  # fmt: skip


@pytest.fixture
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The module with one check taken out of its source."""
    old, new = PLANTED[request.param]
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"the source has changed: {request.param!r} must be planted anew"
    space: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source.replace(old, new), "planted", "exec"), space)  # our own source
    monkeypatch.setitem(globals(), "fault", space["fault"])
    monkeypatch.setattr("protocol.job.check", space["check"])
    yield request.param


@pytest.mark.parametrize("planted", PLANTED, indirect=True)
def test_every_check_is_needed(planted: str) -> None:
    missed = []
    for name in LIES:
        token, logprob, top = LIES[name]
        try:
            if name.partition(":")[0].partition(",")[0] not in fault(token, logprob, top, 3, 10):
                missed.append(name)
        except (TypeError, ValueError):
            missed.append(name)
    for name in CHEATS:
        try:
            error = CHEATS[name]()
        except (struct.error, ValueError, ZeroDivisionError):
            error = None
        if error is None or error.code is not WireCode.BAD_OUTPUT:
            missed.append(name)
    assert missed, f"{planted} and nobody noticed"


def test_a_client_knows_a_vocabulary_or_none() -> None:
    pair = JobPair()
    assert JobClient(pair.terms)._vocabulary == 1 << 32
    assert JobClient(pair.terms, vocabulary=300)._vocabulary == 300
    assert msgspec.structs.replace(Params(), logprobs=0).likeliest == 0
