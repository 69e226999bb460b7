"""The import contracts of .importlinter hold, and each one has been seen failing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PLANTED = {
    "pure": ("protocol/pricing.py", "import time"),
    "layers": ("node/store/ledger.py", "import node.worker.serve"),
    "engine": ("node/runtime/engine/__init__.py", "import protocol.ids"),
    "client": ("node/client/__init__.py", "import node.worker.serve"),
    "libp2p": ("node/cli/version.py", "import libp2p"),
    "web3": ("node/worker/serve.py", "import web3"),
}
"""By contract: a file, and a line that breaks that contract there."""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter in a folder; `-c` puts it before the installed packages."""
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def broken(output: str) -> set[str]:
    """The contracts that were reported broken, by their key."""
    names = dict(re.findall(r"\[importlinter:contract:(\w+)\]\nname = (.*)", (ROOT / ".importlinter").read_text()))
    return {key for key, name in names.items() if re.search(rf"^{re.escape(name)}.* BROKEN", output, re.MULTILINE)}


def test_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_contract_catches_its_planted_bug(tmp_path: Path) -> None:
    absent = [name for name, _ in PLANTED.values() if not (ROOT / name).exists()]
    if absent:
        pytest.skip(f"not there yet: {', '.join(absent)}")
    for package in ("node", "protocol"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    for name, line in PLANTED.values():
        path = tmp_path / name
        path.write_text(f"{path.read_text()}\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert broken(done.stdout) == set(PLANTED), done.stdout
