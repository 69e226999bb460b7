"""Real models over the market in memory: what a client buys is what the model says, paid and audited as anything else."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

pytest.importorskip("torch")

from node.audit import audit
from node.client.client import Client
from node.errors import Refused
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.runtime.tasks.backend import TaskSettings, open_tasks
from node.testing.market import Market, run_market
from node.worker.trial import try_tasks
from node.worker.worker import Worker
from protocol.channel import Role
from protocol.errors import RefusalReason
from protocol.pricing import cost
from protocol.tasks import audio_units


def on_market(folder: Path, test: Callable[[Market, Worker, Client], object]) -> None:
    """A worker that does what the model of this folder does, and has proved it on a sample; then both journals are audited."""

    async def scenario(market: Market) -> None:
        manifest = Manifest.parse((folder / "manifest.json").read_bytes())
        async with open_tasks(ModelStore(folder.parent), [manifest], TaskSettings()) as tasks:
            assert (await try_tasks(tasks)).keys() == {manifest.id}
            worker, client = await market.worker(tasks=tasks), await market.client()
            await test(market, worker, client)  # type: ignore[misc]
            while worker.server.busy:
                await trio.sleep(0.01)
            (ours,), (theirs,) = client.book.channels.values(), worker.book.channels.values()
            assert ours.spent == theirs.spent and not ours.open_jobs
            assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
            assert await audit(client.book.ledger, Role.CLIENT, client.wallet.chains) == []

    run_market(scenario, timeout_s=300)


def test_vectors_and_ranks_by_minilm(stored: Callable[[str], Path]) -> None:
    async def test(market: Market, worker: Worker, client: Client) -> None:
        texts = ["A man is eating food.", "The girl is carrying a baby.", "A man eats a piece of bread."]
        vectors = await client.embed("minilm", texts)
        assert (len(vectors), vectors.dimensions) == (3, 384)
        assert all(math.isclose(sum(x * x for x in row), 1, abs_tol=1e-5) for row in vectors)
        near, far = (sum(a * b for a, b in zip(vectors[0], vectors[n], strict=True)) for n in (2, 1))
        assert near > 0.7 > 0.3 > far
        receipt = vectors.stream.receipt
        assert receipt is not None and receipt.cost == cost(market.price, receipt.input_tokens, 3)
        ranking = await client.rerank("minilm", "What does the man have for dinner?", texts)
        assert {ranking[0].index, ranking[1].index} == {0, 2}
        long = [" ".join(["mill"] * 120)] * 3  # each of them is under the context, query and document together are not
        assert len(await client.rerank("minilm", long[0], long)) == 3
        with pytest.raises(Refused) as caught:
            await client.embed("minilm", ["short", "mill " * 300])
        assert caught.value.reason is RefusalReason.INPUT_INVALID and "302 tokens" in str(caught.value)

    on_market(stored("minilm"), test)


def test_live_speech_by_whisper(stored: Callable[[str], Path], speech: bytes) -> None:
    async def test(market: Market, worker: Worker, client: Client) -> None:
        said = 0

        async def source() -> AsyncIterator[bytes]:
            nonlocal said
            for start in range(0, len(speech), 3_200):
                if start + 25_600 > len(speech):  # the last 0.8 s are held back until something of the rest is written
                    await written.wait()
                said += 3_200
                yield speech[start : start + 3_200]

        text, first_at, written = "", 0, trio.Event()
        async with client.transcribe("whisper-tiny.en", source(), max_seconds=10) as stream:
            async for chunk in stream:
                first_at = first_at or said
                written.set()
                text += chunk.text
        assert "lazy dog" in text.lower() and "john" in text.lower()
        assert first_at < len(speech), "the first sentence is there before the second one is said"
        receipt = stream.receipt
        assert receipt is not None and receipt.input_tokens == audio_units(len(speech))
        async with client.transcribe("whisper-tiny.en", speech) as whole:
            assert await whole.text() == text, "text follows from the sound alone"

    on_market(stored("whisper-tiny.en"), test)
