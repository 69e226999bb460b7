"""A process that sends transactions on a real simulated chain is killed, and started again: each call happens once (N4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from node.chain.client import EvmChain
from node.signer.bare import Bare
from node.testing.devnet.devnet import available, devnet
from protocol.keys import PrivateKey

ROOT = Path(__file__).parents[2]
KEY = PrivateKey(b"\x23" * 32)
pytestmark = pytest.mark.skipif(not available(), reason="no simulated chain on this machine (anvil or py-evm)")

CHILD = """
import sys
from pathlib import Path
import trio
from node.config import ChainConfig, Config
from node.signer.bare import Bare
from node.wiring import open_chain, open_journal
from protocol.keys import PrivateKey

folder, url, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = Config(data_dir=folder, chain=ChainConfig(rpc_urls=(url,), deployment=folder / "deployment.json"))
key = PrivateKey(bytes([0x23]) * 32)

async def main():
    with open_journal(config, "client", key.address) as ledger:
        async with open_chain(config, Bare(key), ledger) as chain:
            print("ready", flush=True)
            for n in range(first, first + count):
                for result in await chain.deposit(chain.token, 1 << n):
                    assert result.ok, result
                print("done", n, flush=True)

trio.run(main)
"""


def run_child(folder: Path, url: str, first: int, count: int, fault: str = "") -> tuple[int, list[int]]:
    """Exit status, and the deposits that it said were done."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state")}
    env |= {"GRISTMILL_TESTING": "1", "GRISTMILL_FAULT": fault} if fault else {}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), url, str(first), str(count)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode in (0, -signal.SIGKILL), child.stderr
    return child.returncode, [int(line.split()[1]) for line in child.stdout.splitlines() if line.startswith("done")]


@pytest.mark.parametrize(
    "fault", ["send.transaction:1", "send.transaction:2", "journal.after_commit:2", "journal.before_commit:3"]
)
def test_a_killed_sender_sends_each_call_once(fault: str, tmp_path: Path) -> None:
    """Every deposit is a power of two, so the vault's balance says which happened, and how often."""

    async def main() -> dict[str, Any]:
        async with devnet() as net:
            deployment = await net.deploy()
            await net.faucet(KEY.address, tokens=1 << 20)
            deployment.save(tmp_path / "deployment.json")
            chain = await EvmChain.connect([net.url], deployment, Bare(PrivateKey(b"\x24" * 32)), poll=0.01)
            try:
                status, done = await trio.to_thread.run_sync(run_child, tmp_path, net.url, 0, 4, fault)
                assert status == -signal.SIGKILL and len(done) < 4
                before = await chain.vault_balance(chain.token, KEY.address)
                status, again = await trio.to_thread.run_sync(run_child, tmp_path, net.url, 10, 1)
                after = await chain.vault_balance(chain.token, KEY.address)
                assert status == 0 and again == [10]
                nonce = await net.eth.nonce(KEY.address)
                assert nonce == await net.eth.nonce(KEY.address, "pending")
                return {"done": done, "before": before, "after": after}
            finally:
                await chain.aclose()

    found = trio.run(main)
    assert found["before"] >= sum(1 << n for n in found["done"]), "an acknowledged deposit is missing"
    made = found["after"] - (1 << 10)
    assert 0 <= made < 1 << 5, "a deposit happened twice"
    assert made & (sum(1 << n for n in found["done"])) == sum(1 << n for n in found["done"])
