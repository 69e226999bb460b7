"""What a model will need, before anything of it is loaded: weights as they will be packed (`node.runtime.packing`), by the
headers of its files; keys and values by setting.

It is an estimate, though one that is right to the byte wherever it was tried. What the engine says once it has loaded counts
from then on (`weighed`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from node import nesting
from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.safetensors_file import ITEM_BYTES, read_header
from node.models.store import ONNX, ONNX_DATA
from node.runtime.engine.blocks import BLOCK_TOKENS
from node.runtime.packing import Packing

HEADROOM: Final = 2 << 30
"""Bytes beside weights and cache that a process may have at most: torch itself, a step's activations, templates of kernels."""
PROCESS: Final = 272 << 20
"""Bytes of an interpreter with torch and compiled kernels, as they are resident (measured, SmolLM2: 143 MiB with torch, 265 to
275 after prompts of 500 tokens, of which the step is counted apart)."""
LIBRARY: Final = 384 << 20
"""The same, of one with transformers or ONNX Runtime beside torch (measured: 254 and 240 MiB, and about 100 more at work)."""
_STEP_TOKENS: Final = 512
"""Of the engine's largest step."""
_STEP_ROWS: Final = 64
"""Rows of logits of a large step."""
_Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes."""

    weights: int
    """As they are packed, a draft model's too."""
    cache: int
    """Keys and values of all streams together, a draft model's too."""
    graphs: int = 0
    """Kept for CUDA graphs."""
    process: int = 0
    """What a process needs besides; 0 where there is none of its own."""
    packing: int = 0
    """Beside the weights, for a moment while they are packed: before there are keys and values."""

    @property
    def total(self) -> int:
        """What counts against the budget: the most that is there at any time, a later start of a process that died included."""
        return self.weights + max(self.cache, self.packing) + self.graphs + self.process

    @property
    def process_limit(self) -> int:
        """Of private memory of the process."""
        return self.weights + self.cache + self.packing + HEADROOM

    def weighed(self, weights: int, cache: int) -> Footprint:
        """With what the engine says that it holds."""
        return replace(self, weights=weights, cache=cache)

    def beside(self, draft: Footprint) -> Footprint:
        """With a draft model in the same process."""
        return replace(
            self,
            weights=self.weights + draft.weights,
            cache=self.cache + draft.cache,
            process=max(self.process, draft.process),
            packing=max(self.packing, draft.packing),
        )


UNKNOWN: Final = Footprint(0, 0)


def measure(folder: Path, manifest: Manifest, packing: Packing, cache_bytes: int, *, spare: int = 1) -> Footprint:
    """Of a model for chats, in a process of its own. `spare`: blocks of keys and values beside those that fit `cache_bytes`.
    Raises `ModelError` for files that are not what they should be."""
    shapes = headers(folder, manifest)
    config = read_config(folder)
    layers = list(_linears(shapes))
    embedding = _shape(shapes, "embed_tokens.weight", "wte.weight")
    if (
        not layers or embedding is None
    ):  # no model of ours: what it would be in plain tensors, until its engine says why not
        return Footprint(plain_bytes(shapes, packing.item), cache_bytes, process=PROCESS)
    head = _shape(shapes, "lm_head.weight")
    tied = config.get("tie_word_embeddings", str(config.get("model_type")).startswith(_TIED))
    if tied or head is None:
        layers.append(_Linear(*embedding, bias=False, head=True))
    else:
        layers.append(_Linear(*head, bias=_shape(shapes, "lm_head.bias") is not None, head=True))
    sizes = [packing.linear(one.out, one.inputs, bias=one.bias, head=one.head) for one in layers]
    embedded = math.prod(embedding) * packing.item
    weights = embedded + sum(sizes)
    widest = max(one.out for one in layers if not one.head)
    step = 4 * (4 * _STEP_TOKENS * widest + 4 * _STEP_ROWS * embedding[0])
    return Footprint(
        weights,
        _cache(config, packing.item, cache_bytes, spare),
        process=PROCESS + step,
        packing=_packing(packing, layers, embedded + sizes[-1] - weights)
        if packing.cpu
        else plain_bytes(shapes, packing.item),
    )


def measure_library(folder: Path, manifest: Manifest, runtime: str, packing: Packing, cache_bytes: int) -> Footprint:
    """The same for a model that a library runs: its tensors as they are, and for a moment once or twice more: ONNX Runtime has
    the file, its tensors and what it packs of them. Raises `ModelError`."""
    if runtime == "onnx":
        weights = sum(entry.size for entry in manifest.files if entry.path in (ONNX, *ONNX_DATA))
        return Footprint(weights, cache_bytes, process=LIBRARY, packing=2 * weights)
    weights = plain_bytes(headers(folder, manifest), packing.item)
    return Footprint(weights, cache_bytes, process=LIBRARY, packing=weights)


def headers(folder: Path, manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a model's files: type and shape. Raises `ModelError`."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for entry in manifest.files:
        if entry.path.endswith(".safetensors"):
            found |= read_header(folder / entry.path)
    return found


def plain_bytes(shapes: _Shapes, item: int) -> int:
    """Of all tensors as they are, each number in `item` bytes."""
    return sum(
        (item if stored in ("F64", "F32", "F16", "BF16") else ITEM_BYTES[stored]) * math.prod(shape)
        for stored, shape in shapes.values()
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Raises `ModelError`."""
    try:
        config = nesting.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"config.json cannot be read: {error}"[:300]) from None
    if not isinstance(config, dict):
        raise ModelError("config.json is not a JSON object")
    return config


# --------------------------------------------------------------------------------------------- which tensors are layers

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h)\.(\d{1,4})\.([a-z0-9_.]+)\.(weight|bias)$")
_ONE_PRODUCT: Final = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "mlp.gate_proj": "up",
    "mlp.up_proj": "up",
}
"""Several that read the same input are one product, with one packed weight (`Decoder`)."""
_TRANSPOSED: Final = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Stored as [in, out] (GPT-2)."""
_TIED: Final = ("gemma", "gpt2")
"""Families whose config.json does not say that the head is the embedding."""


@dataclass(slots=True)
class _Linear:
    out: int
    inputs: int
    bias: bool = False
    head: bool = False


def _linears(shapes: _Shapes) -> Iterable[_Linear]:
    """The layers' linear products. What shares an input is added up."""
    products: dict[tuple[str, str], _Linear] = {}
    biases: set[tuple[str, str]] = set()
    for name, (_, shape) in shapes.items():
        match = _LAYER.search(name)
        if match is None:
            continue
        layer, part, kind = match.groups()
        key = layer, _ONE_PRODUCT.get(part, part)
        if kind == "bias":
            biases.add(key)
        elif len(shape) == 2:
            out, inputs = shape[::-1] if part in _TRANSPOSED else shape
            if key in products:
                products[key].out += out
            else:
                products[key] = _Linear(out, inputs)
    for key in biases & products.keys():
        products[key].bias = True
    return products.values()


def _packing(packing: Packing, layers: list[_Linear], before: int) -> int:
    """The head is packed first, when there is little beside it: `before` is what, less all weights."""
    *others, head = (packing.making * one.out * one.inputs for one in layers)
    return max(head + before, *others)


def _shape(shapes: _Shapes, *endings: str) -> tuple[int, ...] | None:
    for name, (_, shape) in shapes.items():
        if name.endswith(endings):
            return shape
    return None


def _cache(config: Mapping[str, Any], item: int, cache_bytes: int, spare: int) -> int:
    """Whole blocks of keys and values."""

    def number(*names: str) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), 0)
        return found if type(found) is int and found > 0 else 0

    heads, width = number("num_attention_heads", "n_head"), number("hidden_size", "n_embd")
    layers, pairs = number("num_hidden_layers", "n_layer"), number("num_key_value_heads") or heads
    dim = number("head_dim") or width // max(heads, 1)
    block = 2 * layers * pairs * dim * BLOCK_TOKENS * item
    return (cache_bytes // block + spare) * block if block else cache_bytes
