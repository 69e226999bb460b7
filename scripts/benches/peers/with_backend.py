"""The project's other back ends that compute in an engine's process: `transformers`, and ONNX Runtime on a file exported here.

As their processes run them, but for the line to the node: the same scheduler and sampler around the library's logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import talk

from node.runtime.backends.logits_engine import LogitsEngine, LogitsModel
from node.runtime.engine.sequence import Sequence
from protocol.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
CACHE_BYTES = 2 << 30


class BackEnd:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.engine = LogitsEngine(model(asked), CACHE_BYTES)

    def run(self, prompts: list[list[int]], new_tokens: int, first: Callable[[int], None]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        for n, prompt in enumerate(prompts):
            self.engine.submit(Sequence(n, tuple(prompt), GREEDY, new_tokens, eos_ids=frozenset()))
        while not self.engine.idle:
            for output in self.engine.step():
                found[int(str(output.id))].append(output.token_id)
                first(int(str(output.id)))
        return found


def model(asked: dict[str, Any]) -> LogitsModel:
    folder, dtype = Path(asked["model"]), asked["dtype"]
    if asked["runtime"] == "transformers":
        from node.runtime.backends.transformers_model import TransformersModel

        return TransformersModel(folder, "cpu", dtype, asked["threads"])
    from node.runtime.backends.onnx_model import OnnxModel
    from node.testing.onnx_export import export

    exported = Path(asked["scratch"]) / f"{folder.name}-onnx-{dtype}"
    if not (exported / "config.json").exists():  # written last
        exported.mkdir(exist_ok=True)
        export(folder, exported, weights=dtype)
    return OnnxModel(exported, dtype, asked["threads"])


def load(asked: dict[str, Any]) -> tuple[BackEnd, dict[str, str]]:
    library = {"transformers": "transformers", "onnx": "onnxruntime"}[asked["runtime"]]
    return BackEnd(asked), {library: metadata.version(library), "torch": metadata.version("torch")}


if __name__ == "__main__":
    talk.serve(load)
