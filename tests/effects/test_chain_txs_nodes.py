"""Transactions through several nodes, some of which fail and lie; deaths, cancellations and reorganisations (N4, N5)."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st

from node.audit_txs import check_transactions
from node.chain import receipts, sent, txs
from node.chain.agreed import AgreedEth
from node.chain.endpoints import Endpoints, Rules
from node.chain.pending import unfinished
from node.chain.rpc import RpcError, RpcUnavailable
from node.chain.tx_policy import TxPolicy
from node.chain.txs import TxSender
from node.errors import ChainError, ChainMoved, TxTimeout
from node.signer.bare import Bare
from node.store.records import Entry
from node.testing.every_kind import records
from node.testing.lying_rpc import Faults, LyingRpc
from node.testing.planted import notices, sound
from node.testing.pool_node import PoolNode, Sent, decode
from protocol.ids import Address
from protocol.keys import PrivateKey

KEY = PrivateKey(b"\x07" * 32)
TO = Address(b"\x22" * 20)
CHAIN = 31337
POLICY = TxPolicy(poll=0.5, bump_after=10.0, give_up_after=120.0)


class World:
    """One chain, several nodes in front of it, and a sender whose journal outlives it."""

    def __init__(self, count: int = 3, policy: TxPolicy = POLICY) -> None:
        self.chain = PoolNode()
        self.liars = [LyingRpc(self.chain, f"node {n}") for n in range(count)]
        self.nodes = Endpoints(self.liars, Rules(aside_s=20))
        self.policy = policy
        self.records: list[tuple[str, Mapping[str, Any]]] = []
        self.die_at = ""
        self.heard: Callable[[], None] = lambda: None
        """Called when something has been journaled."""
        self.anchor = b"one"
        self.sender = self.reborn()

    def reborn(self) -> TxSender:
        async def journal(kind: str, subject: bytes, body: Mapping[str, Any]) -> None:
            await trio.lowlevel.checkpoint()
            self.records.append((kind, body))
            self.heard()
            if kind == self.die_at:
                raise Died

        self.sender = TxSender(
            AgreedEth(self.nodes), Bare(KEY), CHAIN, anchor=self.anchor, journal=journal, policy=self.policy
        )
        return self.sender

    async def restart(self) -> None:
        self.die_at = ""
        await self.reborn().resume(list(self.records))

    async def mine_for(self, seconds: int) -> None:
        for _ in range(seconds):
            await trio.sleep(1)
            self.chain.mine()

    @property
    def raws(self) -> dict[bytes, bytes]:
        return {decode(raw).hash: raw for liar in self.liars for raw in liar.submitted}

    @property
    def sent(self) -> list[Sent]:
        return [decode(raw) for raw in self.raws.values()]

    def landed(self, data: bytes) -> int:
        return sum(one.data == data for one in self.chain.landed)


def judged(history: list[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What the audit says of it: nothing, whatever the nodes did (N4)."""
    return check_transactions(records([Entry(kind, bytes(KEY.address), body) for kind, body in history]))


class Died(BaseException):
    """The process, at that point."""


def run(main: Callable[[World], Awaitable[None]], count: int = 3, policy: TxPolicy = POLICY) -> None:
    async def timed() -> None:
        with trio.fail_after(10_000):
            world = World(count, policy)
            await main(world)
            assert judged(world.records) == []

    trio.run(timed, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("fault", ["forget_transactions", "sit_on_transactions"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_node_that_takes_a_transaction_and_keeps_it_hides_nothing(fault: str, which: int) -> None:
    async def main(w: World) -> None:
        w.liars[which].set(**{fault: True})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 3)
            assert (await w.sender.send("pay", TO, b"1")).ok
        assert w.landed(b"1") == 1 and len(w.sent) == 1

    run(main)


def test_with_one_node_that_keeps_it_the_failure_is_named_and_nothing_is_doubled_when_it_repents() -> None:
    async def main(w: World) -> None:
        w.liars[0].set(sit_on_transactions=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 400)
            for _ in range(2):
                with pytest.raises(TxTimeout):
                    await w.sender.send("claim", TO, b"1")
            w.liars[0].set(sit_on_transactions=False)
            assert (await w.sender.send("claim", TO, b"1")).ok
        assert w.landed(b"1") == 1 and {one.nonce for one in w.sent} == {0} and len(w.sent) > 1

    run(main, count=1)


def test_an_invented_receipt_ends_nothing() -> None:
    async def main(w: World) -> None:
        w.liars[0].set(invented_receipts=True)
        done = trio.Event()

        async def send() -> None:
            assert (await w.sender.send("pay", TO, b"1")).ok
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(5)
            assert not done.is_set() and [kind for kind, _ in w.records] == ["tx_signed"]
            await w.mine_for(2)
        assert w.landed(b"1") == 1

    run(main)


@pytest.mark.parametrize("lie", [{"nonce_offset": 5}, {"nonce_offset": -1}, {"no_receipts": True}, {"status": 503}])
def test_one_lie_about_nonces_or_receipts_doubles_nothing(lie: dict[str, Any]) -> None:
    async def main(w: World) -> None:
        w.chain.mine()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 200)
            await w.sender.send("first", TO, b"0")
            for liar in w.liars:
                liar.set(**lie)
                data = liar.name.encode()
                assert (await w.sender.send("pay", TO, data)).ok
                assert w.landed(data) == 1
                liar.faults = Faults()
                await trio.sleep(25)
        assert [one.nonce for one in w.chain.landed] == [0, 1, 2, 3] and len(w.sent) == 4

    run(main)


def test_a_lagging_replica_is_not_taken_for_a_stolen_nonce() -> None:
    """One node shows the higher count but no receipt yet: with one look that would be a dropped and doubled claim."""

    async def main(w: World) -> None:
        w.chain.mine()
        liar = w.liars[0]
        liar.set(no_receipts=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 60)

            async def relent() -> None:
                await trio.sleep(12)  # after the first look of `_push`, before the second
                liar.set(no_receipts=False)

            nursery.start_soon(relent)
            assert (await sound(w.sender.send("claim", TO, b"1"))).ok
        assert [kind for kind, _ in w.records] == ["tx_signed", "tx_final"] and w.landed(b"1") == 1

    run(main, count=1)


def test_a_send_whose_answers_were_lost_is_taken_up_by_the_same_call() -> None:
    """It was in the pool all the time; a second one at the next nonce would be paid for twice."""

    async def main(w: World) -> None:
        liar = w.liars[0]
        inner = liar._inner

        class Deaf:
            async def call(self, method: str, *params: Any) -> Any:
                return await inner.call(method, *params)

            async def submit(self, method: str, *params: Any) -> Any:
                await inner.submit(method, *params)
                liar.set(status=503)
                raise RpcUnavailable("the answer was lost")

        liar._inner = Deaf()
        with pytest.raises(RpcUnavailable):
            await w.sender.send("claim", TO, b"1")
        liar._inner = inner
        liar.set(status=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 30)
            assert (await w.sender.send("claim", TO, b"1")).ok
        assert w.landed(b"1") == 1 and {one.nonce for one in w.sent} == {0}

    run(main, count=1)


def test_a_death_between_journal_and_send_ends_in_one_transaction() -> None:
    async def main(w: World) -> None:
        w.die_at = "tx_signed"
        with pytest.raises(Died):
            await w.sender.send("claim", TO, b"1")
        assert w.sent == []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 60)
            await w.restart()
            assert unfinished(w.records, CHAIN) == [] and w.landed(b"1") == 1
            assert (await w.sender.send("next", TO, b"2")).ok
        assert [one.data for one in w.chain.landed] == [b"1", b"2"] and len(w.sent) == 2

    run(main)


def test_a_death_after_the_send_ends_in_one_transaction() -> None:
    async def main(w: World) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 60)
            w.die_at = "tx_final"
            with pytest.raises(Died):
                await w.sender.send("claim", TO, b"1")
            w.records.pop()  # it had not reached the disk
            await w.restart()
        assert unfinished(w.records, CHAIN) == [] and w.landed(b"1") == 1 and len(w.sent) == 1

    run(main)


def test_a_start_outlives_a_transaction_that_no_node_takes_any_more() -> None:
    async def main(w: World) -> None:
        w.die_at = "tx_signed"
        with pytest.raises(Died):
            await w.sender.send("claim", TO, b"1")
        for liar in w.liars:
            liar.set(refuse_transactions="insufficient funds for gas * price + value")
        started = trio.current_time()
        await w.restart()
        assert trio.current_time() - started >= POLICY.bump_after, "one look is not enough"
        assert [kind for kind, _ in w.records] == ["tx_signed", "tx_dropped"]
        for liar in w.liars:
            liar.set(refuse_transactions="")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 20)
            assert (await w.sender.send("claim", TO, b"2")).ok
        assert [one.data for one in w.chain.landed] == [b"2"], "a dropped transaction is never sent again"

    run(main)


def test_catch_up_brings_back_what_a_reorganisation_threw_out() -> None:
    async def main(w: World) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 10)
            for data in (b"1", b"2", b"3"):
                await w.sender.send("claim", TO, data)
        before = len(w.sent)
        w.chain.reorg(12)
        assert w.chain.landed == []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 10)
            await w.sender.catch_up()
            assert len(w.chain.landed) == 3, "to their end, not on their way"
        assert [one.data for one in w.chain.landed] == [b"1", b"2", b"3"] and len(w.sent) == before
        await w.sender.catch_up()  # and again, with nothing to do

    run(main)


@pytest.mark.parametrize("kept", [True, False])
def test_what_was_orphaned_while_we_were_away_is_not_asked_for_a_second_time(kept: bool) -> None:
    async def main(w: World) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 10)
            await w.sender.send("claim", TO, b"1")
        w.chain.reorg(12, w.raws if kept else None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 30)
            await w.restart()
            with pytest.raises(ChainMoved):
                await w.sender.send("claim", TO, b"1", derived=True)
            assert w.landed(b"1") == 1 and len(w.sent) == 1

    run(main)


def test_what_was_for_another_chain_of_the_same_id_is_never_sent_to_this_one() -> None:
    """A devnet started anew: the journal still holds transactions of the old one, ended and not."""

    async def main(w: World) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 10)
            await w.sender.send("deposit", TO, b"1")
        w.die_at = "tx_signed"
        with pytest.raises(Died):
            await w.sender.send("deposit", TO, b"2")
        w.chain, w.anchor = PoolNode(), b"another"
        w.liars = [LyingRpc(w.chain, f"node {n}") for n in range(3)]
        w.nodes = Endpoints(w.liars)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 20)
            await w.restart()
            await w.sender.catch_up()
            assert w.sent == [] and unfinished(w.records, CHAIN) == []
            assert (await w.sender.send("deposit", TO, b"3")).ok
        assert [one.data for one in w.chain.landed] == [b"3"]

    run(main)


# ------------------------------------------------------------------------------------------------------------------ fuzz


def one_call_per_nonce(w: World) -> None:
    """N4: no nonce was ever signed for two calls, but after every node had refused the first."""
    calls: dict[int, tuple[bytes, int, bytes]] = {}
    for kind, body in w.records:
        nonce = int(body["nonce"])
        if kind == "tx_dropped":
            calls.pop(nonce, None)
        elif kind == "tx_signed":
            one = decode(bytes.fromhex(body["raw"]))
            assert calls.setdefault(nonce, one.call) == one.call, f"two calls for nonce {nonce}"


LIES = [
    {"refuse": True},
    {"hang": True},
    {"status": 503},
    {"error": -32603},
    {"slow_s": 3.0},
    {"forget_transactions": True},
    {"sit_on_transactions": True},
    {"refuse_transactions": "nonce too low"},
    {"invented_receipts": True},
    {"no_receipts": True},
    {"nonce_offset": 3},
    {"nonce_offset": -2},
    {"ahead": 50},
    {"forked_from": 2},
    {"revert": b"\x01\x02\x03\x04"},
]
STEPS = st.one_of(
    st.tuples(st.just("owe"), st.integers(1, 9)),
    st.tuples(st.just("spoil"), st.integers(0, 2), st.sampled_from(LIES)),
    st.tuples(st.just("freeze"), st.integers(0, 2)),
    st.tuples(st.just("heal"), st.integers(0, 2)),
    st.tuples(st.just("blackout"), st.integers(1, 90)),
    st.tuples(st.just("mine"), st.integers(1, 8)),
    st.tuples(st.just("wait"), st.integers(1, 40)),
    st.tuples(st.just("reorg"), st.integers(1, 12), st.booleans()),
    st.tuples(st.just("kill"), st.sampled_from(["tx_signed", "tx_final", ""])),
)


class Debtor:
    """What a claimer is: it looks at the chain and asks for what is missing, again and again."""

    def __init__(self, w: World) -> None:
        self.w = w
        self.owed = 0
        self.scope = trio.CancelScope()

    def paid(self) -> int:
        return max((int.from_bytes(one.data) for one in self.w.chain.landed), default=0)

    async def run(self) -> None:
        """Process after process: each ends when it is cancelled or dies."""
        while True:
            self.scope = trio.CancelScope()
            try:
                with self.scope:
                    await self.live()
            except Died:
                pass

    async def live(self) -> None:
        started = False
        while True:
            try:
                if not started:
                    await self.w.restart()
                    started = True
                await self.w.sender.catch_up()
                if self.paid() < self.owed:
                    await self.w.sender.send("claim", TO, self.owed.to_bytes(4), derived=True)
            except ChainError:
                pass
            await trio.sleep(5)


async def drive(w: World, steps: list[tuple[Any, ...]]) -> None:
    debtor = Debtor(w)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(debtor.run)
        for step in steps:
            event(str(step[0]))
            match step:
                case "owe", more:
                    debtor.owed += more
                case "spoil", which, lie:
                    for liar in w.liars:  # one at a time: a quorum of honest nodes is left
                        liar.faults = Faults()
                    w.liars[which].set(**lie)
                case "freeze", which:
                    for liar in w.liars:
                        liar.faults = Faults()
                    await w.liars[which].freeze()
                case "heal", which:
                    w.liars[which].faults = Faults()
                case "blackout", seconds:
                    for liar in w.liars:
                        liar.set(status=503)
                    await trio.sleep(seconds)
                    for liar in w.liars:
                        liar.faults = Faults()
                case "mine", blocks:
                    await w.mine_for(blocks)
                case "wait", seconds:
                    await trio.sleep(seconds)
                case "reorg", depth, keep:
                    w.chain.reorg(min(depth, len(w.chain.blocks) - 1), w.raws if keep else None)
                case "kill", point:
                    w.die_at = point
                    if not point:
                        debtor.scope.cancel()
        for liar in w.liars:
            liar.faults = Faults()
        w.die_at = ""
        while debtor.paid() < debtor.owed or unfinished(w.records, CHAIN):
            await w.mine_for(5)
        await w.mine_for(60)
        nursery.cancel_scope.cancel()
    assert debtor.paid() == debtor.owed
    one_call_per_nonce(w)
    amounts = [int.from_bytes(one.data) for one in w.chain.landed]
    assert amounts == sorted(set(amounts)), f"a claim was paid for that gained nothing: {amounts}"


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
@given(st.lists(STEPS, max_size=25))
@example(  # the one before a stalled transaction is thrown out and forgotten: it goes out again first, or both wait for ever
    [
        *(
            ("owe", 1),
            ("mine", 2),
            ("owe", 30),
            ("wait", 33),
            ("reorg", 9, False),
            ("reorg", 9, True),
            ("reorg", 9, True),
        ),
        *(("wait", 27), ("freeze", 1), ("reorg", 5, True), ("reorg", 4, False), ("freeze", 2)),
    ]
)
def test_whatever_happens_each_claim_lands_once(steps: list[tuple[Any, ...]]) -> None:
    """N4 and N5 against everything at once."""
    run(lambda w: drive(w, steps))


# --------------------------------------------------------------------------------------------------------- planted bugs


@pytest.mark.parametrize("out", [False, True], ids=["on its way", "before its receipt"])
def test_a_cancelled_send_keeps_its_nonce_against_the_next_call(out: bool) -> None:
    """N4: wherever the caller went away, and though no node has it any more, the next call gets another nonce."""

    async def main(w: World) -> None:
        def silence() -> None:
            for liar in w.liars:
                liar.set(hang=not out)

        w.heard = silence
        with trio.move_on_after(3) as scope:
            await w.sender.send("first", TO, b"1")
        assert scope.cancelled_caught and bool(w.chain.pool) is out and len(w.records) == 1
        w.chain.pool.clear()
        w.heard = lambda: None
        for liar in w.liars:
            liar.set(hang=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 60)
            await sound(w.sender.send("second", TO, b"2"))
        one_call_per_nonce(w)
        assert [one.data for one in w.chain.landed] == [b"1", b"2"]

    run(main)


def test_a_transaction_that_one_node_may_have_keeps_its_nonce() -> None:
    """N4: the answer was lost, then it is refused: it may be out all the same."""

    async def main(w: World) -> None:
        liar = w.liars[0]
        inner = liar._inner
        kept: list[str] = []

        class Forgetful:
            """Takes it, loses its answer, says that it does not know it and refuses it; and has it."""

            async def call(self, method: str, *params: Any) -> Any:
                return None if method == "eth_getTransactionByHash" else await inner.call(method, *params)

            async def submit(self, method: str, *params: Any) -> Any:
                kept.append(params[0])
                if len(kept) == 1:
                    raise RpcUnavailable("the answer was lost")
                raise RpcError(method, -32000, "replacement transaction underpriced", None)

        liar._inner = Forgetful()
        with pytest.raises(ChainError):
            await w.sender.send("claim", TO, b"1")
        assert len(unfinished(w.records, CHAIN)) == 1, "it is not dropped"
        liar._inner = inner
        await inner.submit("eth_sendRawTransaction", kept[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 60)
            await sound(w.sender.send("next", TO, b"2"))
        one_call_per_nonce(w)
        assert [one.data for one in w.chain.landed] == [b"1", b"2"]

    run(main, count=1)


def test_what_every_node_forgot_keeps_its_nonce_while_somebody_waits() -> None:
    """N4: the nodes' count says that the nonce is free; it is not."""

    async def main(w: World) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.sender.send, "first", TO, b"1")
            await trio.sleep(2)
            w.chain.pool.clear()
            nursery.start_soon(w.mine_for, 60)
            await sound(w.sender.send("second", TO, b"2"))
        one_call_per_nonce(w)
        assert [one.data for one in w.chain.landed] == [b"1", b"2"]

    run(main)


def test_what_was_given_up_is_not_sent_again_beside_the_next() -> None:
    """N4: it was out, then every node forgot and refused it, and its caller was told that it will not happen."""

    async def main(w: World) -> None:
        async def lose() -> None:
            await trio.sleep(2)
            w.chain.pool.clear()
            for liar in w.liars:
                liar.set(refuse_transactions="insufficient funds for gas * price + value")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose)
            with pytest.raises(ChainError, match="every node refuses it"):
                await w.sender.send("claim", TO, b"1")
        for liar in w.liars:
            liar.set(refuse_transactions="")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.mine_for, 30)
            await sound(w.sender.send("claim", TO, b"2"))
        assert [one.data for one in w.chain.landed] == [b"2"]

    run(main)


PLANTED: dict[str, tuple[str, str, Callable[[], None]]] = {
    "N4 one look decides": (
        "if trio.current_time() - since < self._policy.bump_after:",
        "if False:",
        test_a_lagging_replica_is_not_taken_for_a_stolen_nonce,
    ),
    "N4 a nonce is given back though the transaction may be out": (
        "if maybe_out:\n",
        "if False:\n",
        test_a_transaction_that_one_node_may_have_keeps_its_nonce,
    ),
    "N4 a nonce is given back when the answer was lost": (
        "            self._sent.stalled[nonce].answers_equal_calls = True\n            raise\n",
        "            del self._sent.stalled[nonce]\n            raise\n",
        test_a_send_whose_answers_were_lost_is_taken_up_by_the_same_call,
    ),
    "N4 who goes away while it is sent leaves no trace": (
        "            await self._broadcast(attempt)\n        except _NonceTaken:\n",
        "            await self._broadcast(attempt)\n"
        "        except (trio.Cancelled, BaseExceptionGroup):\n            del self._sent.stalled[nonce]\n            raise\n"
        "        except _NonceTaken:\n",
        lambda: test_a_cancelled_send_keeps_its_nonce_against_the_next_call(False),
    ),
    "N4 who goes away while it waits leaves no trace": (
        "            self._sent.stalled.setdefault(nonce, Stalled(attempts, answers_equal_calls=False))\n",
        "            self._sent.recent.pop(nonce, None)\n",
        lambda: test_a_cancelled_send_keeps_its_nonce_against_the_next_call(True),
    ),
    "N4 what the nodes forgot is forgotten": (
        "free = max(pending, end)",
        "free = pending",
        test_what_every_node_forgot_keeps_its_nonce_while_somebody_waits,
    ),
    "N4 what is dropped is sent again": (
        "        self._forget(nonce)  # its",
        "        # its",
        test_what_was_given_up_is_not_sent_again_beside_the_next,
    ),
    "N4 sent before it is journaled": (
        "        await self._sent.record(attempt)\n        # From here",
        "        # From here",
        test_a_death_between_journal_and_send_ends_in_one_transaction,
    ),
    "N5 who looked too early sends all the same": (
        "if derived and (stalled or orphans):",
        "if False:",
        lambda: test_what_was_orphaned_while_we_were_away_is_not_asked_for_a_second_time(True),
    ),
    "N5 only what is under way counts": (
        "if derived and (stalled or orphans):",
        "if derived and stalled:",
        lambda: test_what_was_orphaned_while_we_were_away_is_not_asked_for_a_second_time(False),
    ),
    "N5 what has landed once is over": (
        "            self.ended[tx.signed.transaction.nonce] = b\"\"\n",
        "",
        lambda: test_what_was_orphaned_while_we_were_away_is_not_asked_for_a_second_time(False),
    ),
    "N5 orphans are left where they are": (
        "            await self._bring_back(orphans)\n\n",
        "\n",
        test_catch_up_brings_back_what_a_reorganisation_threw_out,
    ),
}  # fmt: skip


def planted(old: str, new: str) -> Any:
    """`node.chain.txs`, with one text replaced in it or in what it is made of."""
    sources = {module: inspect.getsource(module) for module in (sent, receipts, txs)}
    if sum(source.count(old) for source in sources.values()) != 1:
        raise ValueError(f"the source has changed: {old!r} must be planted anew")
    made: dict[str, Any] = {}
    for module, source in sources.items():  # each sees what was made anew of those before it
        again = ModuleType(module.__name__)
        exec(compile(source.replace(old, new), "planted", "exec"), again.__dict__)  # our own source
        vars(again).update({name: made[name] for name in vars(again).keys() & made.keys()})
        made |= {name: one for name, one in vars(again).items() if getattr(one, "__module__", "") == module.__name__}
    return again


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, watch = PLANTED[name]
    monkeypatch.setitem(globals(), "TxSender", planted(old, new).TxSender)
    assert notices(watch)


@pytest.mark.parametrize("name", PLANTED)
def test_without_a_bug_nothing_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _, watch = PLANTED[name]
    monkeypatch.setitem(globals(), "TxSender", planted(old, old).TxSender)
    assert not notices(watch)
