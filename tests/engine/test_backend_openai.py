"""A model server that the operator runs: honest ones served token for token, hostile ones told apart. It is a scripted one."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from node.errors import ModelError, NodeError
from node.groups import plain_errors
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.models.tokenizer import Tokenizer
from node.ports import Prompt
from node.runtime.backends.openai_compatible import OpenAIBackend, open_openai
from node.runtime.backends.openai_meeting import ServerSettings
from node.runtime.backends.openai_wire import ServerFault, parse_piece
from node.runtime.backends.retokenise import LONGEST_WORD, Retokeniser
from node.runtime.backends.sse import BadEvents, Event, EventReader
from node.testing.market import open_market
from node.testing.openai_server import HARMLESS, ID_WOUNDS, NAME, WOUNDS, Script, ScriptedServer, open_scripted
from node.testing.tiny_model import add_tiny
from node.worker.worker import self_test
from protocol.messages import ChatMessage, FinishReason, Params
from protocol.pricing import cost

ANSWER = "What is signed is what was delivered: naïve “quotes”, 東京, 🎉🎉 and it isn't more."


class Stored:
    def __init__(self, root: Path) -> None:
        source = root / "source"
        source.mkdir()
        self.store = ModelStore(root / "store")
        self.manifest: Manifest = add_tiny(self.store, source)
        self.tokenizer = Tokenizer(self.store.path(self.manifest.id))
        self.answer = (*self.tokenizer.encode(ANSWER), self.tokenizer.token_id("<|im_end|>") or 0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    made = Stored(tmp_path_factory.mktemp("openai"))
    yield made
    made.tokenizer.close()


Test = Callable[[OpenAIBackend, ScriptedServer], Awaitable[None]]


def serve(
    stored: Stored, test: Test, script: Script | None = None, said: list[str] | None = None, **options: Any
) -> None:
    """Run a test against the scripted server; `options` are `ServerSettings`."""
    script = script or Script()
    script.answer = script.answer or stored.answer

    async def main() -> None:
        with trio.fail_after(60):
            async with open_scripted(stored.tokenizer, script) as server:
                values = {
                    "served": (NAME,),
                    "dtype": "bfloat16",
                    "connect_s": 20.0,
                    "first_token_s": 30.0,
                    "stall_s": 30.0,
                    **options,
                }
                given = ServerSettings(server.url, **values)
                async with open_openai(
                    stored.store, [stored.manifest], given, (said if said is not None else []).append
                ) as backend:
                    script.requests.clear()
                    await test(backend, server)

    with plain_errors():
        trio.run(main)


def ask(backend: OpenAIBackend) -> Prompt:
    (model,) = backend.models
    return backend.prepare(model, [ChatMessage(role="user", content="What is signed?")])


async def run(
    backend: OpenAIBackend, params: Params | None = None, resume: tuple[int, ...] = ()
) -> tuple[list[int], str, FinishReason | None]:
    ids: list[int] = []
    text, reason = "", None
    async with aclosing(backend.generate(ask(backend), params or Params(max_tokens=500), resume)) as steps:
        async for step in steps:
            ids += step.token_ids
            text += step.text
            reason = step.finish_reason
    return ids, text, reason


SERVERS = {
    "ids both ways": {},
    "ids in, text out": {"tells_ids": False, "owned_by": "sglang"},
    "text both ways": {"takes_ids": False, "tells_ids": False, "owned_by": "somebody"},
    "text in large pieces": {"tells_ids": False, "owned_by": "sglang", "text_size": 17},
}


@pytest.mark.parametrize("kind", SERVERS)
def test_an_answer_arrives_token_for_token(stored: Stored, kind: str) -> None:
    said: list[str] = []

    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        ids, text, reason = await run(backend)
        assert (text, reason) == (ANSWER, FinishReason.STOP)
        assert ids == list(stored.answer)[: None if server.script.tells_ids else -1]
        assert stored.tokenizer.decode(ids) == text
        (asked,) = server.script.requests
        assert isinstance(asked["prompt"], list) is server.script.takes_ids
        assert asked["stream_options"] == {"include_usage": True} and asked["max_tokens"] == 500
        (info,) = backend.models.values()
        assert (info.dtype, info.numerics_class) == ("bfloat16", "") and "frequency_penalty" not in info.params

    serve(stored, test, Script(**SERVERS[kind]), said)
    assert ("prompts as token ids" in said[-1]) is SERVERS[kind].get("takes_ids", True)
    assert ("its token ids" in said[-1]) is SERVERS[kind].get("tells_ids", True)


@pytest.mark.parametrize("tokens", [30_000, 130_000])
def test_a_long_prompt_that_is_told_back_breaks_no_stream(stored: Stored, tokens: int) -> None:
    """vLLM tells the ids of the prompt in the first event: up to a megabyte, where an event has 256 KiB."""

    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        short = ask(backend)
        largest = stored.tokenizer.vocab_size - 1  # as many digits as an id of it can have
        prompt = replace(short, token_ids=(largest,) * (tokens - len(short.token_ids)) + short.token_ids)
        ids: list[int] = []
        async with aclosing(backend.generate(prompt, Params(max_tokens=500))) as steps:
            async for step in steps:
                ids += step.token_ids
        assert ids == list(stored.answer) and len(server.script.requests[-1]["prompt"]) == tokens

    serve(stored, test)


def test_what_may_be_told_back_is_bounded_by_what_was_asked(stored: Stored) -> None:
    """An event as long as a long prompt's, after a short one; and to a server that tells no ids, nothing is granted."""

    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        server.script.wound = "prompt of another"
        with pytest.raises(ModelError, match="an event is longer than"):
            await run(backend)

    serve(stored, test)
    serve(stored, test, Script(tells_ids=False, owned_by="sglang"))


@pytest.mark.parametrize("kind", SERVERS)
def test_a_stream_goes_on_from_every_token(stored: Stored, kind: str) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        whole, text, _ = await run(backend)
        broken_characters = 0
        for cut in range(0, len(whole), 3):
            before = tuple(whole[:cut])
            if stored.tokenizer.decode(before).endswith("\ufffd"):
                broken_characters += 1  # a prompt of text cannot end inside of a character: said, not guessed
                continue
            ids, rest, reason = await run(backend, resume=before)
            assert stored.tokenizer.decode(before) + rest == text and reason is FinishReason.STOP
            assert list(before) + ids == whole or not server.script.tells_ids
        assert broken_characters < 8

    serve(stored, test, Script(**SERVERS[kind]))


@pytest.mark.parametrize("kind", ["ids both ways", "text in large pieces"])
def test_max_tokens_and_stop_strings_are_ours(stored: Stored, kind: str) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        whole, text, _ = await run(backend)
        for most in (1, 2, 7):
            ids, _, reason = await run(backend, Params(max_tokens=most))
            assert reason is FinishReason.LENGTH and ids == whole[: len(ids)] and len(ids) <= most
        ids, shown, reason = await run(backend, Params(max_tokens=500, stop=("delivered",)))
        assert shown == text.partition("delivered")[0] and reason is FinishReason.STOP_STRING
        assert len(ids) < len(whole) and "stop" not in server.script.requests[-1]
        assert await run(backend, Params(max_tokens=3), resume=tuple(whole[:2])) == (
            whole[2:3],
            stored.tokenizer.decode(whole[2:3]),
            FinishReason.LENGTH,
        )
        with pytest.raises(ModelError, match="nothing is left"):
            await run(backend, Params(max_tokens=2), resume=tuple(whole[:2]))

    serve(stored, test, Script(**SERVERS[kind]))


def test_parameters_go_out_under_the_names_of_the_server(stored: Stored) -> None:
    params = Params(max_tokens=9, temperature=0.5, top_k=5, min_p=0.1, seed=2**40 + 3, logit_bias=((7, -1.5),))
    for owner, seed in {"vllm": 2**40 + 3, "llamacpp": (2**40 + 3) % (2**32 - 1)}.items():

        async def test(backend: OpenAIBackend, server: ScriptedServer, seed: int = seed) -> None:
            await run(backend, params)
            (asked,) = server.script.requests
            assert (asked["temperature"], asked["top_k"], asked["min_p"], asked["seed"]) == (0.5, 5, 0.1, seed)
            assert asked["logit_bias"] == {"7": -1.5}

        serve(stored, test, Script(owned_by=owner))


def test_tenants_are_kept_apart_where_the_server_can(stored: Stored) -> None:
    for owner, told in {"vllm": {"cache_salt": b"a payer".hex()}, "sglang": {}, "llamacpp": {}, "somebody": {}}.items():

        async def test(backend: OpenAIBackend, server: ScriptedServer, told: dict[str, str] = told) -> None:
            prompt = replace(ask(backend), salt=b"a payer")
            async with aclosing(backend.generate(prompt, Params(max_tokens=2))) as steps:
                assert [step async for step in steps]
            (asked,) = server.script.requests
            assert {name: asked[name] for name in asked if "salt" in name} == told

        serve(stored, test, Script(owned_by=owner, takes_ids=owner != "somebody"))


WAITED_OUT = {"silent", "silent midway", "no head", "endless comments", "endless nothing", "dripping nothing"}
"""What only a limit of time ends."""


@pytest.mark.parametrize("told", [True, False], ids=["ids", "text"])
@pytest.mark.parametrize("wound", WOUNDS)
def test_what_a_broken_server_does_is_an_error_that_names_it(stored: Stored, wound: str, told: bool) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        with pytest.raises(ModelError) as caught:
            await run(backend, Params(max_tokens=20))
        assert server.url in str(caught.value) and len(str(caught.value)) < 500
        assert "\x1b" not in str(caught.value) and backend.free_slots == 4
        assert "CUDA out of memory" in str(caught.value) or wound not in ("error", "error midway", "error with done")
        server.script.wound = ""
        if wound not in WAITED_OUT:
            assert (await run(backend))[1] == ANSWER  # and nothing of it is left behind

    script = Script(wound=wound, tells_ids=told, owned_by="vllm" if told else "sglang")
    limit = 0.4 if wound in WAITED_OUT else 30.0
    serve(stored, test, script, first_token_s=limit, stall_s=limit, retries=0)


@pytest.mark.parametrize("wound", ID_WOUNDS)
def test_wrong_ids_are_an_error(stored: Stored, wound: str) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        with pytest.raises(ModelError, match=server.url):
            await run(backend, Params(max_tokens=20))

    serve(stored, test, Script(wound=wound), retries=0)


@pytest.mark.parametrize("told", [True, False], ids=["ids", "text"])
@pytest.mark.parametrize("wound", HARMLESS)
def test_lies_about_counts_cost_nobody_anything(stored: Stored, wound: str, told: bool) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        ids, text, reason = await run(backend, Params(max_tokens=20))
        assert reason is FinishReason.LENGTH and stored.tokenizer.decode(ids).startswith(text.rstrip("\ufffd"))
        assert len(ids) == 20 or not told

    serve(stored, test, Script(wound=wound, tells_ids=told, owned_by="vllm" if told else "sglang"))


def test_memory_stays_flat_under_a_flood(stored: Stored) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        with pytest.raises(ModelError):  # a first one, for what is made once
            await run(backend, Params(max_tokens=20))
        tracemalloc.start()
        try:
            for wound in ("endless line", "huge error", "endless head", "endless comments", "huge text"):
                server.script.wound = wound
                with pytest.raises(ModelError):
                    await run(backend, Params(max_tokens=20))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 16 << 20

    serve(stored, test, Script(wound="endless line"), first_token_s=1.0, stall_s=1.0, retries=0)


@pytest.mark.parametrize("wound", ["status 503", "no http", "nothing"])
def test_it_is_asked_again_while_nothing_has_come(stored: Stored, wound: str) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        if wound == "nothing":  # a stream that ends without a word is no trouble of the line
            with pytest.raises(ModelError, match="without a reason"):
                await run(backend)
            return
        assert (await run(backend))[1] == ANSWER
        assert len(server.script.requests) == 3
        server.script.wounded = 3
        with pytest.raises(ModelError):
            await run(backend)
        assert len(server.script.requests) == 6

    serve(stored, test, Script(wound=wound, wounded=2))


def test_after_the_first_token_nothing_is_asked_again(stored: Stored) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        with pytest.raises(ModelError):
            await run(backend, Params(max_tokens=20))
        assert len(server.script.requests) == 1

    for wound in ("error midway", "cut midway"):
        serve(stored, test, Script(wound=wound, wounded=1))


def test_leaving_a_stream_closes_the_connection(stored: Stored) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        async with aclosing(backend.generate(ask(backend), Params(max_tokens=500))) as steps:
            await anext(steps)
            assert backend.free_slots == 3
        assert backend.free_slots == 4
        while not server.script.aborted:
            await trio.sleep(0.01)

    serve(stored, test, Script(seconds_per_token=0.02))


REFUSED = {
    "counts": ({"adds_tokens": 1}, {}, "another tokenizer, or it adds"),
    "unknown model": ({}, {"served": ("else",)}, "has no model 'else'"),
    "names": ({}, {"served": ("a", "b")}, "names 2 models"),
    "dtype": ({}, {"dtype": ""}, "what they buy"),
    "url": ({}, {"url": "http://user@host/"}, "the address of a model server"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_cannot_be_right_is_not_served(stored: Stored, case: str) -> None:
    script, options, message = REFUSED[case]

    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        raise RuntimeError("served")

    async def main() -> None:
        async with open_scripted(stored.tokenizer, Script(answer=stored.answer, **script)) as server:
            values: dict[str, Any] = {"url": server.url, "served": (NAME,), "dtype": "bfloat16", **options}
            with pytest.raises(ModelError, match=message):
                async with open_openai(stored.store, [stored.manifest], ServerSettings(**values)):
                    raise RuntimeError("served")

    with plain_errors():
        trio.run(main)


def test_a_server_that_is_full_or_gone_is_not_offered(stored: Stored) -> None:
    async def test(backend: OpenAIBackend, server: ScriptedServer) -> None:
        async def until(free: int) -> None:
            while backend.free_slots != free:
                await trio.sleep(0.01)

        await until(4)
        server.script.metrics = 'vllm:num_requests_waiting{model_name="m"} 2.0\nvllm:kv_cache_usage_perc{m="m"} 0.1\n'
        await until(0)
        server.script.metrics = 'vllm:num_requests_waiting{m="m"} 0.0\nvllm:kv_cache_usage_perc{m="m"} 0.99\n'
        await trio.sleep(0.1)
        assert backend.free_slots == 0 and not backend.fits(ask(backend), 10)
        server.script.metrics = "vllm:num_requests_waiting nonsense\nvllm:kv_cache_usage_perc 0.2\n"
        await until(4)
        assert backend.fits(ask(backend), 10) and not backend.could_fit(ask(backend).model, 1025)

    serve(stored, test, poll_s=0.02)


def test_a_paid_chat_goes_through_the_market(stored: Stored) -> None:
    async def main() -> None:
        async with open_scripted(stored.tokenizer, Script(answer=stored.answer)) as server:
            given = ServerSettings(server.url, "bfloat16", (NAME,))
            async with open_openai(stored.store, [stored.manifest], given) as backend, open_market() as market:
                await self_test(backend)
                worker = await market.worker(backend)  # type: ignore[arg-type]
                client = await market.client()
                question = [{"role": "user", "content": "What is signed?"}]
                async with client.chat(stored.manifest.name, question) as stream:
                    assert await stream.text() == ANSWER
                assert stream.receipt is not None
                assert stream.receipt.output_tokens == len(stored.answer)
                assert stream.receipt.cost == cost(market.price, len(ask(backend).token_ids), len(stored.answer))
                (offer,) = worker.desk.valid.values()
                assert (offer.document.models[0].dtype, offer.document.models[0].numerics_class) == ("bfloat16", "")
                with pytest.raises(NodeError, match=r"unsupported_param|no worker"):  # not offered, so not taken
                    async with client.chat(stored.manifest.name, question, presence_penalty=1.0) as stream:
                        await stream.text()

    with plain_errors():
        trio.run(main)


# ------------------------------------------------------------------------------------------------------ the parts

CUTS = st.lists(st.integers(0, 200), max_size=12)
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=120)


def pieces(data: Any, cuts: list[int]) -> list[Any]:
    at = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(at)]


@settings(max_examples=300, deadline=None)
@given(text=WORDS, cuts=CUTS)
def test_ids_of_a_text_do_not_depend_on_how_it_came(stored: Stored, text: str, cuts: list[int]) -> None:
    def made(parts: list[str]) -> list[int]:
        maker = Retokeniser(stored.tokenizer)
        ids = [token for part in parts for token in maker.push(part, 10_000)]
        return ids + maker.finish()

    whole = made([text])
    assert made(pieces(text, cuts)) == whole
    assert stored.tokenizer.decode(whole) == text


@pytest.mark.parametrize(
    "text", [ANSWER, "it's  we'll   'll\n\n x'", "a" * 31 + " " + "b" * 31, " \n \t x", "<|im_", ""]
)
def test_ids_of_a_text_are_the_tokenizers_own(stored: Stored, text: str) -> None:
    maker = Retokeniser(stored.tokenizer)
    assert maker.push(text, 10_000) + maker.finish() == stored.tokenizer.encode(text)


def test_a_text_without_spaces_flows_and_a_special_token_in_a_text_stays_text(stored: Stored) -> None:
    maker = Retokeniser(stored.tokenizer)
    held = len("x" * 500) - len(stored.tokenizer.decode(maker.push("x" * 500, 10_000)))
    assert held <= LONGEST_WORD
    maker = Retokeniser(stored.tokenizer)
    ids = maker.push("see <|im_end|> here", 100) + maker.finish()
    assert stored.tokenizer.decode(ids) == "see <|im_end|> here"
    assert not set(ids) & stored.tokenizer.special_ids


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=CUTS,
)
def test_events_do_not_depend_on_how_bytes_came(events: list[str], end: str, cuts: list[int]) -> None:
    raw = "".join(f": hm{end}event: e{end}data: {event}{end}data:{event}{end}{end}" for event in events).encode()
    reader = EventReader()
    found = [event for part in pieces(raw, cuts) for event in reader.push(part)]
    assert [(event.name, event.data) for event in found] == [
        ("e", f"{event}\n{event.removeprefix(' ')}") for event in events
    ]


def test_a_text_of_a_hundred_thousand_characters_in_one_event_is_refused() -> None:
    """Its tokens would be found in more than a second, in which the worker's loop does nothing else."""
    piece = parse_piece(Event("message", json.dumps({"choices": [{"text": "1" * 16_384}]})))
    assert piece is not None and len(piece.text) == 16_384
    with pytest.raises(ServerFault, match="100000 characters"):
        parse_piece(Event("message", json.dumps({"choices": [{"text": "1" * 100_000}]})))


def test_events_are_bounded() -> None:
    for flood in (b"data: " + b"x" * 100, b"data: xxxxxxxx\n" * 12, b"\xff\n"):
        reader = EventReader(limit=64)
        with pytest.raises(BadEvents):
            for byte in flood:
                reader.push(bytes([byte]))
