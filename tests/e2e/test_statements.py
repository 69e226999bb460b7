"""Every command that moves money says what it will do, on stderr, before its first transaction; errors name their reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node.chain.txs import TxSender
from node.cli import main as frame
from node.testing.devnet.devnet import available

pytestmark = pytest.mark.skipif(not available(), reason="no simulated chain on this machine (anvil or py-evm)")
OTHER = "0x0000000000000000000000000000000000001234"
Run = Callable[..., tuple[dict[str, Any], list[str]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command; gives its result and what stood on stderr when each of its transactions was sent."""
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    send = TxSender.send

    async def watched(self: TxSender, purpose: str, *args: Any, **options: Any) -> Any:
        said.append(capfd.readouterr().err)
        return await send(self, purpose, *args, **options)

    monkeypatch.setattr(TxSender, "send", watched)

    def command(*arguments: str) -> tuple[dict[str, Any], list[str]]:
        capfd.readouterr()
        said.clear()
        frame.main(["--json", "--data-dir", str(tmp_path / "data"), "--set", "keys.scrypt_n=4096", *arguments])
        return json.loads(capfd.readouterr().out), list(said)

    command("init")
    command("devnet", "up")
    command("wallet", "new", "owner")
    owner = command("wallet", "address", "owner")[0]["address"]
    command("devnet", "faucet", owner, "--tokens", "5000000")
    yield command
    command("devnet", "down")


def test_commands_say_what_they_will_do_before_they_do_it(run: Run) -> None:
    address = {role: run("wallet", "address", role)[0]["address"] for role in ("payer", "worker", "owner")}
    steps: list[tuple[tuple[str, ...], list[str]]] = [
        (("deposit", "1500000"), ["depositing 1.5 tUSD", address["payer"]]),
        (("withdraw", "500000", "--to", OTHER), ["withdrawing 0.5 tUSD", OTHER]),
        (("payout", "set", OTHER), [address["worker"], OTHER, address["owner"]]),
        (("stake", "3000000", "--exposure", "1000000"), ["staking 3 tUSD", address["owner"], "deposited first"]),
        (("stake", "--exposure", "2000000"), ["open jobs may hold up to 2 tUSD"]),
        (("unstake", "1000000"), ["1 tUSD", address["owner"], "52 days"]),
        (("unstake", "500000"), ["1 tUSD are on their way already", "starts again", "0.5 tUSD"]),
    ]
    for words, expected in steps:
        result, said = run(*words)
        assert "error" not in result, (words, result)
        assert said, f"{words} sent nothing"
        assert [part for part in expected if part not in said[0]] == [], (words, said[0])


def test_a_refusal_has_its_reason_for_programs(run: Run) -> None:
    run("deposit", "1500000")
    contract_says, _ = run("withdraw", "500000", "--to", "0x0000000000000000000000000000000000000000")
    assert contract_says["error"]["code"] == "contract_refused"
    assert contract_says["error"]["reason"] == "Vault_BadRecipient"
    nobody, _ = run("channels", "close", "zzz")
    assert nobody["error"]["code"] == "usage" and "no channel id" in nobody["error"]["message"]
