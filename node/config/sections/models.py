"""`[models]`: the model store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from node.settings import setting


@dataclass(frozen=True, slots=True)
class ModelsConfig:
    """The model store."""

    folder: Path | None = setting(
        None, "Folder of the model store; empty means `models` in the data dir. Several data dirs may share one."
    )
