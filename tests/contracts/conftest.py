"""All of these tests run the shipped bytecode; `CONTRACT_ARTIFACTS` points them at a mutant's instead."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from node.testing.evm import ARTIFACTS


@pytest.fixture(scope="session")
def artifacts() -> Path:
    return Path(os.environ.get("CONTRACT_ARTIFACTS", ARTIFACTS))


@pytest.fixture
def deployment(artifacts: Path):  # type: ignore[no-untyped-def]
    pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")
    from node.testing.contracts import Deployment

    return Deployment(artifacts)


@pytest.fixture
def puppet(artifacts: Path):  # type: ignore[no-untyped-def]
    """A deployment with a module that does what it is told."""
    pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")
    from node.testing.contracts import Deployment

    return Deployment(artifacts, puppet=True)


@pytest.fixture
def zoo() -> Callable[..., Any]:
    """Deploys a strange token or wallet of contracts/test/zoo: zoo(world, name, *arguments)."""

    def deploy(world: Any, name: str, *args: object) -> Any:
        artifact = json.loads((Path(__file__).parent / "zoo" / f"{name}.json").read_text())
        code = bytes.fromhex(artifact["bytecode"][2:])
        return world.evm.deploy_code(artifact["abi"], code, *args, sender=world.admin)

    return deploy
