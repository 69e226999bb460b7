"""How amounts are written for people, and that what a token says of itself is never believed further than that."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from eth_abi.abi import encode
from hypothesis import given
from hypothesis import strategies as st

from node.chain.artifacts import contract
from node.chain.client import EvmChain
from node.chain.deployment import Deployment
from node.chain.endpoints import Endpoints
from node.chain.rpc import RpcUnavailable
from node.ports import TokenInfo
from protocol.ids import ZERO_ADDRESS, Address

TOKEN = Address(b"\x07" * 20)


@pytest.mark.parametrize(
    ("amount", "decimals", "text"),
    [
        (5_250_000, 6, "5.25 tUSD"),
        (5_000_000, 6, "5 tUSD"),
        (1, 6, "0.000001 tUSD"),
        (0, 6, "0 tUSD"),
        (-1_500_000, 6, "-1.5 tUSD"),
        (42, 0, "42 tUSD"),
        (10**18 + 1, 18, "1.000000000000000001 tUSD"),
    ],
)
def test_amounts_are_exact(amount: int, decimals: int, text: str) -> None:
    assert TokenInfo(TOKEN, "tUSD", decimals).show(amount) == text


@given(st.integers(0, 2**128 - 1), st.integers(0, 36))
def test_nothing_is_lost_in_writing(amount: int, decimals: int) -> None:
    whole, _, part = TokenInfo(TOKEN, "x", decimals).show(amount).removesuffix(" x").partition(".")
    assert int(whole) * 10**decimals + int(part.ljust(decimals, "0") or "0") == amount


class _OddToken:
    """An RPC whose token answers what it likes."""

    name = "odd"

    def __init__(self, symbol: object, decimals: object) -> None:
        self.answers = {"symbol": symbol, "decimals": decimals}

    async def call(self, method: str, *params: Any) -> str:
        data = bytes.fromhex(params[0]["data"][2:])
        names = {contract("TestToken").functions[name].selector: name for name in self.answers}
        answer = self.answers[names[data[:4]]]
        if isinstance(answer, Exception):
            raise answer
        return "0x" + (answer if isinstance(answer, bytes) else b"").hex()


def odd(symbol: object, decimals: object) -> EvmChain:
    deployment = Deployment(1, *(Address(bytes([n]) * 20) for n in (1, 2, 3)), TOKEN, 0)  # type: ignore[arg-type]
    nodes = Endpoints([_OddToken(symbol, decimals)])  # type: ignore[list-item]
    return EvmChain(nodes, deployment, None, poll=1, confirmations=0)  # type: ignore[arg-type]


ANSWERS = [
    (encode(["string"], ["tUSD"]), encode(["uint8"], [6]), ("tUSD", 6)),
    (encode(["string"], ["\x1b[2Jpwned"]), encode(["uint8"], [6]), ("token", 6)),
    (encode(["string"], ["x" * 17]), encode(["uint8"], [37]), ("token", 0)),
    (encode(["string"], [""]), encode(["uint256"], [2**200]), ("token", 0)),
    (b"", b"", ("token", 0)),
    (b"\xff" * 64, b"\xff" * 32, ("token", 0)),
]


@pytest.mark.parametrize(("symbol", "decimals", "shown"), ANSWERS)
def test_what_a_token_says_is_bounded(symbol: bytes, decimals: bytes, shown: tuple[str, int]) -> None:
    info = trio.run(odd(symbol, decimals).token_info, TOKEN)
    assert (info.symbol, info.decimals) == shown


def test_the_native_coin_has_eighteen_decimals() -> None:
    assert trio.run(odd(b"", b"").token_info, ZERO_ADDRESS) == TokenInfo(ZERO_ADDRESS, "coin", 18)


def test_a_dead_node_is_not_taken_for_an_odd_token() -> None:
    with pytest.raises(RpcUnavailable):
        trio.run(odd(RpcUnavailable("gone"), b"").token_info, TOKEN)
