"""Cheats on tasks beyond chat: workers that lie about numbers and input, clients that stream what they may not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import trio

from node.audit import audit
from node.errors import VerificationFailed, WorkerFault
from node.ports import StreamClosed
from node.testing.cheaters import TASK_CHEATS, Hand, Talk, corrupt
from node.testing.fake_tasks import SECOND, FakeTasks, FakeTaskSettings, fake_model
from node.testing.market import Market, run_market
from node.worker.intake import Intake
from node.worker.part import ServedPart
from protocol.channel import Role
from protocol.errors import WireCode
from protocol.messages import Abort, Accept, Chunk, Input, JobConversation
from protocol.pricing import cost
from protocol.tasks import INPUT_BYTES, Audio, EmbedRequest, Image, OcrRequest, Task, TranscribeRequest

TEXTS = ("hello there", "you", "a mill turns")
SIZE = 20 * SECOND

# ----------------------------------------------------------------------------------------------------------- workers

ABOUT_SOUND = {
    "more input than was sent",
    "more units than the media have",
    "another request in the receipt",
}


@pytest.mark.parametrize("cheat", TASK_CHEATS)
def test_a_cheat_is_named_and_unpaid(cheat: str) -> None:
    """C15."""

    async def test(market: Market) -> None:
        liar = await market.worker(tasks=FakeTasks())
        corrupt(liar, cheat)
        client = await market.client()
        heard = cheat in ABOUT_SOUND
        request = TranscribeRequest(Audio(bytes(3 * SECOND), SIZE)) if heard else EmbedRequest(TEXTS)

        async def source() -> Any:
            yield bytes(2 * SECOND)

        with pytest.raises(VerificationFailed) as caught:
            async with client.run("fake-transcribe" if heard else "fake-embed", request, source()) as stream:
                async for _ in stream:
                    pass
        assert str(liar.key.peer_id) in str(caught.value)
        (state,) = client.book.channels.values()
        assert not state.open_jobs and state.spent <= cost(market.price, 500, 5)
        assert client.history[liar.key.peer_id].failures == 1
        assert await audit(client.book.ledger, Role.CLIENT, client.wallet.chains) == []

    run_market(test)


# ----------------------------------------------------------------------------------------------------------- clients


async def accepted(hand: Hand, cumulative: int = 9_000, request: Any = None, **fields: Any) -> Talk:
    """A stream on which an honest ask for live audio, or for another request, was accepted."""
    asked = request or TranscribeRequest(Audio(b"", SIZE))
    ask = hand.ask(cumulative, model_id=bytes(fake_model(Task.TRANSCRIBE)), request=asked, **fields)
    talk = await hand.talk(ask)
    answer = await talk.receive()
    assert isinstance(answer, Accept), answer
    return talk


async def end(talk: Talk) -> WireCode:
    message = await talk.until(Abort)
    assert message is not None, "the stream ended without a word"
    return WireCode(message.code)


async def say(talk: Talk, *messages: JobConversation) -> None:
    """As far as the worker hears them: it may end job and stream at any of them; its last words are for `end`."""
    with suppress(StreamClosed):
        for message in messages:
            await talk.send(message)


Attack = Callable[[Hand], Awaitable[Talk]]


async def beyond_the_size(hand: Hand) -> Talk:
    talk = await accepted(hand, request=TranscribeRequest(Audio(b"", SECOND)))
    await say(talk, Input(1, bytes(SECOND)), Input(2, b"ab"))
    return talk


async def for_ever(hand: Hand) -> Talk:
    """As long as the worker takes it, and always one message more."""
    talk = await accepted(hand)
    last = SIZE // SECOND + 1
    for n in range(1, last):
        await say(talk, Input(n, bytes(SECOND)))
        await talk.until(Chunk)
    await say(talk, Input(last, bytes(SECOND)))
    return talk


async def after_the_last(hand: Hand) -> Talk:
    talk = await accepted(hand)
    await say(talk, Input(1, bytes(640), last=True), Input(2, bytes(640)))
    return talk


async def never_the_last(hand: Hand) -> Talk:
    talk = await accepted(hand)
    await talk.send(Input(1, bytes(640)))
    return talk


async def nothing_at_all(hand: Hand) -> Talk:
    return await accepted(hand)


async def drop_by_drop(hand: Hand) -> Talk:
    """Always in time, and never enough: the place would be held for a day."""
    talk = await accepted(hand)
    n = 0
    with trio.move_on_after(5):
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                while isinstance(message := await talk.receive(), Chunk):
                    pass
                talk._ready[:0] = [message] if message else []
                nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            while True:
                n += 1
                await say(talk, Input(n, b"ab"))
                await trio.sleep(0.05)
    return talk


async def a_gap(hand: Hand) -> Talk:
    talk = await accepted(hand)
    await talk.send(Input(2, bytes(640)))
    return talk


async def half_a_sample(hand: Hand) -> Talk:
    talk = await accepted(hand)
    await talk.send(Input(1, bytes(641)))
    return talk


async def too_far_ahead(hand: Hand) -> Talk:
    """The runtime is slow and the client does not wait."""
    talk = await accepted(hand, 90_000)
    await say(talk, *(Input(n, bytes(INPUT_BYTES)) for n in range(1, 9)))
    return talk


async def for_vectors(hand: Hand) -> Talk:
    ask = hand.ask(9_000, model_id=bytes(fake_model(Task.EMBED)), request=EmbedRequest(TEXTS * 99))
    talk = await hand.talk(ask)
    assert isinstance(await talk.receive(), Accept)
    await talk.send(Input(1, b"ab"))
    return talk


async def before_the_acceptance(hand: Hand) -> Talk:
    ask = hand.ask(9_000, model_id=bytes(fake_model(Task.TRANSCRIBE)), request=TranscribeRequest(Audio(b"", SIZE)))
    return await hand.talk(Input(1, bytes(640)), ask)


async def unpaid(hand: Hand) -> Talk:
    talk = await accepted(hand, 10)
    await say(talk, *(Input(n, bytes(6_400)) for n in range(1, 13)))
    return talk


async def paid_in_crumbs(hand: Hand) -> Talk:
    talk = await accepted(hand, 1_000)
    await say(talk, Input(1, bytes(3_200)), *(hand.voucher(1_000 + n) for n in range(1, 9)))
    return talk


async def paid_with_less(hand: Hand) -> Talk:
    talk = await accepted(hand, 1_000)
    await say(talk, Input(1, bytes(3_200)), hand.voucher(999))
    return talk


ATTACKS: dict[str, tuple[Attack, WireCode]] = {
    "beyond the declared size": (beyond_the_size, WireCode.BAD_INPUT),
    "for ever": (for_ever, WireCode.BAD_INPUT),
    "after the last": (after_the_last, WireCode.BAD_INPUT),
    "never the last": (never_the_last, WireCode.BAD_INPUT),
    "nothing at all": (nothing_at_all, WireCode.BAD_INPUT),
    "drop by drop": (drop_by_drop, WireCode.BAD_INPUT),
    "a gap": (a_gap, WireCode.BAD_INPUT),
    "half a sample": (half_a_sample, WireCode.BAD_INPUT),
    "too far ahead": (too_far_ahead, WireCode.BAD_INPUT),
    "for vectors": (for_vectors, WireCode.BAD_INPUT),
    "before the acceptance": (before_the_acceptance, WireCode.UNEXPECTED),
    "unpaid": (unpaid, WireCode.UNPAID),
    "paid in crumbs": (paid_in_crumbs, WireCode.BAD_VOUCHER),
    "paid with less": (paid_with_less, WireCode.BAD_VOUCHER),
}


WAITED_OUT = {"never the last", "nothing at all", "drop by drop", "unpaid"}
"""What only the worker's patience ends. It is short for these alone: the others are refused at once, however slow the machine."""


@pytest.mark.parametrize("name", ATTACKS)
def test_input_that_may_not_be_ends_the_job_and_nothing_else(name: str) -> None:
    """C14."""
    attack, code = ATTACKS[name]

    async def test(market: Market) -> None:
        slow = 0.02 if name in ("after the last", "for vectors") else 1.0 if name == "too far ahead" else 0.0
        tasks = FakeTasks(FakeTaskSettings(seconds_per_step=slow))
        patience = {"stall_ms": 200} if name in WAITED_OUT else {}
        worker = await market.worker(tasks=tasks, settings=market.settings(**patience))
        client = await market.client()
        hand = await Hand.of(client, worker)
        talk = await attack(hand)
        with trio.fail_after(3):
            assert await end(talk) is code
        while worker.server.busy:
            await trio.sleep(0.01)
        state = worker.book.channels[hand.state.channel_id]
        assert not state.open_jobs and tasks.free_slots == 64
        assert state.spent <= state.cumulative + worker.accepted.credit(state)
        assert tasks.heard <= SIZE
        if name == "unpaid":  # nothing is computed on what is not covered but for the credit window
            assert cost(market.price, tasks.heard // 320, 0) <= 10 + worker.accepted.credit(state)
            assert state.spent <= 10 + worker.accepted.credit(state)
        tasks.settings.seconds_per_step = 0.0
        await (await market.client()).embed("fake-embed", TEXTS)
        while worker.server.busy:
            await trio.sleep(0.01)
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
        assert worker.network.stats.handler_errors == 0

    run_market(test)


def test_a_fault_that_comes_while_something_else_is_sent_ends_the_job_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """News of an end that nobody waits for yet must not be waited for afterwards."""
    real = Intake.tell

    async def slow(intake: Intake) -> None:
        await real(intake)
        await trio.sleep(0.1)

    monkeypatch.setattr(Intake, "tell", slow)
    test_input_that_may_not_be_ends_the_job_and_nothing_else("paid with less")


def test_input_that_comes_as_the_patience_ends_is_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both can be due in one turn of the scheduler. Then the input is there, paid for, and nobody is to blame."""
    real = ServedPart.changed

    async def as_time_is_up(part: ServedPart, until: float | None = None) -> bool:
        sent = part.machine.inputs.sent
        return await real(part, until) and part.machine.inputs.sent == sent

    monkeypatch.setattr(ServedPart, "changed", as_time_is_up)

    async def source() -> Any:
        for _ in range(8):
            await trio.sleep(0.01)
            yield bytes(SECOND)

    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()
        async with client.run("fake-transcribe", TranscribeRequest(Audio(b"", SIZE)), source()) as stream:
            words = (await stream.text()).split()
        assert stream.receipt is not None and len(words) == 8
        while worker.server.busy:
            await trio.sleep(0.01)
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []

    run_market(test)


def test_what_does_not_decode_is_the_clients_fault_and_is_charged() -> None:
    async def test(market: Market) -> None:
        tasks = FakeTasks(FakeTaskSettings(unreadable=True))
        worker, client = await market.worker(tasks=tasks), await market.client()
        head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (300).to_bytes(4) + (200).to_bytes(4)
        with pytest.raises(WorkerFault, match="bad_input"):
            async with client.run("fake-ocr", OcrRequest(Image(head, len(head), "image/png"))) as stream:
                await stream.text()
        while worker.server.busy:
            await trio.sleep(0.01)
        (ours,), (theirs,) = client.book.channels.values(), worker.book.channels.values()
        assert ours.spent == theirs.spent == cost(market.price, 2, 0) == stream.cost

    run_market(test)
