"""Where raw values come from: flags, the environment, a file, a running devnet. Every key of a source is known.

Rules
- A key that nobody knows is an error that names file and key; a typing error must never run with the default.
- A file that another user can write is refused: it decides where money goes.
- A value is parsed and checked when it is picked, so that an error can say where it came from.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from node import nesting
from node.config.bounds import DEFAULT, SHORT_NAME
from node.config.config import (
    BY_VARIABLE,
    FAMILIES,
    KEYS,
    PREFIX,
    SECTIONS,
    Key,
    family_keys,
    find_key,
    find_variable,
)
from node.errors import ConfigError

NOT_SETTINGS: Final = frozenset(
    {
        "GRISTMILL_ANVIL",
        "GRISTMILL_CONFIG",
        "GRISTMILL_DEBUG",
        "GRISTMILL_DEMO_STARTED",
        "GRISTMILL_FAULT",
        "GRISTMILL_NODE_TRIED",
        "GRISTMILL_TESTING",
    }
)
"""Variables of ours that are no settings."""
MAX_FILE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Raw values of one origin."""

    origin: str
    folder: Path
    """Where relative paths start."""
    values: Mapping[str, object]

    def where(self, key: str) -> str:
        return self.origin if self.origin != "environment" else f"environment {_key(key).variable}"


def _key(name: str) -> Key:
    """A setting that is known to exist."""
    found = find_key(name)
    if found is None:
        raise KeyError(name)
    return found


def _near(name: str, known: Mapping[str, object]) -> str:
    last = {key.rpartition(".")[2]: key for key in known}
    found = difflib.get_close_matches(name, known, 1, 0.6) or difflib.get_close_matches(
        name.rpartition(".")[2], last, 1, 0.6
    )
    return last.get(found[0], found[0]) if found else ""


def _unknown(origin: str, name: str, known: Mapping[str, object]) -> ConfigError:
    near = _near(name, known)
    hint = f"did you mean {near}?" if near else "`gristmill config show` lists all keys"
    return ConfigError(f"{origin}: unknown key {name[:100]!r}", hint=hint)


def _flat(table: Mapping[str, object], origin: str) -> dict[str, object]:
    """TOML tables as dotted keys; every key is known afterwards."""
    flat: dict[str, object] = {}
    for name, value in table.items():
        if name in SECTIONS:
            flat.update(_inner(name, value, origin))
        elif name in FAMILIES:
            for inner, deeper in _inner(name, value, origin).items():
                flat.update(_inner(inner, deeper, origin))
        else:
            flat[name] = value
    for name in flat:
        _check_known(name, origin)
    return flat


def _inner(section: str, table: object, origin: str) -> dict[str, object]:
    if not isinstance(table, dict):
        raise ConfigError(f"{origin}: {section} is a section", hint=f"write [{section}] on a line of its own")
    return {f"{section}.{name}": value for name, value in table.items()}


def _check_known(name: str, origin: str) -> None:
    """Raises ConfigError when no setting has this name."""
    family, _, rest = name.partition(".")
    if family not in FAMILIES:
        if name not in KEYS:
            raise _unknown(origin, name, {**KEYS, **dict.fromkeys((*SECTIONS, *FAMILIES))})
        return
    own = rest.partition(".")[0]
    if not re.fullmatch(SHORT_NAME, own) or own == DEFAULT:
        hint = "a name has at most 16 lower-case letters and digits"
        raise ConfigError(
            f"{origin}: {family}.{own[:40]} cannot be called that",
            hint=f"`default` is [chain] and its token; {hint}" if own == DEFAULT else hint,
        )
    if find_key(name) is None:
        raise _unknown(origin, name, family_keys(family, own))


def from_file(path: Path) -> Source | None:
    """A TOML file of settings, or None when it does not exist. Raises ConfigError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is not a file")
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002:
            raise ConfigError(
                f"{path} can be written by another user; it decides where money goes",
                hint=f"read it, then: chown $(id -u) {path} && chmod go-w {path}",
            )
        if found.st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes")
        table = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML and UTF-8 errors are ValueErrors
        raise ConfigError(f"{path} is not valid TOML: {str(error)[:200]}") from None
    return Source(str(path), path.parent, _flat(table, str(path)))


def from_flags(flags: Mapping[str, object]) -> Source:
    """Values by dotted name; None stands for a flag that was not given. Raises ConfigError."""
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given:
        _check_known(name, "flag")
    return Source("flag", Path.cwd(), given)


def from_environment(environ: Mapping[str, str]) -> Source:
    values: dict[str, object] = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name in NOT_SETTINGS:
            continue
        key = find_variable(name)
        if key is not None:
            _check_known(key.name, "environment")
            values[key.name] = value
        elif name.startswith(
            tuple(f"{PREFIX}{one.upper()}_" for one in (*SECTIONS, *FAMILIES))
        ) or difflib.get_close_matches(name, BY_VARIABLE, 1, 0.85):
            raise _unknown("environment", name, BY_VARIABLE)
    return Source("environment", Path.cwd(), values)


def from_devnet(data_dir: Path, network: str) -> Source | None:
    """The chain that `devnet up` left running for this data dir."""
    path = data_dir / "devnet" / "state.json"
    if network != "devnet":
        return None
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("too large")
        state = nesting.loads(path.read_bytes())
        values = {"chain.rpc_urls": [state["url"]], "chain.deployment": state["deployment"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}", hint=f"rm {path}; gristmill devnet up") from None
    return Source(str(path), path.parent, values)


def pick(sources: list[Source], name: str) -> tuple[Any, str]:
    """The checked value of the first source that has the key, and where it came from."""
    key = _key(name)
    for source in sources:
        if name in source.values:
            try:
                return key.setting.parse(key.kind, source.values[name], source.folder), source.where(name)
            except ValueError as error:
                what = key.setting.doc + (f" Unit: {key.setting.unit}." if key.setting.unit else "")
                raise ConfigError(f"{source.where(name)}: {name} {error}", hint=what) from None
    return key.default, "default"
