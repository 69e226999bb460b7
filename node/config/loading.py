"""From the sources to one `Config`: for every setting the first source that has it.

Rules
- Precedence: flag > `GRISTMILL_*` environment > project file `gristmill.toml` > user file > what `devnet up` left (only on the
  network `devnet`, only the two keys of the chain) > default.
- The user file is `<data_dir>/config.toml` when flag or environment name a data dir, so that `--data-dir` moves everything;
  otherwise `$XDG_CONFIG_HOME/gristmill/config.toml`.
- What does not fit together is refused last, when everything is known.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from node.config import consistency
from node.config.config import FAMILIES, FAMILY_MAX, KEYS, SECTIONS, Config, own_keys
from node.config.folders import default_data_dir, user_file
from node.config.sources import Source, from_devnet, from_environment, from_file, from_flags, pick
from node.errors import ConfigError

PROJECT_FILE: Final = "gristmill.toml"


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    project: Path | None = None,
    project_folder: Path | None = None,
) -> Config:
    """The effective configuration. `flags`: values by dotted name. `project`: read this file, which must exist, instead of
    `gristmill.toml` in `project_folder` (default: the current folder).

    Raises ConfigError naming origin and key for an unknown key, a wrong type or a value out of bounds.
    """
    environ = os.environ if environ is None else environ
    sources = [from_flags(flags or {}), from_environment(environ)]
    moved = any("data_dir" in source.values for source in sources)
    named = project or (Path(environ["GRISTMILL_CONFIG"]) if environ.get("GRISTMILL_CONFIG") else None)
    found = from_file((named or (project_folder or Path.cwd()) / PROJECT_FILE).absolute())
    if named is not None and found is None:
        raise ConfigError(f"{named} does not exist")
    sources += [found] if found else []
    user = user_file(pick(sources, "data_dir")[0] if moved else None, environ)
    found = from_file(user)
    sources += [found] if found else []
    left = from_devnet(pick(sources, "data_dir")[0] or default_data_dir(), pick(sources, "network")[0])
    sources += [left] if left else []
    config = _put_together(sources, user)
    consistency.check(config)
    return config


def _put_together(sources: list[Source], user: Path) -> Config:
    own = {family: _names(sources, family) for family in FAMILIES}
    picked = {name: pick(sources, name) for name in (*KEYS, *(key.name for key in own_keys(own)))}
    sections: dict[str, dict[str, Any]] = {name: {} for name in ("", *SECTIONS)}
    for name, (value, _) in picked.items():
        section, _, last = name.rpartition(".")
        sections.setdefault(section, {})[last] = value
    kinds = {one.name: one.default_factory for one in fields(Config)}
    made = {name: kinds[name](**sections[name]) for name in SECTIONS}  # type: ignore[operator]
    families = {
        family: {name: FAMILIES[family](**sections[f"{family}.{name}"]) for name in names}
        for family, names in own.items()
    }
    origins = {name: origin for name, (_, origin) in picked.items()}
    return Config(**sections[""], **made, **families, origins=origins, user_file=user)


def _names(sources: list[Source], family: str) -> list[str]:
    """The tables of a family, over all sources, in alphabetical order. Raises ConfigError when there are too many."""
    names = {key.split(".")[1] for source in sources for key in source.values if key.startswith(f"{family}.")}
    if len(names) > FAMILY_MAX:
        raise ConfigError(f"{len(names)} tables [{family}.NAME], at most {FAMILY_MAX} are taken")
    return sorted(names)
