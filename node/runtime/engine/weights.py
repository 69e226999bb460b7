"""From a model folder to a model in memory: safetensors only, every tensor checked against config.json.

On a CPU the tensors are the mapped file itself; what the layers pack of them for speed is a copy of theirs.
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
from node.runtime.engine.linear import FORMATS
from node.runtime.engine.models.configs import Names, parse
from node.runtime.engine.models.decoder import Decoder

_MAX_JSON: Final = 1 << 20


def load(folder: Path, device: torch.device, fmt: str, *, tile: int = 0) -> tuple[Decoder, frozenset[int]]:
    """The model of a folder, its linear layers in `fmt`, and its end-of-sequence ids. Raises `UnsupportedModel`.

    `tile`: see `Decoder`.
    """
    if fmt not in FORMATS:
        raise UnsupportedModel(f"format {fmt!r} is not supported; choose one of {', '.join(FORMATS)}")
    raw = _json(folder / "config.json")
    config, names = parse(raw)
    tensors = _tensors(folder, config.shapes(), names, device)
    return Decoder(config, tensors, fmt, device, tile=tile), _eos_ids(folder, raw)


def _tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], names: Names, device: torch.device
) -> dict[str, Tensor]:
    wanted = {name: names(name) for name in shapes}
    places = {place.name for place in wanted.values()}
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in set(file.keys()):
                    # Some files leave out the name of the whole model before the parts' names.
                    for full in {name, f"transformer.{name}"} & places:
                        stored[full] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UnsupportedModel(f"{path.name} cannot be read: {error}") from None
    found: dict[str, Tensor] = {}
    for name, place in wanted.items():
        if place.name not in stored:
            raise UnsupportedModel(f"the weight files lack {place.name}")
        tensor = stored[place.name]
        if not tensor.is_floating_point():
            raise UnsupportedModel(f"{place.name} holds {tensor.dtype}, not floating point numbers")
        tensor = tensor.t() if place.transposed and tensor.dim() == 2 else tensor
        tensor = tensor[slice(*place.rows)] if place.rows else tensor
        if tuple(tensor.shape) != shapes[name]:
            raise UnsupportedModel(f"{place.name} has shape {tuple(tensor.shape)}, config.json says {shapes[name]}")
        found[name] = tensor
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
