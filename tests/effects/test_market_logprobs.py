"""Log probabilities on the market: who offers them is asked, what is told comes whole, and a lie is somebody's fault by name."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio

from node.audit import audit
from node.errors import NodeError, NoWorker, Refused, VerificationFailed, WorkerFault
from node.ports import Step
from node.testing.cheaters import Hand, corrupt
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, run_market
from node.testing.pair import fake_row
from protocol.channel import Role
from protocol.digest import OutputDigest
from protocol.errors import RefusalReason
from protocol.logprobs import LOGPROBS_LIMIT, unpack
from protocol.messages import Accept, Ack, Chunk, Params, ReceiptMessage, Refuse, amount_from_wire
from protocol.selection import Exclusion, Policy
from protocol.tasks import ChatRequest

HELLO = [{"role": "user", "content": "hello there"}]


def telling(**settings: object) -> FakeBackend:
    return FakeBackend(FakeSettings(logprobs=True, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 5, LOGPROBS_LIMIT])
def test_every_token_comes_with_its_figures_which_the_receipt_signs(count: int) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(telling(tokens=40)), await market.client()
        told, ids, text, data = [], [], "", b""
        async with client.chat("fake", HELLO, logprobs=count) as stream:
            async for chunk in stream:
                told += chunk.logprobs
                ids += chunk.token_ids
                text, data = text + chunk.text, data + chunk.data
        assert len(ids) == 40 and [one.token_id for one in told] == ids
        assert data == b"".join(fake_row(token, count) for token in ids)
        assert all(one.logprob == pytest.approx(math.log(0.5)) and len(one.top) == count for one in told)
        receipt = stream.receipt
        assert receipt is not None
        digest = OutputDigest(receipt.job_id, 0)
        digest.extend(ids, text, data)
        assert receipt.output_digest == digest.value
        async with client.chat("fake", HELLO) as plain:
            assert {chunk.logprobs async for chunk in plain} == {()}
        assert plain.cost == stream.cost, "figures cost nothing"
        while worker.server.busy:
            await trio.sleep(0.01)
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
        assert await audit(client.book.ledger, Role.CLIENT, client.wallet.chains) == []

    run_market(test)


def test_a_worker_that_does_not_tell_them_is_not_asked_and_refuses() -> None:
    async def test(market: Market) -> None:
        silent = await market.worker()
        client = await market.client()
        with pytest.raises(NoWorker) as caught:
            async with client.chat("fake", HELLO, logprobs=2):
                pass
        assert list(caught.value.reasons.values()) == [(Exclusion.UNSUPPORTED_PARAM.value,)]
        hand = await Hand.of(client, silent, 400)
        talk = await hand.talk(hand.ask(params=Params(max_tokens=4, logprobs=2)))
        refused = await talk.until(Refuse)
        assert (refused.reason, refused.detail) == (RefusalReason.UNSUPPORTED_PARAM, "logprobs")
        able = await market.worker(telling())
        await client.meet(able.network.addresses[0])
        async with client.chat("fake", HELLO, logprobs=2) as stream:
            await stream.text()
        assert stream.worker == able.key.peer_id

    run_market(test)


def test_other_tasks_and_batch_jobs_have_no_place_for_them() -> None:
    async def test(market: Market) -> None:
        await market.worker(telling())
        client = await market.client()
        with pytest.raises(NodeError) as caught:
            await client.post_job("fake", ["one", "two"], max_tokens=8, logprobs=1)
        assert "logprobs: not in batch jobs" in str(caught.value) + str(getattr(caught.value, "reasons", ""))

    run_market(test)


def test_a_part_that_is_asked_for_again_has_the_same_figures_with_their_tokens() -> None:
    """From memory, in chunks of another size; nothing runs twice."""

    async def test(market: Market) -> None:
        backend = telling(tokens=2500)
        worker, client = await market.worker(backend), await market.client()
        hand = await Hand.of(client, worker, 100_000)
        ask = hand.ask(50_000, params=Params(max_tokens=2500, logprobs=LOGPROBS_LIMIT))
        heard = []
        for _ in range(2):
            talk = await hand.talk(ask)
            ids, rows, receipt = [], b"", None
            while receipt is None:
                message = await talk.receive()
                assert not isinstance(message, Refuse), message
                if isinstance(message, Chunk):
                    assert [one.token_id for one in unpack(message.token_ids, message.data)] == list(message.token_ids)
                    ids, rows = ids + list(message.token_ids), rows + message.data
                elif isinstance(message, ReceiptMessage):
                    receipt = message
                else:
                    assert isinstance(message, Accept)
            await talk.stream.reset()
            heard.append((ids, rows, receipt))
        assert heard[0] == heard[1] and len(heard[0][0]) == 2500
        assert backend.produced == 2500

    run_market(test)


def test_a_chat_that_goes_on_after_another_part_has_no_gap() -> None:
    """Tokens of an earlier worker in `resume`: figures go on with the next one, as if nothing had happened."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(telling(tokens=30)), await market.client()
        hand = await Hand.of(client, worker, 2_000)

        async def served(**fields: object) -> tuple[list[int], bytes]:
            talk = await hand.talk(hand.ask(1_500, params=Params(max_tokens=30, logprobs=3), **fields))
            ids: list[int] = []
            rows = b""
            while (message := await talk.until(Chunk, ReceiptMessage, Refuse)) is not None:
                if not isinstance(message, Chunk):
                    assert isinstance(message, ReceiptMessage), message
                    cost = amount_from_wire(message.receipt.cost)
                    hand_spent.append(cost)
                    voucher = hand.voucher(sum(hand_spent) + 1_500)
                    await talk.send(Ack(voucher.cumulative, voucher.signature))
                    break
                ids, rows = ids + list(message.token_ids), rows + message.data
            return ids, rows

        hand_spent: list[int] = []
        whole, figures = await served()
        rest = await served(part=1, resume=tuple(whole[:11]))
        assert len(whole) == 30 and rest == (whole[11:], figures[11 * (len(figures) // 30) :])

    run_market(test)


# ------------------------------------------------------------------------------------------------------------- faults


def first(change: Callable[[bytes], bytes]) -> Callable[[Step], Step]:
    return lambda step: replace(step, data=change(step.data))


WRONG: dict[str, Callable[[Step], Step]] = {
    "none": first(lambda row: b""),
    "one too many": first(lambda row: row + row),
    "another width": first(lambda row: row[:-8]),
    "NaN": first(lambda row: struct.pack("<f", float("nan")) + row[4:]),
    "+inf": first(lambda row: struct.pack("<f", float("inf")) + row[4:]),
    "above 0": first(lambda row: struct.pack("<f", 1.0) + row[4:]),
    "out of order": first(lambda row: row[:4] + row[-8:] + row[4:-8]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_runtime_that_computes_nonsense_is_the_workers_failure_and_costs_nothing(name: str) -> None:
    """C16."""

    async def test(market: Market) -> None:
        await market.worker(telling(change=WRONG[name]))
        client = await market.client()
        with pytest.raises(WorkerFault, match="the runtime's numbers are wrong"):
            async with client.chat("fake", HELLO, logprobs=3) as stream:
                await stream.text()
        assert stream.cost == 0

    run_market(test)


def test_a_runtime_that_tells_what_nobody_asked_for_fails_too() -> None:
    async def test(market: Market) -> None:
        await market.worker(telling(change=lambda step: replace(step, data=fake_row(step.token_ids[0], 1))))
        client = await market.client()
        with pytest.raises(WorkerFault, match="numbers where text was asked for"):
            async with client.chat("fake", HELLO) as stream:
                await stream.text()

    run_market(test)


@pytest.mark.parametrize("cheat", ["figures of NaN", "figures held back", "figures of other tokens", "figures doubled"])
def test_a_worker_that_lies_is_named_and_not_paid_for_it(cheat: str) -> None:
    """C16."""

    async def test(market: Market) -> None:
        worker = await market.worker(telling())
        client = await market.client()
        corrupt(worker, cheat)
        with pytest.raises(VerificationFailed, match=str(worker.key.peer_id)) as caught:
            async with client.chat("fake", HELLO, logprobs=3) as stream:
                await stream.text()
        assert "not paid for more" in str(caught.value)
        assert stream.usage.output_tokens == 0

    run_market(test)


def test_figures_that_are_not_those_that_were_signed_are_not_acknowledged() -> None:
    """Each of them possible: only the digest tells."""

    async def test(market: Market) -> None:
        worker = await market.worker(telling())
        client = await market.client()
        corrupt(worker, "other figures than signed")
        with pytest.raises(VerificationFailed, match="output_digest"):
            async with client.chat("fake", HELLO, logprobs=3) as stream:
                await stream.text()
        assert stream.receipt is None

    run_market(test)


def test_who_cannot_honour_them_says_so_to_the_choice() -> None:
    async def test(market: Market) -> None:
        await market.worker()
        client = await market.client()
        choice = client.choosing.explain("fake", ChatRequest(()), Params(logprobs=0), Policy())
        assert list(choice.rejected.values()) == [(Exclusion.UNSUPPORTED_PARAM,)]
        with pytest.raises((Refused, NoWorker)):
            async with client.chat("fake", HELLO, logprobs=0):
                pass

    run_market(test)
