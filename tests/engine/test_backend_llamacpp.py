"""The same back end against an engine that is not ours: llama.cpp's own server with a real model."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio

pytest.importorskip("torch")

from node.groups import plain_errors
from node.models.packages import KNOWN, installed
from node.models.store import ModelStore
from node.runtime.backends.openai_compatible import OpenAIBackend, open_openai
from node.runtime.backends.openai_meeting import ServerSettings
from node.testing.market import open_market
from node.worker.worker import self_test
from protocol.messages import ChatMessage, FinishReason, Params

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "llamacpp" / "bin" / "python"
NAME = "smollm2-135m-instruct"
PARTY = "Repeat this line three times: 🎉 naïve café 東京 🎉🎈"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    files = installed(KNOWN[NAME].packages[0])
    if not PYTHON.exists():
        pytest.skip("llama.cpp's server is not set up (scripts/setup-peers llamacpp)")
    if files is None:
        pytest.skip(f"the model package {KNOWN[NAME].requirement} is not installed")
    command = [PYTHON, ROOT / "scripts" / "peers" / "llamacpp_server.py", *files.values()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as peer:
        assert peer.stdout is not None and peer.stdin is not None
        try:
            yield peer.stdout.readline().strip()
        finally:
            peer.stdin.close()
            peer.terminate()


def run(
    url: str, smollm: Path, test: Callable[[OpenAIBackend], Awaitable[None]], said: list[str] | None = None
) -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[OpenAIBackend]:
        store = ModelStore(smollm.parent)
        given = ServerSettings(url, "q4_1", first_token_s=300, stall_s=120, poll_s=0.2)
        async with open_openai(
            store, [store.resolve(NAME)], given, (said if said is not None else []).append
        ) as backend:
            yield backend

    async def main() -> None:
        with trio.fail_after(600):
            async with opened() as backend:
                await test(backend)

    with plain_errors():
        trio.run(main)


async def chat(
    backend: OpenAIBackend, text: str, params: Params, resume: tuple[int, ...] = ()
) -> tuple[list[int], str, object]:
    (model,) = backend.models
    prompt = backend.prepare(model, [ChatMessage(role="user", content=text)])
    ids: list[int] = []
    whole, reason = "", None
    async with aclosing(backend.generate(prompt, params, resume)) as steps:
        async for step in steps:
            ids += step.token_ids
            whole += step.text
            reason = step.finish_reason
    return ids, whole, reason


def test_real_tokens_of_another_engine(url: str, smollm: Path) -> None:
    said: list[str] = []

    async def test(backend: OpenAIBackend) -> None:
        (info,) = backend.models.values()
        assert (info.context_length, info.dtype, info.numerics_class) == (2048, "q4_1", "")
        ids, text, reason = await chat(backend, "What is the capital of France?", Params(max_tokens=24))
        assert text and reason in (FinishReason.STOP, FinishReason.LENGTH)
        tokenizer = backend._get(info.id).tokenizer
        assert tokenizer.decode(ids) == text
        for cut in (1, len(ids) // 2):  # greedy, so going on is the same answer
            more, rest, _ = await chat(
                backend, "What is the capital of France?", Params(max_tokens=24), tuple(ids[:cut])
            )
            assert tokenizer.decode(ids[:cut]) + rest == text and ids[:cut] + more == ids
        ids, text, _ = await chat(backend, PARTY, Params(max_tokens=40))
        assert tokenizer.decode(ids) == text and "\ufffd" not in text[:-1]
        forced = tokenizer.encode(" mill")[0]
        ids, _, _ = await chat(backend, "Hello", Params(max_tokens=5, logit_bias=((forced, 100.0),)))
        assert ids == [forced] * 5

    run(url, smollm, test, said)
    assert "prompts as token ids, answers as text only" in said[-1]


def test_streams_side_by_side_one_left_and_its_place_free_again(url: str, smollm: Path) -> None:
    async def test(backend: OpenAIBackend) -> None:
        texts: dict[int, str] = {}

        async def one(n: int) -> None:
            _, texts[n], _ = await chat(backend, f"Count from {n} upwards.", Params(max_tokens=16))

        (model,) = backend.models
        prompt = backend.prepare(model, [ChatMessage(role="user", content="Tell a very long story.")])
        async with aclosing(backend.generate(prompt, Params(max_tokens=1500))) as steps, trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(one, n)
            await anext(steps)
        alone: dict[int, str] = dict(texts)
        for n in range(3):
            await one(n)
        assert texts == alone and len(texts) == 3
        assert backend.free_slots == 4

    run(url, smollm, test)


def test_a_paid_chat_on_it(url: str, smollm: Path) -> None:
    async def test(backend: OpenAIBackend) -> None:
        speeds = await self_test(backend)
        assert all(speed.tokens_per_second > 0 for speed in speeds.values())
        async with open_market() as market:
            await market.worker(backend)  # type: ignore[arg-type]
            client = await market.client()
            async with client.chat(
                NAME, [{"role": "user", "content": "What is the capital of France?"}], max_tokens=16
            ) as stream:
                text = await stream.text()
            assert text and stream.receipt is not None and stream.receipt.cost > 0

    run(url, smollm, test)
