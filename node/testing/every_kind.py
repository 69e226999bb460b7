"""A worker's, a client's and an owner's journal with a record of every kind that a node of this version writes. Product code: for
fixtures.

The journals are sound, as far as they go: the rules hold, and signatures are by who should have signed. They are the same in
every run, but for the tokens of epochs. What is in one and not in the other is what the other side never records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import trio
import trio.testing

from node.chain.eth import Eth
from node.chain.rpc import RpcError
from node.chain.tx_policy import TxPolicy
from node.chain.txs import TxSender
from node.errors import ChainError, TxTimeout
from node.signer.bare import Bare
from node.signer.journal import BEGUN
from node.store import channels
from node.store.channels import ChannelBook
from node.store.evidence import REFUSED
from node.store.fence import Fence
from node.store.ledger import ADOPTED, Entry, Ledger
from node.store.records import Record
from node.store.records import encode as encoded
from node.store.signed import _entry as _entry_of
from node.store.votes import VOTED
from node.testing.pair import Parties, key
from node.testing.pool_node import PoolNode
from protocol import batch, channel
from protocol.batch import (
    BatchAccepted,
    BatchCancelled,
    BatchDisputed,
    BatchGivenUp,
    BatchOrdered,
    BatchResultChecked,
    BatchResultKept,
    BatchResultRefused,
    BatchSeen,
    BatchVoided,
)
from protocol.channel import (
    AllocationRaised,
    ChainSeen,
    ChannelOpened,
    CloseSigned,
    JobEnded,
    JobOpened,
    Role,
    VoucherAdded,
)
from protocol.escrow import JobState, Outcome
from protocol.ids import ZERO_HASH, Address, ChannelId, Hash32, JobId, ModelId, keccak256
from protocol.job import receipt_to_wire
from protocol.keys import PrivateKey
from protocol.messages import ReceiptMessage, encode, quote_to_wire
from protocol.pricing import Price
from protocol.records import kind_of, to_body
from protocol.signing import QuotedOrder, Signable
from protocol.signing_history import word_of
from protocol.typed_data import (
    Acceptance,
    Allocation,
    ChannelConfig,
    Close,
    Domain,
    Order,
    Quote,
    Receipt,
    Submission,
    Voucher,
)
from protocol.workload import Terms, encode_terms, terms_hash

PARTIES: Final = Parties()
OWNER: Final = key("owner")
DOMAIN: Final = PARTIES.domain
JOBS: Final = Domain(DOMAIN.chain_id, Address(b"\x0a" * 20))
AT_MS: Final = 1_800_000_000_000
NOW: Final = AT_MS // 1000


def named(name: str) -> Hash32:
    return Hash32(keccak256(b"every kind " + name.encode()))


# ---------------------------------------------------------------------------------------------------------- channels


def config(salt: int) -> ChannelConfig:
    return replace(PARTIES.config, salt=Hash32(salt.to_bytes(32)))


def channel_changes(role: Role) -> list[channel.Change]:
    """One channel from its opening to its end, and one from before journals named their chain, with a part under way."""
    first, second = config(1), config(2)
    here, there = first.channel_id(DOMAIN), second.channel_id(DOMAIN)
    jobs = [JobId(named(f"job {n}")) for n in range(3)]
    given = (lambda number: number) if role is Role.WORKER else (lambda number: 0)
    close = PARTIES.worker.sign(Close(here, 1_450).digest(DOMAIN))
    return [
        ChannelOpened(here, first, 5_000, NOW + 900, _allocation(here, 5_000, NOW + 900), DOMAIN),
        ChainSeen(here, 5_000, 0, 0, False),
        JobOpened(here, jobs[0], 0, given(1), 900),
        _voucher(here, 700),
        _receipted(here, jobs[0], 650, 1),
        AllocationRaised(here, 9_000, NOW + 1_800, _allocation(here, 9_000, NOW + 1_800)),
        ChainSeen(here, 9_000, 0, 0, False),
        JobOpened(here, jobs[1], 3, given(2), 2_000),
        _voucher(here, 1_500),
        JobEnded(here, jobs[1], 3, 800, 0, b""),
        ChainSeen(here, 9_000, 650, 0, False),
        *([CloseSigned(here, 1_450, b"")] if role is Role.WORKER else []),
        CloseSigned(here, 1_450, close),
        ChainSeen(here, 9_000, 1_450, 0, True),
        ChannelOpened(there, second, 2**100, 2**40 - 1, _allocation(there, 2**100, 2**40 - 1)),
        ChainSeen(there, 2**100, 0, 0, False),
        JobOpened(there, jobs[2], 1, given(1), 2**90),
        _voucher(there, 2**80),
        ChainSeen(there, 2**100, 0, NOW + 3_600, False),
    ]


def _allocation(channel_id: ChannelId, total: int, valid_before: int) -> bytes:
    return PARTIES.payer.sign(Allocation(channel_id, total, valid_before).digest(DOMAIN))


def _voucher(channel_id: ChannelId, total: int) -> VoucherAdded:
    return VoucherAdded(channel_id, total, PARTIES.session.sign(Voucher(channel_id, total).digest(DOMAIN)))


def _receipted(channel_id: ChannelId, job_id: JobId, cost: int, number: int) -> JobEnded:
    return JobEnded(channel_id, job_id, 0, cost, number, _receipt(channel_id, job_id, cost, number))


def refused() -> bytes:
    """A receipt that the worker signed and the client did not take: its number is used."""
    return _receipt(config(1).channel_id(DOMAIN), JobId(named("job 3")), 651, 1)


def _receipt(channel_id: ChannelId, job_id: JobId, cost: int, number: int) -> bytes:
    receipt = Receipt(
        job_id=job_id,
        part=0,
        channel_id=channel_id,
        sequence=number,
        model_id=ModelId(named("model")),
        request_hash=named("request"),
        params_hash=named("params"),
        output_digest=named("output"),
        input_tokens=9,
        output_tokens=64,
        cost=cost,
        commitment=ZERO_HASH,
        started=AT_MS,
        finished=AT_MS + 900,
        finish_reason=1,
    )
    signature = PARTIES.worker.sign(receipt.digest(DOMAIN))
    return encode(ReceiptMessage(receipt_to_wire(receipt), signature))


# -------------------------------------------------------------------------------------------------------- batch jobs


class BatchJob:
    """One quoted job, and what is said about it."""

    def __init__(self, number: int) -> None:
        self.terms = Terms(Price(10, 1_000_000, 20_000_000), (3, 4, 5), 4, nonce=number.to_bytes(16))
        self.quote = Quote(
            spec_hash=named("specification"),
            client=PARTIES.payer.address,
            worker=PARTIES.worker.address,
            token=PARTIES.token,
            amount=self.terms.amount,
            penalty=400,
            valid_before=NOW + 120,
            deadline=NOW + 900,
            window=900,
            resolver=Address(b"\x08" * 20),
            salt=terms_hash(encode_terms(self.terms)),
        )
        self.job_id = self.quote.job_id(JOBS)
        self.number = number
        self.claimed = self.quote.amount - 5
        self.result = named(f"result {number}")

    def ordered(self, role: Role) -> BatchOrdered:
        mine = role is Role.CLIENT
        return BatchOrdered(
            job_id=self.job_id,
            chain_id=JOBS.chain_id,
            contract=JOBS.verifying_contract,
            label=f"job {self.number}" if mine else "",
            peer=str((PARTIES.worker if mine else PARTIES.session).peer_id),
            address="/ip4/127.0.0.1/tcp/4001" if mine else "",
            model_id=named("model"),
            quote=encode(quote_to_wire(self.quote)),
            quote_signature=PARTIES.worker.sign(self.quote.digest(JOBS)),
            terms=encode_terms(self.terms),
            order_signature=b"" if mine else PARTIES.payer.sign(Order(self.job_id).digest(JOBS)),
        )

    def seen(
        self, state: JobState, *, resolve_by: int = 0, outcome: Outcome = Outcome.NONE, paid: int = 0
    ) -> BatchSeen:
        there = state in (JobState.SUBMITTED, JobState.DISPUTED)
        return BatchSeen(
            self.job_id,
            int(state),
            NOW + 1_500 if there else 0,
            self.claimed if there else 0,
            self.result if there or paid else ZERO_HASH,
            resolve_by,
            int(outcome),
            paid,
        )

    def kept(self) -> BatchResultKept:
        return BatchResultKept(self.job_id, self.result, self.claimed, 2_000, NOW + 300)

    def accepted(self, role: Role) -> BatchAccepted:
        said = Acceptance(self.job_id, self.result, self.claimed)
        signature = PARTIES.payer.sign(said.digest(JOBS)) if role is Role.WORKER else b""
        return BatchAccepted(self.job_id, self.result, self.claimed, signature, NOW + 400)


def batch_changes(role: Role) -> list[batch.Change]:
    """Four jobs: done and paid, given up or cancelled, never opened, in dispute."""
    done, lost, void, disputed = map(BatchJob, range(1, 5))
    worker = role is Role.WORKER
    return [
        done.ordered(role),
        done.seen(JobState.OPEN),
        *([done.kept()] if worker else []),
        done.seen(JobState.SUBMITTED),
        *([] if worker else [BatchResultChecked(done.job_id, done.result, done.claimed, done.claimed, 2_000)]),
        done.accepted(role),
        done.seen(JobState.SETTLED, paid=done.claimed),
        lost.ordered(role),
        lost.seen(JobState.OPEN),
        BatchGivenUp(lost.job_id, "too slow") if worker else BatchCancelled(lost.job_id),
        lost.seen(JobState.REFUNDED),
        void.ordered(role),
        BatchVoided(void.job_id, NOW + 130),
        disputed.ordered(role),
        disputed.seen(JobState.OPEN),
        *([disputed.kept()] if worker else []),
        disputed.seen(JobState.SUBMITTED),
        *([] if worker else [BatchResultRefused(disputed.job_id, disputed.result, "not the bytes of its hash")]),
        *([] if worker else [BatchDisputed(disputed.job_id, named("evidence"))]),
        disputed.seen(JobState.DISPUTED, resolve_by=NOW + 90_000, outcome=Outcome.REJECT),
    ]


def _on_record(role: Role) -> list[Entry]:
    """What was signed about the first job, after it was signed."""
    done = BatchJob(1)
    words: list[Signable] = [Submission(done.job_id, done.result, done.claimed)]
    if role is Role.CLIENT:
        words = [QuotedOrder(done.quote, Order(done.job_id)), Acceptance(done.job_id, done.result, done.claimed)]
    return [_entry_of(word) for one in words if (word := word_of(one, JOBS)) is not None]


# ------------------------------------------------------------------------------------------------------ transactions


class _Picky(PoolNode):
    """Takes nothing while told so."""

    refusing = False

    def _take(self, raw: bytes) -> bytes:
        if self.refusing:
            raise RpcError("eth_sendRawTransaction", -32000, "not today", None)
        return super()._take(raw)


def transactions(key: PrivateKey) -> list[Entry]:
    """What a real sender writes: a call that lands, one that no node takes, one that is never mined and replaced once."""
    entries: list[Entry] = []

    async def journal(kind: str, subject: bytes, body: Mapping[str, Any]) -> None:
        entries.append(Entry(kind, subject, body))

    async def main() -> None:
        node, to = _Picky(), Address(b"\x22" * 20)
        policy = TxPolicy(poll=0.5, bump_after=10.0, give_up_after=15.0)
        sender = TxSender(Eth(node), Bare(key), DOMAIN.chain_id, anchor=b"\x0c" * 32, journal=journal, policy=policy)

        async def mine() -> None:
            while True:
                await trio.sleep(1)
                node.mine()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine)
            await sender.send("deposit", to, b"\x01\x02", 2**70, request="a request:deposit")
            nursery.cancel_scope.cancel()
        node.refusing = True
        try:
            await sender.send("claim", to, b"\x03")
        except ChainError:
            node.refusing = False
        try:
            await sender.send("settle", to, b"\x04")
        except TxTimeout:
            pass

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return entries


# ----------------------------------------------------------------------------------------------------------- journals


def _entry(change: channel.Change | batch.Change, subject: bytes) -> Entry:
    return Entry(kind_of(change), bytes(subject), to_body(change))


def entries(role: Role) -> list[Entry]:
    """Everything in the journal of that role, in order."""
    money = [_entry(change, change.channel_id) for change in channel_changes(role)]
    jobs = [_entry(change, change.job_id) for change in batch_changes(role)]
    reopened = next(n for n, entry in enumerate(money) if n and entry.kind == kind_of(ChannelOpened))
    lost = {"epoch": 3, "seq": 40, "hash": bytes(named("lost"))}
    return [
        Entry(BEGUN, b"", {"table": bytes(range(16))}),
        *money[:reopened],
        Entry(ADOPTED, b"", lost),
        Entry(BEGUN, b"", {"table": bytes(16)}),
        *money[reopened:],
        *jobs,
        *_on_record(role),
        *transactions(PARTIES.worker if role is Role.WORKER else PARTIES.payer),
        *([] if role is Role.WORKER else [Entry(REFUSED, bytes(config(1).channel_id(DOMAIN)), {"receipt": refused()})]),
    ]


def owner_entries() -> list[Entry]:
    """Everything in the journal of an owner who is a juror, in order."""
    vote = {"vote": int(Outcome.REJECT), "result_hash": bytes(named("own result")), "secret": bytes(named("secret"))}
    return [
        Entry(BEGUN, b"", {"table": bytes(range(16))}),
        *transactions(OWNER),
        Entry(VOTED, bytes(named("case")), vote),
    ]


def account(role: Role) -> Address:
    """Whose journal it is."""
    return (PARTIES.worker if role is Role.WORKER else PARTIES.payer).address


def records(given: Sequence[Entry]) -> list[Record]:
    """The same without a file, for rules that look at records alone."""
    return [Record(n, AT_MS, one.kind, one.subject, encoded(one)[2], b"") for n, one in enumerate(given, 1)]


def write(path: Path, role: Role, fence: Fence | None = None) -> None:
    """Make the journal of that role, with a snapshot of the fold at its end."""
    with _opened(path, account(role), fence) as ledger:
        for entry in entries(role):
            ledger.append_sync([entry])
        book = ChannelBook.restore(ledger, role, [DOMAIN])
        book._since = channels.SNAPSHOT_EVERY  # as if there had been so many
        book._keep()


def write_owner(path: Path) -> None:
    with _opened(path, OWNER.address) as ledger:
        for entry in owner_entries():
            ledger.append_sync([entry])


def _opened(path: Path, account: Address, fence: Fence | None = None) -> Ledger:
    times = iter(range(AT_MS, AT_MS + 10**6, 7))
    return Ledger.open(path, chain_tag=bytes(account), fence=fence, clock=lambda: next(times))


def plain(value: Any) -> Any:
    """A state as JSON, every field by its name: bytes as 0x hex, what is keyed by a part as rows."""
    if isinstance(value, bytes | bytearray):
        return "0x" + value.hex()
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else json_key(k): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(one) for one in value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.value if hasattr(value, "value") else value


def json_key(key: Any) -> str:
    """Of a part: its job and its number."""
    return "/".join(map(str, map(plain, key))) if isinstance(key, tuple) else str(plain(key))
