"""Take the weights of Silero VAD out of its ONNX file, into a safetensors file that needs no graph.

The package's own safetensors file holds weights of another release than its ONNX and TorchScript files, which agree with each
other and which its documentation measures; so they come from there. The bytes written depend on nothing but the input.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Final

from node.models.onnx_file import OnnxFile
from node.models.safetensors_file import write_tensors

_NAMES: Final = MappingProxyType(
    {
        "stft_conv.weight": "model.stft.forward_basis_buffer",
        **{
            f"conv{n}.{kind}": f"model.encoder.{n - 1}.reparam_conv.{kind}"
            for n in range(1, 5)
            for kind in ("weight", "bias")
        },
        **{
            f"lstm_cell.{name}": f"model.decoder.rnn.{name}"
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        },
        "final_conv.weight": "model.decoder.decoder.2.weight",
        "final_conv.bias": "model.decoder.decoder.2.bias",
    }
)
"""Tensors by the names that silero gives them outside of ONNX."""


def convert(source: Path, target: Path) -> None:
    """Write the 16 kHz weights of `source`, silero's ONNX file of opset 15, to `target`. Raises `ModelError`."""
    with OnnxFile(source) as file:
        arrays = {ours: file.float32(theirs) for ours, theirs in _NAMES.items()}
    with target.open("xb") as out:
        write_tensors(out, "F32", {name: array.shape for name, array in arrays.items()}, arrays.items())
