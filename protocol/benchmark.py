"""Signed benchmarks: what a worker's device was measured to do, and whether the figures can be relied on.

The document is msgpack bytes; the signature covers exactly those bytes through their sha256, as with offers. `open_benchmark` is
the only way in: bounds, what the figures say of each other, signature, signer = peer. It needs no network and no clock.

1. Every figure carries its lowest and highest round. `unrest` says what speaks against relying on a document, from the document
   alone; one that calls itself stable and is not is refused.
2. The nonce seeds the prompts of the reference run, so the hashes of its output cannot have been made before the nonce was known.
   That is what they prove: this model answered these prompts. Figures of matrix products and memory are the worker's word.
3. No clock, no randomness, no I/O: the measuring is `node.runtime.bench`'s business.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Final, Literal

import msgspec

from protocol.errors import InvalidValue, LocalProtocolError, RemoteProtocolError, WireCode
from protocol.ids import Address, Hash32, ModelId, PeerId
from protocol.keys import require_signer
from protocol.messages import Bytes32, Millis, checked, decode_value, encode
from protocol.typed_data import MARKET_DOMAIN, Benchmark

SPREAD_MAX: Final = 0.10
"""Rounds of one figure may lie so far apart, as a share of their median; further, and the figure is not stable."""
OTHER_LOAD_MAX: Final = 0.05
"""Share of the machine's processors that others may have used meanwhile."""
DOCUMENT_LIMIT: Final = 64 * 1024
FILE_LIMIT: Final = DOCUMENT_LIMIT + 256
BATCH_MAX: Final = 1024

_Meta = msgspec.Meta
_Name = Annotated[str, _Meta(min_length=1, max_length=48, pattern=r"^[a-z][a-z0-9_]*$")]
_Text = Annotated[str, _Meta(max_length=128)]
_Why = Annotated[str, _Meta(min_length=1, max_length=256)]
_Bytes = Annotated[int, _Meta(ge=0, le=2**53)]
_Value = Annotated[float, _Meta(ge=0, le=1e24)]


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured quantity."""

    name: _Name
    unit: Annotated[str, _Meta(min_length=1, max_length=16)]
    value: _Value
    """Median of the rounds."""
    low: _Value
    high: _Value
    samples: Annotated[int, _Meta(ge=1, le=1_000_000)]
    """Rounds."""

    @property
    def spread(self) -> float:
        """How far the rounds lie apart, as a share of their median; 0 when they do not."""
        if self.high == self.low:
            return 0.0
        return (self.high - self.low) / self.value if self.value else math.inf


class Skipped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was not measured, and why."""

    name: _Name
    why: _Why


class DeviceFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device that was measured."""

    kind: Annotated[str, _Meta(min_length=1, max_length=16)]
    """cuda, rocm, xpu, mps or cpu."""
    name: _Text
    uuid: _Text
    """As its vendor gives it; of a processor a hash of what identifies this machine and it."""
    memory_total: _Bytes
    memory_free: _Bytes
    """Before anything was measured."""
    driver: _Text = ""
    runtime: _Text = ""
    capability: _Text = ""
    """Compute capability, architecture, or the instruction set that torch uses."""
    threads: Annotated[int, _Meta(ge=0, le=4096)] = 0
    """Processor threads that the engine computes with."""
    power_watts: Annotated[float, _Meta(ge=0, le=100_000)] = 0.0
    """Drawn under load; 0 = not known."""


class Software(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What computed."""

    gristmill: _Text
    torch: _Text
    python: _Text
    platform: _Text


class ModelRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many streams at once, each with a prompt of its own in every round."""

    batch: Annotated[int, _Meta(ge=1, le=BATCH_MAX)]
    tokens_per_second: Figure
    """All generated tokens over the wall time from the first submission to the last token, prefill included."""
    ttft_ms: Figure
    """Submission to first token, mean of the streams."""
    tpot_ms: Figure
    """(Last token - first token) / (tokens - 1), mean of the streams."""
    output_hash: Bytes32
    """`output_hash` of what all rounds generated."""


class ModelBench(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model, loaded and run."""

    model_id: Bytes32
    name: Annotated[str, _Meta(min_length=1, max_length=128)]
    dtype: Annotated[str, _Meta(min_length=1, max_length=16)]
    vocab_size: Annotated[int, _Meta(ge=2, le=2**24)]
    prompt_tokens: Annotated[int, _Meta(ge=1, le=2**20)]
    output_tokens: Annotated[int, _Meta(ge=2, le=2**20)]
    """Per stream, greedy, whatever ends an answer ignored."""
    load_seconds: Annotated[float, _Meta(ge=0, le=86_400)]
    runs: Annotated[tuple[ModelRun, ...], _Meta(min_length=1, max_length=8)]

    def run(self, batch: int) -> ModelRun | None:
        return next((one for one in self.runs if one.batch == batch), None)


class BenchmarkDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that was measured, and how quiet it was meanwhile."""

    version: Literal[1]
    peer_id: Annotated[str, _Meta(max_length=64)]
    nonce: Bytes32
    nonce_source: Literal["verifier", "block", "random"]
    """Who chose the nonce: a verifier, a chain (the hash of the block below), or the worker: then it proves no date."""
    chain_id: Annotated[int, _Meta(ge=0, le=2**53)]
    block: Annotated[int, _Meta(ge=0, le=2**53)]
    """0, both, unless the nonce is a block's hash."""
    started: Millis
    finished: Millis
    quick: bool
    device: DeviceFacts
    software: Software
    figures: Annotated[tuple[Figure, ...], _Meta(max_length=64)]
    skipped: Annotated[tuple[Skipped, ...], _Meta(max_length=64)]
    model: ModelBench | None
    other_load: Annotated[float, _Meta(ge=0, le=1)]
    """Share of the machine's processors that other processes used meanwhile."""
    disturbances: Annotated[tuple[_Why, ...], _Meta(max_length=16)]
    """What else was seen that makes figures unreliable: other programs on the device, a clock that was held down."""
    stable: bool
    reasons: Annotated[tuple[_Why, ...], _Meta(max_length=64)]
    """Why it is not stable."""

    def figure(self, name: str) -> Figure | None:
        return next((one for one in self.figures if one.name == name), None)

    @property
    def all_figures(self) -> tuple[tuple[str, Figure], ...]:
        """Every figure with the name that reasons call it by."""
        plain = [(one.name, one) for one in self.figures]
        runs = self.model.runs if self.model else ()
        inside = [(f"{f.name} at batch {run.batch}", f) for run in runs for f in _of(run)]
        return (*plain, *inside)


def _of(run: ModelRun) -> tuple[Figure, Figure, Figure]:
    return run.tokens_per_second, run.ttft_ms, run.tpot_ms


class SignedBenchmark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a benchmark file holds."""

    document: Annotated[bytes, _Meta(min_length=1, max_length=DOCUMENT_LIMIT)]
    signature: Annotated[bytes, _Meta(min_length=65, max_length=65)]


@dataclass(frozen=True, slots=True)
class VerifiedBenchmark:
    """A benchmark that has passed every check."""

    document: BenchmarkDocument
    worker: Address
    hash: Hash32


# ---------------------------------------------------------------------------------------------------------- judging


def figure(name: str, unit: str, rounds: Sequence[float]) -> Figure:
    """Of the rounds' values. The median of an even number is the lower of the middle two: a value that was measured."""
    ordered = sorted(rounds)
    return Figure(name, unit, ordered[(len(ordered) - 1) // 2], ordered[0], ordered[-1], len(ordered))


def unrest(document: BenchmarkDocument) -> tuple[str, ...]:
    """What speaks against relying on these figures to 10 %; empty: nothing does."""
    reasons = [
        f"{name}: rounds lie {one.spread:.0%} apart" for name, one in document.all_figures if one.spread > SPREAD_MAX
    ]
    reasons += [f"{name}: measured once" for name, one in document.all_figures if one.samples < 2]
    if document.other_load > OTHER_LOAD_MAX:
        reasons.append(f"other processes used {document.other_load:.0%} of the processors")
    return (*reasons, *document.disturbances)[:64]


def judged(document: BenchmarkDocument) -> BenchmarkDocument:
    """The same, with `stable` and `reasons` as its own figures have them."""
    reasons = unrest(document)
    return msgspec.structs.replace(document, stable=not reasons, reasons=reasons)


def prompt_ids(nonce: bytes, batch: int, turn: int, stream: int, length: int, vocab_size: int) -> tuple[int, ...]:
    """The prompt of one stream in one round: sha256 in counter mode over the nonce, four bytes to a token id."""
    seed = b"gristmill bench 1" + nonce + batch.to_bytes(4) + turn.to_bytes(4) + stream.to_bytes(4)
    blocks = (hashlib.sha256(seed + n.to_bytes(4)).digest() for n in range(math.ceil(length / 8)))
    words = (block[at : at + 4] for block in blocks for at in range(0, 32, 4))
    return tuple(int.from_bytes(word) % vocab_size for word, _ in zip(words, range(length), strict=False))


def output_hash(turns: Sequence[Sequence[Sequence[int]]]) -> bytes:
    """sha256 over the ids of every stream of every round, in order: each stream's length, then each id, as four bytes."""
    digest = hashlib.sha256()
    for streams in turns:
        for ids in streams:
            digest.update(len(ids).to_bytes(4) + b"".join(one.to_bytes(4) for one in ids))
    return digest.digest()


# ---------------------------------------------------------------------------------------------------------- signing


def benchmark_frame(document: BenchmarkDocument, peer: PeerId) -> tuple[bytes, Benchmark]:
    """The document's bytes and the struct to sign for them, in `MARKET_DOMAIN`.

    Raises `LocalProtocolError` for a document that is not about this peer, or that nobody would take.
    """
    if document.peer_id != peer:
        raise LocalProtocolError("a benchmark is signed by the key of the peer it names")
    document = checked(document)
    wrong = _wrong(document)
    if wrong:
        raise LocalProtocolError(wrong)
    raw = encode(document)
    if len(raw) > DOCUMENT_LIMIT:
        raise LocalProtocolError(f"a benchmark has at most {DOCUMENT_LIMIT} bytes, this one {len(raw)}")
    return raw, _frame(document, raw)


def open_benchmark(data: bytes, *, nonce: bytes | None = None) -> VerifiedBenchmark:
    """Check a benchmark file from anywhere. `nonce`: the one that was asked for, where one was.

    Raises `RemoteProtocolError`: MALFORMED or BAD_SIGNATURE.
    """
    if len(data) > FILE_LIMIT:
        raise RemoteProtocolError(WireCode.MALFORMED, f"a benchmark file has at most {FILE_LIMIT} bytes")
    signed = decode_value(SignedBenchmark, data)
    document = decode_value(BenchmarkDocument, signed.document)
    try:
        named = PeerId(document.peer_id)
    except InvalidValue as error:
        raise RemoteProtocolError(WireCode.MALFORMED, str(error)) from None
    wrong = _wrong(document)
    if wrong:
        raise RemoteProtocolError(WireCode.MALFORMED, wrong)
    frame = _frame(document, signed.document)
    require_signer(frame.digest(MARKET_DOMAIN), signed.signature, named.address, "benchmark")
    if nonce is not None and document.nonce != nonce:
        raise RemoteProtocolError(WireCode.MALFORMED, "a benchmark of another nonce than the one that was given")
    return VerifiedBenchmark(document, named.address, frame.document_hash)


def _wrong(document: BenchmarkDocument) -> str:
    """What the bounds of the fields do not say, in words; empty when nothing is wrong."""
    if not document.started < document.finished:
        return "a benchmark ends after it begins"
    if (document.nonce_source == "block") != bool(document.chain_id):
        return "a chain is named where the nonce is a block's hash, and only there"
    names = [name for name, _ in document.all_figures] + [one.name for one in document.skipped]
    if len(set(names)) != len(names):
        return "a figure is measured or skipped, and once"
    if any(not one.low <= one.value <= one.high for _, one in document.all_figures):
        return "a figure lies between its lowest and its highest round"
    if document.reasons != unrest(document) or document.stable == bool(document.reasons):
        return "a benchmark says that it is stable exactly when its own figures do"
    return ""


def _frame(document: BenchmarkDocument, raw: bytes) -> Benchmark:
    return Benchmark(
        worker=PeerId(document.peer_id).address,
        document_hash=Hash32(hashlib.sha256(raw).digest()),
        nonce=Hash32(document.nonce),
        started=document.started,
        finished=document.finished,
    )


# ---------------------------------------------------------------------------------------------------------- using


@dataclass(frozen=True, slots=True)
class Claim:
    """What an offer may say of a model, from a benchmark."""

    tokens_per_second: float
    """Of one stream, decoding."""
    ttft_ms: float


def claim_of(document: BenchmarkDocument, model: ModelId, dtype: str, device_uuid: str) -> Claim | None:
    """None when it is about another model, format or device, or has no figures of one stream that can be relied on: those of a
    quick run cannot."""
    bench = document.model
    if bench is None or not document.stable or document.quick:
        return None
    if (bench.model_id, bench.dtype, document.device.uuid) != (model, dtype, device_uuid):
        return None
    alone = bench.run(1)
    if alone is None or not alone.tpot_ms.value:
        return None
    return Claim(round(1000 / alone.tpot_ms.value, 2), round(alone.ttft_ms.value, 2))


@dataclass(frozen=True, slots=True)
class Costs:
    """What an hour of the device costs its operator, in whole tokens."""

    hourly: Fraction
    """Rent, write-off, work: everything but power."""
    power_price: Fraction
    """Per kilowatt hour."""
    watts: Fraction
    utilisation: Fraction
    """Share of the time that is sold, above 0."""
    margin: Fraction
    """On top of the cost: 1/5 is 20 %."""

    @property
    def per_hour(self) -> Fraction:
        return self.hourly + self.watts / 1000 * self.power_price


@dataclass(frozen=True, slots=True)
class Advice:
    """Prices per 1,000,000 tokens that cover the costs, in smallest units, rounded up."""

    input: int
    output: int
    cost_per_hour: Fraction
    """Whole tokens."""


def advise(costs: Costs, *, prefill_per_second: float, decode_per_second: float, decimals: int) -> Advice:
    """Price = cost per hour / (tokens per hour at this rate * utilisation) * 1,000,000 * (1 + margin), for input and output each.

    Whoever decodes does not prefill: a request takes time for both, and each is priced for the time that it takes. Raises
    `InvalidValue` for a rate or a utilisation of 0, or a rate without end.
    """
    if not (0 < prefill_per_second < math.inf and 0 < decode_per_second < math.inf and 0 < costs.utilisation <= 1):
        raise InvalidValue("rates are numbers above 0, and utilisation is above 0 and at most 1")

    def price(rate: float) -> int:
        per_token = costs.per_hour / (Fraction(rate) * 3600 * costs.utilisation)
        return math.ceil(per_token * 1_000_000 * (1 + costs.margin) * Fraction(10) ** decimals)

    return Advice(price(prefill_per_second), price(decode_per_second), costs.per_hour)
