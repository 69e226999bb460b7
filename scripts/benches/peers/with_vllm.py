"""vLLM for CPUs, in this process (no server, no second process that would poll), bf16; eager or compiled by `compiled`.

Token ids in, token ids out: no tokenizer and no detokenizing, so that only the engine is measured. Prefix caching is off, as
for every contender.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

import talk
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


class Vllm:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.count = 0
        self.engine = LLM(
            model=asked["model"],
            dtype="bfloat16",
            enforce_eager=not asked["compiled"],
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=asked["streams"],
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine

    def run(self, prompts: list[list[int]], new_tokens: int, first: Callable[[int], None]) -> list[list[int]]:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        found: dict[str, list[int]] = {}
        for prompt in prompts:
            self.count += 1
            found[str(self.count)] = []
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
        order = {name: n for n, name in enumerate(found)}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                found[output.request_id] += output.outputs[0].token_ids
                first(order[output.request_id])
        return list(found.values())


def load(asked: dict[str, Any]) -> tuple[Vllm, dict[str, str]]:
    return Vllm(asked), {name: metadata.version(name) for name in ("vllm-cpu", "torch")}


if __name__ == "__main__":
    talk.serve(load)
