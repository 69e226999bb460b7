"""Who decides where a worker's earnings go: the cold owner, once and later; never the hot key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from node.chain.memory import MemoryChain, MemoryLedger
from node.cli import main as frame
from node.errors import ChainError, KeyError_
from node.ports import WorkerOnChain
from node.signer.bare import Bare
from node.testing.devnet.devnet import available
from node.worker.payout import needs_consent, payout_notice, set_payout
from protocol.ids import ZERO_ADDRESS, Address
from protocol.keys import PrivateKey

HOT, OWNER, THIEF = (PrivateKey(bytes([n]) * 32) for n in (0x31, 0x32, 0x33))
FIRST, SECOND = Address(b"\x91" * 20), Address(b"\x92" * 20)


def test_the_owner_registers_and_changes_the_payout() -> None:
    async def main() -> None:
        ledger = MemoryLedger()
        chain = MemoryChain(ledger, OWNER.address)
        assert await needs_consent(chain, HOT.address)
        assert await chain.worker(HOT.address) == WorkerOnChain(ZERO_ADDRESS, False, ZERO_ADDRESS, 0)
        first = await set_payout(chain, HOT.address, FIRST, Bare(HOT))
        assert first is not None and first.purpose == "register"
        assert await chain.worker(HOT.address) == WorkerOnChain(OWNER.address, True, FIRST, 1)
        assert await chain.payout_of(HOT.address) == FIRST
        assert await set_payout(chain, HOT.address, FIRST) is None
        change = await set_payout(chain, HOT.address, SECOND)  # the hot key is not needed any more
        assert change is not None and change.purpose == "set_payout"
        assert await chain.payout_of(HOT.address) == SECOND
        args = {"hotKey": HOT.address, "previous": FIRST, "payout": SECOND}
        assert [(event.name, event.args) for event in ledger.canonical_events()][-1] == ("PayoutSet", args)
        with pytest.raises(ChainError, match="Workers_ZeroAddress"):
            await set_payout(chain, HOT.address, ZERO_ADDRESS)

    trio.run(main)


def test_a_stolen_hot_key_moves_nothing() -> None:
    async def main() -> None:
        ledger = MemoryLedger()
        await set_payout(MemoryChain(ledger, OWNER.address), HOT.address, FIRST, Bare(HOT))
        for account in (HOT, THIEF):
            chain = MemoryChain(ledger, account.address)
            with pytest.raises(KeyError_):
                await set_payout(chain, HOT.address, SECOND, Bare(HOT))
            assert (await chain.set_payout(HOT.address, SECOND)).error == "Workers_NotOwner"
        assert await chain.payout_of(HOT.address) == FIRST

    trio.run(main)


def test_the_hot_key_never_becomes_its_own_owner() -> None:
    async def main() -> None:
        chain = MemoryChain(MemoryLedger(), HOT.address)
        with pytest.raises(KeyError_, match="the owner key is the worker's hot key"):
            await set_payout(chain, HOT.address, FIRST, Bare(HOT))
        assert (await chain.worker(HOT.address)).owner == ZERO_ADDRESS

    trio.run(main)


def test_registering_needs_the_workers_consent() -> None:
    async def main() -> None:
        chain = MemoryChain(MemoryLedger(), OWNER.address)
        for key in (None, THIEF):
            with pytest.raises(KeyError_, match="must consent"):
                await set_payout(chain, HOT.address, FIRST, key and Bare(key))

    trio.run(main)


def test_a_start_says_where_earnings_go_and_sends_nothing() -> None:
    async def main() -> None:
        ledger = MemoryLedger()
        chain = MemoryChain(ledger, HOT.address)
        assert "worker's own account" in await payout_notice(chain, HOT.address, None)
        assert f"`gristmill payout set {FIRST}`" in await payout_notice(chain, HOT.address, FIRST)
        await set_payout(MemoryChain(ledger, OWNER.address), HOT.address, FIRST, Bare(HOT))
        height = ledger.head.number
        assert await payout_notice(chain, HOT.address, FIRST) == await payout_notice(chain, HOT.address, None) == ""
        changed = await payout_notice(chain, HOT.address, SECOND)
        assert f"earnings go to {FIRST}" in changed and f"`gristmill payout set {SECOND}`" in changed
        assert ledger.head.number == height

    trio.run(main)


@pytest.mark.skipif(not available(), reason="no simulated chain on this machine (anvil or py-evm)")
def test_the_command_on_a_real_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        status = frame.main(["--json", "--data-dir", str(folder), *arguments])
        return status, json.loads(capfd.readouterr().out)

    run("init", "--role", "worker")
    status, error = run("payout", "set", str(FIRST))
    assert status == 4 and error["error"]["hint"] == "gristmill wallet new owner"
    run("devnet", "up")
    try:
        worker = run("payout", "show")[1]["worker"]
        assert run("payout", "show")[1] == {
            "chain": "default",
            "worker": worker,
            "payout": worker,
            "owner": None,
            "setting": None,
        }
        run("wallet", "new", "owner")
        status, error = run("payout", "set", str(FIRST))
        assert status == 8 and "nothing to pay gas with" in error["error"]["message"]
        owner = run("wallet", "address", "owner")[1]["address"]
        assert run("devnet", "faucet", owner)[0] == 0
        assert run("payout", "set", str(FIRST))[1]["transactions"][0]["purpose"] == "register"
        (folder / "keys" / "worker.json").rename(tmp_path / "elsewhere.json")  # the owner decides without it
        status, done = run("payout", "set", str(SECOND), "--worker", worker)
        assert status == 0 and [one["purpose"] for one in done["transactions"]] == ["set_payout"]
        assert run("payout", "set", str(SECOND), "--worker", worker)[1]["changed"] is False
        shown = run("payout", "show", "--worker", worker)[1]
        assert shown["payout"] == str(SECOND) and shown["owner"] == owner
    finally:
        run("devnet", "down")
