"""The torch back end with the real model: a client's schema binds what it writes, text and tokens alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("torch")
pytest.importorskip("llguidance")

from node.errors import PromptInvalid
from node.models.manifest import Manifest
from node.models.packages import add_known
from node.models.store import ModelStore
from node.runtime.backend import EngineSettings, TorchBackend, open_backend
from protocol.messages import ChatMessage, FinishReason, Params, ResponseFormat

COLOUR = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "likes": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["colour", "likes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def stored(smollm: Path) -> tuple[ModelStore, Manifest]:
    store = ModelStore(smollm.parent)
    return store, add_known(store, "smollm2-135m-instruct", progress=False)


async def ask(
    backend: TorchBackend, model: Any, params: Params, resume: Sequence[int] = ()
) -> tuple[str, list[int], FinishReason | None]:
    prompt = backend.prepare(model, [ChatMessage("user", "Name a colour, and how much you like it, as JSON.")])
    text, ids, reason = "", list[int](), None
    async for step in backend.generate(prompt, params, resume):
        text, ids, reason = text + step.text, ids + list(step.token_ids), step.finish_reason
    return text, ids, reason


def test_a_schema_binds_what_the_model_writes(stored: tuple[ModelStore, Manifest]) -> None:
    """M4."""
    store, manifest = stored

    async def test() -> None:
        async with open_backend(store, [manifest], EngineSettings()) as backend:
            assert "response_format" in backend.models[manifest.id].params
            wanted = ResponseFormat("json_schema", json.dumps(COLOUR))
            backend.check_format(manifest.id, wanted)
            seen = set()
            for seed in range(4):
                params = Params(max_tokens=60, temperature=1.5, seed=seed, response_format=wanted)
                text, ids, reason = await ask(backend, manifest.id, params)
                answer = json.loads(text)
                assert answer["colour"] in ("red", "green", "blue") and 0 <= answer["likes"] <= 9
                assert reason is FinishReason.STOP
                again, rest, _ = await ask(backend, manifest.id, params, ids[:4])
                assert ids[:4] + rest == ids and text.endswith(again)
                seen.add(text)
            assert len(seen) > 1
            with pytest.raises(PromptInvalid, match="do not fit the client's JSON schema"):
                backend.check_format(manifest.id, wanted, [ids[0], ids[0], ids[0]])
            with pytest.raises(PromptInvalid, match="is refused"):
                backend.check_format(manifest.id, ResponseFormat("regex", "("))

    trio.run(test)
