"""The transaction sender against a node that loses, forgets, lies about and replaces transactions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from node.chain.eth import Eth
from node.chain.pending import PendingTx, unfinished
from node.chain.rpc import Reverted, RpcError, RpcUnavailable
from node.chain.tx_policy import TxPolicy
from node.chain.txs import TxSender
from node.chain.values import hex_data
from node.errors import ChainError, TxTimeout
from node.ports import ClaimEntry, TxResult
from node.signer.bare import Bare
from node.worker.claims import Claimer, ClaimPolicy
from protocol.channel import ChannelState, Role
from protocol.claiming import ClaimTerms
from protocol.ids import Address, ChannelId, Hash32, keccak256
from protocol.keys import PrivateKey
from protocol.transactions import SignedTransaction, Transaction, rlp
from protocol.typed_data import ChannelConfig, Domain

KEY = PrivateKey(b"\x07" * 32)
TO = Address(b"\x22" * 20)
CHAIN = 31337


def by_key(transaction: Transaction) -> SignedTransaction:
    return transaction.signed(KEY.sign(transaction.digest()))


POLICY = TxPolicy(poll=0.01, bump_after=10.0, give_up_after=100.0)


def nonce_of(raw: bytes) -> int:
    """Nonce of our own encoding: the second item, after a chain id of two bytes."""
    body = raw[1:]
    start = 1 if body[0] <= 0xF7 else 1 + body[0] - 0xF7
    assert body[start] == 0x82
    byte = body[start + 3]
    return 0 if byte == 0x80 else byte


class FakeNode:
    """A node with one account. `mine_at_once` mines what it takes; faults are queued in `on_send`."""

    def __init__(self) -> None:
        self.pool: dict[bytes, bytes] = {}
        self.mined: dict[bytes, int] = {}
        self.nonce = 0
        self.height = 100
        self.mine_at_once = True
        self.on_send: list[Callable[[bytes], None]] = []
        self.sent: list[bytes] = []
        self.calls: list[str] = []
        self.estimate: Callable[[], str] = lambda: "0x5208"
        self.status = "0x1"
        self.down = False

    def take(self, raw: bytes) -> None:
        number = nonce_of(raw)
        tx = keccak256(raw)
        if tx in self.pool or tx in self.mined:
            raise RpcError("send", -32000, "already known", None)
        if number < self.nonce:
            raise RpcError("send", -32000, "nonce too low", None)
        self.pool = {h: r for h, r in self.pool.items() if nonce_of(r) != number}  # replacement
        self.pool[tx] = raw
        if self.mine_at_once:
            self.mine()

    def mine(self) -> None:
        for tx, raw in sorted(self.pool.items(), key=lambda item: nonce_of(item[1])):
            if nonce_of(raw) == self.nonce:
                self.height += 1
                self.mined[tx] = self.height
                self.nonce += 1
                del self.pool[tx]

    async def submit(self, method: str, *params: Any) -> Any:
        await trio.lowlevel.checkpoint()
        raw = bytes.fromhex(params[0][2:])
        self.sent.append(raw)
        if self.on_send:
            self.on_send.pop(0)(raw)
            return hex_data(keccak256(raw))
        self.take(raw)
        return hex_data(keccak256(raw))

    async def call(self, method: str, *params: Any) -> Any:
        await trio.lowlevel.checkpoint()
        self.calls.append(method)
        if self.down:
            raise RpcUnavailable("down")
        match method:
            case "eth_estimateGas":
                return self.estimate()
            case "eth_getBlockByNumber":
                h = hex(self.height)
                block = keccak256(h.encode()).hex()
                return {
                    "number": h,
                    "hash": "0x" + block,
                    "parentHash": "0x" + block,
                    "timestamp": "0x1",
                    "baseFeePerGas": hex(10**9),
                }
            case "eth_getTransactionCount":
                return hex(self.nonce + (len(self.pool) if params[1] == "pending" else 0))
            case "eth_getTransactionByHash":
                tx = bytes.fromhex(params[0][2:])
                return {} if tx in self.pool or tx in self.mined else None
            case "eth_getTransactionReceipt":
                tx = bytes.fromhex(params[0][2:])
                if tx not in self.mined:
                    return None
                return {
                    "transactionHash": params[0],
                    "blockNumber": hex(self.mined[tx]),
                    "blockHash": params[0],
                    "gasUsed": "0x5208",
                    "status": self.status,
                    "contractAddress": None,
                }
            case "eth_call":
                raise Reverted(method, 3, "execution reverted", b"\x01\x02\x03\x04")
        raise AssertionError(method)


class Journal:
    def __init__(self, node: FakeNode) -> None:
        self.records: list[tuple[str, Mapping[str, Any]]] = []
        self.sends_before: list[int] = []
        self._node = node

    async def __call__(self, kind: str, subject: bytes, body: Mapping[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        assert subject == KEY.address
        self.records.append((kind, body))
        self.sends_before.append(len(self._node.sent))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.records]


def run(main: Callable[[FakeNode, Journal, TxSender], Awaitable[None]], policy: TxPolicy = POLICY) -> None:
    node = FakeNode()
    journal = Journal(node)
    sender = TxSender(Eth(node), Bare(KEY), CHAIN, journal=journal, error_name=lambda data: data.hex(), policy=policy)

    async def timed() -> None:
        with trio.fail_after(3600):
            await main(node, journal, sender)

    trio.run(timed, clock=trio.testing.MockClock(autojump_threshold=0))


def unavailable(raw: bytes) -> None:
    raise RpcUnavailable("timed out")


def test_journaled_before_it_is_sent_and_closed_by_its_receipt() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        for n in range(3):
            result = await sender.send("pay", TO, b"", 1)
            assert result.ok and result.hash == keccak256(node.sent[n]) and result.gas_used == 21_000
        assert journal.kinds == ["tx_signed", "tx_final"] * 3
        assert journal.sends_before == [0, 1, 1, 2, 2, 3]
        assert [nonce_of(raw) for raw in node.sent] == [0, 1, 2]
        assert unfinished(journal.records, CHAIN) == []

    run(main)


def test_tasks_share_one_sequence_of_nonces() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(sender.send, "pay", TO, b"", 1)
            while len(node.sent) < 20:
                await trio.sleep(0.01)
            assert [nonce_of(raw) for raw in node.sent] == list(range(20))
            node.mine()
        assert node.nonce == 20

    run(main)


def test_an_expected_revert_costs_nothing() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        def revert() -> str:
            raise Reverted("eth_estimateGas", 3, "execution reverted", b"\xaa\xbb\xcc\xdd")

        node.estimate = revert
        result = await sender.send("pay", TO, b"")
        assert not result.ok and result.error == "aabbccdd" and result.hash == b"" and result.gas_used == 0
        assert node.sent == [] and journal.records == []

    run(main)


def test_a_revert_on_chain_is_named() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.status = "0x0"
        result = await sender.send("pay", TO, b"")
        assert not result.ok and result.error == "01020304" and result.hash == keccak256(node.sent[0])
        assert journal.records[-1][1]["ok"] is False

    run(main)


def test_a_timeout_that_landed_is_not_sent_again() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        def landed(raw: bytes) -> None:
            node.take(raw)
            raise RpcUnavailable("timed out")

        node.on_send = [landed]
        result = await sender.send("pay", TO, b"")
        assert result.ok and len(node.sent) == 1 and node.nonce == 1

    run(main)


def test_a_timeout_that_did_not_land_is_sent_again_unchanged() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.on_send = [unavailable, unavailable]
        result = await sender.send("pay", TO, b"")
        assert result.ok and len(node.sent) == 3 and len(set(node.sent)) == 1 and node.nonce == 1

    run(main)


def test_already_known_is_not_an_error() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        def known(raw: bytes) -> None:
            node.take(raw)
            node.take(raw)

        node.on_send = [known]
        node.mine_at_once = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send, "pay", TO, b"")
            await trio.sleep(1)
            node.mine()
        assert journal.kinds == ["tx_signed", "tx_final"] and len(node.sent) == 1

    run(main)


def test_nonce_too_low_for_our_own_landed_transaction_is_success() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        def landed(raw: bytes) -> None:
            node.take(raw)
            raise RpcError("send", -32000, "nonce too low", None)

        node.on_send = [landed]
        assert (await sender.send("pay", TO, b"")).ok
        assert len(node.sent) == 1

    run(main)


def test_a_nonce_taken_by_another_program_is_given_up_for_the_next() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        assert (await sender.send("first", TO, b"")).ok

        def stolen(raw: bytes) -> None:
            node.nonce = 5  # the same key sent four transactions elsewhere, since we asked
            node.take(raw)

        node.on_send = [stolen]
        result = await sender.send("second", TO, b"")
        assert result.ok and nonce_of(node.sent[-1]) == 5
        assert journal.kinds == ["tx_signed", "tx_final", "tx_signed", "tx_dropped", "tx_signed", "tx_final"]
        assert unfinished(journal.records, CHAIN) == []

    run(main)


def test_a_refused_transaction_gives_its_nonce_back() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        def refuse(raw: bytes) -> None:
            raise RpcError("send", -32000, "insufficient funds", None)

        node.on_send = [refuse]
        with pytest.raises(RpcError, match="insufficient funds"):
            await sender.send("poor", TO, b"")
        assert journal.kinds == ["tx_signed", "tx_dropped"]
        assert (await sender.send("rich", TO, b"")).ok
        assert [nonce_of(raw) for raw in node.sent] == [0, 0]

    run(main)


def test_a_forgotten_transaction_is_sent_again() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send, "pay", TO, b"")
            await trio.sleep(1)
            node.pool.clear()  # evicted
            node.mine_at_once = True
        assert len(node.sent) == 2 and node.sent[0] == node.sent[1] and node.nonce == 1

    run(main)


def test_a_stuck_transaction_is_replaced_with_higher_fees() -> None:
    results = []

    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False

        async def send() -> None:
            results.append(await sender.send("pay", TO, b""))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(25)  # two bumps
            node.mine()
        bodies = [body for kind, body in journal.records if kind == "tx_signed"]
        fees = [int(body["max_fee"]) for body in bodies]
        tips = [int(body["tip"]) for body in bodies]
        assert len(fees) == 3 and {body["nonce"] for body in bodies} == {0}
        assert all(b * 1000 >= a * 1125 for a, b in pairwise(fees))
        assert all(b * 1000 >= a * 1125 for a, b in pairwise(tips))
        assert results[0].hash == keccak256(node.sent[-1]) and unfinished(journal.records, CHAIN) == []

    run(main)


def test_the_first_attempt_may_win_over_its_replacement() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send, "pay", TO, b"")
            await trio.sleep(15)  # one bump
            node.pool = {keccak256(node.sent[0]): node.sent[0]}  # a miner had the first one
            node.mine()
        assert journal.records[-1][1]["hash"] == keccak256(node.sent[0]).hex()

    run(main)


def test_fees_never_pass_the_cap() -> None:
    cap = 4 * 10**9

    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        with pytest.raises(TxTimeout):
            await sender.send("pay", TO, b"")
        fees = [int(body["max_fee"]) for kind, body in journal.records if kind == "tx_signed"]
        assert len(fees) > 1 and max(fees) <= cap
        assert len(unfinished(journal.records, CHAIN)) == len(fees)

    run(main, TxPolicy(poll=0.5, bump_after=10, give_up_after=200, max_fee=cap))


def test_a_call_tried_again_after_its_timeout_is_not_sent_twice() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        for _ in range(3):
            with pytest.raises(TxTimeout):
                await sender.send("claim", TO, b"\x01")
        with pytest.raises(TxTimeout):  # another call does not queue up behind the stuck nonce
            await sender.send("settle", TO, b"\x02")
        assert {nonce_of(raw) for raw in node.sent} == {0} and node.nonce == 0
        node.mine()
        assert node.nonce == 1
        result = await sender.send("claim", TO, b"\x01")
        assert result.ok and result.hash == keccak256(node.sent[-1]) and node.nonce == 1
        node.mine_at_once = True
        assert (await sender.send("claim", TO, b"\x01")).ok and node.nonce == 2  # that wait is over: a call of its own
        assert unfinished(journal.records, CHAIN) == []

    run(main, TxPolicy(poll=0.5, bump_after=10, give_up_after=30))


def test_a_stalled_transaction_whose_nonce_was_taken_is_sent_anew() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        with pytest.raises(TxTimeout):
            await sender.send("claim", TO, b"\x01")
        node.pool.clear()
        node.nonce, node.mine_at_once = 1, True
        assert (await sender.send("claim", TO, b"\x01")).ok
        assert nonce_of(node.sent[-1]) == 1 and unfinished(journal.records, CHAIN) == []

    run(main, TxPolicy(poll=0.5, bump_after=10, give_up_after=30))


def test_what_does_not_land_at_a_restart_does_not_hold_up_the_start() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        assert await sender.resume(crashed(node)) == []
        node.mine()
        node.mine_at_once = True
        assert (await sender.send("next", TO, b"")).ok and node.nonce == 3

    run(main)


def test_a_claimer_goes_on_over_a_claim_that_is_never_mined() -> None:
    """`TxTimeout` is the chain's trouble like any other: the loop survives it, and its next rounds resume the same claim."""

    class Chain:
        def __init__(self, sender: TxSender) -> None:
            self.sender, self.rounds, self.domain = sender, 0, Domain(CHAIN, TO)

        async def claim(self, entries: Sequence[ClaimEntry]) -> TxResult:
            return await self.sender.send("claim", TO, b"".join(entry.amount.to_bytes(16) for entry in entries))

        async def owed(self, receiver: Address, token: Address) -> int:
            return 0

        async def fee(self) -> int:
            return 1

        async def catch_up(self) -> None:
            self.rounds += 1
            await self.sender.catch_up()

    state = ChannelState(
        Role.WORKER,
        ChannelId(b"\x05" * 32),
        ChannelConfig(TO, TO, KEY.address, KEY.address, TO, 3600, Hash32(bytes(32))),
        authorized=1000,
        valid_before=0,
        allocation_signature=b"",
        allocated=1000,
        cumulative=500,
        spent=500,
        voucher_signature=b"\x01" * 65,
        domain=Domain(CHAIN, TO),
    )

    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        chain, channels = Chain(sender), {state.channel_id: state}

        async def follow(channel_id: ChannelId) -> None:
            if "tx_final" in journal.kinds:
                channels[channel_id] = replace(state, claimed=500)

        claimer = Claimer(
            book=cast(Any, SimpleNamespace(channels=channels)),
            chain=cast(Any, chain),
            policy=ClaimPolicy(ClaimTerms(minimum=1), every_s=1000, retry_s=5),
            follow=follow,
            now_s=trio.current_time,
            receiver=KEY.address,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(claimer.run)
            while chain.rounds < 4:
                await trio.sleep(1)
            assert {nonce_of(raw) for raw in node.sent} == {0}
            node.mine()
            while not channels[state.channel_id].claimed:
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert node.nonce == 1 and unfinished(journal.records, CHAIN) == []

    run(main, TxPolicy(poll=0.5, bump_after=10, give_up_after=30))


def test_a_node_that_goes_away_while_waiting_is_waited_for() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send, "pay", TO, b"")
            await trio.sleep(1)
            node.down = True
            await trio.sleep(30)
            node.down = False
            node.mine()
        assert journal.kinds[-1] == "tx_final"

    run(main)


def test_what_a_reorganisation_threw_out_is_sent_again_first() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        for _ in range(3):
            await sender.send("pay", TO, b"", 1)
        node.nonce, node.mined = 1, {keccak256(node.sent[0]): 101}
        assert (await sender.send("next", TO, b"", 1)).ok
        assert [nonce_of(raw) for raw in node.sent] == [0, 1, 2, 1, 2, 3]
        assert node.sent[1:3] == node.sent[3:5] and node.nonce == 4

    run(main)


def test_another_transaction_at_our_nonce_is_an_error_that_says_so() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.mine_at_once = False

        async def steal() -> None:
            await trio.sleep(1)
            node.pool.clear()
            node.nonce = 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(steal)
            with pytest.raises(ChainError, match="took nonce 0"):
                await sender.send("pay", TO, b"")
        assert unfinished(journal.records, CHAIN) == []

    run(main)


def test_confirmations_are_waited_for() -> None:
    done = trio.Event()

    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        async def send() -> None:
            await sender.send("pay", TO, b"")
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(1)
            assert not done.is_set()
            node.height += 2
            await trio.sleep(1)
            assert done.is_set()

    run(main, TxPolicy(poll=0.1, confirmations=2))


def crashed(node: FakeNode) -> list[tuple[str, Mapping[str, Any]]]:
    """Journal of a program that ended between the journal and the send, twice in a row."""
    records = []
    for nonce in (0, 1):
        signed = by_key(Transaction(CHAIN, nonce, 10**9, 3 * 10**9, 30_000, TO, 1, b"\x01"))
        records.append(("tx_signed", PendingTx("pay", signed).to_body()))
    return records


def test_a_restart_sends_what_the_node_has_not_seen() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        history = crashed(node)
        pending = unfinished(history, CHAIN)
        node.take(pending[0].signed.raw)  # the first had reached it
        results = await sender.resume(history)
        assert [result.hash for result in results] == [tx.signed.hash for tx in pending] and node.nonce == 2
        assert node.sent == [pending[1].signed.raw]
        assert (await sender.send("next", TO, b"")).ok and nonce_of(node.sent[-1]) == 2

    run(main)


def test_a_restart_drops_what_another_transaction_replaced() -> None:
    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        node.nonce = 7
        assert await sender.resume(crashed(node)) == []
        assert journal.kinds == ["tx_dropped", "tx_dropped"]

    run(main)


def test_cancelled_between_journal_and_send_keeps_its_nonce() -> None:
    """N4: it may be out, so its nonce is its own; the next call, though equal, is another one."""

    async def main(node: FakeNode, journal: Journal, sender: TxSender) -> None:
        with trio.CancelScope() as scope:

            def cancel(raw: bytes) -> None:
                scope.cancel()
                raise RpcUnavailable("gone")

            node.on_send = [cancel]
            await sender.send("pay", TO, b"")
        assert scope.cancelled_caught and len(unfinished(journal.records, CHAIN)) == 1
        assert (await sender.send("again", TO, b"")).ok
        assert [nonce_of(raw) for raw in node.sent] == [0, 0, 1] and unfinished(journal.records, CHAIN) == []
        assert node.sent[0] == node.sent[1]

    run(main)


def test_a_damaged_journal_record_is_refused() -> None:
    body = dict(crashed(FakeNode())[0][1])
    for key, bad in (("to", "0x12"), ("nonce", "x"), ("raw", "zz"), ("tip", None)):
        with pytest.raises(ChainError):
            PendingTx.from_body({**body, key: bad})
    del body["hash"]
    with pytest.raises(ChainError):
        PendingTx.from_body(body)


def test_transactions_are_byte_for_byte_those_of_eth_account() -> None:
    eth_account = pytest.importorskip("eth_account")
    cases = [(None, 0, b"\x60\x00"), (TO, 0, b""), (TO, 10**30, b"\x00" * 300), (TO, 127, b"\x7f"), (TO, 128, b"\x80")]
    for nonce, (to, value, data) in enumerate(cases):
        ours = by_key(Transaction(CHAIN, nonce * 100, 10**9, 3 * 10**9, 21_000 + nonce, to, value, data))
        fields = {
            "type": 2,
            "chainId": CHAIN,
            "nonce": nonce * 100,
            "maxPriorityFeePerGas": 10**9,
            "maxFeePerGas": 3 * 10**9,
            "gas": 21_000 + nonce,
            "value": value,
            "data": data,
        }
        if to is not None:
            fields["to"] = str(to)
        theirs = eth_account.Account.sign_transaction(fields, KEY.secret_bytes())
        assert ours.raw == bytes(theirs.raw_transaction) and ours.hash == bytes(theirs.hash)


def test_rlp_known_answers() -> None:
    # Ethereum wiki, "RLP", examples.
    assert rlp([b"cat", b"dog"]) == bytes.fromhex("c88363617483646f67")
    assert rlp(b"") == b"\x80" and rlp(0) == b"\x80" and rlp(15) == b"\x0f" and rlp(1024) == b"\x82\x04\x00"
    assert rlp([[], [[]], [[], [[]]]]) == bytes.fromhex("c7c0c1c0c3c0c1c0")
    long = b"Lorem ipsum dolor sit amet, consectetur adipisicing elit"
    assert rlp(long) == b"\xb8\x38" + long


def test_one_journal_holds_the_transactions_of_several_chains() -> None:
    """Nonces are counted per chain: an end on one chain is no end of the same nonce on another."""

    def signed(chain_id: int, nonce: int) -> PendingTx:
        return PendingTx("pay", by_key(Transaction(chain_id, nonce, 10**9, 3 * 10**9, 30_000, TO, 1, b"\x01")))

    here, there, later = signed(CHAIN, 0), signed(CHAIN + 1, 0), signed(CHAIN + 1, 1)
    records = [("tx_signed", tx.to_body()) for tx in (here, there, later)]
    assert unfinished(records, CHAIN) == [here]
    assert unfinished(records, CHAIN + 1) == [there, later]
    records.append(("tx_final", {"nonce": 0, "hash": there.signed.hash.hex()}))
    assert unfinished(records, CHAIN) == [here]
    assert unfinished(records, CHAIN + 1) == [later]
    records.append(("tx_dropped", {"nonce": 1, "hash": later.signed.hash.hex()}))
    assert unfinished(records, CHAIN) == [here] and unfinished(records, CHAIN + 1) == []
    assert unfinished(records, CHAIN + 2) == []
