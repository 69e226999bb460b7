"""Logits by ONNX Runtime, of a causal language model that was exported with its past keys and values (`model.onnx`).

Rules:
- The file is data: it has passed `node.models.onnx_file`, no library of operators is loaded, tensors lie in the model's folder.
- Which exporter wrote it is not asked. It must take `input_ids`, `attention_mask` and the past, and `position_ids` if it likes;
  what it does with them is tried at load. One that does not go on from its past as if it had read everything at once is refused;
  one whose rows are not computed each as if it were alone runs one sequence a pass.
- The number format is what the file's weights are in, the coarsest of them; the operator must have declared the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch

from node.models.onnx_file import ITEM_BITS, OnnxFile
from node.models.store import ONNX, onnx_data
from node.runtime.backends.folder import context_length_of, eos_ids_of, key_shape_of
from node.runtime.backends.logits_engine import Kept, Past
from node.runtime.engine.errors import UnsupportedModel

PIECE: Final = 128
COPIES: Final = 4
"""Of keys and values, at the worst moment: what was kept, what is fed, what comes out, the latter two padded by up to a half."""
_FLOATS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES: Final = {"tensor(float)": np.dtype("<f4"), "tensor(float16)": np.dtype("<f2")}
_PAST: Final = re.compile(r"past_key_values\.(\d{1,4})\.(key|value)")
_GIVEN: Final = ("input_ids", "attention_mask", "position_ids")
_ALIKE: Final = 1e-4
"""How far the logits of one sequence may differ by who was beside it, as a part of the largest: some rounding of float32."""
_FOLLOWS: Final = 0.1
"""How far they may differ by how a prompt was cut. Formats that round each pass by its largest number differ by a few percent."""


class OnnxModel:
    """Implements `node.runtime.backends.logits_engine.LogitsModel`."""

    piece = PIECE

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        """Raises `UnsupportedModel`."""
        path = folder / ONNX
        if not path.is_file():
            raise UnsupportedModel(f"this model holds no {ONNX}; export it first (docs/operators/backends.md)")
        data = onnx_data(folder)
        with OnnxFile(path, data) as file:
            found = format_of(file)
        if found != dtype:
            raise UnsupportedModel(f"its weights are {found}, and engine.dtype says {dtype}")
        self.weight_bytes = path.stat().st_size + (data.stat().st_size if data else 0)
        self.name = f"onnx {dtype}"
        self.context_length, self.eos_ids = context_length_of(folder), eos_ids_of(folder)
        torch.set_num_threads(threads)
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), _options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library's own, one for each status; the file is at fault
            raise UnsupportedModel(f"ONNX Runtime cannot load this model: {error}"[:300]) from None
        self._read_signature(*key_shape_of(folder))
        self._last, self._all = onnxruntime.RunOptions(), onnxruntime.RunOptions()
        self._last.only_execute_path_to_fetches = True
        self.together, self.vocab_size, self._front = True, 0, True
        """`_front`: where rows are padded. Plain graphs need it at the front; `GroupQueryAttention` needs it at the end."""
        self._try_out()

    def _read_signature(self, heads: int, size: int) -> None:
        """`heads`, `size`: of keys, where the file leaves them open."""
        inputs = {one.name: one for one in self._session.get_inputs()}
        outputs = [one.name for one in self._session.get_outputs()]
        self._past = sorted(filter(_PAST.fullmatch, inputs), key=lambda name: (int(name.split(".")[1]), name))
        self._present = [name.replace("past_key_values", "present", 1) for name in self._past]
        strangers = set(inputs) - {*_GIVEN, *self._past}
        if strangers:
            raise UnsupportedModel(f"it wants an input {min(strangers)[:64]!r} that means nothing here")
        missing = {"input_ids", "attention_mask"} - set(inputs) | {"logits", *self._present} - set(outputs)
        if missing or not self._past:
            raise UnsupportedModel(
                f"it was not exported with its past: it lacks {min(missing, default='past_key_values')[:64]!r}"
            )
        self._positions = "position_ids" in inputs
        if any(inputs[name].type != "tensor(int64)" for name in _GIVEN if name in inputs):
            raise UnsupportedModel("its token ids are not int64")
        self._shapes: list[tuple[int, int]] = []
        """Heads and numbers of each key or value."""
        for name in self._past:
            shape = inputs[name].shape
            if len(shape) != 4:
                raise UnsupportedModel(f"{name} is not [rows, heads, tokens, numbers]")
            said = [shape[n] if type(shape[n]) is int else stated for n, stated in ((1, heads), (3, size))]
            if not all(0 < one <= 1 << 20 for one in said):
                raise UnsupportedModel(f"{name} has no size that can be")
            self._shapes.append((said[0], said[1]))
        kinds = {inputs[name].type for name in self._past}
        if len(kinds) != 1 or not kinds <= set(_TYPES):
            raise UnsupportedModel("its keys and values are neither float32 nor float16")
        self._dtype = _TYPES[kinds.pop()]
        self.bytes_per_token = COPIES * self._dtype.itemsize * sum(heads * size for heads, size in self._shapes)

    def forward(
        self, rows: Sequence[Sequence[int]], pasts: Sequence[Past | None], *, logits: bool = True
    ) -> tuple[torch.Tensor | None, Kept]:
        before = [0 if past is None else past.tokens for past in pasts]
        fresh, longest = len(rows[0]), max(before)
        feeds = dict(zip(self._past, self._joined(pasts, before), strict=True))
        mask = np.ones((len(rows), longest + fresh), np.int64)
        for row, tokens in enumerate(before):
            mask[row, slice(longest - tokens) if self._front else slice(tokens + fresh, None)] = 0
        feeds["input_ids"] = _value(np.array(rows, np.int64))
        feeds["attention_mask"] = _value(mask)
        if self._positions:
            feeds["position_ids"] = _value(np.array(before, np.int64)[:, None] + np.arange(fresh, dtype=np.int64))
        wanted = ["logits", *self._present] if logits else self._present
        found = self._session.run_with_ort_values(wanted, feeds, self._all if logits else self._last)
        kept = Kept(found[-len(self._present) :], [tokens + fresh for tokens in before])
        if not logits:
            return None, kept
        return torch.from_numpy(found[0].numpy()[:, -1].astype("<f4", copy=False)), kept

    def apart(self, past: Past) -> Past:
        return Past(Kept(self._joined([past], [past.tokens], copy=True), [past.tokens]))

    def _joined(self, pasts: Sequence[Past | None], lengths: Sequence[int], *, copy: bool = False) -> list[Any]:
        """Keys and values of these sequences as one pass wants them, padded to the longest. What a pass gave for just these is
        fed to the next as it is."""
        last = None if copy or pasts[0] is None else pasts[0].kept
        if last is not None and [Past(last, row) for row in range(len(last.lengths))] == list(pasts):
            return list(last.values)
        longest, joined = max(lengths), []
        for layer, (heads, size) in enumerate(self._shapes):
            into = np.zeros((len(pasts), heads, longest, size), self._dtype)
            for row, (one, tokens) in enumerate(zip(pasts, lengths, strict=True)):
                if one is not None and tokens:
                    own = slice(-tokens, None) if self._front else slice(tokens)
                    into[row, :, own] = one.kept.values[layer].numpy()[one.row, :, own]
            joined.append(_value(into))
        return joined

    def _try_out(self) -> None:
        """What the file does with past and rows is seen before it is believed. Raises `UnsupportedModel`."""
        long, short = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8, 2, 8]
        try:
            whole = self._says([long], [None])
            self.vocab_size = whole.shape[-1]
            _, kept = self.forward([long[:4]], [None], logits=False)
            _, kept = self.forward([long[4:-1]], [Past(kept)], logits=False)
            cut = self._says([long[-1:]], [Past(kept)])
        except Exception as error:  # as at load
            raise UnsupportedModel(f"it does not compute: {error}"[:300]) from None
        if not bool(torch.isfinite(whole).all()):
            raise UnsupportedModel("it computes no numbers")
        if not _near(cut, whole, _FOLLOWS):
            raise UnsupportedModel("what it says depends on how its input was cut: its past is of no use")
        for self._front in (True, False):
            try:
                self.together = self._rows_alike(long, short)
            except Exception:  # it takes one row only, which is its right
                self.together = False
            if self.together:
                break

    def _rows_alike(self, *texts: list[int]) -> bool:
        """Whether rows of different lengths are computed each as if it were alone, twice in a row."""
        pasts = [Past(self.forward([text[:-1]], [None])[1]) for text in texts]
        last, next_ = [text[-1:] for text in texts], [[7] for _ in texts]
        alone = [self._says([row], [past]) for row, past in zip(last, pasts, strict=True)]
        beside, kept = self.forward(last, pasts)
        rows = [Past(kept, row) for row in range(len(texts))]
        apart = [self._says([row], [self.apart(past)]) for row, past in zip(next_, rows, strict=True)]
        after = self._says(next_, rows)
        return _near(beside, torch.cat(alone), _ALIKE) and _near(after, torch.cat(apart), _ALIKE)

    def _says(self, rows: Sequence[Sequence[int]], pasts: Sequence[Past | None]) -> torch.Tensor:
        found, _ = self.forward(rows, pasts)
        if found is None:
            raise UnsupportedModel("it computes no logits")
        return found


def format_of(file: OnnxFile) -> str:
    """The coarsest format of a file's matrices, as `engine.dtype` names it; floats that are hardly there do not count. Raises
    `UnsupportedModel`."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) >= 2:
            numbers = int(np.prod(tensor.shape, dtype=np.int64))
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + numbers * ITEM_BITS[tensor.dtype] // 8
    total = sum(sizes.values())
    present = {dtype for dtype, size in sizes.items() if 100 * size >= total}
    if present & {"U4", "I4"} or (file.bits and min(file.bits) < 8):
        return "int4"
    if present & {"U8", "I8"} or file.bits:
        return "int8"
    floats = [name for dtype, name in _FLOATS.items() if dtype in present]
    if not floats:
        raise UnsupportedModel("it holds no weights")
    return floats[-1]


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Shapes grow with each token: an arena would keep every size that ever was.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options


def _near(found: torch.Tensor | None, wanted: torch.Tensor, part: float) -> bool:
    if found is None or not bool(torch.isfinite(found).all() & torch.isfinite(wanted).all()):
        return False
    return float((found - wanted).abs().max()) <= part * max(float(wanted.abs().max()), 1e-6)


def _value(array: np.ndarray[Any, Any]) -> Any:
    """Shares the array's memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
