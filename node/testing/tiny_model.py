"""A language model of a few hundred kilobytes: random weights behind a real tokenizer and chat template. Product code: for tests.

It speaks nonsense, and its name says so; but it is stored, loaded, served and continued like any other. Needs torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import node.runtime  # before torch  # noqa: F401
from node.models.manifest import Manifest
from node.models.store import ModelStore

NAME: Final = "tiny-nonsense"
SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: Final = (
    "A worker lends what it has, and a client pays for what it gets. The words of a stream come one by one, and each is counted. "
    "What is signed is what was delivered; what was delivered is what is paid. It isn't more, and it's never less: we'll see "
    "that they've the same digest, the same count, the same cost. Naïve “quotes”, 東京 and Zürich, 1234567890, x[0] += 3.14; "
) * 3
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer with a template, trained on `TEXT`; returns its number of tokens. The same in every run."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    return made.get_vocab_size()


def add_tiny_encoder(store: ModelStore, folder: Path, name: str = "tiny-vectors", **changes: Any) -> Manifest:
    """A sentence encoder of the same kind: it makes vectors that mean nothing. `changes` are to its config."""
    import torch
    from safetensors.torch import save_file

    from node.runtime.engine.models.bert import BertConfig

    config = {
        "model_type": "bert",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "vocab_size": write_tokenizer(folder),
        **changes,
    }
    draw = torch.Generator().manual_seed(9)
    shapes = BertConfig.parse(config).shapes()
    save_file(
        {n: 0.2 * torch.randn(shape, generator=draw) for n, shape in shapes.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return store.add_folder(folder, name, license_id="Apache-2.0", source="made by a test, random weights")


def add_tiny(store: ModelStore, folder: Path, name: str = NAME, **changes: Any) -> Manifest:
    """Write it into an empty folder and add it to a store. `changes` are to its config."""
    import torch
    from safetensors.torch import save_file

    config = {**CONFIG, "vocab_size": write_tokenizer(folder), **changes}
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (query, hidden),
            f"{at}self_attn.k_proj.weight": (key, hidden),
            f"{at}self_attn.v_proj.weight": (key, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, query),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    draw = torch.Generator().manual_seed(7)
    weights = {
        name: (1 + 0.1 * torch.randn(shape, generator=draw))
        if len(shape) == 1
        else 0.3 * torch.randn(shape, generator=draw)
        for name, shape in sorted(shapes.items())
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return store.add_folder(folder, name, license_id="Apache-2.0", source="made by a test, random weights")
