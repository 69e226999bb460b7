"""What a stored model's own files say, for libraries that do not read them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from node import nesting
from node.runtime.engine.errors import UnsupportedModel


def context_length_of(folder: Path) -> int:
    """Tokens of prompt and answer together. Raises `UnsupportedModel`."""
    found = _json(folder / "config.json").get("max_position_embeddings")
    if type(found) is not int or not 1 <= found <= 1 << 30:
        raise UnsupportedModel("config.json has no max_position_embeddings")
    return found


def eos_ids_of(folder: Path) -> frozenset[int]:
    """Tokens that end an answer. Raises `UnsupportedModel`."""
    path = folder / "generation_config.json"
    value = (_json(path) if path.is_file() else {}).get("eos_token_id")
    if value is None:
        value = _json(folder / "config.json").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in ids):
        raise UnsupportedModel(f"eos_token_id is {value!r}"[:300])
    return frozenset(ids)


def key_shape_of(folder: Path) -> tuple[int, int]:
    """Heads of the keys, and numbers of each, for a file that leaves them open. Raises `UnsupportedModel`."""
    config = _json(folder / "config.json")
    heads = config.get("num_attention_heads")
    keys, size = config.get("num_key_value_heads") or heads, config.get("head_dim")
    if size is None and type(config.get("hidden_size")) is int and type(heads) is int and heads > 0:
        size = config["hidden_size"] // heads
    if not all(type(one) is int and 0 < one <= 1 << 20 for one in (keys, size)):
        raise UnsupportedModel("config.json does not say how large keys are")
    return keys, size


def _json(path: Path) -> dict[str, Any]:
    try:
        value = nesting.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path.name} cannot be read: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path.name} is not a JSON object")
    return value
