"""Every architecture by its config: tiny random weights, written by transformers, compared with transformers.

The logits of a prompt agree to float32 noise, and greedy decoding chooses the same tokens; both in a batch with others,
with chunks and with resumption, so that no switch is right only for whole prompts; and with compiled kernels and without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from node.models.manifest import FileEntry, Manifest  # noqa: E402
from node.runtime.engine import linear, quantize  # noqa: E402
from node.runtime.engine.engine import Engine  # noqa: E402
from node.runtime.engine.errors import UnsupportedModel  # noqa: E402
from node.runtime.engine.kernels import importable  # noqa: E402
from node.runtime.engine.linear import FORMATS  # noqa: E402
from node.runtime.engine.models import decoder  # noqa: E402
from node.runtime.engine.models.configs import ARCHITECTURES, parse  # noqa: E402
from node.runtime.engine.sequence import Sequence  # noqa: E402
from node.runtime.footprint import measure  # noqa: E402
from node.runtime.packing import Packing  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

SIZES = {
    "vocab_size": 101,
    "hidden_size": 96,  # heads of 16, as compiled kernels want them
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT2 = {
    "vocab_size": 101,
    "n_embd": 96,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama-3": ("Llama", {**SIZES, "rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {**SIZES, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": None}),
    "mistral-window": ("Mistral", {**SIZES, "sliding_window": 20}),
    "qwen2": ("Qwen2", SIZES),
    "qwen2-window": ("Qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {**SIZES, "head_dim": 16}),
    "gemma2": ("Gemma2", {**SIZES, "head_dim": 16, "sliding_window": 18, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "Gemma3",
        {**SIZES, "head_dim": 16, "sliding_window": 18, "num_hidden_layers": 7, "query_pre_attn_scalar": 24},
    ),
    "phi": (
        "Phi",
        {**SIZES, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3": ("Phi3", SIZES),
    "phi3-window": ("Phi3", {**SIZES, "sliding_window": 20}),
    "gpt2": ("GPT2", GPT2),
}
PROMPT = tuple(3 + (5 * n * n + n) % 90 for n in range(45))


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    family, settings = CASES[request.param]
    torch.manual_seed(5)
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**settings)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    config._attn_implementation = "eager"  # Gemma 2's softcap exists only there
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape)
            norm = (weight.dim() == 1 and "norm" in name) or ("ln_" in name and name.endswith("weight"))
            weight.copy_(1 + 0.1 * noise if norm else 0.3 * noise if weight.dim() == 1 else 0.15 * noise)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


def test_logits_are_those_of_transformers(case: tuple[Path, Any]) -> None:
    folder, model = case
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0]
    for chunk in (256, 16, 7):
        found = Engine(folder, prefill_chunk=chunk).prefill_logits(PROMPT)
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("compiled", [True, False])
def test_greedy_in_company_is_transformers_token_for_token(
    case: tuple[Path, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = case
    if not compiled:
        monkeypatch.setattr(decoder, "kernels_for", lambda *_: None)
    engine = Engine(folder, prefill_chunk=16)
    assert (engine._model.kernels is not None) == (compiled and importable())
    prompts = {"a": PROMPT, "b": PROMPT[:9], "c": PROMPT[3:31], "d": PROMPT[:30]}
    for name, prompt in prompts.items():
        engine.submit(Sequence(name, prompt, SamplingParams(temperature=0), 40, eos_ids=frozenset()))
    made: dict[Any, list[int]] = {name: [] for name in prompts}
    while not engine.idle:
        for output in engine.step():
            made[output.id].append(output.token_id)
    engine.check_integrity()
    with torch.no_grad():
        for name, prompt in prompts.items():
            # Ours is greedy exactly when, given ours so far, each next token is the largest logit.
            logits = model(torch.tensor([[*prompt, *made[name][:-1]]])).logits[0, len(prompt) - 1 :]
            assert made[name] == logits.argmax(-1).tolist(), name


@pytest.mark.parametrize("fmt", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [True, False])
def test_exact_mode_is_one_set_of_bits_however_a_prompt_is_cut(
    case: tuple[Path, Any], fmt: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to single tokens, as answers are computed; in company, the probe looks."""
    if compiled and not importable():
        pytest.skip("numba is not installed")
    if not compiled:
        monkeypatch.setattr(decoder, "kernels_for", lambda *_: None)
        for module in (linear, quantize):
            monkeypatch.setattr(module, "importable", lambda: False)
    made = []
    for chunk in (256, 16, 7, 1):
        engine = Engine(case[0], dtype=fmt, exact=True, prefill_chunk=chunk, cache_bytes=1 << 24)
        engine.numerics_probe()
        made.append(engine.prefill_logits(PROMPT))
    assert all(torch.equal(one, made[0]) for one in made)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_it_will_weigh_is_known_before_it_is_loaded(case: tuple[Path, Any], fmt: str, exact: bool) -> None:
    """By names and shapes in the files' headers alone, to the byte: every layer's packed form, and every block of the cache."""
    folder, _ = case
    engine = Engine(folder, dtype=fmt, exact=exact, cache_bytes=100_000)
    expected = measure(folder, _manifest(folder), Packing(fmt, few_rows=not exact), 100_000)
    assert (expected.weights, expected.cache) == (engine.weight_bytes, engine.cache_bytes)


def _manifest(folder: Path) -> Manifest:
    entries = tuple(FileEntry(path.name, path.stat().st_size, "0" * 64) for path in sorted(folder.iterdir()))
    return Manifest("tiny", "any", 256, "F32", "unknown", "test", entries)


def test_every_architecture_is_tested() -> None:
    tested = {"gemma3_text" if family == "Gemma3" else family.lower() for family, _ in CASES.values()}
    assert tested == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.1}, "turned"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window"),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "mamba"}, "mamba"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {**SIZES, "model_type": "llama", "hidden_act": "gelu_new" if change.get("model_type") == "phi" else "silu"}
    if str(change.get("model_type")).startswith("gemma"):
        config["hidden_act"] = "gelu"
    with pytest.raises(UnsupportedModel, match=named):
        parse(json.loads(json.dumps(config | change)))
