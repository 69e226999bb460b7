"""config.json, dialect by dialect: what to compute, and under which names the weights are stored.

`parse` is the only way in. What an architecture asks for that is not built is refused by name; nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from node.runtime.engine.errors import UnsupportedModel
from node.runtime.engine.models.decoder import DecoderConfig, Rope



@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor stands in the weight files."""

    name: str
    transposed: bool = False
    """Stored as [in, out] (GPT-2)."""
    rows: tuple[int, int] | None = None
    """Only these rows of it: several layers are stored as one (Phi 3), after any transposition."""


Names = Callable[[str], Stored]
"""From a canonical name to the stored tensor."""


class Fields:
    """config.json, read field by field with bounds. Raises `UnsupportedModel`."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def integer(self, name: str, high: int, default: int | None = None, low: int = 1) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if type(value) is not int or not low <= value <= high:
            raise UnsupportedModel(f"config.json: {name} is {value!r}, expected {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None:
            value = default
        if type(value) not in (int, float) or not low <= value <= high:
            raise UnsupportedModel(f"config.json: {name} is {value!r}, expected {low} to {high}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw.get(name, default)
        if type(value) is not bool:
            raise UnsupportedModel(f"config.json: {name} is {value!r}, expected true or false")
        return value

    def one_of(self, name: str, choices: Mapping[str, str], default: str | None = None) -> str:
        value = self.raw.get(name, default)
        if type(value) is not str or value not in choices:
            raise UnsupportedModel(f"config.json: {name} {value!r} is not supported; supported: {', '.join(choices)}")
        return choices[value]

    def refuse(self, *names: str) -> None:
        """These fields ask for something that is not built."""
        asked = [name for name in names if self.raw.get(name)]
        if asked:
            raise UnsupportedModel(f"config.json: {', '.join(asked)} not supported")

    def rope(self, dim: int, default_theta: float = 10000.0) -> Rope:
        raw = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(raw, dict):
            raise UnsupportedModel(f"config.json: rope_scaling is {raw!r}")
        scaling = Fields({"rope_theta": self.raw.get("rope_theta"), **{k: v for k, v in raw.items() if v is not None}})
        scaling.raw = {**scaling.raw, "rope_type": raw.get("rope_type", raw.get("type", "default"))}
        kind = scaling.one_of("rope_type", {kind: kind for kind in ("default", "linear", "llama3")})
        theta = scaling.number("rope_theta", 1.0, 1e12, default_theta)
        if kind == "default":
            return Rope(theta, dim)
        factor = scaling.number("factor", 1.0, 1e6)
        if kind == "linear":
            return Rope(theta, dim, "linear", factor)
        low, high = scaling.number("low_freq_factor", 1e-3, 1e3), scaling.number("high_freq_factor", 1e-3, 1e3)
        original = scaling.integer("original_max_position_embeddings", 1 << 24)
        if low >= high:
            raise UnsupportedModel("config.json: low_freq_factor must be below high_freq_factor")
        return Rope(theta, dim, "llama3", factor, low, high, original)


def parse(raw: Mapping[str, Any]) -> tuple[DecoderConfig, Names]:
    """From config.json. Raises `UnsupportedModel` when a value is out of range or asks for what is not built."""
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(f"model_type {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind](Fields(raw))


def _sizes(f: Fields, **names: str) -> dict[str, Any]:
    heads = f.integer("num_attention_heads", 1024)
    hidden = f.integer("hidden_size", 1 << 17)
    sizes = {
        "vocab_size": f.integer("vocab_size", 1 << 22),
        "hidden_size": hidden,
        "intermediate_size": f.integer("intermediate_size", 1 << 20),
        "layers": f.integer("num_hidden_layers", 1024),
        "heads": heads,
        "kv_heads": f.integer("num_key_value_heads", heads, heads),
        "head_dim": f.integer("head_dim", 1024, max(hidden // heads, 1)),
        "context_length": f.integer("max_position_embeddings", 1 << 24),
    }
    if heads % sizes["kv_heads"] or sizes["head_dim"] % 2:
        raise UnsupportedModel("config.json: heads must be a multiple of kv heads, and head_dim even")
    return sizes


def _llama(f: Fields) -> tuple[DecoderConfig, Names]:
    f.refuse("attention_bias", "mlp_bias")
    f.one_of("hidden_act", {"silu": "silu"}, "silu")
    sizes = _sizes(f)
    return DecoderConfig(
        **sizes,
        tied=f.flag("tie_word_embeddings"),
        norm_eps=f.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        rope=f.rope(sizes["head_dim"]),
    ), llama_names


_LLAMA_PARTS: Final = {
    "attention_norm": "input_layernorm",
    "feed_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def llama_names(name: str) -> Stored:
    """The naming of Llama's files, which Mistral and Qwen share."""
    whole = {"embed": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    if name in whole:
        return Stored(whole[name])
    layer, part, kind = name.split(".")
    return Stored(f"model.layers.{layer}.{_LLAMA_PARTS[part]}.{kind}")


ARCHITECTURES: Final[Mapping[str, Callable[[Fields], tuple[DecoderConfig, Names]]]] = {"llama": _llama}
