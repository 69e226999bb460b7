"""Gas of every action of the budget, from receipts of a real chain (anvil).

The in-process EVM keeps storage warm between calls and so flatters; here each action is a transaction of its own. Keys and
amounts are fixed: two runs differ by nothing. "first" means that the storage it writes was empty before.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from eth_abi.abi import encode

from node.testing.contracts import config_tuple, key
from node.testing.devnet.anvil import anvil_command, port_of
from node.testing.evm import ARTIFACTS, _selector, _types
from protocol.ids import Address, Hash32, JobId, keccak256
from protocol.typed_data import (
    Acceptance,
    Allocation,
    ChannelConfig,
    Close,
    Domain,
    HotKey,
    Order,
    Quote,
    Submission,
    Voucher,
)

BUDGET = {
    "allocate": 103_000,
    "claim_one": 48_000,
    "claim_100_each": 21_000,
    "withdraw": 52_000,
    "job_open": 135_000,
    "job_submit": 61_000,
    "job_settle": 53_000,
    "job_finalize": 46_000,
    "job_refund": 40_000,
}
"""Bounds of the design. Slack is a tenth, as for the committed snapshot: the ends of a job use most of theirs, because each
module has a lock of its own in the vault (5,000 gas an end) and the payout address is looked up when money moves (5,400)."""
FOREVER = 2**40 - 1


class _Rpc:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def __call__(self, method: str, *params: Any) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            reply = json.load(answer)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]


@contextmanager
def _anvil(binary: Path) -> Iterator[_Rpc]:
    process = subprocess.Popen(anvil_command(binary), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        if process.stdout is None:
            raise RuntimeError("anvil has no output")
        port = next((p for p in map(port_of, process.stdout) if p), None)
        if port is None:
            raise RuntimeError("anvil ended before it listened")
        yield _Rpc(port)
    finally:
        process.kill()
        process.wait()


class _Market:
    """Contracts on anvil; senders are impersonated, so no transaction is signed."""

    def __init__(self, rpc: _Rpc) -> None:
        self._rpc = rpc
        self._abi: dict[Address, dict[str, Any]] = {}
        self.admin = key("admin").address
        rpc("anvil_autoImpersonateAccount", True)

    def rich(self, account: Address) -> None:
        self._rpc("anvil_setBalance", "0x" + account.hex(), hex(10**21))

    def deploy(self, name: str, *args: Any) -> Address:
        artifact = json.loads((ARTIFACTS / f"{name}.json").read_text())
        inputs: list[dict[str, Any]] = next((e["inputs"] for e in artifact["abi"] if e["type"] == "constructor"), [])
        receipt = self._transact(
            self.admin, None, bytes.fromhex(artifact["bytecode"][2:]) + encode(_types(inputs), args)
        )
        address = Address(receipt["contractAddress"])
        self._abi[address] = {e["name"]: e for e in artifact["abi"] if e["type"] == "function"}
        return address

    def send(self, sender: Address, to: Address, function: str, *args: Any) -> int:
        """Gas used by the transaction."""
        entry = self._abi[to][function]
        receipt = self._transact(sender, to, _selector(entry)[:4] + encode(_types(entry["inputs"]), args))
        return int(receipt["gasUsed"], 16)

    def _transact(self, sender: Address, to: Address | None, data: bytes) -> Any:
        call = {"from": "0x" + sender.hex(), "data": "0x" + data.hex(), "gas": hex(16_000_000)}
        if to is not None:
            call["to"] = "0x" + to.hex()
        name = self._rpc("eth_sendTransaction", call)
        deadline = time.monotonic() + 30
        while (receipt := self._rpc("eth_getTransactionReceipt", name)) is None and time.monotonic() < deadline:
            time.sleep(0.002)  # anvil mines at once but may publish the receipt a moment later
        if receipt is None or receipt["status"] != "0x1":
            raise RuntimeError(f"transaction failed: {receipt}")
        return receipt


def measure(binary: Path) -> dict[str, int]:
    """Gas by action on the chain of the anvil `binary`."""
    with _anvil(binary) as rpc:
        return _measure(_Market(rpc), rpc)


def _measure(market: _Market, rpc: _Rpc) -> dict[str, int]:
    admin, ann, worker, owner = market.admin, key("ann"), key("worker"), key("owner")
    anyone = key("submitter").address
    payout = Address(b"\x99" * 20)
    for account in (admin, ann.address, worker.address, owner.address, anyone, payout):
        market.rich(account)
    vault = market.deploy("Vault", admin, 0)
    workers = market.deploy("Workers", vault)
    channels = market.deploy("Channels", vault, workers)
    jobs = market.deploy("Jobs", vault, workers)
    token = market.deploy("TestToken")
    market.send(admin, vault, "seal", [channels, workers, jobs])
    market.send(admin, vault, "setToken", token, True)
    domain = Domain(int(rpc("eth_chainId"), 16), channels)
    gas: dict[str, int] = {}

    market.send(admin, token, "mint", ann.address, 10**12)
    gas["approve"] = market.send(ann.address, token, "approve", vault, 2**256 - 1)
    gas["deposit_first"] = market.send(ann.address, vault, "deposit", token, 10**9, ann.address)
    gas["deposit"] = market.send(ann.address, vault, "deposit", token, 10**9, ann.address)

    consent = HotKey(owner.address, worker.address, payout, 0, FOREVER).digest(Domain(domain.chain_id, workers))
    gas["register"] = market.send(
        owner.address, workers, "register", worker.address, payout, FOREVER, worker.sign(consent)
    )

    def channel(number: int) -> tuple[ChannelConfig, Any]:
        session = key(f"session {number}")
        salt = Hash32(keccak256(str(number).encode()))
        config = ChannelConfig(ann.address, session.address, worker.address, worker.address, token, 3600, salt)
        return config, session

    def allocate(config: ChannelConfig, amount: int) -> int:
        signature = ann.sign(Allocation(config.channel_id(domain), amount, FOREVER).digest(domain))
        return market.send(anyone, channels, "allocate", config_tuple(config), amount, FOREVER, signature)

    def entry(number: int, amount: int) -> tuple[Any, ...]:
        config, session = channel(number)
        voucher = session.sign(Voucher(config.channel_id(domain), amount).digest(domain))
        return (config_tuple(config), amount, amount, voucher)

    first, _ = channel(0)
    gas["allocate_first"] = allocate(first, 10**6)
    gas["allocate"] = allocate(channel(1)[0], 10**6)
    gas["allocate_top_up"] = allocate(first, 2 * 10**6)
    for number in range(2, 101):
        allocate(channel(number)[0], 10**6)
    gas["claim_first"] = market.send(anyone, channels, "claim", [entry(0, 1000)])
    gas["claim_one"] = market.send(anyone, channels, "claim", [entry(0, 2000)])
    market.send(anyone, channels, "claim", [entry(n, 1000) for n in range(1, 101)])
    gas["claim_100"] = market.send(anyone, channels, "claim", [entry(n, 2000) for n in range(1, 101)])
    gas["claim_100_each"] = gas["claim_100"] // 100
    gas["settle_first"] = market.send(anyone, channels, "settle", worker.address, token)
    market.send(anyone, channels, "claim", [entry(0, 3000)])
    gas["settle"] = market.send(anyone, channels, "settle", worker.address, token)
    gas["withdraw_first"] = market.send(payout, vault, "withdraw", token, 500, owner.address)
    gas["withdraw"] = market.send(payout, vault, "withdraw", token, 500, owner.address)
    closing = worker.sign(Close(first.channel_id(domain), 4000).digest(domain))
    _, session = channel(0)
    voucher = session.sign(Voucher(first.channel_id(domain), 4000).digest(domain))
    gas["close"] = market.send(anyone, channels, "close", config_tuple(first), 4000, 4000, voucher, closing)
    second, _ = channel(1)
    gas["initiate_withdraw"] = market.send(ann.address, channels, "initiateWithdraw", config_tuple(second))
    rpc("evm_increaseTime", hex(3600))
    gas["finalize_withdraw"] = market.send(anyone, channels, "finalizeWithdraw", config_tuple(second))
    gas |= _jobs(market, rpc, vault, jobs, workers, token)
    gas["request_at_1000"] = (gas["allocate"] + gas["claim_one"] + gas["close"]) // 1000
    return gas


def _jobs(
    market: _Market, rpc: _Rpc, vault: Address, jobs: Address, workers: Address, token: Address
) -> dict[str, int]:
    """Every end of a job, without a penalty and with one. Another job stays open, so that no lock falls to zero: that
    would refund gas which a market with more than one job does not get."""
    ann, worker, owner = key("ann"), key("worker"), key("owner")
    anyone, domain = key("submitter").address, Domain(int(rpc("eth_chainId"), 16), jobs)
    result = Hash32(keccak256(b"result"))
    gas: dict[str, int] = {}

    def now() -> int:
        return int(rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)

    def quote(name: str, penalty: int) -> Quote:
        salt = Hash32(keccak256(name.encode()))
        spec, at = Hash32(keccak256(b"spec")), now()
        return Quote(spec, ann.address, worker.address, token, 10**6, penalty, at + 900, at + 1800, 900, jobs, salt)

    def opened(name: str, penalty: int = 0) -> tuple[Quote, JobId]:
        terms = quote(name, penalty)
        job = terms.job_id(domain)
        signatures = worker.sign(terms.digest(domain)), ann.sign(Order(job).digest(domain))
        gas[name] = market.send(worker.address if penalty else anyone, jobs, "open", astuple(terms), *signatures)
        return terms, job

    def submit(terms: Quote, job: JobId) -> int:
        signature = worker.sign(Submission(job, result, 10**6).digest(domain))
        return market.send(anyone, jobs, "submit", astuple(terms), result, 10**6, signature)

    opened("job_open_first")
    for tail, penalty in (("", 0), ("_penalty", 1000)):
        if penalty:
            market.send(ann.address, vault, "deposit", token, 10**6, owner.address)
            gas["stake"] = market.send(owner.address, workers, "stake", token, 10**5)
            market.send(owner.address, workers, "setExposure", token, 10**5)
            opened("job_open_penalty_first", penalty)
        terms, job = opened("job_open" + tail, penalty)
        gas["job_submit" + tail] = submit(terms, job)
        accepted = ann.sign(Acceptance(job, result, 10**6).digest(domain))
        gas["job_settle" + tail] = market.send(anyone, jobs, "settle", astuple(terms), result, 10**6, accepted)
        late, job = opened("job_open_late" + tail, penalty)
        submit(late, job)
        silent, _ = opened("job_open_silent" + tail, penalty)
        failed, _ = opened("job_open_failed" + tail, penalty)
        gas["job_fail" + tail] = market.send(worker.address, jobs, "fail", astuple(failed))
        rpc("evm_increaseTime", hex(1800))
        gas["job_finalize" + tail] = market.send(anyone, jobs, "finalize", astuple(late))
        gas["job_refund" + tail] = market.send(anyone, jobs, "refund", astuple(silent))
        for name in ("late", "silent", "failed"):
            del gas[f"job_open_{name}{tail}"]
    return gas
