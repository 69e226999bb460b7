"""All of these tests run the shipped bytecode; `CONTRACT_ARTIFACTS` points them at a mutant's instead."""

from __future__ import annotations

import os
from pathlib import Path

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
