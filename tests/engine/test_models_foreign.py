"""Readers of CTranslate2 and ONNX files: what they take from real ones, and what they refuse of hostile ones."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

from node.errors import ModelError  # noqa: E402
from node.models import ppocr  # noqa: E402
from node.models.ctranslate2_file import CTranslate2File  # noqa: E402
from node.models.manifest import Manifest  # noqa: E402
from node.models.onnx_file import OnnxFile  # noqa: E402
from node.models.packages import KNOWN  # noqa: E402
from node.models.store import ModelStore  # noqa: E402
from node.models.tasks import tasks_of  # noqa: E402
from protocol.tasks import Task  # noqa: E402

# ------------------------------------------------------------------------------------------------------------ CTranslate2


def name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def variable(called: str, shape: tuple[int, ...], kind: int, data: bytes, size: int | None = None) -> bytes:
    head = name(called) + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return head + struct.pack("<BI", kind, len(data) if size is None else size) + data


def ct2(variables: list[bytes], aliases: list[tuple[str, str]] | None = None, *, version: int = 6) -> bytes:
    body = struct.pack("<I", version) + name("WhisperSpec") + struct.pack("<II", 3, len(variables))
    body += b"".join(variables) + struct.pack("<I", len(aliases or []))
    return body + b"".join(name(a) + name(b) for a, b in aliases or [])


GOOD = ct2(
    [variable("w", (2, 3), 0, np.arange(6, dtype="<f4").tobytes()), variable("heads", (), 2, b"\x06\x00")],
    [("tied", "w")],
)


def test_a_ctranslate2_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(GOOD)
    with CTranslate2File(tmp_path / "model.bin") as file:
        assert file.spec == "WhisperSpec" and file.scalar("heads") == 6
        assert file.array("w").tolist() == file.array("tied").tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(ModelError, match="lacks nothing"):
            file.array("nothing")
        with pytest.raises(ModelError, match="no scalar"):
            file.scalar("w")


def test_every_cut_of_a_ctranslate2_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(ModelError):
            CTranslate2File(path)
    path.write_bytes(GOOD + b"\0")
    with pytest.raises(ModelError, match="follow"):
        CTranslate2File(path)


@pytest.mark.parametrize(
    "data",
    [
        ct2([], version=7),
        ct2([variable("w", (1 << 31, 1 << 31), 1, b"")]),
        ct2([variable("w", (2,), 0, bytes(8), size=1 << 31)]),
        ct2([variable("w", (3,), 0, bytes(8))]),
        ct2([variable("w", (2,), 5, bytes(4))]),
        ct2([variable("w", (1, 1, 1, 1, 1), 1, b"a")]),
        ct2([variable("w", (1,), 1, b"a"), variable("w", (1,), 1, b"b")]),
        ct2([], [("a", "b")]),
        struct.pack("<I", 6) + name("WhisperSpec") + struct.pack("<II", 3, 1 << 31),
        struct.pack("<IH", 6, 0xFFFF) + b"a" * 0xFFFF,
        struct.pack("<IH", 6, 3) + b"abc",
    ],
)
def test_a_hostile_ctranslate2_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(ModelError):
        CTranslate2File(tmp_path / "model.bin")


# ------------------------------------------------------------------------------------------------------------------- ONNX


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(called: bytes = b"w", *more: bytes, data: bytes = bytes(8)) -> bytes:
    return field(1, 2) + field(2, 1) + field(8, called) + field(9, data) + b"".join(more)


def onnx(*graph: bytes, domain: bytes = b"", more: bytes = b"") -> bytes:
    return field(1, 8) + field(8, field(1, domain) + field(2, 15)) + field(7, b"".join(graph)) + more


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return graph


def test_an_onnx_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    constant = field(1, field(2, b"made") + field(4, b"Constant") + field(5, field(5, tensor(b""))))
    numbers = np.array([1.5, -2], "<f4").tobytes()
    path.write_bytes(onnx(field(5, tensor(data=numbers)), constant, nested(3), domain=b"ai.onnx"))
    with OnnxFile(path) as file:
        assert set(file.tensors) == {"w", "made"} and file.dtypes == {"F32"}
        assert file.float32("w").tolist() == [1.5, -2]
        with pytest.raises(ModelError, match="no float32 tensor"):
            file.float32("other")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (onnx(field(5, tensor(b"w", field(14, 1)))), "another file"),
        (onnx(field(5, tensor(b"w", field(13, field(1, b"location") + field(2, b"/etc/passwd"))))), "another file"),
        (onnx(field(1, field(5, field(5, tensor(b"w", field(14, 1)))))), "another file"),
        (onnx(field(1, field(5, field(6, field(5, tensor(b"w", field(14, 1))))))), "another file"),
        (onnx(domain=b"com.evil"), "operators of"),
        (onnx(field(1, field(4, b"Run") + field(7, b"com.evil"))), "operators of"),
        (onnx(more=field(25, b"")), "functions"),
        (onnx(field(15, b"")), "sparse"),
        (onnx(nested(12)), "nested"),
        (onnx(more=field(7, b"")), "2 graphs"),
        (b"", "empty"),
        (b"\xff" * 40, "does not end"),
        (b"not a model at all", "not an ONNX file"),
    ],
)
def test_an_onnx_file_with_a_door_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=why):
        OnnxFile(tmp_path / "m.onnx")


def external(location: bytes, offset: bytes = b"0", length: bytes = b"8") -> bytes:
    pairs = {b"location": location, b"offset": offset, b"length": length}
    entries = b"".join(field(13, field(1, key) + field(2, value)) for key, value in pairs.items())
    return onnx(field(5, field(1, 2) + field(2, 1) + field(8, b"w") + field(14, 1) + entries))


def test_tensors_may_lie_in_the_one_file_beside_and_nowhere_else(tmp_path: Path) -> None:
    path, beside = tmp_path / "model.onnx", tmp_path / "model.onnx_data"
    beside.write_bytes(bytes(24))
    path.write_bytes(external(b"model.onnx_data", b"16"))
    with OnnxFile(path, beside) as file:
        assert file.dtypes == {"F32"}
    for data in (
        external(b"/etc/passwd"),
        external(b"../model.onnx_data"),
        external(b"./model.onnx_data"),
        external(b""),
        external(b"model.onnx_data", b"17"),
        external(b"model.onnx_data", b"-8"),
        external(b"model.onnx_data", b"9" * 15),
        external(b"model.onnx_data", b"0", b"7"),
        external(b"model.onnx_data", b"0x0"),
    ):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"another file|in its file|of its file"):
            OnnxFile(path, beside)


def test_operators_of_the_runtime_itself_are_let_in_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    eight = field(5, field(1, b"bits") + field(3, 8))
    path.write_bytes(onnx(field(1, field(4, b"MatMulNBits") + field(7, b"com.microsoft") + eight)))
    with OnnxFile(path) as file:
        assert file.bits == {8}
    path.write_bytes(onnx(field(1, field(4, b"GatherBlockQuantized") + field(7, b"com.microsoft"))))
    with OnnxFile(path) as file:
        assert file.bits == {4}
    for bits in (0, 9):
        node = field(4, b"MatMulNBits") + field(7, b"com.microsoft") + field(5, field(1, b"bits") + field(3, bits))
        path.write_bytes(onnx(field(1, node)))
        with pytest.raises(ModelError, match="bits"):
            OnnxFile(path)
    for operator in (b"EPContext", b"", b"matmulnbits"):
        path.write_bytes(onnx(field(1, field(4, operator) + field(7, b"com.microsoft"))))
        with pytest.raises(ModelError, match=r"operator .* of 'com\.microsoft'"):
            OnnxFile(path)


def test_cut_onnx_files_are_refused_or_whole(tmp_path: Path) -> None:
    """A cut between two fields leaves a file that lacks its graph; any other leaves a field that ends too early."""
    whole, path = onnx(field(5, tensor())), tmp_path / "m.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            OnnxFile(path)


# -------------------------------------------------------------------------------------------------------------- the store


def test_the_known_models_have_their_pinned_ids_and_tasks(stored: Callable[[str], Path]) -> None:
    expected = {
        "minilm": ((Task.EMBED, Task.RERANK), "F32+I64", 256),
        "whisper-tiny.en": ((Task.TRANSCRIBE,), "F16+F32", None),
        "ppocr-v6-small": ((Task.OCR,), "F32+I32+I64", None),
    }
    for known, (tasks, dtype, longest) in expected.items():
        folder = stored(known)
        assert folder.name == KNOWN[known].model_id  # so every machine that converts it has the same bytes
        manifest = Manifest.parse((folder / "manifest.json").read_bytes())
        assert manifest.dtype == dtype and tasks_of(folder) == tasks
        ModelStore(folder.parent).verify(manifest.id)
        assert longest is None or manifest.context_length == longest


def ppocr_folder(folder: Path) -> Path:
    folder.mkdir()
    for file in ppocr.FILES:
        (folder / file).write_bytes(onnx(field(5, tensor())))
    (folder / "config.json").write_text(json.dumps(dict(ppocr.CONFIG)))
    return folder


def test_onnx_enters_the_store_only_where_it_belongs_and_without_doors(tmp_path: Path) -> None:
    store, folder = ModelStore(tmp_path / "store"), ppocr_folder(tmp_path / "ocr")
    manifest = store.add_folder(folder, "ocr")
    assert manifest.architecture == "ppocr" and [one.path for one in manifest.files] == [
        "cls.onnx",
        "config.json",
        "det.onnx",
        "rec.onnx",
    ]
    (folder / "det.onnx").write_bytes(onnx(field(5, tensor(b"w", field(14, 1)))))
    with pytest.raises(ModelError, match="another file"):
        store.add_folder(folder, "ocr")
    (folder / "det.onnx").write_bytes(onnx())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 8}))
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        store.add_folder(folder, "ocr")
    assert store.list() == (manifest,)


def test_what_is_no_plain_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = ppocr_folder(tmp_path / "ocr")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # reading it would never end
    with pytest.raises(ModelError, match="not a plain file"):
        ModelStore(tmp_path / "store").add_folder(folder, "ocr")


@pytest.mark.parametrize(
    ("config", "tasks"),
    [
        ({"model_type": "llama"}, (Task.CHAT,)),
        ({"model_type": "bert"}, (Task.EMBED, Task.RERANK)),
        (
            {
                "model_type": "bert",
                "architectures": ["BertForSequenceClassification"],
                "id2label": {"0": "LABEL_0"},
            },
            (Task.RERANK,),
        ),
        (
            {
                "model_type": "bert",
                "architectures": ["BertForSequenceClassification"],
                "id2label": {"0": "a", "1": "b"},
            },
            None,
        ),
        ([], None),
    ],
)
def test_a_config_says_what_its_model_is_for(tmp_path: Path, config: object, tasks: tuple[Task, ...] | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if tasks is None:
        with pytest.raises(ModelError):
            tasks_of(tmp_path)
    else:
        assert tasks_of(tmp_path) == tasks
