"""A sentence embedder as the sentence-transformers library lays it out, as one flat model folder.

What makes a vector of a text must be part of the model and of its id. sentence-transformers keeps it in files beside config.json:
how many tokens the model was made for goes into config.json here, and so does the pooling.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from node import nesting
from node.errors import ModelError


def convert(source: Path, folder: Path) -> None:
    """Write model.safetensors, tokenizer.json and config.json of the model in `source`, mean pooled, into `folder`.

    Raises `ModelError` when a file is damaged.
    """
    config, own = _json(source / "config.json"), _json(source / "sentence_bert_config.json")
    config |= {"pooling": "mean", "max_seq_length": own.get("max_seq_length", config.get("max_position_embeddings"))}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="ascii")
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copyfile(source / name, folder / name)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = nesting.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object")
    return value
