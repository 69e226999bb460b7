"""Look through an ONNX file within bounds before a runtime opens it, and take tensors out of it.

An ONNX model is data, with two doors: a tensor may live in another file, named by a path, and an operator may come from a library
that is loaded for it. The first opens to one file only, beside this one and named by the caller; the second to operators that
ONNX Runtime has built in. Functions are refused: nothing that we know needs them. Layout: onnx.proto (ONNX IR version 3 and
later) in protobuf's wire format, read field by field; nothing is copied but what is asked for.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from node.errors import ModelError

DOMAINS: Final = frozenset({"", "ai.onnx"})
"""Operators that every runtime has built in."""
CONTRIBUTED: Final = "com.microsoft"
OPERATORS: Final = frozenset(
    {
        "BiasGelu",
        "DynamicQuantizeMatMul",
        "FastGelu",
        "FusedMatMul",
        "GatherBlockQuantized",
        "Gelu",
        "GroupQueryAttention",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MultiHeadAttention",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
"""Of ONNX Runtime's own domain, what exported language models use. None of them reads a file."""
PACKED: Final = frozenset({"GatherBlockQuantized", "MatMulNBits"})
"""Those that unpack weights of a few bits: as many as their attribute says, else 4."""
MAX_SIZE: Final = 1 << 31
"""Bytes; protobuf has the same limit."""
MAX_FIELDS: Final = 1 << 22
MAX_DEPTH: Final = 8
"""Graphs inside the branches and loops of graphs."""
DTYPES: Final = {
    1: "F32",
    2: "U8",
    3: "I8",
    5: "I16",
    6: "I32",
    7: "I64",
    9: "BOOL",
    10: "F16",
    11: "F64",
    16: "BF16",
    21: "U4",
    22: "I4",
}
"""TensorProto.DataType in safetensors' words."""
ITEM_BITS: Final = {"U4": 4, "I4": 4, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "F16": 16, "BF16": 16} | {
    name: int(name[1:]) for name in ("I32", "F32", "I64", "F64")
}
_NUMBER: Final = re.compile(r"[0-9]{1,15}")

_Span = tuple[int, int]
_MODEL_OPSET, _MODEL_GRAPH, _MODEL_FUNCTION = 8, 7, 25
_GRAPH_NODE, _GRAPH_TENSOR, _GRAPH_SPARSE = 1, 5, 15
_NODE_OUTPUT, _NODE_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 4, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    shape: tuple[int, ...]
    dtype: str
    data: _Span
    """Where its bytes are in the file; an empty span when they are written number by number, or lie in the file beside."""


class OnnxFile:
    """An open ONNX file and its `tensors` by name, those of constants by their node's output. Use as a context manager.

    Raises `ModelError` when the file is damaged, goes over a bound, or has a door.
    """

    def __init__(self, path: Path, beside: Path | None = None) -> None:
        """`beside`: a file in the same folder, the only one that tensors may lie in."""
        self.tensors: dict[str, OnnxTensor] = {}
        self.bits: set[int] = set()
        """Of the weights of operators that unpack them (`PACKED`)."""
        self._fields = 0
        self._beside = (beside.name, beside.stat().st_size) if beside is not None else ("", 0)
        self._file = path.open("rb")
        try:
            if not 0 < path.stat().st_size < MAX_SIZE:
                raise ValueError("the file is empty or too large")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._model((0, len(self._map)))
        except (ValueError, IndexError, KeyError) as error:
            self._file.close()
            raise ModelError(f"{path.name} is not an ONNX file that can be used: {error}"[:300]) from None

    def __enter__(self) -> OnnxFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()
        self._file.close()

    @property
    def dtypes(self) -> set[str]:
        return {tensor.dtype for tensor in self.tensors.values()}

    def float32(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of one float32 tensor. Raises `ModelError`."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dtype != "F32" or tensor.data[1] - tensor.data[0] != 4 * math.prod(tensor.shape):
            raise ModelError(f"the ONNX file holds no float32 tensor {name}")
        count = math.prod(tensor.shape)
        return np.frombuffer(self._map, "<f4", count, tensor.data[0]).reshape(tensor.shape).copy()

    def _model(self, span: _Span) -> None:
        graphs = 0
        for number, value in self._fields_of(span):
            if number == _MODEL_FUNCTION:
                raise ValueError("it defines functions")
            if number == _MODEL_OPSET:
                self._domain(
                    next((self._text(one) for field, one in self._fields_of(_span(value)) if field == 1), ""), None
                )
            elif number == _MODEL_GRAPH:
                graphs += 1
                self._graph(_span(value), 0)
        if graphs != 1:
            raise ValueError(f"{graphs} graphs")

    def _domain(self, name: str, operator: str | None) -> None:
        """`operator`: of that domain; None where the domain is only announced."""
        if name not in DOMAINS and name != CONTRIBUTED:
            raise ValueError(f"operators of {name[:64]!r}")
        if name == CONTRIBUTED and operator is not None and operator not in OPERATORS:
            raise ValueError(f"operator {operator[:64]!r} of {name!r}")

    def _graph(self, span: _Span, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError("graphs are nested too deep")
        for number, value in self._fields_of(span):
            if number == _GRAPH_NODE:
                self._node(_span(value), depth)
            elif number == _GRAPH_TENSOR:
                self._tensor(_span(value), "")
            elif number == _GRAPH_SPARSE:
                raise ValueError("it has sparse tensors")

    def _node(self, span: _Span, depth: int) -> None:
        output, domain, operator, attributes = "", "", "", []
        for number, value in self._fields_of(span):
            if number == _NODE_DOMAIN:
                domain = self._text(value)
            elif number == _NODE_TYPE:
                operator = self._text(value)
            elif number == _NODE_OUTPUT:
                output = output or self._text(value)
            elif number == _NODE_ATTRIBUTE:
                attributes.append(_span(value))
        self._domain(domain, operator)
        if operator in PACKED:
            self.bits.add(self._bits(attributes))
        for attribute in attributes:
            for number, value in self._fields_of(attribute):
                if number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                    self._graph(_span(value), depth + 1)
                elif number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                    self._tensor(_span(value), output)

    def _bits(self, attributes: list[_Span]) -> int:
        for attribute in attributes:
            fields = dict(self._fields_of(attribute))
            if self._text(fields.get(_ATTRIBUTE_NAME, (0, 0))) == "bits":
                bits = fields.get(_ATTRIBUTE_INT)
                if not isinstance(bits, int) or not 1 <= bits <= 8:
                    raise ValueError(f"weights of {bits} bits")
                return bits
        return 4

    def _tensor(self, span: _Span, name: str) -> None:
        shape: list[int] = []
        kind, data, elsewhere, entries = 0, (0, 0), False, dict[str, str]()
        for number, value in self._fields_of(span):
            if number == _TENSOR_EXTERNAL:
                entry = dict(self._fields_of(_span(value)))
                entries[self._text(entry.get(1, (0, 0)))] = self._text(entry.get(2, (0, 0)))
                if len(entries) > 8:
                    raise ValueError("a tensor lies in many places")
            elif number == _TENSOR_LOCATION:
                elsewhere = value != 0
            elif number == _TENSOR_DIMS:
                shape += [value] if isinstance(value, int) else self._packed(value)
            elif number == _TENSOR_TYPE and isinstance(value, int):
                kind = value
            elif number == _TENSOR_NAME:
                name = self._text(value) or name
            elif number == _TENSOR_RAW:
                data = _span(value)
            elif number == _TENSOR_FLOATS and not isinstance(value, int):
                data = value  # packed little-endian float32: the same bytes as raw ones
        if len(shape) > 8 or math.prod(shape) >= MAX_SIZE:
            raise ValueError(f"tensor {name[:64]!r} is too large")
        if elsewhere or entries:
            self._outside(entries, -(-math.prod(shape) * ITEM_BITS[DTYPES[kind]] // 8))
        self.tensors[name] = OnnxTensor(tuple(shape), DTYPES[kind], data)

    def _outside(self, entries: Mapping[str, str], size: int) -> None:
        """A tensor in another file: only in the one beside, and only inside it."""
        name, end = self._beside
        if not name or entries.get("location") != name:
            raise ValueError("a tensor lies in another file")
        offset, length = entries.get("offset", "0"), entries.get("length", str(size))
        if not (_NUMBER.fullmatch(offset) and _NUMBER.fullmatch(length)) or int(length) < size:
            raise ValueError("a tensor lies nowhere in its file")
        if int(offset) + int(length) > end:
            raise ValueError("a tensor passes the end of its file")

    def _fields_of(self, span: _Span) -> Iterator[tuple[int, int | _Span]]:
        """Number and value of each field of one message: an integer, or where its bytes are."""
        at, end = span
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise ValueError(f"more than {MAX_FIELDS} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = self._varint(at, end)
                yield number, value
                continue
            if wire == 2:
                size, at = self._varint(at, end)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            if at + size > end:
                raise ValueError("a field is longer than its message (is the file truncated?)")
            yield number, (at, at + size)
            at += size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._map[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise ValueError("a number does not end")

    def _packed(self, span: _Span) -> list[int]:
        if span[1] - span[0] > 80:
            raise ValueError("a tensor has too many dimensions")
        at, values = span[0], []
        while at < span[1]:
            value, at = self._varint(at, span[1])
            values.append(value)
        return values

    def _text(self, value: int | _Span) -> str:
        start, end = _span(value)
        if end - start > 4096:
            raise ValueError("a name is too long")
        return str(self._map[start:end], "utf-8")


def _span(value: int | _Span) -> _Span:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value
