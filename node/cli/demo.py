"""`demo`: the whole product on real parts, on one machine, checked to the last unit.

A simulated local chain with our contracts; one worker process (`start`) that serves a real language model; client processes
(`deposit`, `chat`) that pay for a streamed answer; then claim, close, and the comparison of both journals, the receipt and the
chain. Every step is an ordinary command of ours in a process of its own. Any disagreement ends it non-zero.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import trio

from node.cli.main import Command, Shared
from node.errors import NodeError

MODEL = "smollm2-135m-instruct"
QUESTION = "In two sentences: why do mills need water or wind?"
DEPOSIT = 5_000_000
"""Smallest unit of the play token (6 decimals)."""
WORKER_SECONDS = 120


class DemoFailed(NodeError):
    """A step failed, or two sides disagree."""

    code = "demo_failed"


@click.command(cls=Command)
@click.argument("question", default=QUESTION)
@click.option("--max-tokens", type=click.IntRange(1, 1024), default=64, show_default=True, help="Length of the answer.")
@click.option(
    "--chain", type=click.Choice(["auto", "anvil", "embedded"]), default="auto", help="Which simulated chain."
)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the normative sampler.")
@click.pass_obj
def command(shared: Shared, question: str, max_tokens: int, chain: str, temperature: float, seed: int) -> None:
    """Show the whole product at work: a paid chat on a local chain, with everything checked.

    The model, the network, the payment and the signatures are real. The chain is a simulation on this machine and its
    coins are worth nothing.
    """
    began = time.monotonic() - _since_the_script_started()
    with TemporaryDirectory(prefix="gristmill-demo-") as folder:
        demo = Demo(shared, Path(folder), began)
        asked = Asked(question, max_tokens, temperature, seed)
        result = trio.run(demo.run, asked, chain)
    shared.output.result(result, "" if not shared.output.json else None)
    if not result["ok"]:
        raise click.exceptions.Exit(1)


@dataclass(frozen=True, slots=True)
class Asked:
    question: str
    max_tokens: int
    temperature: float
    seed: int


@dataclass
class Demo:
    shared: Shared
    folder: Path
    began: float
    transactions: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    """Options of every command: where the chain and the model are."""
    setup: float = 0.0
    """Seconds until the worker was ready."""
    _finished: trio.Event = field(default_factory=trio.Event)

    def say(self, text: str) -> None:
        """For people, as it happens; machines get one object at the end."""
        if self.shared.output.json:
            self.shared.output.say(text)
        else:
            self.shared.output.line(text)

    async def run(self, asked: Asked, kind: str) -> dict[str, Any]:
        from node.testing.devnet.devnet import devnet

        worker, client = self.folder / "worker", self.folder / "client"
        accounts: dict[str, Any] = {}

        async def make(folder: Path, role: str) -> None:
            accounts.update(await self._init(folder, role))

        async with devnet(kind) as net:  # type: ignore[arg-type]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(make, worker, "worker")
                nursery.start_soon(make, client, "client")
                models = await self._model()
                deployment = await net.deploy()
            self.say(f"chain     {net.describe()}; contracts deployed")
            deployment.save(self.folder / "deployment.json")
            self.settings = [
                *("--set", f"fence_dir={self.folder / 'fence'}"),
                *("--set", f"chain.rpc_urls={net.url}"),
                *("--set", f"chain.deployment={self.folder / 'deployment.json'}"),
                *("--set", f"models.folder={models}"),
                *("--set", f"worker.models={MODEL}"),
            ]
            await net.faucet(accounts["worker"], native=10**18)
            await net.faucet(accounts["payer"], native=10**18, tokens=DEPOSIT)
            address = f"/ip4/127.0.0.1/tcp/{_free_port()}/p2p/{accounts['peer_id']}"
            async with trio.open_nursery() as nursery:
                # The client deposits and gets ready while the worker starts; it then waits for the worker to appear.
                nursery.start_soon(self._worker, worker, address)
                await self._deposit(client)
                answer = await self._chat(client, address, asked)
                await self._settle(worker, client, address, answer, net)
                self._finished.set()
            return await self._verdict(worker, client, answer, net, accounts)

    # -------------------------------------------------------------------------------------------------- the steps

    async def _model(self) -> Path:
        """The model store with the model in it; converts it on first use."""
        from node.models.store import ModelStore

        store = self.shared.config.models_dir
        if not any(manifest.name == MODEL for manifest in ModelStore(store).list()):
            self.say(f"model     preparing {MODEL} (once)")
            await self._command(None, "models", "add", MODEL)
        return store

    async def _deposit(self, client: Path) -> None:
        deposited = await self._command(client, "deposit", str(DEPOSIT))
        self._note(deposited["transactions"])
        self.say(f"client    deposited {DEPOSIT} units (6 decimals) into the vault: its only transactions")

    async def _init(self, folder: Path, role: str) -> dict[str, Any]:
        from protocol.ids import Address

        made = await self._command(folder, "init", "--network", "devnet", "--role", role)
        accounts: dict[str, Any] = {key["name"]: Address(key["address"]) for key in made["keys"]}
        return {**accounts, "peer_id": made["keys"][0]["peer_id"]} if role == "worker" else accounts

    async def _worker(self, folder: Path, address: str) -> None:
        """A worker process, from ready to its clean end once everything else is done."""
        with (self.folder / "worker.log").open("wb") as log:
            process = await trio.lowlevel.open_process(
                self._argv(folder, "start", "--listen", address.partition("/p2p/")[0]),
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
            )
            try:
                ready = await self._ready(process)
                self.setup = time.monotonic() - self.began
                self.say(f"worker    ready, process {ready['pid']}, {ready['addresses'][0]}\n")
                await self._finished.wait()
                process.send_signal(signal.SIGTERM)
                with trio.move_on_after(40):
                    await process.wait()
                if process.returncode != 0:
                    self.problems.append(f"the worker ended with status {process.returncode}: {self._tail()}")
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.CancelScope(shield=True):
                        await process.wait()

    async def _ready(self, process: trio.Process) -> dict[str, Any]:
        if process.stdout is None:
            raise DemoFailed("the worker has no output")
        data = b""
        with trio.move_on_after(WORKER_SECONDS):
            while b"\n" not in data:
                more = await process.stdout.receive_some()
                if not more:
                    break
                data += more
        first = _json_lines(data)
        if not first or first[0].get("event") != "ready":
            detail = first[0]["error"]["message"] if first and "error" in first[0] else self._tail()
            raise DemoFailed(f"the worker did not start: {detail}")
        return first[0]

    async def _chat(self, client: Path, address: str, asked: Asked) -> dict[str, Any]:
        """Run the client process and show its tokens as they come. Returns its last line, with the tokens added."""
        argv = self._argv(
            client,
            *("chat", MODEL, asked.question, "--worker", address, "--wait", str(WORKER_SECONDS)),
            *("--max-tokens", str(asked.max_tokens)),
            *("--temperature", str(asked.temperature), "--seed", str(asked.seed)),
        )
        self.say(f"client    asks: {asked.question}")
        first_token = None
        rows: list[dict[str, Any]] = []
        process = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE, env=_environment())
        if process.stdout is None:
            raise DemoFailed("the client has no output")
        data = b""
        async with process.stdout:
            async for more in process.stdout:
                *lines, data = (data + more).split(b"\n")
                for line in lines:
                    row = json.loads(line)
                    rows.append(row)
                    if "text" in row:
                        first_token = first_token or time.monotonic() - self.began
                        self.shared.output.write(row["text"])
        await process.wait()
        self.shared.output.write("\n\n")
        if process.returncode != 0 or not rows or "receipt" not in rows[-1]:
            detail = rows[-1]["error"]["message"] if rows and "error" in rows[-1] else "no receipt came"
            raise DemoFailed(f"the chat failed: {detail}")
        answer = rows[-1]
        answer["text"] = "".join(row.get("text", "") for row in rows[:-1])
        answer["token_ids"] = [token for row in rows[:-1] for token in row["token_ids"]]
        answer["first_token"] = first_token
        return answer

    async def _settle(self, worker: Path, client: Path, address: str, answer: dict[str, Any], net: Any) -> None:
        """Worker claims, client closes: what was not spent comes back at once."""
        if answer["allocation_transaction"]:
            await self._note_hash("allocate", answer["allocation_transaction"], net)
        claimed = await self._command(worker, "claim")
        self._note(claimed["transactions"])
        closed = await self._command(client, "channels", "close", "--worker", address, lines=True)
        for row in closed:
            self._note(row["transactions"])
            if not row["cooperative"]:
                self.problems.append(f"the channel was not closed cooperatively: {row['note']}")

    # ------------------------------------------------------------------------------------------------- the verdict

    async def _verdict(
        self, worker: Path, client: Path, answer: dict[str, Any], net: Any, accounts: dict[str, Any]
    ) -> dict[str, Any]:
        verified = self._verify_receipt(answer, net.deployment, accounts["worker"])
        during = await self._transactions_between(net, answer["blocks"]["before"], answer["blocks"]["after"])
        audits = {
            "client": await self._audit(client, "client"),
            "worker": await self._audit(worker, "worker"),
        }
        received, left, paid = await self._money(net, accounts)
        cost = int(answer["cost"])
        checks = {
            "the receipt is signed by the worker over what was delivered": verified,
            "no transaction during the job": during == 0,
            "what the client paid is the receipt's cost": paid == cost,
            "what the worker received is the receipt's cost": received == cost,
            "the rest is back in the client's vault": left == DEPOSIT - cost,
            "the client's journal, its signatures and the chain agree": audits["client"] == "ok",
            "the worker's journal, its signatures and the chain agree": audits["worker"] == "ok",
        }
        self.problems += [f"not so: {check}" for check, good in checks.items() if not good]
        result = {
            "ok": not self.problems,
            "chain": net.describe(),
            "seconds": {
                "setup": self.setup,
                "first_token": answer["first_token"],
                "total": time.monotonic() - self.began,
                "ask_to_first_token": answer["seconds"]["ask_to_first_token"],
            },
            "model": {"id": answer["model"], "sha256": answer["receipt"]["model_id"].removeprefix("0x"), "name": MODEL},
            "text": answer["text"],
            "usage": answer["usage"],
            "receipt": {**answer["receipt"], "signature": answer["receipt_signature"]},
            "receipt_verified": verified,
            "transactions": self.transactions,
            "transactions_during_job": during,
            "client_paid": str(paid),
            "worker_received": str(received),
            "audit": audits,
            "problems": self.problems,
        }
        self._tell(result, answer, checks)
        return result

    def _verify_receipt(self, answer: dict[str, Any], deployment: Any, worker: Any) -> bool:
        """From scratch, with the pure protocol only: digest of the tokens and text that were printed, cost, signature."""
        from protocol.digest import OutputDigest
        from protocol.errors import ProtocolError
        from protocol.ids import ChannelId, Hash32, JobId, ModelId
        from protocol.keys import recover
        from protocol.typed_data import Receipt

        fields = dict(answer["receipt"])
        kinds = {"job_id": JobId, "channel_id": ChannelId, "model_id": ModelId}
        for name, value in fields.items():
            if isinstance(value, str) and value.startswith("0x"):
                fields[name] = kinds.get(name, Hash32)(value)
        fields["cost"] = int(fields["cost"])
        receipt = Receipt(**fields)
        digest = OutputDigest(receipt.job_id, receipt.part)
        digest.extend(answer["token_ids"], answer["text"])
        signature = bytes.fromhex(answer["receipt_signature"].removeprefix("0x"))
        try:
            signer = recover(receipt.digest(deployment.domain), signature)
        except ProtocolError:
            return False
        return bool(
            signer == worker
            and digest.value == receipt.output_digest
            and receipt.output_tokens == len(answer["token_ids"])
        )

    async def _money(self, net: Any, accounts: dict[str, Any]) -> tuple[int, int, int]:
        """What the worker's account holds in the vault, what the client's does, and what the client is short of."""
        from node.chain.client import EvmChain
        from node.signer.bare import Bare

        token = net.deployment.token
        chain = await EvmChain.connect([net.url], net.deployment, Bare(net.funded_keys[0]))
        try:
            received = await chain.vault_balance(token, await chain.payout_of(accounts["worker"]))
            left = await chain.vault_balance(token, accounts["payer"])
        finally:
            await chain.aclose()
        return received, left, DEPOSIT - left

    async def _transactions_between(self, net: Any, before: int, after: int) -> int:
        """Transactions in the blocks after `before` up to `after`: nobody else uses this chain."""
        count = 0
        for number in range(before + 1, after + 1):
            count += int(await net.rpc.call("eth_getBlockTransactionCountByNumber", hex(number)), 16)
        return count

    async def _audit(self, folder: Path, role: str) -> str | list[str]:
        done = await self._command(folder, "audit", "--role", role, check=False)
        findings: str | list[str] = done["audit"][role] if "audit" in done else [done["error"]["message"]]
        return findings

    def _tell(self, result: dict[str, Any], answer: dict[str, Any], checks: dict[str, bool]) -> None:
        if self.shared.output.json:
            return
        usage, receipt = result["usage"], result["receipt"]
        self.say(
            f"receipt   job {receipt['job_id'][:18]}..., {usage['input_tokens']} tokens in, {usage['output_tokens']} out, "
            f"cost {receipt['cost']} units"
        )
        self.say(f"          signed {receipt['signature'][:34]}... by {answer['worker']}")
        self.say(f"paid      client {result['client_paid']}, worker received {result['worker_received']} units")
        for count, sent in enumerate(self.transactions):
            self.say(f"{'' if count else 'chain':<9} {sent['purpose']:<10} {sent['gas']:>7} gas  {sent['hash']}")
        self.say(f"          {result['transactions_during_job']} transactions during the job")
        for check, good in checks.items():
            self.say(f"{'ok' if good else 'FAILED':<9} {check}")
        seconds = result["seconds"]
        self.say(
            f"time      first token after {seconds['first_token']:.1f} s in all, the whole demo {seconds['total']:.1f} s"
        )
        for problem in self.problems:
            self.say(f"problem   {problem}")

    # ----------------------------------------------------------------------------------------------- small machinery

    def _argv(self, folder: Path | None, *words: str) -> list[str]:
        argv = [sys.executable, "-m", "node", "--json"]
        argv += ["--data-dir", str(folder)] if folder else ["--data-dir", str(self.shared.config.data_dir)]
        return [*argv, *(self.settings if folder else []), *words]

    async def _command(self, folder: Path | None, *words: str, lines: bool = False, check: bool = True) -> Any:
        """Run one of our commands; its JSON object, or all its lines."""
        done = await trio.run_process(
            self._argv(folder, *words), capture_stdout=True, check=False, stdin=subprocess.DEVNULL, env=_environment()
        )
        rows = _json_lines(done.stdout)
        if check and done.returncode != 0:
            error = rows[-1].get("error", {}) if rows else {}
            message = error.get("message", f"status {done.returncode}")
            raise DemoFailed(f"`{' '.join(words[:2])}` failed: {message}", hint=error.get("hint", ""))
        return rows if lines else rows[-1]

    def _note(self, transactions: list[dict[str, Any]]) -> None:
        self.transactions += [{"purpose": t["purpose"], "hash": t["hash"], "gas": t["gas"]} for t in transactions]

    async def _note_hash(self, purpose: str, found: str, net: Any) -> None:
        receipt = await net.rpc.call("eth_getTransactionReceipt", found)
        self.transactions.append({"purpose": purpose, "hash": found, "gas": int(receipt["gasUsed"], 16)})

    def _tail(self) -> str:
        lines = (self.folder / "worker.log").read_text("utf-8", "replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "no message"


def _free_port() -> int:
    """A port nobody uses now, so that the client can be told the worker's address before the worker is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _since_the_script_started() -> float:
    """Seconds that set-up took before us, when scripts/demo says when it started; it counts as well."""
    started = os.environ.get("GRISTMILL_DEMO_STARTED", "")
    return max(0.0, time.time() - int(started)) if started.isdigit() else 0.0


def _json_lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def _environment() -> dict[str, str]:
    """Ours without settings that are meant for another data dir."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GRISTMILL_") or name == "GRISTMILL_ANVIL"
    }
