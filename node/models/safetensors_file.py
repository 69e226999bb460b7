"""Read the header of a safetensors file within bounds, and write one with the same bytes on every machine.

A model's id is a hash of its files, so conversion must not depend on a library's key order or padding. Format: 8 bytes
little-endian header length, a JSON header, then the data (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from node import nesting
from node.errors import ModelError

MAX_HEADER: Final = 16 << 20
MAX_RANK: Final = 16
"""Sizes of one tensor: what multiplies a thousand long numbers takes minutes."""
ITEM_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Array(Protocol):
    """What the writer needs of a numpy array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def tobytes(self) -> bytes: ...


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names to (dtype, shape). Raises `ModelError` unless the header is well formed and covers the file exactly."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER or 8 + length > size:
                raise ModelError(f"{path.name}: header of {length} bytes is too large")
            header: dict[str, Any] = nesting.loads(file.read(length))
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        spans = []
        found = {}
        for name, value in tensors.items():
            shape, (start, end) = tuple(value["shape"]), value["data_offsets"]
            if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)):
                raise ValueError(f"tensor {name} has a bad shape or offset")
            if end - start != math.prod(shape) * ITEM_BYTES[value["dtype"]]:
                raise ValueError(f"tensor {name} does not fill its span")
            spans.append((start, end))
            found[name] = (value["dtype"], shape)
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path.name} is not a safetensors file: {error}"[:300]) from None
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise ModelError(f"{path.name}: tensors overlap or leave a gap at byte {position}")
        position = end
    if 8 + length + position != size:
        raise ModelError(f"{path.name}: the file has {size} bytes, its header describes {8 + length + position}")
    return found


def write_float32(file: BinaryIO, shapes: dict[str, tuple[int, ...]], arrays: Iterable[tuple[str, Array]]) -> None:
    """`write_tensors` of float32."""
    write_tensors(file, "F32", shapes, arrays)


def write_tensors(
    file: BinaryIO, dtype: str, shapes: dict[str, tuple[int, ...]], arrays: Iterable[tuple[str, Array]]
) -> None:
    """Write tensors of one type in the order of `shapes`; `arrays` yields (name, array) in that order, one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that mapped tensors start on a cache line
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    expected = iter(shapes.items())
    for name, array in arrays:
        if (name, tuple(array.shape)) != next(expected):
            raise ModelError(f"tensor {name} came out of order or with shape {array.shape}")
        file.write(memoryview(array).cast("B") if hasattr(array, "__array_interface__") else array.tobytes())  # type: ignore[arg-type]
    if next(expected, None) is not None:
        raise ModelError("a tensor is missing")
