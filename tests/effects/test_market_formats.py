"""Answers bound by a grammar, on the market: who offers it is asked, and what is wrong with a grammar is said before work."""

from __future__ import annotations

import pytest

from node.errors import NodeError, Refused
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import Market, run_market
from protocol.errors import RefusalReason
from protocol.messages import ChatMessage, Params, ResponseFormat
from protocol.selection import Exclusion, Policy
from protocol.tasks import ChatRequest

HELLO = [{"role": "user", "content": "hello there"}]
KNOWN = ResponseFormat("regex", "w[0-9]+")


def following() -> FakeBackend:
    return FakeBackend(FakeSettings(tokens=5, formats=frozenset([KNOWN.text])))


def test_only_a_worker_that_offers_grammars_is_asked() -> None:
    async def test(market: Market) -> None:
        other, _ = await market.worker(following()), await market.worker()
        client = await market.client()
        words = ChatRequest((ChatMessage("user", "hello there"),))
        choice = client.choosing.explain("fake", words, Params(response_format=KNOWN), Policy())
        assert [one.offer.peer_id for one in choice.ranked] == [other.key.peer_id]
        assert list(choice.rejected.values()) == [(Exclusion.UNSUPPORTED_PARAM,)]
        async with client.chat("fake", HELLO, response_format=KNOWN) as stream:
            assert len((await stream.text()).split()) == 5
        assert stream.worker == other.key.peer_id

    run_market(test)


def test_a_grammar_that_is_no_good_is_refused_before_any_work() -> None:
    async def test(market: Market) -> None:
        backend = following()
        await market.worker(backend)
        client = await market.client()
        with pytest.raises(Refused, match="response_format: the fake model follows no grammar") as caught:
            async with client.chat("fake", HELLO, response_format={"kind": "regex", "text": "("}):
                pass
        assert caught.value.reason is RefusalReason.UNSUPPORTED_PARAM
        assert backend.produced == 0

    run_market(test)


def test_a_batch_job_takes_no_grammar() -> None:
    """It could fail in the midst of an answer, and the worker's stake answers for the job."""

    async def test(market: Market) -> None:
        await market.worker(following())
        client = await market.client()
        with pytest.raises(NodeError) as caught:
            await client.post_job("fake", ["one", "two"], max_tokens=8, response_format=KNOWN)
        assert "response_format: not in batch jobs" in str(caught.value) + str(getattr(caught.value, "reasons", ""))

    run_market(test)
