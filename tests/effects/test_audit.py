"""The audit sees what it promises to see: each rule with a journal, or a chain, that breaks it, beside one that does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from node.audit import audit, audit_owner, check_payments, check_signatures, check_vault, fold, tokens_on
from node.audit_jobs import GRACE_S, fold_jobs
from node.audit_txs import check_transactions
from node.chain.memory import MemoryChain, MemoryLedger
from node.chain.memory_jobs import MemoryJobs
from node.chain.pending import PendingTx
from node.chains import Chains
from node.client.client import Client
from node.client.job import Job
from node.client.job_quotes import JobWish
from node.errors import NodeError
from node.ports import VaultOnChain
from node.signer.journal import BEGUN
from node.store.dump import read
from node.store.ledger import Entry, Ledger, Record
from node.store.votes import VOTED
from node.testing import every_kind
from node.testing.every_kind import DOMAIN, JOBS, PARTIES
from node.testing.market import Market, run_market
from protocol.batch import BatchAccepted, BatchOrdered
from protocol.channel import ChannelState, JobEnded, JobOpened, Role, VoucherAdded
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import ZERO_ADDRESS, Address, JobId
from protocol.records import kind_of, to_body
from protocol.transactions import Transaction

HELLO = [{"role": "user", "content": "hello there"}]
BOTH = pytest.mark.parametrize("role", list(Role))


def found(role: Role, path: Path, chains: Chains, only: str = "", entries: Sequence[Entry] | None = None) -> list[str]:
    """What the audit finds in the journal of every kind, or in one of these entries."""
    with Ledger.open(path, chain_tag=bytes(every_kind.account(role))) as ledger:
        ledger.append_sync(every_kind.entries(role) if entries is None else entries)

    async def main() -> list[str]:
        with read(path) as ledger:
            return await audit(ledger, role, chains, chains.named(only) if only else None)

    return trio.run(main)


def other_chains(*ids: int) -> Chains:
    return Chains({f"chain {n}": MemoryChain(MemoryLedger(lambda: 0.0, n), PARTIES.worker.address) for n in ids})


def journal(tmp_path: Path) -> Path:
    return tmp_path / "data" / "journal.sqlite"


# ------------------------------------------------------------------------------------------- chains that are not there


@BOTH
def test_jobs_and_channels_of_a_chain_that_is_not_configured_are_told(tmp_path: Path, role: Role) -> None:
    findings = found(role, journal(tmp_path), other_chains(1, 2))
    for what, where, count in (("job", JOBS, 4), ("channel", DOMAIN, 1)):
        told = [finding for finding in findings if finding.startswith(what) and "was not compared" in finding]
        assert len(told) == count and all(f"contract {where.verifying_contract}" in one for one in told), findings
    # The other channel's record names no chain, and none that is configured fits it.
    assert len(findings) == 6 and "no configured chain fits" in "".join(findings)


@BOTH
def test_a_job_on_another_jobs_contract_of_a_configured_chain_is_told(tmp_path: Path, role: Role) -> None:
    """Not compared with the contract that happens to be there."""
    findings = found(role, journal(tmp_path), other_chains(JOBS.chain_id), f"chain {JOBS.chain_id}")
    assert sum(one.startswith("job") and "was not compared" in one for one in findings) == 4


def test_a_chain_that_was_not_asked_for_is_not_missed(tmp_path: Path) -> None:
    findings = found(Role.WORKER, journal(tmp_path), other_chains(1, 2), "chain 2")
    assert [one for one in findings if "was not compared" in one] == []


async def done(client: Client) -> Job:
    """A batch job that is paid, and in the journal as such."""
    job = await client.post_job("fake", ["one", "two"], max_tokens=8)
    await job.result(20)
    with trio.fail_after(20):
        while not job.state.ended:
            await trio.sleep(0.005)
    await client.book.change([])
    return job


class NoJobs(MemoryChain):
    """A deployment without batch jobs."""

    jobs = None  # type: ignore[assignment]


def test_jobs_on_a_deployment_without_jobs_are_told() -> None:
    async def test(market: Market) -> None:
        await market.worker()
        client = await market.client()
        job = await done(client)
        ledger, account = client.book.ledger, client.wallet.payer.address
        assert await audit(ledger, Role.CLIENT, Chains({"default": MemoryChain(market.ledger, account)})) == []
        findings = await audit(ledger, Role.CLIENT, Chains({"default": NoJobs(market.ledger, account)}))
        assert len(findings) == 1 and str(job.job_id) in findings[0] and "was not compared" in findings[0]

    run_market(test)


def test_what_is_missed_in_time_is_judged_by_the_last_confirmed_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is what is void: a job whose opening may still be confirmed is neither open nor void, and nothing is wrong with it."""
    times: dict[Address, int] = {}

    async def confirmed_time(jobs: MemoryJobs) -> int:
        return times.get(jobs._chain.account, 0)

    async def test(market: Market) -> None:
        worker = await market.worker()
        client = await market.client()
        assert worker.batch is not None

        async def deaf(*_: Any) -> Any:
            raise RemoteProtocolError(WireCode.INTERNAL, "planted")

        monkeypatch.setattr(worker.batch.desk, "_order", deaf)
        monkeypatch.setattr(MemoryJobs, "confirmed_time", confirmed_time)
        with pytest.raises(NodeError, match="has not opened"):
            await client.post_job("fake", ["one"], id="mine", max_tokens=8, wish=JobWish(open_s=0.1))
        until = client.jobs.get("mine").state.quote.valid_before
        market.ledger.advance(until + 2 * GRACE_S - market.ledger.head.timestamp)
        watcher = MemoryChain(market.ledger, PARTIES.worker.address)  # whom the client's own keeper does not ask
        for time, missed in ((until + GRACE_S - 1, False), (until + GRACE_S, True)):
            times[watcher.account] = time
            findings = await audit(client.book.ledger, Role.CLIENT, Chains({"default": watcher}))
            assert [f"neither opened nor void {time - until} s" in one for one in findings] == [True] * missed

    run_market(test)


def changed(role: Role, kind: type[Any], **values: Any) -> list[Entry]:
    """The journal of every kind with other values in the first record of that kind."""
    entries = every_kind.entries(role)
    place = next(n for n, entry in enumerate(entries) if entry.kind == kind_of(kind))
    body = {**entries[place].body, **values}  # type: ignore[dict-item]
    entries[place] = Entry(entries[place].kind, entries[place].subject, body)
    return entries


@pytest.mark.parametrize(
    ("role", "kind", "field", "told"),
    [
        (Role.WORKER, BatchOrdered, "quote_signature", "its quote is not signed by the worker"),
        (Role.WORKER, BatchOrdered, "order_signature", "its order is not signed by the client"),
        (Role.WORKER, BatchAccepted, "signature", "the acceptance is not signed by the client"),
        (Role.CLIENT, BatchOrdered, "quote_signature", "its quote is not signed by the worker"),
    ],
)
def test_words_are_told_once_however_many_chains_there_are(
    tmp_path: Path, role: Role, kind: type[Any], field: str, told: str
) -> None:
    findings = found(role, journal(tmp_path), other_chains(1, 2, 3), entries=changed(role, kind, **{field: bytes(65)}))
    assert sum(told in finding for finding in findings) == 1, findings


def test_an_unreadable_record_is_told_and_ends_no_audit(tmp_path: Path) -> None:
    for kind in (VoucherAdded, BatchOrdered):
        entries = changed(Role.WORKER, kind, channel_id=5, job_id=5)
        findings = found(Role.WORKER, tmp_path / kind.__name__ / "journal.sqlite", other_chains(1), entries=entries)
        assert any("breaks a rule" in finding and "unreadable" in finding for finding in findings)


# ------------------------------------------------------------------------------------------------------------- vault


def test_solvency_is_coins_against_liabilities() -> None:
    token = Address(b"\x05" * 20)
    assert check_vault("here", token, VaultOnChain(10, 10)) == check_vault("here", token, VaultOnChain(11, 10)) == []
    (finding,) = check_vault("here", token, VaultOnChain(9, 10))
    assert "has 9" in finding and "owes 10" in finding and str(token) in finding


@BOTH
def test_the_tokens_of_a_chain_are_those_of_its_own_channels_and_jobs(role: Role) -> None:
    records = every_kind.records(every_kind.entries(role))
    states, jobs = fold(records, role, [DOMAIN])[0], fold_jobs(records, role)[0]
    assert tokens_on(DOMAIN.chain_id, states, {}) == tokens_on(DOMAIN.chain_id, {}, jobs) == [PARTIES.token]
    assert tokens_on(5, states, jobs) == []


@pytest.mark.parametrize("native", [False, True])
def test_a_vault_that_lacks_one_coin_is_seen_on_its_chain_and_in_its_token(native: bool) -> None:
    async def test(market: Market) -> None:
        two = market.add_chain("two", 2)
        token = ZERO_ADDRESS if native else two.token
        accepts = (market.accepted(), market.accepted(ledger=two, token=token))
        worker = await market.worker(settings=market.settings(*accepts), chains=("default", "two"))
        client = await market.client(means=[market.means(two, token=token)], chains=("default", "two"))
        async with client.chat("fake", HELLO) as stream:
            await stream.text()
        with trio.fail_after(5):
            while worker.server.busy:
                await trio.sleep(0.005)
        nodes: list[tuple[Ledger, Role, Chains]] = [
            (worker.ledger, Role.WORKER, worker.chains),
            (client.book.ledger, Role.CLIENT, client.wallet.chains),
        ]
        steal = lambda which: lambda world, now: (world.pay(which, two.vault, -1), [])  # noqa: E731
        give = lambda which: lambda world, now: (world.pay(which, two.vault, 1), [])  # noqa: E731
        two.apply(give(two.token if native else ZERO_ADDRESS))  # somebody's coins that the vault does not owe
        for ledger, role, chains in nodes:
            await worker.book.change([]), await client.book.change([])
            assert await audit(ledger, role, chains) == []
        two.apply(steal(token))
        for ledger, role, chains in nodes:
            (finding,) = await audit(ledger, role, chains)
            assert "'two'" in finding and str(token) in finding and "owes" in finding
            assert await audit(ledger, role, chains, chains.named("default")) == []
            assert len(await audit(ledger, role, chains, chains.named("two"))) == 1
        two.apply(give(token))
        assert await audit(*nodes[0]) == []

    run_market(test)


def test_the_vault_is_asked_in_the_tokens_of_batch_jobs_too() -> None:
    async def test(market: Market) -> None:
        await market.worker()
        client = await market.client()
        await done(client)
        assert client.book.channels == {}
        ledger = market.ledger
        ledger.apply(lambda world, now: (world.pay(ledger.token, ledger.vault, -1), []))
        (finding,) = await audit(client.book.ledger, Role.CLIENT, client.wallet.chains)
        assert str(ledger.token) in finding

    run_market(test)


# ---------------------------------------------------------------------------------------------------------- payments


async def chatted(client: Client) -> tuple[JobId, ChannelState]:
    async with client.chat("fake", HELLO) as stream:
        await stream.text()
    assert stream.receipt is not None and stream.channel_id is not None
    return JobId(stream.receipt.job_id), client.book.channels[stream.channel_id]


@pytest.mark.parametrize("cost", [0, 7])
def test_a_part_that_was_paid_on_two_channels_is_seen(cost: int) -> None:
    """What a client would write that asks again under the same name without looking what it has paid already."""

    async def test(market: Market) -> None:
        await market.worker(settings=market.settings(market.accepted(), market.accepted(token=ZERO_ADDRESS)))
        means = [market.means(rate=None), market.means(token=ZERO_ADDRESS, rate=None)]
        client = await market.client(means=means)
        job, first = await chatted(client)
        client.wallet.means = {means[1].asset: means[1]}
        _, second = await chatted(client)
        assert second.channel_id != first.channel_id
        opened = JobOpened(second.channel_id, job, 0, 0, 10)
        await client.book.change([opened, JobEnded(second.channel_id, job, 0, cost, 0, b"")])
        findings = await audit(client.book.ledger, Role.CLIENT, client.wallet.chains)
        if not cost:  # asked, refused, and not paid
            assert findings == []
            return
        (finding,) = findings
        assert all(str(one) in finding for one in (job, first.channel_id, second.channel_id))

    run_market(test)


def records_of(*changes: Any) -> list[Record]:
    return every_kind.records([Entry(kind_of(change), bytes(change.channel_id), to_body(change)) for change in changes])


def ended(salt: int, job: bytes, part: int, spent: int) -> JobEnded:
    return JobEnded(every_kind.config(salt).channel_id(DOMAIN), JobId(job), part, spent, 0, b"")


def test_one_payment_for_each_part() -> None:
    job = b"\x01" * 32
    assert check_payments(records_of(ended(1, job, 0, 5), ended(2, job, 1, 5), ended(2, b"\x02" * 32, 0, 5))) == []
    assert check_payments(records_of(ended(1, job, 0, 0), ended(2, job, 0, 5), ended(1, job, 0, 0))) == []
    assert check_payments(records_of(ended(1, bytes(32), 0, 5), ended(2, bytes(32), 0, 5))) == []  # conceded at a close
    for salts in ((1, 2), (1, 1)):
        (finding,) = check_payments(records_of(*(ended(salt, job, 3, 5) for salt in salts)))
        assert finding.startswith("record 2: part 3")


# ------------------------------------------------------------------------------------------------------ transactions


TO, ANCHOR = Address(b"\x22" * 20), "0c" * 32
KEY = PARTIES.payer


def signed(
    nonce: int,
    data: bytes = b"\x01",
    *,
    request: str = "",
    fee: int = 10,
    chain: int = 31337,
    value: int = 0,
    anchor: str = ANCHOR,
) -> Entry:
    transaction = Transaction(chain, nonce, 1, fee, 21_000, TO, value, data)
    made = PendingTx("call", transaction.signed(KEY.sign(transaction.digest())), anchor, request)
    return Entry("tx_signed", bytes(KEY.address), made.to_body())


def but(entry: Entry, **values: Any) -> Entry:
    """The record, with these values written over."""
    return Entry(entry.kind, entry.subject, {**body_of(entry), **values})


def final(of: Entry, **more: Any) -> Entry:
    body = {"purpose": "call", "nonce": body_of(of)["nonce"], "hash": body_of(of)["hash"], "block": 5}
    return Entry("tx_final", of.subject, {**body, "gas_used": 1, "ok": True, "error": "", **more})


def dropped(of: Entry) -> Entry:
    return Entry("tx_dropped", of.subject, {"nonce": body_of(of)["nonce"], "hash": body_of(of)["hash"], "reason": "x"})


def body_of(entry: Entry) -> dict[str, Any]:
    return entry.body  # type: ignore[return-value]


def judged(*entries: Entry) -> list[str]:
    return check_transactions(every_kind.records(entries))


A, B, DEARER = signed(1), signed(1, b"\x02"), signed(1, fee=20)
ASKED, ASKED_ELSE, AGAIN = signed(1, request="id"), signed(2, b"\x02", request="id"), signed(2, request="id")

SOUND: dict[str, list[Entry]] = {
    "one lands": [A, final(A)],
    "none has landed": [A],
    "replaced by the same call with higher fees": [A, DEARER, final(DEARER)],
    "landed twice, after a reorganisation": [A, final(A), final(A, block=7)],
    "thrown out, replaced with higher fees, and landed again": [A, final(A), DEARER, final(DEARER)],
    "dropped, and its nonce used for another call": [A, dropped(A), B, final(B)],
    "landed, thrown out, dropped, and another one": [A, final(A), dropped(A), B, final(B)],
    "the same nonce on two chains": [A, signed(1, b"\x02", chain=5)],
    "the same nonce on a devnet that was started anew": [A, final(A), signed(1, b"\x02", anchor="ff")],
    "one id, one call, in two attempts": [ASKED, signed(1, request="id", fee=20), final(ASKED)],
    "an id whose call was dropped": [ASKED, dropped(ASKED), ASKED_ELSE, final(ASKED_ELSE)],
    "an id that was answered, thrown out and done again": [ASKED, final(ASKED), dropped(ASKED), AGAIN, final(AGAIN)],
    "no id is no id": [signed(1), final(signed(1)), signed(2, b"\x02")],
    "an id on two chains": [ASKED, signed(2, b"\x02", request="id", chain=5)],
    "what is no transaction": [Entry("other", b"", {"hash": 1}), A],
}

BROKEN: dict[str, tuple[list[Entry], str]] = {
    "another call under a nonce that may be out": ([A, B], "nonce 1 on chain 31337 is signed for a second call"),
    "another value is another call": ([A, signed(1, value=1)], "is signed for a second call"),
    "another call under a nonce that was used": ([A, final(A), B], "is signed for a second call"),
    "two that landed": ([A, dropped(A), B, final(B), final(A)], "two calls landed with nonce 1"),
    "one id for two calls": ([ASKED, final(ASKED), ASKED_ELSE], "request id 'id' is used for two different calls"),
    "one id for two calls, none of which has landed": ([ASKED, ASKED_ELSE], "is used for two different calls"),
    "one id, twice": (
        [ASKED, final(ASKED), AGAIN, final(AGAIN)],
        "request id 'id' happened twice",
    ),
    "an end of what was never signed": ([final(A)], "tx_final of a transaction that was not signed here"),
    "an end under another nonce": ([A, final(A, nonce=2)], "tx_final with nonce 2 of a transaction with nonce 1"),
    "another hash than that of the bytes": ([but(A, hash="00" * 32)], "hash is not that of its bytes"),
    "other bytes than the record says": ([but(A, data="05")], "bytes are not what the record says"),
    "another value than that of the bytes": ([but(A, gas=21_001)], "bytes are not what the record says"),
    "signed by another key": (
        [Entry("tx_signed", bytes(PARTIES.worker.address), body_of(A))],
        f"is not signed by {PARTIES.worker.address.hex()}",
    ),
    "no record of ours": ([Entry("tx_signed", bytes(KEY.address), {"nonce": "x"})], "tx_signed is unreadable"),
    "an end without a hash": ([Entry("tx_final", bytes(KEY.address), {})], "tx_final is unreadable"),
}


@pytest.mark.parametrize("case", SOUND)
def test_transactions_that_are_sound(case: str) -> None:
    assert judged(*SOUND[case]) == []


@pytest.mark.parametrize("case", BROKEN)
def test_transactions_that_are_not(case: str) -> None:
    entries, told = BROKEN[case]
    findings = judged(*entries)
    assert len(findings) == 1 and told in findings[0] and findings[0].startswith(f"record {len(entries)}: ")


@BOTH
def test_the_audit_of_a_node_judges_its_transactions(tmp_path: Path, role: Role) -> None:
    entries = every_kind.entries(role)
    last = next(entry for entry in reversed(entries) if entry.kind == "tx_signed")
    beside = [*entries, Entry("tx_signed", last.subject, {**body_of(last), "data": "05"})]
    chains = other_chains(1)
    before = found(role, tmp_path / "a" / "journal.sqlite", chains, entries=entries)
    after = found(role, tmp_path / "b" / "journal.sqlite", chains, entries=beside)
    assert len(after) == len(before) + 2 and "a second call" in "".join(after)


# ------------------------------------------------------------------------------------------------------------- owner


def owners(path: Path, entries: Sequence[Entry]) -> list[str]:
    with Ledger.open(path, chain_tag=bytes(KEY.address)) as ledger:
        ledger.append_sync(entries)
    with read(path) as ledger:
        return audit_owner(ledger)


def test_an_owners_journal_holds_sound_transactions_votes_and_nothing_else(tmp_path: Path) -> None:
    begun = Entry(BEGUN, b"", {"table": bytes(16)})
    assert owners(tmp_path / "sound" / "o.sqlite", [begun, A, final(A)]) == []
    (finding,) = owners(tmp_path / "nonce" / "o.sqlite", [begun, A, B])
    assert "a second call" in finding
    vote = Entry(VOTED, bytes(32), {"vote": 1, "result_hash": bytes(32), "secret": bytes(32)})
    assert owners(tmp_path / "vote" / "o.sqlite", [vote, A]) == []
    (finding,) = owners(tmp_path / "lost vote" / "o.sqlite", [but(vote, vote=9), A])
    assert "it is no vote" in finding
    strange = every_kind.entries(Role.CLIENT)[1]
    (finding,) = owners(tmp_path / "strange" / "o.sqlite", [begun, strange, A])
    assert finding == "record 2: channel_opened is no business of an owner"


# ------------------------------------------------------------------------------------------------------- every kind


@BOTH
def test_the_journal_of_every_kind_is_sound_as_far_as_no_chain_is_asked(role: Role) -> None:
    """So that whatever the tests above find is what they have planted."""
    records = every_kind.records(every_kind.entries(role))
    states, findings = fold(records, role, [DOMAIN])
    checks: list[Callable[[], list[str]]] = [
        lambda: check_signatures(records, states),
        lambda: check_payments(records),
        lambda: check_transactions(records),
        lambda: fold_jobs(records, role)[1],
    ]
    assert findings == [] and [check() for check in checks] == [[], [], [], []]
    assert len(states) == 2
