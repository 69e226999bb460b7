"""A stream with stop strings that goes on elsewhere ends where the unbroken one ends: the strings reach over the seam."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

pytest.importorskip("torch")

from node.models.store import ModelStore
from node.ports import Step
from node.runtime.backend import open_backend
from node.runtime.engine_settings import EngineSettings
from node.runtime.launch import ThreadLauncher
from protocol.messages import ChatMessage, FinishReason, Params

LETTERS = tuple((token, 50.0) for token in sorted({*range(32, 58), *range(64, 90)}))
"""Ids of the tiny tokenizer that are letters of ASCII."""


def test_a_stop_string_is_seen_over_the_seam(make_chat_model: Callable[..., Path], tmp_path: Path) -> None:
    async def main() -> None:
        store = ModelStore(tmp_path)
        manifest = store.add_folder(make_chat_model(), "tiny")
        settings = EngineSettings(cache_bytes=1 << 20, isolation="thread")
        async with open_backend(store, [manifest], settings, launch=ThreadLauncher()) as backend:
            prompt = backend.prepare(manifest.id, [ChatMessage(role="user", content="hello")])

            async def steps(stop: tuple[str, ...], resume: tuple[int, ...] = ()) -> list[Step]:
                params = Params(max_tokens=40, temperature=1.0, seed=3, logit_bias=LETTERS, stop=stop)
                return [step async for step in backend.generate(prompt, params, resume)]

            free = "".join(step.text for step in await steps(()))
            assert len(free) == 40 and free.isascii()
            at = next(at for at in range(5, 30) if free.find(free[at : at + 3]) == at)
            stop = (free[at : at + 3],)
            whole = await steps(stop)
            tokens = tuple(token for step in whole for token in step.token_ids)
            shown = "".join(step.text for step in whole)
            assert len(tokens) == at + 3 and shown == free[:at]
            for cut in range(1, len(tokens) + 1):
                rest = await steps(stop, tokens[:cut])
                assert (*tokens[:cut], *(token for step in rest for token in step.token_ids)) == tokens
                assert rest[-1].finish_reason is FinishReason.STOP_STRING
                assert "".join(step.text for step in rest) == shown[min(cut, at) :]

    trio.run(main)
