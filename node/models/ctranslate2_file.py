"""Read a CTranslate2 model.bin within bounds; the weights stay on disk until asked for.

Layout (CTranslate2's python/ctranslate2/specs/model_spec.py, binary version 6, little-endian): version, spec name, spec revision,
then for each variable its name, shape, type, size and bytes, then aliases. Every count and string is limited before it is read,
and every variable must fill its bytes exactly and lie inside the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from node.errors import ModelError

VERSION: Final = 6
MAX_VARIABLES: Final = 1 << 14
MAX_NAME: Final = 256
MAX_RANK: Final = 4
MAX_ITEMS: Final = 1 << 34
_TYPES: Final = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
"""By number; 5 is bfloat16, which numpy has no type for."""


@dataclass(frozen=True, slots=True)
class Variable:
    shape: tuple[int, ...]
    dtype: str
    """numpy's."""
    start: int
    """Bytes from the start of the file."""


class CTranslate2File:
    """An open model.bin: `spec`, `variables` (name to variable) and `aliases`. Use as a context manager.

    Raises `ModelError` when the file is not of this version or goes over a bound.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = 0
            self.spec, self.variables, self.aliases = self._parse()
        except (struct.error, ValueError) as error:
            self._file.close()
            raise ModelError(f"{path.name} is not a readable CTranslate2 model: {error}"[:300]) from None

    def __enter__(self) -> CTranslate2File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._map.close()
        self._file.close()

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of one variable. Raises `ModelError` when there is none."""
        variable = self._get(name)
        count = math.prod(variable.shape)
        return np.frombuffer(self._map, variable.dtype, count, variable.start).reshape(variable.shape).copy()

    def scalar(self, name: str) -> int:
        """A variable without dimensions. Raises `ModelError`."""
        if self._get(name).shape:
            raise ModelError(f"CTranslate2 variable {name} is no scalar")
        return int(self.array(name))

    def _get(self, name: str) -> Variable:
        try:
            return self.variables[self.aliases.get(name, name)]
        except KeyError:
            raise ModelError(f"the CTranslate2 model lacks {name}") from None

    def _parse(self) -> tuple[str, dict[str, Variable], dict[str, str]]:
        (version,) = self._take("<I")
        if version != VERSION:
            raise ValueError(f"binary version {version} (expected {VERSION})")
        spec = self._name()
        _, count = self._take("<II")
        if count > MAX_VARIABLES:
            raise ValueError(f"{count} variables are too many")
        variables: dict[str, Variable] = {}
        for _ in range(count):
            name = self._name()
            (rank,) = self._take("<B")
            if rank > MAX_RANK or name in variables:
                raise ValueError(f"variable {name!r} has {rank} dimensions, or comes twice")
            shape = self._take(f"<{rank}I")
            kind, size = self._take("<BI")
            if kind not in _TYPES:
                raise ValueError(f"variable {name!r} is of type {kind}")
            if math.prod(shape) > MAX_ITEMS or math.prod(shape) * np.dtype(_TYPES[kind]).itemsize != size:
                raise ValueError(f"variable {name!r} does not fill its {size} bytes")
            variables[name] = Variable(shape, _TYPES[kind], self._at)
            self._at += size
            if self._at > len(self._map):
                raise ValueError(f"variable {name!r} lies outside the file (is it truncated?)")
        (count,) = self._take("<I")
        if count > MAX_VARIABLES:
            raise ValueError(f"{count} aliases are too many")
        aliases = {self._name(): self._name() for _ in range(count)}
        if self._at != len(self._map):
            raise ValueError(f"{len(self._map) - self._at} bytes follow the aliases")
        if not set(aliases.values()) <= set(variables):
            raise ValueError("an alias names no variable")
        return spec, variables, aliases

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _name(self) -> str:
        """A length, then that many bytes, the last of them zero."""
        (length,) = self._take("<H")
        if not 2 <= length <= MAX_NAME:
            raise ValueError(f"a name of {length} bytes")
        (raw,) = self._take(f"<{length}s")
        if raw[-1] != 0:
            raise ValueError("a name does not end with zero")
        return str(raw[:-1], "ascii")
