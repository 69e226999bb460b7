"""A real worker on a real simulated chain that it sees through three servers, and what they may do to it (N1 to N7).

The servers are honest ones behind `node.testing.lying_rpc`, over HTTP. Times are scaled: an outage of 3 s stands for 5 minutes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import trio

from node.chain.client import EvmChain
from node.chain.endpoints import Rules
from node.chain.rpc import JsonRpc
from node.chain.tx_policy import TxPolicy
from node.client.client import Client
from node.errors import Refused
from node.ports import ChainEvent, ChannelOnChain
from node.signer.bare import Bare
from node.testing.devnet.anvil import find_anvil
from node.testing.devnet.devnet import Devnet, devnet
from node.testing.lying_rpc import Faults, LyingRpc, served
from node.testing.market import Market, key, open_market
from node.worker.worker import Worker
from protocol.channel import ChannelState
from protocol.errors import RefusalReason
from protocol.ids import keccak256

HELLO = [{"role": "user", "content": "hello there"}]
KINDS = [
    pytest.param("anvil", marks=pytest.mark.skipif(find_anvil() is None, reason="anvil is not on this machine")),
    pytest.param("embedded", marks=pytest.mark.skipif(find_spec("eth") is None, reason="py-evm is not installed")),
]
BEST = KINDS[:1] if find_anvil() is not None else KINDS[1:]
REORGS = pytest.mark.skipif(find_anvil() is None, reason="anvil is not on this machine")
HEAD_AGE_S = 3
POLICY = TxPolicy(poll=0.02, bump_after=1.0, give_up_after=15.0)


@dataclass
class World:
    net: Devnet
    market: Market
    liars: list[LyingRpc]
    worker: Worker
    client: Client

    def heal(self) -> None:
        for liar in self.liars:
            liar.faults = Faults()

    @property
    def channel(self) -> ChannelState:
        (state,) = self.worker.book.channels.values()
        return state

    async def greet(self) -> None:
        self.client.history.clear()
        async with self.client.chat("fake", HELLO) as stream:
            await stream.text()
        await until(lambda: not self.worker.server.busy)

    async def truth(self) -> ChannelOnChain:
        return await self.client.wallet.chain.channel(self.channel.channel_id)

    async def logs(self, name: str) -> list[ChainEvent]:
        """The events of that name on the chain as it is now."""
        chain = self.client.wallet.chain
        assert isinstance(chain, EvmChain)
        watcher = chain.watcher(0)
        while await watcher.advance():
            pass
        found = []
        while watcher._ready:
            event = watcher._ready.popleft()
            found += [event] if event.name == name else []
        return found


async def until(true: Callable[[], Any], within_s: float = 20) -> None:
    with trio.fail_after(within_s):
        while not true():
            await trio.sleep(0.01)


def run(kind: str, main: Callable[[World], Awaitable[None]], *, head_age_s: int = 0) -> None:
    """`head_age_s`: how old the newest block may be. The chain's time is then the market's, and blocks come twice a second."""

    async def timed() -> None:
        with trio.fail_after(300):
            async with AsyncExitStack() as stack:
                net = await stack.enter_async_context(devnet(kind))  # type: ignore[arg-type]
                deployment = await net.deploy()
                await net.faucet(key("w").address)
                await net.faucet(key("c payer").address, tokens=50_000_000)
                liars = [LyingRpc(JsonRpc(net.url, chain_id=net.chain_id), f"node {n}") for n in range(3)]
                urls = [await stack.enter_async_context(served(liar)) for liar in liars]
                market = await stack.enter_async_context(open_market())
                market.further["devnet"] = deployment  # type: ignore[assignment]
                chain = await EvmChain.connect(
                    urls,
                    deployment,
                    Bare(key("w")),
                    policy=POLICY,
                    poll=0.02,
                    timeout=1.0,
                    rules=Rules(aside_s=0.3, hedge_s=0.2),
                )
                stack.push_async_callback(chain.aclose)
                paying = await EvmChain.connect([net.url], deployment, Bare(key("c payer")), policy=POLICY, poll=0.02)
                stack.push_async_callback(paying.aclose)
                settings = market.settings(
                    market.accepted(ledger=deployment),  # type: ignore[arg-type]
                    chain_age_limit_ms=1_500,
                    ack_ms=200,
                )
                settings = replace(settings, chain_poll_ms=50, reread_ms=500)
                if head_age_s:
                    settings = replace(settings, head_ages_s={deployment.domain: head_age_s})
                    await net.advance(max(0, market.now_ms() // 1000 - (await chain.head()).timestamp))
                    market.nursery.start_soon(mine_for_ever, net)
                worker = await market.worker(settings=settings, name="w", on=chain)
                means = [market.means(ledger=deployment, allocation=10_000_000)]  # type: ignore[arg-type]
                client = await market.client(name="c", deposit=20_000_000, means=means, on=paying)
                await main(World(net, market, liars, worker, client))
                assert market.failures == {}
                market.nursery.cancel_scope.cancel()

    trio.run(timed)


async def mine_for_ever(net: Devnet) -> None:
    while True:
        await net.mine()
        await trio.sleep(0.5)


LOG = {
    "address": None,
    "topics": ["0x" + keccak256(b"WithdrawInitiated(bytes32,address,uint40)").hex()],
    "data": "0x",
}
FAULTS: dict[str, dict[str, Any]] = {
    "refused": {"refuse": True},
    "hung": {"hang": True},
    "503": {"status": 503},
    "garbage": {"garbage": b"SSH-2.0-OpenSSH"},
    "huge": {"huge": 17 << 20},
    "an error to everything": {"error": -32603},
    "slow": {"slow_s": 0.7},
    "wrong chain": {"chain_id": 1, "status": 0},
    "stale head": {"frozen": 1},
    "invented head": {"ahead": 500},
    "another branch": {"forked_from": 5},
    "missing logs": {"drop_logs": True},
    "invented logs": {"invented_logs": (LOG,)},
    "forgets transactions": {"forget_transactions": True},
    "sits on transactions": {"sit_on_transactions": True},
    "refuses transactions": {"refuse_transactions": "nonce too low"},
    "invented receipts": {"invented_receipts": True},
    "hidden receipts": {"no_receipts": True},
    "a nonce too high": {"nonce_offset": 7},
    "a nonce too low": {"nonce_offset": -1},
    "reverts": {"revert": b"\x01\x02\x03\x04"},
}


@pytest.mark.parametrize("kind", BEST)
def test_one_lying_server_of_three_changes_nothing(kind: str) -> None:
    """N3: whatever it does, jobs are served, claims land once, and no transaction is sent twice."""

    async def main(w: World) -> None:
        address = w.worker.key.address
        await w.greet()
        log = {**LOG, "address": str(w.worker.chain.domain.verifying_contract)}
        log["topics"] = [*LOG["topics"], "0x" + bytes(w.channel.channel_id).hex(), "0x" + bytes(32).hex()]
        log["data"] = "0x" + (1).to_bytes(32).hex()
        invented = ChannelOnChain(10**15, 10**14, 0, False)
        for n, (name, fault) in enumerate([*FAULTS.items(), ("an invented channel", {"channels": {}})]):
            liar = w.liars[n % 2]  # of the two that are asked first
            if name == "invented logs":
                fault = {"invented_logs": (log,)}
            if name == "an invented channel":
                fault = {"channels": {w.channel.channel_id: invented}}
            liar.set(**fault)
            before = await w.net.eth.nonce(address)
            await w.greet()
            assert w.channel.allocated == (await w.truth()).allocated and not w.channel.withdraw_at, name
            with trio.fail_after(12):
                await w.worker.claim()
            assert (await w.truth()).claimed == w.channel.claimed == w.channel.spent, name
            assert await w.net.eth.nonce(address) == before + 2, f"{name}: one claim and one settlement"
            w.heal()
            await trio.sleep(0.4)
        claims = [event.args["claimed"] for event in await w.logs("Claimed")]
        assert claims == sorted(set(claims)) and await w.logs("ClaimSkipped") == []
        assert len(claims) == len(FAULTS) + 1

    run(kind, main)


@pytest.mark.parametrize("kind", BEST)
@pytest.mark.parametrize("fault", ["refused", "hung", "503", "stale head", "another branch"])
def test_without_a_quorum_new_work_ends_with_the_float_and_comes_back_by_itself(kind: str, fault: str) -> None:
    """N3, N6: two of three are away for 5 minutes (scaled); the third one says what it likes."""

    async def main(w: World) -> None:
        await w.greet()
        state = w.channel
        invented = ChannelOnChain(10**15, 10**14, 0, False)
        w.liars[2].set(channels={state.channel_id: invented})
        if fault == "stale head":
            for liar in w.liars[:2]:
                await liar.freeze()
            await w.net.mine(20)  # the honest third is alone with what is new
        else:
            for liar in w.liars[:2]:
                liar.set(**FAULTS[fault])
        if fault == "another branch":
            w.liars[1].set(forked_from=None, status=503)  # one is on another branch, one is away
        began = trio.current_time()
        refused = served_after = 0
        # A head that stands still is one that is too old a while later.
        older_s = HEAD_AGE_S + 1 if fault == "stale head" else 0
        while trio.current_time() - began < 3.0 + older_s:
            try:
                await w.greet()
                served_after = trio.current_time() - began
            except Refused as no:
                assert no.reason is RefusalReason.CHAIN_STALE
                refused += 1
            await trio.sleep(0.2)
        # Two that stand still agree, so they are a quorum: it is by the age of their head that they are seen through.
        assert refused and served_after < 2.5 + older_s, "nothing is taken beyond the float"
        assert w.channel.allocated == state.allocated and w.channel.claimed == state.claimed
        w.heal()
        await until(lambda: w.worker.sight_age_ms(w.channel) < 1_000)
        await w.greet()
        await w.worker.claim()
        assert (await w.truth()).claimed == w.channel.spent

    run(kind, main, head_age_s=HEAD_AGE_S if fault == "stale head" else 0)


@REORGS
def test_a_reorg_of_3_after_a_claim_ends_in_one_claim() -> None:
    async def main(w: World) -> None:
        await w.greet()
        await w.net.mine(3)
        report = await w.worker.claim()
        assert [one.purpose for one in report.transactions] == ["claim", "settle"]
        await w.net.mine()
        assert (await w.truth()).claimed == w.channel.spent
        await w.net.rpc.submit("anvil_reorg", 3, [])
        assert (await w.truth()).claimed == 0
        await until(lambda: w.channel.claimed == 0)  # the worker has seen it
        await w.greet()  # and goes on serving: what is locked is still locked
        sent = sum(len(liar.submitted) for liar in w.liars)
        async with trio.open_nursery() as nursery:  # the operator is impatient
            nursery.start_soon(w.worker.claim)
            nursery.start_soon(w.worker.claim)
        assert (await w.truth()).claimed == w.channel.spent == w.channel.claimed
        claims = [event.args["claimed"] for event in await w.logs("Claimed")]
        # What was thrown out is sent again as it was; what was earned since is one more claim.
        assert claims == sorted(set(claims)) and len(claims) == 2 and await w.logs("ClaimSkipped") == []
        assert len({raw for liar in w.liars for raw in liar.submitted}) - sent / 3 <= 2, (
            "claim and settlement of what is new"
        )
        assert sum(event.args["amount"] for event in await w.logs("Settled")) == w.channel.spent

    run("anvil", main)


@REORGS
def test_a_reorg_of_12_after_an_allocation_brings_the_same_transaction_again() -> None:
    async def main(w: World) -> None:
        await w.net.mine(2)
        await w.greet()
        state = w.channel
        (raw,) = {raw for liar in w.liars for raw in liar.submitted}
        await w.net.mine(11)
        for liar in w.liars:
            liar.set(status=503)  # the reorganisation is not seen yet
        await w.net.rpc.submit("anvil_reorg", 12, [])
        assert (await w.truth()).allocated == 0
        w.heal()
        with trio.fail_after(20):
            while (await w.truth()).allocated != state.allocated:
                await trio.sleep(0.02)
        await until(lambda: w.worker.sight_age_ms(w.channel) < 1_000 and w.channel.allocated == state.allocated)
        await w.greet()
        assert len(await w.logs("Allocated")) == 1
        assert {raw for liar in w.liars for raw in liar.submitted} == {raw}, "not one transaction more was signed"

    run("anvil", main)
