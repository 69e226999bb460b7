"""Chats by ONNX Runtime: our own engine's tokens from an exported model, alone and together, and what is refused of files."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx", reason="the exporter needs it")

import numpy as np
import onnx

from node.config import load
from node.errors import ConfigError, ModelError
from node.groups import plain_errors
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.models.tokenizer import Tokenizer
from node.ports import Prompt
from node.runtime.backend import EngineSettings, TorchBackend, open_backend
from node.runtime.backends import onnx_model
from node.runtime.backends.chosen import open_chosen
from node.runtime.backends.logits_engine import LogitsEngine
from node.runtime.backends.onnx_model import PIECE, OnnxModel
from node.runtime.engine.engine import Engine
from node.runtime.engine.errors import CacheFull, InvalidSequence, UnsupportedModel
from node.runtime.engine.sequence import Sequence
from node.testing.onnx_export import export
from node.testing.tiny_model import add_tiny
from node.worker.worker import self_test
from protocol.messages import Params, ResponseFormat
from protocol.sampling import SamplingParams

SIZES = (1, 5, 30, 31, PIECE, PIECE + 3, 2 * PIECE + 40, 45)
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, frequency_penalty=0.3, seed=99)


class Exported:
    """A tiny Llama and its exports."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, ModelStore(root / "store")
        (root / "source").mkdir()
        self.source = self.store.path(add_tiny(self.store, root / "source").id)

    def add(self, name: str, **how: Any) -> Manifest:
        (self.root / name).mkdir()
        return self.store.add_folder(export(self.source, self.root / name, **how), name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def plain(exported: Exported) -> Path:
    return exported.store.path(exported.add("plain").id)


def prompts() -> list[tuple[int, ...]]:
    return [tuple((11 * n * n + 7 * k + 3) % 400 for n in range(size)) for k, size in enumerate(SIZES)]


def answers(
    engine: LogitsEngine | Engine, sampling: SamplingParams, count: int = 30, **more: object
) -> dict[int, list[int]]:
    """All prompts at once."""
    found: dict[int, list[int]] = {}
    for n, prompt in enumerate(prompts()):
        engine.submit(Sequence(n, prompt, sampling, count, eos_ids=frozenset(), **more))  # type: ignore[arg-type]
    while not engine.idle:
        for output in engine.step():
            found.setdefault(int(str(output.id)), []).append(output.token_id)
    engine.check_integrity()
    return found


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("positions", [True, False])
def test_tokens_are_those_of_our_own_engine(exported: Exported, positions: bool, sampling: SamplingParams) -> None:
    ours = answers(Engine(exported.source), sampling)
    name = f"positions-{positions}-{sampling.greedy}".lower()
    model = OnnxModel(exported.store.path(exported.add(name, positions=positions).id), "float32", 1)
    assert model.together
    assert answers(LogitsEngine(model, 1 << 26), sampling) == ours
    model.together = False
    assert answers(LogitsEngine(model, 1 << 26), sampling) == ours


def test_streams_come_go_wait_and_go_on_elsewhere(plain: Path) -> None:
    """Aborts, holds and resumption at random: whoever is left says what it would have said alone."""
    model = OnnxModel(plain, "float32", 1)
    alone = answers(LogitsEngine(model, 1 << 26), DRAWN)
    engine = LogitsEngine(model, 1 << 26)
    found: dict[int, list[int]] = {}
    resumed: set[int] = set()
    for n, prompt in enumerate(prompts()):
        engine.submit(Sequence(n, prompt, DRAWN, 30, eos_ids=frozenset()))
    steps = 0
    while not engine.idle:
        steps += 1
        for output in engine.step(hold={(steps * 7) % 8, (steps * 3 // 5) % 8}):
            found.setdefault(int(str(output.id)), []).append(output.token_id)
        n = steps % 8
        if steps % 5 == 0 and n not in resumed and 3 < len(found.get(n, ())) < 30:
            resumed.add(n)
            assert engine.abort(n) and not engine.abort(n)
            engine.submit(Sequence(n, prompts()[n], DRAWN, 30, generated_ids=tuple(found[n]), eos_ids=frozenset()))
        engine.check_integrity()
    assert found == alone and len(resumed) > 3
    assert engine.room == LogitsEngine(model, 1 << 26).room


def test_no_row_holds_the_memory_of_others(plain: Path) -> None:
    """One of many that waits has a copy of its own, as long as itself."""
    engine = LogitsEngine(OnnxModel(plain, "float32", 1), 1 << 26)
    for n in range(4):
        engine.submit(Sequence(n, tuple(range(5, 40 + n)), GREEDY, 60, eos_ids=frozenset()))
    for _ in range(10):
        engine.step()
    assert {len(one.past.kept.lengths) for one in engine._running.values() if one.past} == {4}
    engine.step(hold={2})
    waiting = engine._running[2].past
    assert waiting is not None and list(waiting.kept.lengths) == [waiting.tokens]
    assert waiting.kept.values[0].shape()[0] == 1 and waiting.kept.values[0].shape()[2] == waiting.tokens
    engine.abort(0)
    assert all(len(one.past.kept.lengths) == 1 for one in engine._running.values() if one.past)


def test_room_is_reserved_and_what_does_not_fit_is_refused(plain: Path) -> None:
    model = OnnxModel(plain, "float32", 1)
    engine = LogitsEngine(model, 64 * model.bytes_per_token)
    assert engine.room == 64 and engine.could_fit(65) and not engine.could_fit(66)
    engine.submit(Sequence(0, (5, 6), GREEDY, 40, eos_ids=frozenset()))
    assert engine.room == 16
    with pytest.raises(CacheFull):
        engine.submit(Sequence(1, (5, 6), GREEDY, 40))
    for bad in (Sequence(0, (5,), GREEDY, 4), Sequence(1, (), GREEDY, 4), Sequence(1, (1 << 20,), GREEDY, 4)):
        with pytest.raises(InvalidSequence):
            engine.submit(bad)
    engine.abort(0)
    assert engine.room == 64


def test_what_rounds_by_company_takes_turns_and_says_int8(exported: Exported) -> None:
    """Dynamic quantization rounds each pass by its largest number, whoever's it is: one stream would change another's words."""
    folder = exported.store.path(exported.add("dynamic", weights="dynamic").id)
    with pytest.raises(UnsupportedModel, match=r"weights are int8, and engine\.dtype says float32"):
        OnnxModel(folder, "float32", 1)
    model = OnnxModel(folder, "int8", 1)
    assert not model.together
    mixed, alone = answers(LogitsEngine(model, 1 << 26), GREEDY), {}
    for n, prompt in enumerate(prompts()):
        engine = LogitsEngine(model, 1 << 26)
        engine.submit(Sequence(n, prompt, GREEDY, 30, eos_ids=frozenset()))
        while not engine.idle:
            for output in engine.step():
                alone.setdefault(n, []).append(output.token_id)
    assert mixed == alone
    model.together = True  # the trial was right: without it they differ
    assert answers(LogitsEngine(model, 1 << 26), GREEDY) != alone


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_a_few_bits_are_named_as_what_they_are(exported: Exported, bits: int) -> None:
    """Only weights are rounded, so rows are computed alike, and the format is the operator's `bits`."""
    folder = exported.store.path(exported.add(f"bits-{bits}", weights=f"int{bits}").id)
    with pytest.raises(UnsupportedModel, match=f"weights are int{bits}"):
        OnnxModel(folder, "float32", 1)
    model = OnnxModel(folder, f"int{bits}", 1)
    assert model.together
    together = answers(LogitsEngine(model, 1 << 26), DRAWN)
    model.together = False
    assert answers(LogitsEngine(model, 1 << 26), DRAWN) == together


def changed(plain: Path, to: Path, change: Callable[[object], None]) -> Path:
    model = onnx.load(str(plain / "model.onnx"))
    change(model.graph)
    to.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((plain / name).read_bytes())
    (to / "model.onnx").write_bytes(model.SerializeToString())
    return to


def rename(graph: object, old: str, new: str) -> None:
    for one in (*graph.input, *graph.output):  # type: ignore[attr-defined]
        if one.name == old:
            one.name = new
    for node in graph.node:  # type: ignore[attr-defined]
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def cut_the_mask(graph: object) -> None:
    """The mask counts everything: what pads a row is read as its past."""
    reader = onnx.helper.make_node("Equal", ["attention_mask", "attention_mask"], ["all_true"])
    ones = onnx.helper.make_node("Cast", ["all_true"], ["ones"], to=onnx.TensorProto.INT64)
    for node in graph.node:  # type: ignore[attr-defined]
        node.input[:] = ["ones" if name == "attention_mask" else name for name in node.input]
    graph.node.insert(0, ones)  # type: ignore[attr-defined]
    graph.node.insert(0, reader)  # type: ignore[attr-defined]


def forget(graph: object) -> None:
    """Past keys are multiplied by nothing."""
    zero = onnx.helper.make_tensor("nothing", onnx.TensorProto.FLOAT, [], [0.0])
    graph.initializer.append(zero)  # type: ignore[attr-defined]
    for node in graph.node:  # type: ignore[attr-defined]
        node.input[:] = ["forgotten" if name == "past_key_values.0.value" else name for name in node.input]
    node = onnx.helper.make_node("Mul", ["past_key_values.0.value", "nothing"], ["forgotten"])
    graph.node.insert(0, node)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda graph: rename(graph, "position_ids", "use_cache_branch"), "an input 'use_cache_branch'"),
        (lambda graph: rename(graph, "attention_mask", "position_ids_"), "an input 'position_ids_'"),
        (lambda graph: rename(graph, "present.1.key", "other"), r"it lacks 'present\.1\.key'"),
        (lambda graph: rename(graph, "logits", "hidden"), "it lacks 'logits'"),
        (forget, "its past is of no use"),
    ],
    ids=["stranger", "mask", "present", "logits", "forgets"],
)
def test_a_file_that_cannot_go_on_is_refused(
    plain: Path, tmp_path: Path, change: Callable[[object], None], why: str
) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        OnnxModel(changed(plain, tmp_path / "changed", change), "float32", 1)


def test_a_file_that_ignores_padding_runs_one_sequence_a_pass(plain: Path, tmp_path: Path) -> None:
    model = OnnxModel(changed(plain, tmp_path / "changed", cut_the_mask), "float32", 1)
    assert not model.together
    assert answers(LogitsEngine(model, 1 << 26), GREEDY) == answers(
        LogitsEngine(OnnxModel(plain, "float32", 1), 1 << 26), GREEDY
    )


def grouped_query(folder: Path, source: Path) -> Path:
    """A model of one layer as onnxruntime-genai's builder writes them: no positions, sizes of keys left open, and the runtime's
    own attention, which keeps rows from their beginning on."""
    draw, make, kinds = np.random.default_rng(5), onnx.helper.make_node, onnx.TensorProto
    vocab, width, heads, size = 413, 64, 2, 32
    weights = {
        name: draw.normal(0, 0.2, shape).astype("f4")
        for name, shape in {
            "embed": (vocab, width),
            "qkv": (width, 128),
            "out": (width, width),
            "head": (width, vocab),
        }.items()
    }
    weights |= {
        "cos": np.cos(a := np.arange(1024)[:, None] / 30 ** (np.arange(16) / 16)).astype("f4"),
        "sin": np.sin(a).astype("f4"),
    }
    constants = {"one": np.array([1], "i8"), "cut": np.array([64, 32, 32], "i8")}
    nodes = [
        make("ReduceSum", ["attention_mask", "one"], ["seen"], keepdims=0),
        make("Sub", ["seen", "one"], ["last"]),
        make("Cast", ["last"], ["lengths"], to=kinds.INT32),
        make("Shape", ["attention_mask"], ["shape"]),
        make("Gather", ["shape", "second"], ["all"]),
        make("Cast", ["all"], ["total"], to=kinds.INT32),
        make("Gather", ["embed", "input_ids"], ["x"]),
        make("MatMul", ["x", "qkv"], ["packed"]),
        make("Split", ["packed", "cut"], ["q", "k", "v"], axis=2),
        make(
            "GroupQueryAttention",
            ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "lengths", "total", "cos", "sin"],
            ["attended", "present.0.key", "present.0.value"],
            domain="com.microsoft", num_heads=heads, kv_num_heads=1, do_rotary=1,
        ),
        make("MatMul", ["attended", "out"], ["projected"]),
        make("Add", ["x", "projected"], ["y"]),
        make("MatMul", ["y", "head"], ["logits"]),
    ]  # fmt: skip
    tensor = onnx.helper.make_tensor_value_info
    inputs = [
        tensor(name, kinds.INT64, ["rows", axis]) for name, axis in (("input_ids", "new"), ("attention_mask", "all_"))
    ]
    past = [tensor(f"past_key_values.0.{part}", kinds.FLOAT, ["rows", 1, "past", "size"]) for part in ("key", "value")]
    present = [tensor(f"present.0.{part}", kinds.FLOAT, ["rows", 1, "all_", "size"]) for part in ("key", "value")]
    logits = tensor("logits", kinds.FLOAT, ["rows", "new", vocab])
    held = [onnx.numpy_helper.from_array(value, name) for name, value in {**weights, **constants}.items()]
    held.append(onnx.numpy_helper.from_array(np.array(1, "i8"), "second"))
    graph = onnx.helper.make_graph(nodes, "tiny", [*inputs, *past], [logits, *present], held)
    domains = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir()
    onnx.save(onnx.helper.make_model(graph, opset_imports=domains, ir_version=9), folder / "model.onnx")
    config = {
        "model_type": "llama",
        "max_position_embeddings": 1024,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": size, "hidden_size": width}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_attention_of_the_runtime_itself_is_padded_at_the_end(exported: Exported, tmp_path: Path) -> None:
    """Its rows are kept from their beginning on: what pads a row stands behind it, and the trial at load finds that out."""
    manifest = exported.store.add_folder(grouped_query(tmp_path / "grouped", exported.source), "grouped")
    model = OnnxModel(exported.store.path(manifest.id), "float32", 1)
    assert model.together and not model._front
    together = answers(LogitsEngine(model, 1 << 26), DRAWN)
    assert len({tuple(answer) for answer in together.values()}) == len(SIZES)
    model.together = False
    assert answers(LogitsEngine(model, 1 << 26), DRAWN) == together
    model.together, model._front = True, True  # the trial was right
    assert answers(LogitsEngine(model, 1 << 26), DRAWN) != together


@pytest.mark.slow
def test_smollm_says_what_it_says_in_our_own_engine(smollm: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(smollm)
    texts = ("What is 12*13?", "List five European capitals.")
    asked = [tuple(tokenizer.chat([{"role": "user", "content": text}])) for text in texts]
    tokenizer.close()
    (tmp_path / "smollm").mkdir()
    found: list[dict[int, list[int]]] = []
    for engine in (Engine(smollm), LogitsEngine(OnnxModel(export(smollm, tmp_path / "smollm"), "float32", 1), 1 << 29)):
        for n, prompt in enumerate(asked):
            engine.submit(Sequence(n, prompt, GREEDY if n else DRAWN, 24, eos_ids=frozenset()))
        said: dict[int, list[int]] = {}
        while not engine.idle:
            for output in engine.step():
                said.setdefault(int(str(output.id)), []).append(output.token_id)
        found.append(said)
    assert found[0] == found[1]


def test_tensors_beside_the_file_are_part_of_the_model(plain: Path, tmp_path: Path) -> None:
    def outside(to: Path, location: str) -> Path:
        model = onnx.load(str(plain / "model.onnx"))
        to.mkdir()
        onnx.save(
            model,
            str(to / "model.onnx"),
            save_as_external_data=True,
            location=location,
            size_threshold=0,
            convert_attribute=False,
        )
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (to / name).write_bytes((plain / name).read_bytes())
        return to

    store = ModelStore(tmp_path / "store")
    manifest = store.add_folder(outside(tmp_path / "beside", "model.onnx_data"), "beside")
    assert "model.onnx_data" in [one.path for one in manifest.files]
    model = OnnxModel(store.path(manifest.id), "float32", 1)
    assert model.weight_bytes > sum(one.size for one in manifest.files if one.path == "model.onnx")
    wanted = answers(LogitsEngine(OnnxModel(plain, "float32", 1), 1 << 26), GREEDY)
    assert answers(LogitsEngine(model, 1 << 26), GREEDY) == wanted
    with pytest.raises(ModelError, match="does not belong"):
        store.add_folder(outside(tmp_path / "other", "weights.bin"), "other")
    (tmp_path / "other" / "weights.bin").rename(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="another file"):
        store.add_folder(tmp_path / "other", "other")


def test_one_folder_holds_one_form_of_a_model(exported: Exported, plain: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    for source in (*plain.iterdir(), exported.source / "model.safetensors"):
        if source.name != "manifest.json":
            (both / source.name).write_bytes(source.read_bytes())
    with pytest.raises(ModelError, match="as well"):
        exported.store.add_folder(both, "both")
    with pytest.raises(UnsupportedModel, match=r"holds no model\.onnx"):
        OnnxModel(exported.source, "float32", 1)
    with pytest.raises(UnsupportedModel, match="lack"):
        Engine(plain)


# ---------------------------------------------------------------------------------------------------- behind the port

Test = Callable[[TorchBackend], Awaitable[None]]


def run(store: ModelStore, manifest: Manifest, test: Test, **options: object) -> None:
    async def main() -> None:
        settings = replace(EngineSettings(runtime="onnx", isolation="thread"), **options)  # type: ignore[arg-type]
        with trio.fail_after(120):
            async with open_backend(store, [manifest], settings) as backend:
                await test(backend)

    with plain_errors():
        trio.run(main)


async def ids_of(backend: TorchBackend, prompt: Prompt, params: Params, resume: tuple[int, ...] = ()) -> list[int]:
    found: list[int] = []
    async with aclosing(backend.generate(prompt, params, resume)) as steps:
        async for step in steps:
            found += step.token_ids
    return found


def test_the_setting_opens_it(exported: Exported, plain: Path, tmp_path: Path) -> None:
    manifest, said = exported.store.resolve("plain"), list[str]()
    (tmp_path / "data").mkdir(mode=0o700)
    config = load({"engine.backend": "onnx"}, environ={"GRISTMILL_DATA_DIR": str(tmp_path / "data"), "PATH": "/bin"})
    settings = EngineSettings(device="auto", isolation="thread")

    async def main() -> None:
        with trio.fail_after(120):
            watch = lambda _: nullcontext(lambda _: None)  # noqa: E731
            async with open_chosen(config, settings, exported.store, [manifest], said.append, watch) as backend:
                assert manifest.id in await self_test(backend)

    with plain_errors():
        trio.run(main)
    assert any("models run on" in line for line in said) and any("self-test passed" in line for line in said)
    with pytest.raises(ConfigError, match="draft models"):
        open_chosen(
            config, replace(settings, drafts=("a=b",)), exported.store, [], said.append, lambda _: nullcontext()
        )  # type: ignore[arg-type]


def test_every_parameter_of_the_port_is_honoured(exported: Exported, plain: Path) -> None:
    manifest = exported.store.resolve("plain")
    prompt = Prompt(manifest.id, tuple(range(5, 25)))
    params = Params(max_tokens=24, temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, seed=9)
    grammar = Params(max_tokens=24, response_format=ResponseFormat(kind="regex", text="[0-9]{3,8}"))
    ours: list[list[int]] = []

    async def own() -> None:
        source = next(one for one in exported.store.list() if one.dtype == "F32")
        async with open_backend(exported.store, [source], EngineSettings(isolation="thread")) as backend:
            for wanted in (params, grammar):
                ours.append(await ids_of(backend, replace(prompt, model=source.id), wanted))

    trio.run(own)

    async def test(backend: TorchBackend) -> None:
        for wanted, ids in zip((params, grammar), ours, strict=True):
            assert await ids_of(backend, prompt, wanted) == ids
        for cut in range(1, len(ours[0]), 5):
            assert ours[0][:cut] + await ids_of(backend, prompt, params, tuple(ours[0][:cut])) == ours[0]
        stats = backend.fleet.get(manifest.id).metrics
        assert stats is not None and any("generation_tokens" in str(sample[0]) for sample in stats.samples())

    run(exported.store, manifest, test)


def test_a_hostile_file_never_reaches_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    (folder / "model.onnx").write_bytes(b"\x08\x08\x42\x0c\x0a\x08com.evil\x10\x01")
    monkeypatch.setattr(onnx_model.onnxruntime, "InferenceSession", lambda *_: pytest.fail("opened"))
    with pytest.raises(ModelError, match=r"operators of 'com\.evil'"):
        OnnxModel(folder, "float32", 1)
