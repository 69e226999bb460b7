"""`devnet`: a simulated chain on this machine with our contracts, in the background until `devnet down`.

`up` starts a second process that owns the chain, and waits for its one line of JSON. That process writes the state file when
contracts and funds are there, so whoever finds the file finds a ready chain; `down` ends it by the pid in the file, after
checking that this pid is still the process that wrote it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from node.cli.main import Group, Shared
from node.cli.params import ADDRESS, AMOUNT
from node.errors import ChainError
from protocol.ids import Address

START_SECONDS = 120
STOP_SECONDS = 15
NATIVE = 10**18
TOKENS = 1_000_000_000
"""What each of our own keys gets at start: one native coin, and a thousand of play money (6 decimals)."""


@click.group(cls=Group)
def command() -> None:
    """A local chain with our contracts, for development.

    It is simulated, lives in memory, and its coins are worth nothing.
    """


@command.command()
@click.option("--kind", type=click.Choice(["auto", "anvil", "embedded"]), default="auto", help="Which simulator.")
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="Port of its JSON-RPC; 0 takes a free one.")
@click.option(
    "--chain-id",
    type=click.IntRange(1, 2**32),
    help="Its chain id, for more than one chain on this machine; each simulator has one of its own.",
)
@click.option("--fund", multiple=True, type=ADDRESS, help="Fund this account too; our own keys always are.")
@click.option("--foreground", is_flag=True, help="Stay here until interrupted.")
@click.pass_obj
def up(shared: Shared, kind: str, port: int, chain_id: int | None, fund: tuple[Address, ...], foreground: bool) -> None:
    """Start the chain, deploy the contracts, fund our keys. Does nothing when it runs already."""
    state = _running(shared)
    if state is not None:
        _show(shared, {**state, "started": False})
        return
    if foreground:
        import trio

        trio.run(_serve, shared, kind, port, chain_id, fund)
        return
    _show(shared, {**_start(shared, kind, port, chain_id, fund), "started": True})


@command.command()
@click.pass_obj
def down(shared: Shared) -> None:
    """Stop the chain; what was on it is gone."""
    state = _running(shared)
    if state is None:
        shared.output.result({"stopped": False, "pid": None}, "no devnet is running")
        return
    pid = state["pid"]
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _alive(state):
        if time.monotonic() > deadline:
            raise ChainError(f"process {pid} did not stop within {STOP_SECONDS} s", hint=f"kill -9 {pid}")
        time.sleep(0.02)
    shared.config.devnet_state.unlink(missing_ok=True)
    shared.output.result({"stopped": True, "pid": pid}, f"stopped (process {pid})")


@command.command()
@click.argument("account", type=ADDRESS)
@click.option("--native", type=AMOUNT, default=str(NATIVE), help="Wei to send.")
@click.option("--tokens", type=AMOUNT, default=str(TOKENS), help="Play money to mint, smallest unit.")
@click.pass_obj
def faucet(shared: Shared, account: Address, native: int, tokens: int) -> None:
    """Give ACCOUNT coins of the running devnet."""
    state = _running(shared)
    if state is None:
        raise ChainError("no devnet is running", hint="gristmill devnet up")
    import trio

    from node.chain.deployment import Deployment
    from node.chain.rpc import JsonRpc
    from node.testing.devnet.devnet import Devnet

    async def give() -> None:
        rpc = JsonRpc(state["url"], chain_id=state["chain_id"])
        try:
            deployment = Deployment.load(Path(state["deployment"]))
            net = Devnet(state["kind"], state["url"], state["chain_id"], state["pid"], rpc, deployment)
            await net.faucet(account, native=native, tokens=tokens)
        finally:
            await rpc.aclose()

    trio.run(give)
    data = {"account": str(account), "native": str(native), "tokens": str(tokens)}
    shared.output.result(data, f"{account} got {native} wei and {tokens} units of play money")


# ------------------------------------------------------------------------------------------------- the owning process


async def _serve(shared: Shared, kind: str, port: int, chain_id: int | None, fund: tuple[Address, ...]) -> None:
    """Run the chain until SIGTERM or SIGINT. Prints the state as the result once everything is ready."""
    import trio

    from node.testing.devnet.devnet import devnet

    path = shared.config.devnet_state
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = shared.keystore
    accounts = dict.fromkeys([*fund, *(store.address(name) for name in store.names())])
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with devnet(kind, port, chain_id) as net:  # type: ignore[arg-type]
            deployment = await net.deploy()
            for account in accounts:
                await net.faucet(account, native=NATIVE, tokens=TOKENS)
            deployment.save(path.with_name("deployment.json"))
            state = {
                "url": net.url,
                "chain_id": net.chain_id,
                "kind": net.kind,
                "deployment": str(path.with_name("deployment.json")),
                "token": str(deployment.token),
                "funded": [str(account) for account in accounts],
                "pid": os.getpid(),
                "pid_since": _since(os.getpid()),
            }
            _write(path, state)
            try:
                _show(shared, {**state, "started": True})
                shared.output.say(net.describe())
                async for _ in signals:
                    break
            finally:
                path.unlink(missing_ok=True)


def _write(path: Path, state: Mapping[str, Any]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(state, indent=2) + "\n", "utf-8")
    draft.replace(path)


# ----------------------------------------------------------------------------------------------- starting and finding it


def _start(shared: Shared, kind: str, port: int, chain_id: int | None, fund: tuple[Address, ...]) -> dict[str, Any]:
    """Start the owning process; its state, or its error as ours."""
    path = shared.config.devnet_state
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [sys.executable, "-m", "node", "--json", "--data-dir", str(shared.config.data_dir)]
    command += ["devnet", "up", "--foreground", "--kind", kind, "--port", str(port)]
    command += ["--chain-id", str(chain_id)] if chain_id else []
    for account in fund:
        command += ["--fund", str(account)]
    log = path.with_name("log")
    with log.open("wb") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
    line = b""
    try:
        if child.stdout is not None and select.select([child.stdout], [], [], START_SECONDS)[0]:
            line = child.stdout.readline(1 << 20)
        answer: dict[str, Any] = json.loads(line)
    except BaseException as error:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
        if isinstance(error, ValueError):
            raise ChainError("the devnet did not start", hint=f"its messages are in {log}") from None
        raise
    if "error" in answer:
        child.wait(STOP_SECONDS)
        raise ChainError(answer["error"]["message"], hint=answer["error"]["hint"])
    return answer


def _running(shared: Shared) -> dict[str, Any] | None:
    """The state of the devnet of this data dir, or None. A state whose process has gone is removed."""
    path = shared.config.devnet_state
    try:
        state: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if _alive(state):
            return state
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        pass  # damaged: nothing can be known from it
    path.unlink(missing_ok=True)
    return None


def _alive(state: Mapping[str, Any]) -> bool:
    """Whether the process that wrote this state still runs; a pid alone may have been given to another since."""
    pid = int(state["pid"])
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return _since(pid) == str(state["pid_since"])


def _since(pid: int) -> str:
    """When a process started, in the kernel's words; empty where there is no /proc. A zombie has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _show(shared: Shared, state: Mapping[str, Any]) -> None:
    lines = (
        f"url         {state['url']}",
        f"chain id    {state['chain_id']}",
        f"deployment  {state['deployment']}",
        f"process     {state['pid']}" + ("" if state["started"] else " (was running already)"),
    )
    shared.output.result(state, "\n".join(lines))
