"""Tensors of one safetensors file, and numbers of a config.json, each checked before it is used.

For the models that are not decoders; no file is trusted to be complete, well shaped or small.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from node.runtime.engine.errors import UnsupportedModel

_MAX_JSON: Final = 1 << 20


def read_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensors that `shapes` names, converted to `dtype`. What else the file holds is left in it.

    Raises `UnsupportedModel` when one is missing or has another shape.
    """
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            present = set(file.keys())
            for name, shape in shapes.items():
                if name not in present:
                    raise UnsupportedModel(f"{path.name} lacks {name}")
                if tuple(file.get_slice(name).get_shape()) != shape:
                    raise UnsupportedModel(f"{name} has shape {file.get_slice(name).get_shape()}, expected {shape}")
                found[name] = file.get_tensor(name).to(dtype)
    except (SafetensorError, OSError) as error:
        raise UnsupportedModel(f"{path.name} cannot be read: {error}"[:300]) from None
    return found


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors hold, each storage once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def read_config(folder: Path, model_type: str) -> dict[str, Any]:
    """config.json of a model of this type. Raises `UnsupportedModel`."""
    try:
        with (folder / "config.json").open("rb") as file:
            value = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"config.json cannot be read: {error}"[:300]) from None
    if not isinstance(value, dict) or value.get("model_type") != model_type:
        raise UnsupportedModel(f"config.json is not that of a {model_type} model")
    return value


def integer(raw: Mapping[str, Any], name: str, high: int, default: int | None = None, low: int = 1) -> int:
    """A bounded integer of config.json. Raises `UnsupportedModel`."""
    value = raw.get(name)
    value = default if value is None else value
    if type(value) is not int or not low <= value <= high:
        raise UnsupportedModel(f"config.json: {name} is {value!r}, expected {low} to {high}")
    return value


def integers(raw: Mapping[str, Any], name: str, high: int, most: int) -> tuple[int, ...]:
    """A list of at most `most` integers from 0 to below `high`; absent means none. Raises `UnsupportedModel`."""
    value = raw.get(name) or []
    if type(value) is not list or len(value) > most or not all(type(n) is int and 0 <= n < high for n in value):
        raise UnsupportedModel(f"config.json: {name} is not a list of at most {most} numbers below {high}")
    return tuple(value)
