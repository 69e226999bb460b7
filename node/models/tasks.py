"""For which tasks a stored model can be used: its config.json says it, and nobody has to be told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from node import nesting
from node.errors import ModelError
from protocol.tasks import Task


def tasks_of(folder: Path) -> tuple[Task, ...]:
    """Of a model folder. Raises `ModelError` when config.json cannot be read, or is that of a model for another use."""
    try:
        config = nesting.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"config.json cannot be read: {error}"[:300]) from None
    if not isinstance(config, dict):
        raise ModelError("config.json is not a JSON object")
    match config.get("model_type"):
        case "whisper":
            return (Task.TRANSCRIBE,)
        case "ppocr":
            return (Task.OCR,)
        case "bert":
            return _bert(config)
        case _:
            return (Task.CHAT,)


def _bert(config: Mapping[str, Any]) -> tuple[Task, ...]:
    """Without a head: vectors, and scores by how near they lie. With a head of one output: scores of both texts read together."""
    if "BertForSequenceClassification" not in (config.get("architectures") or ()):
        return (Task.EMBED, Task.RERANK)
    labels = config.get("id2label")
    if not isinstance(labels, dict) or len(labels) != 1:
        raise ModelError("a classifier of several labels serves no task", hint="a reranker has one label")
    return (Task.RERANK,)
