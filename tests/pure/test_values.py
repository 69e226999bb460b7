"""Names have one text form each; costs round once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import base58
import msgspec
import pytest
from eth_utils import to_checksum_address
from hypothesis import given
from hypothesis import strategies as st

from node.testing.pair import key
from protocol.channel import VoucherAdded
from protocol.errors import InvalidValue, LocalProtocolError
from protocol.ids import Address, ChannelId, Hash32, JobId, ModelId, PeerId, address_of, keccak256
from protocol.pricing import PER, PRICE_MAX, TOKENS_MAX, Price, cost
from protocol.records import decode_body, encode_body, to_body

raw20, raw32 = st.binary(min_size=20, max_size=20), st.binary(min_size=32, max_size=32)


@given(raw20)
def test_addresses(raw: bytes) -> None:
    address = Address(raw)
    assert str(address) == to_checksum_address(raw)
    assert Address(str(address)) == Address(str(address).lower()) == raw
    wrong = str(address).swapcase().replace("0X", "0x")
    if wrong.lower() != wrong and wrong.upper() != wrong.replace("0x", "0X"):
        with pytest.raises(InvalidValue, match="checksum"):
            Address(wrong)


@given(raw32)
def test_hashes_and_models(raw: bytes) -> None:
    assert Hash32(str(Hash32(raw))) == raw
    assert ModelId.from_cid(str(ModelId(raw))) == raw
    assert type(JobId(str(JobId(raw)))) is JobId


def test_known_cids() -> None:
    """CIDv1, raw, sha2-256: of no bytes, of "hello world" (as `ipfs add --cid-version=1 --raw-leaves` names them)."""
    assert str(ModelId.of_manifest(b"")) == "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
    assert str(ModelId.of_manifest(b"hello world")) == "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"


@given(st.integers(1, 2**255))
def test_a_peer_is_its_key_is_its_address(secret: int) -> None:
    from coincurve import PrivateKey as Curve

    public = Curve(secret.to_bytes(32)).public_key
    peer = PeerId.from_public_key(public.format())
    assert PeerId(str(peer)) == peer
    assert peer.public_key == public.format()
    assert peer.address == address_of(public.format(compressed=False))


def test_a_peer_id_is_what_libp2p_calls_the_same_key() -> None:
    from libp2p.crypto.secp256k1 import Secp256k1PrivateKey
    from libp2p.peer.id import ID

    for name in ("worker", "client", "third"):
        theirs = ID.from_pubkey(Secp256k1PrivateKey.new(key(name).secret_bytes()).get_public_key())
        assert str(theirs) == key(name).peer_id


def test_an_address_is_what_ethereum_calls_the_same_key() -> None:
    from eth_account import Account

    assert Account.from_key(key("worker").secret_bytes()).address == str(key("worker").address)
    assert keccak256(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"


@pytest.mark.parametrize("size", [0, 1, 31, 32, 64, 134, 135, 136, 137, 271, 272, 273, 10_000])
def test_keccak_is_what_another_library_says(size: int) -> None:
    """Around the rate of 136 bytes, where padding goes wrong if it does."""
    from Crypto.Hash import keccak

    data = bytes(n % 251 for n in range(size))
    assert keccak256(data) == keccak.new(digest_bits=256, data=data).digest()


CID, PEER = str(ModelId.of_manifest(b"x")), str(key("worker").peer_id)
REFUSED: dict[str, Callable[[], Any]] = {
    "address of 19 bytes": lambda: Address(bytes(19)),
    "address of 41 characters": lambda: Address("0x" + "0" * 39),
    "address without 0x": lambda: Address("0" * 42),
    "address with spaces": lambda: Address("0x" + "0" * 38 + "  "),
    "address not hex": lambda: Address("0x" + "g" * 40),
    "hash of 31 bytes": lambda: Hash32(bytes(31)),
    "hash with spaces": lambda: Hash32("ab " * 32),
    "hash with a newline": lambda: Hash32("0x" + "ab" * 32 + "\n"),
    "hash with two prefixes": lambda: Hash32("0x0x" + "ab" * 31),
    "cid with spare bits": lambda: ModelId.from_cid(CID[:-1] + chr(ord(CID[-1]) + 1)),
    "cid with padding": lambda: ModelId.from_cid(CID + "======"),
    "cid in capitals": lambda: ModelId.from_cid(CID.upper()),
    "cid cut short": lambda: ModelId.from_cid(CID[:-2]),
    "cid of a folder (dag-pb)": lambda: ModelId.from_cid("bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"),
    "cid version 0": lambda: ModelId.from_cid("QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n"),
    "cid with a letter that folds to another": lambda: ModelId.from_cid(CID.replace("s", "\u017f").replace("i", "\u0131")),
    "no cid": lambda: ModelId.from_cid(""),
    "peer with a space": lambda: PeerId(PEER + " "),
    "peer with a newline": lambda: PeerId("\n" + PEER),
    "peer with an O": lambda: PeerId(PEER[:-1] + "O"),
    "peer of another key type": lambda: PeerId("12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"),
    "peer with a bad point": lambda: PeerId.from_public_key(b"\x02" + b"\xff" * 32),
    "peer of any length": lambda: PeerId("1" * 100_000),
    "price of a negative count": lambda: cost(Price(), -1, 0),
    "price of 2^32 tokens": lambda: cost(Price(), 0, TOKENS_MAX + 1),
}  # fmt: skip
REFUSED["peer off the curve"] = lambda: PeerId(
    base58.b58encode(bytes.fromhex("002508021221") + b"\x05" + b"\xff" * 32).decode()
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_value_cannot_be_made(name: str) -> None:
    with pytest.raises(InvalidValue):
        REFUSED[name]()


# ------------------------------------------------------------------------------------------------------------ costs

unit = st.integers(0, PRICE_MAX)
count = st.integers(0, TOKENS_MAX)
price = st.builds(Price, unit, unit, unit)


@given(price, count, count)
def test_a_cost_is_rounded_up_once_and_fits(p: Price, a: int, b: int) -> None:
    exact = p.input * a + p.output * b
    over = (cost(p, a, b) - p.request) * PER - exact
    assert 0 <= over < PER, "never below the exact price, never a whole unit above"
    assert cost(p, a, b) < 2**128


@given(price, count, count, count, count)
def test_a_cost_never_falls(p: Price, a: int, b: int, c: int, d: int) -> None:
    low, high = cost(p, min(a, c), min(b, d)), cost(p, max(a, c), max(b, d))
    assert low <= high


@given(price, st.integers(0, TOKENS_MAX // 4), st.lists(st.integers(0, TOKENS_MAX // 8), min_size=1, max_size=4))
def test_what_splitting_an_output_costs(p: Price, prompt: int, outputs: list[int]) -> None:
    """k parts that share one output, the prompt billed to each of them: never cheaper than the whole, and the difference is
    exactly bounded: k - 1 request prices, k - 1 prompts, and less than k smallest units of rounding."""
    k = len(outputs)
    whole, split = cost(p, prompt, sum(outputs)), sum(cost(p, prompt, n) for n in outputs)
    extra = (k - 1) * (p.request * PER + p.input * prompt)
    assert whole <= split
    assert -PER < (split - whole) * PER - extra < k * PER


@given(price, count, st.integers(0, 2**31), st.integers(0, 2**31 - 1))
def test_one_more_tick_costs_at_most_a_tick(p: Price, prompt: int, done: int, tick: int) -> None:
    """Why `Terms.tick` bounds what one side is ahead of the other."""
    assert cost(p, prompt, done + tick) - cost(p, prompt, done) <= cost(Price(output=p.output), 0, tick)


# --------------------------------------------------------------------------------------------------------- records


def test_the_journal_reads_only_what_it_writes() -> None:
    change = VoucherAdded(ChannelId(bytes(32)), 5, bytes(65))
    body = to_body(change)
    assert decode_body("voucher_added", encode_body(change)) == change
    spoiled: list[Any] = [
        {},
        None,
        b"",
        {**body, "extra": b""},
        {k: v for k, v in body.items() if k != "cumulative"},
        {**body, "cumulative": b"\x05"},
        {**body, "cumulative": 5},
        {**body, "channel_id": bytes(31)},
        {**body, "signature": "text"},
    ]
    for bad in spoiled:
        with pytest.raises(LocalProtocolError):
            decode_body("voucher_added", msgspec.msgpack.encode(bad))
    with pytest.raises(LocalProtocolError):
        decode_body("voucher_added", encode_body(change) + b"\0")
    with pytest.raises(LocalProtocolError):
        decode_body("voucher_added", b"\xc1")
    with pytest.raises(LocalProtocolError):
        decode_body("voucher_lowered", encode_body(change))
    for cumulative in (-1, 2**128):
        with pytest.raises(InvalidValue):
            to_body(VoucherAdded(ChannelId(bytes(32)), cumulative, b""))


def test_hashes_are_sha256_of_the_manifest() -> None:
    assert ModelId.of_manifest(b"m") == hashlib.sha256(b"m").digest()
