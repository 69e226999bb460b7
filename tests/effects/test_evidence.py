"""A worker that signs one number twice is noticed and avoided, and both receipts are in the journal; an honest one never is.

Y5.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from node.chain.memory import MemoryChain
from node.cli.answer import receipt_data
from node.cli.output import dumps
from node.cli.slash_prove import read_receipt
from node.client.client import Client
from node.errors import ConfigError, VerificationFailed
from node.store.evidence import contradictions, receipts
from node.testing.cheaters import corrupt, reuse_number
from node.testing.market import Market, key, run_market
from node.worker.worker import Worker
from protocol import equivocation, escrow
from protocol.channel import ChannelState
from protocol.equivocation import Contradiction, SignedReceipt
from protocol.escrow import EscrowError
from protocol.ids import Hash32
from protocol.typed_data import Receipt

HELLO = [{"role": "user", "content": "hello there"}]


async def chat(client: Client) -> None:
    async with client.chat("fake", HELLO) as stream:
        await stream.text()


def channel(client: Client) -> ChannelState:
    (state,) = client.book.channels.values()
    return state


def avoided(client: Client, worker: Worker) -> bool:
    seen = client.history.get(worker.key.peer_id)
    return seen is not None and seen.failures > 0


def convicts(market: Market, client: Client, found: Contradiction) -> bool:
    """Whether the contracts do."""
    state, domain = channel(client), market.ledger.domain
    first, second = found.first, found.second
    signers = [state.config.receiver if equivocation.fault(found, state.config, domain) is None else None] * 2
    try:
        after = escrow.prove_equivocation(
            market.ledger.world.escrow,
            market.ledger.head.timestamp,
            client.wallet.payer.address,
            state.config,
            first.receipt,
            signers[0],
            second.receipt,
            signers[1],
        )
    except EscrowError:
        return False
    return state.config.receiver in after.convicted


def test_a_number_that_is_used_twice_is_noticed_and_both_receipts_convict() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        reuse_number(worker)
        await chat(client)
        assert client.evidence.told == [] and not avoided(client, worker)
        await chat(client)
        (text,) = client.evidence.told
        assert "number 1" in text and str(worker.key.address) in text and "slash prove" in text
        assert avoided(client, worker)
        assert channel(client).spent > 0, "what was delivered is paid all the same"
        (found,) = contradictions(client.book.ledger)
        assert convicts(market, client, found)

    run_market(test)


def test_it_is_noticed_by_a_client_that_was_started_anew() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client(name="c")
        reuse_number(worker)
        await chat(client)
        market.crash(client)
        back = await market.client(name="c", deposit=0)
        assert back.evidence.told == []
        await chat(back)
        assert len(back.evidence.told) == 1 and avoided(back, worker)
        (found,) = contradictions(back.book.ledger)
        assert convicts(market, back, found)

    run_market(test)


def test_a_refused_receipt_is_kept_and_convicts_with_the_one_that_comes_later() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        corrupt(worker, "wrong cost")  # signed with number 1, and refused
        with pytest.raises(VerificationFailed):
            await chat(client)
        assert [one.receipt.sequence for one in receipts(client.book.ledger)] == [1]
        assert contradictions(client.book.ledger) == []
        client.history.clear()
        reuse_number(worker)  # ... and now number 1 is for another job, and true
        await chat(client)
        assert len(client.evidence.told) == 1
        (found,) = contradictions(client.book.ledger)
        assert found.first.receipt.cost != found.second.receipt.cost and convicts(market, client, found)

    run_market(test)


def test_a_refused_one_is_noticed_by_a_client_that_was_started_anew() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client(name="c")
        reuse_number(worker)
        await chat(client)  # number 1, paid for
        market.crash(client)
        back = await market.client(name="c", deposit=0)
        reuse_number(worker, dearer=1)  # refused, and in the journal before anything is compared
        with pytest.raises(VerificationFailed):
            await chat(back)
        assert len(back.evidence.told) == 1 and avoided(back, worker)
        (found,) = contradictions(back.book.ledger)
        assert convicts(market, back, found)

    run_market(test)


def test_a_number_that_was_refused_before_the_start_is_known() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client(name="c")
        corrupt(worker, "wrong cost")
        with pytest.raises(VerificationFailed):
            await chat(client)
        market.crash(client)
        back = await market.client(name="c", deposit=0)
        back.history.clear()
        reuse_number(worker)  # number 1 rises above all that was paid for
        await chat(back)
        assert len(back.evidence.told) == 1

    run_market(test)


def test_parts_side_by_side_are_all_held_against_the_journal() -> None:
    async def test(market: Market) -> None:
        _, client = await market.worker(), await market.client(name="c")
        for _ in range(3):
            await chat(client)
        market.crash(client)
        back = await market.client(name="c", deposit=0)
        said: list[bool] = []

        async def compare(receipt: Receipt) -> None:
            said.append(await back.evidence.accepted(channel(back), receipt))

        async with trio.open_nursery() as nursery:
            for one in receipts(back.book.ledger, channel(back).channel_id):
                nursery.start_soon(compare, replace(one.receipt, cost=one.receipt.cost + 1))
        assert said == [True] * 3 and len(back.evidence.told) == 3

    run_market(test)


@pytest.mark.parametrize(
    "cheat", ["receipt signed by a stranger", "receipt for another channel", "receipt for another chain"]
)
def test_what_is_no_evidence_is_not_kept(cheat: str) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        corrupt(worker, cheat)
        with pytest.raises(VerificationFailed):
            await chat(client)
        assert list(receipts(client.book.ledger)) == []

    run_market(test)


def test_an_honest_worker_is_never_told_of() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client(name="c")
        for _ in range(3):
            await chat(client)
        market.crash(client)
        back = await market.client(name="c", deposit=0)
        for _ in range(2):
            await chat(back)
        assert back.evidence.told == [] and contradictions(back.book.ledger) == []
        held = list(receipts(back.book.ledger))
        assert len({one.receipt.sequence for one in held}) == len(held) == 5
        # The same receipt again says nothing, nor do two of one channel with two numbers.
        for pair in (Contradiction(held[0], held[0]), Contradiction(held[0], held[1])):
            assert not convicts(market, back, pair)
        assert isinstance(back.wallet.chain, MemoryChain) and not avoided(back, worker)

    run_market(test)


def test_why_two_receipts_prove_nothing() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(), await market.client()
        reuse_number(worker)
        await chat(client)
        await chat(client)
        (found,) = contradictions(client.book.ledger)
        state, domain = channel(client), market.ledger.domain
        first, second = found.first, found.second

        def why(one: SignedReceipt, other: SignedReceipt, config: object = state.config) -> str | None:
            return equivocation.fault(Contradiction(one, other), config, domain)  # type: ignore[arg-type]

        assert why(first, second) is None
        assert "say the same" in str(why(first, first))
        assert "number" in str(why(first, replace(second, receipt=replace(second.receipt, sequence=2))))
        assert "signed by" in str(why(first, replace(second, signature=key("x").sign(second.receipt.digest(domain)))))
        assert "signed by" in str(why(first, replace(second, receipt=replace(second.receipt, cost=7))))
        assert "is none" in str(why(replace(first, signature=bytes(65)), second))
        assert "not of this channel" in str(why(first, second, replace(state.config, salt=Hash32(b"\x09" * 32))))

    run_market(test)


def test_a_receipt_is_read_back_from_what_chat_prints(tmp_path: Path) -> None:
    async def test(market: Market) -> None:
        await market.worker()
        client = await market.client()
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        assert stream.receipt is not None
        line = dumps({"receipt": receipt_data(stream.receipt), "receipt_signature": stream.receipt_signature})
        path = tmp_path / "receipt.json"
        for text in (line, f'{{"text": "hi"}}\n{line}\n', line.replace(", ", ",\n  ")):
            path.write_text(text)
            assert read_receipt(path) == SignedReceipt(stream.receipt, stream.receipt_signature)
        for text in (
            "",
            "{}",
            "[1]",
            "[" * 100_000,
            line.replace("0x", "0y"),
            line.replace('"part": 0', '"part": "x"'),
        ):
            path.write_text(text)
            with pytest.raises(ConfigError, match="holds no receipt"):
                read_receipt(path)

    run_market(test)
