"""`stake` and `unstake` on real contracts: in, the way out with its delay, home; and every refusal with its reason."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node.chain.stakes import Stake
from node.cli import main as frame
from node.cli.staking import stake_text
from node.ports import TokenInfo
from node.testing.devnet.devnet import available
from protocol.ids import Address

pytestmark = pytest.mark.skipif(not available(), reason="no simulated chain on this machine (anvil or py-evm)")
Run = Callable[..., tuple[int, dict[str, Any]]]
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
    command("wallet", "new", "owner")  # after it, so that nobody has funded it
    yield command
    command("devnet", "down")


def advance(folder: Path, seconds: int) -> None:
    url = json.loads((folder / "devnet" / "state.json").read_text())["url"]
    for method, params in (("evm_increaseTime", [hex(seconds)]), ("evm_mine", [])):
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert "error" not in json.load(answer)


def test_a_stake_goes_in_and_comes_home(run: Run, tmp_path: Path) -> None:
    owner = run("wallet", "address", "owner")[1]["address"]
    status, error = run("stake", "1000")
    assert status == 8 and "nothing to pay gas with" in error["error"]["message"]
    run("devnet", "faucet", owner, "--tokens", "5000000")
    status, error = run("stake", "99000000")
    assert status == 8 and "99 tUSD" in error["error"]["message"] and "5 tUSD" in error["error"]["message"]

    status, done = run("stake", "3000000", "--exposure", "1000000")
    assert status == 0
    assert [one["purpose"] for one in done["transactions"]] == ["approve", "deposit", "stake", "set_exposure"]
    stake = done["stake"]
    assert (stake["active"], stake["exposure"], stake["symbol"]) == ("3000000", "1000000", "tUSD")

    assert run("stake", "0")[0] == run("unstake", "0")[0] == 2
    status, error = run("unstake", "3000001")
    assert status == 8 and "3 tUSD are staked" in error["error"]["message"]
    assert run("unstake")[1]["transactions"] == []
    status, done = run("unstake", "2000000")
    assert status == 0 and [one["purpose"] for one in done["transactions"]] == ["unstake"]
    free_at = done["stake"]["free_at"]
    assert (done["stake"]["active"], done["stake"]["unbonding"]) == ("1000000", "2000000")

    assert run("unstake")[1]["transactions"] == []  # too early: nothing is sent, nothing is lost
    advance(tmp_path / "data", 51 * DAY)
    assert run("unstake")[1]["transactions"] == []
    advance(tmp_path / "data", DAY)
    status, done = run("unstake")
    assert status == 0 and [one["purpose"] for one in done["transactions"]] == ["withdraw_stake"]
    assert (done["stake"]["unbonding"], done["stake"]["free_at"]) == ("0", free_at)

    # What came home is vault balance, so staking it again needs no deposit.
    assert [one["purpose"] for one in run("stake", "2000000")[1]["transactions"]] == ["stake"]
    assert run("stake")[1]["stake"]["active"] == "3000000"


def test_a_request_id_makes_one_deposit_of_two_commands(run: Run, tmp_path: Path) -> None:
    first = run("deposit", "700", "--id", "monday")[1]
    assert [one["purpose"] for one in first["transactions"]] == ["approve", "deposit"]
    assert run("deposit", "700", "--id", "monday")[1] == first
    status, error = run("deposit", "701", "--id", "monday")
    assert status == 6 and error["error"]["code"] == "request_conflict"
    taken = run("withdraw", "700", "--id", "friday")[1]
    assert taken["vault_balance"] == "0"
    assert run("withdraw", "700", "--id", "friday")[1] == taken
    assert run("withdraw", "--id", "friday")[0] == 2
    assert run("deposit", "700", "--id", "monday")[1]["vault_balance"] == "0"


def test_a_request_id_makes_one_stake_of_two_commands(run: Run, tmp_path: Path) -> None:
    run("devnet", "faucet", run("wallet", "address", "owner")[1]["address"], "--tokens", "5000000")
    first = run("stake", "3000000", "--id", "monday")[1]
    assert [one["purpose"] for one in first["transactions"]] == ["approve", "deposit", "stake"]
    again = run("stake", "3000000", "--id", "monday")[1]
    assert again == {**first, "transactions": first["transactions"][2:]}
    status, error = run("stake", "1000000", "--id", "monday")
    assert status == 6 and error["error"]["code"] == "request_conflict"
    assert run("stake", "--id", "tuesday")[0] == 2

    out = run("unstake", "2000000", "--id", "friday")[1]
    assert run("unstake", "2000000", "--id", "friday")[1] == out, "it could not be done twice: 1 tUSD is left"
    assert run("unstake", "--id", "friday")[0] == 2
    assert run("stake")[1]["stake"]["unbonding"] == "2000000"


def test_the_words_say_what_can_be_taken_and_when() -> None:
    info = TokenInfo(Address(b"\7" * 20), "tUSD", 6)
    stake = Stake(active=1_000_000, unbonding=2_000_000, held=500_000, exposure=500_000, free_at=DAY, locked=1_500_000)
    assert stake.withdrawable == 1_500_000
    early, late = stake_text(stake, info, DAY - 1), stake_text(stake, info, DAY)
    assert "1.5 tUSD can be taken home from 1970-01-02 00:00 UTC" in early
    assert "1.5 tUSD can be taken home now" in late
    assert "unbonding" not in stake_text(Stake(1, 0, 0, 0, 0, 0), info, 0)
