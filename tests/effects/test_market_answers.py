"""Several answers to one request: as many jobs on one channel, money for all before the first, and each told of by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from node.audit import audit
from node.cli import chat as chat_module
from node.cli import main as frame
from node.client.settings import MAX_ANSWERS
from node.errors import ConfigError, InsufficientFunds, ModelError, NoWorker, WorkerFault
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, run_market
from protocol.channel import Role
from protocol.messages import ChatMessage, Params
from protocol.pricing import cost
from protocol.sampling import seed_of
from protocol.selection import Policy
from protocol.tasks import ChatRequest

HELLO = [{"role": "user", "content": "hello there"}]


def words(**settings: Any) -> FakeBackend:
    return FakeBackend(FakeSettings(**{"tokens": 12, "seconds_per_token": 0.01, "logprobs": True, **settings}))


async def read(answers: Any) -> dict[int, str]:
    texts: dict[int, str] = {}
    async with answers:
        async for answer, chunk in answers:
            texts[answer.index] = texts.get(answer.index, "") + chunk.text
    return texts


async def settled(market: Market, client: Any) -> None:
    """Nothing is under way, and both journals add up."""
    for worker in market.workers:
        while worker.server.busy:
            await trio.sleep(0.01)
        assert await audit(worker.ledger, Role.WORKER, worker.chains) == []
    assert await audit(client.book.ledger, Role.CLIENT, client.wallet.chains) == []
    assert not any(state.open_jobs for state in client.book.channels.values())


def test_they_run_side_by_side_on_one_channel_and_cost_the_sum() -> None:
    async def test(market: Market) -> None:
        worker, client = await market.worker(words()), await market.client()
        answers = client.answers("fake", HELLO, 4, seed=7, temperature=1.0)
        most = 0
        texts: dict[int, str] = {}
        async with answers:
            async for answer, chunk in answers:
                most = max(most, worker.server.live)
                texts[answer.index] = texts.get(answer.index, "") + chunk.text
        assert most == 4
        assert answers.errors == [] and len(set(texts.values())) == 4
        receipts = [answer.stream.receipt for answer in answers.answers]
        assert all(receipts) and len({receipt.job_id for receipt in receipts if receipt}) == 4
        each = [receipt.cost for receipt in receipts if receipt]
        assert each == [cost(market.price, receipt.input_tokens, 12) for receipt in receipts if receipt]
        assert answers.cost == sum(each) and answers.usage.output_tokens == 48
        (channel,) = client.book.channels.values()
        assert channel.spent == answers.cost and len(channel.open_jobs) == 0
        assert answers.opened is not None and answers.opened[0].channel_id == channel.channel_id
        alone = []
        for index in range(4):
            async with client.chat("fake", HELLO, seed=seed_of(7, index), temperature=1.0) as stream:
                alone.append(await stream.text())
        assert alone == [texts[index] for index in range(4)]
        await settled(market, client)

    run_market(test)


def test_more_than_there_are_places_take_turns() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(words(), market.settings(max_streams=2))
        client = await market.client()
        answers = client.answers("fake", HELLO, 7)
        assert sorted(await read(answers)) == list(range(7))
        assert answers.errors == [] and worker.server.stats.accepted == 7
        assert worker.server.stats.refused == {}
        await settled(market, client)

    run_market(test)


def test_one_that_finds_no_place_waits_for_another_of_ours() -> None:
    """The offer says four places; a stranger has taken three of them since."""

    async def test(market: Market) -> None:
        backend = words(tokens=40)
        worker = await market.worker(backend, market.settings(max_streams=4))
        client, stranger = await market.client(), await market.client()
        held = client.answers("fake", HELLO, 3)
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def others() -> None:
                with scope:
                    async with stranger.answers("fake", HELLO, 3, max_tokens=40) as taken:
                        async for _ in taken:
                            pass

            nursery.start_soon(others)
            while worker.server.live < 3:
                await trio.sleep(0.01)
            texts = await read(held)
            scope.cancel()
        assert held.errors == [], [(i, e, getattr(e, "reasons", 0)) for i, e in held.errors]
        assert sorted(texts) == [0, 1, 2]
        assert worker.server.stats.refused["busy"] > 0
        await settled(market, client)

    run_market(test)


def test_too_little_money_for_all_is_told_before_anything_is_asked() -> None:
    async def test(market: Market) -> None:
        worker = await market.worker(words())
        one = cost(market.price, 300, 256)
        client = await market.client(deposit=3 * one, means=[market.means(allocation=1)])
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        with pytest.raises(InsufficientFunds):
            async with client.answers("fake", HELLO, 20):
                pass
        assert worker.server.stats.accepted == 1
        await settled(market, client)

    run_market(test)


def test_a_limit_on_the_cost_is_for_all_of_them_together() -> None:
    async def test(market: Market) -> None:
        await market.worker(words())
        client = await market.client()
        (one,) = client.choosing.select("fake", ChatRequest((ChatMessage(**HELLO[0]),)), Params(), Policy())  # type: ignore[arg-type]
        assert sorted(await read(client.answers("fake", HELLO, 3, policy=Policy(max_cost=3 * one.cost)))) == [0, 1, 2]
        with pytest.raises(NoWorker) as caught:
            async with client.answers("fake", HELLO, 3, policy=Policy(max_cost=3 * one.cost - 1)):
                pass
        assert list(caught.value.reasons.values()) == [("price_too_high",)]
        await settled(market, client)

    run_market(test)


def test_all_are_paid_in_one_token_or_not_at_all() -> None:
    """C12: what is paid in two tokens has no sum."""

    async def test(market: Market) -> None:
        other = market.add_chain("other", 4242)
        await market.worker(words(fail_after=3), market.settings(max_streams=1))
        elsewhere = await market.worker(words(), market.settings(market.accepted(ledger=other)), chains=("other",))
        means = [market.means(), market.means(other, rate=None)]
        client = await market.client(chains=("default", "other"), means=means)
        answers = client.answers("fake", HELLO, 3)
        await read(answers)
        assert [index for index, _ in answers.errors] == [0, 1, 2]
        assert isinstance(answers.errors[0][1], WorkerFault)
        assert all("the token that the other answers are paid in" in str(error) for _, error in answers.errors[1:])
        assert elsewhere.server.stats.accepted == 0
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        assert stream.worker == elsewhere.key.peer_id

    run_market(test)


def test_what_befalls_one_is_told_of_that_one_and_the_others_go_on() -> None:
    async def test(market: Market) -> None:
        backend = words()
        await market.worker(backend)
        client = await market.client()
        answers = client.answers("fake", HELLO, 3, temperature=1.0)
        doomed = answers.answers[1].stream.params.seed
        real = backend.generate

        async def generate(prompt: Any, params: Params, resume: Any = ()) -> Any:
            backend.settings.fail_after = None
            async for step in real(prompt, params, resume):
                yield step
                if params.seed == doomed:
                    raise ModelError("told to fail")

        backend.generate = generate  # type: ignore[method-assign, assignment]
        texts = await read(answers)
        assert [index for index, _ in answers.errors] == [1]
        assert isinstance(answers.errors[0][1], WorkerFault)
        assert len(texts[0].split()) == len(texts[2].split()) == 12
        assert len(texts.get(1, "").split()) < 12
        assert answers.cost == sum(answer.stream.cost for answer in answers.answers)
        await settled(market, client)

    run_market(test)


def test_leaving_early_cancels_all_and_pays_what_came() -> None:
    async def test(market: Market) -> None:
        backend = words(tokens=2000)
        await market.worker(backend)
        client = await market.client()
        answers = client.answers("fake", HELLO, 3, max_tokens=2000)
        async with answers:
            async for _ in answers:
                break
        assert backend.produced < 1000
        assert all(answer.stream.receipt is not None for answer in answers.answers if answer.stream.usage.output_tokens)
        await settled(market, client)

    run_market(test)


def test_how_many_is_bounded() -> None:
    async def test(market: Market) -> None:
        client = await market.client(deposit=0)
        for n in (0, MAX_ANSWERS + 1):
            with pytest.raises(ConfigError, match="answers can be asked for"):
                client.answers("fake", HELLO, n)
        only = client.answers("fake", HELLO, 1).answers
        assert [answer.stream.params for answer in only] == [Params()]

    run_market(test)


# ------------------------------------------------------------------------------------------------------- the command

Go = Callable[..., tuple[int, str, str]]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Go:
    """`chat` with a client on a market in memory. Returns its status, what it wrote and what it said."""

    def call(*asked: str, backend: FakeBackend | None = None) -> tuple[int, str, str]:
        def on_market(shared: Any, work: Callable[[Any], Awaitable[None]], workers: Any = (), **options: Any) -> None:
            async def test(market: Market) -> None:
                await market.worker(backend or words(tokens=3))
                client = await market.client()
                await work(client)
                await settled(market, client)

            run_market(test)

        monkeypatch.setattr(chat_module, "run", on_market)
        capsys.readouterr()
        status = frame.main(["--data-dir", str(tmp_path / "data"), "chat", "fake", "hello there", *asked])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out, captured.err

    return call


def test_all_of_them_for_machines(go: Go) -> None:
    status, out, _ = go("--n", "2", "--temperature", "1", "--logprobs", "2", "--json")
    assert status == 0
    *chunks, last = [json.loads(line) for line in out.splitlines()]
    for index in (0, 1):
        mine = [row for row in chunks if row["choices"][0]["index"] == index]
        text = "".join(row["choices"][0]["delta"]["content"] for row in mine)
        assert text == last["choices"][index]["message"]["content"] == "".join(row["text"] for row in mine)
        content = [one for row in mine for one in row["choices"][0]["logprobs"]["content"]]
        assert [one["token"] for one in content] == [f"token_id:{t}" for row in mine for t in row["token_ids"]]
        assert [len(one["top_logprobs"]) for one in content] == [2, 2, 2]
        assert content[0]["logprob"] == pytest.approx(math.log(0.5)) and content[0]["bytes"] is None
        assert content[0]["top_logprobs"][1].keys() == {"token", "logprob", "bytes"}
    assert [choice["finish_reason"] for choice in last["choices"]] == ["stop", "stop"]
    assert last["cost"] == str(sum(int(choice["cost"]) for choice in last["choices"]))
    assert last["usage"]["output_tokens"] == 6
    assert [choice["error"] for choice in last["choices"]] == [None, None]
    assert last["choices"][1]["seed"] == seed_of(0, 1)
    assert len({choice["receipt"]["job_id"] for choice in last["choices"]}) == 2


def test_all_of_them_for_people(go: Go) -> None:
    status, out, said = go("--n", "2", "--temperature", "1")
    assert status == 0 and [line[:4] for line in out.splitlines()] == ["[1] ", "[2] "]
    assert "2 of 2 whole" in said and "in all" in said


def test_those_that_failed_are_named_and_the_command_fails(go: Go) -> None:
    status, out, said = go("--n", "2", backend=words(fail_after=2))
    assert status == 1 and "answer 1 is not whole" in said and "answer 2 is not whole" in said
    assert "error: " in said and out.startswith("[1] w")
    status, out, _ = go("--n", "2", "--json", backend=words(fail_after=2))
    *_, last, error = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and error["error"]["code"] == "worker_fault"
    assert [choice["error"]["code"] for choice in last["choices"]] == ["worker_fault"] * 2
    assert [choice["finish_reason"] for choice in last["choices"]] == [None] * 2


def test_one_answer_with_log_probabilities(go: Go) -> None:
    status, out, _ = go("--logprobs", "0", "--json")
    *chunks, last = [json.loads(line) for line in out.splitlines()]
    (choice,) = last["choices"]
    assert status == 0 and choice["finish_reason"] == "stop" and last["receipt"]["output_tokens"] == 3
    assert choice["message"] == {"role": "assistant", "content": "".join(row["text"] for row in chunks)}
    content = [one for row in chunks for one in row["choices"][0]["logprobs"]["content"]]
    assert [(one["logprob"], one["top_logprobs"]) for one in content] == [(pytest.approx(math.log(0.5)), [])] * 3


def test_without_either_the_lines_are_what_they_were(go: Go) -> None:
    status, out, _ = go("--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and all(row.keys() == {"text", "token_ids", "cost"} for row in rows[:-1])
    assert "choices" not in rows[-1]


def test_log_probabilities_are_for_machines(go: Go) -> None:
    status, out, said = go("--logprobs", "2")
    assert (status, out) == (2, "") and "add --json" in said
    for wrong in (("--logprobs", "21"), ("--n", "0"), ("--n", "129")):
        assert go(*wrong, "--json")[0] == 2
