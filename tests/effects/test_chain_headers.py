"""Headers rebuilt from JSON-RPC: every field counts, and a node can not make one up."""

from __future__ import annotations

from typing import Any

import pytest

from node.chain.headers import header_rlp
from node.errors import ChainError
from protocol.ids import keccak256
from protocol.transactions import rlp

WORDS = {name: bytes((n,)) * 32 for n, name in enumerate(("parent", "uncles", "state", "txs", "receipts", "mix"), 1)}


def block(*later: tuple[str, bytes | int]) -> tuple[dict[str, Any], bytes]:
    """(what a node answers, the header that it is of), with these fields of later forks."""
    fields: list[tuple[str, bytes | int]] = [
        ("parentHash", WORDS["parent"]),
        ("sha3Uncles", WORDS["uncles"]),
        ("miner", b"\x0a" * 20),
        ("stateRoot", WORDS["state"]),
        ("transactionsRoot", WORDS["txs"]),
        ("receiptsRoot", WORDS["receipts"]),
        ("logsBloom", b"\x0b" * 256),
        ("difficulty", 0),
        ("number", 17_000_000),
        ("gasLimit", 30_000_000),
        ("gasUsed", 0x80),
        ("timestamp", 1_800_000_000),
        ("extraData", b"\x7f"),
        ("mixHash", WORDS["mix"]),
        ("nonce", bytes(8)),
        *later,
    ]
    header = rlp([value for _, value in fields])
    found: dict[str, Any] = {name: hex(v) if isinstance(v, int) else "0x" + v.hex() for name, v in fields}
    return {**found, "hash": "0x" + keccak256(header).hex(), "transactions": [], "size": "0x1"}, header


LATER: tuple[tuple[str, bytes | int], ...] = (
    ("baseFeePerGas", 7),
    ("withdrawalsRoot", b"\x11" * 32),
    ("blobGasUsed", 0),
    ("excessBlobGas", 131_072),
    ("parentBeaconBlockRoot", b"\x12" * 32),
    ("requestsHash", b"\x13" * 32),
    ("blockAccessListHash", b"\x14" * 32),
)


@pytest.mark.parametrize("forks", range(len(LATER) + 1))
def test_a_header_of_every_fork_is_rebuilt(forks: int) -> None:
    found, header = block(*LATER[:forks])
    assert header_rlp(found) == header
    assert header_rlp({**found, **{name: None for name, _ in LATER[forks:]}}) == header


def test_every_field_counts() -> None:
    found, _ = block(*LATER)
    for name, value in found.items():
        if name in ("transactions", "size"):
            continue
        digit = "1" if value[-1] != "1" else "2"
        with pytest.raises(ChainError):
            header_rlp({**found, name: value[:-1] + digit})
        for bad in (None, "", "0x", 7, [], "0xzz", value + "00" * 2000):
            with pytest.raises(ChainError):
                header_rlp({**found, name: bad})
        with pytest.raises(ChainError):
            header_rlp({key: kept for key, kept in found.items() if key != name})


def test_a_field_of_a_fork_that_is_not_known_is_said_and_not_guessed() -> None:
    found, _ = block(*LATER, ("fieldOfTomorrow", b"\x15" * 32))
    with pytest.raises(ChainError, match="do not give the block's hash"):
        header_rlp(found)


@pytest.mark.parametrize("answer", [None, [], "0x", 7])
def test_no_block_is_no_header(answer: object) -> None:
    with pytest.raises(ChainError):
        header_rlp(answer)
