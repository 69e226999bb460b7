"""Processes on three simulated chains: one worker that is paid on two of them, in two tokens on each.

The contracts stand at the same addresses on all three, because one deployer made them in one order; only the chain ids differ.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.config import load
from node.testing.devnet.devnet import available

MODEL = "smollm2-135m-instruct"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GRISTMILL_") or k == "GRISTMILL_ANVIL"}
COIN = "0x" + 40 * "0"
CHAINS = {"one": 31337, "two": 41337, "three": 51337}


def _model_stored() -> bool:
    try:
        from node.models.store import ModelStore

        return any(manifest.name == MODEL for manifest in ModelStore(load({}).models_dir).list())
    except Exception:
        return False


pytestmark = [
    pytest.mark.skipif(not available(), reason="no simulated chain: neither anvil nor the embedded one is installed"),
    pytest.mark.skipif(not _model_stored(), reason=f"{MODEL} is not in the model store: scripts/setup prepares it"),
    pytest.mark.slow,
]


def words(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "node", "--json", "--data-dir", str(folder), *more]


def gristmill(folder: Path, *more: str, status: int = 0) -> list[dict[str, Any]]:
    """Run one command with --json; its lines. It must end with `status`."""
    done = subprocess.run(
        words(folder, *more), env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == status, (more, rows, done.stderr.decode()[-2000:])
    assert b"Traceback" not in done.stderr, done.stderr.decode()[-3000:]
    return rows


class World:
    """Three chains, a worker's folder and three clients', each with its configuration in a file."""

    def __init__(self, folder: Path) -> None:
        self.worker = folder / "worker"
        self.clients = {name: folder / f"client-{name}" for name in CHAINS}
        self.chains = {name: folder / f"chain-{name}" for name in CHAINS}
        accounts = {}
        for data, role in ((self.worker, "worker"), *((one, "client") for one in self.clients.values())):
            (made,) = gristmill(data, "init", "--network", "local", "--role", role, *self.password(data))
            accounts[data] = [key["address"] for key in made["keys"]]
        self.states = {}
        for name, data in self.chains.items():
            funded = [*accounts[self.worker], *accounts[self.clients[name]]]
            fund = [word for account in funded for word in ("--fund", account)]
            (self.states[name],) = gristmill(data, "devnet", "up", "--chain-id", str(CHAINS[name]), *fund)
        self.write(self.worker, self.chain("chain", "one"), self.chain("chains.two", "two"), self.accepted())
        for name, data in self.clients.items():
            self.write(
                data, self.chain("chain", name), self.coin("default"), '[client]\npay_with = ["default", "coin"]'
            )

    @staticmethod
    def password(data: Path) -> list[str]:
        """On a network other than devnet nobody makes a password for us. (Cheap to open: every command does.)"""
        data.mkdir(mode=0o700)
        file = data / "password"
        file.touch(mode=0o600)
        file.write_text("a password of the tests\n")
        return ["--password-file", str(file), "--set", "keys.scrypt_n=4096"]

    def chain(self, section: str, name: str) -> str:
        state = self.states[name]
        return f'[{section}]\nrpc_urls = ["{state["url"]}"]\ndeployment = "{state["deployment"]}"\npoll_ms = 20'

    @staticmethod
    def coin(chain: str, name: str = "coin") -> str:
        return (
            f'[tokens.{name}]\nchain = "{chain}"\naddress = "{COIN}"\nprice_output = 4_000_000\nprice_input = 1_000_000\n'
            "global_credit = 1_000_000\nclaim_min = 100_000\nallocation = 2_000_000"
        )

    def accepted(self) -> str:
        usd = (
            '[tokens.usd2]\nchain = "two"\nprice_output = 500_000\nprice_input = 100_000\nglobal_credit = 100_000\n'
            "claim_min = 100_000\nallocation = 1_000_000"
        )
        accept = '[worker]\naccept = ["default", "coin1", "usd2", "coin2"]\n'
        return "\n".join([accept, usd, self.coin("default", "coin1"), self.coin("two", "coin2")])

    @staticmethod
    def write(data: Path, *sections: str) -> None:
        store = f'[models]\nfolder = "{load({}).models_dir}"\n[keys]\npassword_file = "{data / "password"}"'
        (data / "config.toml").write_text("\n".join(['network = "local"', *sections, store]) + "\n")

    def close(self) -> None:
        for data in self.chains.values():
            gristmill(data, "devnet", "down")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("chains")
    made = World(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


def chat(world: World, name: str, address: str, *more: str, status: int = 0) -> dict[str, Any]:
    asked = ("chat", MODEL, "What is a mill?", "--worker", address, "--max-tokens", "16", *more)
    return gristmill(world.clients[name], *asked, status=status)[-1]


def test_one_worker_two_chains_two_tokens_each(world: World) -> None:
    contracts = [json.loads(Path(state["deployment"]).read_text()) for state in world.states.values()]
    assert len({c["channels"] for c in contracts}) == 1 and len({c["chain_id"] for c in contracts}) == 3
    for name in ("one", "two"):
        gristmill(world.clients[name], "deposit", "5000000")
        gristmill(world.clients[name], "deposit", "5000000", "--token", "coin")
    process = subprocess.Popen(
        words(world.worker, "start"), env=ENVIRONMENT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready.get("event") == "ready", ready
        address = ready["addresses"][0]
        paid: dict[tuple[str, str], int] = {}
        for name, seen_as in (("one", "default"), ("two", "two")):
            for first, token in (("default", world.states[name]["token"]), ("coin", COIN)):
                answer = chat(world, name, address, "--set", f"client.pay_with={first}")
                assert answer["token"] == token and answer["usage"]["output_tokens"] > 0
                paid[seen_as, token] = int(answer["cost"])
        # Nobody on the third chain is served, and hears why.
        gristmill(world.clients["three"], "deposit", "5000000")
        error = chat(world, "three", address, status=5)["error"]
        assert error["code"] == "no_worker" and "no_common_chain" in error["hint"]
        assert "chain 31337, 41337, we pay on 51337" in error["hint"]
        assert gristmill(world.clients["three"], "channels", "list") == []
        # What the worker earned stands once for each chain and token.
        (status,) = gristmill(world.worker, "status")
        assert {(a["chain"], a["token"]): int(a["earned"]) for a in status["assets"]} == paid
        assert [c["chain_id"] for c in status["chains"]] == [31337, 41337]
        (only,) = gristmill(world.worker, "status", "--chain", "two")
        assert {a["chain"] for a in only["assets"]} == {c["name"] for c in only["chains"]} == {"two"}
        (claimed,) = gristmill(world.worker, "claim")
        assert {(a["chain"], a["token"]): int(a["amount"]) for a in claimed["totals"]} == paid
        (earned,) = gristmill(world.worker, "earnings")
        assert {(a["chain"], a["token"]): int(a["claimed"]) for a in earned["totals"]} == paid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0
    # Every journal is sound against every chain that it knows.
    assert gristmill(world.worker, "audit", "--role", "worker") == [{"audit": {"worker": "ok"}}]
    assert gristmill(world.worker, "audit", "--role", "worker", "--chain", "two") == [{"audit": {"worker": "ok"}}]
    for name in ("one", "two"):
        rows = gristmill(world.clients[name], "channels", "list")  # sees what was claimed meanwhile
        assert gristmill(world.clients[name], "audit") == [{"audit": {"client": "ok"}}]
        assert {row["token"] for row in rows} == {world.states[name]["token"], COIN}
        assert all(row["chain"] == "default" and row["claimed"] == row["spent"] for row in rows)


def test_commands_are_about_the_chain_and_the_token_that_they_name(world: World) -> None:
    client, two = world.clients["one"], world.states["two"]
    both = [
        *("--set", f"chains.two.rpc_urls={two['url']}", "--set", f"chains.two.deployment={two['deployment']}"),
        *("--set", "tokens.usd2.chain=two"),
    ]
    (taken,) = gristmill(client, "withdraw", "1000", "--token", "coin")
    assert (taken["chain"], taken["token"], taken["withdrawn"]) == ("default", COIN, "1000")
    (taken,) = gristmill(client, "withdraw", "1000", "--chain", "default")
    assert (taken["chain"], taken["token"]) == ("default", world.states["one"]["token"])
    # This client's account has nothing on the second chain: a deposit there does not reach into the first.
    for named in (["--chain", "two"], ["--token", "usd2"], ["--chain", "two", "--token", "usd2"]):
        (error,) = gristmill(client, *both, "deposit", "1000", *named, status=8)
        assert "holds 0" in error["error"]["message"]
    for wrong in (["--chain", "none"], ["--token", "none"], ["--chain", "default", "--token", "usd2"]):
        (error,) = gristmill(client, *both, "deposit", "1000", *wrong, status=3)
        assert error["error"]["code"] == "config"
    assert gristmill(client, *both, "channels", "list", "--chain", "two") == []
    (shown,) = gristmill(world.worker, "payout", "show", "--chain", "two")
    assert shown["chain"] == "two" and shown["payout"] == shown["worker"]


def test_a_worker_whose_second_chain_is_away_does_not_start(world: World) -> None:
    """With a chain missing, money could be overlooked."""
    (error,) = gristmill(world.worker, "--set", "chains.two.rpc_urls=http://127.0.0.1:9", "start", status=6)
    assert error["error"]["code"] == "chain"


def test_one_chain_under_two_names_is_refused(world: World) -> None:
    state = world.states["one"]
    twice = [
        *("--set", f"chains.two.rpc_urls={state['url']}"),
        *("--set", f"chains.two.deployment={state['deployment']}"),
    ]
    (error,) = gristmill(world.worker, *twice, "start", status=3)
    assert "both have the chain id 31337" in error["error"]["message"]


def test_the_doctor_asks_every_chain(world: World) -> None:
    (report,) = gristmill(world.worker, "doctor")
    chains = {check["check"]: check for check in report["checks"] if check["check"].startswith("chain")}
    assert {name: check["status"] for name, check in chains.items()} == {"chain": "pass", "chains.two": "pass"}
    assert "chain 41337" in chains["chains.two"]["detail"]
