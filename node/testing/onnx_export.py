"""A stored model as an ONNX file with past keys and values, by torch's own exporter: `python -m node.testing.onnx_export IN OUT`.

Names and shapes are those that exporters have agreed on (`input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key`,
`present.N.key`, `logits`). Needs transformers and onnx, and is for tests and benchmarks: operators export with a tool of their
choice. Llama's family and whatever else keeps plain keys and values.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from pathlib import Path
from typing import Any

import node.runtime  # before torch  # noqa: F401
from node.models.store import ONNX

BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
    "config.json",
)

WEIGHTS = ("float32", "int8", "int4", "dynamic")
"""int8, int4: blocks of 32 with a scale, by the operator `MatMulNBits`, which computes in int8 with a scale for each block of a
row. dynamic: int8 weights by one scale for a matrix, and numbers of each pass by one scale for all of it."""


def export(folder: Path, out: Path, *, positions: bool = True, weights: str = "float32") -> Path:
    """Write `model.onnx` and what belongs to it into an empty folder `out`. `positions`: ask for `position_ids`; else they follow
    from the mask. `weights`: of the linear layers, one of `WEIGHTS`."""
    import torch
    import transformers

    class WithPast(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, *rest: Any) -> tuple[Any, ...]:
            given, past = (rest[0], rest[1:]) if positions else (None, rest)
            if given is None:
                given = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            cache = transformers.DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            found = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=given, past_key_values=cache
            )
            kept = [tensor for layer in found.past_key_values.layers for tensor in (layer.keys, layer.values)]
            return found.logits, *kept

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = [torch.zeros(2, heads, 5, size) for _ in range(2 * config.num_hidden_layers)]
    parts = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    given: dict[str, Any] = {
        "input_ids": torch.ones(2, 3, dtype=torch.int64),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
    }
    axes = {"input_ids": {0: "rows", 1: "fresh"}, "attention_mask": {0: "rows", 1: "all"}}
    if positions:
        given["position_ids"] = torch.arange(5, 8).expand(2, 3)
        axes["position_ids"] = {0: "rows", 1: "fresh"}
    axes["logits"] = {0: "rows", 1: "fresh"}
    axes |= {f"past_key_values.{part}": {0: "rows", 2: "past"} for part in parts}
    axes |= {f"present.{part}": {0: "rows", 2: "all"} for part in parts}
    target = out / ONNX
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            WithPast(model),
            (*given.values(), *past),
            str(target),
            input_names=[*given, *(f"past_key_values.{part}" for part in parts)],
            output_names=["logits", *(f"present.{part}" for part in parts)],
            dynamic_axes=axes,
            dynamo=False,
            opset_version=18,
        )
    if weights == "dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole = target.rename(out / "whole.onnx")
        quantize_dynamic(whole, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
        whole.unlink()
    elif weights != "float32":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            str(target), bits=int(weights.removeprefix("int")), block_size=32, accuracy_level=4
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0])
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    export(args.folder, args.out, weights=args.weights)
