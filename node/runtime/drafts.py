"""Which model guesses for which (`engine.draft_models`), and whether it can.

Guesses are token ids, so both must mean the same by each: the same vocabulary, and as many rows of logits. The engine checks each
guess (`node.runtime.engine.draft`); a bad draft model costs time and never an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.runtime.footprint import read_config


@dataclass(eq=False, slots=True)
class Draft:
    """A draft model in the store."""

    manifest: Manifest
    folder: Path
    hashing: int | None = None
    proven: tuple[tuple[str, int, int, int], ...] = ()


def draft_of(store: ModelStore, drafts: Sequence[str], manifest: Manifest) -> Draft | None:
    """The draft model that the setting names for this model. Raises `ModelError` when there is none of that name, or it does not
    fit."""
    names = {manifest.name, str(manifest.id)}
    wanted = [draft for model, _, draft in (pair.partition("=") for pair in drafts) if model in names]
    if not wanted:
        return None
    found = store.resolve(wanted[-1])
    if found.id == manifest.id:
        raise ModelError(f"{manifest.name} cannot guess for itself", hint=_HINT)
    draft = Draft(found, store.path(found.id))
    _check(store.path(manifest.id), manifest, draft)
    return draft


def _check(folder: Path, manifest: Manifest, draft: Draft) -> None:
    pair = f"{draft.manifest.name} cannot guess for {manifest.name}"
    sizes = [read_config(one).get("vocab_size") for one in (folder, draft.folder)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"{pair}: it has {sizes[1]} tokens, not {sizes[0]}", hint=_HINT)
    hashes = [
        next((entry.sha256 for entry in one.files if entry.path == "tokenizer.json"), "")
        for one in (manifest, draft.manifest)
    ]
    if hashes[0] != hashes[1] and _vocabulary(folder) != _vocabulary(draft.folder):
        raise ModelError(f"{pair}: its tokenizer has another vocabulary", hint=_HINT)


def _vocabulary(folder: Path) -> dict[str, int]:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
    except Exception as error:  # the library raises bare Exception for a bad file
        raise ModelError(f"tokenizer.json cannot be read: {error}"[:300]) from None
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return vocabulary


_HINT = "engine.draft_models takes pairs of models of one family, with one tokenizer"
