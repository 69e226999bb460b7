"""Several nodes compared (N1 to N3): dead, slow, stale, forked, of another chain, and lying. Time is trio's mock clock."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from node.chain import endpoints as module
from node.chain import jobs, reading
from node.chain.agreed import AgreedEth
from node.chain.artifacts import contract
from node.chain.client import EvmChain
from node.chain.deployment import Deployment
from node.chain.endpoints import Endpoints, NoQuorum, Rules, majority
from node.chain.eth import Eth
from node.chain.rpc import Reverted, RpcError, RpcUnavailable, WrongChain
from node.chain.values import hex_data, hex_quantity
from node.errors import ChainError
from node.ports import ChannelOnChain, JobOnChain
from node.testing.lying_rpc import LyingRpc, served
from protocol.escrow import JobState
from protocol.ids import Address, ChannelId, Hash32, keccak256
from protocol.typed_data import Quote

CHANNELS = Address(b"\x0c" * 20)
CHANNEL = ChannelId(b"\x05" * 32)
ACCOUNT = Address(b"\x0a" * 20)
TX = keccak256(b"a transaction")
ASK = contract("Channels").encode("channel", CHANNEL)


class Honest:
    """A chain of blocks, and what the channel was at each of them."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = [keccak256(b"genesis")]
        self.channel: list[ChannelOnChain] = [ChannelOnChain(0, 0, 0, False)]
        self.nonce = 0
        self.mined: dict[bytes, int] = {}
        self.pool: set[bytes] = set()
        self.gas = 50_000

    def mine(self, channel: ChannelOnChain | None = None, tag: bytes = b"") -> None:
        self.blocks.append(keccak256(self.blocks[-1] + tag))
        self.channel.append(channel or self.channel[-1])

    def header(self, number: int) -> dict[str, str] | None:
        if not 0 <= number < len(self.blocks):
            return None
        return {
            "number": hex_quantity(number),
            "hash": hex_data(self.blocks[number]),
            "parentHash": hex_data(self.blocks[number - 1] if number else bytes(32)),
            "timestamp": hex_quantity(1_000 + number),
            "baseFeePerGas": hex_quantity(10**9),
        }

    def number(self, block: Any) -> int:
        if isinstance(block, dict):
            found = bytes.fromhex(block["blockHash"][2:])
            if found not in self.blocks:
                raise RpcError("eth_call", -32000, "header not found", None)
            return self.blocks.index(found)
        return len(self.blocks) - 1 if block in ("latest", "pending") else int(block, 16)

    async def call(self, method: str, *params: Any) -> Any:
        await trio.lowlevel.checkpoint()
        match method:
            case "eth_chainId":
                return "0x7a69"
            case "eth_blockNumber":
                return hex_quantity(len(self.blocks) - 1)
            case "eth_getBlockByNumber":
                return self.header(self.number(params[0]))
            case "eth_getBlockByHash":
                raw = bytes.fromhex(params[0][2:])
                return self.header(self.blocks.index(raw)) if raw in self.blocks else None
            case "eth_call":
                seen = self.channel[self.number(params[1])]
                words = (seen.allocated, seen.claimed, seen.withdraw_at, int(seen.closed))
                return hex_data(b"".join(word.to_bytes(32) for word in words))
            case "eth_getTransactionCount":
                return hex_quantity(self.nonce)
            case "eth_getTransactionReceipt":
                raw = bytes.fromhex(params[0][2:])
                if raw not in self.mined:
                    return None
                at = self.mined[raw]
                block = {"blockNumber": hex_quantity(at), "blockHash": hex_data(self.blocks[at])}
                return {"transactionHash": params[0], "gasUsed": "0x5208", "status": "0x1", **block}
            case "eth_getTransactionByHash":
                return {} if bytes.fromhex(params[0][2:]) in self.pool else None
            case "eth_estimateGas":
                return hex_quantity(self.gas)
            case "eth_sendRawTransaction":
                self.pool.add(keccak256(bytes.fromhex(params[0][2:])))
                return hex_data(keccak256(bytes.fromhex(params[0][2:])))
            case "eth_getLogs":
                return []
        raise AssertionError(method)

    submit = call


class World:
    """One honest chain, seen through `count` nodes, the first of which are the ones to spoil."""

    def __init__(self, count: int, **rules: Any) -> None:
        self.chain = Honest()
        for _ in range(20):
            self.chain.mine()
        self.liars = [LyingRpc(self.chain, f"node {n}") for n in range(count)]
        self.nodes = Endpoints(self.liars, Rules(**rules))
        self.eth = AgreedEth(self.nodes)

    async def channel(self) -> ChannelOnChain:
        data = await self.eth.eth_call(CHANNELS, ASK)
        return ChannelOnChain(*contract("Channels").decode("channel", data)[0])


def run(main: Callable[[World], Awaitable[None]], count: int = 3, **rules: Any) -> None:
    async def timed() -> None:
        with trio.fail_after(3600):
            await main(World(count, **rules))

    trio.run(timed, clock=trio.testing.MockClock(autojump_threshold=0))


LOCKED = ChannelOnChain(1_000, 0, 0, False)
INVENTED = ChannelOnChain(10**9, 0, 0, False)

SILENT = [{"refuse": True}, {"hang": True}, {"status": 503}, {"garbage": b"SSH-2.0"}, {"huge": 100}, {"error": -32603}]


@pytest.mark.parametrize("fault", SILENT, ids=lambda fault: next(iter(fault)))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_node_of_three_may_fail_in_any_way(fault: dict[str, Any], which: int) -> None:
    async def main(w: World) -> None:
        w.liars[which].set(**fault)
        w.chain.mine(LOCKED)
        assert (await w.eth.head()).number == 21
        assert await w.channel() == LOCKED
        assert await w.eth.nonce(ACCOUNT) == 0 and await w.eth.receipt(TX) is None
        assert await w.eth.estimate_gas(CHANNELS, b"", sender=ACCOUNT) == 50_000
        await w.eth.send_raw(b"raw")
        assert keccak256(b"raw") in w.chain.pool

    run(main)


@pytest.mark.parametrize("fault", SILENT, ids=lambda fault: next(iter(fault)))
def test_a_quorum_is_never_made_up_of_too_few(fault: dict[str, Any]) -> None:
    """N1: with two of three nodes gone nothing is known, and what was known is not widened."""

    async def main(w: World) -> None:
        w.liars[0].set(**fault)
        w.liars[2].set(**fault)
        for question in (w.eth.head, w.channel, lambda: w.eth.nonce(ACCOUNT), lambda: w.eth.receipt(TX)):
            with trio.move_on_after(300), pytest.raises(NoQuorum):
                await question()
                raise AssertionError("one node was enough")

    run(main)


def test_an_invented_channel_is_not_believed_and_its_node_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def main(w: World) -> None:
        w.chain.mine(LOCKED)
        for liar in w.liars[:2]:  # the third is not asked while these two suffice
            liar.set(channels={CHANNEL: INVENTED})
            assert await w.channel() == LOCKED
            assert list(w.nodes.aside) == [liar.name]
            assert f"{liar.name}: call of {CHANNELS}" in caplog.text
            liar.set(channels={})
            await trio.sleep(61)

    with caplog.at_level(logging.WARNING):
        run(main)


def test_without_comparison_the_invented_channel_would_be_believed() -> None:
    """The planted bug: the first answer counts."""

    async def main(w: World) -> None:
        w.chain.mine(LOCKED)
        w.liars[0].set(channels={CHANNEL: INVENTED})
        w.nodes.quorum = 1
        assert await w.channel() == INVENTED

    run(main)


def test_two_nodes_that_differ_are_both_not_believed() -> None:
    async def main(w: World) -> None:
        w.chain.mine(LOCKED)
        assert await w.channel() == LOCKED
        w.liars[1].set(channels={CHANNEL: INVENTED})
        with pytest.raises(NoQuorum, match=r"node 0 says .*node 1 says") as caught:
            await w.channel()
        assert "configure three" in caught.value.hint

    run(main, count=2)


def test_one_node_is_asked_as_if_there_were_no_comparison() -> None:
    async def main(w: World) -> None:
        w.chain.mine(LOCKED)
        assert await w.channel() == LOCKED and (await w.eth.head()).number == 21
        w.liars[0].set(refuse=True)
        with pytest.raises(RpcUnavailable):
            await w.channel()

    run(main, count=1)


def test_a_node_that_stopped_following_is_outvoted_and_set_aside() -> None:
    async def main(w: World) -> None:
        await w.liars[0].freeze()
        for n in range(30):
            w.chain.mine(ChannelOnChain(n, 0, 0, False))
            assert (await w.eth.head()).number in (20, 21 + n)
            assert n < 9 or (await w.channel()).allocated == n, "the head is no staler than max_behind"
        assert list(w.nodes.aside) == ["node 0"]
        asked = w.liars[0].requests.total()
        await w.channel()
        assert w.liars[0].requests.total() == asked, "who is set aside is not asked while the others suffice"

    run(main, max_behind=8)


def test_two_nodes_far_apart_are_no_fresh_view() -> None:
    """One may be stale, the other may invent blocks: nobody can say, so nothing is known."""

    async def main(w: World) -> None:
        await w.liars[0].freeze()
        for _ in range(8):
            w.chain.mine()
        assert (await w.eth.head()).number == 20
        w.chain.mine()
        with pytest.raises(NoQuorum, match="the latest block"):
            await w.eth.head()
        w.liars[0].set(frozen=None)
        assert (await w.eth.head()).number == 29

    run(main, count=2, max_behind=8)


def test_invented_blocks_above_the_head_move_nothing() -> None:
    async def main(w: World) -> None:
        w.liars[1].set(ahead=1_000)
        for _ in range(5):
            w.chain.mine(LOCKED)
            assert (await w.eth.head()).number == len(w.chain.blocks) - 1
            assert await w.channel() == LOCKED
        assert list(w.nodes.aside) == ["node 1"]

    run(main)


def test_another_hash_at_the_same_height_is_the_nodes_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def main(w: World) -> None:
        w.liars[0].set(forked_from=10)
        w.chain.mine(LOCKED)
        assert (await w.eth.head()).hash == w.chain.blocks[-1]
        assert await w.channel() == LOCKED
        assert list(w.nodes.aside) == ["node 0"] and "node 0: block 21" in caplog.text

    with caplog.at_level(logging.WARNING):
        run(main)


def test_branches_at_the_tip_meet_below_it() -> None:
    async def main(w: World) -> None:
        w.liars[0].set(forked_from=19)
        assert (await w.eth.head()).number == 18  # two honest nodes may differ in their last blocks for a moment
        w.liars[0].set(forked_from=10)
        with pytest.raises(NoQuorum):
            await w.eth.head()

    run(main, count=2)


def test_a_slow_node_is_not_waited_for() -> None:
    async def main(w: World) -> None:
        w.liars[0].set(hang=True)
        started = trio.current_time()
        await w.eth.head()
        assert trio.current_time() - started == pytest.approx(1.0)
        assert list(w.nodes.aside) == ["node 0"]
        started = trio.current_time()
        await w.eth.head()
        assert trio.current_time() == started

    run(main, hedge_s=1.0)


def test_who_is_set_aside_is_asked_again_after_a_while_or_when_nobody_else_is_left() -> None:
    async def main(w: World) -> None:
        w.liars[0].set(status=503)
        await w.eth.head()
        w.liars[0].set(status=0)
        w.liars[2].set(status=503)
        assert (await w.eth.head()).number == 20  # 0 is still aside, and needed
        w.liars[2].set(status=0)
        await trio.sleep(60)
        assert w.nodes.aside == {}
        before = w.liars[0].requests.total()
        await w.eth.head()
        assert w.liars[0].requests.total() > before

    run(main, aside_s=60)


def test_as_few_nodes_are_asked_as_are_needed() -> None:
    async def main(w: World) -> None:
        await w.channel()
        assert [liar.requests.total() > 0 for liar in w.liars] == [True, True, True, False, False]

    run(main, count=5)


# ---------------------------------------------------------------------------------------------------------- transactions


def test_a_receipt_counts_when_a_quorum_has_it() -> None:
    async def main(w: World) -> None:
        w.liars[0].set(invented_receipts=True)
        await w.eth.send_raw(b"raw")
        assert await w.eth.receipt(keccak256(b"raw")) is None
        w.chain.mined[keccak256(b"raw")] = 20
        found = await w.eth.receipt(keccak256(b"raw"))
        assert found is not None and found.block_hash == w.chain.blocks[20]
        w.liars[0].set(invented_receipts=False)
        w.liars[1].set(no_receipts=True)
        assert await w.eth.receipt(keccak256(b"raw")) == found
        w.liars[2].set(refuse=True)
        with pytest.raises(NoQuorum):  # one yes, one no, one silent
            await w.eth.receipt(keccak256(b"raw"))

    run(main)


def test_a_transaction_goes_to_every_node() -> None:
    async def main(w: World) -> None:
        w.liars[0].set(sit_on_transactions=True)
        w.liars[1].set(refuse_transactions="already known")
        await w.eth.send_raw(b"raw")
        assert [liar.submitted for liar in w.liars] == [[b"raw"]] * 3
        assert keccak256(b"raw") in w.chain.pool

    run(main)


def test_a_node_that_hangs_does_not_hold_up_a_transaction_that_another_took() -> None:
    async def main(w: World) -> None:
        w.liars[1].set(hang=True)
        started = trio.current_time()
        await w.eth.send_raw(b"raw")
        assert trio.current_time() - started == pytest.approx(module.SPREAD_S)

    run(main)


def test_only_a_no_of_every_node_is_a_no() -> None:
    async def main(w: World) -> None:
        for liar in w.liars:
            liar.set(refuse_transactions="insufficient funds")
        with pytest.raises(RpcError, match="insufficient funds"):
            await w.eth.send_raw(b"raw")
        w.liars[1].set(status=503)
        with pytest.raises(RpcUnavailable):  # it may have taken it
            await w.eth.send_raw(b"raw")

    run(main)


def test_counts_of_transactions_are_those_that_a_quorum_reaches() -> None:
    async def main(w: World) -> None:
        w.chain.nonce = 7
        for liar in w.liars:
            for lie in (-5, 1_000):
                liar.set(nonce_offset=lie)
                assert await w.eth.nonce(ACCOUNT, "pending") == 7, "no gap and no doubt can be talked into our nonces"
                liar.set(nonce_offset=0)
        w.liars[0].set(nonce_offset=-1)  # two honest ones that are behind, each by another block
        w.liars[1].set(nonce_offset=-2)
        assert await w.eth.nonce(ACCOUNT) == 6
        w.liars[2].set(refuse=True)
        with pytest.raises(NoQuorum):
            await w.eth.nonce(ACCOUNT)

    run(main)


def test_a_revert_is_believed_when_a_quorum_says_so() -> None:
    async def main(w: World) -> None:
        w.liars[0].set(revert=b"\x01\x02\x03\x04")
        assert await w.eth.estimate_gas(CHANNELS, b"", sender=ACCOUNT) == 50_000
        w.liars[2].set(revert=b"\x01\x02\x03\x04")
        with pytest.raises(Reverted) as caught:
            await w.eth.estimate_gas(CHANNELS, b"", sender=ACCOUNT)
        assert caught.value.data == b"\x01\x02\x03\x04"
        w.chain.gas = 10**12
        w.liars[0].set(revert=b"")
        w.liars[2].set(revert=b"")
        assert await w.eth.estimate_gas(CHANNELS, b"", sender=ACCOUNT) == 1 << 24

    run(main)


def test_one_node_that_knows_a_transaction_is_enough() -> None:
    async def main(w: World) -> None:
        assert not await w.eth.knows(TX)
        await w.eth.send_raw(b"raw")
        w.liars[0].set(forget_transactions=True)
        w.liars[1].set(refuse=True)
        assert await w.eth.knows(keccak256(b"raw"))

    run(main)


# --------------------------------------------------------------------------------------------------- any node, and start


def test_reads_go_to_the_next_node() -> None:
    async def main(w: World) -> None:
        eth = Eth(w.nodes)
        w.liars[0].set(refuse=True)
        for _ in range(3):
            assert await eth.chain_id() == 31337
        assert w.liars[0].requests.total() == 1, "a dead node was asked again although another one works"
        w.liars[1].set(error=-32005)  # over its limit: an answer, and of no use
        assert await eth.chain_id() == 31337
        w.liars[2].set(refuse=True)
        with pytest.raises(RpcError, match="-32005"):
            await eth.chain_id()

    run(main)


def test_one_node_of_another_chain_stops_the_start() -> None:
    async def main() -> None:
        honest, stranger = LyingRpc(Honest(), "a"), LyingRpc(Honest(), "b")
        stranger.set(chain_id=1)
        async with served(honest) as first, served(stranger) as second:
            nodes = Endpoints.over_http([first, second], chain_id=31337, rules=Rules(quorum=2))
            with pytest.raises(WrongChain, match="of chain 1, not of chain 31337"):
                await nodes.meet()
            await nodes.aclose()
            stranger.set(chain_id=0)
            nodes = Endpoints.over_http([first, second], chain_id=31337)
            await nodes.meet()
            honest.set(status=503)
            with pytest.raises(NoQuorum):
                await nodes.meet()
            await nodes.aclose()

    trio.run(main)


def test_one_node_that_is_away_does_not_stop_the_start() -> None:
    async def main(w: World) -> None:
        w.liars[2].set(refuse=True)
        await w.nodes.meet()
        w.liars[0].set(refuse=True)
        with pytest.raises(NoQuorum):
            await w.nodes.meet()

    run(main)


def test_a_node_that_moves_to_another_chain_later_is_survived() -> None:
    """Behind the URL of one node stands another one after an outage: caught by its chain id, and by its blocks."""

    async def main() -> None:
        chain = Honest()
        chain.mine(LOCKED)
        liars = [LyingRpc(chain, str(n)) for n in range(3)]
        async with served(liars[0]) as a, served(liars[1]) as b, served(liars[2]) as c:
            nodes = Endpoints.over_http([a, b, c], chain_id=31337, rules=Rules(aside_s=0.01))
            await nodes.meet()
            eth = AgreedEth(nodes)
            for fault in ({"status": 503}, {"status": 0, "chain_id": 5}, {"garbage": b"?"}, {"huge": 20 << 20}):
                liars[0].set(**fault)
                assert (await eth.head()).number == 1
                await trio.sleep(0.02)
            assert all("key" not in why for why in nodes.aside.values())
            await nodes.aclose()

    trio.run(main)


@pytest.mark.parametrize(("count", "quorum"), [(1, 2), (2, 1), (3, 1), (3, 4), (4, 2), (5, 2)])
def test_a_quorum_is_more_than_half_and_at_most_all(count: int, quorum: int) -> None:
    with pytest.raises(ChainError, match="does not fit"):
        World(count, quorum=quorum)


def test_the_least_quorum_is_the_default() -> None:
    assert [World(count).nodes.quorum for count in range(1, 6)] == [1, 2, 2, 3, 3]
    assert all(2 * majority(count) > count for count in range(1, 100))
    with pytest.raises(ChainError, match="no JSON-RPC endpoint"):
        Endpoints([])
    with pytest.raises(ChainError, match="configured twice"):
        Endpoints.over_http(["http://a/1", "http://b", "http://a/1"], chain_id=1)


Careful = Callable[[Any, Any], Any]
SEEN = "confirmed if began or ended else now"


def check_channels(careful: Careful) -> None:
    """N2: what widens must be confirmed, what narrows counts at once."""
    none = ChannelOnChain(0, 0, 0, False)
    assert careful(ChannelOnChain(9, 0, 0, False), none) == none
    assert careful(ChannelOnChain(9, 5, 0, False), ChannelOnChain(7, 2, 0, False)) == ChannelOnChain(7, 2, 0, False)
    assert careful(ChannelOnChain(7, 0, 99, False), ChannelOnChain(7, 0, 0, False)).withdraw_at == 99
    assert careful(ChannelOnChain(7, 0, 0, False), ChannelOnChain(7, 0, 99, False)).withdraw_at == 99, (
        "until it is certain"
    )
    assert careful(ChannelOnChain(2, 2, 0, True), ChannelOnChain(7, 2, 0, False)) == ChannelOnChain(2, 2, 0, True)
    assert careful(ChannelOnChain(7, 0, 0, False), ChannelOnChain(7, 0, 0, True)).closed
    assert careful(ChannelOnChain(5, 3, 0, False), ChannelOnChain(9, 4, 0, False)) == ChannelOnChain(5, 3, 0, False)


def check_jobs(careful: Careful) -> None:
    """N2: nobody computes for an opening that may be undone, nor looks away from a job whose end may be."""

    def job(state: JobState) -> JobOnChain:
        return JobOnChain(state, 7, 5, Hash32(bytes(32)))

    for now in JobState:
        for confirmed in JobState:
            seen = careful(job(now), job(confirmed)).state
            if confirmed is JobState.NONE or now is confirmed:
                assert seen is confirmed, "what opened must be confirmed"
            elif now in (JobState.SETTLED, JobState.REFUNDED):
                assert seen is confirmed, "what ended must be confirmed"
            else:
                assert seen is now, "what lies between counts at once, and an end that is undone too"


def test_of_two_sights_the_careful_one_counts() -> None:
    check_channels(reading.careful)
    check_jobs(jobs.careful)


PLANTED: dict[str, tuple[Careful, str, str, Callable[[Careful], None]]] = {
    "what was locked just now is served on": (
        reading.careful,
        "min(now.allocated, confirmed.allocated)",
        "max(now.allocated, confirmed.allocated)",
        check_channels,
    ),
    "only what is confirmed is locked": (
        reading.careful,
        "min(now.allocated, confirmed.allocated)",
        "confirmed.allocated",
        check_channels,
    ),
    "a claim that may be undone is paid": (
        reading.careful,
        "min(now.claimed, confirmed.claimed)",
        "max(now.claimed, confirmed.claimed)",
        check_channels,
    ),
    "who leaves is seen late": (
        reading.careful,
        "now.withdraw_at or confirmed.withdraw_at",
        "confirmed.withdraw_at",
        check_channels,
    ),
    "who came back is believed at once": (
        reading.careful,
        "now.withdraw_at or confirmed.withdraw_at",
        "now.withdraw_at",
        check_channels,
    ),
    "a close must be confirmed": (reading.careful, "now.closed or confirmed.closed", "confirmed.closed", check_channels),
    "an opening counts at once": (jobs.careful, SEEN, "confirmed if ended else now", check_jobs),
    "an end counts at once": (jobs.careful, SEEN, "confirmed if began else now", check_jobs),
    "nothing counts at once": (jobs.careful, SEEN, "confirmed", check_jobs),
    "an end counts as soon as anything is confirmed": (
        jobs.careful,
        "now.state in ENDED and confirmed.state is not now.state",
        "now.state in ENDED and confirmed.state is JobState.NONE",
        check_jobs,
    ),
}  # fmt: skip


def planted(careful: Careful, old: str, new: str) -> Careful:
    """The function with one text replaced."""
    source = inspect.getsource(careful)
    if source.count(old) != 1:
        raise ValueError(f"the source has changed: {old!r} must be planted anew")
    space = dict(careful.__globals__)  # type: ignore[attr-defined]
    exec(compile(source.replace(old, new), "planted", "exec"), space)  # our own source
    made: Careful = space["careful"]
    return made


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_in_the_careful_sight_is_caught(name: str) -> None:
    careful, old, new, check = PLANTED[name]
    check(planted(careful, old, old))
    bugged = planted(careful, old, new)
    with pytest.raises(AssertionError):
        check(bugged)


# ------------------------------------------------------------------------------------------------------- what a job paid

QUOTE = Quote(Hash32(bytes(32)), ACCOUNT, ACCOUNT, ACCOUNT, 500, 0, 20_000, 30_000, 900, ACCOUNT, Hash32(bytes(32)))
JOBS = Address(b"\x0d" * 20)
DEPLOYED = Deployment(31337, ACCOUNT, ACCOUNT, CHANNELS, ACCOUNT, 1, jobs=JOBS)


def settled(block: int, paid: int, *, job: bytes | None = None, address: Address = JOBS, event: str = "Settled") -> Any:
    """A log of that event, complete."""
    return {
        "address": str(address),
        "topics": [hex_data(contract("Jobs").topic(event)), hex_data(job or QUOTE.job_id(DEPLOYED.jobs_domain))],
        "data": hex_data(bytes(12) + ACCOUNT + paid.to_bytes(32)),
        "blockNumber": hex_quantity(block),
        "blockHash": hex_data(keccak256(block.to_bytes(8))),
        "logIndex": "0x0",
    }


class Settling(Honest):
    """A long chain on which a job was settled; the time of its blocks is 12 s apart."""

    def __init__(self, blocks: int, at: int | None) -> None:
        super().__init__()
        self.blocks = [keccak256(number.to_bytes(8)) for number in range(blocks)]
        self.channel *= blocks
        self.logs = [] if at is None else [settled(at, 77)]

    def header(self, number: int) -> dict[str, str] | None:
        found = super().header(number)
        return found and {**found, "timestamp": hex_quantity(12 * number)}

    async def call(self, method: str, *params: Any) -> Any:
        if method != "eth_getLogs":
            return await super().call(method, *params)
        await trio.lowlevel.checkpoint()
        first, last = (int(params[0][key], 16) for key in ("fromBlock", "toBlock"))
        return [log for log in self.logs if first <= int(log["blockNumber"], 16) <= last]

    submit = call


class Server:
    """One node of it, with logs of its own."""

    def __init__(self, chain: Settling, name: str, logs: list[Any] | None = None) -> None:
        self.chain, self.name, self.logs, self.searched = chain, name, logs, 0

    async def call(self, method: str, *params: Any) -> Any:
        if method == "eth_getLogs":
            self.searched += 1
            if self.logs is not None:
                return self.logs
        return await self.chain.call(method, *params)

    submit = call

    async def aclose(self) -> None:
        """Nothing to close."""


def paid_by(
    chain: Settling, lie: list[Any] | None = None, quote: Quote = QUOTE, nodes: int = 3
) -> tuple[int | None, list[Server]]:
    """What the nodes tell together; `lie`: what the first one says there is. And the nodes."""
    servers = [Server(chain, f"node {n}", None if n else lie) for n in range(nodes)]
    found: list[Any] = []

    async def main() -> None:
        evm = EvmChain(Endpoints(servers), DEPLOYED, None, poll=1, confirmations=0)  # type: ignore[arg-type]
        found.append(await evm.jobs.paid(quote))  # type: ignore[union-attr]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return found[0], servers


@pytest.mark.parametrize(
    "lie",
    [
        [settled(1_990, 499)],
        [],
        [settled(1_990, 77, job=b"\x01" * 32)],
        [settled(1_990, 77, address=CHANNELS)],
        [settled(1_990, 77, event="Refunded")],
    ],
    ids=["another amount", "hidden", "another job's", "another contract's", "another event"],
)
def test_what_a_job_paid_is_told_by_a_quorum(lie: list[Any]) -> None:
    """N3. It goes into the journal for good, so one server's word is not enough; nor are its events of other things."""
    assert paid_by(Settling(2_000, 1_990), lie)[0] == 77
    nothing = paid_by(Settling(2_000, None), lie)[0]
    assert nothing is None


@pytest.mark.parametrize("other", [{"job": b"\x01" * 32}, {"address": CHANNELS}, {"event": "Refunded"}])
def test_an_event_of_something_else_is_no_payment(other: dict[str, Any]) -> None:
    """A server that filters badly, alone."""
    assert paid_by(Settling(2_000, None), [settled(1_990, 499, **other)], nodes=1)[0] is None


def test_nobody_is_searched_for_further_back_than_the_job_can_be() -> None:
    """An event that is hidden costs a page or two, and not a walk to the deployment, here of forty."""
    for valid_before, pages in (12 * 199_900, 1), (12 * 195_500, 2), (12 * 500, 40):
        found, servers = paid_by(Settling(200_000, None), quote=replace(QUOTE, valid_before=valid_before))
        assert found is None and max(one.searched for one in servers) == pages, valid_before
    assert paid_by(Settling(200_000, 499))[0] == 77  # and the oldest that it can be is found
