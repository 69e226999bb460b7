"""Real workers and clients, killed: at every named point, at random times under load, and by a disk that fills up (J1, J4, L5).

Both run the whole node on libp2p and a simulated chain, with the fake model (`node.testing.market_process`). After each death the
node starts again, is ready within five seconds and goes on paying. Then the two journals are laid side by side: whatever one side
has heard, the other has written down before it spoke; what was told to the caller as paid is there; no part is paid twice; and in
the end `audit` holds both against the chain.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from node.config import load
from node.store.faults import POINTS
from node.store.ledger import Ledger
from node.testing.devnet.devnet import available
from node.wiring import look_at_chain
from protocol.channel import ChannelOpened, JobEnded, JobOpened, VoucherAdded
from protocol.ids import Address
from protocol.records import KINDS, decode_body

READY_MS = 5000
DEPOSIT = 400_000_000
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GRISTMILL_") or k == "GRISTMILL_ANVIL"}

JOURNAL = [point for point in POINTS if point.startswith("journal.")]
WHO = {
    "worker": [*JOURNAL, "send.accept", "send.chunk", "send.receipt", "send.transaction"],
    "client": [*JOURNAL, "send.ask", "send.voucher", "send.ack"],
}
ELSEWHERE = {point for point in POINTS if point.startswith("signer.")}
"""Points of a process that these nodes do not have: tests/effects/test_signer.py."""

pytestmark = [
    pytest.mark.skipif(not available(), reason="no simulated chain: neither anvil nor the embedded one is installed"),
    pytest.mark.slow,
]


def gristmill(folder: Path, *words: str) -> dict[str, Any]:
    """One command with --json; its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "node", "--json", "--data-dir", str(folder), *words],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, (words, done.stdout, done.stderr.decode()[-2000:])
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


@dataclass
class Node:
    """One life of a process, and what it says."""

    role: str
    pid: int
    out: Path
    status: int | None = None

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        try:
            lines = self.out.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if kind in ("", row["event"])]


@dataclass
class Market:
    """A chain, the folders of a worker and of a client, and a server that starts their processes."""

    folder: Path
    nodes: dict[str, Node] = field(default_factory=dict)
    lives: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = {
            role: gristmill(self.folder / role, "init", "--network", "devnet", "--role", role, *self._fast)
            for role in WHO
        }
        accounts = {key["name"]: key["address"] for one in made.values() for key in one["keys"]}
        self.accounts = {"worker": Address(accounts["worker"]), "client": Address(accounts["payer"])}
        funds = [word for account in accounts.values() for word in ("--fund", account)]
        state = gristmill(self.folder / "chain", "devnet", "up", *funds)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            listen = f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}"
        self.address = f"{listen}/p2p/{made['worker']['keys'][0]['peer_id']}"
        self.settings = {
            "chain.rpc_urls": state["url"],
            "chain.deployment": state["deployment"],
            "worker.price_output": "1000000000",  # a token costs 1000
            "worker.tick_tokens": "8",
            "worker.claim_min": "200000",
            "worker.claim_every_s": "1",
            "client.allocation": "4000000",
            "client.stall_ms": "3000",
            "client.first_token_ms": "3000",
        }
        self.listen = {"worker": {"p2p.listen": listen}, "client": {}}
        self._outs = itertools.count()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "node.testing.market_process", "serve"],
            env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        gristmill(self.folder / "client", *self.options("client"), "deposit", str(DEPOSIT))

    _fast = ("--set", "keys.scrypt_n=4096")

    def options(self, role: str) -> list[str]:
        return [
            word for key, value in (self.settings | self.listen[role]).items() for word in ("--set", f"{key}={value}")
        ]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)
        gristmill(self.folder / "chain", "devnet", "down")

    def start(self, role: str, fault: str = "", *more: str) -> Node:
        argv = [role, "--data-dir", str(self.folder / role), *self.options(role), *more]
        if role == "client":
            argv += ["--worker", self.address]
        out = self.folder / f"{role}-{next(self._outs)}.out"
        env = {"GRISTMILL_TESTING": "1", "GRISTMILL_FAULT": fault}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"argv": argv, "env": env, "out": str(out)}).encode() + b"\n")
        self._server.stdin.flush()
        answer = self._answer(60)
        while "status" in answer:
            answer = self._answer(60)
        node = self.nodes[role] = Node(role, answer["pid"], out)
        self.lives.append(node)
        return node

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], timeout_s)[0]:
            return {}
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        for node in self.lives:
            if node.pid == answer.get("pid") and "status" in answer:
                node.status = answer["status"]
        return answer

    def ended(self, node: Node, timeout_s: float = 60) -> int:
        """How the process ended. A negative number is a signal."""
        until = time.monotonic() + timeout_s
        while node.status is None:
            assert time.monotonic() < until, f"{node.role} does not end: {node.events()[-5:]}"
            self._answer(0.2)
        return node.status

    def wait(self, what: str, true: Callable[[], Any], timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while not true():
            told = {role: (node.status, node.events()[-3:]) for role, node in self.nodes.items()}
            assert time.monotonic() < until, f"{what} did not come: {told}"
            time.sleep(0.01)

    def ready(self, node: Node) -> int:
        """Milliseconds from the fork until the node was ready."""
        self.wait(f"a {node.role} that is ready", lambda: node.events("ready"))
        took: int = node.events("ready")[0]["ms"]
        return took

    def paid(self) -> list[dict[str, Any]]:
        """What clients told their callers as paid, in all their lives."""
        return [row for node in self.lives for row in node.events("paid")]

    def progress(self) -> None:
        """One more job is paid for."""
        before = len(self.paid())
        self.wait("a paid job", lambda: len(self.paid()) > before)

    def both(self) -> None:
        for role in WHO:
            if role not in self.nodes or self.nodes[role].status is not None:
                self.start(role)
        for role in WHO:
            self.ready(self.nodes[role])
        self.progress()

    def stop(self) -> None:
        for role in ("client", "worker"):
            node = self.nodes.pop(role)
            os.kill(node.pid, signal.SIGTERM)
            assert self.ended(node) == 0, node.events()[-3:]

    # ------------------------------------------------------------------------------------------------- the journals

    def changes(self, role: str) -> list[Any]:
        path = self.folder / role / "journal" / f"{role}.sqlite"
        with Ledger.open(path, chain_tag=bytes(self.accounts[role]), read_only=True) as ledger:
            return [decode_body(one.kind, one.body) for one in ledger.records() if one.kind in KINDS]

    def agree(self) -> None:
        """What one side heard, the other had written down. Readings are taken so that running nodes do not matter."""
        client, worker, later = self.changes("client"), self.changes("worker"), self.changes("client")
        assert heard(worker, VoucherAdded, "channel_id", "cumulative") <= heard(
            later, VoucherAdded, "channel_id", "cumulative"
        )
        assert heard(worker, JobOpened, "channel_id", "job_id", "part") <= heard(
            later, JobOpened, "channel_id", "job_id", "part"
        )
        assert heard(worker, ChannelOpened, "channel_id", "allocated") <= heard(
            later, ChannelOpened, "channel_id", "allocated"
        )
        receipts = {
            one for one in heard(client, JobEnded, "channel_id", "job_id", "part", "spent", "receipt") if one[-1]
        }
        assert receipts <= heard(worker, JobEnded, "channel_id", "job_id", "part", "spent", "receipt")
        for journal in (worker, later):
            paid = Counter((c.channel_id, c.job_id, c.part) for c in journal if isinstance(c, JobEnded) and c.spent)
            assert not [part for part, times in paid.items() if times > 1], "a part was paid twice"
        told = {(row["job"], row["cost"]) for row in self.paid()}
        ends = heard(self.changes("client"), JobEnded, "job_id", "spent", "receipt")
        assert told <= {(str(job), spent) for job, spent, receipt in ends if receipt}, (
            "told as paid, and not written down"
        )

    def settle(self) -> None:
        """With both stopped: claim all, then both journals and the chain are of one mind."""
        gristmill(self.folder / "worker", *self.options("worker"), "claim")
        gristmill(self.folder / "client", *self.options("client"), "channels", "list")  # the client sees the claim
        for role in WHO:
            assert gristmill(self.folder / role, *self.options(role), "audit", "--role", role) == {
                "audit": {role: "ok"}
            }
        claimed = trio.run(self._claimed)
        earned: Counter[Any] = Counter()
        for end in self.changes("worker"):
            if isinstance(end, JobEnded):
                earned[end.channel_id] += end.spent
        vouched = {c.channel_id: c.cumulative for c in self.changes("client") if isinstance(c, VoucherAdded)}
        assert sum(claimed.values()) > 0
        for channel, amount in claimed.items():
            assert amount <= min(earned[channel], vouched.get(channel, 0)), "paid more than was earned or signed"

    async def _claimed(self) -> dict[Any, int]:
        config = load({"data_dir": str(self.folder / "worker"), **self.settings})
        channels = {change.channel_id for change in self.changes("worker") if isinstance(change, ChannelOpened)}
        async with look_at_chain(config) as chain:
            return {channel: (await chain.channel(channel)).claimed for channel in channels}


def heard(changes: list[Any], kind: type[Any], *names: str) -> set[tuple[Any, ...]]:
    return {tuple(getattr(change, name) for name in names) for change in changes if isinstance(change, kind)}


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    made = Market(tmp_path_factory.mktemp("m"))
    yield made
    made.close()


def test_every_point_is_passed_by_somebody() -> None:
    assert {point for points in WHO.values() for point in points} | ELSEWHERE == set(POINTS)


def test_a_death_at_every_named_point(market: Market, long: bool) -> None:
    market.both()
    slowest = 0
    for passage in range(1, 6) if long else (1,):
        for role, points in WHO.items():
            for point in points:
                os.kill(market.nodes[role].pid, signal.SIGTERM)
                assert market.ended(market.nodes[role]) == 0
                # An epoch begins once in a life.
                doomed = market.start(role, f"{point}:{1 if point == 'journal.after_epoch' else passage}")
                assert market.ended(doomed) == -signal.SIGKILL, (role, point, doomed.events()[-3:])
                slowest = max(slowest, market.ready(market.start(role)))
                market.progress()
                market.agree()
    assert slowest <= READY_MS
    market.stop()
    market.settle()


def test_kill_9_at_random_times_under_load(market: Market, long: bool) -> None:
    rng = random.Random(9)
    market.both()
    slowest = 0
    for n in range(200 if long else 12):
        victim = market.nodes[rng.choice(list(WHO))]
        time.sleep(rng.uniform(0, 0.5))
        os.kill(victim.pid, signal.SIGKILL)
        assert market.ended(victim) == -signal.SIGKILL
        slowest = max(slowest, market.ready(market.start(victim.role)))
        market.progress()
        if n % 10 == 9:
            market.agree()
    assert slowest <= READY_MS
    market.stop()
    market.agree()
    market.settle()


@pytest.mark.parametrize("role", WHO)
def test_a_node_whose_disk_is_full_ends_by_name(market: Market, role: str) -> None:
    """It has said nothing that it could not write down, and goes on when there is room again."""
    market.both()
    node = market.nodes[role]
    log = market.folder / role / "journal" / f"{role}.sqlite-wal"
    resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))
    assert market.ended(node, 10) == 1
    assert node.events("ended")[0]["code"] in ("ledger", "journal_failed")
    market.ready(market.start(role))
    market.progress()
    market.stop()
    market.agree()
    market.settle()


@pytest.mark.parametrize("role", WHO)
def test_planted_a_node_that_speaks_before_it_has_written_is_seen(tmp_path: Path, role: str) -> None:
    market = Market(tmp_path)
    try:
        market.start("worker", "", *(["--speak-first"] if role == "worker" else []))
        market.start("client", "", *(["--speak-first"] if role == "client" else []))
        for _ in range(5):
            market.progress()
        os.kill(market.nodes[role].pid, signal.SIGKILL)
        market.ended(market.nodes[role])
        with pytest.raises(AssertionError):
            market.agree()
    finally:
        market.close()
