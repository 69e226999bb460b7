"""Models for the engine's tests: tiny ones with random weights, and the real one where its package is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny Llama with seeded random weights; keyword arguments change its config."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from node.runtime.engine.models.configs import parse

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        config = {**TINY, **changes}
        generator = torch.Generator().manual_seed(11)
        weights = {}
        decoder, names = parse(config)
        for name, shape in decoder.shapes().items():
            noise = torch.randn(shape, generator=generator)
            weights[names(name).name] = 1 + 0.1 * noise if len(shape) == 1 else 0.2 * noise
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., Path]) -> Path:
    return make_model()


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of SmolLM2-135M-Instruct, converted for this run; GRISTMILL_TEST_MODELS names a store that has it already."""
    for package in ("torch", "gguf", "tokenizers"):
        pytest.importorskip(package)
    from node.models.packages import KNOWN, add_known, installed
    from node.models.store import ModelStore

    name = "smollm2-135m-instruct"
    kept = os.environ.get("GRISTMILL_TEST_MODELS")
    if not kept and installed(KNOWN[name].packages[0]) is None:
        pytest.skip(f"the model package {KNOWN[name].requirement} is not installed")
    store = ModelStore(Path(kept) if kept else tmp_path_factory.mktemp("store"))
    manifest = add_known(store, name, progress=False)
    yield store.path(manifest.id)
    if not kept:
        store.remove(manifest.id)


@pytest.fixture(scope="session")
def make_chat_model(make_model: Callable[..., Path]) -> Callable[..., Path]:
    """A tiny Llama that can be talked to: one token per byte, and a template. The store takes such a folder."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def make(**changes: Any) -> Path:
        folder = make_model(vocab_size=258, eos_token_id=257, bos_token_id=256, **changes)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
        return folder

    return make


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Folder of a known model by name, converted for this run as `smollm` is; skips where its packages are not installed."""
    for package in ("torch", "safetensors", "tokenizers"):
        pytest.importorskip(package)
    from node.models.packages import KNOWN, add_known, installed
    from node.models.store import ModelStore

    kept = os.environ.get("GRISTMILL_TEST_MODELS")
    store = ModelStore(Path(kept) if kept else tmp_path_factory.mktemp("store"))
    added = set()

    def get(name: str) -> Path:
        for package in KNOWN[name].packages:
            if not kept and installed(package) is None:
                pytest.skip(f"the model package {package.requirement} is not installed")
        manifest = add_known(store, name, progress=False)
        added.add(manifest.id)
        return store.path(manifest.id)

    yield get
    if not kept:
        for model in added:
            store.remove(model)


@pytest.fixture(scope="session")
def speech() -> bytes:
    """6.1 s of synthetic speech, PCM s16le mono 16 kHz: "The quick brown fox jumps over the lazy dog." (a pause of 1.3 s)
    "Hello, my name is John." """
    import wave

    with wave.open(str(Path(__file__).parents[1] / "vectors" / "speech.wav")) as file:
        return file.readframes(file.getnframes())
