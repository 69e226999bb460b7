"""A worker without a model, and a client that asks it without pause: real nodes in processes of their own, to be killed.

    python -m node.testing.market_process worker --data-dir DIR --set KEY=VALUE ...
    python -m node.testing.market_process client --data-dir DIR --set KEY=VALUE ... --worker MULTIADDR
    python -m node.testing.market_process serve

Journal, fence, network, chain, keys and signatures are the node's own, wired as `gristmill start` and the client library wire
them; only the language model is the fake one. Each line of stdout is an event in JSON: `ready` with how long it took; of the
client `paid` for each answer whose receipt it has verified and acknowledged, `failed` with the error's code for any other end;
`ended` with the error that ended the process, if one did. They run until SIGTERM. What a client asks for without pause is its
`--load`: chats; live sound; batch jobs, with `settled` for each that is verified and paid for; or chats on channels that it
closes again and again, with `closed` for each; or nothing.

`serve` starts them as forks of itself, because importing libp2p takes seconds and a test kills hundreds. Each line of stdin is a
start, `{"argv": [...], "env": {...}, "out": FILE}`; it answers `{"pid"}`, and `{"pid", "status"}` when one has ended (negative:
by that signal).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import trio

from node.app import open_worker
from node.cli.main import blame
from node.client.client import Client
from node.config import Config, load
from node.errors import NodeError
from node.keystore import Keystore, read_private
from node.store import faults
from node.store.ledger import Pending
from node.store.writer import Writer
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.fake_tasks import FakeTasks, FakeTaskSettings
from protocol.errors import GristmillError
from protocol.ids import PeerId
from protocol.keys import PrivateKey

TOKENS = 40
"""Of one answer."""
PAUSE_S = 0.05
"""After a failure, before the next try."""


def say(**event: Any) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


async def until_sigterm() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            return


def key(config: Config, name: str) -> PrivateKey:
    password = read_private(config.keys_dir / "password", 1024).removesuffix(b"\n")
    return Keystore(config.keys_dir, scrypt_n=config.keys.scrypt_n).load(name, password)


async def worker(config: Config, began: float) -> None:
    backend = FakeBackend(FakeSettings(tokens=TOKENS, seconds_per_token=0.002))
    tasks = nullcontext(FakeTasks(FakeTaskSettings(seconds_per_step=0.002)))
    async with open_worker(config, key(config, "worker"), backend=backend, tasks=tasks) as running:
        say(event="ready", ms=int((time.monotonic() - began) * 1000), records=running.worker.ledger.head.seq)
        await until_sigterm()
        await running.worker.drain(5)


async def client(config: Config, began: float, addresses: list[str], streams: int, load: str) -> None:
    async with Client.connect(config, workers=addresses, wait_s=20) as node, trio.open_nursery() as nursery:
        say(event="ready", ms=int((time.monotonic() - began) * 1000), records=node.book.ledger.head.seq)
        for number in range(streams if load == "chat" else 1):
            nursery.start_soon(_LOADS[load], node, addresses, number)
        await until_sigterm()
        nursery.cancel_scope.cancel()


async def _ask_for_ever(node: Client, addresses: list[str], number: int) -> None:
    await _for_ever(node, addresses, lambda n: _ask(node, f"{os.getpid()} {number} {n}"))


async def _ask(node: Client, text: str) -> None:
    async with node.chat("fake", [{"role": "user", "content": text}]) as stream:
        await stream.text()
    receipt = stream.receipt
    if receipt is not None:
        say(event="paid", job=str(receipt.job_id), sequence=receipt.sequence, cost=receipt.cost)


async def _speak_for_ever(node: Client, addresses: list[str], number: int) -> None:
    async def source() -> AsyncIterator[bytes]:
        for _ in range(40):
            await trio.sleep(0.002)
            yield bytes(3_200)

    async def speak(n: int) -> None:
        async with node.transcribe("fake-transcribe", source(), max_seconds=10) as stream:
            await stream.text()
        if stream.receipt is not None:
            say(event="paid", job=str(stream.receipt.job_id), sequence=stream.receipt.sequence, cost=stream.cost)

    await _for_ever(node, addresses, speak)


async def _order_for_ever(node: Client, addresses: list[str], number: int) -> None:
    async def order(n: int) -> None:
        job = await node.post_job("fake", ["one line", "and another"], id=f"{os.getpid()} {n}", max_tokens=2 * TOKENS)
        await job.result(30)
        with trio.fail_after(30):
            while not job.state.ended:
                await trio.sleep(PAUSE_S)
        say(event="settled", job=str(job.job_id), paid=job.state.paid)

    await _for_ever(node, addresses, order)


async def _close_for_ever(node: Client, addresses: list[str], number: int) -> None:
    async def close(n: int) -> None:
        await _ask(node, f"{os.getpid()} {n}")
        (peer,) = {PeerId(address.rpartition("/")[2]) for address in addresses}
        for state in list(node.book.channels.values()):
            if not state.closed and not state.withdraw_at and state.allocated:
                told = await node.wallet.close(state.channel_id, peer)
                say(event="closed", channel=str(state.channel_id), cooperative=told.cooperative, note=told.note)
        await trio.sleep(1)  # a worker submits twenty allocations for one payer

    await _for_ever(node, addresses, close)


async def _rest(node: Client, addresses: list[str], number: int) -> None:
    """Asks for nothing: what was begun is brought to its end."""
    await trio.sleep_forever()


_LOADS = {
    "chat": _ask_for_ever,
    "sound": _speak_for_ever,
    "batch": _order_for_ever,
    "close": _close_for_ever,
    "rest": _rest,
}


async def _for_ever(node: Client, addresses: list[str], do: Callable[[int], Awaitable[None]]) -> None:
    for n in range(1_000_000):
        try:
            await do(n)
        except (NodeError, GristmillError, trio.TooSlowError) as error:
            say(event="failed", code=getattr(error, "code", type(error).__name__), message=str(error)[:200])
            if node.book.ledger.failure is not None:
                raise
            await trio.sleep(PAUSE_S)
            await _meet_again(node, addresses)


async def _meet_again(node: Client, addresses: list[str]) -> None:
    node.history.clear()  # there is nobody else to ask
    for address in addresses:
        try:
            with trio.fail_after(5):
                await node.meet(address)
        except (NodeError, GristmillError, trio.TooSlowError):
            pass


def live(argv: list[str], began: float) -> None:
    """One node, until SIGTERM or an error."""
    parser = argparse.ArgumentParser(prog="market_process", description=__doc__.split("\n")[0])
    parser.add_argument("role", choices=["worker", "client"])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--worker", action="append", default=[], metavar="MULTIADDR")
    parser.add_argument("--streams", type=int, default=3, help="chats at once")
    parser.add_argument("--load", choices=sorted(_LOADS), default="chat", help="what the client asks for")
    parser.add_argument("--speak-first", action="store_true", help="the planted bug: nobody waits for the journal")
    given = parser.parse_args(argv)
    if given.speak_first:
        _speak_first()
    config = load({"data_dir": given.data_dir, **dict(one.split("=", 1) for one in given.set)})
    try:
        if given.role == "worker":
            trio.run(worker, config, began)
        else:
            trio.run(partial(client, config, began, given.worker, given.streams, given.load))
    except BaseException as error:
        one = blame(error)  # as the commands choose it
        if not isinstance(one, NodeError):
            raise
        say(event="ended", code=one.code, message=one.message)
        raise SystemExit(one.exit_status) from None


def _speak_first() -> None:
    commit = Writer._commit

    async def wait(self: Pending[Any]) -> None:
        await trio.lowlevel.checkpoint()

    def late(self: Writer, group: Any) -> None:
        time.sleep(0.3)
        commit(self, group)

    Pending.wait, Writer._commit = wait, late  # type: ignore[method-assign, assignment]


def serve() -> None:
    for name in ("node.network.host", "node.client.connect", "node.chain.client"):  # what each start would import
        importlib.import_module(name)
    running: set[int] = set()
    buffer = b""
    while True:
        for pid in tuple(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                say(pid=pid, status=os.waitstatus_to_exitcode(status))
        if not select.select([0], [], [], 0.01)[0]:
            continue
        more = os.read(0, 65536)
        if not more:
            break
        buffer += more
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            start = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _become(start)
            running.add(pid)
            say(pid=pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _become(start: dict[str, Any]) -> NoReturn:
    began, status = time.monotonic(), 1
    try:
        out = os.open(start["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(out, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(start["env"])
        faults._armed = faults.Fault.from_environment(os.environ)
        live(start["argv"], began)
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        live(sys.argv[1:], time.monotonic())


if __name__ == "__main__":
    main()
