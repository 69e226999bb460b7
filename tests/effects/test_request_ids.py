"""A request id makes one transaction of many asks: again, after a restart, while it is stuck; and never of another call (N8)."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from node.audit_txs import check_transactions
from node.chain import receipts, sent, txs
from node.chain.eth import Eth
from node.chain.requesting import Requesting
from node.chain.rpc import RpcError
from node.chain.tx_policy import TxPolicy
from node.chain.txs import TxSender
from node.errors import ChainError, RequestConflict, TxTimeout
from node.signer.bare import Bare
from node.store.records import Entry
from node.testing.every_kind import records
from node.testing.planted import notices
from node.testing.pool_node import PoolNode, decode
from protocol.ids import Address
from protocol.keys import PrivateKey

KEY = PrivateKey(b"\x07" * 32)
TO = Address(b"\x22" * 20)
CHAIN = 31337
POLICY = TxPolicy(poll=0.5, bump_after=10.0, give_up_after=30.0)


class World:
    def __init__(self) -> None:
        self.node = PoolNode()
        self.records: list[tuple[str, Mapping[str, Any]]] = []
        self.mining = True

    async def journal(self, kind: str, subject: bytes, body: Mapping[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.records.append((kind, body))

    async def start(self) -> TxSender:
        """A sender as after a restart: all it knows is in the journal."""
        sender = TxSender(Eth(self.node), Bare(KEY), CHAIN, journal=self.journal, policy=POLICY)
        await sender.resume(list(self.records))
        return sender

    async def mine(self) -> None:
        while True:
            await trio.sleep(1)
            if self.mining:
                self.node.mine()


def run(main: Callable[[World], Awaitable[None]]) -> None:
    async def timed() -> None:
        world = World()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.mine)
            with trio.fail_after(3600):
                await main(world)
            history = [Entry(kind, bytes(KEY.address), body) for kind, body in world.records]
            assert check_transactions(records(history)) == []  # what the audit says of it
            nursery.cancel_scope.cancel()

    trio.run(timed, clock=trio.testing.MockClock(autojump_threshold=0))


def test_asked_again_is_answered_and_not_sent() -> None:
    async def main(world: World) -> None:
        sender = await world.start()
        first = await sender.send("deposit", TO, b"\1", 5, request="a")
        assert await sender.send("deposit", TO, b"\1", 5, request="a") == first
        assert await (await world.start()).send("deposit", TO, b"\1", 5, request="a") == first
        assert len(world.node.landed) == 1
        second = await sender.send("deposit", TO, b"\1", 5, request="b")  # another id is meant as another one
        third = await sender.send("deposit", TO, b"\1", 5)  # and none is no id
        assert len({first.hash, second.hash, third.hash}) == 3 == len(world.node.landed)

    run(main)


def test_an_id_is_for_one_call() -> None:
    async def main(world: World) -> None:
        sender = await world.start()
        await sender.send("deposit", TO, b"\1", 5, request="a")
        for call in ((TO, b"\1", 6), (TO, b"\2", 5), (Address(b"\x23" * 20), b"\1", 5)):
            with pytest.raises(RequestConflict):
                await sender.send("deposit", *call, request="a")
        world.mining = False
        with pytest.raises(TxTimeout):
            await sender.send("deposit", TO, b"\1", 5, request="stuck")
        world.mining = True
        with pytest.raises(RequestConflict):
            await sender.send("deposit", TO, b"\1", 6, request="stuck")
        await sender.catch_up()
        assert len(world.node.landed) == 2

    run(main)


@pytest.mark.parametrize("restart", [False, True])
def test_stuck_and_asked_again_lands_once(restart: bool) -> None:
    async def main(world: World) -> None:
        sender = await world.start()
        world.mining = False
        with pytest.raises(TxTimeout):
            await sender.send("deposit", TO, b"\1", 5, request="a")
        if restart:
            sender = await world.start()
        world.mining = True
        assert (await sender.send("deposit", TO, b"\1", 5, request="a")).ok
        assert len(world.node.landed) == 1

    run(main)


def test_a_stuck_one_does_not_answer_for_another_id() -> None:
    async def main(world: World) -> None:
        sender = await world.start()
        world.mining = False
        with pytest.raises(TxTimeout):
            await sender.send("deposit", TO, b"\1", 5, request="a")
        world.mining = True
        assert (await sender.send("deposit", TO, b"\1", 5, request="b")).ok
        assert (await sender.send("deposit", TO, b"\1", 5, request="a")).ok
        assert len(world.node.landed) == 2

    run(main)


def test_two_asks_at_once_are_one() -> None:
    """N8."""

    async def main(world: World) -> None:
        sender, results = await world.start(), []

        async def ask(value: int, request: str) -> None:
            try:
                results.append(await sender.send("deposit", TO, b"\1", value, request=request))
            except RequestConflict as error:
                results.append(error)  # type: ignore[arg-type]

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, 5, "a")
        assert len({result.hash for result in results}) == 1 == len(world.node.landed)
        results.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 6, "b")
            nursery.start_soon(ask, 7, "b")
        assert sorted(type(result).__name__ for result in results) == ["RequestConflict", "TxResult"]
        assert len(world.node.landed) == 2

    run(main)


@pytest.mark.parametrize("request_id", ["a", ""])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("when", ["before", "at once", "pending"])
def test_what_a_server_refused_and_kept_lands_once(
    request_id: str, restart: bool, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "The pool is full", says the server, and hands it in later: before it is asked for again, or in that moment."""

    async def main(world: World) -> None:
        sender, node = await world.start(), world.node
        take, kept, header = node._take, [], node._header
        # Fees move, so that asking again signs other bytes.
        monkeypatch.setattr(node, "_header", lambda n: (header(n) or {}) | {"baseFeePerGas": hex(10**9 - len(kept))})

        def refuse(raw: bytes) -> Any:
            kept.append(raw)
            if len(kept) == 1:
                raise RpcError("eth_sendRawTransaction", -32000, "txpool is full", None)
            if len(kept) == 2 and when == "at once":
                take(kept[0])
                node.mine()
            return take(raw)

        monkeypatch.setattr(node, "_take", refuse)
        with pytest.raises(RpcError):
            await sender.send("withdraw", TO, b"\1", 5, request=request_id)
        if restart:
            sender = await world.start()
        if when != "at once":
            take(kept[0])
        if when == "before":
            node.mine()
        assert (await sender.send("withdraw", TO, b"\1", 5, request=request_id)).ok
        assert [one.nonce for one in node.landed] == [0]
        assert (await sender.send("withdraw", TO, b"\1", 6, request="another")).ok
        assert [one.nonce for one in node.landed] == [0, 1]

    run(main)


@pytest.mark.parametrize("request_id", ["a", ""])
def test_what_was_kept_answers_once_however_long_it_takes(request_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """N8: a wait in vain between does not make it answer for the next one, which is meant as another."""

    async def main(world: World) -> None:
        sender, node = await world.start(), world.node
        take, kept = node._take, []

        def refuse(raw: bytes) -> Any:
            kept.append(raw)
            if len(kept) == 1:
                raise RpcError("eth_sendRawTransaction", -32000, "txpool is full", None)
            return take(raw)

        monkeypatch.setattr(node, "_take", refuse)
        with pytest.raises(RpcError):
            await sender.send("withdraw", TO, b"\1", 5, request=request_id)
        take(kept[0])
        world.mining = False
        with pytest.raises(TxTimeout):
            await sender.send("withdraw", TO, b"\1", 5, request=request_id)
        world.mining = True
        first = await sender.send("withdraw", TO, b"\1", 5, request=request_id)
        assert [one.nonce for one in node.landed] == [0]
        second = await sender.send("withdraw", TO, b"\1", 5, request=request_id and "another")
        assert second.hash != first.hash and [one.nonce for one in node.landed] == [0, 1]

    run(main)


def test_one_look_of_a_node_that_is_behind_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nonce is used, and nobody shows the receipt yet."""

    async def main(world: World) -> None:
        sender, node = await world.start(), world.node
        take, call, kept, blind = node._take, node.call, [], [True]

        def refuse(raw: bytes) -> Any:
            kept.append(raw)
            if len(kept) == 1:
                raise RpcError("eth_sendRawTransaction", -32000, "txpool is full", None)
            return take(raw)

        async def behind(method: str, *params: Any) -> Any:
            asked = bytes.fromhex(params[0][2:]) if method.startswith("eth_getTransaction") and params else b""
            known = asked == decode(kept[0]).hash if kept else False
            return None if blind[0] and known and "Count" not in method else await call(method, *params)

        monkeypatch.setattr(node, "_take", refuse)
        monkeypatch.setattr(node, "call", behind)
        with pytest.raises(RpcError):
            await sender.send("withdraw", TO, b"\1", 5, request="a")
        take(kept[0])
        node.mine()
        assert (await sender.send("deposit", TO, b"\2", 6, request="b")).ok
        blind[0] = False
        assert (await sender.send("withdraw", TO, b"\1", 5, request="a")).hash == decode(kept[0]).hash
        assert [one.nonce for one in node.landed] == [0, 1]

    run(main)


def test_a_request_of_two_transactions_goes_on_where_it_stopped() -> None:
    async def main(world: World) -> None:
        first = Requesting(await world.start(), "payday")
        approved = await first.send("approve", TO, b"\1")
        again = Requesting(await world.start(), "payday")  # it died in between
        assert await again.send("approve", TO, b"\1") == approved
        assert not again.has_answered("payday:deposit")
        assert (await again.send("deposit", TO, b"\2", 5)).ok
        assert again.has_answered("payday:deposit")
        assert len(world.node.landed) == 2

    run(main)


@pytest.mark.parametrize("request_id", ["", "x" * 65, "tab\t", "ü"])
def test_what_is_no_id(request_id: str) -> None:
    with pytest.raises(ChainError, match="printable"):
        Requesting(None, request_id)  # type: ignore[arg-type]


@pytest.mark.parametrize("restart", [False, True])
def test_a_request_outlives_a_fee_bump(restart: bool) -> None:
    """N8: what lands is the replacement, and it answers for the id too."""

    async def main(world: World) -> None:
        sender = await world.start()
        world.mining = False
        with pytest.raises(TxTimeout):
            await sender.send("deposit", TO, b"\1", 5, request="a")
        assert sum(kind == "tx_signed" for kind, _ in world.records) > 1
        world.mining = True
        await sender.catch_up()
        if restart:
            sender = await world.start()
        assert sender.has_answered("a")
        assert (await sender.send("deposit", TO, b"\1", 5, request="a")).ok
        with pytest.raises(RequestConflict):
            await sender.send("deposit", TO, b"\1", 6, request="a")
        assert len(world.node.landed) == 1

    run(main)


# --------------------------------------------------------------------------------------------------------- planted bugs

PLANTED: dict[str, tuple[str, str, Callable[[], None]]] = {
    "an id is for any call": ("if done.call != call:", "if False:", test_an_id_is_for_one_call),
    "an id under way is for any call": (
        "{tx.call for tx in stalled if tx.request == request} - {call}",
        "False",
        test_an_id_is_for_one_call,
    ),
    "only the contract of a call counts": (
        "if done.call != call:",
        "if done.call[0] != to:",
        test_an_id_is_for_one_call,
    ),
    "what was answered is forgotten": ("if winner.request:", "if False:", test_asked_again_is_answered_and_not_sent),
    "a restart forgets": (
        "self.answered |= answered(history, self._chain_id, self.anchor)",
        "",
        test_asked_again_is_answered_and_not_sent,
    ),
    "a fee bump forgets": (
        "PendingTx(last.purpose, signed, self._sent.anchor, last.request)",
        "PendingTx(last.purpose, signed, self._sent.anchor)",
        lambda: test_a_request_outlives_a_fee_bump(False),
    ),
    "a fee bump forgets at a restart": (
        "PendingTx(last.purpose, signed, self._sent.anchor, last.request)",
        "PendingTx(last.purpose, signed, self._sent.anchor)",
        lambda: test_a_request_outlives_a_fee_bump(True),
    ),
    "a stuck one answers whoever asks": (
        "same = sent.request == request and (stalled.answers_equal_calls or bool(request))",
        "same = stalled.answers_equal_calls or bool(request)",
        test_a_stuck_one_does_not_answer_for_another_id,
    ),
    "a process that died takes its id along": (
        "(stalled.answers_equal_calls or bool(request))",
        "False",
        lambda: test_stuck_and_asked_again_lands_once(True),
    ),
    "two who ask at once know nothing of each other": (
        """        mine = self._underway[request] = (call, trio.Event())
        try:
            return (await self._send(purpose, *call, derived, request))[0]
        finally:
            del self._underway[request]
            mine[1].set()
""",
        "        return (await self._send(purpose, *call, derived, request))[0]\n",
        test_two_asks_at_once_are_one,
    ),
    "what was refused and kept is sent again": (
        "            await self._take_back()\n            stalled = bool",
        "            stalled = bool",
        lambda: test_what_a_server_refused_and_kept_lands_once("a", False, "before", pytest.MonkeyPatch()),
    ),
}


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
