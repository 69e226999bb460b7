"""From a model folder to a model in memory: safetensors only, every tensor checked against config.json.

On a CPU in the stored dtype the tensors are the mapped file itself: loading reads nothing, and pages come as they are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from node.runtime.engine.errors import UnsupportedModel
from node.runtime.engine.models.llama import Llama, LlamaConfig

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MAX_JSON: Final = 1 << 20


def load(folder: Path, device: torch.device, dtype: str) -> tuple[Llama, frozenset[int]]:
    """The model of a folder and its end-of-sequence ids. Raises `UnsupportedModel`."""
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    raw = _json(folder / "config.json")
    if raw.get("model_type") != "llama":
        raise UnsupportedModel(f"model_type {raw.get('model_type')!r} is not supported; supported: llama")
    config = LlamaConfig.parse(raw)
    return Llama(config, _tensors(folder, config.shapes(), device, DTYPES[dtype])), _eos_ids(folder, raw)


def _tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in shapes.keys() & set(file.keys()):
                    found[name] = file.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise UnsupportedModel(f"{path.name} cannot be read: {error}") from None
    for name, shape in shapes.items():
        if name not in found:
            raise UnsupportedModel(f"the weight files lack {name}")
        if tuple(found[name].shape) != shape:
            raise UnsupportedModel(f"{name} has shape {tuple(found[name].shape)}, config.json says {shape}")
    return found


def _eos_ids(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    path = folder / "generation_config.json"
    value = (_json(path) if path.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise UnsupportedModel(f"eos_token_id is {value!r}")
    return frozenset(ids)


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path.name} cannot be read: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path.name} is not a JSON object")
    return value
