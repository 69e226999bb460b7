"""OMP_WAIT_POLICY is PASSIVE before torch is loaded, whichever way in: torch reads it once, and spins where it is not."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "node").rglob("*.py"), *(ROOT / "protocol").rglob("*.py")])
LOADS_TORCH = ("torch", "safetensors.torch", "transformers", "facenet_pytorch", "silero_vad")
"""Modules that load torch, as far as product code may name them."""
SPY = """
import builtins, os, sys
real = builtins.__import__
def spy(name, *rest):
    if name.split(".")[0] == "torch" and "torch" not in sys.modules:
        print("torch with", os.environ.get("OMP_WAIT_POLICY"), flush=True)
        raise SystemExit(0)
    return real(name, *rest)
builtins.__import__ = spy
{entry}
print("no torch", flush=True)
"""
ENTRIES = {
    "engine": "import node.runtime.engine.engine",
    "back end": "from pathlib import Path; from node.runtime.backend import *; load_engine(Path('x'), EngineSettings())",
    "hardware": "from node.runtime.hal.probe_child import main; main()",
    "bench": "import node.runtime.bench.measure",
    "worker": "import node.app, node.runtime.engine.engine",
    "command": (
        "import sys; from node.cli.main import main; "
        "main(['bench', '--help']); import node.cli.bench, node.runtime.bench.arithmetic"
    ),
}


def imports_torch(source: str) -> bool:
    for one in ast.walk(ast.parse(source)):
        names = [alias.name for alias in one.names] if isinstance(one, ast.Import) else []
        names += [one.module or ""] if isinstance(one, ast.ImportFrom) and not one.level else []
        called = isinstance(one, ast.Call) and getattr(one.func, "attr", "") == "import_module" and one.args
        if called and isinstance(one.args[0], ast.Constant):  # type: ignore[union-attr]
            names.append(str(one.args[0].value))  # type: ignore[union-attr]
        if any(name == loads or name.startswith(f"{loads}.") for name in names for loads in LOADS_TORCH):
            return True
    return False


def test_only_modules_below_node_runtime_import_torch() -> None:
    """Python runs `node/runtime/__init__.py`, which sets the variable, before any of them. The rest imports it first."""
    found = {path.relative_to(ROOT) for path in FILES if imports_torch(path.read_text(encoding="utf-8"))}
    assert len(found) > 5, "the search finds what there is"
    first = "import node.runtime  # before torch"
    outside = {
        path for path in found if path.parts[:2] != ("node", "runtime") and first not in (ROOT / path).read_text()
    }
    assert outside == set()
    before = (ROOT / "node" / "runtime" / "__init__.py").read_text(encoding="utf-8")
    assert 'os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")' in before and "import node" not in before


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    import torch.nn", True),
        ("from safetensors.torch import load", True),
        ("import importlib\nimportlib.import_module('torch')", True),
        ("import torchlike, safetensors", False),
    ],
)
def test_the_search_sees_every_form(source: str, found: bool) -> None:
    assert imports_torch(source) is found


def torch_sees(entry: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SPY.format(entry=entry)],
        env={**{k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ENTRIES)
def test_torch_sees_the_variable_from_every_entry_point(name: str) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    assert torch_sees(ENTRIES[name]) == "torch with PASSIVE"


def test_what_the_operator_set_stays_and_the_spy_would_see_nothing_set() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    assert torch_sees("import node.runtime.engine.engine", OMP_WAIT_POLICY="ACTIVE") == "torch with ACTIVE"
    assert torch_sees("import torch") == "torch with None"


def test_a_child_of_the_node_inherits_it() -> None:
    child = "import subprocess, sys; code = 'import os; print(os.environ[chr(79)+\"MP_WAIT_POLICY\"])'"
    run = f"import node.runtime; {child}; subprocess.run([sys.executable, '-c', code], check=True)"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", run],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "PASSIVE"


def test_scripts_that_load_torch_set_it() -> None:
    """Benchmarks start their own processes; each sets it first, or imports node.runtime before torch."""
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if imports_torch(source):
            assert "OMP_WAIT_POLICY" in source or "import node.runtime" in source, path.name
