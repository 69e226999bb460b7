"""config.json, dialect by dialect: what to compute, and under which names the weights are stored.

`parse` is the only way in. What an architecture asks for that is not built is refused by name; nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
Parsed = tuple[DecoderConfig, Names]


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

    def sizes(self) -> dict[str, Any]:
        heads = self.integer("num_attention_heads", 1024)
        hidden = self.integer("hidden_size", 1 << 17)
        sizes = {
            "vocab_size": self.integer("vocab_size", 1 << 22),
            "hidden_size": hidden,
            "intermediate_size": self.integer("intermediate_size", 1 << 20),
            "layers": self.integer("num_hidden_layers", 1024),
            "heads": heads,
            "kv_heads": self.integer("num_key_value_heads", heads, heads),
            "head_dim": self.integer("head_dim", 1024, max(hidden // heads, 1)),
            "context_length": self.integer("max_position_embeddings", 1 << 24),
        }
        if heads % sizes["kv_heads"] or sizes["head_dim"] % 2:
            raise UnsupportedModel("config.json: heads must be a multiple of kv heads, and head_dim even")
        return sizes

    def part(self, name: str) -> Fields:
        """A mapping inside this one; empty when it is not there."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise UnsupportedModel(f"config.json: {name} is {value!r}, expected a mapping")
        return Fields(value or {})

    def rope(self, head_dim: int, default_theta: float = 10000.0, given: Fields | None = None) -> Rope:
        """Rotary positions, in the old form (rope_theta, rope_scaling) or the new one (rope_parameters)."""
        how = given or (self.part("rope_parameters") if self.raw.get("rope_parameters") else self.part("rope_scaling"))
        kind = how.raw.get("rope_type", how.raw.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise UnsupportedModel(f"config.json: rope type {kind!r} is not supported")
        theta = how.number("rope_theta", 1.0, 1e12, self.number("rope_theta", 1.0, 1e12, default_theta))
        share = how.number("partial_rotary_factor", 0.0, 1.0, self.number("partial_rotary_factor", 0.0, 1.0, 1.0))
        dim = int(head_dim * share)
        if dim < 2 or dim % 2:
            raise UnsupportedModel(f"config.json: {dim} of {head_dim} numbers of a head cannot be turned")
        if kind == "default":
            return Rope(theta, dim)
        factor = how.number("factor", 1e-3, 1e6)
        if kind == "linear":
            return Rope(theta, dim, "linear", factor)
        low, high = how.number("low_freq_factor", 1e-3, 1e3), how.number("high_freq_factor", 1e-3, 1e3)
        if low >= high:
            raise UnsupportedModel("config.json: low_freq_factor must be below high_freq_factor")
        return Rope(theta, dim, "llama3", factor, low, high, how.integer("original_max_position_embeddings", 1 << 24))

    def windows(self, default: Callable[[int], bool], window_default: int | None = None) -> tuple[int | None, ...]:
        """The window of each layer; `default` says which layers have one when `layer_types` does not. () when none has."""
        layers = self.integer("num_hidden_layers", 1024)
        if self.raw.get("sliding_window", window_default) is None:
            return ()
        window = self.integer("sliding_window", 1 << 24, window_default)
        types = self.raw.get("layer_types")
        if types is None:
            sliding = [default(n) for n in range(layers)]
        elif (
            isinstance(types, list)
            and len(types) == layers
            and all(t in ("sliding_attention", "full_attention") for t in types)
        ):
            sliding = [t == "sliding_attention" for t in types]
        else:
            raise UnsupportedModel(
                "config.json: layer_types must say sliding_attention or full_attention for each layer"
            )
        return tuple(window if slides else None for slides in sliding) if any(sliding) else ()


def parse(raw: Mapping[str, Any]) -> Parsed:
    """From config.json. Raises `UnsupportedModel` when a value is out of range or asks for what is not built."""
    kind = raw.get("model_type")
    if type(kind) is not str or kind not in ARCHITECTURES:
        raise UnsupportedModel(f"model_type {kind!r:.64} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind](Fields(raw))


def _llama(f: Fields) -> Parsed:
    f.refuse("attention_bias", "mlp_bias")
    f.one_of("hidden_act", {"silu": "silu"}, "silu")
    sizes = f.sizes()
    return DecoderConfig(
        **sizes,
        tied=f.flag("tie_word_embeddings"),
        norm_eps=f.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        rope=f.rope(sizes["head_dim"]),
    ), llama_names


def _mistral(f: Fields) -> Parsed:
    config, names = _llama(f)
    return replace(config, windows=f.windows(lambda _: True)), names


def _qwen2(f: Fields) -> Parsed:
    config, names = _llama(f)
    first = f.integer("max_window_layers", 1024, 28, low=0)
    windows = f.windows(lambda n: n >= first) if f.flag("use_sliding_window") else ()
    return replace(config, qkv_bias=True, windows=windows), names


def _qwen3(f: Fields) -> Parsed:
    config, names = _qwen2(f)
    return replace(config, qkv_bias=False, qk_norm=True), names


_GELU: Final = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}
"""Gemma's first files say gelu and mean its approximation by tanh."""


def _gemma(f: Fields) -> Parsed:
    f.refuse("attention_bias", "use_bidirectional_attention")
    activation = "hidden_activation" if f.raw.get("hidden_activation") else "hidden_act"
    sizes = f.sizes()
    return DecoderConfig(
        **sizes,
        tied=f.flag("tie_word_embeddings", True),
        norm_eps=f.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        norm_offset=1.0,
        activation=f.one_of(activation, _GELU, "gelu_pytorch_tanh"),
        rope=f.rope(sizes["head_dim"]),
        embedding_scale=sizes["hidden_size"] ** 0.5,
    ), llama_names


def _softcap(f: Fields, name: str, default: float | None) -> float:
    return 0.0 if f.raw.get(name, default) is None else f.number(name, 0.0, 1e6, default)


def _gemma2(f: Fields) -> Parsed:
    config, _ = _gemma(f)
    return replace(
        config,
        block="sandwich",
        windows=f.windows(lambda n: n % 2 == 0, 4096),
        attention_scale=f.integer("query_pre_attn_scalar", 1 << 20, 256) ** -0.5,
        attention_softcap=_softcap(f, "attn_logit_softcapping", 50.0),
        logit_softcap=_softcap(f, "final_logit_softcapping", 30.0),
    ), _sandwich_names


def _gemma3(f: Fields) -> Parsed:
    given = f.part("rope_parameters")
    plain = Fields({**f.raw, "rope_parameters": None, "rope_scaling": None})
    config, _ = _gemma(plain)
    local = Fields(
        {"rope_theta": f.number("rope_local_base_freq", 1.0, 1e12, 10000.0), **given.part("sliding_attention").raw}
    )
    whole = given.part("full_attention") if given.raw else f.part("rope_scaling")
    every = f.integer("sliding_window_pattern", 1024, 6)
    return replace(
        config,
        block="sandwich",
        qk_norm=True,
        rope=f.rope(config.head_dim, 1_000_000.0, whole),
        local_rope=plain.rope(config.head_dim, 10000.0, local),
        windows=f.windows(lambda n: (n + 1) % every != 0, 4096),
        attention_scale=f.integer("query_pre_attn_scalar", 1 << 20, 256) ** -0.5,
        attention_softcap=_softcap(f, "attn_logit_softcapping", None),
        logit_softcap=_softcap(f, "final_logit_softcapping", None),
    ), _sandwich_names


_NEW_GELU: Final = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _phi(f: Fields) -> Parsed:
    f.refuse("qk_layernorm")
    sizes = f.sizes()
    # Files of before partial_rotary_factor had a default mean half of a head.
    share = Fields({"partial_rotary_factor": 0.5, **f.raw})
    return DecoderConfig(
        **sizes,
        tied=f.flag("tie_word_embeddings"),
        norm="layer",
        norm_eps=f.number("layer_norm_eps", 0.0, 1.0, 1e-5),
        block="parallel",
        activation=f.one_of("hidden_act", _NEW_GELU, "gelu_new"),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        feed_bias=True,
        head_bias=True,
        rope=share.rope(sizes["head_dim"]),
    ), _phi_names


def _phi3(f: Fields) -> Parsed:
    config, _ = _llama(f)
    queries, pairs, inner = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate_size
    parts = {
        "q": ("self_attn.qkv_proj", (0, queries)),
        "k": ("self_attn.qkv_proj", (queries, queries + pairs)),
        "v": ("self_attn.qkv_proj", (queries + pairs, queries + 2 * pairs)),
        "gate": ("mlp.gate_up_proj", (0, inner)),
        "up": ("mlp.gate_up_proj", (inner, 2 * inner)),
    }

    def names(name: str) -> Stored:
        layer, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if part not in parts:
            return llama_names(name)
        stored, rows = parts[part]
        return Stored(f"model.layers.{layer}.{stored}.weight", rows=rows)

    return replace(config, windows=f.windows(lambda _: True)), names


def _gpt2(f: Fields) -> Parsed:
    f.refuse("add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    if not f.flag("scale_attn_weights", True):
        raise UnsupportedModel("config.json: scale_attn_weights false is not supported")
    width, heads = f.integer("n_embd", 1 << 17), f.integer("n_head", 1024)
    if width % heads:
        raise UnsupportedModel("config.json: n_embd must be a multiple of n_head")

    def names(name: str) -> Stored:
        whole = {"embed": "wte.weight", "positions": "wpe.weight"}
        if name in whole:
            return Stored(f"transformer.{whole[name]}")
        if name.startswith("norm."):
            return Stored(f"transformer.ln_f.{name.removeprefix('norm.')}")
        if name.startswith("head."):
            return Stored("lm_head.weight")
        layer, part, kind = name.split(".")
        stored = f"transformer.h.{layer}.{_GPT2_PARTS[part]}.{kind}"
        if part in ("q", "k", "v"):
            n = "qkv".index(part)
            return Stored(stored, transposed=True, rows=(n * width, (n + 1) * width))
        return Stored(stored, transposed=True)

    return DecoderConfig(
        vocab_size=f.integer("vocab_size", 1 << 22),
        hidden_size=width,
        intermediate_size=f.integer("n_inner", 1 << 20, 4 * width),
        layers=f.integer("n_layer", 1024),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        context_length=f.integer("n_positions", 1 << 24),
        tied=f.flag("tie_word_embeddings", True),
        norm="layer",
        norm_eps=f.number("layer_norm_epsilon", 0.0, 1.0, 1e-5),
        activation=f.one_of("activation_function", _NEW_GELU, "gelu_new"),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        feed_bias=True,
    ), names


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
_SANDWICH_PARTS: Final = _LLAMA_PARTS | {
    "attention_post_norm": "post_attention_layernorm",
    "feed_norm": "pre_feedforward_layernorm",
    "feed_post_norm": "post_feedforward_layernorm",
}
_PHI_PARTS: Final = _LLAMA_PARTS | {"o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"}
_GPT2_PARTS: Final = {
    "attention_norm": "ln_1",
    "feed_norm": "ln_2",
    "q": "attn.c_attn",
    "k": "attn.c_attn",
    "v": "attn.c_attn",
    "o": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def _named(name: str, parts: Mapping[str, str], norm: str = "model.norm") -> Stored:
    if name == "embed":
        return Stored("model.embed_tokens.weight")
    first, _, rest = name.partition(".")
    if first == "norm":
        return Stored(f"{norm}.{rest}")
    if first == "head":
        return Stored(f"lm_head.{rest}")
    part, _, kind = rest.partition(".")
    return Stored(f"model.layers.{first}.{parts[part]}.{kind}")


def llama_names(name: str) -> Stored:
    """The naming of Llama's files, which Mistral, Qwen and Gemma share."""
    return _named(name, _LLAMA_PARTS)


def _sandwich_names(name: str) -> Stored:
    return _named(name, _SANDWICH_PARTS)


def _phi_names(name: str) -> Stored:
    return _named(name, _PHI_PARTS, "model.final_layernorm")


ARCHITECTURES: Final[Mapping[str, Callable[[Fields], Parsed]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
