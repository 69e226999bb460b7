"""transformers: its continuous batching, or plain `generate` on one static batch, by `continuous`.

Continuous batching is given its best: one manager, warmed and started before anything is timed, no sharing of blocks, batches of
2,048 tokens (smaller ones measured slower, its own choice of 8,192 no faster), and a block for each stream: left alone it takes
most of the machine's memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads

import talk
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

GET_SECONDS = 600


class Static:
    """`generate`. All prompts have one length here, so the batch has no padding."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.model = _model(asked)

    def run(self, prompts: list[list[int]], new_tokens: int, first: Callable[[int], None]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        config = GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        with torch.inference_mode():
            found = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return found[:, ids.shape[1] :].tolist()


class Continuous:
    """What `generate_batch` does, with the manager kept between calls."""

    def __init__(self, asked: dict[str, Any]) -> None:
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        batching = ContinuousBatchingConfig(
            num_blocks=asked["streams"], max_batch_tokens=2048, allow_block_sharing=False
        )
        self.manager = _model(asked).init_continuous_batching(
            generation_config=config, continuous_batching_config=batching
        )
        self.manager.warmup()
        self.manager.start()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int, first: Callable[[int], None]) -> list[list[int]]:
        names = self.manager.add_requests(prompts, max_new_tokens=new_tokens)
        found: dict[str, list[int]] = {}
        while len(found) < len(names):
            result = self.manager.get_result(timeout=GET_SECONDS)
            if result is None:
                raise RuntimeError("no result: the generation thread has ended")
            if result.error:
                raise RuntimeError(result.error)
            if result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
        return [found[name] for name in names]


def _model(asked: dict[str, Any]) -> Any:
    torch.set_num_threads(asked["threads"])
    return AutoModelForCausalLM.from_pretrained(asked["model"], dtype=getattr(torch, asked["dtype"])).eval()


def load(asked: dict[str, Any]) -> tuple[talk.Driver, dict[str, str]]:
    driver = Continuous(asked) if asked["continuous"] else Static(asked)
    return driver, {name: metadata.version(name) for name in ("transformers", "torch")}


if __name__ == "__main__":
    talk.serve(load)
