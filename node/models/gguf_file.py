"""Read a GGUF file's metadata and tensor table within bounds; the weights stay on disk until asked for.

Layout (ggml's docs/gguf.md, version 3, little-endian): magic, version, counts, key-value pairs, tensor infos, padding,
data. Every count, string and array is limited before it is read, and every tensor must lie inside the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from node.errors import ModelError

MAX_PAIRS: Final = 4096
MAX_TENSORS: Final = 1 << 16
MAX_STRING: Final = 1 << 20
MAX_ITEMS: Final = 1 << 22
MAX_METADATA: Final = 256 << 20

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    """Row-major, as torch counts (GGUF stores it reversed)."""
    kind: int
    """ggml type number; `gguf.GGMLQuantizationType` names them."""
    start: int
    """Bytes from the start of the file."""


class GgufFile:
    """An open GGUF file: `metadata` (key to value) and `tensors` (name to info). Use as a context manager.

    Raises `ModelError` when the file is not GGUF version 3 or goes over a bound.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = 0
            self.metadata, self.tensors = self._parse()
        except (struct.error, ValueError, IndexError) as error:
            self._file.close()
            raise ModelError(f"{path.name} is not a readable GGUF file: {error}"[:300]) from None
        except ModelError:
            self._file.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._map.close()
        self._file.close()

    def bytes_of(self, tensor: TensorInfo, size: int) -> bytes:
        """The tensor's raw bytes. Raises `ModelError` when they do not lie inside the file."""
        if tensor.start + size > len(self._map):
            raise ModelError(f"tensor {tensor.name} lies outside the file (is it truncated?)")
        return self._map[tensor.start : tensor.start + size]

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._typed(key, str, default))

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._typed(key, int, default))

    def number(self, key: str) -> float:
        return float(self._typed(key, float, None))

    def strings(self, key: str) -> list[str]:
        return self._list(key, str)

    def integers(self, key: str) -> list[int]:
        return self._list(key, int)

    def _typed(self, key: str, kind: type[Any], default: Any) -> Any:
        value = self.metadata.get(key, default)
        if type(value) is not kind:
            raise ModelError(f"GGUF key {key} is missing or not of type {kind.__name__}")
        return value

    def _list(self, key: str, kind: type[Any]) -> list[Any]:
        value: list[Any] = self._typed(key, list, None)
        if value and type(value[0]) is not kind:
            raise ModelError(f"GGUF key {key} does not hold {kind.__name__} values")
        return value

    def _parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        magic, version, tensor_count, pair_count = self._take("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"magic {magic!r}, version {version} (expected GGUF version 3)")
        if pair_count > MAX_PAIRS or tensor_count > MAX_TENSORS:
            raise ValueError(f"{pair_count} keys and {tensor_count} tensors are too many")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            metadata[key] = self._value()
        infos = []
        for _ in range(tensor_count):
            name = self._string()
            (dimensions,) = self._take("<I")
            if dimensions > 4:
                raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
            shape = self._take(f"<{dimensions}Q")[::-1]
            kind, offset = self._take("<IQ")
            if math.prod(shape) > 1 << 40:
                raise ValueError(f"tensor {name!r} is too large")
            infos.append((name, shape, kind, offset))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
            raise ValueError(f"alignment {alignment!r}")
        data = -(-self._at // alignment) * alignment
        tensors = {name: TensorInfo(name, shape, kind, data + offset) for name, shape, kind, offset in infos}
        if len(tensors) != len(infos):
            raise ValueError("two tensors have one name")
        return metadata, tensors

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        if self._at > MAX_METADATA:
            raise ValueError(f"more than {MAX_METADATA >> 20} MB of metadata")
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        if length > MAX_STRING:
            raise ValueError(f"a string of {length} bytes")
        (raw,) = self._take(f"<{length}s")
        return str(raw, "utf-8")

    def _value(self) -> Any:
        (kind,) = self._take("<I")
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take("<" + self._scalar(kind))[0]
        item, count = self._take("<IQ")
        if count > MAX_ITEMS:
            raise ValueError(f"an array of {count} items")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        return list(self._take(f"<{count}{self._scalar(item)}"))

    @staticmethod
    def _scalar(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind}")  # nested arrays land here too: no model needs them
        return _SCALARS[kind]
