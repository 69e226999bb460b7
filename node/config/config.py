"""The whole: `Config`, its sections put together, and the dotted name of everything in it.

Rules
- A section of `gristmill.toml` is a field of `Config`; the order of the fields is the order of the reference page.
- Two families of tables have names that the user gives, `[chains.NAME]` and `[tokens.NAME]`; each key of one is a setting like
  any other: `chains.NAME.poll_ms` has flag, variable, bounds and origin. `[chain]` and its token are called `default`.
- Values are checked where they are read; a `Config` only holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from node.config.bounds import DEFAULT, SHORT_NAME
from node.config.folders import default_data_dir, default_fence_dir
from node.config.sections.chain import ChainConfig
from node.config.sections.client import ClientConfig
from node.config.sections.engine import EngineConfig
from node.config.sections.keys import KeysConfig
from node.config.sections.models import ModelsConfig
from node.config.sections.openai import OpenAIConfig
from node.config.sections.p2p import P2PConfig
from node.config.sections.ray import RayConfig
from node.config.sections.telemetry import TelemetryConfig
from node.config.sections.tokens import TokenConfig
from node.config.sections.worker import WorkerConfig
from node.errors import ConfigError
from node.settings import METADATA, Setting, matching, setting

PREFIX: Final = "GRISTMILL_"


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, each checked. Made by `load`; the defaults alone are `Config(data_dir=...)`."""

    data_dir: Path = setting(None, "Folder of everything: keys, journal, models. `--data-dir` moves it.")
    fence_dir: Path | None = setting(
        None,
        "Folder that remembers how far each key's journal had come, so that an old copy is refused. Keep it out of the data "
        "dir and of its backups. Empty: `gristmill/fence` in the user's state folder (`$XDG_STATE_HOME`).",
    )
    network: str = setting(
        "devnet",
        "Name of the network. `devnet` is the chain that `devnet up` starts on this machine.",
        check=matching(r"[a-z][a-z0-9-]{0,31}", "a name of lower-case letters, digits and hyphens"),
        values="a name",
    )
    chain: ChainConfig = field(default_factory=ChainConfig)
    chains: Mapping[str, ChainConfig] = field(default_factory=dict)
    """Further chains by name."""
    tokens: Mapping[str, TokenConfig] = field(default_factory=dict)
    """Further tokens by name."""
    p2p: P2PConfig = field(default_factory=P2PConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    keys: KeysConfig = field(default_factory=KeysConfig)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """By key: where its value came from, e.g. `default`, `flag`, `environment GRISTMILL_NETWORK` or a file's path."""
    user_file: Path | None = field(default=None, compare=False)
    """Where the user's settings are read from, whether the file exists or not; `init` writes it."""

    def __post_init__(self) -> None:
        if self.data_dir is None:
            object.__setattr__(self, "data_dir", default_data_dir())
        for name in ("origins", *FAMILIES):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def get(self, key: str) -> Any:
        """The value of a setting by its dotted name."""
        *sections, name = key.split(".")
        of: Any = self
        for section in sections:
            of = of[section] if isinstance(of, Mapping) else getattr(of, section)
        return getattr(of, name)

    def keys_in_use(self) -> list[Key]:
        """All settings, those of the user's own tables included."""
        return [*KEYS.values(), *own_keys({family: getattr(self, family) for family in FAMILIES})]

    @property
    def chain_names(self) -> tuple[str, ...]:
        """All chains, the first one first."""
        return (DEFAULT, *self.chains)

    def chain_named(self, name: str) -> ChainConfig:
        """Raises ConfigError when no chain has that name."""
        if name != DEFAULT and name not in self.chains:
            raise ConfigError(f"no chain is called {name!r}", hint=f"there are {', '.join(self.chain_names)}")
        return self.chain if name == DEFAULT else self.chains[name]

    @property
    def keys_dir(self) -> Path:
        return self.data_dir / "keys"

    @property
    def models_dir(self) -> Path:
        return self.models.folder or self.data_dir / "models"

    @property
    def benchmarks_dir(self) -> Path:
        """What `bench` measured and signed."""
        return self.data_dir / "benchmarks"

    @property
    def devnet_state(self) -> Path:
        """What `devnet up` writes and `devnet down` removes."""
        return self.data_dir / "devnet" / "state.json"

    def signer_table(self, role: str) -> Path:
        """What the signer of a role has signed; the name is the journal's."""
        return self.data_dir / "signer" / f"{role}.sqlite"

    def journal(self, role: str) -> Path:
        """The journal of a role: `worker`, `client`, `owner` or `deployer`."""
        return self.data_dir / "journal" / f"{role}.sqlite"

    def fence(self, role: str, account: str) -> Path:
        """The fence of an account's journal in a role. `account`: its address."""
        return (self.fence_dir or default_fence_dir()) / f"{role}-{account.lower()}.json"


@dataclass(frozen=True, slots=True)
class Key:
    """One setting as the tables and the reference see it."""

    name: str
    """Dotted, e.g. `worker.tick_tokens`."""
    kind: str
    """The type's annotation."""
    default: Any
    setting: Setting

    @property
    def variable(self) -> str:
        return PREFIX + self.name.replace(".", "_").upper()


def _walk(of: Any, prefix: str = "") -> Iterator[Key]:
    for one in fields(of):
        if METADATA in one.metadata:
            yield Key(prefix + one.name, str(one.type), one.default, one.metadata[METADATA])
        elif one.default_factory is not dict and is_dataclass(one.default_factory):
            yield from _walk(one.default_factory, f"{prefix}{one.name}.")


KEYS: Final[Mapping[str, Key]] = MappingProxyType({key.name: key for key in _walk(Config)})
"""All settings by dotted name, in the order of their declaration."""
BY_VARIABLE: Final = MappingProxyType({key.variable: key for key in KEYS.values()})
SECTIONS: Final = tuple(dict.fromkeys(name.partition(".")[0] for name in KEYS if "." in name))
FAMILIES: Final[Mapping[str, type]] = MappingProxyType({"chains": ChainConfig, "tokens": TokenConfig})
"""Tables of tables, whose inner names are the user's."""
FAMILY_MAX: Final = 15
"""Names per family: with the default an offer's bound of 16."""


def family_keys(family: str, name: str) -> dict[str, Key]:
    """The settings of one table of a family, by dotted name. The documentation calls the table `NAME`."""
    prefix = f"{family}.{name}."
    return {key.name: key for key in _walk(FAMILIES[family], prefix)}


def own_keys(names: Mapping[str, Iterable[str]]) -> Iterator[Key]:
    for family, inside in names.items():
        for name in inside:
            yield from family_keys(family, name).values()


def find_key(name: str) -> Key | None:
    """The setting of a dotted name, in a fixed section or in a table of the user's."""
    family, _, rest = name.partition(".")
    if family in FAMILIES and re.fullmatch(SHORT_NAME, rest.partition(".")[0]):
        return family_keys(family, rest.partition(".")[0]).get(name)
    return KEYS.get(name)


def find_variable(variable: str) -> Key | None:
    """The setting of an environment variable. Names have no underscore, so `..._CHAINS_BASE_POLL_MS` has one meaning."""
    if variable in BY_VARIABLE:
        return BY_VARIABLE[variable]
    for family in FAMILIES:
        rest = variable.removeprefix(f"{PREFIX}{family.upper()}_")
        name, _, last = rest.lower().partition("_")
        if rest != variable and rest.isupper():
            return find_key(f"{family}.{name}.{last}")
    return None
