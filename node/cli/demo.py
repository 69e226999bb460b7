"""`demo`: the whole product on real parts, on one machine, checked to the last unit.

A simulated local chain with our contracts; one worker process (`start`) that serves a real language model; client processes
(`deposit`, `chat`) that pay for a streamed answer; then claim, close, and the comparison of both journals, the receipt and the
chain.

Rules
- Every step is an ordinary command of ours in a process of its own (`demo_processes.py`).
- What it shows is checked (`demo_verdict.py`); any disagreement ends it non-zero.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import trio

from node.cli.demo_processes import DemoFailed, Processes, environment, free_port
from node.cli.demo_verdict import judge, tell
from node.cli.main import Command, Shared

MODEL = "smollm2-135m-instruct"
QUESTION = "In two sentences: why do mills need water or wind?"
DEPOSIT = 5_000_000
"""Smallest unit of the play token (6 decimals)."""
WORKER_SECONDS = 120


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
    setup: float = 0.0
    """Seconds until the worker was ready."""
    _finished: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self._processes = Processes(self.shared.config.data_dir, self.folder / "worker.log")

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
            self._processes.settings = [
                *("--set", f"fence_dir={self.folder / 'fence'}"),
                *("--set", f"chain.rpc_urls={net.url}"),
                *("--set", f"chain.deployment={self.folder / 'deployment.json'}"),
                *("--set", f"models.folder={models}"),
                *("--set", f"worker.models={MODEL}"),
            ]
            await net.faucet(accounts["worker"], native=10**18)
            await net.faucet(accounts["payer"], native=10**18, tokens=DEPOSIT)
            address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{accounts['peer_id']}"
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
            await self._processes.run(None, "models", "add", MODEL)
        return store

    async def _deposit(self, client: Path) -> None:
        deposited = await self._processes.run(client, "deposit", str(DEPOSIT))
        self._note(deposited["transactions"])
        self.say(f"client    deposited {DEPOSIT} units (6 decimals) into the vault: its only transactions")

    async def _init(self, folder: Path, role: str) -> dict[str, Any]:
        from protocol.ids import Address

        made = await self._processes.run(folder, "init", "--network", "devnet", "--role", role)
        accounts: dict[str, Any] = {key["name"]: Address(key["address"]) for key in made["keys"]}
        return {**accounts, "peer_id": made["keys"][0]["peer_id"]} if role == "worker" else accounts

    async def _worker(self, folder: Path, address: str) -> None:
        """A worker process, from ready to its clean end once everything else is done."""
        with self._processes.log.open("wb") as log:
            process = await trio.lowlevel.open_process(
                self._processes.argv(folder, "start", "--listen", address.partition("/p2p/")[0]),
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(),
            )
            try:
                ready = await self._processes.ready(process, WORKER_SECONDS)
                self.setup = time.monotonic() - self.began
                self.say(f"worker    ready, process {ready['pid']}, {ready['addresses'][0]}\n")
                await self._finished.wait()
                process.send_signal(signal.SIGTERM)
                with trio.move_on_after(40):
                    await process.wait()
                if process.returncode != 0:
                    self.problems.append(f"the worker ended with status {process.returncode}: {self._processes.tail()}")
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.CancelScope(shield=True):
                        await process.wait()

    async def _chat(self, client: Path, address: str, asked: Asked) -> dict[str, Any]:
        """Run the client process and show its tokens as they come. Returns its last line, with the tokens added."""
        argv = self._processes.argv(
            client,
            *("chat", MODEL, asked.question, "--worker", address, "--wait", str(WORKER_SECONDS)),
            *("--max-tokens", str(asked.max_tokens)),
            *("--temperature", str(asked.temperature), "--seed", str(asked.seed)),
        )
        self.say(f"client    asks: {asked.question}")
        first_token = None
        rows: list[dict[str, Any]] = []
        process = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE, env=environment())
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
        claimed = await self._processes.run(worker, "claim")
        self._note(claimed["transactions"])
        closed = await self._processes.run(client, "channels", "close", "--worker", address, lines=True)
        for row in closed:
            self._note(row["transactions"])
            if not row["cooperative"]:
                self.problems.append(f"the channel was not closed cooperatively: {row['note']}")

    async def _verdict(
        self, worker: Path, client: Path, answer: dict[str, Any], net: Any, accounts: dict[str, Any]
    ) -> dict[str, Any]:
        audits = {"client": await self._audit(client, "client"), "worker": await self._audit(worker, "worker")}
        checks, facts = await judge(answer, net, accounts, audits, DEPOSIT)
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
            "transactions": self.transactions,
            **facts,
            "audit": audits,
            "problems": self.problems,
        }
        if not self.shared.output.json:
            tell(self.say, result, answer["worker"], checks)
        return result

    async def _audit(self, folder: Path, role: str) -> str | list[str]:
        done = await self._processes.run(folder, "audit", "--role", role, check=False)
        findings: str | list[str] = done["audit"][role] if "audit" in done else [done["error"]["message"]]
        return findings

    def _note(self, transactions: list[dict[str, Any]]) -> None:
        self.transactions += [{"purpose": t["purpose"], "hash": t["hash"], "gas": t["gas"]} for t in transactions]

    async def _note_hash(self, purpose: str, found: str, net: Any) -> None:
        receipt = await net.rpc.call("eth_getTransactionReceipt", found)
        self.transactions.append({"purpose": purpose, "hash": found, "gas": int(receipt["gasUsed"], 16)})


def _since_the_script_started() -> float:
    """Seconds that set-up took before us, when scripts/demo says when it started; it counts as well."""
    started = os.environ.get("GRISTMILL_DEMO_STARTED", "")
    return max(0.0, time.time() - int(started)) if started.isdigit() else 0.0
