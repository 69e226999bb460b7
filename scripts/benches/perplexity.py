"""Perplexity of SmolLM2-135M-Instruct on a fixed text, in each format of the linear layers: what quantization costs.

The text is `perplexity.txt` beside this file (decision records of this project as they once were; it never changes), in windows
of `WINDOW` tokens that know nothing of each other. Figures: `perplexity_*` = exp of the mean negative log-likelihood per
token; `*_over_bfloat16` = its ratio to bfloat16's, where the bar for int8 is 1.01; `weights_mb_*` = bytes held.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

WINDOW = 512
MODEL = "smollm2-135m-instruct"
TEXT = Path(__file__).with_suffix(".txt")


def perplexity(engine: Any, tokens: list[int]) -> float:
    """Of all tokens but the first of each window."""
    import torch

    loss, count = 0.0, 0
    for begin in range(0, len(tokens) - 1, WINDOW):
        window = tokens[begin : begin + WINDOW]
        logits = engine.prefill_logits(window)[:-1]
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
        count += len(window) - 1
    return math.exp(loss / count)


def run(args: Any = None) -> dict[str, Any]:
    """Each format once: the figures are exact, so nothing is repeated. Needs the model's package."""
    from node.models.packages import add_known
    from node.models.store import ModelStore
    from node.models.tokenizer import Tokenizer
    from node.runtime.engine.engine import Engine
    from node.runtime.engine.linear import FORMATS

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        store = ModelStore(Path(os.environ.get("GRISTMILL_TEST_MODELS") or scratch))
        folder = store.path(add_known(store, MODEL, progress=False).id)
        tokenizer = Tokenizer(folder)
        try:
            tokens = tokenizer.encode(TEXT.read_text())
        finally:
            tokenizer.close()
        for fmt in FORMATS:
            engine = Engine(folder, "cpu", fmt)
            figures[f"perplexity_{fmt}"] = round(perplexity(engine, tokens), 4)
            figures[f"weights_mb_{fmt}"] = round(engine.weight_bytes / 1e6, 1)
            del engine
    for fmt in FORMATS:
        figures[f"{fmt}_over_bfloat16"] = round(figures[f"perplexity_{fmt}"] / figures["perplexity_bfloat16"], 5)
    return {"figures": figures, "conditions": {"model": MODEL, "tokens": len(tokens), "window": WINDOW}}
