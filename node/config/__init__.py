"""The configuration: one frozen `Config`, made once, in which every value knows where it came from.

Rules
- No secret is a setting. Passwords come from a file, a descriptor or the prompt.
- Amounts of money are whole numbers in the token's smallest unit.
- Nobody outside reads the environment or a file for a setting; `load` does, once.

    sections/        the settings, a file for each section
    bounds.py        names and bounds that several sections share
    config.py        the whole, and the dotted name of everything in it
    folders.py       where things lie when nobody says
    sources.py       flags, environment, files: raw values, every key known
    loading.py       which source wins
    consistency.py   what binds several settings
"""

from node.config.bounds import DEFAULT
from node.config.config import (
    FAMILIES,
    FAMILY_MAX,
    KEYS,
    PREFIX,
    SECTIONS,
    Config,
    Key,
    family_keys,
    find_key,
    find_variable,
)
from node.config.loading import PROJECT_FILE, load
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
from node.config.sections.worker import COMMITTEE, WorkerConfig
from node.config.sources import NOT_SETTINGS

__all__ = [
    "COMMITTEE",
    "DEFAULT",
    "FAMILIES",
    "FAMILY_MAX",
    "KEYS",
    "NOT_SETTINGS",
    "PREFIX",
    "PROJECT_FILE",
    "SECTIONS",
    "ChainConfig",
    "ClientConfig",
    "Config",
    "EngineConfig",
    "Key",
    "KeysConfig",
    "ModelsConfig",
    "OpenAIConfig",
    "P2PConfig",
    "RayConfig",
    "TelemetryConfig",
    "TokenConfig",
    "WorkerConfig",
    "family_keys",
    "find_key",
    "find_variable",
    "load",
]
