"""What a model will need, to the byte, before anything of it is loaded: weights by the headers of its files, keys and values
by setting.

What a process needs besides (interpreter, torch, buffers of a step) is not the model's and not counted here; `HEADROOM` is what
its memory limit leaves for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.models.manifest import Manifest
from node.models.safetensors_file import ITEM_BYTES, read_header

HEADROOM: Final = 2 << 30
"""Bytes beside weights and cache that a process may have: torch itself, a step's activations, logits, templates of kernels."""
_ITEM: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "int4": 2}
"""Bytes of one number. Formats of whole numbers are counted as what they are made from: embeddings stay in it, and scales and
copies for few rows come on top."""
_FLOATS: Final = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Footprint:
    weights: int
    """Bytes of all tensors in the number format in which they run."""
    cache: int
    """Bytes of keys and values of all streams together."""

    @property
    def total(self) -> int:
        return self.weights + self.cache

    @property
    def process_limit(self) -> int:
        """Bytes of private memory for the process: weights may be there twice, as loaded and as packed for the processor."""
        return 2 * self.weights + self.cache + HEADROOM


UNKNOWN: Final = Footprint(0, 0)


def measure(folder: Path, manifest: Manifest, dtype: str, cache_bytes: int) -> Footprint:
    """Raises `ModelError` for files that are not what they should be."""
    weights = 0
    for entry in manifest.files:
        if entry.path.endswith(".safetensors"):
            for stored, shape in read_header(folder / entry.path).values():
                item = _ITEM.get(dtype, 4) if stored in _FLOATS else ITEM_BYTES[stored]
                weights += item * math.prod(shape)
    return Footprint(weights, cache_bytes)
