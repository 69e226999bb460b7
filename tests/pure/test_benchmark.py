"""Signed benchmarks: what is refused, what counts as stable, and what may be claimed from one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.testing import benchmarks
from node.testing.benchmarks import MODEL, NONCE, run, simulated_document
from node.testing.benchmarks import figure as of
from protocol import benchmark
from protocol.benchmark import (
    FILE_LIMIT,
    BenchmarkDocument,
    Costs,
    DeviceFacts,
    Figure,
    ModelBench,
    SignedBenchmark,
    advise,
    benchmark_frame,
    claim_of,
    figure,
    judged,
    open_benchmark,
    output_hash,
    prompt_ids,
    unrest,
)
from protocol.errors import InvalidValue, LocalProtocolError, RemoteProtocolError, WireCode
from protocol.ids import ModelId, keccak256
from protocol.keys import PrivateKey
from protocol.messages import encode
from protocol.typed_data import MARKET_DOMAIN

ROOT = Path(__file__).resolve().parents[2]
KEY, OTHER = (PrivateKey(keccak256(word)) for word in (b"a worker", b"somebody else"))


def document(**changes: Any) -> BenchmarkDocument:
    return simulated_document(KEY.peer_id, **changes)


def signed(made: BenchmarkDocument, key: PrivateKey = KEY) -> bytes:
    return benchmarks.signed(made, key)


def test_a_benchmark_comes_back_as_it_was_signed() -> None:
    raw, frame = benchmark_frame(document(), KEY.peer_id)
    assert frame.document_hash == hashlib.sha256(raw).digest() and frame.nonce == NONCE
    verified = open_benchmark(encode(SignedBenchmark(raw, KEY.sign(frame.digest(MARKET_DOMAIN)))), nonce=NONCE)
    assert verified.document == document() and verified.worker == KEY.address


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"finished": 1_000}, "ends after it begins"),
        ({"nonce_source": "block"}, "a chain is named"),
        ({"chain_id": 5}, "a chain is named"),
        ({"figures": (of("matmul_float16", "FLOP/s", 1.0),)}, "measured or skipped, and once"),
        ({"figures": (of("x", "B/s", 1.0), of("x", "B/s", 1.0))}, "measured or skipped, and once"),
        ({"figures": (Figure("x", "B/s", 1.0, 1.1, 1.2, 3),)}, "between its lowest and its highest"),
        ({"stable": False}, "exactly when its own figures do"),
        ({"reasons": ("a cold",)}, "exactly when its own figures do"),
        ({"other_load": 0.5}, "exactly when its own figures do"),
        ({"disturbances": ("2 other programs compute on the device",)}, "exactly when its own figures do"),
        ({"figures": (of("x", "B/s", 1.0, spread=0.11),)}, "exactly when its own figures do"),
        ({"figures": (Figure("x", "B/s", 0.0, 0.0, 1e12, 3),)}, "exactly when its own figures do"),
        ({"model": ModelBench(bytes(32), "m", "f", 9, 1, 2, 0.1, (run(1, spread=0.2),))}, "exactly when"),
    ],
)
def test_what_contradicts_itself_is_refused_on_both_sides(changes: dict[str, Any], words: str) -> None:
    wrong = document(**changes)
    with pytest.raises(LocalProtocolError, match=words):
        benchmark_frame(wrong, KEY.peer_id)
    with pytest.raises(RemoteProtocolError, match=words) as error:
        open_benchmark(signed(wrong))
    assert error.value.code is WireCode.MALFORMED


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"nonce": b"short"},
        {"other_load": 1.5},
        {"figures": tuple(of(f"f{n}", "B/s", 1.0) for n in range(65))},
        {"device": DeviceFacts("cpu", "x" * 129, "", 0, 0)},
        {"figures": (Figure("x", "B/s", float("nan"), 1.0, 1.2, 3),)},
        {"figures": (Figure("x", "B/s", 1.0, 1.0, float("inf"), 3),)},
        {"figures": (Figure("Upper", "B/s", 1.0, 1.0, 1.0, 1),)},
    ],
)
def test_what_passes_its_bounds_is_refused_on_both_sides(changes: dict[str, Any]) -> None:
    with pytest.raises((LocalProtocolError, InvalidValue)):
        benchmark_frame(document(**changes), KEY.peer_id)
    with pytest.raises(RemoteProtocolError):
        open_benchmark(signed(document(**changes)))


def test_another_signer_another_nonce_another_byte() -> None:
    with pytest.raises(RemoteProtocolError) as error:
        open_benchmark(signed(document(), OTHER))
    assert error.value.code is WireCode.BAD_SIGNATURE
    with pytest.raises(LocalProtocolError, match="the peer it names"):
        benchmark_frame(document(), OTHER.peer_id)
    with pytest.raises(RemoteProtocolError, match="another nonce"):
        open_benchmark(signed(document()), nonce=bytes(32))
    whole = signed(document())
    for place in range(0, len(whole), 7):
        bad = bytearray(whole)
        bad[place] ^= 1
        with pytest.raises(RemoteProtocolError):
            open_benchmark(bytes(bad), nonce=NONCE)
    with pytest.raises(RemoteProtocolError, match="at most"):
        open_benchmark(bytes(FILE_LIMIT + 1))


@given(st.binary(max_size=300))
def test_noise_is_refused_in_words(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_benchmark(data)


def test_stable_is_what_the_figures_say() -> None:
    assert unrest(document()) == ()
    noisy = judged(document(other_load=0.31, figures=(of("memory_copy", "B/s", 1.0, spread=0.4, samples=3),)))
    assert not noisy.stable
    assert noisy.reasons == (
        "memory_copy: rounds lie 40% apart",
        "other processes used 31% of the processors",
    )
    assert judged(document(figures=(of("x", "B/s", 1.0, spread=0.0, samples=1),))).reasons == ("x: measured once",)
    open_benchmark(signed(noisy))


def lies() -> bool:
    """Whether a document that calls itself stable, and is not, gets through."""
    try:
        open_benchmark(signed(document(other_load=0.9)))
    except RemoteProtocolError:
        return False
    return True


def test_the_check_of_stability_has_been_seen_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not lies()
    monkeypatch.setattr(benchmark, "unrest", lambda made: made.reasons)
    assert lies()


def test_a_figure_is_a_value_that_was_measured() -> None:
    assert figure("x", "B/s", [4.0, 1.0, 3.0, 2.0]) == Figure("x", "B/s", 2.0, 1.0, 4.0, 4)
    assert figure("x", "B/s", [5.0]).spread == 0
    assert Figure("x", "B/s", 0.0, 0.0, 0.0, 2).spread == 0


def test_prompts_depend_on_nonce_batch_turn_and_stream() -> None:
    seen = {
        prompt_ids(nonce, batch, turn, stream, 20, 49_152)
        for nonce in (NONCE, bytes(32))
        for batch in (1, 4)
        for turn in (0, 1)
        for stream in (0, 1)
    }
    assert len(seen) == 16
    assert all(len(one) == 20 and max(one) < 49_152 for one in seen)
    assert prompt_ids(NONCE, 1, 0, 0, 3, 1000) == prompt_ids(NONCE, 1, 0, 0, 9, 1000)[:3]
    first = hashlib.sha256(b"gristmill bench 1" + NONCE + bytes((0, 0, 0, 1)) + bytes(4) + bytes(4) + bytes(4)).digest()
    assert prompt_ids(NONCE, 1, 0, 0, 1, 49_152) == (int.from_bytes(first[:4]) % 49_152,)


def test_the_vector_is_read_and_its_prompts_are_made_anew_by_the_spec() -> None:
    """By the words of docs/spec/benchmark.md, not by the code above."""
    vector = json.loads((ROOT / "tests" / "vectors" / "wire.json").read_text(encoding="utf-8"))["benchmark"]
    nonce = bytes.fromhex(vector["nonce"][2:])
    verified = open_benchmark(bytes.fromhex(vector["file"]), nonce=nonce)
    assert (str(verified.worker), str(verified.hash)) == (vector["worker"], vector["documentHash"])
    assert list(verified.document.reasons) == vector["reasons"] and not verified.document.stable
    for one in vector["prompts"]:
        seed = b"gristmill bench 1" + nonce
        seed += b"".join(one[name].to_bytes(4, "big") for name in ("batch", "round", "stream"))
        stream = b"".join(hashlib.sha256(seed + n.to_bytes(4, "big")).digest() for n in range(2))
        words = [int.from_bytes(stream[at : at + 4], "big") for at in range(0, 4 * len(one["tokenIds"]), 4)]
        assert one["tokenIds"] == [word % one["vocabSize"] for word in words]
    flat = [ids for streams in vector["outputs"] for ids in streams]
    text = b"".join(len(ids).to_bytes(4, "big") + b"".join(i.to_bytes(4, "big") for i in ids) for ids in flat)
    assert vector["outputHash"] == "0x" + hashlib.sha256(text).hexdigest()
    run_ = verified.document.model.runs[0] if verified.document.model else None
    assert run_ is not None and "0x" + run_.output_hash.hex() == vector["outputHash"]


def test_output_hash_tells_streams_apart() -> None:
    told = [[[[1, 2], [3]]], [[[1], [2, 3]]], [[[1, 2]], [[3]]], [[[3], [1, 2]]], [[[1, 2, 3]]]]
    hashes = [output_hash(turns) for turns in told]
    assert hashes[0] == hashes[2], "rounds are one after the other"
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("model", "dtype", "uuid", "change", "expected"),
    [
        (MODEL, "bfloat16", "CPU-1", {}, (100.0, 120.0)),
        (ModelId(bytes(32)), "bfloat16", "CPU-1", {}, None),
        (MODEL, "float32", "CPU-1", {}, None),
        (MODEL, "bfloat16", "CPU-2", {}, None),
        (MODEL, "bfloat16", "CPU-1", {"other_load": 0.2}, None),
        (MODEL, "bfloat16", "CPU-1", {"quick": True}, None),
        (MODEL, "bfloat16", "CPU-1", {"model": None}, None),
    ],
)
def test_a_claim_is_of_one_stream_of_that_model_format_and_device(
    model: ModelId, dtype: str, uuid: str, change: dict[str, Any], expected: tuple[float, float] | None
) -> None:
    claim = claim_of(judged(document(**change)), model, dtype, uuid)
    assert (claim and (claim.tokens_per_second, claim.ttft_ms)) == expected


def test_prices_cover_the_costs() -> None:
    costs = Costs(Fraction("0.02"), Fraction("0.3"), Fraction(90), Fraction(1, 2), Fraction(1, 5))
    assert costs.per_hour == Fraction("0.047")
    advice = advise(costs, prefill_per_second=1000, decode_per_second=100, decimals=6)
    sold = 100 * 3600 / 2
    assert advice.output == -(-47_000 * 1_000_000 * 6 // (5 * int(sold))) and advice.input == -(-advice.output // 10)
    assert advice.output * sold / 1_000_000 >= 47_000 * 1.2


@pytest.mark.parametrize(
    "call",
    [
        lambda c: advise(c, prefill_per_second=0, decode_per_second=1, decimals=6),
        lambda c: advise(c, prefill_per_second=1, decode_per_second=float("nan"), decimals=6),
    ],
)
def test_no_price_without_a_rate(call: Callable[[Costs], Any]) -> None:
    with pytest.raises(InvalidValue):
        call(Costs(Fraction(1), Fraction(0), Fraction(0), Fraction(1), Fraction(0)))
