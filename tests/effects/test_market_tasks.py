"""Tasks beyond chat on a market in memory: the same conversation, the same money, whatever is asked for."""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import trio

from node.audit import audit
from node.client.chat import ChatStream
from node.client.client import Client
from node.errors import ConfigError, NodeError, NoWorker, Refused, WorkerFault
from node.ports import Step
from node.testing.cheaters import Hand
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.fake_tasks import (
    DIMENSIONS,
    SECOND,
    FakeTasks,
    FakeTaskSettings,
    fake_model,
    read_of,
    score_of,
    vector_of,
    words_of,
)
from node.testing.market import Market, run_market
from node.testing.rounds import RoundTrips
from node.worker.worker import Worker
from protocol.channel import ChannelState, Role
from protocol.digest import InputDigest
from protocol.errors import RefusalReason
from protocol.messages import FinishReason, Input, ReceiptMessage, Refuse, request_hash
from protocol.pricing import Price, cost
from protocol.tasks import (
    IMAGE_LIMIT,
    PIECE_BYTES,
    Audio,
    EmbedRequest,
    Task,
    TranscribeRequest,
    sample_request,
)

TEXTS = ["hello there", "you", "a mill turns by the river"]
HELLO = [{"role": "user", "content": "hello there"}]


def audio(seconds: float) -> bytes:
    """Samples that no two seconds have in common."""
    count = int(seconds * SECOND) // 2 * 2
    return b"".join(hashlib.sha256(n.to_bytes(8)).digest() for n in range(count // 32 + 1))[:count]


def png(size: int, width: int = 300, height: int = 200) -> bytes:
    """Bytes with the header of a PNG: the fake looks no further."""
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + width.to_bytes(4) + height.to_bytes(4)
    return head + hashlib.shake_256(head).digest(size - len(head))


async def live(data: bytes, *, piece: int = 6_400, pause: float = 0.0) -> AsyncIterator[bytes]:
    for start in range(0, len(data), piece):
        await trio.sleep(pause)
        yield data[start : start + piece]


def the_channel(node: Worker | Client) -> ChannelState:
    (state,) = node.book.channels.values()
    return state


async def idle(worker: Worker) -> None:
    while worker.server.busy:
        await trio.sleep(0.01)


async def sound(worker: Worker, client: Client) -> None:
    """Both sides count the same, both journals audit clean, and the chain pays exactly that."""
    await idle(worker)
    ours, theirs = the_channel(client), the_channel(worker)
    assert ours.spent == theirs.spent <= theirs.cumulative == ours.cumulative <= theirs.allocated
    assert not ours.open_jobs and not theirs.open_jobs
    assert worker.server.tasks is not None and worker.server.tasks.free_slots == 64
    if theirs.spent:
        assert (await worker.claim()).claimed == {theirs.channel_id: theirs.spent}
    await client.wallet.refresh(ours.channel_id)
    await worker.channels.refresh(ours.channel_id)
    await worker.ledger.write(lambda connection: None)
    assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
    assert await audit(client.book.ledger, Role.CLIENT, client.wallet.chains) == []
    assert worker.network.stats.handler_errors == 0


def paid(stream: ChatStream, price: Price, units: int, output: int) -> None:
    """The receipt says these units, and what they cost."""
    receipt = stream.receipt
    assert receipt is not None and stream.finish_reason is FinishReason.STOP
    assert (receipt.input_tokens, receipt.output_tokens) == (units, output)
    assert receipt.cost == stream.cost == cost(price, units, output)


RUNS: list[dict[str, Any]] = [
    {},
    {"seed": 1},
    {"seed": 2, "latency": 0.003},
    {"price": Price(request=1, input=3_000_000, output=0)},
    {"price": Price(request=0, input=0, output=7_000_000)},
    {"price": Price()},
]
run = pytest.mark.parametrize("options", RUNS, ids=str)


@run
def test_every_task_end_to_end(options: dict[str, Any]) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()
        vectors = await client.embed("fake-embed", TEXTS)
        assert [tuple(row) for row in vectors] == [vector_of(text) for text in TEXTS]
        assert (len(vectors), vectors.dimensions) == (3, DIMENSIONS)
        paid(vectors.stream, market.price, 2 + 1 + 6, 3)

        ranking = await client.rerank("fake-rerank", "a mill", TEXTS)
        assert [(one.index, one.score) for one in ranking] == [(2, score_of("a mill", TEXTS[2])), (0, 0.0), (1, 0.0)]
        paid(ranking.stream, market.price, 3 * 2 + 9, 3)

        samples = audio(12.5)
        async with client.transcribe("fake-transcribe", samples) as heard:
            assert await heard.text() == words_of(samples)
        paid(heard, market.price, 1250, 13)

        image = png(5_000)
        async with client.ocr("fake-ocr", image) as seen:
            assert await seen.text() == read_of(image)
        paid(seen, market.price, 2, len(read_of(image)))
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        spent = sum(one.cost for one in (vectors.stream, ranking.stream, heard, seen, stream))
        assert the_channel(client).spent == spent
        await sound(worker, client)

    run_market(test, **options)


@pytest.mark.parametrize(
    ("options", "piece"),
    [(RUNS[2], 333), (RUNS[0], 6_400), (RUNS[3], 1_280), (RUNS[4], 6_400), (RUNS[1], 199_998)],
    ids=str,
)
def test_live_audio_is_heard_while_it_comes(options: dict[str, Any], piece: int) -> None:
    """Text of the first second is there long before the last one is said, and the receipt binds what was taken."""
    samples = audio(9.01)

    async def test(market: Market) -> None:
        tasks = FakeTasks()
        worker, client = await market.worker(tasks=tasks), await market.client()
        said = 0

        async def source() -> AsyncIterator[bytes]:
            nonlocal said
            async for data in live(samples, piece=piece, pause=0.0002 * piece / 320):
                said += len(data)
                yield data

        first_at = 0
        text = ""
        async with client.transcribe("fake-transcribe", source(), max_seconds=20) as stream:
            async for chunk in stream:
                first_at = first_at or said
                text += chunk.text
        assert text == words_of(samples)
        assert SECOND <= first_at < len(samples) or piece > SECOND
        paid(stream, market.price, 901, 10)
        asked = request_hash(TranscribeRequest(Audio(b"", 20 * SECOND)))
        digest = InputDigest(asked)
        digest.extend(samples)
        assert stream.receipt is not None and stream.receipt.request_hash == digest.value != asked
        assert tasks.heard == len(samples)
        await sound(worker, client)

    run_market(test, **options)


@pytest.mark.parametrize("size", [PIECE_BYTES - 2, PIECE_BYTES, PIECE_BYTES + 2, 3 * PIECE_BYTES])
def test_what_is_too_large_for_the_ask_follows_it(size: int) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()
        samples = audio(size / SECOND)
        async with client.transcribe("fake-transcribe", samples) as heard:
            assert await heard.text() == words_of(samples)
        image = png(size)
        async with client.ocr("fake-ocr", image) as seen:
            assert await seen.text() == read_of(image)
        paid(seen, market.price, 2, len(read_of(image)))
        await sound(worker, client)

    run_market(test, seed=6)


def test_long_input_fills_no_memory_and_crosses_many_ticks() -> None:
    """C14."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()
        most = 0
        samples = audio(1)

        async def source() -> AsyncIterator[bytes]:
            nonlocal most
            for _ in range(400):
                (part,) = worker.server._serving
                most = max(most, part.machine.inputs.untaken)
                yield samples

        async with client.transcribe("fake-transcribe", source(), max_seconds=400, max_tokens=500) as stream:
            async for _ in stream:
                pass
        paid(stream, market.price, 40_000, 400)
        assert most <= 256 * 1024
        vouchers = [r for r in worker.ledger.records() if r.kind == "voucher_added"]
        assert 20 < len(vouchers) < 1_500
        await sound(worker, client)

    run_market(test, seed=3)


def test_silence_says_nothing_and_is_paid_for() -> None:
    """The fake says a word for each second; of no second at all it says nothing, and that is an answer."""

    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()
        async with client.transcribe("fake-transcribe", live(b""), max_seconds=5) as stream:
            assert await stream.text() == ""
        paid(stream, market.price, 0, 0)
        await sound(worker, client)

    run_market(test)


def test_max_tokens_ends_a_transcript_and_the_input_with_it() -> None:
    async def test(market: Market) -> None:
        tasks = FakeTasks()
        worker, client = await market.worker(tasks=tasks), await market.client()
        samples = audio(60)
        async with client.transcribe(
            "fake-transcribe", live(samples, pause=0.001), max_seconds=60, max_tokens=3
        ) as stream:
            assert await stream.text() == words_of(samples[: 3 * SECOND])
        assert stream.finish_reason is FinishReason.LENGTH
        assert tasks.heard < len(samples) / 4
        assert stream.cost == cost(market.price, stream.usage.input_tokens, 3)
        await sound(worker, client)

    run_market(test)


def test_leaving_early_pays_for_what_was_taken() -> None:
    async def test(market: Market) -> None:
        tasks = FakeTasks()
        worker, client = await market.worker(tasks=tasks), await market.client()
        async with client.transcribe("fake-transcribe", live(audio(60), pause=0.002), max_seconds=60) as stream:
            async for _ in stream:
                break
        receipt = stream.receipt
        assert receipt is not None and stream.finish_reason is FinishReason.CANCELLED
        assert receipt.input_tokens == tasks.heard // 320 < 1_000
        assert receipt.cost == cost(market.price, receipt.input_tokens, receipt.output_tokens)
        assert tasks.aborted == 1
        await sound(worker, client)

    run_market(test)


def test_a_source_that_fails_is_the_callers_own_error_and_pays_for_what_it_sent() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()

        async def source() -> AsyncIterator[bytes]:
            yield audio(2)
            await trio.sleep(0.05)
            raise OSError("the microphone is gone")

        text = ""
        with pytest.raises(OSError, match="microphone"):
            async with client.transcribe("fake-transcribe", source(), max_seconds=9) as stream:
                async for chunk in stream:
                    text += chunk.text
        assert text == words_of(audio(2))
        assert stream.receipt is not None and stream.receipt.input_tokens == 200
        assert client.history[worker.key.peer_id].failures == 0
        await sound(worker, client)

    run_market(test)


def test_a_task_on_an_open_channel_costs_one_round_trip() -> None:
    """C7, for every task."""

    async def test(market: Market) -> None:
        backend = FakeBackend()
        await market.worker(backend, tasks=FakeTasks())
        client = await market.client()
        await client.embed("fake-embed", TEXTS)
        for task in Task:
            name = "fake" if task is Task.CHAT else f"fake-{task.value}"
            with RoundTrips().watch(client.network, backend) as rounds:
                async with client.run(name, sample_request(task)) as stream:
                    async for _ in stream:
                        pass
            turns = [n for n, e in enumerate(rounds.events) if e == "receive"]
            assert rounds.events[: turns[0]].count("send") == 1, rounds.events

    run_market(test, latency=0.01)


def test_chats_texts_and_sound_share_one_channel_and_its_credit() -> None:
    async def test(market: Market) -> None:
        backend = FakeBackend(FakeSettings(tokens=300, seconds_per_token=0.0005))
        settings = market.settings(max_streams=9, stall_ms=2_000)
        worker = await market.worker(backend, settings, tasks=FakeTasks(FakeTaskSettings(seconds_per_step=0.002)))
        client = await market.client()
        costs: list[int] = []

        async def chat() -> None:
            async with client.chat("fake", HELLO, max_tokens=200) as stream:
                await stream.text()
            costs.append(stream.cost)

        async def texts() -> None:
            costs.append((await client.embed("fake-embed", TEXTS * 9)).stream.cost)

        async def sounds() -> None:
            async with client.transcribe("fake-transcribe", live(audio(20), pause=0.003), max_seconds=30) as stream:
                await stream.text()
            costs.append(stream.cost)

        async with trio.open_nursery() as nursery:
            for one in (chat, texts, sounds) * 3:
                nursery.start_soon(one)
        assert the_channel(client).spent == sum(costs)
        await sound(worker, client)

    run_market(test, seed=5)


def test_the_speed_of_chats_is_not_learnt_from_other_tasks() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()
        await client.embed("fake-embed", TEXTS * 30)
        seen = client.history[worker.key.peer_id]
        assert (seen.completed, seen.tokens_per_second) == (1, 0.0)

    run_market(test)


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_model_is_asked_only_for_what_it_does() -> None:
    async def test(market: Market) -> None:
        await market.worker(tasks=FakeTasks())
        client = await market.client()
        for model in ("fake", "fake-ocr"):
            with pytest.raises(NoWorker) as caught:
                await client.embed(model, TEXTS)
            assert set(caught.value.reasons.values()) == {("task_unsupported",)}
        with pytest.raises(NoWorker):
            async with client.chat("fake-embed", HELLO):
                pass

    run_market(test)


REFUSALS: dict[str, tuple[Any, RefusalReason]] = {
    "vectors of a chat model": ({"request": sample_request(Task.EMBED)}, RefusalReason.TASK_UNSUPPORTED),
    "a chat with a model that embeds": ({"model_id": fake_model(Task.EMBED)}, RefusalReason.TASK_UNSUPPORTED),
    "a text too long": (
        {"model_id": fake_model(Task.EMBED), "request": EmbedRequest(("a", "b " * 65))},
        RefusalReason.INPUT_INVALID,
    ),
    "half a sample": (
        {"model_id": fake_model(Task.TRANSCRIBE), "request": TranscribeRequest(Audio(b"abc", 4))},
        RefusalReason.INPUT_INVALID,
    ),
    "hours that do not fit": (
        {"model_id": fake_model(Task.TRANSCRIBE), "request": TranscribeRequest(Audio(b"", 4 * 3600 * SECOND))},
        RefusalReason.CONTEXT_EXCEEDED,
    ),
    "a transcript to go on": (
        {"model_id": fake_model(Task.TRANSCRIBE), "request": sample_request(Task.TRANSCRIBE), "resume": (1,)},
        RefusalReason.INPUT_INVALID,
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_may_not_be_asked_is_refused_before_any_work(case: str) -> None:
    fields, reason = REFUSALS[case]

    async def test(market: Market) -> None:
        tasks = FakeTasks()
        worker, client = await market.worker(tasks=tasks), await market.client()
        hand = await Hand.of(client, worker)
        model = hand.offer.document.models[0].model_id
        records = worker.ledger.head.seq
        talk = await hand.talk(hand.ask(50_000, **{"model_id": bytes(model), **fields}))
        answer = await talk.receive()
        assert isinstance(answer, Refuse) and answer.reason is reason, answer
        assert worker.ledger.head.seq == records and tasks.aborted == 0
        await client.embed("fake-embed", TEXTS)
        await idle(worker)

    run_market(test)


def test_a_worker_without_other_runtimes_offers_chats_alone() -> None:
    async def test(market: Market) -> None:
        await market.worker()
        client = await market.client()
        (offer,) = client.offers.current()
        assert [model.tasks for model in offer.document.models] == [(Task.CHAT,)]
        with pytest.raises(NoWorker):
            await client.embed("fake-embed", TEXTS)

    run_market(test)


def test_places_of_tasks_are_their_runtimes_own() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(tasks=FakeTasks(FakeTaskSettings(slots=0)))
        client = await market.client()
        with pytest.raises(Refused) as caught:
            await client.embed("fake-embed", TEXTS)
        assert caught.value.reason is RefusalReason.BUSY
        client.history.clear()
        async with client.chat("fake", HELLO) as stream:
            assert await stream.text()
        await idle(worker)

    run_market(test)


BAD_CALLS: dict[str, Any] = {
    "no texts": lambda c: c.embed("fake-embed", []),
    "too many texts": lambda c: c.embed("fake-embed", ["x"] * 1025),
    "too much text": lambda c: c.embed("fake-embed", ["x" * 300_000] * 2),
    "no documents": lambda c: c.rerank("fake-rerank", "x", []),
    "no audio": lambda c: c.transcribe("fake-transcribe", b""),
    "half a sample": lambda c: c.transcribe("fake-transcribe", b"abc"),
    "five hours": lambda c: c.transcribe("fake-transcribe", live(b""), max_seconds=5 * 3600),
    "a WAV file in stereo": lambda c: c.transcribe("fake-transcribe", wav(b"abcd", channels=2)),
    "a WAV file at 8 kHz": lambda c: c.transcribe("fake-transcribe", wav(b"abcd", rate=8_000)),
    "a broken WAV file": lambda c: c.transcribe("fake-transcribe", b"RIFF\x00\x00\x00\x00WAVEfmt "),
    "no image": lambda c: c.ocr("fake-ocr", b"hello"),
    "a bomb": lambda c: c.ocr("fake-ocr", png(100, 8192, 8192)),
    "an image too large": lambda c: c.ocr("fake-ocr", png(IMAGE_LIMIT + 1)),
}


def wav(samples: bytes, *, channels: int = 1, rate: int = 16_000) -> bytes:
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples)
    return held.getvalue()


@pytest.mark.parametrize("case", BAD_CALLS)
def test_what_a_caller_gets_wrong_is_told_before_anything_is_asked(case: str) -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()
        with pytest.raises(ConfigError) as caught:
            made = BAD_CALLS[case](client)
            if not isinstance(made, ChatStream):
                await made
        assert str(caught.value)
        assert not client.book.channels and worker.server.stats.accepted == 0

    run_market(test)


def test_a_wav_file_is_the_samples_in_it() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(tasks=FakeTasks()), await market.client()
        samples = audio(2.5)
        async with client.transcribe("fake-transcribe", wav(samples)) as stream:
            assert await stream.text() == words_of(samples)
        paid(stream, market.price, 250, 3)
        await sound(worker, client)

    run_market(test)


# ----------------------------------------------------------------------------------------------- failures of our own


def rows(step: Step, data: bytes) -> Step:
    return Step(step.token_ids, step.text, step.finish_reason, data)


NAN = b"\x00\x00\xc0\x7f"
WRONG: dict[str, tuple[str, Any]] = {
    "NaN": ("fake-embed", lambda step: rows(step, NAN * DIMENSIONS)),
    "another width": ("fake-embed", lambda step: rows(step, step.data + NAN)),
    "twice as many": ("fake-embed", lambda step: rows(step, step.data * 4)),
    "none": ("fake-embed", lambda step: rows(step, b"")),
    "text": ("fake-embed", lambda step: Step((1,), "x", step.finish_reason)),
    "rows of text": ("fake-transcribe", lambda step: rows(step, bytes(4))),
    "far too much text": ("fake-transcribe", lambda step: Step(step.token_ids, "x" * 9_000, step.finish_reason)),
    "too early an end": ("fake-transcribe", lambda step: Step(step.token_ids, step.text, FinishReason.STOP)),
    "too short an answer": ("fake-transcribe", lambda step: Step(step.token_ids, step.text, FinishReason.LENGTH)),
    "an end that is the client's": ("fake-transcribe", lambda step: Step((), "", FinishReason.CANCELLED)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_runtime_that_answers_wrongly_is_caught_before_its_answer_is_sold(case: str) -> None:
    """C15, and C9 by what it costs."""
    model, change = WRONG[case]

    async def test(market: Market) -> None:
        tasks = FakeTasks(FakeTaskSettings(change=change))
        worker, client = await market.worker(tasks=tasks), await market.client()
        request = EmbedRequest(tuple(TEXTS)) if model == "fake-embed" else TranscribeRequest(Audio(b"", 9 * SECOND))
        with pytest.raises(WorkerFault, match="backend"):
            async with client.run(model, request, live(audio(3), pause=0.001)) as stream:
                async for _ in stream:
                    pass
        assert stream.cost == the_channel(client).spent == 0, "what fails before its first output costs nothing"
        tasks.settings.change = lambda step: step
        client.history.clear()
        await client.embed("fake-embed", TEXTS)
        await sound(worker, client)

    run_market(test)


@pytest.mark.parametrize("after", [1, 4])
def test_a_runtime_that_fails_half_way_is_paid_for_what_it_delivered(after: int) -> None:
    async def test(market: Market) -> None:
        tasks = FakeTasks(FakeTaskSettings(fail_after=after, seconds_per_step=0.03))
        worker, client = await market.worker(tasks=tasks), await market.client()
        with pytest.raises(WorkerFault, match="told to fail"):
            async with client.transcribe("fake-transcribe", live(audio(9), pause=0.001), max_seconds=9) as stream:
                async for _ in stream:
                    pass
        assert stream.usage.output_tokens == after
        await idle(worker)
        ours, theirs = the_channel(client).spent, the_channel(worker).spent
        assert ours == theirs == cost(market.price, stream.usage.input_tokens, after)

    run_market(test)


def test_vectors_that_nobody_acknowledged_are_served_again_and_streamed_input_is_not() -> None:
    async def test(market: Market) -> None:
        tasks = FakeTasks()
        worker = await market.worker(tasks=tasks, settings=market.settings(ack_ms=50))
        client = await market.client()
        hand = await Hand.of(client, worker)
        embed = hand.ask(model_id=bytes(fake_model(Task.EMBED)), request=EmbedRequest(tuple(TEXTS)))
        seen = []
        for _ in range(3):
            talk, data = await hand.talk(embed), b""
            while not isinstance(message := await talk.receive(), ReceiptMessage):
                data += getattr(message, "data", b"")
            seen.append((data, message))
            await idle(worker)
        assert seen[0] == seen[1] == seen[2] and len(seen[0][0]) == 3 * DIMENSIONS * 4
        hear = hand.ask(
            2_000, model_id=bytes(fake_model(Task.TRANSCRIBE)), request=TranscribeRequest(Audio(bytes(320), 640))
        )
        talk = await hand.talk(hear)
        while (message := await talk.receive()) is not None and not hasattr(message, "sequence"):
            pass
        await talk.send(Input(1, bytes(320), last=True))
        assert await talk.until(ReceiptMessage) is not None
        await talk.stream.reset()
        await idle(worker)
        spent = worker.book.channels[hand.state.channel_id].spent
        again = await (await hand.talk(hear)).receive()
        assert isinstance(again, Refuse) and again.reason is RefusalReason.DUPLICATE_JOB
        assert worker.book.channels[hand.state.channel_id].spent == spent
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []

    run_market(test)


@pytest.mark.parametrize("who", ["worker", "client"])
def test_a_crash_in_the_middle_of_live_sound_leaves_both_journals_sound(who: str) -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(name="w", tasks=FakeTasks())
        client = await market.client(name="c")
        error: BaseException | None = None
        try:
            async with client.transcribe("fake-transcribe", live(audio(60), pause=0.002), max_seconds=60) as stream:
                async for chunk in stream:
                    if chunk.usage.output_tokens == 2:
                        market.crash(worker if who == "worker" else client)
        except NodeError as caught:
            error = caught
        assert error is not None
        if who == "worker":
            assert isinstance(error, WorkerFault)
            worker = await market.worker(name="w", tasks=FakeTasks())
            await client.meet(worker.network.addresses[0])
            client.history.clear()
        else:
            await idle(worker)
            client = await market.client(name="c", deposit=0)
        await client.embed("fake-embed", TEXTS)
        await idle(worker)
        state = the_channel(worker)
        assert not state.open_jobs and state.spent <= the_channel(client).cumulative
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
        assert await audit(client.book.ledger, Role.CLIENT, client.wallet.chains) == []

    run_market(test)


def test_what_is_said_meanwhile_does_not_lower_what_a_piece_is_paid_with() -> None:
    """A voucher for the second piece is being written when the first one is taken: it covers the second one all the same."""

    async def test(market: Market) -> None:
        tasks = FakeTasks(FakeTaskSettings(change=lambda step: Step((), "", step.finish_reason)))
        settings = replace(market.settings(), credit_ticks=0)
        worker, client = await market.worker(tasks=tasks, settings=settings), await market.client()
        add = client.vouchers.add

        async def slowly(*args: Any, **options: Any) -> Any:
            await trio.sleep(0.02)
            return await add(*args, **options)

        client.vouchers.add = slowly  # type: ignore[method-assign]

        async def source() -> AsyncIterator[bytes]:
            for n in (1, 2):
                yield audio(2)
                while n == 2 and tasks.heard < 4 * SECOND:
                    await trio.sleep(0.01)

        async with client.transcribe("fake-transcribe", source(), max_seconds=9) as stream:
            assert await stream.text() == "", "it hears and says nothing: no chunk but those that tell what was taken"
        await sound(worker, client)

    run_market(test, timeout_s=5, price=Price(input=3_000_000))
