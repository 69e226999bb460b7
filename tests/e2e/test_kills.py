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

import msgspec
import pytest
import trio

from node.config import load
from node.store.faults import POINTS
from node.store.ledger import Ledger
from node.testing.devnet.devnet import available
from node.wiring import look_at_chain
from protocol.batch import BatchAccepted, BatchOrdered, BatchResultChecked, BatchResultKept, BatchState, fold
from protocol.channel import AllocationRaised, ChannelOpened, CloseSigned, JobEnded, JobOpened, Role, VoucherAdded
from protocol.ids import Address, JobId
from protocol.keys import SIGNATURE_BYTES
from protocol.messages import (
    CONVERSATIONS,
    AcceptJob,
    Ack,
    AskMessage,
    ChannelStatus,
    CloseConsent,
    JobStatus,
    OfferMessage,
    OpenChannel,
    OpenJob,
    QuoteMessage,
    ReceiptMessage,
    Refuse,
    RequestClose,
    VoucherMessage,
)
from protocol.records import BATCH_KINDS, KINDS, decode_batch, decode_body, kind_of

READY_MS = 5000
DEPOSIT = 400_000_000
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GRISTMILL_") or k == "GRISTMILL_ANVIL"}

JOURNAL = ["journal.after_epoch", "journal.before_append", "journal.before_commit", "journal.after_commit"]
WHO: dict[str, dict[str, list[str]]] = {
    "chat": {
        "worker": [*JOURNAL, "send.accept", "send.chunk", "send.receipt", "send.transaction"],
        "client": [*JOURNAL, "send.ask", "send.voucher", "send.ack"],
    },
    "sound": {"worker": ["send.taken"], "client": ["send.input"]},
    "batch": {"worker": ["send.quote", "send.submission"], "client": ["send.order", "send.acceptance"]},
    "close": {"worker": ["send.close"], "client": ["send.allocation"]},
}
"""By what the client asks for: who dies at which point."""
DONE = {"chat": "paid", "sound": "paid", "batch": "settled", "close": "closed"}
"""What a client says when it has got what it asked for."""
ROLES = ("worker", "client")
ELSEWHERE = {"signer.before_insert", "signer.before_commit", "signer.after_insert"}
"""Points of a process that these nodes do not have: tests/effects/test_signer.py."""
SENT: dict[type[Any], str] = {
    AskMessage: "send.ask",
    VoucherMessage: "send.voucher",
    ReceiptMessage: "send.receipt",
    Ack: "send.ack",
    OpenChannel: "send.allocation",
    CloseConsent: "send.close",
    QuoteMessage: "send.quote",
    OpenJob: "send.order",
    JobStatus: "send.submission",
    AcceptJob: "send.acceptance",
}
"""Every message that carries a signature which binds its signer, and the point at which it leaves."""
BINDS_NOBODY = {
    OfferMessage: "moves no money",
    Refuse: "moves no money",
    ChannelStatus: "repeats the client's own voucher",
    RequestClose: "the worker's consent decides; the client's total is checked against it",
}

pytestmark = [
    pytest.mark.skipif(not available(), reason="no simulated chain: neither anvil nor the embedded one is installed"),
    pytest.mark.slow,
]


def gristmill(folder: Path, *words: str) -> dict[str, Any]:
    """One command with --json; its last line, if it has any."""
    done = subprocess.run(
        [sys.executable, "-m", "node", "--json", "--data-dir", str(folder), *words],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, (words, done.stdout, done.stderr.decode()[-2000:])
    lines = done.stdout.splitlines()
    last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
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
    load: str = "chat"

    def __post_init__(self) -> None:
        made = {
            role: gristmill(self.folder / role, "init", "--network", "devnet", "--role", role, *self._fast)
            for role in ROLES
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
            "worker.batch_min": "1",
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
            argv += ["--worker", self.address, "--load", self.load]
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
        return self.said("paid")

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [row for node in self.lives for row in node.events(kind)]

    def progress(self, load: str = "chat") -> None:
        """One more thing is done that the client asks for."""
        before = len(self.said(DONE[load]))
        self.wait(f"one more {DONE[load]}", lambda: len(self.said(DONE[load])) > before)

    def both(self, load: str = "chat") -> None:
        """Both run, and the client asks for such things."""
        self.load = load
        for role in ROLES:
            if role in self.nodes and self.nodes[role].status is None and role == "client":
                self.end(role)
            if role not in self.nodes or self.nodes[role].status is not None:
                self.start(role)
        for role in ROLES:
            self.ready(self.nodes[role])
        if load in DONE:
            self.progress(load)

    def end(self, role: str) -> None:
        os.kill(self.nodes[role].pid, signal.SIGTERM)
        assert self.ended(self.nodes[role]) == 0, self.nodes[role].events()[-3:]

    def stop(self) -> None:
        for role in ("client", "worker"):
            self.end(role)
            del self.nodes[role]

    # ------------------------------------------------------------------------------------------------- the journals

    def changes(self, role: str) -> list[Any]:
        path = self.folder / role / "journal" / f"{role}.sqlite"
        with Ledger.open(path, chain_tag=bytes(self.accounts[role]), read_only=True) as ledger:
            return [
                decode_body(one.kind, one.body) if one.kind in KINDS else decode_batch(one.kind, one.body)
                for one in ledger.records()
                if one.kind in KINDS or one.kind in BATCH_KINDS
            ]

    def jobs(self, role: str) -> dict[JobId, BatchState]:
        """The batch jobs of a journal."""
        states: dict[JobId, BatchState] = {}
        for change in self.changes(role):
            if kind_of(change) in BATCH_KINDS:
                fold(Role(role), states, change)
        return states

    def finish_jobs(self) -> None:
        """With both running: every batch job that was ever ordered comes to its end."""
        self.wait("the end of every batch job", lambda: all(job.ended for job in self.jobs("client").values()))
        self.wait("the same for the worker", lambda: all(job.ended for job in self.jobs("worker").values()))

    def agree(self) -> None:
        """What one side heard, the other had written down. Readings are taken so that running nodes do not matter."""
        client, worker, later = self.changes("client"), self.changes("worker"), self.changes("client")
        assert heard(worker, VoucherAdded, "channel_id", "cumulative") <= heard(
            later, VoucherAdded, "channel_id", "cumulative"
        )
        assert heard(worker, JobOpened, "channel_id", "job_id", "part") <= heard(
            later, JobOpened, "channel_id", "job_id", "part"
        )
        assert allocations(worker) <= allocations(later)
        receipts = {
            one for one in heard(client, JobEnded, "channel_id", "job_id", "part", "spent", "receipt") if one[-1]
        }
        assert receipts <= heard(worker, JobEnded, "channel_id", "job_id", "part", "spent", "receipt")
        agree_on_jobs(client, worker, later)
        agree_on_closes(client, worker)
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
        for role in ROLES:
            assert gristmill(self.folder / role, *self.options(role), "audit", "--role", role) == {
                "audit": {role: "ok"}
            }
        claimed, locked, left = trio.run(self._on_chain)
        earned: Counter[Any] = Counter()
        for end in self.changes("worker"):
            if isinstance(end, JobEnded):
                earned[end.channel_id] += end.spent
        vouched = {c.channel_id: c.cumulative for c in self.changes("client") if isinstance(c, VoucherAdded)}
        for channel, amount in claimed.items():
            assert amount == min(earned[channel], vouched.get(channel, 0)), "paid for what was earned and signed, once"
        jobs = self.jobs("client")
        assert all(job.ended for job in jobs.values())
        assert {job_id: job.paid for job_id, job in self.jobs("worker").items() if job.paid} == {
            job_id: job.paid for job_id, job in jobs.items() if job.paid
        }
        told = {row["job"]: row["paid"] for row in self.said("settled")}
        assert told.items() <= {str(job_id): job.paid for job_id, job in jobs.items()}.items()
        paid = sum(job.paid for job in jobs.values())
        assert sum(claimed.values()) + paid > 0
        assert left + sum(locked.values()) + sum(claimed.values()) + paid == DEPOSIT, "not a unit is lost or made"

    async def _on_chain(self) -> tuple[dict[Any, int], dict[Any, int], int]:
        """Of each channel what was claimed and what is locked still; and what the client's vault holds."""
        config = load({"data_dir": str(self.folder / "worker"), **self.settings})
        channels = {change.channel_id for change in self.changes("client") if isinstance(change, ChannelOpened)}
        async with look_at_chain(config) as chain:
            seen = {channel: await chain.channel(channel) for channel in channels}
            left = await chain.vault_balance(chain.token, self.accounts["client"])
        return (
            {channel: one.claimed for channel, one in seen.items()},
            {channel: 0 if one.closed else one.allocated - one.claimed for channel, one in seen.items()},
            left,
        )


def heard(changes: list[Any], kind: type[Any], *names: str) -> set[tuple[Any, ...]]:
    return {tuple(getattr(change, name) for name in names) for change in changes if isinstance(change, kind)}


def agree_on_jobs(client: list[Any], worker: list[Any], later: list[Any]) -> None:
    for kind, names in ((BatchOrdered, ("job_id", "quote")), (BatchAccepted, ("job_id", "result_hash", "amount"))):
        assert heard(worker, kind, *names) <= heard(later, kind, *names)
    results = heard(client, BatchResultChecked, "job_id", "result_hash", "claimed")
    assert results <= heard(worker, BatchResultKept, "job_id", "result_hash", "claimed")


def agree_on_closes(client: list[Any], worker: list[Any]) -> None:
    closes = {one for one in heard(client, CloseSigned, "channel_id", "final", "signature") if one[-1]}
    assert closes <= heard(worker, CloseSigned, "channel_id", "final", "signature")


def allocations(changes: list[Any]) -> set[tuple[Any, ...]]:
    """What was allocated by when: a worker may hear of a channel by an allocation that is not its first."""
    return {
        one for kind in (ChannelOpened, AllocationRaised) for one in heard(changes, kind, "channel_id", "allocated")
    }


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    made = Market(tmp_path_factory.mktemp("m"))
    yield made
    made.close()


def test_somebody_dies_at_every_point() -> None:
    died = [point for who in WHO.values() for points in who.values() for point in points]
    assert {*died, *ELSEWHERE} == set(POINTS)
    signer = (Path(__file__).parents[1] / "effects" / "test_signer.py").read_text()
    assert all(f'"{point}"' in signer for point in ELSEWHERE)


def signed(kind: type[Any]) -> bool:
    """Whether a message has room for a signature."""
    for one in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
        if isinstance(one.type, msgspec.inspect.BytesType) and one.type.max_length == SIGNATURE_BYTES:
            return True
    return False


def test_every_signed_message_leaves_at_a_point() -> None:
    """Whoever adds a message that binds adds a point before it leaves, and above somebody who dies there."""
    kinds = {kind for union in CONVERSATIONS.values() for kind in union.__args__ if signed(kind)}
    assert kinds == {*SENT, *BINDS_NOBODY}
    assert set(SENT.values()) <= set(POINTS)


@pytest.mark.parametrize("load", WHO)
def test_a_death_at_every_named_point(market: Market, long: bool, load: str) -> None:
    market.both(load)
    slowest = 0
    for passage in range(1, 6) if long else (1,):
        for role, points in WHO[load].items():
            for point in points:
                market.end(role)
                # An epoch begins once in a life.
                doomed = market.start(role, f"{point}:{1 if point == 'journal.after_epoch' else passage}")
                assert market.ended(doomed) == -signal.SIGKILL, (role, point, doomed.events()[-3:])
                slowest = max(slowest, market.ready(market.start(role)))
                market.progress(load)
                market.agree()
    assert slowest <= READY_MS
    market.both("rest")  # live streams come first: beside them a batch job may wait for ever
    market.finish_jobs()
    market.stop()
    market.settle()


def test_kill_9_at_random_times_under_load(market: Market, long: bool) -> None:
    rng = random.Random(9)
    market.both()
    slowest = 0
    for n in range(200 if long else 12):
        victim = market.nodes[rng.choice(ROLES)]
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


@pytest.mark.parametrize("role", ROLES)
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


@pytest.mark.parametrize("role", ROLES)
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


@pytest.mark.parametrize(("load", "role"), [("batch", "client"), ("close", "worker")])
def test_planted_an_order_or_a_close_that_is_said_before_it_is_written_is_seen(
    tmp_path: Path, load: str, role: str
) -> None:
    market = Market(tmp_path, load=load)
    try:
        for one in ROLES:
            market.start(one, "", *(["--speak-first"] if one == role else []))
        market.progress(load)
        until = time.monotonic() + 120
        with pytest.raises(AssertionError):
            while time.monotonic() < until:
                client, worker, later = market.changes("client"), market.changes("worker"), market.changes("client")
                if load == "batch":
                    agree_on_jobs(client, worker, later)
                else:
                    agree_on_closes(client, worker)
    finally:
        market.close()
