"""One simulated chain for the length of a block: anvil where it is found, else the embedded chain.

    async with devnet() as net:
        deployment = await net.deploy()
        await net.faucet(account, native=10**18, tokens=5_000_000)

Both kinds are simulations on this machine: no consensus, no persistence, public keys, coins without value.
`Devnet.describe()` says which one runs; whoever shows results from it must say so too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from node.chain.artifacts import contract, error_name
from node.chain.deploy import deploy
from node.chain.deployment import Deployment
from node.chain.eth import Eth
from node.chain.rpc import JsonRpc
from node.chain.tx_policy import DEVNET_POLICY
from node.chain.txs import TxSender
from node.errors import ChainError
from node.ports import TxResult
from node.signer.bare import Bare
from node.testing.devnet.anvil import CHAIN_ID as ANVIL_CHAIN_ID
from node.testing.devnet.anvil import anvil_command, find_anvil, port_of
from node.testing.devnet.keys import FUNDED_KEYS
from node.testing.devnet.processes import announced
from protocol.ids import Address
from protocol.keys import PrivateKey

Kind = Literal["anvil", "embedded"]


@dataclass
class Devnet:
    """A running simulated chain and the means to change it from outside."""

    kind: Kind
    url: str
    chain_id: int
    pid: int
    rpc: JsonRpc = field(repr=False)
    deployment: Deployment | None = None
    funded_keys: Sequence[PrivateKey] = FUNDED_KEYS
    """Keys with native coins; the first one deploys and feeds the faucet."""

    def __post_init__(self) -> None:
        self.eth = Eth(self.rpc)
        self.funder = TxSender(
            self.eth, Bare(self.funded_keys[0]), self.chain_id, error_name=error_name, policy=DEVNET_POLICY
        )

    def describe(self) -> str:
        engine = "anvil" if self.kind == "anvil" else "embedded py-evm"
        return f"simulated local chain ({engine}, chain id {self.chain_id}, coins without value)"

    async def deploy(self) -> Deployment:
        """Our contracts with play money as the default token; once per chain."""
        if self.deployment is None:
            self.deployment, _ = await deploy(self.funder, self.chain_id, test_token=True)
        return self.deployment

    async def faucet(self, address: Address, native: int = 10**18, tokens: int = 0) -> list[TxResult]:
        """Send `native` wei and mint `tokens` (smallest unit of play money) to `address`."""
        results = []
        if native:
            results.append(await self.funder.send("faucet", address, b"", native))
        if tokens:
            token = (await self.deploy()).token
            data = contract("TestToken").encode("mint", address, tokens)
            results.append(await self.funder.send("faucet", token, data))
        for result in results:
            if not result.ok:
                raise ChainError(f"the faucet failed: {result.error}")
        return results

    async def mine(self, blocks: int = 1) -> None:
        for _ in range(blocks):
            await self.rpc.submit("evm_mine")

    async def advance(self, seconds: int) -> None:
        """Move chain time forward and mine one block with the new time."""
        await self.rpc.submit("evm_increaseTime", hex(seconds))
        await self.rpc.submit("evm_mine")

    async def snapshot(self) -> str:
        found: Any = await self.rpc.submit("evm_snapshot")
        return str(found)

    async def revert(self, snapshot: str) -> None:
        """Forget every block since `snapshot`: what is mined next is another branch."""
        if await self.rpc.submit("evm_revert", snapshot) is not True:
            raise ChainError("the chain refused to go back to the snapshot")


def available() -> tuple[Kind, ...]:
    """The kinds that this machine can run, best first."""
    kinds: list[Kind] = ["anvil"] if find_anvil() is not None else []
    return (*kinds, "embedded") if find_spec("eth") is not None else tuple(kinds)


@asynccontextmanager
async def devnet(
    kind: Literal["auto", "anvil", "embedded"] = "auto", port: int = 0, chain_id: int | None = None
) -> AsyncIterator[Devnet]:
    """Run a simulated chain. ``auto`` takes anvil when there is one; each kind has a chain id of its own unless one is given.

    Raises `ChainError` with a hint when there is none.
    """
    hint = "run `npm ci --ignore-scripts` in contracts/, set GRISTMILL_ANVIL, or pip install 'gristmill[devnet]'"
    kinds = available()
    if not kinds or (kind != "auto" and kind not in kinds):
        raise ChainError(f"no {'simulated chain' if kind == 'auto' else kind} on this machine", hint=hint)
    chosen: Kind = kinds[0] if kind == "auto" else kind
    if chosen == "anvil":
        binary = find_anvil()
        if binary is None:
            raise ChainError("anvil has gone", hint=hint)
        async with (
            announced(anvil_command(binary, port, chain_id or ANVIL_CHAIN_ID), port_of, name="anvil") as (found, pid),
            _connected("anvil", f"http://127.0.0.1:{found}", chain_id or ANVIL_CHAIN_ID, pid) as net,
        ):
            yield net
    else:
        command = [sys.executable, "-m", "node.testing.devnet.embedded", "--port", str(port)]
        command += ["--chain-id", str(chain_id)] if chain_id else []
        async with (
            announced(command, _ready, name="the embedded chain") as (ready, pid),
            _connected("embedded", ready["url"], ready["chain_id"], pid) as net,
        ):
            yield net


@asynccontextmanager
async def _connected(kind: Kind, url: str, chain_id: int, pid: int) -> AsyncIterator[Devnet]:
    rpc = JsonRpc(url, chain_id=chain_id)
    try:
        yield Devnet(kind, url, chain_id, pid, rpc)
    finally:
        await rpc.aclose()


def _ready(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "url" in found else None
