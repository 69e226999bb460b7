"""Find and run anvil, the fast simulated chain. 127.0.0.1 only, no state on disk, ended by its pid.

Looked for in order: GRISTMILL_ANVIL, the platform package under contracts/node_modules of a checkout, PATH. The npm package's
`.bin/anvil` is the binary itself, so nothing here needs Node.js.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path
from typing import Final

from node.errors import ChainError

CHAIN_ID: Final = 31337
_LISTENING: Final = re.compile(r"Listening on 127\.0\.0\.1:(\d+)")
_CPUS: Final = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def find_anvil() -> Path | None:
    """The anvil binary of this machine, or None. Raises `ChainError` when GRISTMILL_ANVIL names none."""
    named = os.environ.get("GRISTMILL_ANVIL")
    if named:
        path = Path(named)
        if not os.access(path, os.X_OK) or path.is_dir():
            raise ChainError(f"GRISTMILL_ANVIL names no program: {named}")
        return path
    package = f"anvil-{platform.system().lower()}-{_CPUS.get(platform.machine().lower(), 'unknown')}"
    modules = Path(__file__).resolve().parents[3] / "contracts" / "node_modules"
    for candidate in (modules / "@foundry-rs" / package / "bin" / "anvil", modules / ".bin" / "anvil"):
        if os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which("anvil")
    return Path(found) if found else None


def anvil_command(binary: Path, port: int = 0, chain_id: int = CHAIN_ID) -> list[str]:
    return [
        str(binary),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--chain-id", str(chain_id)),
        *("--hardfork", "prague"),
        *("--accounts", "3"),
        *("--balance", "10000"),
        *("--mnemonic", "test test test test test test test test test test test junk"),
    ]


def port_of(line: str) -> int | None:
    """The port that a line of anvil's output announces."""
    match = _LISTENING.search(line)
    return int(match.group(1)) if match else None
