"""One decoder for the architectures that differ by switches: Llama, Mistral, Qwen, Gemma, Phi, GPT-2.

A `DecoderConfig` is what config.json comes to (`configs.py` reads each architecture's dialect); `shapes` names every tensor
in one canonical naming, onto which each architecture maps its own. Nothing here knows an architecture's name.

Numerics follow transformers' own model classes, so that greedy output in float32 is equal token for token.

Sources: Vaswani et al. 2017; Su et al. 2021 (rotary positions); Zhang and Sennrich 2019 (RMSNorm); Ainslie et al. 2023
(grouped queries); Shazeer 2020 (gated activations).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.kernels import kernels_for
from node.runtime.engine.kernels.arena import Arena
from node.runtime.engine.linear import Linear, compute_dtype, hold, make_linear
from node.runtime.engine.paged import Attention, PagedCache, Plan

if TYPE_CHECKING:
    from node.runtime.engine.kernels.calls import Kernels

ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: the first `dim` numbers of a head are turned, in halves that form the pairs."""

    theta: float
    dim: int
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def frequencies(self) -> Tensor:
        """Float32 [dim / 2]: radians per position."""
        steps = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        plain = 1.0 / self.theta**steps
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "llama3":  # long waves are stretched, short ones kept, those between blended
            wavelength = 2 * math.pi / plain
            low, high = self.original_context / self.low_freq_factor, self.original_context / self.high_freq_factor
            blend = (self.original_context / wavelength - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            blended = (1 - blend) * plain / self.factor + blend * plain
            return torch.where(wavelength > low, plain / self.factor, torch.where(wavelength < high, plain, blended))
        return plain


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that decides the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    tied: bool
    """The output projection is the token embedding."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """Added to RMSNorm's weights (Gemma stores w - 1)."""
    block: Literal["pre", "parallel", "sandwich"] = "pre"
    """pre: norm, attend, add, norm, feed, add. parallel: both from one norm (Phi). sandwich: a norm after each, too (Gemma 2)."""
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    feed_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys before they are turned (Qwen 3, Gemma 3)."""
    rope: Rope | None = None
    """None: learned positions (GPT-2)."""
    local_rope: Rope | None = None
    """For the layers that have a window, where it differs (Gemma 3)."""
    windows: tuple[int | None, ...] = ()
    """One for each layer; () is none."""
    attention_scale: float = 0.0
    """Of the scores; 0 is 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor, by its canonical name."""
        width, inner = self.hidden_size, self.intermediate_size
        queries, pairs = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer_norm = self.norm == "layer"
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, width)}

        def norm(name: str, size: int = width, bias: bool = layer_norm) -> None:
            shapes[f"{name}.weight"] = (size,)
            if bias:
                shapes[f"{name}.bias"] = (size,)

        def linear(name: str, out: int, inputs: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (out, inputs)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        norm("norm")
        if not self.tied:
            linear("head", self.vocab_size, width, self.head_bias)
        if self.rope is None:
            shapes["positions"] = (self.context_length, width)
        for n in range(self.layers):
            norm(f"{n}.attention_norm")
            linear(f"{n}.q", queries, width, self.qkv_bias)
            linear(f"{n}.k", pairs, width, self.qkv_bias)
            linear(f"{n}.v", pairs, width, self.qkv_bias)
            linear(f"{n}.o", width, queries, self.output_bias)
            if self.qk_norm:
                norm(f"{n}.q_norm", self.head_dim, False)
                norm(f"{n}.k_norm", self.head_dim, False)
            if self.block == "sandwich":
                norm(f"{n}.attention_post_norm")
                norm(f"{n}.feed_post_norm")
            if self.block != "parallel":
                norm(f"{n}.feed_norm")
            if self.gated:
                linear(f"{n}.gate", inner, width, self.feed_bias)
            linear(f"{n}.up", inner, width, self.feed_bias)
            linear(f"{n}.down", width, inner, self.feed_bias)
        return shapes


class _Turns:
    """Cosines and sines of every position, as far as positions were needed, in steps of `STEP`.

    Each step is computed in one shape: vectorised functions may round differently at the end of a tensor, and a position's
    values must not depend on how many others were asked for.
    """

    STEP = 1024

    def __init__(self, rope: Rope, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = rope.frequencies().to(device)
        self._dtype = dtype
        self._cos = torch.empty(0, 2 * len(self._frequencies), dtype=dtype, device=device)
        self._sin = self._cos

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self._cos, self._sin

    def of(self, positions: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the first half's sign turned: each [tokens, 1, dim]. No position is above `last`."""
        while len(self._cos) <= last:
            at = torch.arange(len(self._cos), len(self._cos) + self.STEP, device=positions.device)
            angles = at[:, None].float() * self._frequencies
            cos, sin = angles.cos().to(self._dtype), angles.sin().to(self._dtype)
            self._cos = torch.cat((self._cos, torch.cat((cos, cos), dim=1)))
            self._sin = torch.cat((self._sin, torch.cat((-sin, sin), dim=1)))
        return self._cos[positions][:, None], self._sin[positions][:, None]


class Decoder:
    """A model with its weights. Stateless between calls: what it remembers is in the cache it is given."""

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, Tensor], fmt: str, device: torch.device, *, tile: int = 0
    ) -> None:
        """`weights`: one tensor for each entry of `config.shapes()`. `fmt`: of the linear layers, one of `linear.FORMATS`.
        `tile`: linear layers always see exactly so many rows at a time; 0: as many as there are."""
        self.config = config
        self.dtype = compute_dtype(fmt, device)
        self.kernels = kernels_for(device, self.dtype, config.head_dim, config.heads // config.kv_heads)
        """Compiled operations for a CPU."""
        self.embedding = weights["embed"].to(self.dtype)
        self.positions = None if config.rope else weights["positions"].to(self.dtype)
        self.norm = _Norm(config, "norm", weights, self.dtype, self.kernels)
        head = weights["embed" if config.tied else "head.weight"]
        arena = Arena()
        made = make_linear(head, fmt, weights.get("head.bias"), head=True, few_rows=tile == 0)
        hold(made, arena)
        self.head = _tiled(made, tile)
        self._tanh = _alike(torch.tanh, tile, device)
        self.layers = [
            _Layer(config, n, weights, fmt, self.dtype, tile, self.kernels, arena, device) for n in range(config.layers)
        ]
        ropes = {rope for rope in (config.rope, config.local_rope) if rope is not None}
        self._turns = {rope: _Turns(rope, self.dtype, device) for rope in ropes}

    @property
    def nbytes(self) -> int:
        """Bytes of the linear layers and the embedding as they are held."""
        return self.embedding.nbytes + self.head.nbytes + sum(layer.nbytes for layer in self.layers)

    def forward(self, token_ids: Tensor, plan: Plan, cache: PagedCache, rows: Tensor | None = None) -> Tensor:
        """Run int64 [tokens] of one pass; returns hidden states [rows, hidden] and fills the cache.

        `rows`: which tokens' states are wanted; None: all. The last layer then computes no others, a thirtieth of a prompt.
        """
        hidden = F.embedding(token_ids, self.embedding)
        if self.config.embedding_scale != 1.0:
            hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=self.dtype)
        if self.positions is not None:
            hidden = hidden + F.embedding(plan.positions, self.positions)
        turns = {rope: turn.of(plan.positions, plan.last) for rope, turn in self._turns.items()}
        for layer in self.layers[:-1]:
            hidden = layer.forward(hidden, turns, plan, cache)
        return self.layers[-1].forward(hidden, turns, plan, cache, rows)

    def tables(self) -> list[Tensor]:
        """The tensors of positions, as far as they have grown."""
        return [table for turn in self._turns.values() for table in turn.tables]

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [rows, vocab] of hidden states as `forward` returns them."""
        logits = self.head(self.norm(hidden)).float()
        if self.config.logit_softcap:
            cap = self.config.logit_softcap
            logits = self._tanh(logits / cap) * cap
        return logits


class _Norm:
    def __init__(
        self,
        config: DecoderConfig,
        name: str,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        kernels: Kernels | None,
        rms: bool = False,
    ) -> None:
        self._rms = rms or config.norm == "rms"
        self._kernels = kernels if self._rms else None
        self._eps = config.norm_eps
        weight = weights[f"{name}.weight"]
        self._offset = self._rms and config.norm_offset != 0
        # Gemma multiplies by 1 + w in float32 and rounds once; the others round before they multiply.
        self._weight = weight.float() + config.norm_offset if self._offset else weight.to(dtype)
        self._wide = self._weight.float()
        self._bias = weights[f"{name}.bias"].to(dtype) if f"{name}.bias" in weights else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernels is not None:
            return self._kernels.norm(x, self._wide, self._eps)
        size = (x.shape[-1],)
        if self._offset:
            return F.rms_norm(x.float(), size, self._weight, self._eps).to(x.dtype)
        if self._rms:
            return F.rms_norm(x, size, self._weight, self._eps)
        return F.layer_norm(x, size, self._weight, self._bias, self._eps)


class _Layer:
    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        weights: Mapping[str, Tensor],
        fmt: str,
        dtype: torch.dtype,
        tile: int,
        kernels: Kernels | None,
        arena: Arena,
        device: torch.device,
    ) -> None:
        self.index = index
        self.config = config

        def linear(*names: str) -> Linear | _Tiled:
            """Several that read the same input are one product."""
            keys = [f"{index}.{name}" for name in names]
            biases = [weights[f"{key}.bias"] for key in keys if f"{key}.bias" in weights]
            weight = (
                torch.cat([weights[f"{key}.weight"] for key in keys]) if len(keys) > 1 else weights[f"{keys[0]}.weight"]
            )
            made = make_linear(weight, fmt, torch.cat(biases) if biases else None, few_rows=tile == 0)
            hold(made, arena)
            return _tiled(made, tile)

        def norm(name: str, rms: bool = False) -> _Norm:
            return _Norm(config, f"{index}.{name}", weights, dtype, kernels, rms)

        self.qkv, self.output = linear("q", "k", "v"), linear("o")
        self.up, self.down = linear("gate", "up") if config.gated else linear("up"), linear("down")
        self.attention_norm = norm("attention_norm")
        self.feed_norm = None if config.block == "parallel" else norm("feed_norm")
        self.attention_post = norm("attention_post_norm") if config.block == "sandwich" else None
        self.feed_post = norm("feed_post_norm") if config.block == "sandwich" else None
        self.q_norm, self.k_norm = (norm("q_norm", True), norm("k_norm", True)) if config.qk_norm else (None, None)
        self.activation = _alike(ACTIVATIONS[config.activation], tile, device)
        self._kernels = kernels
        self._gate = kernels.gate(config.activation) if kernels is not None and config.gated else None
        window = config.windows[index] if config.windows else None
        self.rope = config.local_rope if window is not None and config.local_rope else config.rope
        self.how = Attention(
            scale=config.attention_scale or config.head_dim**-0.5, window=window, softcap=config.attention_softcap
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.qkv, self.output, self.up, self.down))

    def forward(
        self,
        hidden: Tensor,
        turns: Mapping[Rope, tuple[Tensor, Tensor]],
        plan: Plan,
        cache: PagedCache,
        rows: Tensor | None = None,
    ) -> Tensor:
        x = self.attention_norm(hidden)
        attended = self._attend(x, turns, plan, cache)
        if rows is not None:
            hidden, attended = hidden[rows], attended[rows]
            if not len(rows):  # a prompt in its middle: keys and values were all that was wanted
                return hidden
        attended = self.output(attended)
        if self.feed_norm is None:
            return hidden + attended + self._feed(x if rows is None else x[rows])
        if self.attention_post is not None:
            attended = self.attention_post(attended)
        hidden = hidden + attended
        fed = self._feed(self.feed_norm(hidden))
        return hidden + (fed if self.feed_post is None else self.feed_post(fed))

    def _feed(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self._gate is not None:
            return self.down(self._gate(up))
        if self.config.gated:
            gate, up = up.chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)
        return self.down(self.activation(up))

    def _attend(self, x: Tensor, turns: Mapping[Rope, tuple[Tensor, Tensor]], plan: Plan, cache: PagedCache) -> Tensor:
        config, turned = self.config, self.config.heads + self.config.kv_heads
        heads = self.qkv(x).view(x.shape[0], -1, config.head_dim)  # queries, keys, values
        if self.q_norm is not None and self.k_norm is not None:
            heads[:, : config.heads] = self.q_norm(heads[:, : config.heads])
            heads[:, config.heads : turned] = self.k_norm(heads[:, config.heads : turned])
        if self.rope is not None:
            turn = _turn if self._kernels is None else self._kernels.turn
            turn(heads[:, :turned, : self.rope.dim], *turns[self.rope])
        return cache.attend(plan, self.index, self.how, heads[:, : config.heads], heads[:, config.heads :])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn heads [tokens, heads, dim] in place; cos and sin are [tokens, 1, dim], the sines of the first half negative."""
    torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin, out=x)


class _Tiled:
    """A linear layer that always computes exactly `tile` rows, so that a row's result cannot depend on how many there are."""

    def __init__(self, inner: Linear, tile: int) -> None:
        self._inner, self._tile = inner, tile
        self.nbytes = inner.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        tile, rows = self._tile, x.shape[0]
        missing = -rows % tile
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        if x.shape[0] == tile:
            return self._inner(x)[:rows]
        return torch.cat([self._inner(x[n : n + tile]) for n in range(0, x.shape[0], tile)])[:rows]


def _alike(function: Callable[[Tensor], Tensor], tile: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """In exact mode, a function of each number that treats all rows alike.

    On CPUs, vectors of numbers are rounded otherwise than the few that are left over: where a tensor ends, and where torch cuts
    it between threads, which may be in the middle of a row. So each row is computed for itself.
    """
    if not tile or device.type != "cpu":
        return function
    return lambda x: torch.stack([function(row) for row in x])


def _tiled(inner: Linear, tile: int) -> Linear | _Tiled:
    return _Tiled(inner, tile) if tile else inner
