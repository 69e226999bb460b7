"""What a model *is*: a list of files with their hashes, and the few facts a market needs about them.

A `ModelId` is the sha256 of the manifest's canonical bytes, so equal ids mean equal weights, tokenizer and template. The
canonical form is JSON with sorted keys, no spaces, ASCII only. Nothing outside the manifest may change what a model does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from node import nesting
from node.errors import ModelError
from protocol.ids import ModelId

VERSION: Final = 1
MAX_BYTES: Final = 1 << 20
MAX_FILES: Final = 256
MAX_FILE_SIZE: Final = 1 << 42

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,94}[a-z0-9])?")
_PATH: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    path: str
    """A plain file name: models are flat folders."""
    size: int
    """Bytes."""
    sha256: str
    """Lower-case hex."""


@dataclass(frozen=True, slots=True)
class Manifest:
    name: str
    """What users type: lower-case letters, digits, dot, dash, underscore."""
    architecture: str
    """Model family as in config.json's ``model_type``, for instance ``llama``."""
    context_length: int
    """Tokens of prompt and answer together."""
    dtype: str
    """Type of the stored weights in safetensors words, for instance ``F32``."""
    license: str
    """SPDX id, or ``unknown``."""
    source: str
    """Where it came from, for people; nothing acts on it."""
    files: tuple[FileEntry, ...]
    """Ascending by path."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ModelError(
                f"{self.name!r} is no model name", hint="use lower-case letters, digits, '.', '-' and '_' (at most 96)"
            )
        if not 1 <= self.context_length <= 1 << 30:
            raise ModelError(f"context_length {self.context_length} is out of range")
        for field in ("architecture", "dtype", "license", "source"):
            if len(getattr(self, field)) > 256:
                raise ModelError(f"manifest field {field} is longer than 256 characters")
        if not 0 < len(self.files) <= MAX_FILES:
            raise ModelError(f"a manifest lists 1 to {MAX_FILES} files, not {len(self.files)}")
        paths = [entry.path for entry in self.files]
        if paths != sorted(set(paths)):
            raise ModelError("manifest files must be in ascending order, each once")
        for entry in self.files:
            if not _PATH.fullmatch(entry.path) or not 0 <= entry.size <= MAX_FILE_SIZE:
                raise ModelError(f"manifest file {entry.path[:140]!r} has a bad name or size")
            if not _SHA256.fullmatch(entry.sha256):
                raise ModelError(f"manifest file {entry.path!r} has no sha256")

    def canonical(self) -> bytes:
        """The bytes that `id` hashes and that ``manifest.json`` holds."""
        return json.dumps(
            {"version": VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"), ensure_ascii=True
        ).encode()

    @property
    def id(self) -> ModelId:
        return ModelId.of_manifest(self.canonical())

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read canonical bytes. Raises `ModelError` for anything that is not exactly what `canonical` would write."""
        if len(data) > MAX_BYTES:
            raise ModelError(f"the manifest is larger than {MAX_BYTES} bytes")
        try:
            raw = nesting.loads(data)
            manifest = cls._from_json(raw)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(f"the manifest is malformed: {error}"[:300]) from None
        if manifest.canonical() != data:
            raise ModelError("the manifest is not in canonical form")
        return manifest

    @classmethod
    def _from_json(cls, raw: Mapping[str, Any]) -> Manifest:
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']!r} is not {VERSION}")
        text = {name: raw[name] for name in ("name", "architecture", "dtype", "license", "source")}
        files = tuple(FileEntry(**entry) for entry in raw["files"])
        strings = [*text.values(), *(entry.path for entry in files), *(entry.sha256 for entry in files)]
        numbers = [raw["context_length"], *(entry.size for entry in files)]
        if not all(type(s) is str for s in strings) or not all(type(n) is int for n in numbers):
            raise TypeError("a field has the wrong type")
        return cls(context_length=raw["context_length"], files=files, **text)
