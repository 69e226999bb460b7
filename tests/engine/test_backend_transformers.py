"""The fallback through `transformers`: its own greedy answers token for token, and every promise of the port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import trio

pytest.importorskip("torch")
pytest.importorskip("transformers")

import safetensors.torch
import torch
import transformers

from node.errors import ModelError
from node.groups import plain_errors
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.ports import Prompt
from node.runtime.backend import EngineSettings, TorchBackend, open_backend
from node.runtime.backends.transformers_model import PIECE
from node.testing.tiny_model import NAME, add_tiny, write_tokenizer
from protocol.logprobs import TokenLogprobs, check, unpack
from protocol.messages import ChatMessage, FinishReason, Params

TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 512}
FAMILIES = {
    "gpt_neox": {**TINY, "intermediate_size": 64},
    "opt": {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "max_position_embeddings": 512},
    "stablelm": {**TINY, "intermediate_size": 64, "num_key_value_heads": 2},
}
"""Architectures that our own engine does not have."""


def add(family: str, root: Path) -> tuple[ModelStore, Manifest]:
    """A model of this architecture with seeded random weights."""
    folder, store = root / family, ModelStore(root / "store")
    folder.mkdir()
    size = write_tokenizer(folder)
    config = transformers.AutoConfig.for_model(family, vocab_size=size, eos_token_id=2, **FAMILIES[family])
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    for extra in folder.iterdir():
        if extra.suffix not in (".safetensors", ".json"):
            extra.unlink()
    return store, store.add_folder(folder, f"tiny-{family.replace('_', '-')}")


Test = Callable[[TorchBackend], Awaitable[None]]
THREAD = EngineSettings(runtime="transformers", isolation="thread")


def run(store: ModelStore, manifest: Manifest, test: Test, **options: object) -> None:
    async def main() -> None:
        with trio.fail_after(120):
            async with open_backend(store, [manifest], replace(THREAD, **options)) as backend:  # type: ignore[arg-type]
                await test(backend)

    with plain_errors():
        trio.run(main)


async def ids_of(backend: object, prompt: Prompt, params: Params, resume: tuple[int, ...] = ()) -> list[int]:
    found: list[int] = []
    async with aclosing(backend.generate(prompt, params, resume)) as steps:  # type: ignore[attr-defined]
        async for step in steps:
            found += step.token_ids
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_itself_generates(family: str, tmp_path: Path) -> None:
    store, manifest = add(family, tmp_path)

    async def test(backend: TorchBackend) -> None:
        assert "response_format" in backend.models[manifest.id].params and backend.speeds[manifest.id].tokens_per_second
        reference = transformers.AutoModelForCausalLM.from_pretrained(store.path(manifest.id), dtype=torch.float32)
        for size in (1, 5, PIECE + 3):
            prompt = Prompt(manifest.id, tuple((11 * n + 5) % 400 for n in range(size)))
            ids = await ids_of(backend, prompt, Params(max_tokens=24))
            wanted = reference.generate(
                torch.tensor([prompt.token_ids]), max_new_tokens=24, do_sample=False, pad_token_id=2
            )
            assert ids == wanted[0, size:].tolist()

    run(store, manifest, test)


def test_it_tells_the_log_probabilities_that_our_own_engine_tells(tmp_path: Path) -> None:
    store, folder = ModelStore(tmp_path / "store"), tmp_path / "tiny"
    folder.mkdir()
    manifest = add_tiny(store, folder)
    prompt = Prompt(manifest.id, tuple(range(5, 25)))
    found: dict[str, list[TokenLogprobs]] = {}

    async def read(backend: object, name: str, count: int) -> None:
        asked = Params(max_tokens=16, temperature=1.0, repetition_penalty=1.2, seed=4, logprobs=count)
        found[name] = []
        async with aclosing(backend.generate(prompt, asked)) as steps:  # type: ignore[attr-defined]
            async for step in steps:
                check(step.token_ids, step.data, count)
                found[name] += unpack(step.token_ids, step.data)

    async def own() -> None:
        async with open_backend(store, [manifest], EngineSettings(isolation="thread")) as backend:
            await read(backend, "own", 5)

    trio.run(own)

    async def test(backend: TorchBackend) -> None:
        assert "logprobs" in backend.models[manifest.id].params
        await read(backend, "theirs", 5)
        await read(backend, "none of the likeliest", 0)
        for ours, theirs, bare in zip(*found.values(), strict=True):
            assert ours.token_id == theirs.token_id == bare.token_id and bare.top == ()
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert bare.logprob == theirs.logprob

    run(store, manifest, test)


def test_it_draws_as_our_own_engine_does_and_goes_on_from_any_token(tmp_path: Path) -> None:
    """Same weights, same seed: fp32 logits of the two differ in the last bits, and a draw shows that once in millions."""
    store, folder = ModelStore(tmp_path / "store"), tmp_path / "tiny"
    folder.mkdir()
    manifest = add_tiny(store, folder)
    prompt = Prompt(manifest.id, tuple(range(5, 25)))
    params = Params(max_tokens=24, temperature=1.0, top_p=0.9, top_k=50, frequency_penalty=0.3, seed=99)
    ours: list[int] = []

    async def own() -> None:
        async with open_backend(store, [manifest], EngineSettings(isolation="thread")) as backend:
            ours.extend(await ids_of(backend, prompt, params))

    trio.run(own)

    async def test(backend: TorchBackend) -> None:
        assert await ids_of(backend, prompt, params) == ours
        for cut in range(1, len(ours), 5):
            assert ours[:cut] + await ids_of(backend, prompt, params, tuple(ours[:cut])) == ours
        found: dict[int, list[int]] = {}

        async def one(seed: int) -> None:
            found[seed] = await ids_of(backend, prompt, Params(max_tokens=12, temperature=1.0, seed=seed))

        for seed in range(3):
            await one(seed)
        alone = dict(found)
        async with trio.open_nursery() as nursery:
            for seed in range(3):
                nursery.start_soon(one, seed)
        assert found == alone and backend.free_slots == 4

    run(store, manifest, test)


def test_leaving_ends_within_a_step_and_memory_is_kept_account_of(tmp_path: Path) -> None:
    store, folder = ModelStore(tmp_path / "store"), tmp_path / "tiny"
    folder.mkdir()
    manifest = add_tiny(store, folder)

    async def test(backend: TorchBackend) -> None:
        prompt = backend.prepare(manifest.id, [ChatMessage(role="user", content="hello")])
        room = 1024 - len(prompt.token_ids)
        assert backend.fits(prompt, room - 100) and not backend.fits(prompt, room + 1)
        async with aclosing(backend.generate(prompt, Params(max_tokens=600))) as steps:
            await anext(steps)
            assert not backend.fits(prompt, 600) and backend.could_fit(manifest.id, 700) and backend.free_slots == 3
            with pytest.raises(ModelError, match="are needed"):
                await ids_of(backend, prompt, Params(max_tokens=600))
        while not backend.fits(prompt, 600):
            await trio.sleep(0.01)
        assert backend.free_slots == 4
        with pytest.raises(ModelError, match="outside the vocabulary"):
            await ids_of(backend, Prompt(manifest.id, (1 << 20,)), Params(max_tokens=4))
        with pytest.raises(ModelError, match="outside the vocabulary"):
            await ids_of(backend, prompt, Params(max_tokens=4, logit_bias=((1 << 20, 1.0),)))
        with trio.move_on_after(0.05) as scope:
            await ids_of(backend, prompt, Params(max_tokens=900))
        assert scope.cancelled_caught
        while not backend.fits(prompt, 600):
            await trio.sleep(0.01)
        text, reason = "", None
        async with aclosing(backend.generate(prompt, Params(max_tokens=60, stop=("e",)))) as steps:
            async for step in steps:
                text, reason = text + step.text, step.finish_reason
        assert "e" not in text and reason in (FinishReason.STOP_STRING, FinishReason.LENGTH, FinishReason.STOP)

    run(store, manifest, test, cache_bytes=1024 * 2 * 2 * 2 * 8 * 4)


def test_a_model_that_fails_its_self_test_is_not_sold(tmp_path: Path) -> None:
    """Weights of NaN load without complaint; the job that every model must answer finds it."""
    store, folder = ModelStore(tmp_path / "store"), tmp_path / "tiny"
    folder.mkdir()
    add_tiny(ModelStore(tmp_path / "aside"), folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = store.add_folder(folder, "tiny-nan")

    async def test(backend: TorchBackend) -> None:
        raise RuntimeError("served")

    with pytest.raises(ModelError, match="self-test did not pass"):
        run(store, manifest, test)


def test_what_cannot_be_run_safely_is_refused(tmp_path: Path) -> None:
    store, folder = ModelStore(tmp_path / "store"), tmp_path / "tiny"
    folder.mkdir()
    manifest = add_tiny(store, folder, model_type="no_such_architecture")

    async def test(backend: TorchBackend) -> None:
        raise RuntimeError("served")

    with pytest.raises(ModelError, match="transformers cannot load"):
        run(store, manifest, test)
    assert manifest.name == NAME
