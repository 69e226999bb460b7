"""Silero VAD (Silero Team 2021, version 6, 16 kHz): how likely a 32 ms chunk of sound holds speech.

A short-time Fourier transform written as a convolution, four convolutions, one LSTM cell that remembers, one output. Chunks go
through one by one, so that a probability never depends on how the sound was cut into pieces. Weights go by the names of silero's
safetensors file, though their values come out of its ONNX file (the model store converts them); so do the numerics.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.tensors import read_tensors, size_of

CHUNK: Final = 512
"""Samples at 16 kHz that are judged together: 32 ms."""
_CONTEXT: Final = 64
"""Samples of the chunk before that go in with a chunk."""
_BINS: Final = 129
_CONVOLUTIONS: Final = (("conv1", 129, 128, 1), ("conv2", 128, 64, 2), ("conv3", 64, 64, 2), ("conv4", 64, 128, 1))
"""Name, channels in and out, stride."""
SHAPES: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "stft_conv.weight": (2 * _BINS, 1, 256),
        **{f"{name}.weight": (wide, narrow, 3) for name, narrow, wide, _ in _CONVOLUTIONS},
        **{f"{name}.bias": (wide,) for name, _, wide, _ in _CONVOLUTIONS},
        "lstm_cell.weight_ih": (512, 128),
        "lstm_cell.weight_hh": (512, 128),
        "lstm_cell.bias_ih": (512,),
        "lstm_cell.bias_hh": (512,),
        "final_conv.weight": (1, 128, 1),
        "final_conv.bias": (1,),
    }
)
"""Every tensor that the weight file must hold."""


class SileroVad:
    """The weights, shared by all streams; what a stream remembers is in its `Listener`."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)
        self.weight_bytes: int = size_of(self._weights.values())

    @classmethod
    def load(cls, path: Path) -> SileroVad:
        """From a converted weight file. Raises `UnsupportedModel`."""
        return cls(read_tensors(path, SHAPES))

    def listener(self) -> Listener:
        return Listener(self._weights)


class Listener:
    """One stream of sound."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._before = torch.zeros(_CONTEXT)
        self._hidden, self._cell = torch.zeros(1, 128), torch.zeros(1, 128)

    @torch.inference_mode()
    def __call__(self, chunk: Tensor) -> float:
        """The probability, 0 to 1, that float32 [CHUNK] holds speech, after what was heard before."""
        weights = self._weights
        sound = torch.cat((self._before, chunk))
        self._before = chunk[-_CONTEXT:]
        x = F.conv1d(F.pad(sound[None, None], (0, 64), mode="reflect"), weights["stft_conv.weight"], stride=128)
        x = (x[:, :_BINS].square() + x[:, _BINS:].square()).sqrt()
        for name, _, _, stride in _CONVOLUTIONS:
            x = F.conv1d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=1).relu()
        gates = F.linear(x[:, :, 0], weights["lstm_cell.weight_ih"], weights["lstm_cell.bias_ih"])
        gates = gates + F.linear(self._hidden, weights["lstm_cell.weight_hh"], weights["lstm_cell.bias_hh"])
        enter, forget, new, out = gates.chunk(4, dim=1)
        self._cell = forget.sigmoid() * self._cell + enter.sigmoid() * new.tanh()
        self._hidden = out.sigmoid() * self._cell.tanh()
        answer = F.conv1d(self._hidden.relu()[:, :, None], weights["final_conv.weight"], weights["final_conv.bias"])
        return float(answer.sigmoid())
