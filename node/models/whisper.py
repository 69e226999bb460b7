"""Turn a Whisper model in CTranslate2's form into a folder that torch and transformers load as is.

The weights keep the type they came in (float16), so nothing is rounded. CTranslate2 fuses projections; here they are cut apart
again under transformers' names. The bytes written depend on nothing but the input. Sound is cut into segments before it is
transcribed, and where it is cut changes the text: the voice activity weights are therefore part of the model, and of its id.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers

from node import nesting
from node.errors import ModelError
from node.models import silero
from node.models.ctranslate2_file import CTranslate2File
from node.models.safetensors_file import write_tensors

_ITEM: Final = {"<f4": "F32", "<f2": "F16"}
_FROM: Final = {"weight": "gamma", "bias": "beta"}
"""A layer norm's tensors, by transformers' names."""
_Part = tuple[str, int, int]
"""A variable, which of its equal parts along the first axis, and how many those are."""


def convert(model: Path, tokenizer: Path, settings: Path, vad: Path, folder: Path) -> None:
    """Write model.safetensors, vad.safetensors, configs and tokenizer into `folder`.

    `model`, `tokenizer` and `settings` are CTranslate2's model.bin, tokenizer.json and config.json, `vad` silero's ONNX file.
    Raises `ModelError` when a file is damaged or is another kind of model.
    """
    with CTranslate2File(model) as source:
        if source.spec != "WhisperSpec":
            raise ModelError(f"CTranslate2 model of kind {source.spec!r} is not supported", hint="supported: Whisper")
        config = _config(source)
        parts = _parts(config)
        dtypes = {
            source.variables[source.aliases.get(name, name)].dtype
            for name, _, _ in parts.values()
            if name in source.variables
        }
        if len(dtypes) != 1 or not dtypes <= set(_ITEM):
            raise ModelError(f"CTranslate2 weights of type {', '.join(sorted(dtypes))} are not supported")
        dtype = dtypes.pop()
        shapes = {name: _cut(source, part).shape for name, part in parts.items()}
        with (folder / "model.safetensors").open("xb") as file:
            write_tensors(file, _ITEM[dtype], shapes, _arrays(source, parts))
        _no_key_bias(source, config)
    vocabulary = _vocabulary(tokenizer)
    _write_json(folder / "config.json", config | _token_ids(vocabulary))
    _write_json(folder / "generation_config.json", _generation(vocabulary, settings))
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    silero.convert(vad, folder / "vad.safetensors")


def _config(source: CTranslate2File) -> dict[str, Any]:
    """config.json in the words of transformers' WhisperConfig."""
    for name in ("decoder/scale_embeddings", "decoder/alibi", "decoder/start_from_zero_embedding"):
        if source.scalar(name):
            raise ModelError(f"CTranslate2 variable {name} is set, which no Whisper has")
    vocab, width = source.array("decoder/embeddings/weight").shape
    _, bins, _ = source.array("encoder/conv1/weight").shape
    layers = {side: _count(source, side) for side in ("encoder", "decoder")}
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "vocab_size": int(vocab),
        "d_model": int(width),
        "num_mel_bins": int(bins),
        "encoder_layers": layers["encoder"],
        "encoder_attention_heads": source.scalar("encoder/num_heads"),
        "encoder_ffn_dim": len(source.array("encoder/layer_0/ffn/linear_0/bias")),
        "decoder_layers": layers["decoder"],
        "decoder_attention_heads": source.scalar("decoder/num_heads"),
        "decoder_ffn_dim": len(source.array("decoder/layer_0/ffn/linear_0/bias")),
        "max_source_positions": len(source.array("encoder/position_encodings/encodings")),
        "max_target_positions": len(source.array("decoder/position_encodings/encodings")),
        "max_position_embeddings": len(source.array("decoder/position_encodings/encodings")),
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }


def _count(source: CTranslate2File, side: str) -> int:
    """Layers are numbered without a gap, or a tensor is missed later."""
    return len(
        {name.split("/")[1] for name in source.variables if name.startswith(f"{side}/layer_") and name.count("/") > 2}
    )


def _parts(config: Mapping[str, Any]) -> dict[str, _Part]:
    """Where each tensor of transformers' model is found, in the order in which they are written."""
    parts: dict[str, _Part] = {
        "model.decoder.embed_tokens.weight": ("decoder/embeddings/weight", 0, 1),
        "model.decoder.embed_positions.weight": ("decoder/position_encodings/encodings", 0, 1),
        "model.encoder.embed_positions.weight": ("encoder/position_encodings/encodings", 0, 1),
    }
    for kind in ("weight", "bias"):
        for name in ("conv1", "conv2"):
            parts[f"model.encoder.{name}.{kind}"] = (f"encoder/{name}/{kind}", 0, 1)
        for side in ("encoder", "decoder"):
            parts[f"model.{side}.layer_norm.{kind}"] = (f"{side}/layer_norm/{_FROM[kind]}", 0, 1)
            for n in range(config[f"{side}_layers"]):
                ours, theirs = f"model.{side}.layers.{n}", f"{side}/layer_{n}"
                layer = _attention("self_attn", "self_attention", kind, fused=("q_proj", "k_proj", "v_proj"))
                if side == "decoder":
                    layer |= _attention("encoder_attn", "attention", kind, fused=("k_proj", "v_proj"))
                layer |= {
                    f"fc1.{kind}": (f"ffn/linear_0/{kind}", 0, 1),
                    f"fc2.{kind}": (f"ffn/linear_1/{kind}", 0, 1),
                    f"final_layer_norm.{kind}": (f"ffn/layer_norm/{_FROM[kind]}", 0, 1),
                }
                parts |= {f"{ours}.{name}": (f"{theirs}/{found}", at, of) for name, (found, at, of) in layer.items()}
    return parts


def _attention(ours: str, theirs: str, kind: str, *, fused: tuple[str, ...]) -> dict[str, _Part]:
    """One attention: a query of its own unless it is fused with key and value, then those, then the output."""
    parts: dict[str, _Part] = {f"{ours}_layer_norm.{kind}": (f"{theirs}/layer_norm/{_FROM[kind]}", 0, 1)}
    linear = 0
    if "q_proj" not in fused:
        parts[f"{ours}.q_proj.{kind}"] = (f"{theirs}/linear_0/{kind}", 0, 1)
        linear = 1
    for at, name in enumerate(fused):
        if (name, kind) != ("k_proj", "bias"):  # Whisper's keys have none; CTranslate2 fills in zeros
            parts[f"{ours}.{name}.{kind}"] = (f"{theirs}/linear_{linear}/{kind}", at, len(fused))
    parts[f"{ours}.out_proj.{kind}"] = (f"{theirs}/linear_{linear + 1}/{kind}", 0, 1)
    return parts


def _cut(source: CTranslate2File, part: _Part) -> np.ndarray[Any, Any]:
    name, at, of = part
    whole = source.array(name)
    if whole.shape[0] % of:
        raise ModelError(f"CTranslate2 variable {name} does not have {of} equal parts")
    rows = whole.shape[0] // of
    return np.ascontiguousarray(whole[at * rows : (at + 1) * rows])


def _arrays(source: CTranslate2File, parts: Mapping[str, _Part]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for name, part in parts.items():
        yield name, _cut(source, part)


def _no_key_bias(source: CTranslate2File, config: Mapping[str, Any]) -> None:
    """Raises `ModelError` when a bias that no Whisper has is not zero: leaving it out would change the model."""
    for side, attentions in (
        ("encoder", (("self_attention/linear_0", 1, 3),)),
        ("decoder", (("self_attention/linear_0", 1, 3), ("attention/linear_1", 0, 2))),
    ):
        for n in range(config[f"{side}_layers"]):
            for name, at, of in attentions:
                if _cut(source, (f"{side}/layer_{n}/{name}/bias", at, of)).any():
                    raise ModelError(f"{side}/layer_{n}/{name} has a bias for its keys, which no Whisper has")


def _vocabulary(path: Path) -> Mapping[str, int]:
    try:
        return tokenizers.Tokenizer.from_buffer(path.read_bytes()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception for a bad file
        raise ModelError(f"tokenizer.json cannot be read: {error}"[:300]) from None


def _token(vocabulary: Mapping[str, int], name: str) -> int:
    try:
        return vocabulary[f"<|{name}|>"]
    except KeyError:
        raise ModelError(f"the tokenizer lacks <|{name}|>") from None


def _token_ids(vocabulary: Mapping[str, int]) -> dict[str, int]:
    end = _token(vocabulary, "endoftext")
    start = _token(vocabulary, "startoftranscript")
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}


def _generation(vocabulary: Mapping[str, int], settings: Path) -> dict[str, Any]:
    """generation_config.json in the words of transformers. A model of one language is known by its `.en` vocabulary."""
    try:
        raw = nesting.loads(settings.read_bytes())
        lists = {name: raw[name] for name in ("suppress_ids", "suppress_ids_begin", "lang_ids")}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"CTranslate2's config.json cannot be read: {error}"[:300]) from None
    for name, ids in lists.items():
        if not isinstance(ids, list) or not all(type(n) is int and 0 <= n < 1 << 22 for n in ids):
            raise ModelError(f"CTranslate2's config.json: {name} is no list of tokens")
    multilingual = len(vocabulary) > 51_864
    found: dict[str, Any] = {
        **_token_ids(vocabulary),
        "begin_suppress_tokens": lists["suppress_ids_begin"],
        "is_multilingual": multilingual,
        "max_length": 448,
        "no_timestamps_token_id": _token(vocabulary, "notimestamps"),
        "return_timestamps": False,
        "suppress_tokens": lists["suppress_ids"],
    }
    if multilingual:
        names = {index: name for name, index in vocabulary.items()}
        found["lang_to_id"] = {names[index]: index for index in lists["lang_ids"] if index in names}
        found["task_to_id"] = {task: _token(vocabulary, task) for task in ("transcribe", "translate")}
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n", encoding="ascii")
