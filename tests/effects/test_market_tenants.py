"""Who shares the runtime's cache with whom: one payer with itself, over channels and batch jobs alike, and nobody else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from node.client.client import Client
from node.client.settings import ClientSettings
from node.ports import Prompt, Step
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, key, run_market
from node.worker.batch_run import RunSettings
from node.worker.tenants import Tenants
from node.worker.worker import WorkerSettings
from protocol.batch import Timing
from protocol.messages import Params

HELLO = [{"role": "user", "content": "hello there"}]
LINES = [f"line number {n}" for n in range(10)]
FAST = Timing(submit_margin=2, accept_grace=1, settle_patience=1, finalize_patience=1, dispute_margin=2)


class Recording(FakeBackend):
    """Keeps the salts of what it was made to compute."""

    def __init__(self) -> None:
        super().__init__(FakeSettings(tokens=4))
        self.salts: list[bytes] = []

    def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        self.salts.append(prompt.salt)
        return super().generate(prompt, params, resume)

    def taken(self) -> set[bytes]:
        found = set(self.salts)
        self.salts.clear()
        return found


def quick(market: Market) -> WorkerSettings:
    usual = market.settings()
    if usual.batch is None:
        raise AssertionError
    quotes = replace(usual.batch.quotes, margin_s=2, min_duration=4, open_s=1)
    run = RunSettings(margin_s=2, pause_s=0.02, piece_s=0.05)
    return replace(usual, batch=replace(usual.batch, quotes=quotes, run=run, timing=FAST))


async def chat(client: Client) -> None:
    async with client.chat("fake", HELLO) as stream:
        await stream.text()


def test_a_payer_shares_with_itself_alone() -> None:
    async def test(market: Market) -> None:
        backend = Recording()
        await market.worker(backend, quick(market))
        eager = ClientSettings(jobs=FAST, job_poll_s=0.05, job_reread_s=0.1)
        one = await market.client(settings=eager, name="one")
        other = await market.client(settings=eager, name="other")

        await chat(one)
        (first,) = backend.taken()
        await chat(one)
        job = await one.post_job("fake", LINES, max_tokens=6)
        await job.result(20)
        assert backend.taken() == {first}, "its channel's chats and its batch job are one payer's"
        await chat(other)
        (second,) = backend.taken()
        assert first != second
        assert {len(first), len(second)} == {32}
        assert key("one payer").address not in first, "an address is public: whoever knows it must not know the name"

    run_market(test)


def test_a_name_cannot_be_computed_from_the_payer() -> None:
    payer = key("one payer").address
    mine, theirs = Tenants(), Tenants()
    assert mine.salt(payer) == mine.salt(payer) != theirs.salt(payer)
