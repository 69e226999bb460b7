"""CTranslate2, int8, converted from the same safetensors. It answers whole batches; when a first token came does not show."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import ctranslate2
import talk


class CTranslate2:
    def __init__(self, asked: dict[str, Any]) -> None:
        folder = Path(asked["scratch"], "ctranslate2-int8")
        if not folder.exists():
            ctranslate2.converters.TransformersConverter(asked["model"]).convert(str(folder), quantization="int8")
        self.tokens: list[str] = json.loads((folder / "vocabulary.json").read_text())
        self.model = ctranslate2.Generator(
            str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=asked["threads"]
        )

    def run(self, prompts: list[list[int]], new_tokens: int, first: Callable[[int], None]) -> list[list[int]]:
        results = self.model.generate_batch(
            [[self.tokens[token] for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in results]


def load(asked: dict[str, Any]) -> tuple[CTranslate2, dict[str, str]]:
    return CTranslate2(asked), {"ctranslate2": metadata.version("ctranslate2")}


if __name__ == "__main__":
    talk.serve(load)
