"""`slash` on real contracts: two receipts convict, out of a journal or of files; money comes by itself; a guardian cancels.

Y1 and Y5 end to end.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from node.chain.deployment import Deployment
from node.cli import main as frame
from node.cli.answer import receipt_data
from node.cli.output import dumps
from node.config import load
from node.keystore import Keystore
from node.store.channels import ChannelBook
from node.testing.devnet.devnet import available
from node.testing.devnet.keys import FUNDED_KEYS
from node.wiring import open_journal
from protocol.channel import ChannelOpened, JobEnded, JobOpened, Role
from protocol.ids import Hash32, JobId, ModelId
from protocol.job import receipt_to_wire
from protocol.keys import PrivateKey
from protocol.messages import ReceiptMessage, encode
from protocol.typed_data import Allocation, ChannelConfig, Receipt

pytestmark = pytest.mark.skipif(not available(), reason="no simulated chain on this machine (anvil or py-evm)")
Run = Callable[..., tuple[int, list[dict[str, Any]]]]
DAY, STAKE = 86_400, 3_000_000
ZERO = Hash32(bytes(32))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        capfd.readouterr()
        status = frame.main(["--json", "--data-dir", str(tmp_path / "data"), "--set", "keys.scrypt_n=4096", *arguments])
        told = capfd.readouterr()
        command.said = told.err  # type: ignore[attr-defined]
        return status, [json.loads(line) for line in told.out.splitlines()]

    command("init")
    command("devnet", "up")
    command("wallet", "new", "owner")
    yield command
    command("devnet", "down")


@dataclass
class World:
    run: Run
    folder: Path
    worker: PrivateKey
    payer: PrivateKey
    deployment: Deployment

    @property
    def config(self) -> ChannelConfig:
        me, them, token = self.payer.address, self.worker.address, self.deployment.token
        return ChannelConfig(me, me, them, them, token, 3600, ZERO)

    def receipt(self, job: int, cost: int = 5, sequence: int = 1) -> tuple[Receipt, bytes]:
        channel = self.config.channel_id(self.deployment.domain)
        model = ModelId(bytes([1]) * 32)
        one = Receipt(
            *(JobId(bytes([job]) * 32), 0, channel, sequence, model, ZERO, ZERO, Hash32(bytes([job]) * 32)),
            *(3, 4, cost, ZERO, 1, 2, 1),
        )
        return one, self.worker.sign(one.digest(self.deployment.domain))

    def journal(self, *receipts: tuple[Receipt, bytes]) -> None:
        """A client's journal with a channel to this worker, and jobs that ended with these receipts."""
        domain, config = self.deployment.domain, self.config
        channel = config.channel_id(domain)
        changes: list[Any] = [
            ChannelOpened(
                *(channel, config, 1000, 2_000_000_000),
                *(self.payer.sign(Allocation(channel, 1000, 2_000_000_000).digest(domain)), domain),
            )
        ]
        for receipt, signature in receipts:
            raw = encode(ReceiptMessage(receipt=receipt_to_wire(receipt), signature=signature))
            changes.append(JobOpened(channel, receipt.job_id, receipt.part, 0, 100))
            changes.append(JobEnded(channel, receipt.job_id, receipt.part, receipt.cost, receipt.sequence, raw))

        async def write() -> None:
            config_of = load({"data_dir": str(self.folder / "data")})
            with open_journal(config_of, "client", self.payer.address) as ledger:
                await ChannelBook.restore(ledger, Role.CLIENT, [domain]).change(changes)

        trio.run(write)

    def file(self, name: str, receipt: Receipt, signature: bytes) -> str:
        path = self.folder / name
        path.write_text(dumps({"receipt": receipt_data(receipt), "receipt_signature": signature}))
        return str(path)

    def advance(self, seconds: int) -> None:
        url = json.loads((self.folder / "data" / "devnet" / "state.json").read_text())["url"]
        for method, params in (("evm_increaseTime", [hex(seconds)]), ("evm_mine", [])):
            body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert "error" not in json.load(answer)


@pytest.fixture
def world(run: Run, tmp_path: Path) -> World:
    owner = run("wallet", "address", "owner")[1][0]["address"]
    run("devnet", "faucet", owner, "--tokens", "5000000")
    assert run("payout", "set", owner)[0] == 0
    assert run("stake", str(STAKE), "--exposure", "1000")[0] == 0
    store = Keystore(tmp_path / "data" / "keys", scrypt_n=4096)
    password = (tmp_path / "data" / "keys" / "password").read_bytes().strip()
    deployment = Deployment.load(tmp_path / "data" / "devnet" / "deployment.json")
    return World(run, tmp_path, store.load("worker", password), store.load("payer", password), deployment)


def said(run: Run) -> str:
    return str(run.said)  # type: ignore[attr-defined]


def vault(world: World) -> int:
    status, (answer,) = world.run("withdraw", "0")
    assert status == 0
    return int(answer["vault_balance"])


def test_a_journal_convicts_and_the_share_comes_by_itself(world: World, run: Run) -> None:
    world.journal(world.receipt(1), world.receipt(2, sequence=2), world.receipt(3, cost=7))
    status, (proof,) = run("slash", "prove")
    assert status == 0 and proof["worker"] == str(world.worker.address) and proof["sequence"] == 1
    assert "retired for ever" in said(run) and "1.5 tUSD of its owner's stake" in said(run)
    slash, payer = proof["slash"], str(world.payer.address)
    assert (slash["amount"], slash["victim"], slash["reporter"]) == (str(STAKE // 2), payer, payer)
    assert [one["purpose"] for one in proof["transactions"]] == ["prove_equivocation"]
    again = run("slash", "prove")[1][0]
    assert (again["slash"], again["transactions"]) == (None, [])  # once in each token

    assert [one["id"] for one in run("slash", "list")[1]] == [1]
    assert run("slash", "move")[1][0]["transactions"] == []  # nothing is due
    status, (error,) = run("slash", "move", "1")
    assert status == 6 and "can not be moved before" in error["error"]["message"]
    assert run("slash", "move", "2")[0] == 6
    run("job", "list")
    assert vault(world) == 0
    world.advance(7 * DAY)
    run("job", "list")  # any command that looks at the jobs does it
    share = STAKE // 4 + STAKE // 8
    assert "moving penalty 1: 1.125 tUSD of its 1.5 tUSD" in said(run)
    assert vault(world) == share
    run("job", "list")
    assert "moving" not in said(run) and vault(world) == share
    status, (moved,) = run("slash", "move", "1")
    assert (status, moved["slashes"][0]["state"], moved["transactions"]) == (0, "moved", [])


def test_files_convict_for_who_reports_and_a_guardian_gives_it_back(world: World, run: Run) -> None:
    one, two = world.receipt(1), world.receipt(2)
    first, second = world.file("one.json", *one), world.file("two.json", *two)
    status, (error,) = run("slash", "prove", first, second, "--key", "owner")
    assert status == 3 and "no node tells of channel" in error["error"]["message"]
    assert run("slash", "prove", first)[0] == 2

    # The channel becomes known on chain by its allocation, which anybody may submit.
    assert run("deposit", "1000")[0] == 0
    domain, config = world.deployment.domain, world.config
    channel = config.channel_id(domain)
    signature = world.payer.sign(Allocation(channel, 1000, 2_000_000_000).digest(domain))
    allocate(world, config, signature)
    for other in (
        world.receipt(1, sequence=2),
        one,
        (two[0], bytes(65)),
        (two[0], world.payer.sign(two[0].digest(domain))),
    ):
        status, (error,) = run("slash", "prove", first, world.file("other.json", *other), "--key", "owner")
        assert status == 3 and "prove nothing" in error["error"]["message"]
    status, (proof,) = run("slash", "prove", first, second, "--key", "owner")
    assert status == 0, proof
    owner = run("wallet", "address", "owner")[1][0]["address"]
    assert (proof["slash"]["victim"], proof["slash"]["reporter"]) == (str(world.payer.address), owner)
    assert run("stake")[1][0]["stake"]["active"] == str(STAKE // 2)

    status, (error,) = run("slash", "cancel", "1")
    assert status == 6 and "no guardian" in error["error"]["message"]
    key = world.folder / "guardian"
    key.touch(0o600)
    key.write_text(FUNDED_KEYS[0].secret_bytes().hex())
    assert run("wallet", "import", "deployer", str(key))[0] == 0
    status, (gone,) = run("slash", "cancel", "1", "--key", "deployer")
    assert status == 0 and gone["slash"]["state"] == "cancelled", gone
    assert "1.5 tUSD go back to the stake" in said(run)
    assert run("slash", "cancel", "1", "--key", "deployer")[1][0]["transactions"] == []
    assert run("stake")[1][0]["stake"]["active"] == str(STAKE)
    world.advance(8 * DAY)
    status, (error,) = run("slash", "move", "1")
    assert status == 6 and "was cancelled" in error["error"]["message"]


def allocate(world: World, config: ChannelConfig, signature: bytes) -> None:
    from node.chain.client import EvmChain
    from node.chain.tx_policy import DEVNET_POLICY
    from node.signer.bare import Bare

    state = json.loads((world.folder / "data" / "devnet" / "state.json").read_text())

    async def send() -> None:
        chain = await EvmChain.connect(
            [state["url"]], world.deployment, Bare(FUNDED_KEYS[1]), policy=DEVNET_POLICY, poll=0.02
        )
        assert (await chain.allocate(config, 1000, 2_000_000_000, signature)).ok
        await chain.aclose()

    trio.run(send)
