"""`deploy` on a simulated chain: contracts, hand-over, the wait, and the timelock as the vault's admin in the end."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node.chain.artifacts import contract
from node.chain.governance import DEFAULT_ADMIN, GUARDIAN, TOKEN_ADMIN
from node.cli import main as frame
from node.testing.devnet.devnet import available
from protocol.ids import ZERO_ADDRESS, Address

pytestmark = pytest.mark.skipif(not available(), reason="no simulated chain on this machine (anvil or py-evm)")
Run = Callable[..., tuple[int, dict[str, Any]]]
HOLDER, GUARD = Address(b"\x71" * 20), Address(b"\x72" * 20)
DAY = 86_400


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        status = frame.main(["--json", "--data-dir", str(tmp_path / "data"), "--set", "keys.scrypt_n=4096", *arguments])
        return status, json.loads(capfd.readouterr().out)

    command("init")
    command("devnet", "up")
    command("wallet", "new", "deployer")
    yield command
    command("devnet", "down")


class Net:
    def __init__(self, folder: Path) -> None:
        self.url = json.loads((folder / "data" / "devnet" / "state.json").read_text())["url"]

    def ask(self, method: str, *params: Any) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["result"]

    def view(self, name: str, to: str, function: str, *args: Any) -> Any:
        shipped = contract(name)
        call = {"to": to, "data": "0x" + shipped.encode(function, *args).hex()}
        return shipped.decode(function, bytes.fromhex(self.ask("eth_call", call, "latest")[2:]))[0]

    def advance(self, seconds: int) -> None:
        self.ask("evm_increaseTime", hex(seconds))
        self.ask("evm_mine")


def test_a_network_from_deployment_to_its_users(run: Run, tmp_path: Path) -> None:
    net = Net(tmp_path)
    chain_id = str(int(net.ask("eth_chainId"), 16))
    here = ["deploy", "contracts", "--chain-id", chain_id, "--out", "network.json"]
    status, error = run(*here)
    assert status == 8, error
    assert "nothing to pay gas with" in error["error"]["message"]
    deployer = run("wallet", "address", "deployer")[1]["address"]
    run("devnet", "faucet", deployer)
    status, error = run("deploy", "contracts", "--chain-id", "7", "--out", "network.json")
    assert status != 0 and "chain" in error["error"]["message"]
    status, error = run(*here, "--token", str(HOLDER))
    assert status != 0 and "no contract at" in error["error"]["message"]
    assert run(*here, "--seat-bond", "100", "--leave-days", "5")[0] == 2
    assert run(*here, "--seat-bond", "100", "--quorum", "16")[0] == 2
    assert not Path("network.json").exists()

    token = json.loads((tmp_path / "data" / "devnet" / "deployment.json").read_text())["token"]
    status, made = run(*here, "--token", token, "--seat-bond", "10_000")
    assert status == 0
    assert 0 < made["gas_used"] < 20_000_000
    vault = made["vault"]
    assert json.loads(Path("network.json").read_text())["committee"] == made["committee"] != str(ZERO_ADDRESS)
    modules = [made[name] for name in ("channels", "workers", "jobs", "disputes", "committee")]
    assert all(net.view("Vault", vault, "isModule", Address(module)) for module in modules)
    assert net.view("Committee", made["committee"], "parameters") == (10_000, 15, 8, 3 * DAY, DAY, 21 * DAY)
    assert run(*here)[0] == 2  # never written over

    give = ["deploy", "hand-over", "--deployment", "network.json", "--votes-to", str(HOLDER), "--guardian", str(GUARD)]
    status, governance = run(*give)
    assert status == 0
    timelock = Address(governance["timelock"])
    assert 0 < governance["gas_used"] < 12_000_000
    status, error = run(*give)
    assert status != 0 and "has begun and is not over" in error["error"]["message"]
    assert net.view("MillToken", governance["votes"], "balanceOf", HOLDER) == 10**27
    roles = {(TOKEN_ADMIN, timelock), (GUARDIAN, GUARD), (DEFAULT_ADMIN, Address(deployer))}
    for role in (TOKEN_ADMIN, GUARDIAN, DEFAULT_ADMIN):
        for account in (timelock, GUARD, Address(deployer), Address(governance["governor"])):
            assert net.view("Vault", vault, "hasRole", role, account) is ((role, account) in roles)

    last = ["deploy", "accept", str(timelock), "--deployment", "network.json"]
    status, error = run(*last)
    assert status != 0 and "TimelockUnexpectedOperationState" in error["error"]["message"]
    net.advance(2 * DAY + 2)
    status, done = run(*last)
    assert status == 0 and done["admin"] == str(timelock)
    assert net.view("Vault", vault, "defaultAdmin") == timelock
    assert not net.view("Vault", vault, "hasRole", DEFAULT_ADMIN, Address(deployer))
    status, error = run(*give)
    assert status != 0 and "is not the admin of the vault" in error["error"]["message"]
