"""How many vouchers a worker verifies and receipts it signs, and how many vouchers a client gets signed, per second and core.

All rates are per second of CPU time, so what a neighbour takes does not count; they are medians of `--repeat` rounds (default 5).

Figures: `pairs_per_core_second`: one voucher verified and one receipt signed by the pure functions that the worker calls, over
256 channels of as many clients, no digest or signer reused. `voucher_path_per_core_second`: a voucher from the ask to the
signature through the signer's process: keystore key, policy, marks on disk, socket both ways; CPU of both processes, 64
channels at once. `voucher_journaled_per_core_second`: the same and its record in the client's journal. `*_per_second` are by the
clock, disk included; `vouchers_per_commit` says how many shared an fsync.
Peer in the same run: eth-account, which most Python programs sign with, doing the same pair.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import trio

from protocol.ids import Address, ChannelId, Hash32, JobId, ModelId
from protocol.keys import PrivateKey, require_signer
from protocol.typed_data import Domain, Receipt, Voucher

CHANNELS = 256
PAIRS = 2048
AT_ONCE = 64
VOUCHERS = 40
"""Per channel and round."""
DOMAIN = Domain(31337, Address(bytes(range(20))))


def key(name: str) -> PrivateKey:
    return PrivateKey(hashlib.sha256(b"bench " + name.encode()).digest())


def channel(n: int) -> ChannelId:
    return ChannelId(hashlib.sha256(b"channel %d" % n).digest())


def receipt(n: int) -> Receipt:
    def some(name: bytes) -> Hash32:
        return Hash32(hashlib.sha256(name + b"%d" % n).digest())

    return Receipt(
        job_id=JobId(some(b"job")),
        part=0,
        channel_id=channel(n % CHANNELS),
        sequence=n + 1,
        model_id=ModelId(bytes(32)),
        request_hash=some(b"request"),
        params_hash=some(b"params"),
        output_digest=some(b"output"),
        input_tokens=40 + n,
        output_tokens=200,
        cost=1000 + n,
        commitment=Hash32(bytes(32)),
        started=1_800_000_000_000,
        finished=1_800_000_001_000 + n,
        finish_reason=0,
    )


def run(args: Any = None) -> dict[str, Any]:
    """Measure. `args.repeat`: rounds, medians of which are reported."""
    repeat = getattr(args, "repeat", None) or 5
    ours, theirs = _pairs(), _eth_account_pairs()
    rates = [(_cpu_rate(ours, PAIRS), _cpu_rate(theirs, PAIRS // 32)) for _ in range(repeat)]
    with tempfile.TemporaryDirectory(prefix="bench-signing-") as name:
        path = trio.run(_through_the_signer, Path(name), repeat)
    pairs, peer = (median(rate) for rate in zip(*rates, strict=True))
    return {
        "figures": {
            "pairs_per_core_second": round(pairs, 1),
            **{name: round(median(values), 1) for name, values in path.items()},
            "pairs_over_eth_account": round(pairs / peer, 1),
        },
        "peers": {"eth-account": {"pairs_per_core_second": round(peer, 1)}},
        "conditions": {
            "repeat": repeat,
            "channels": CHANNELS,
            "at_once": AT_ONCE,
            "sqlite": sqlite3.sqlite_version,
            "load": os.getloadavg()[0],
        },
    }


def _cpu_rate(work: Callable[[], int], count: int) -> float:
    began = time.process_time()
    done = work()
    if done != count:
        raise RuntimeError(f"{done} of {count} were done")
    return count / (time.process_time() - began)


def _pairs() -> Callable[[], int]:
    """What the worker does for one job's money: take a voucher, give a receipt."""
    clients = [key(f"client {n}") for n in range(CHANNELS)]
    hot = key("worker")
    vouchers = []
    for n in range(PAIRS):
        voucher = Voucher(channel(n % CHANNELS), 10_000 + n)
        vouchers.append((voucher, clients[n % CHANNELS].sign(voucher.digest(DOMAIN)), clients[n % CHANNELS].address))
    receipts = [receipt(n) for n in range(PAIRS)]

    def work() -> int:
        done = 0
        for (voucher, signature, client), made in zip(vouchers, receipts, strict=True):
            require_signer(voucher.digest(DOMAIN), signature, client, "voucher")
            hot.sign(made.digest(DOMAIN))
            done += 1
        return done

    return work


def _eth_account_pairs() -> Callable[[], int]:
    from eth_account import Account
    from eth_account.messages import encode_typed_data

    hot, client = key("worker"), key("client 0")
    domain = {
        "name": "Gristmill",
        "version": "1",
        "chainId": DOMAIN.chain_id,
        "verifyingContract": str(DOMAIN.verifying_contract),
    }
    voucher_type, receipt_type = ({struct.__name__: _members(struct)} for struct in (Voucher, Receipt))
    vouchers = []
    for n in range(PAIRS // 32):
        voucher = Voucher(channel(0), 10_000 + n)
        vouchers.append((_message(voucher), client.sign(voucher.digest(DOMAIN))))
    receipts = [_message(receipt(n)) for n in range(PAIRS // 32)]

    def work() -> int:
        done = 0
        for (voucher, signature), made in zip(vouchers, receipts, strict=True):
            said = encode_typed_data(domain_data=domain, message_types=voucher_type, message_data=voucher)
            done += Account.recover_message(said, signature=signature) == str(client.address)
            said = encode_typed_data(domain_data=domain, message_types=receipt_type, message_data=made)
            Account.sign_message(said, hot.secret_bytes())
        return done

    return work


def _members(struct: Any) -> list[dict[str, str]]:
    inside = struct.TYPE[struct.TYPE.index("(") + 1 : -1]
    return [dict(zip(("type", "name"), part.split(" "), strict=True)) for part in inside.split(",")]


def _message(struct: Any) -> dict[str, Any]:
    names = [member["name"] for member in _members(type(struct))]
    return dict(zip(names, (getattr(struct, one.name) for one in fields(struct)), strict=True))


# ------------------------------------------------------------------------------------------------ through the signer


async def _through_the_signer(folder: Path, repeat: int) -> dict[str, list[float]]:
    from node.keystore import Keystore
    from node.signer.client import open_process
    from node.signer.journal import attach
    from node.signer.sources import KeyFile
    from node.store.channels import ChannelBook
    from node.store.ledger import Ledger
    from protocol.channel import Role
    from protocol.signing import DomainRule, KeyRole, Policy, TokenRule

    store = Keystore(folder / "keys", scrypt_n=1 << 12)
    for name in ("payer", "session"):
        store.create(name, b"a password")
    kinds = ("Voucher", "ChannelAllocation")
    policy = Policy(
        domains=tuple(DomainRule(kind, DOMAIN.chain_id, bytes(DOMAIN.verifying_contract)) for kind in kinds),
        tokens=(TokenRule(DOMAIN.chain_id, bytes(20), day_vouchers=2**62, day_locked=2**62),),
    )
    keys = {KeyRole(name): KeyFile(str(store.path(name)), b"a password") for name in ("payer", "session")}
    with Ledger.open(folder / "journal" / "client.sqlite", chain_tag=bytes(20)) as ledger:
        async with open_process(keys, policy, folder / "signer" / "client.sqlite") as signers:
            await attach(signers, ledger, [])
            book = ChannelBook.restore(ledger, Role.CLIENT)
            bench = _Path(signers, book, _signer_pid())
            await bench.open_channels()
            found: dict[str, list[float]] = {}
            for _ in range(repeat):
                for prefix, journaled in (("voucher_path", False), ("voucher_journaled", True)):
                    for name, value in (await bench.round(journaled)).items():
                        found.setdefault(f"{prefix}_{name}", []).append(value)
    return found


class _Path:
    """Vouchers on many channels at once, each the next of its channel."""

    def __init__(self, signers: Any, book: Any, pid: int) -> None:
        self.signers = signers
        self.book = book
        self.pid = pid
        self.channels: list[ChannelId] = []
        self.totals: dict[ChannelId, int] = {}

    async def open_channels(self) -> None:
        from protocol.channel import ChannelOpened, JobOpened
        from protocol.signing import ChannelAllocation, KeyRole
        from protocol.typed_data import Allocation, ChannelConfig

        payer, session = self.signers[KeyRole.PAYER], self.signers[KeyRole.SESSION]
        worker = key("worker").address
        for n in range(AT_ONCE):
            config = ChannelConfig(
                payer.address, session.address, worker, worker, Address(bytes(20)), 3600, Hash32(n.to_bytes(32))
            )
            channel_id = config.channel_id(DOMAIN)
            asked = ChannelAllocation(config, Allocation(channel_id, 10**9, 2**39))
            signature = await payer.sign(asked, DOMAIN)
            opened = ChannelOpened(channel_id, config, 10**9, 2**39, signature)
            await self.book.change([opened, JobOpened(channel_id, JobId(bytes(32)), 0, 0, 10**9)])
            self.channels.append(channel_id)
            self.totals[channel_id] = 0

    async def round(self, journaled: bool) -> dict[str, float]:
        from protocol.channel import VoucherAdded
        from protocol.signing import KeyRole

        session = self.signers[KeyRole.SESSION]
        signatures: list[bytes] = []

        async def client(channel_id: ChannelId) -> None:
            for _ in range(VOUCHERS):
                self.totals[channel_id] += 7
                voucher = Voucher(channel_id, self.totals[channel_id])
                signature = await session.sign(voucher, DOMAIN)
                if journaled:
                    await self.book.change([VoucherAdded(channel_id, voucher.cumulative, signature)])
                signatures.append(signature)

        cpu, clock = self._cpu(), time.perf_counter()
        async with trio.open_nursery() as nursery:
            for channel_id in self.channels:
                nursery.start_soon(client, channel_id)
        cpu, clock = self._cpu() - cpu, time.perf_counter() - clock
        count = AT_ONCE * VOUCHERS
        if len(set(signatures)) != count:
            raise RuntimeError("not every voucher got a signature of its own")
        return {"per_core_second": count / cpu, "per_second": count / clock}

    def _cpu(self) -> float:
        """Seconds of both processes, all threads of ours, the one of the signer's."""
        return time.process_time() + int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9


def _signer_pid() -> int:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return next(int(one) for one in children if b"node.signer" in Path(f"/proc/{one}/cmdline").read_bytes())
