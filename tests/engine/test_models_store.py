"""The model store: what it takes, what it refuses, and that a model appears whole or not at all."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from node.errors import ModelError
from node.models.manifest import FileEntry, Manifest
from node.models.safetensors_file import read_header
from node.models.store import ModelStore, Progress
from node.runtime.backend import open_backend
from node.runtime.engine_settings import EngineSettings
from protocol.ids import ModelId


def tensor_file(header: dict[str, Any] | None = None, data: bytes = bytes(8)) -> bytes:
    text = json.dumps(header or {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(tensor_file())
    return folder


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def test_add_list_resolve_verify_remove(store: ModelStore, folder: Path) -> None:
    assert store.list() == ()
    manifest = store.add_folder(folder, "mini", license_id="MIT", source="here")
    assert store.add_folder(folder, "mini", license_id="MIT", source="here") == manifest  # adding again is the same
    assert store.list() == (manifest,)
    assert store.resolve("mini") == manifest == store.resolve(str(manifest.id))
    assert (manifest.architecture, manifest.context_length, manifest.dtype) == ("llama", 64, "F32")
    assert [entry.path for entry in manifest.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    store.verify(manifest.id)
    assert (store.path(manifest.id) / "manifest.json").read_bytes() == manifest.canonical()
    assert sorted(os.listdir(store.root)) == [str(manifest.id)]
    store.remove(manifest.id)
    assert store.list() == () and os.listdir(store.root) == []


def test_equal_bytes_are_the_same_model_and_other_bytes_another(store: ModelStore, folder: Path) -> None:
    first = store.add_folder(folder, "mini")
    (folder / "model.safetensors").write_bytes(tensor_file(data=b"\x01" + bytes(7)))
    second = store.add_folder(folder, "mini")
    assert first.id != second.id
    with pytest.raises(ModelError, match="names 2 models"):
        store.resolve("mini")
    assert store.resolve(str(second.id)) == second


def flip(path: Path) -> None:
    os.chmod(path, 0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_is_not_what_its_id_commits_to_is_not_loaded(store: ModelStore, folder: Path, name: str) -> None:
    """M1: neither engine nor tokenizer has seen a byte of it."""
    manifest = store.add_folder(folder, "mini")
    flip(store.path(manifest.id) / name)

    async def main() -> None:
        async with open_backend(store, [manifest], EngineSettings()):
            pass

    with pytest.raises(ModelError, match="of mini is damaged"):
        trio.run(main)


def test_who_waits_for_a_model_to_be_hashed_sees_how_far_it_is(store: ModelStore, folder: Path) -> None:
    manifest = store.add_folder(folder, "mini")
    seen: list[int] = []

    @contextmanager
    def watch(model: Manifest) -> Iterator[Progress]:
        assert model == manifest
        yield seen.append

    async def main() -> None:
        async with open_backend(store, [manifest], EngineSettings(), watch):
            pass

    with pytest.raises(ModelError, match="cannot be read"):  # it has no layers
        trio.run(main)
    assert sum(seen) == sum(entry.size for entry in manifest.files)


def test_a_start_that_is_cancelled_hashes_no_further(store: ModelStore, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(
        tensor_file({"w": {"dtype": "F32", "shape": [2 << 20], "data_offsets": [0, 8 << 20]}}, bytes(8 << 20))
    )
    manifest = store.add_folder(folder, "mini")
    seen: list[int] = []

    async def main() -> None:
        with trio.CancelScope() as scope:

            @contextmanager
            def watch(_: Manifest) -> Iterator[Progress]:
                def progress(count: int) -> None:
                    seen.append(count)
                    if len(seen) == 1:
                        trio.from_thread.run_sync(scope.cancel)

                yield progress

            async with open_backend(store, [manifest], EngineSettings(), watch):
                pass
        assert scope.cancelled_caught

    trio.run(main)
    assert 1 <= len(seen) <= len(manifest.files)


def test_files_are_hashed_side_by_side(store: ModelStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = store.add_folder(folder, "mini")
    met, honest = threading.Barrier(len(manifest.files)), store.verify_file
    monkeypatch.setattr(os, "cpu_count", lambda: len(manifest.files))

    def verify_file(*args: Any) -> None:
        met.wait(10)
        honest(*args)

    monkeypatch.setattr(store, "verify_file", verify_file)

    async def main() -> None:
        async with open_backend(store, [manifest], EngineSettings()):
            pass

    with pytest.raises(ModelError, match="cannot be read"):
        trio.run(main)
    assert not met.broken


def test_verify_sees_one_flipped_bit(store: ModelStore, folder: Path) -> None:
    """M1."""
    manifest = store.add_folder(folder, "mini")
    flip(store.path(manifest.id) / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors of mini is damaged"):
        store.verify(manifest.id)


def test_verify_sees_an_extra_file(store: ModelStore, folder: Path) -> None:
    manifest = store.add_folder(folder, "mini")
    (store.path(manifest.id) / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(ModelError, match="does not belong"):
        store.verify(manifest.id)


def test_a_changed_manifest_is_not_listed(store: ModelStore, folder: Path) -> None:
    """M1."""
    manifest = store.add_folder(folder, "mini")
    path = store.path(manifest.id) / "manifest.json"
    os.chmod(path, 0o644)
    path.write_bytes(path.read_bytes().replace(b"mini", b"maxi"))
    assert store.list() == ()
    with pytest.raises(ModelError):
        store.resolve(str(manifest.id))


@pytest.mark.parametrize("name", ["model.bin", "weights.pt", "x.pkl", "modeling_llama.py", "vocab.txt", "ggml.gguf"])
def test_unknown_files_are_refused(store: ModelStore, folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    with pytest.raises(ModelError, match="does not belong"):
        store.add_folder(folder, "mini")
    assert os.listdir(store.root) == [] if store.root.exists() else True


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(store: ModelStore, folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match="safetensors" if "model" in missing else missing):
        store.add_folder(folder, "mini")


def test_links_and_folders_are_refused(store: ModelStore, folder: Path) -> None:
    (folder / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="not a plain file"):
        store.add_folder(folder, "mini")
    (folder / "README.md").unlink()
    (folder / "LICENSE").mkdir()
    with pytest.raises(ModelError, match="not a plain file"):
        store.add_folder(folder, "mini")


def test_remote_code_is_refused(store: ModelStore, folder: Path) -> None:
    (folder / "config.json").write_text(
        '{"model_type": "x", "max_position_embeddings": 64, "auto_map": {"AutoModel": "evil.Model"}}'
    )
    with pytest.raises(ModelError, match="own code"):
        store.add_folder(folder, "mini")


@pytest.mark.parametrize("name", ["", "Mini", "../mini", "mini/1", "-x", "a" * 97, "mini\n"])
def test_bad_names_are_refused(store: ModelStore, folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no model name"):
        store.add_folder(folder, name)
    assert os.listdir(store.root) == []


def test_an_interrupted_add_leaves_nothing(store: ModelStore, folder: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add_folder(folder, "mini", progress=stop)
    assert os.listdir(store.root) == []


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(
    store: ModelStore, folder: Path
) -> None:
    with store.staging() as living:
        (living / "config.json").write_text("{}")
        dead = store.root / ".aside-dead"
        dead.mkdir()
        (dead / "model.safetensors").write_bytes(bytes(100))
        manifest = store.add_folder(folder, "mini")
        assert sorted(os.listdir(store.root)) == sorted([living.name, str(manifest.id)])
        assert (living / "config.json").read_text() == "{}"
        assert store.list() == (manifest,)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(4),
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        tensor_file({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        tensor_file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9)),
        tensor_file({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
        tensor_file({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}),
        tensor_file({"w": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}),
        tensor_file({"w": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}),
        tensor_file({"w": 7}),
        tensor_file({"w": {"dtype": "F32", "shape": [0] + [10**4000] * 1000, "data_offsets": [0, 0]}}, b""),
        tensor_file({"w": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}, b""),
    ],
    ids=range(13),
)
def test_damaged_safetensors_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError):
        read_header(path)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "mini",
        "architecture": "llama",
        "context_length": 64,
        "dtype": "F32",
        "license": "MIT",
        "source": "here",
        "files": (FileEntry("config.json", 3, "0" * 64),),
    }
    return Manifest(**{**fields, **changes})


def test_the_id_of_a_manifest_is_fixed() -> None:
    """The canonical form is part of every model's id: these bytes must never change."""
    assert manifest().canonical() == (
        b'{"architecture":"llama","context_length":64,"dtype":"F32","files":[{"path":"config.json","sha256":"'
        + b"0" * 64
        + b'","size":3}],"license":"MIT","name":"mini","source":"here","version":1}'
    )
    assert manifest().id == ModelId.of_manifest(manifest().canonical())
    assert Manifest.parse(manifest().canonical()) == manifest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw + b" ",
        lambda raw: raw[:-1],
        lambda raw: raw.replace(b'"version":1', b'"version":2'),
        lambda raw: raw.replace(b"64", b"-1", 1),
        lambda raw: raw.replace(b'"MIT"', b"7"),
        lambda raw: raw.replace(b'"size":3', b'"size":true'),
        lambda raw: raw.replace(b"config.json", b"../onfig.js"),
        lambda raw: raw.replace(b'"size":3', b'"size":3,"x":1'),
        lambda raw: raw.replace(b'"name"', b'"extra":1,"name"'),
        lambda raw: b"[" * 100_000,
        lambda raw: b"[]",
    ],
    ids=range(11),
)
def test_damaged_manifests_are_refused(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ModelError):
        Manifest.parse(damage(manifest().canonical()))


def test_files_must_be_sorted_and_unique() -> None:
    entry = FileEntry("config.json", 3, "0" * 64)
    for files in ((entry, entry), (FileEntry("z", 1, "0" * 64), entry), ()):
        with pytest.raises(ModelError):
            manifest(files=files)
