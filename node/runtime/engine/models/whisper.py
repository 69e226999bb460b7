"""Whisper (Radford et al. 2022): 30 s of log-mel frames to text tokens, greedy, without timestamps.

The encoder runs once a window; the keys and values of its output are kept for the decoder's cross-attention, those of the text
in a cache of the model's full length, allocated once a window. A token is the argmax of the logits, the first of equals, after
the model's suppressed tokens; numerics follow transformers' WhisperForConditionalGeneration, and so do the tokens in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.errors import InvalidSequence, UnsupportedModel
from node.runtime.engine.log_mel import FRAMES, LogMel
from node.runtime.engine.tensors import integer, integers, read_config, read_tensors, size_of


@dataclass(frozen=True, slots=True)
class WhisperConfig:
    """The part of config.json and generation_config.json that decides the computation."""

    vocab_size: int
    width: int
    mel_bins: int
    encoder_layers: int
    encoder_heads: int
    encoder_inner: int
    decoder_layers: int
    decoder_heads: int
    decoder_inner: int
    frames: int
    """Encoder positions of a window: half its mel frames."""
    positions: int
    """Decoder positions: prompt and text together."""
    start: int
    """Token that begins every prompt."""
    end: int
    """Token that ends every text."""
    no_timestamps: int
    transcribe: int | None
    """Task token of a multilingual model."""
    languages: Mapping[str, int]
    """Language tokens by code, such as ``en``; empty for a model of one language."""
    suppressed: tuple[int, ...]
    """Never a token of the text."""
    suppressed_first: tuple[int, ...]
    """Never its first token."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> WhisperConfig:
        """Raises `UnsupportedModel` when a value is out of range or asks for what is not built."""
        if raw.get("activation_function", "gelu") != "gelu" or raw.get("scale_embedding", False):
            raise UnsupportedModel("config.json: activation_function or scale_embedding not supported")
        both = {**raw, **generation}
        vocab = integer(raw, "vocab_size", 1 << 22)
        languages = generation.get("lang_to_id") or {}
        tasks = generation.get("task_to_id") or {}
        for table in (languages, tasks):
            if not isinstance(table, dict) or len(table) > 512:
                raise UnsupportedModel("generation_config.json: a table of tokens is malformed")
            for name in table:
                integer(table, name, vocab - 1, low=0)
        config = cls(
            vocab_size=vocab,
            width=integer(raw, "d_model", 1 << 14),
            mel_bins=integer(raw, "num_mel_bins", 256),
            encoder_layers=integer(raw, "encoder_layers", 256),
            encoder_heads=integer(raw, "encoder_attention_heads", 256),
            encoder_inner=integer(raw, "encoder_ffn_dim", 1 << 16),
            decoder_layers=integer(raw, "decoder_layers", 256),
            decoder_heads=integer(raw, "decoder_attention_heads", 256),
            decoder_inner=integer(raw, "decoder_ffn_dim", 1 << 16),
            frames=integer(raw, "max_source_positions", FRAMES // 2, low=FRAMES // 2),
            positions=integer(raw, "max_target_positions", 1 << 12, low=8),
            start=integer(both, "decoder_start_token_id", vocab - 1, low=0),
            end=integer(both, "eos_token_id", vocab - 1, low=0),
            no_timestamps=integer(generation, "no_timestamps_token_id", vocab - 1, low=0),
            transcribe=integer(tasks, "transcribe", vocab - 1, low=0) if languages else None,
            languages={str(name).strip("<|>"): token for name, token in languages.items()},
            suppressed=integers(both, "suppress_tokens", vocab, vocab),
            suppressed_first=integers(both, "begin_suppress_tokens", vocab, vocab),
        )
        if config.width % config.encoder_heads or config.width % config.decoder_heads:
            raise UnsupportedModel("config.json: d_model must be a multiple of the heads")
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the weight file must hold. The output projection is the token embedding."""
        width = self.width
        shapes: dict[str, tuple[int, ...]] = {
            "model.encoder.conv1.weight": (width, self.mel_bins, 3),
            "model.encoder.conv1.bias": (width,),
            "model.encoder.conv2.weight": (width, width, 3),
            "model.encoder.conv2.bias": (width,),
            "model.encoder.embed_positions.weight": (self.frames, width),
            "model.decoder.embed_tokens.weight": (self.vocab_size, width),
            "model.decoder.embed_positions.weight": (self.positions, width),
        }
        for side, layers, inner in (
            ("encoder", self.encoder_layers, self.encoder_inner),
            ("decoder", self.decoder_layers, self.decoder_inner),
        ):
            shapes |= _pair(f"model.{side}.layer_norm", width)
            for n in range(layers):
                layer = f"model.{side}.layers.{n}."
                for attention in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
                    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                        shapes |= _pair(f"{layer}{attention}.{name}", width, width)
                    del shapes[f"{layer}{attention}.k_proj.bias"]
                    shapes |= _pair(f"{layer}{attention}_layer_norm", width)
                shapes |= {**_pair(layer + "fc1", inner, width), **_pair(layer + "fc2", width, inner)}
                shapes |= _pair(layer + "final_layer_norm", width)
        return shapes

    def working_bytes(self, item: int = 4) -> int:
        """An upper bound for what one window needs beside the weights: both caches, and the encoder's widest moment."""
        caches = 2 * self.decoder_layers * (self.frames + self.positions) * self.width
        encoder = self.frames * (10 * self.width + 2 * self.encoder_inner) + 4 * FRAMES * (self.mel_bins + 201)
        return item * (caches + encoder + 4 * self.vocab_size)


class Whisper:
    """A Whisper model with its weights. Stateless between windows: use it from one thread at a time."""

    def __init__(self, config: WhisperConfig, weights: Mapping[str, Tensor]) -> None:
        """`weights`: one tensor for each entry of `config.shapes()`, all of one dtype on one device."""
        self.config = config
        # Not the projections: the layers hold those fused, and a second copy would double the model's memory.
        self._weights = {name: one for name, one in weights.items() if ".layers." not in name}
        self.embedding = weights["model.decoder.embed_tokens.weight"]
        self._encoder = [
            _Layer(f"model.encoder.layers.{n}.", config.encoder_heads, weights) for n in range(config.encoder_layers)
        ]
        self._decoder = [
            _Layer(f"model.decoder.layers.{n}.", config.decoder_heads, weights) for n in range(config.decoder_layers)
        ]
        self._mel = LogMel(config.mel_bins, self.embedding.device)
        self._banned = torch.tensor(config.suppressed, dtype=torch.int64, device=self.embedding.device)
        first = sorted({*config.suppressed, *config.suppressed_first})
        self._banned_first = torch.tensor(first, dtype=torch.int64, device=self.embedding.device)
        self.weight_bytes: int = size_of(
            [*self._weights.values(), *(one for layer in (*self._encoder, *self._decoder) for one in layer.tensors)]
        )

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Whisper:
        """From a model folder. Raises `UnsupportedModel`."""
        config = WhisperConfig.parse(read_config(folder, "whisper"), _generation(folder))
        return cls(config, read_tensors(folder / "model.safetensors", config.shapes(), dtype, device))

    @torch.inference_mode()
    def encode(self, sound: Tensor) -> Tensor:
        """Float32 [samples] of at most 30 s at 16 kHz to hidden states [frames, width]."""
        dtype = self.embedding.dtype
        x = self._mel(sound).to(dtype)[None]
        x = F.gelu(F.conv1d(x, *_both(self._weights, "model.encoder.conv1"), padding=1))
        x = F.gelu(F.conv1d(x, *_both(self._weights, "model.encoder.conv2"), stride=2, padding=1))[0].T
        x = x + self._weights["model.encoder.embed_positions.weight"]
        for layer in self._encoder:
            x = layer.encode(x)
        return F.layer_norm(x, (self.config.width,), *_both(self._weights, "model.encoder.layer_norm"))

    def transcribe(self, sound: Tensor, language: str | None = None, max_tokens: int = 1 << 30) -> Iterator[int]:
        """Tokens of the text in one window of sound, as they are decoded; the end token is not among them.

        `language`: a code for a multilingual model, None to let the model hear it. Raises `InvalidSequence`.
        """
        config = self.config
        if language is not None and language not in config.languages and config.languages:
            raise InvalidSequence(f"language {language[:16]!r} is not one of this model")
        state = _State(config, self.encode(sound), self._decoder)
        prompt = [config.start]
        if config.languages:
            if language is None:
                logits = self._logits(prompt, state)
                state.length = 0
                codes = sorted(config.languages.values())
                prompt.append(codes[int(logits[codes].argmax())])
            else:
                prompt.append(config.languages[language])
            prompt.append(config.transcribe or 0)
        prompt.append(config.no_timestamps)
        feed, banned = prompt, self._banned_first
        for _ in range(min(max_tokens, config.positions - len(prompt))):
            logits = self._logits(feed, state)
            token = int(logits.index_fill(0, banned, -torch.inf).argmax())
            if token == config.end:
                return
            yield token
            feed, banned = [token], self._banned

    @torch.inference_mode()
    def _logits(self, tokens: list[int], state: _State) -> Tensor:
        """Run tokens after those that the state has seen; float32 [vocab] of the last."""
        start, count = state.length, len(tokens)
        ids = torch.tensor(tokens, device=self.embedding.device)
        x = (
            F.embedding(ids, self.embedding)
            + self._weights["model.decoder.embed_positions.weight"][start : start + count]
        )
        for n, layer in enumerate(self._decoder):
            x = layer.decode(x, state, n)
        state.length += count
        x = F.layer_norm(x[-1], (self.config.width,), *_both(self._weights, "model.decoder.layer_norm"))
        return F.linear(x, self.embedding).float()


class _State:
    """One window's caches: keys and values of the sound, complete, and of the text so far."""

    @torch.inference_mode()
    def __init__(self, config: WhisperConfig, encoded: Tensor, layers: list[_Layer]) -> None:
        self.length = 0
        self.cross = [layer.cross_keys_values(encoded) for layer in layers]
        shape = (len(layers), config.decoder_heads, config.positions, config.width // config.decoder_heads)
        self.keys, self.values = encoded.new_empty(shape), encoded.new_empty(shape)


class _Attention:
    def __init__(self, prefix: str, heads: int, weights: Mapping[str, Tensor]) -> None:
        self.heads = heads
        query, key, value = (weights[f"{prefix}.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj"))
        query_bias, value_bias = weights[f"{prefix}.q_proj.bias"], weights[f"{prefix}.v_proj.bias"]
        self.query_key_value = (
            torch.cat((query, key, value)),
            torch.cat((query_bias, torch.zeros_like(query_bias), value_bias)),
        )
        width = len(query)
        self.query = self.query_key_value[0][:width], self.query_key_value[1][:width]
        self.key_value = self.query_key_value[0][width:], self.query_key_value[1][width:]
        self.output = _both(weights, f"{prefix}.out_proj")

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.query_key_value, *self.output]

    def split(self, x: Tensor, parts: int) -> Tensor:
        """[tokens, parts * width] to [parts, heads, tokens, dim]."""
        return x.view(len(x), parts, self.heads, -1).permute(1, 2, 0, 3)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=causal)[0]
        return F.linear(out.transpose(0, 1).reshape(query.shape[1], -1), *self.output)


class _Layer:
    def __init__(self, prefix: str, heads: int, weights: Mapping[str, Tensor]) -> None:
        self.attention = _Attention(f"{prefix}self_attn", heads, weights)
        self.attention_norm = _both(weights, f"{prefix}self_attn_layer_norm")
        self.cross: _Attention | None = None
        if f"{prefix}encoder_attn.q_proj.weight" in weights:
            self.cross = _Attention(f"{prefix}encoder_attn", heads, weights)
            self.cross_norm = _both(weights, f"{prefix}encoder_attn_layer_norm")
        self.up, self.down = _both(weights, f"{prefix}fc1"), _both(weights, f"{prefix}fc2")
        self.feed_norm = _both(weights, f"{prefix}final_layer_norm")
        self.width = (len(self.feed_norm[0]),)

    @property
    def tensors(self) -> list[Tensor]:
        pairs = [self.attention_norm, self.up, self.down, self.feed_norm, *([self.cross_norm] if self.cross else [])]
        crossed = self.cross.tensors if self.cross else []
        return [*self.attention.tensors, *crossed, *(one for pair in pairs for one in pair)]

    def encode(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, self.width, *self.attention_norm)
        query, key, value = self.attention.split(F.linear(normed, *self.attention.query_key_value), 3)
        return self._feed(x + self.attention.attend(query, key, value))

    def decode(self, x: Tensor, state: _State, index: int) -> Tensor:
        normed = F.layer_norm(x, self.width, *self.attention_norm)
        query, key, value = self.attention.split(F.linear(normed, *self.attention.query_key_value), 3)
        start, end = state.length, state.length + len(x)
        state.keys[index, :, start:end], state.values[index, :, start:end] = key, value
        # Several tokens at once come only at the start, where causal means what it says.
        x = x + self.attention.attend(
            query, state.keys[index, :, :end], state.values[index, :, :end], causal=len(x) > 1
        )
        if self.cross is not None:
            query = self.cross.split(F.linear(F.layer_norm(x, self.width, *self.cross_norm), *self.cross.query), 1)[0]
            x = x + self.cross.attend(query, *state.cross[index])
        return self._feed(x)

    def cross_keys_values(self, encoded: Tensor) -> Tensor:
        """[2, heads, frames, dim]"""
        if self.cross is None:
            raise UnsupportedModel("an encoder layer has no cross-attention")
        return self.cross.split(F.linear(encoded, *self.cross.key_value), 2).contiguous()

    def _feed(self, x: Tensor) -> Tensor:
        inner = F.gelu(F.linear(F.layer_norm(x, self.width, *self.feed_norm), *self.up))
        return x + F.linear(inner, *self.down)


def _generation(folder: Path) -> dict[str, Any]:
    try:
        with (folder / "generation_config.json").open("rb") as file:
            value = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"generation_config.json cannot be read: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise UnsupportedModel("generation_config.json is not a JSON object")
    return value


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _both(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]
