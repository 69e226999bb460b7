"""The Llama decoder (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One sequence at a time: `forward` takes the tokens that are not in the cache yet, be it a whole prompt or one token.
Numerics follow transformers' LlamaForCausalLM, so that greedy output in float32 is equal token for token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.errors import UnsupportedModel
from node.runtime.engine.kv_cache import SequenceCache


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The part of config.json that decides the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    """The output projection is the token embedding."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """From config.json. Raises `UnsupportedModel` when a value is out of range or asks for what is not built."""
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(raw.get("attention_bias", False)),
            "mlp_bias": bool(raw.get("mlp_bias", False)),
            "rope_scaling": kind != "default",
        }
        if any(unsupported.values()):
            raise UnsupportedModel(
                f"config.json: {', '.join(k for k, bad in unsupported.items() if bad)} not supported"
            )

        def integer(name: str, high: int, default: int | None = None) -> int:
            value = raw.get(name)
            if value is None:
                value = default
            if type(value) is not int or not 1 <= value <= high:
                raise UnsupportedModel(f"config.json: {name} is {value!r}, expected 1 to {high}")
            return value

        def number(name: str, value: Any, low: float, high: float) -> float:
            if type(value) not in (int, float) or not low <= value <= high:
                raise UnsupportedModel(f"config.json: {name} is {value!r}, expected {low} to {high}")
            return float(value)

        heads = integer("num_attention_heads", 1024)
        hidden = integer("hidden_size", 1 << 17)
        config = cls(
            vocab_size=integer("vocab_size", 1 << 22),
            hidden_size=hidden,
            intermediate_size=integer("intermediate_size", 1 << 20),
            layers=integer("num_hidden_layers", 1024),
            heads=heads,
            kv_heads=integer("num_key_value_heads", heads, heads),
            head_dim=integer("head_dim", 1024, max(hidden // heads, 1)),
            context_length=integer("max_position_embeddings", 1 << 24),
            rope_theta=number("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0)), 1.0, 1e12),
            rms_norm_eps=number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), 0.0, 1.0),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
        if config.heads % config.kv_heads or config.head_dim % 2:
            raise UnsupportedModel("config.json: heads must be a multiple of kv heads, and head_dim even")
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the weight files must hold."""
        width, inner = self.hidden_size, self.intermediate_size
        queries, pairs = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, width),
            "model.norm.weight": (width,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, width)
        for n in range(self.layers):
            shapes |= {
                f"model.layers.{n}.{name}.weight": shape
                for name, shape in (
                    ("input_layernorm", (width,)),
                    ("self_attn.q_proj", (queries, width)),
                    ("self_attn.k_proj", (pairs, width)),
                    ("self_attn.v_proj", (pairs, width)),
                    ("self_attn.o_proj", (width, queries)),
                    ("post_attention_layernorm", (width,)),
                    ("mlp.gate_proj", (inner, width)),
                    ("mlp.up_proj", (inner, width)),
                    ("mlp.down_proj", (width, inner)),
                )
            }
        return shapes


class Llama:
    """A Llama model with its weights. Stateless between calls: what it remembers is in the cache it is given."""

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Tensor]) -> None:
        """`weights`: one tensor for each entry of `config.shapes()`, all of one dtype on one device."""
        self.config = config
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.head = self.embedding if config.tied else weights["lm_head.weight"]
        self.layers = [_Layer(config, n, weights) for n in range(config.layers)]
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        self._frequencies = (1.0 / config.rope_theta**steps).to(self.embedding.device)

    def forward(self, token_ids: Tensor, cache: SequenceCache) -> Tensor:
        """Run int64 [tokens] after what the cache holds; returns hidden states [tokens, hidden] and fills the cache."""
        tokens = token_ids.shape[0]
        positions = torch.arange(cache.length, cache.length + tokens, device=token_ids.device)
        angles = positions[:, None].float() * self._frequencies
        dtype = self.embedding.dtype
        turn = angles.cos().to(dtype), angles.sin().to(dtype)
        mask = None
        if tokens > 1 and cache.length > 0:  # a later chunk of a prompt sees all before it, and itself causally
            mask = torch.arange(cache.length + tokens, device=token_ids.device) <= positions[:, None]
        hidden = F.embedding(token_ids, self.embedding)
        for layer in self.layers:
            hidden = layer.forward(hidden, turn, mask, cache)
        cache.advance(tokens)
        return F.rms_norm(hidden, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [tokens, vocab] of hidden states."""
        return F.linear(hidden, self.head).float()


class _Layer:
    def __init__(self, config: LlamaConfig, index: int, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.index = index

        def weight(name: str) -> Tensor:
            return weights[f"model.layers.{index}.{name}.weight"]

        self.attention_norm = weight("input_layernorm")
        self.query, self.key = weight("self_attn.q_proj"), weight("self_attn.k_proj")
        self.value, self.output = weight("self_attn.v_proj"), weight("self_attn.o_proj")
        self.feed_norm = weight("post_attention_layernorm")
        self.gate, self.up, self.down = weight("mlp.gate_proj"), weight("mlp.up_proj"), weight("mlp.down_proj")

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: SequenceCache) -> Tensor:
        width, eps = (self.config.hidden_size,), self.config.rms_norm_eps
        hidden = hidden + self._attend(F.rms_norm(hidden, width, self.attention_norm, eps), turn, mask, cache)
        x = F.rms_norm(hidden, width, self.feed_norm, eps)
        return hidden + F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)

    def _attend(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: SequenceCache) -> Tensor:
        tokens, dim = x.shape[0], self.config.head_dim
        query = _rotate(_heads(F.linear(x, self.query), dim), turn)
        key = _rotate(_heads(F.linear(x, self.key), dim), turn)
        keys, values = cache.append(self.index, key, _heads(F.linear(x, self.value), dim))
        if tokens == 1:  # the queries that share a key head become the rows of one small matrix
            query = query.view(self.config.kv_heads, -1, dim)
            out = F.scaled_dot_product_attention(query[None], keys[None], values[None])
            out = out.view(1, -1)
        else:
            out = F.scaled_dot_product_attention(
                query[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            out = out[0].transpose(0, 1).reshape(tokens, -1)
        return F.linear(out, self.output)


def _heads(x: Tensor, dim: int) -> Tensor:
    """[tokens, heads * dim] to [heads, tokens, dim]."""
    return x.view(x.shape[0], -1, dim).transpose(0, 1)


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al. 2021), the two halves of a head forming the pairs."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
