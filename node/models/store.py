"""Models on disk: ``<root>/<cid>/`` holds one model and its manifest, under the hash of that manifest.

Rules: a model appears whole or not at all (written aside, synced, renamed); only files of known harmless kinds enter, so
nothing in a model folder can execute; links are refused; what is listed was complete when it was renamed, and `verify`
proves it again byte by byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from node import nesting
from node.errors import ModelError
from node.models.manifest import MAX_BYTES, FileEntry, Manifest
from node.models.safetensors_file import read_header
from protocol.errors import InvalidValue
from protocol.ids import ModelId

MANIFEST: Final = "manifest.json"
REQUIRED: Final = ("config.json", "tokenizer.json")
OPTIONAL: Final = (
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
WITHOUT_TOKENIZER: Final = frozenset({"ppocr"})
"""Model types that read no text; their weights are ONNX files."""
ONNX: Final = "model.onnx"
"""The weights of a language model that was exported, with its graph; instead of safetensors."""
ONNX_DATA: Final = ("model.onnx_data", "model.onnx.data")
"""Where exporters put the tensors of a large one."""
_WEIGHTS: Final = (".safetensors", ".onnx", *ONNX_DATA)
_ASIDE: Final = ".aside-"
MAX_TEXT_FILE: Final = 64 << 20
"""Largest file that is not weights (a tokenizer of 256k tokens has about 32 MB)."""

Progress = Callable[[int], None]
"""Called with the number of bytes just handled."""


class ModelStore:
    """The models of one data folder. Safe to use from several processes: models are immutable once they have a name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> tuple[Manifest, ...]:
        """Every model, by name and then id. A folder that is no model is left alone and not listed."""
        found = []
        for folder in self._folders():
            try:
                found.append(self._read(folder))
            except ModelError:
                continue
        return tuple(sorted(found, key=lambda manifest: (manifest.name, str(manifest.id))))

    def resolve(self, name: str) -> Manifest:
        """The model of a name or of a CID. Raises `ModelError` when there is none, or when a name means several."""
        try:
            return self._read(self.path(ModelId.from_cid(name)))
        except InvalidValue:
            pass
        matches = [manifest for manifest in self.list() if manifest.name == name]
        if not matches:
            known = ", ".join(sorted({manifest.name for manifest in self.list()})) or "none"
            raise ModelError(
                f"no model {name!r} in the store (stored: {known})", hint="gristmill models add NAME|FOLDER"
            )
        if len(matches) > 1:
            ids = ", ".join(str(manifest.id) for manifest in matches)
            raise ModelError(f"{name!r} names {len(matches)} models", hint=f"use an id: {ids}")
        return matches[0]

    def path(self, model: ModelId) -> Path:
        """The model's folder. Raises `ModelError` when it is not stored."""
        folder = self.root / str(model)
        if not (folder / MANIFEST).is_file():
            raise ModelError(f"model {model} is not in the store", hint="gristmill models list")
        return folder

    def verify(self, model: ModelId, progress: Progress | None = None) -> None:
        """Hash every file again. Raises `ModelError` that names the first file that differs."""
        for entry in self.verify_names(model).files:
            self.verify_file(model, entry, progress)

    def verify_names(self, model: ModelId) -> Manifest:
        """That the folder holds the manifest's files and no others; each of them is still to be hashed. Raises `ModelError`."""
        folder = self.path(model)
        manifest = self._read(folder)
        _check_names(folder, {MANIFEST, *(entry.path for entry in manifest.files)})
        return manifest

    def verify_file(self, model: ModelId, entry: FileEntry, progress: Progress | None = None) -> None:
        """Hash one file of the model again. What `progress` raises ends it. Raises `ModelError`."""
        if _describe(self.path(model) / entry.path, progress) != entry:
            raise ModelError(
                f"{entry.path} of {self._read(self.path(model)).name} is damaged",
                hint=f"gristmill models remove {model}, then add it again",
            )

    def remove(self, model: ModelId) -> None:
        folder = self.path(model)
        with self.staging() as doomed:
            folder.rename(doomed / "model")  # gone for readers at once, even if deleting is cut short

    def add_folder(
        self,
        folder: Path,
        name: str,
        *,
        license_id: str = "unknown",
        source: str = "local folder",
        progress: Progress | None = None,
    ) -> Manifest:
        """Copy a model folder (safetensors, config.json, tokenizer.json) in. Raises `ModelError` for anything else.

        Idempotent: the same files under the same name are the same model.
        """
        if not folder.is_dir():
            raise ModelError(f"{folder} is no folder")
        names = _accepted(folder)
        with self.staging() as staged:
            for file in names:
                with (folder / file).open("rb") as source_file, (staged / file).open("xb") as target:
                    while block := source_file.read(1 << 20):
                        target.write(block)
                        if progress:
                            progress(len(block))
            return self.commit(staged, name, license_id=license_id, source=source)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder beside the models, removed at the end unless `commit` took it.

        Its owner holds a lock on it; what a killed process left behind has none and is swept here.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.root):
            self._sweep()
            staged = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=self.root))
            owner = os.open(staged, os.O_RDONLY)
            fcntl.flock(owner, fcntl.LOCK_EX)
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            os.close(owner)

    def _sweep(self) -> None:
        for left in self.root.glob(_ASIDE + "*"):
            try:
                with _locked(left, wait=False) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)
            except FileNotFoundError:  # its owner has just finished with it
                continue

    def commit(self, staged: Path, name: str, *, license_id: str, source: str) -> Manifest:
        """Check a staged folder, write its manifest, sync everything, and give it its name by one rename."""
        names = _accepted(staged)
        config = _config(staged)
        dtypes = set[str]().union(*(_dtypes(staged / file) for file in names))
        manifest = Manifest(
            name=name,
            architecture=str(config["model_type"]),
            context_length=min(config["max_position_embeddings"], config.get("max_seq_length", 1 << 30)),
            dtype="+".join(sorted(dtypes)),
            license=license_id,
            source=source,
            files=tuple(_describe(staged / file, None) for file in names),
        )
        target = self.root / str(manifest.id)
        if target.exists():
            return manifest
        (staged / MANIFEST).write_bytes(manifest.canonical())
        for file in (*names, MANIFEST):
            os.chmod(staged / file, 0o444)
            _sync(staged / file)
        os.chmod(staged, 0o700)
        _sync(staged)
        try:
            staged.rename(target)
        except OSError:
            if not target.exists():  # else another process added the same bytes first, which is just as good
                raise
        _sync(self.root)
        return manifest

    def _folders(self) -> Iterator[Path]:
        if not self.root.is_dir():
            return
        for folder in sorted(self.root.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                yield folder

    def _read(self, folder: Path) -> Manifest:
        try:
            with (folder / MANIFEST).open("rb") as file:
                manifest = Manifest.parse(file.read(MAX_BYTES + 1))
        except OSError as error:
            raise ModelError(f"{folder.name}: {error.strerror or error}") from None
        if str(manifest.id) != folder.name:
            raise ModelError(f"{folder.name}: the manifest hashes to {manifest.id}")
        return manifest


def _accepted(folder: Path) -> list[str]:
    """File names of a model folder, sorted, after refusing what must not enter."""
    _check_plain(folder)
    present = set(os.listdir(folder))
    for file in present:
        if not file.endswith(_WEIGHTS) and (folder / file).stat().st_size > MAX_TEXT_FILE:
            raise ModelError(f"{file} is larger than {MAX_TEXT_FILE >> 20} MB")
    required, suffix, data = REQUIRED, ".safetensors", set[str]()
    if "config.json" in present and _json(folder / "config.json").get("model_type") in WITHOUT_TOKENIZER:
        required, suffix = ("config.json",), ".onnx"
    elif ONNX in present:
        required, suffix = (*REQUIRED, ONNX), ONNX
        data = present.intersection(ONNX_DATA)
        if len(data) > 1 or any(file.endswith(".safetensors") for file in present):
            raise ModelError(f"weights lie beside {ONNX} as well", hint="one folder, one form of a model")
    weights = {file for file in present if file.endswith(suffix)}
    for one in required:
        if one not in present:
            raise ModelError(
                f"{one} is missing",
                hint="a model folder needs config.json, tokenizer.json, and *.safetensors or model.onnx",
            )
    if not weights:
        raise ModelError(f"no *{suffix} file", hint="other weight formats can run code when loaded; convert them first")
    _check_names(folder, {*required, *OPTIONAL, *weights, *data})
    for file in present & {"config.json", "tokenizer_config.json"}:
        if "auto_map" in _json(folder / file):
            raise ModelError(
                f"{file} asks for the model's own code (auto_map)", hint="Gristmill never runs a model's code"
            )
    return sorted(present)


def _check_plain(folder: Path) -> None:
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_symlink() or not entry.is_file():
            raise ModelError(f"{entry.name} is not a plain file", hint="copy the files themselves, no links or folders")


def _check_names(folder: Path, allowed: set[str]) -> None:
    _check_plain(folder)
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name not in allowed:
            raise ModelError(
                f"{entry.name!r} does not belong in a model folder",
                hint="allowed: *.safetensors or model.onnx, " + ", ".join(sorted({*REQUIRED, *OPTIONAL})),
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = nesting.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object")
    return value


def _config(folder: Path) -> dict[str, Any]:
    config = _json(folder / "config.json")
    if type(config.get("model_type")) is not str or type(config.get("max_position_embeddings")) is not int:
        raise ModelError("config.json lacks model_type or max_position_embeddings")
    if type(config.get("max_seq_length", 1)) is not int:  # Sentence-BERT's: fewer tokens than there are positions
        raise ModelError("config.json: max_seq_length is no number")
    return config


def _dtypes(path: Path) -> set[str]:
    """Of the weights in a file, after checking that it is what its name says; none for a file that is no weights."""
    if path.suffix == ".safetensors":
        return {dtype for dtype, _ in read_header(path).values()}
    if path.suffix == ".onnx":
        from node.models.onnx_file import OnnxFile  # needs numpy

        with OnnxFile(path, onnx_data(path.parent)) as file:
            return file.dtypes
    return set()


def onnx_data(folder: Path) -> Path | None:
    """Where the tensors of a folder's `model.onnx` may lie besides."""
    return next((folder / name for name in ONNX_DATA if (folder / name).is_file()), None)


def _describe(path: Path, progress: Progress | None) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
            if progress:
                progress(len(block))
    return FileEntry(path.name, size, digest.hexdigest())


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the folder's lock; with `wait` False say whether it was free."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
