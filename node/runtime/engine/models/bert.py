"""The BERT encoder (Devlin et al. 2019): sentence vectors, and scores of text pairs by a classification head.

Rows of a batch are padded to its longest and masked, so a row's result depends on its company only by rounding: in float32
at most 1e-6 in any coordinate of a normalised vector, which the tests hold. Rows are sorted by length and batched under a
token budget, so padding stays small and memory has a bound that follows from the budget alone. Numerics follow transformers'
BertModel and BertForSequenceClassification; sentence vectors are mean pooled as in Sentence-BERT (Reimers, Gurevych 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine.errors import InvalidSequence, UnsupportedModel
from node.runtime.engine.rows import Row
from node.runtime.engine.tensors import integer, read_config, read_tensors, size_of

TOKEN_BUDGET: Final = 2048
"""Tokens of one batch, padding included."""
POOLINGS: Final = ("mean", "cls")


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The part of config.json that decides the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    positions: int
    types: int
    layer_norm_eps: float
    labels: int
    """Outputs of the classification head; 0 when the model has none."""
    pooling: str
    """How a sentence's vector is made: ``mean`` over its tokens, or ``cls``, the first token's."""
    context_length: int
    """Tokens of one row, special ones included."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> BertConfig:
        """From config.json; ``pooling`` and ``max_seq_length`` are Sentence-BERT's, which keeps them in files beside it.

        Raises `UnsupportedModel` when a value is out of range or asks for what is not built.
        """
        unsupported = {
            "hidden_act": raw.get("hidden_act", "gelu") != "gelu",
            "position_embedding_type": raw.get("position_embedding_type", "absolute") != "absolute",
            "is_decoder": bool(raw.get("is_decoder", False)),
            "pooling": raw.get("pooling", "mean") not in POOLINGS,
        }
        if any(unsupported.values()):
            names = ", ".join(name for name, bad in unsupported.items() if bad)
            raise UnsupportedModel(f"config.json: {names} not supported")
        eps = raw.get("layer_norm_eps", 1e-12)
        if type(eps) is not float or not 0 <= eps < 1:
            raise UnsupportedModel(f"config.json: layer_norm_eps is {eps!r}")
        classifies = "BertForSequenceClassification" in (raw.get("architectures") or ())
        labels = raw.get("id2label")
        if classifies and labels is not None and not (isinstance(labels, dict) and 1 <= len(labels) <= 1024):
            raise UnsupportedModel("config.json: id2label is not 1 to 1024 labels")
        positions = integer(raw, "max_position_embeddings", 1 << 16)
        config = cls(
            vocab_size=integer(raw, "vocab_size", 1 << 22),
            hidden_size=integer(raw, "hidden_size", 1 << 14),
            intermediate_size=integer(raw, "intermediate_size", 1 << 16),
            layers=integer(raw, "num_hidden_layers", 256),
            heads=integer(raw, "num_attention_heads", 256),
            positions=positions,
            types=integer(raw, "type_vocab_size", 256, 2),
            layer_norm_eps=eps,
            labels=(len(labels) if labels else 2) if classifies else 0,
            pooling=str(raw.get("pooling", "mean")),
            context_length=integer(raw, "max_seq_length", positions, positions, low=2),
        )
        if config.hidden_size % config.heads:
            raise UnsupportedModel("config.json: hidden_size must be a multiple of the heads")
        return config

    @property
    def prefix(self) -> str:
        return "bert." if self.labels else ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the weight file must hold."""
        width, inner, prefix = self.hidden_size, self.intermediate_size, self.prefix
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}embeddings.word_embeddings.weight": (self.vocab_size, width),
            f"{prefix}embeddings.position_embeddings.weight": (self.positions, width),
            f"{prefix}embeddings.token_type_embeddings.weight": (self.types, width),
            **_pair(f"{prefix}embeddings.LayerNorm", width),
        }
        for n in range(self.layers):
            layer = f"{prefix}encoder.layer.{n}."
            for name in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ):
                shapes |= _pair(layer + name, width, width)
            shapes |= _pair(layer + "attention.output.LayerNorm", width)
            shapes |= _pair(layer + "intermediate.dense", inner, width)
            shapes |= _pair(layer + "output.dense", width, inner)
            shapes |= _pair(layer + "output.LayerNorm", width)
        if self.labels:
            shapes |= _pair(f"{prefix}pooler.dense", width, width)
            shapes |= _pair("classifier", self.labels, width)
        return shapes

    def working_bytes(self, budget: int = TOKEN_BUDGET, item: int = 4) -> int:
        """An upper bound for what one batch needs beside the weights. The attention's scores are never all in memory."""
        return budget * item * (9 * self.hidden_size + 2 * self.intermediate_size)


class Bert:
    """A BERT model with its weights. Stateless: safe to call from one thread at a time."""

    def __init__(self, config: BertConfig, weights: Mapping[str, Tensor]) -> None:
        """`weights`: one tensor for each entry of `config.shapes()`, all of one dtype on one device."""
        self.config = config
        prefix = config.prefix
        self.words = weights[f"{prefix}embeddings.word_embeddings.weight"]
        self.positions = weights[f"{prefix}embeddings.position_embeddings.weight"]
        self.types = weights[f"{prefix}embeddings.token_type_embeddings.weight"]
        self.norm = _both(weights, f"{prefix}embeddings.LayerNorm")
        self.layers = [_Layer(config, f"{prefix}encoder.layer.{n}.", weights) for n in range(config.layers)]
        self._head = None
        if config.labels:
            self._head = (_both(weights, f"{prefix}pooler.dense"), _both(weights, "classifier"))
        self.weight_bytes: int = size_of(
            [
                self.words,
                self.positions,
                self.types,
                *self.norm,
                *(one for layer in self.layers for one in layer.tensors),
            ]
            + [one for pair in self._head or () for one in pair]
        )

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Bert:
        """From a model folder. Raises `UnsupportedModel`."""
        config = BertConfig.parse(read_config(folder, "bert"))
        return cls(config, read_tensors(folder / "model.safetensors", config.shapes(), dtype, device))

    def embed(self, rows: Sequence[Row], budget: int = TOKEN_BUDGET) -> Iterator[tuple[list[int], Tensor]]:
        """Vectors of length 1, a batch at a time: the rows' indices, and float32 [rows, hidden] in the same order.

        Raises `InvalidSequence` for a row that is empty, too long or holds an unknown token.
        """
        for indices, hidden, mask in self._batches(rows, budget):
            if self.config.pooling == "cls":
                pooled = hidden[:, 0].float()
            else:
                weight = mask[:, :, None].float()
                pooled = (hidden.float() * weight).sum(1) / weight.sum(1)
            yield indices, F.normalize(pooled, dim=1).cpu()

    def classify(self, rows: Sequence[Row], budget: int = TOKEN_BUDGET) -> Iterator[tuple[list[int], Tensor]]:
        """Logits of the head, as `embed` gives vectors: float32 [rows, labels]. Raises `UnsupportedModel` without a head."""
        if self._head is None:
            raise UnsupportedModel("this model has no classification head")
        pooler, classifier = self._head
        for indices, hidden, _ in self._batches(rows, budget):
            yield indices, F.linear(torch.tanh(F.linear(hidden[:, 0], *pooler)), *classifier).float().cpu()

    def check(self, row: Row) -> None:
        """Raises `InvalidSequence`."""
        length = len(row.token_ids)
        if not 1 <= length <= self.config.context_length:
            raise InvalidSequence(f"a row of {length} tokens; the model takes 1 to {self.config.context_length}")
        if not 0 <= min(row.token_ids) <= max(row.token_ids) < self.config.vocab_size:
            raise InvalidSequence("a row holds a token outside the vocabulary")
        if row.type_ids and (len(row.type_ids) != length or not set(row.type_ids) <= set(range(self.config.types))):
            raise InvalidSequence("a row's type ids do not fit its tokens")

    @torch.inference_mode()
    def _encode(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        longest = max(len(row.token_ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for n, row in enumerate(rows):
            length = len(row.token_ids)
            ids[n, :length] = torch.tensor(row.token_ids)
            mask[n, :length] = True
            if row.type_ids:
                types[n, :length] = torch.tensor(row.type_ids)
        device = self.words.device
        ids, types, mask = ids.to(device), types.to(device), mask.to(device)
        hidden = F.embedding(ids, self.words) + F.embedding(types, self.types) + self.positions[:longest]
        hidden = F.layer_norm(hidden, (self.config.hidden_size,), *self.norm, self.config.layer_norm_eps)
        visible = None if bool(mask.all()) else mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer.forward(hidden, visible)
        return hidden, mask

    def _batches(self, rows: Sequence[Row], budget: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        for row in rows:
            self.check(row)
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n].token_ids))
        while order:
            count = max(1, budget // len(rows[order[0]].token_ids))
            indices, order = order[:count], order[count:]
            yield indices, *self._encode([rows[n] for n in indices])


class _Layer:
    def __init__(self, config: BertConfig, prefix: str, weights: Mapping[str, Tensor]) -> None:
        self.heads, self.eps, self.width = config.heads, config.layer_norm_eps, (config.hidden_size,)
        parts = [_both(weights, f"{prefix}attention.self.{name}") for name in ("query", "key", "value")]
        self.qkv = torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])
        self.output = _both(weights, f"{prefix}attention.output.dense")
        self.attention_norm = _both(weights, f"{prefix}attention.output.LayerNorm")
        self.up, self.down = _both(weights, f"{prefix}intermediate.dense"), _both(weights, f"{prefix}output.dense")
        self.feed_norm = _both(weights, f"{prefix}output.LayerNorm")

    @property
    def tensors(self) -> list[Tensor]:
        pairs = (self.qkv, self.output, self.attention_norm, self.up, self.down, self.feed_norm)
        return [one for pair in pairs for one in pair]

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = F.linear(x, *self.qkv).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        out = F.linear(out.transpose(1, 2).reshape(rows, length, -1), *self.output)
        x = F.layer_norm(x + out, self.width, *self.attention_norm, self.eps)
        return F.layer_norm(
            x + F.linear(F.gelu(F.linear(x, *self.up)), *self.down), self.width, *self.feed_norm, self.eps
        )


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _both(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]
