"""Fixtures of what a node keeps on disk: three journals, a signer's table, a fence, and what each of them must be read as.

An edition is written once, by `scripts/gen-fixtures` of the version that begins it, and never again: later versions must read it
as it was written. A new kind of record, or another form of one, needs a new edition beside the old ones.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from node.audit_txs import TX_KINDS
from node.chain.pending import answered, dropped, landed, unfinished
from node.signer.core import Core
from node.signer.journal import BEGUN, known_words
from node.signer.table import SCHEMA, Table
from node.store.batch import BatchBook
from node.store.channels import ChannelBook
from node.store.evidence import REFUSED, receipts
from node.store.fence import Fence
from node.store.ledger import ADOPTED, Ledger
from node.store.migrations import SCHEMA_VERSION
from node.store.signed import SIGNED
from node.store.votes import VOTED, votes
from node.testing import every_kind
from node.testing.every_kind import AT_MS, DOMAIN, JOBS, PARTIES, BatchJob, named, plain
from node.testing.pair import key
from protocol.channel import Role
from protocol.ids import Address, ChannelId, JobId, ModelId
from protocol.records import BATCH_KINDS, KINDS
from protocol.signing import (
    CallRule,
    ChannelAllocation,
    DomainRule,
    FeeRule,
    KeyRole,
    Mark,
    Policy,
    QuotedOrder,
    Request,
    SigningRefused,
    TokenRule,
    request,
)
from protocol.signing_history import KnownChannel
from protocol.transactions import Transaction
from protocol.typed_data import Acceptance, Allocation, Close, Order, Receipt, Submission, Voucher

EDITION: Final = 2
"""The newest. Raise it when `scripts/gen-fixtures --check` says that today's version writes something else."""
ALL_KINDS: Final = frozenset({*KINDS, *BATCH_KINDS, *TX_KINDS, BEGUN, ADOPTED, REFUSED, VOTED, SIGNED})
"""Of records."""
JOURNALS: Final = ("worker", "client", "owner")
FILES: Final = (*JOURNALS, "signer", "fence")
KEYS: Final = {role: key(role.value) for role in KeyRole}
ACCOUNTS: Final = {role: held.address for role, held in KEYS.items()}
_DAY: Final = AT_MS // 1000
_TO: Final = Address(b"\x22" * 20)


def packed(folder: Path, edition: int, name: str) -> Path:
    return folder / f"books_{edition}_{name}.gz"


def told(folder: Path, edition: int) -> Path:
    """Where it stands what the files of an edition must be read as."""
    return folder / f"books_{edition}.json"


def place(root: Path, name: str) -> Path:
    """Where a file of a fixture lies when it is used; each kind in a folder of its own, as in a data dir."""
    return root / {"signer": "signer", "fence": "state"}.get(name, "journal") / name


def unpack(folder: Path, edition: int, root: Path) -> None:
    """An edition as files that can be opened, below the empty folder `root`."""
    for name in FILES:
        path = place(root, name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(gzip.decompress(packed(folder, edition, name).read_bytes()))


def pack(root: Path, folder: Path, edition: int) -> None:
    for name in FILES:
        packed(folder, edition, name).write_bytes(gzip.compress(place(root, name).read_bytes(), mtime=0))


class _Fence(Fence):
    """One whose journal lies where nobody has a folder."""

    def acquire(self, journal: Path) -> None:
        super().acquire(journal)
        self._journal = "/var/lib/gristmill/journal/worker.sqlite"


def make(root: Path) -> None:
    """What this version writes, below the empty folder `root`."""
    every_kind.write(place(root, "worker"), Role.WORKER, _Fence(place(root, "fence")))
    every_kind.write(place(root, "client"), Role.CLIENT)
    every_kind.write_owner(place(root, "owner"))
    with signer(place(root, "signer")) as core:
        core.meet([_known()], Mark(7, bytes(named("record 7"))), adopting=True)
        answers = core.handle(list(signed()), Mark(9, bytes(named("record 9"))))
        refused = [answer for answer in answers if not isinstance(answer, bytes)]
        if refused:
            raise ValueError(f"the policy of the fixture refuses what it is to sign: {refused}")


# --------------------------------------------------------------------------------------------------------------- signer

_POLICY: Final = Policy(
    domains=tuple(
        DomainRule(kind, domain.chain_id, bytes(domain.verifying_contract))
        for domain, kinds in (
            (DOMAIN, ("Voucher", "Receipt", "Close", "ChannelAllocation")),
            (JOBS, ("Quote", "QuotedOrder", "Submission", "Acceptance")),
        )
        for kind in kinds
    ),
    tokens=(TokenRule(DOMAIN.chain_id, bytes(PARTIES.token), day_vouchers=2**62, day_locked=2**62),),
    calls=(CallRule(DOMAIN.chain_id, bytes(_TO)),),
    fees=(FeeRule(DOMAIN.chain_id, max_fee=100, day=2**62),),
)


@contextmanager
def signer(path: Path) -> Iterator[Core]:
    """What signs with the table at `path`."""
    table = Table.open(path, ACCOUNTS)
    try:
        yield Core(KEYS, _POLICY, table, lambda: _DAY)
    finally:
        table.close()


def _known() -> KnownChannel:
    """A channel that the journal knew when the table began."""
    return KnownChannel(
        channel_id=every_kind.config(3).channel_id(DOMAIN),
        token=PARTIES.token,
        domain=DOMAIN,
        authorized=500,
        valid_before=2**40 - 1,
        cumulative=100,
        signed=4,
        given=5,
        final=None,
    )


def _receipt(number: int, cost: int, salt: int = 2) -> Receipt:
    zero = named("nothing")
    channel_id = every_kind.config(salt).channel_id(DOMAIN)
    return Receipt(
        JobId(zero), 0, channel_id, number, ModelId(zero), zero, zero, zero, 1, 2, cost, zero, 1, 2, 0
    )  # fmt: skip


def _close(channel: ChannelId, total: int) -> Request:
    return request(KeyRole.WORKER, Close(channel, total), DOMAIN)


def signed() -> Iterator[Request]:
    """One of each that leaves a mark."""
    config, job = every_kind.config(1), BatchJob(1)
    channel_id = config.channel_id(DOMAIN)
    yield request(KeyRole.PAYER, ChannelAllocation(config, Allocation(channel_id, 9_000, 2**31)), DOMAIN)
    yield request(KeyRole.SESSION, Voucher(channel_id, 1_500), DOMAIN)
    yield request(KeyRole.WORKER, _receipt(1, 650), DOMAIN)
    yield _close(every_kind.config(4).channel_id(DOMAIN), 1_450)
    yield request(KeyRole.PAYER, QuotedOrder(job.quote, Order(job.job_id)), JOBS)
    yield request(KeyRole.WORKER, Submission(job.job_id, job.result, job.claimed), JOBS)
    yield request(KeyRole.PAYER, Acceptance(job.job_id, job.result, job.claimed), JOBS)
    yield request(KeyRole.PAYER, Transaction(DOMAIN.chain_id, 7, 1, 10, 50_000, _TO, 0, bytes(68)), None)


def against() -> Iterator[Request]:
    """What those marks forbid: totals that fall, other words under a number or a name that is used, numbers given before."""
    config, job = every_kind.config(1), BatchJob(1)
    yield request(KeyRole.SESSION, Voucher(config.channel_id(DOMAIN), 1_499), DOMAIN)
    yield request(KeyRole.SESSION, Voucher(config.channel_id(DOMAIN), 9_001), DOMAIN)
    yield request(KeyRole.WORKER, _receipt(1, 651), DOMAIN)
    yield request(KeyRole.WORKER, _receipt(5, 1, salt=3), DOMAIN)
    yield _close(every_kind.config(4).channel_id(DOMAIN), 1_451)
    yield request(KeyRole.WORKER, Submission(job.job_id, job.result, job.claimed - 1), JOBS)
    yield request(KeyRole.PAYER, Acceptance(job.job_id, named("another result"), job.claimed), JOBS)
    yield request(KeyRole.PAYER, Transaction(DOMAIN.chain_id, 7, 1, 10, 50_000, _TO, 1, bytes(68)), None)


def refusals(path: Path) -> list[bool]:
    """Of `against`, in order: whether a signer with this table refuses it."""
    with signer(path) as core:
        core.meet([], Mark(9, bytes(named("record 9"))), adopting=False)
        return [isinstance(answer, SigningRefused) for one in against() for answer in core.handle([one])]


# ---------------------------------------------------------------------------------------------------------------- facts


def facts(root: Path) -> dict[str, Any]:
    """What the files below `root` are read as, by the code that a start runs. Writes to them, as a start does."""
    fence = Fence(place(root, "fence"))
    fence.acquire(place(root, "worker"))
    found: dict[str, Any] = {"schemas": {"journal": SCHEMA_VERSION, "signer": SCHEMA}, "fence": plain(fence.mark)}
    fence.release()
    for role, guard in ((Role.WORKER, fence), (Role.CLIENT, None)):
        path = place(root, role.value)
        with Ledger.open(path, chain_tag=bytes(every_kind.account(role)), create=False, fence=guard) as ledger:
            found[role.value] = {**_records(ledger), **_money(ledger, role)}
    with Ledger.open(place(root, "owner"), chain_tag=bytes(every_kind.OWNER.address), create=False) as ledger:
        found["owner"] = {**_records(ledger), "votes": [plain(vote) for of in votes(ledger).values() for vote in of]}
    with signer(place(root, "signer")) as core:
        marks = [[one[0].name, plain(one[1]), mark.value, plain(mark.digest)] for one, mark in core.table.all()]
        found["signer"] = {"identity": plain(core.table.identity), "marks": sorted(marks)}
    return found


def _records(ledger: Ledger) -> dict[str, Any]:
    """What any journal is read as: its head, and its transactions as a sender takes them up."""
    records = list(ledger.records())
    history = [(r.kind, msgspec.msgpack.decode(r.body)) for r in records if r.kind in TX_KINDS]
    anchor = next(body["anchor"] for _, body in history)
    chain = DOMAIN.chain_id
    return {
        "head": {"seq": ledger.head.seq, "hash": plain(ledger.head.hash)},
        "kinds": dict(sorted(Counter(record.kind for record in records).items())),
        "unfinished": [tx.to_body() for tx in unfinished(history, chain)],
        "landed": [tx.to_body() for tx in landed(history, chain, anchor)],
        "dropped": [tx.to_body() for tx in dropped(history, chain, anchor)],
        "answered": plain(answered(history, chain, anchor)),
    }


def _money(ledger: Ledger, role: Role) -> dict[str, Any]:
    book, jobs = ChannelBook.restore(ledger, role, [DOMAIN]), BatchBook.restore(ledger, role)
    return {
        "channels": plain(dict(book.channels)),
        "cut_off": plain(book.cut_off),
        "receipted": plain(book.receipted),
        "adopted": book.adopted,
        "frozen": plain(book.frozen),
        "jobs": plain(dict(jobs.jobs)),
        "signed": plain(jobs.signed),
        "words": plain(known_words(ledger)),
        "receipts": [plain(one) for one in receipts(ledger)],
    }


def foreseen(found: dict[str, Any]) -> dict[str, Any]:
    """Facts without what is drawn at random."""
    drawn = {"fence": "token", "signer": "identity"}
    return {
        name: {k: v for k, v in of.items() if k != drawn[name]} if name in drawn else of for name, of in found.items()
    }


def within(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Where `new` differs from `old`, but for what it says besides: later versions may know more of an old journal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name, one in old.items():
            yield from within(one, new[name], f"{where}/{name}") if name in new else [f"{where}/{name} is gone"]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for n, one in enumerate(old):
            yield from within(one, new[n], f"{where}/{n}")
    elif old != new or type(old) is not type(new):
        yield f"{where}: {new!r}, not {old!r}"
