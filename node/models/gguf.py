"""Turn a GGUF model (llama architecture, GPT-2 style tokenizer) into a folder that torch and transformers load as is.

The weights are dequantised to float32 exactly, by the `gguf` package's own numpy code, and the tokenizer and template
come from the file's metadata. The bytes written depend on nothing but the input, so the model's id is the same on every
machine.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tqdm import tqdm  # type: ignore[import-untyped]

from node.errors import ModelError
from node.models.gguf_file import GgufFile, TensorInfo
from node.models.safetensors_file import write_float32

_OUTER: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK: Final = re.compile(r"blk\.(\d{1,4})\.(\w+)\.weight")

# How text is cut before byte-pair merging, by the GGUF's tokenizer.ggml.pre.
_BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS: Final = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "gpt-2": _BYTE_LEVEL,
}
_CONTROL, _USER_DEFINED = 3, 4
_ROWS_AT_ONCE: Final = 4096


def convert(source: Path, folder: Path, *, progress: bool | None = None) -> None:
    """Write model.safetensors (float32), config, tokenizer and template of the GGUF file `source` into `folder`.

    `progress`: show a bar on stderr; None shows it on a terminal only. Raises `ModelError` when the file is damaged or
    is a kind of model that is not supported.
    """
    with GgufFile(source) as gguf:
        if gguf.text("general.architecture") != "llama":
            raise ModelError(
                f"GGUF architecture {gguf.text('general.architecture')!r} is not supported", hint="supported: llama"
            )
        config = _config(gguf)
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", _special_ids(gguf))
        _write_json(folder / "tokenizer.json", tokenizer_json(gguf))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(gguf, config["max_position_embeddings"]))
        template = gguf.text("tokenizer.chat_template", "")
        if template:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        _write_weights(gguf, folder / "model.safetensors", config, progress)


def _config(gguf: GgufFile) -> dict[str, Any]:
    """config.json in the words of transformers' LlamaConfig."""
    heads = gguf.integer("llama.attention.head_count")
    width = gguf.integer("llama.embedding_length")
    if not 1 <= heads <= 1024 or width % heads:
        raise ModelError(f"{heads} attention heads do not divide width {width}")
    # float32 in the file: 9.999999747378752e-06 was written as 1e-05, and that is what the model was trained with
    epsilon = float(np.format_float_positional(np.float32(gguf.number("llama.attention.layer_norm_rms_epsilon"))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(gguf.strings("tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": gguf.integer("llama.feed_forward_length"),
        "num_hidden_layers": gguf.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.integer("llama.attention.head_count_kv", heads),
        "head_dim": gguf.integer("llama.rope.dimension_count", width // heads),
        "max_position_embeddings": gguf.integer("llama.context_length"),
        "rms_norm_eps": epsilon,
        "rope_theta": gguf.number("llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "float32",
        **_special_ids(gguf),
    }


def _special_ids(gguf: GgufFile) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {
        ours: gguf.integer(f"tokenizer.ggml.{theirs}_token_id")
        for theirs, ours in names.items()
        if f"tokenizer.ggml.{theirs}_token_id" in gguf.metadata
    }


def _tokenizer_config(gguf: GgufFile, context: int) -> dict[str, Any]:
    tokens, ids = gguf.strings("tokenizer.ggml.tokens"), _special_ids(gguf)
    special = {}
    for key, token_id in ids.items():
        if not 0 <= token_id < len(tokens):
            raise ModelError(f"{key} {token_id} is outside the vocabulary")
        special[key.removesuffix("_id")] = tokens[token_id]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **special,
    }


def tokenizer_json(gguf: GgufFile) -> dict[str, Any]:
    """A `tokenizers` file: byte-level BPE with the GGUF's vocabulary, merges, special tokens and pre-tokenizer."""
    kind, pre = gguf.text("tokenizer.ggml.model"), gguf.text("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(f"tokenizer {kind!r}/{pre!r} is not supported", hint=f"supported: {sorted(_PRE_TOKENIZERS)}")
    tokens, kinds = gguf.strings("tokenizer.ggml.tokens"), gguf.integers("tokenizer.ggml.token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise ModelError("the GGUF's vocabulary repeats a token or lacks token types")
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[index] == _CONTROL,
        }
        for index in range(len(tokens))
        if kinds[index] in (_CONTROL, _USER_DEFINED)
    ]
    merges = [merge.split(" ") for merge in gguf.strings("tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in merges):
        raise ModelError("a merge of the GGUF's tokenizer is not a pair")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _write_weights(gguf: GgufFile, path: Path, config: dict[str, Any], progress: bool | None) -> None:
    names = {_hf_name(info.name): info for info in gguf.tensors.values()}
    shapes = {name: info.shape for name, info in names.items()}
    hidden = (not sys.stderr.isatty()) if progress is None else not progress
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    with tqdm(total=total, disable=hidden, unit="B", unit_scale=True, desc="converting", leave=False) as bar:

        def arrays() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
            for name, info in names.items():
                array = _weights(gguf, info, bar.update)
                if ".q_proj." in name:
                    array = _halves_apart(array, config["num_attention_heads"])
                elif ".k_proj." in name:
                    array = _halves_apart(array, config["num_key_value_heads"])
                yield name, array

        with path.open("wb") as file:
            write_float32(file, shapes, arrays())


def _hf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = _BLOCK.fullmatch(name)
    if not match or match[2] not in _INNER:
        raise ModelError(f"tensor {name!r} is not part of a llama model")
    return f"model.layers.{int(match[1])}.{_INNER[match[2]]}.weight"


def _weights(gguf: GgufFile, info: TensorInfo, done: Callable[[int], Any]) -> np.ndarray[Any, Any]:
    try:
        kind = GGMLQuantizationType(info.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise ModelError(f"tensor {info.name}: unknown type {info.kind}") from None
    columns = info.shape[-1] if info.shape else 0
    if not math.prod(info.shape) or not columns or columns % block:
        raise ModelError(f"tensor {info.name}: rows of {columns} values are not whole blocks of {block}")
    rows, row_bytes = math.prod(info.shape) // columns, columns // block * block_bytes
    raw = np.frombuffer(gguf.bytes_of(info, rows * row_bytes), dtype=np.uint8).reshape(rows, row_bytes)
    out = np.empty((rows, columns), dtype="<f4")
    for start in range(0, rows, _ROWS_AT_ONCE):  # in slices, so that no temporary is larger than a few MB
        try:
            part = out[start : start + _ROWS_AT_ONCE]
            source = raw[start : start + _ROWS_AT_ONCE]
            part[:] = source.view("<f4") if kind is GGMLQuantizationType.F32 else dequantize(source, kind)
        except NotImplementedError:
            raise ModelError(f"tensor {info.name}: type {kind.name} is not supported") from None
        done(part.nbytes)
    return out.reshape(info.shape)


def _halves_apart(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's interleaving of each head's rotary halves: rows 0,1,2,3.. become 0,2,4..,1,3,5.."""
    if weight.ndim != 2 or not 1 <= heads <= 1024 or weight.shape[0] % (2 * heads):
        raise ModelError(f"a projection of shape {weight.shape} does not split into {heads} heads")
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
