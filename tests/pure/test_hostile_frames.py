"""What a hostile peer can put on a stream: it is refused as the peer's fault, with a code, and memory stays flat (H1)."""

from __future__ import annotations

import gc
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.testing.pair import JobPair
from protocol.channel import Role
from protocol.errors import InvalidValue, LocalProtocolError, RefusalReason, RemoteProtocolError, WireCode
from protocol.frames import CONTROL_LIMIT, DATA_LIMIT, FrameReader, encode_frame
from protocol.job import JobClient, JobWorker
from protocol.messages import (
    CHANNEL_PROTOCOL,
    CONVERSATIONS,
    DATA_PER_CHUNK,
    GRAMMAR_LIMIT,
    JOB_PROTOCOL,
    TOKENS_PER_CHUNK,
    Abort,
    Accept,
    Chunk,
    Input,
    OfferMessage,
    Params,
    Refuse,
    ResponseFormat,
    checked,
    decode,
    decode_value,
    encode,
    params_hash,
)
from protocol.offers import OfferDocument
from protocol.tasks import AUDIO_LIMIT, IMAGE_LIMIT, INPUT_BYTES, PIECE_BYTES, TEXTS_LIMIT, Task, sample_request

SEEDS = 10_000
pack = msgspec.msgpack.encode


def samples() -> list[bytes]:
    """Good payloads to spoil."""
    pair = JobPair()
    kinds = [k for union in CONVERSATIONS.values() for k in union.__args__]
    empty = [pack({"t": str(k.__struct_config__.tag)}) for k in kinds]
    return [
        encode(pair.ask),
        encode(Chunk((1, 2, 3), "text")),
        encode(Chunk((), "", bytes(64), 3)),
        encode(Input(1, bytes(640))),
        *(encode(msgspec.structs.replace(pair.ask, request=sample_request(task))) for task in Task),
        encode(Accept(1, 2, 3)),
        encode(Refuse(RefusalReason.BUSY, "", 1, bytes(65), OfferMessage(b"x", bytes(65)))),
        encode(Abort(WireCode.INTERNAL)),
        *empty,
    ]


def integer(random: Random) -> int:
    return random.choice([-1, 0, 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), random.getrandbits(64)])


def value(random: Random, depth: int = 0) -> Any:
    """Any msgpack value."""
    pick = random.randrange(9 if depth < 4 else 7)
    if pick < 7:
        return [
            None,
            random.random() < 0.5,
            integer(random),
            random.choice([math.nan, math.inf, -math.inf, -0.0, 1e308, random.random()]),
            random.choice(["", "x" * random.randrange(2000), "t", "ask", "𝄞"]),
            random.randbytes(random.choice([0, 16, 20, 32, 65, 1000])),
            msgspec.msgpack.Ext(random.randrange(-128, 128), random.randbytes(4)),
        ][pick]
    if pick == 7:
        return [value(random, depth + 1) for _ in range(random.randrange(6))]
    return {str(value(random, 9))[:20]: value(random, depth + 1) for _ in range(random.randrange(6))}


def spoiled(random: Random, good: list[bytes]) -> bytes:
    """One hostile payload."""
    payload = random.choice(good)
    match random.randrange(10):
        case 0:  # cut short
            return payload[: random.randrange(len(payload))]
        case 1:  # bits turned
            data = bytearray(payload)
            for _ in range(random.randint(1, 8)):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            return bytes(data)
        case 2:  # noise
            return random.randbytes(random.randrange(1, 400))
        case 3:  # something behind it
            return payload + random.randbytes(random.randint(1, 20))
        case 4:  # deep
            return random.choice([b"\x91", b"\x81\xa1x", b"\x81\xa1t", b"\x92\x90"]) * random.choice(
                [50, 5000, 100_000]
            )
        case 5:  # a header that claims more than there is
            head = random.choice([b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"])
            return payload[: random.randrange(len(payload))] + head + struct.pack(">I", random.getrandbits(32))
        case 6:  # a field of another type, or one too many
            fields = msgspec.msgpack.decode(payload)
            fields[random.choice([*fields, "extra"])] = value(random)
            return pack(fields)
        case 7:  # a field missing
            fields = msgspec.msgpack.decode(payload)
            fields.pop(random.choice([*fields]))
            return pack(fields)
        case 8:  # a field of the right type with a value from anywhere
            fields = msgspec.msgpack.decode(payload)
            name = random.choice([*fields])
            if isinstance(fields[name], int):
                fields[name] = abs(integer(random)) >> random.randrange(64)
            elif isinstance(fields[name], bytes):
                fields[name] = random.randbytes(len(fields[name]))
            return pack(fields)
        case _:
            return pack(value(random))


def decode_hostile_payloads() -> dict[str, int]:
    """Each against every conversation. What still decodes is within its bounds, because it can be sent again as it is.

    Returns how many were `decoded` and `refused`, and bytes that Python holds after the first thousand (`early`), at the end
    (`late`), and at most between them (`peak`).
    """
    good = samples()
    decoded = refused = early = 0
    tracemalloc.start()
    for seed in range(SEEDS):
        payload = spoiled(Random(seed), good)
        for protocol in CONVERSATIONS:
            try:
                message = decode(protocol, payload)
            except RemoteProtocolError as error:
                assert error.code is WireCode.MALFORMED
                assert len(str(error)) < 300
                refused += 1
            else:
                assert checked(message) == message
                decoded += 1
        if seed == 1000:
            gc.collect()
            early = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
    gc.collect()
    late, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"decoded": decoded, "refused": refused, "early": early, "late": late, "peak": peak}


def test_ten_thousand_hostile_payloads() -> None:
    """In a process that does nothing else: what threads of other tests allocate is not the decoder's."""
    code = "import json, test_hostile_frames as t; print(json.dumps(t.decode_hostile_payloads()))"
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    assert seen["late"] - seen["early"] < 16 * 1024, "memory grows with the number of hostile frames"
    assert seen["peak"] - seen["early"] < 8 * CONTROL_LIMIT, "one hostile frame takes more memory than its size allows"
    assert seen["refused"] > SEEDS and seen["decoded"] > 100, "the mix is not hostile, or not near enough to good"


def test_ten_thousand_hostile_streams() -> None:
    """Framed, badly framed and cut at random, into the machines of both roles: one typed error at most, and an end."""
    good = samples()
    codes: Counter[WireCode] = Counter()
    terms = JobPair().terms
    for seed in range(SEEDS):
        random = Random(seed)
        machine = JobWorker() if seed % 2 else JobClient(terms)
        data = bytearray()
        for _ in range(random.randint(1, 3)):
            payload = spoiled(random, good)[:3000] or b"\x00"
            length = len(payload) if random.random() < 0.8 else random.choice([0, 1, CONTROL_LIMIT + 1, 2**32 - 1])
            data += length.to_bytes(4) + payload
        for start in range(0, len(data), 700):
            machine.receive_data(bytes(data[start : start + 700]))
        machine.receive_data(b"")
        before = dict(machine.states)
        try:
            while machine.next_message() is not None:
                before = dict(machine.states)
        except RemoteProtocolError as error:
            codes[error.code] += 1
        assert machine.states == before
    assert {WireCode.MALFORMED, WireCode.TOO_LARGE, WireCode.UNEXPECTED} <= set(codes)
    assert codes.total() > SEEDS * 0.9


# ------------------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize("limit", [CONTROL_LIMIT, DATA_LIMIT, 1])
def test_the_length_is_checked_before_the_body_is_kept(limit: int) -> None:
    reader = FrameReader(limit)
    with pytest.raises(RemoteProtocolError) as caught:
        list(reader.feed((limit + 1).to_bytes(4) + bytes(1000)))
    assert caught.value.code is WireCode.TOO_LARGE
    with pytest.raises(LocalProtocolError):
        list(reader.feed(b"more"))


def test_a_reader_holds_one_frame_at_most() -> None:
    reader = FrameReader()
    tracemalloc.start()
    try:
        frame = encode_frame(bytes(CONTROL_LIMIT))
        for _ in range(5):
            for start in range(0, len(frame), 65536):
                for payload in reader.feed(frame[start : start + 65536]):
                    assert len(payload) == CONTROL_LIMIT
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * CONTROL_LIMIT


def test_frames_before_a_bad_one_are_read() -> None:
    reader = FrameReader()
    got = []
    with pytest.raises(RemoteProtocolError):
        got.extend(reader.feed(encode_frame(b"a") + encode_frame(b"b") + bytes(4)))
    machine = JobWorker()
    pair = JobPair()
    pair.say(Role.CLIENT, type(pair.ask))
    machine.receive_data(bytes(pair.wires[Role.WORKER]) + bytes(4))
    assert machine.next_message() == pair.ask
    with pytest.raises(RemoteProtocolError, match="empty frame"):
        machine.next_message()


def test_we_do_not_send_what_the_other_side_must_refuse() -> None:
    for payload in (b"", bytes(CONTROL_LIMIT + 1)):
        with pytest.raises(LocalProtocolError):
            encode_frame(payload)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_frames_survive_any_split(payloads: list[bytes], random: Random) -> None:
    data = b"".join(encode_frame(p) for p in payloads)
    reader, got = FrameReader(), []
    while data:
        cut = random.randint(1, len(data))
        got.extend(reader.feed(data[:cut]))
        data = data[cut:]
    reader.end()
    assert got == payloads


# ------------------------------------------------------------------------------------- values one by one, by name


def field(kind: Any, **changes: Any) -> Callable[[], Any]:
    return lambda: decode_value(kind, pack({**changes}))


def ask(**changes: Any) -> Callable[[], Any]:
    return lambda: decode(JOB_PROTOCOL, pack({**msgspec.msgpack.decode(encode(JobPair().ask)), **changes}))


def message(tag: str, **fields: Any) -> Callable[[], Any]:
    return lambda: decode(JOB_PROTOCOL, pack({"t": tag, **fields}))


def audio(**changes: Any) -> dict[str, Any]:
    return {"task": "transcribe", "audio": {"data": b"ab", "size": 2, "type": "audio/pcm", **changes}}


def image(**changes: Any) -> dict[str, Any]:
    return {"task": "ocr", "image": {"data": b"ab", "size": 2, "type": "image/png", **changes}}


FLOATS = [name for name in Params.__struct_fields__ if isinstance(getattr(Params(), name), float)]
REFUSED: dict[str, Callable[[], Any]] = {
    **{f"{n} of {v}": field(Params, **{n: v}) for n in FLOATS for v in (math.nan, math.inf, -math.inf, 1e300, True, "1")},
    "a bias of nan": field(Params, logit_bias=[[1, math.nan]]),
    "a bias of infinity": field(Params, logit_bias=[[1, math.inf]]),
    "301 biases": field(Params, logit_bias=[[1, 0.0]] * 301),
    "a bias of three": field(Params, logit_bias=[[1, 0.0, 0.0]]),
    "max_tokens of true": field(Params, max_tokens=True),
    "max_tokens of 1.0": field(Params, max_tokens=1.0),
    "max_tokens of 0": field(Params, max_tokens=0),
    "max_tokens of 2^64-1": field(Params, max_tokens=2**64 - 1),
    "a seed of 2^63": field(Params, seed=2**63),
    "a negative seed": field(Params, seed=-1),
    "top_p of 0": field(Params, top_p=0.0),
    "an empty stop": field(Params, stop=[""]),
    "17 stops": field(Params, stop=["x"] * 17),
    "an unknown field": field(Params, best_of=2),
    **{f"logprobs of {v!r}": field(Params, logprobs=v) for v in (-1, 21, 2**63, True, 1.0, "1", None, [1])},
    "a null format": field(Params, response_format=None),
    "a format of nothing": field(Params, response_format={}),
    "a format of an unknown kind": field(Params, response_format={"kind": "xml", "text": "x"}),
    "an empty format": field(Params, response_format={"kind": "regex", "text": ""}),
    "a format of bytes": field(Params, response_format={"kind": "regex", "text": b"x"}),
    "a format that is too long": field(Params, response_format={"kind": "regex", "text": "x" * (GRAMMAR_LIMIT + 1)}),
    "a format with more": field(Params, response_format={"kind": "regex", "text": "x", "strict": True}),
    "no messages": ask(request={"task": "chat", "messages": []}),
    "1025 messages": ask(request={"task": "chat", "messages": [{"role": "user", "content": ""}] * 1025}),
    "an unknown role": ask(request={"task": "chat", "messages": [{"role": "tool", "content": ""}]}),
    "text as bytes": ask(request={"task": "chat", "messages": [{"role": "user", "content": b"x"}]}),
    "an unknown task": ask(request={"task": "paint", "texts": ["x"]}),
    "a task without a name": ask(request={"texts": ["x"]}),
    "the fields of another task": ask(request={"task": "embed", "messages": []}),
    "nothing to embed": ask(request={"task": "embed", "texts": []}),
    "1025 texts": ask(request={"task": "embed", "texts": ["x"] * (TEXTS_LIMIT + 1)}),
    "a text of bytes": ask(request={"task": "embed", "texts": [b"x"]}),
    "nothing to rerank": ask(request={"task": "rerank", "query": "x", "documents": []}),
    "1025 documents": ask(request={"task": "rerank", "query": "x", "documents": ["x"] * (TEXTS_LIMIT + 1)}),
    "audio of another kind": ask(request=audio(type="audio/mp3")),
    "too much audio at once": ask(request=audio(data=bytes(PIECE_BYTES + 1), size=PIECE_BYTES + 1)),
    "too much audio": ask(request=audio(size=AUDIO_LIMIT + 1)),
    "audio of negative size": ask(request=audio(size=-1)),
    "an image of another kind": ask(request=image(type="image/svg+xml")),
    "an image of no bytes": ask(request=image(data=b"")),
    "too large an image": ask(request=image(size=IMAGE_LIMIT + 1)),
    "input number 0": message("input", sequence=0, data=b"x"),
    "too much input at once": message("input", sequence=1, data=bytes(INPUT_BYTES + 1)),
    "input of text": message("input", sequence=1, data="x"),
    "a last of 1": message("input", sequence=1, data=b"x", last=1),
    "too many numbers in a chunk": message("chunk", token_ids=[], text="", data=bytes(DATA_PER_CHUNK + 1)),
    "a negative count of inputs": message("chunk", token_ids=[], text="", taken=-1),
    "bytes as text": ask(job_id="x" * 32),
    "31 bytes": ask(job_id=bytes(31)),
    "33 bytes": ask(job_id=bytes(33)),
    "a part of -1": ask(part=-1),
    "a part of 2^32": ask(part=2**32),
    "a part of true": ask(part=True),
    "a deadline as number with a point": ask(deadline=1.5),
    "a signature of 64 bytes": ask(signature=bytes(64)),
    "an amount of 17 bytes": ask(cumulative=bytes(17)),
    "an amount as integer": ask(cumulative=5),
    "a resumed token of 2^32": ask(resume=[2**32]),
    "131073 resumed tokens": ask(resume=[0] * 131_073),
    "params missing": ask(params=None),
    "an unknown tag": ask(t="asks"),
    "a tag as number": ask(t=1),
    "the tag of another conversation": ask(t="get_offer"),
    "an extension type": ask(part=msgspec.msgpack.Ext(1, b"x")),
    "a timestamp": ask(deadline=msgspec.msgpack.Ext(-1, bytes(4))),
    "text that is not UTF-8": lambda: decode(JOB_PROTOCOL, b"\x83\xa1t\xa5abort\xa4code\x01\xa6detail\xa2\xff\xfe"),
    "a key that is not UTF-8": lambda: decode(JOB_PROTOCOL, b"\x82\xa1t\xa6cancel\xa2\xff\xfe\x01"),
    "a key that is a number": lambda: decode(JOB_PROTOCOL, b"\x82\xa1t\xa6cancel\x01\x01"),
    "two tags": lambda: decode(JOB_PROTOCOL, b"\x82\xa1t\xa6cancel\xa1t\xa5abort"),
    "an array in place of a map": lambda: decode(JOB_PROTOCOL, b"\x91\xa6cancel"),
    "a number": lambda: decode(JOB_PROTOCOL, b"\x01"),
    "two messages in one frame": lambda: decode(JOB_PROTOCOL, b"\x81\xa1t\xa6cancel" * 2),
    "a chunk of 4097 tokens": lambda: decode(
        JOB_PROTOCOL, pack({"t": "chunk", "token_ids": [0] * (TOKENS_PER_CHUNK + 1), "text": ""})
    ),
    "a chunk that claims 2^32 tokens": lambda: decode(JOB_PROTOCOL, b"\x82\xa1t\xa5chunk\xa9token_ids\xdd\xff\xff\xff\xff"),
    "an unknown wire code": lambda: decode(JOB_PROTOCOL, pack({"t": "abort", "code": 99})),
    "a wire code as text": lambda: decode(JOB_PROTOCOL, pack({"t": "abort", "code": "internal"})),
    "a status with a huge signature": lambda: decode(
        CHANNEL_PROTOCOL,
        pack(
            {
                "t": "channel_status",
                "channel_id": bytes(32),
                "allocated": bytes(16),
                "claimed": bytes(16),
                "cumulative": bytes(16),
                "voucher_signature": bytes(66),
                "spent": bytes(16),
                "sequence": 0,
                "transaction": b"",
            }
        ),
    ),
    "a speed of nan": field(OfferDocument, tokens_per_second=math.nan),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_out_of_bounds_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        REFUSED[name]()
    assert caught.value.code is WireCode.MALFORMED


def test_the_ask_that_the_refused_ones_are_made_from_is_good() -> None:
    assert ask()() == JobPair(random=Random(0)).ask


def test_what_our_own_side_cannot_send_is_our_own_error() -> None:
    with pytest.raises(InvalidValue):
        encode(Abort(WireCode.INTERNAL, "\ud800"))
    for message in (Accept(2**70, 1, 0), Accept(object(), 1, 0)):  # type: ignore[arg-type]
        for use in (encode, checked):
            with pytest.raises(InvalidValue):
                use(message)
    for params in (Params(max_tokens=0), Params(temperature=math.nan), Params(max_tokens="5")):  # type: ignore[arg-type]
        with pytest.raises(InvalidValue):
            params_hash(params)


def test_equal_parameters_have_one_hash() -> None:
    """A caller writes `temperature=1`; the worker decodes 1.0. Both must rebuild the same signed ask."""
    ours = Params(temperature=1, top_p=1, logit_bias=((3, 2),))
    assert params_hash(ours) == params_hash(decode_value(Params, encode(ours)))
    assert params_hash(Params(temperature=0)) == params_hash(Params())


def test_free_text_keeps_the_form_that_it_had_before_there_were_grammars() -> None:
    """And a grammar is part of what is signed, every character of it."""
    assert b"response_format" not in encode(Params())
    bound = [Params(response_format=ResponseFormat(kind, text)) for kind in ("regex", "lark") for text in ("a", "b")]
    assert len({params_hash(params) for params in (Params(), *bound)}) == 5
    assert all(decode_value(Params, encode(params)) == params for params in bound)
    asked = checked(Params(response_format={"kind": "regex", "text": "a"}))  # type: ignore[arg-type]
    assert asked == bound[0]  # callers may write it as plain values


@given(st.binary(max_size=200), st.sampled_from(sorted(CONVERSATIONS)))
@settings(deadline=None, max_examples=300)
def test_any_bytes(payload: bytes, protocol: str) -> None:
    try:
        decode(protocol, payload)
    except RemoteProtocolError as error:
        assert error.code is WireCode.MALFORMED
