"""The watcher on real simulated chains: reorganisations, history, gaps and a node that goes away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import trio

from node.chain.client import EvmChain
from node.chain.eth import Eth
from node.chain.rpc import RpcError, RpcUnavailable
from node.chain.tx_policy import DEVNET_POLICY
from node.chain.watcher import Watcher
from node.errors import ReorgTooDeep
from node.ports import ChainEvent
from node.signer.bare import Bare
from node.testing.devnet.anvil import find_anvil
from node.testing.devnet.devnet import Devnet, devnet
from protocol.keys import PrivateKey

KEY = PrivateKey(b"\x21" * 32)
KINDS = [
    pytest.param("anvil", marks=pytest.mark.skipif(find_anvil() is None, reason="anvil is not on this machine")),
    pytest.param("embedded", marks=pytest.mark.skipif(find_spec("eth") is None, reason="py-evm is not installed")),
]
BEST = KINDS[:1] if find_anvil() is not None else KINDS[1:]
"""Where the kind of chain makes no difference one is enough."""


@dataclass
class World:
    net: Devnet
    chain: EvmChain

    async def deposit(self, amount: int) -> None:
        for result in await self.chain.deposit(self.chain.token, amount):
            assert result.ok

    def watch(self, start: int, **options: Any) -> Watcher:
        inner = self.chain.watcher()
        return Watcher(self.net.eth, inner._contracts, start=start, **{"poll": 0.01, **options})


def run(kind: str, main: Callable[[World], Awaitable[None]]) -> None:
    async def timed() -> None:
        with trio.fail_after(100):
            async with devnet(kind) as net:  # type: ignore[arg-type]
                deployment = await net.deploy()
                await net.faucet(KEY.address, tokens=10_000)
                chain = await EvmChain.connect([net.url], deployment, Bare(KEY), policy=DEVNET_POLICY, poll=0.01)
                try:
                    await main(World(net, chain))
                finally:
                    await chain.aclose()

    trio.run(timed)


async def drain(watcher: Watcher) -> list[ChainEvent]:
    """Everything until the chain stands still."""
    while await watcher.advance():
        pass
    found = []
    while watcher._ready:
        found.append(await watcher.__anext__())
    return found


def amounts(events: list[ChainEvent]) -> list[tuple[int, bool]]:
    return [(event.args["amount"], event.removed) for event in events if event.name == "Deposited"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reorganisation_undoes_what_left_the_chain(kind: str) -> None:
    async def main(w: World) -> None:
        watcher = w.watch((await w.chain.head()).number + 1)
        await w.deposit(1)
        snapshot = await w.net.snapshot()
        await w.deposit(2)
        await w.deposit(3)
        assert amounts(await drain(watcher)) == [(1, False), (2, False), (3, False)]
        await w.net.revert(snapshot)
        assert amounts(await drain(watcher)) == [(3, True), (2, True)]
        await w.deposit(4)  # what was thrown out is sent again before it
        assert amounts(await drain(watcher)) == [(2, False), (3, False), (4, False)]
        fresh = w.watch(watcher.cursor)
        assert amounts(await drain(fresh)) == [(1, False), (2, False), (3, False), (4, False)]

    run(kind, main)


@pytest.mark.skipif(find_anvil() is None, reason="anvil is not on this machine")
def test_anvil_reorg_without_removed_logs() -> None:
    async def main(w: World) -> None:
        watcher = w.watch((await w.chain.head()).number + 1)
        await w.deposit(5)
        assert amounts(await drain(watcher)) == [(5, False)]
        before = watcher.head
        await w.net.rpc.submit("anvil_reorg", 2, [])  # both blocks of the deposit, replaced by empty ones
        after = await w.net.eth.header("latest")
        assert before is not None and after is not None
        assert after.number == before.number and after.hash != before.hash
        assert amounts(await drain(watcher)) == [(5, True)]

    run("anvil", main)


@pytest.mark.parametrize("kind", BEST)
def test_history_gaps_and_walks_give_the_same_events(kind: str) -> None:
    async def main(w: World) -> None:
        start = (await w.chain.head()).number + 1
        live = w.watch(start)
        seen: list[ChainEvent] = []
        for n in range(1, 8):
            await w.deposit(n)
            await w.net.mine(3)
            seen += await drain(live)
        late = w.watch(start, keep=4)  # history by ranges, then headers
        assert await drain(late) == seen
        await w.deposit(8)
        await w.net.mine(20)  # wider than twice what it keeps: ranges again
        await w.deposit(9)
        assert amounts(await drain(late)) == [(8, False), (9, False)]
        assert amounts(await drain(live)) == [(8, False), (9, False)]
        patient = w.watch((await w.chain.head()).number + 1, keep=4, confirmations=3)
        await w.deposit(10)
        assert await drain(patient) == []
        await w.net.mine(20)
        assert amounts(await drain(patient)) == [(10, False)]

    run(kind, main)


@pytest.mark.parametrize("kind", BEST)
def test_history_is_told_range_by_range_and_only_when_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.chain.watcher.RANGE", 8)
    asked: list[tuple[int, int]] = []

    class Counting(Eth):
        async def logs_between(self, addresses: Any, first: int, last: int) -> Any:
            if last - first >= 4:
                raise RpcError("eth_getLogs", -32005, "query returns more than 4 blocks", None)
            asked.append((first, last))
            assert list(addresses) == list(w_contracts)
            return await super().logs_between(addresses, first, last)

    w_contracts: dict[Any, Any] = {}

    async def main(w: World) -> None:
        w_contracts.update(w.chain.watcher()._contracts)
        start = (await w.chain.head()).number + 1
        for n in range(1, 9):
            await w.deposit(n)  # two blocks each
        watcher = Watcher(Counting(w.net.rpc), w_contracts, start=start, poll=0.01, keep=4)
        assert amounts([await watcher.__anext__()]) == [(1, False)]
        assert asked == [(start, start + 3)]  # the rest is not read before this is taken
        found = [await watcher.__anext__() for _ in range(7)]
        assert amounts(found) == [(n, False) for n in range(2, 9)]
        assert asked == [(start + at, start + at + 3) for at in (0, 4, 8)]
        recent = Watcher(Counting(w.net.rpc), w_contracts, start=None, poll=0.01, keep=4)
        assert amounts(await drain(recent)) == [(7, False), (8, False)]  # the last four blocks
        assert len(asked) == 3

    run(kind, main)


@pytest.mark.parametrize("kind", BEST)
def test_confirmations_hold_events_back(kind: str) -> None:
    async def main(w: World) -> None:
        watcher = w.watch((await w.chain.head()).number + 1, confirmations=2)
        await w.deposit(1)
        snapshot = await w.net.snapshot()
        await w.net.mine()
        assert await drain(watcher) == []
        await w.net.revert(snapshot)
        await w.net.mine(2)
        assert amounts(await drain(watcher)) == [(1, False)]

    run(kind, main)


@pytest.mark.parametrize("kind", BEST)
def test_deeper_than_we_remember_is_an_error(kind: str) -> None:
    async def main(w: World) -> None:
        watcher = w.watch((await w.chain.head()).number + 1, keep=4)
        snapshot = await w.net.snapshot()
        for _ in range(3):
            await w.deposit(1)
        await drain(watcher)
        await w.net.revert(snapshot)
        await w.net.mine(7)
        with pytest.raises(ReorgTooDeep):
            await drain(watcher)

    run(kind, main)


class Flaky:
    """A node that is away for the next `down` calls."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.down = 0

    async def call(self, method: str, *params: Any) -> Any:
        if self.down:
            self.down -= 1
            raise RpcUnavailable("away")
        return await self._inner.call(method, *params)

    submit = call


@pytest.mark.skipif(find_anvil() is None, reason="anvil is not on this machine")
def test_a_node_that_goes_away_loses_no_event_wherever_it_breaks() -> None:
    async def main(w: World) -> None:
        flaky = Flaky(w.net.rpc)
        start = (await w.chain.head()).number + 1
        contracts = w.chain.watcher()._contracts
        watcher = Watcher(Eth(flaky), contracts, start=start, poll=0.001)
        total = 0
        for lost in range(8):  # each number of calls breaks it at another place
            await w.deposit(lost + 1)
            flaky.down = lost
            found = [await watcher.__anext__()]
            flaky.down = lost
            assert amounts(found) == [(lost + 1, False)]
            total += 1
        assert amounts(await drain(w.watch(start))) == [(n, False) for n in range(1, total + 1)]

    run("anvil", main)
