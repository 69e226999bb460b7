"""Refold the journal, check every signature in it, compare it with the chains. A finding is a sentence; none means sound.

Nothing here trusts the running node's memory: the state is folded anew from the records, and the contract on each channel's and
each job's own chain is asked. What is on a chain that cannot be asked is a finding: what was not compared is not sound. Of each
chain the vault is asked too: whether it still has what it owes in the tokens that this journal is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from node.audit_jobs import compare_job, fold_jobs
from node.audit_txs import TX_KINDS, check_transactions
from node.chains import Chains
from node.ports import Chain, VaultOnChain
from node.signer.journal import BEGUN
from node.store.channels import ChannelBook, fold_record
from node.store.errors import LedgerDamaged
from node.store.ledger import ADOPTED, Ledger, Record
from node.store.votes import VOTED, votes
from protocol.batch import BatchState
from protocol.channel import Change as ChannelChange
from protocol.channel import ChannelState, JobEnded, Role, VoucherAdded
from protocol.errors import GristmillError, LocalProtocolError, RemoteProtocolError
from protocol.ids import ZERO_HASH, Address, ChannelId, JobId
from protocol.job import receipt_from_wire
from protocol.keys import recover
from protocol.messages import JOB_PROTOCOL, ReceiptMessage, decode
from protocol.records import KINDS, decode_body
from protocol.typed_data import Allocation, Domain, Voucher


async def audit(ledger: Ledger, role: Role, chains: Chains, only: Chain | None = None) -> list[str]:
    """Findings, empty when every invariant holds. Raises `ChainError` when a chain cannot be asked.

    `only`: compare with this chain alone; everything that needs no chain is checked all the same.
    """
    records = list(ledger.records())
    states, findings = fold(records, role, chains.domains)
    if not findings and ChannelBook.restore(ledger, role, chains.domains).channels != states:
        findings = ["the snapshot that a start begins with is not what the records lead to"]
    findings += check_signatures(records, states)
    if role is Role.CLIENT:
        findings += check_payments(records)
    findings += check_transactions(records)
    jobs, wrong = fold_jobs(records, role)
    findings += wrong
    for state in states.values():
        if state.domain is None or (only is not None and state.domain != only.domain):
            continue
        chain = chains.get(state.domain)
        if chain is None:
            findings.append(f"channel {state.channel_id}: {_elsewhere(state.domain)}")
        else:
            findings += await _against_chain(state, chain)
    for chain in chains if only is None else (only,):
        findings += await _against_vault(chain, chains.name(chain.domain), tokens_on(chain.chain_id, states, jobs))
    return findings + await _against_jobs(jobs, chains, only)


def audit_owner(ledger: Ledger) -> list[str]:
    """Findings about an owner's journal. It holds transactions and the votes of a juror; whatever else is in it is misplaced."""
    records = list(ledger.records())
    known = (*TX_KINDS, VOTED, BEGUN, ADOPTED)
    findings = [f"record {r.seq}: {r.kind} is no business of an owner" for r in records if r.kind not in known]
    try:
        votes(ledger)
    except LedgerDamaged as error:
        findings.append(str(error))
    return findings + check_transactions(records)


def fold(
    records: Iterable[Record], role: Role, domains: Sequence[Domain] = ()
) -> tuple[dict[ChannelId, ChannelState], list[str]]:
    """The state that the records lead to, and where they break a rule."""
    states: dict[ChannelId, ChannelState] = {}
    for record in records:
        try:
            fold_record(role, states, record, domains)
        except GristmillError as error:
            return states, [f"record {record.seq} ({record.kind}) breaks a rule: {error}"]
    return states, []


def check_signatures(records: Iterable[Record], states: dict[ChannelId, ChannelState]) -> list[str]:
    """Every voucher by the session key, every receipt by the worker's key and about its own job, each number once; all of them
    in the domain of the channel's own chain."""
    findings: list[str] = []
    spent: dict[ChannelId, int] = {}
    numbers: set[tuple[ChannelId, int]] = set()
    for record, change in _changes(records):
        state = states.get(change.channel_id)
        domain = None if state is None else state.domain
        if state is None or domain is None:
            continue
        if isinstance(change, VoucherAdded):
            digest = Voucher(change.channel_id, change.cumulative).digest(domain)
            findings += _signed(record, digest, change.signature, state.config.payer_authorizer, "voucher")
        elif isinstance(change, JobEnded):
            spent[change.channel_id] = spent.get(change.channel_id, 0) + change.spent
            if change.receipt:
                findings += _check_receipt(record, change, state, domain)
                if (change.channel_id, change.sequence) in numbers:
                    findings.append(f"record {record.seq}: receipt number {change.sequence} is used twice")
                numbers.add((change.channel_id, change.sequence))
    for channel_id, state in states.items():
        if spent.get(channel_id, 0) != state.spent:
            findings.append(
                f"channel {channel_id}: {state.spent} spent, its parts add up to {spent.get(channel_id, 0)}"
            )
        domain = state.domain
        if domain is None:
            findings.append(f"channel {channel_id}: no configured chain fits its id")
            continue
        allocation = Allocation(channel_id, state.authorized, state.valid_before)
        signer = _recovered(allocation.digest(domain), state.allocation_signature)
        if signer != state.config.payer:
            findings.append(f"channel {channel_id}: its allocation is not signed by the payer")
        if state.config.channel_id(domain) != channel_id:
            findings.append(f"channel {channel_id}: its id does not follow from its configuration")
    return findings


def check_payments(records: Iterable[Record]) -> list[str]:
    """Client: each part of each job was paid on one channel, once.

    A worker has no such rule: job ids are the clients' choice, and whoever asks for one part on two channels has bought it twice.
    """
    findings: list[str] = []
    paid: dict[tuple[JobId, int], ChannelId] = {}
    for record, change in _changes(records):
        # Without a job: what a close conceded to the worker's count.
        if not isinstance(change, JobEnded) or not change.spent or change.job_id == ZERO_HASH:
            continue
        key = (change.job_id, change.part)
        if key in paid:
            findings.append(
                f"record {record.seq}: part {change.part} of job {change.job_id} is paid on channel {change.channel_id}, "
                f"and was paid on channel {paid[key]}"
            )
        paid[key] = change.channel_id
    return findings


def tokens_on(
    chain_id: int, states: Mapping[ChannelId, ChannelState], jobs: Mapping[JobId, BatchState]
) -> list[Address]:
    """The tokens of this chain that the journal is about, in order."""
    paid = {s.config.token for s in states.values() if s.domain is not None and s.domain.chain_id == chain_id}
    return sorted(paid | {job.quote.token for job in jobs.values() if job.domain.chain_id == chain_id})


def check_vault(where: str, token: Address, vault: VaultOnChain) -> list[str]:
    """The vault has what it owes (I1, and that nobody took it by another way)."""
    if vault.coins >= vault.liabilities:
        return []
    return [f"{where}: the vault has {vault.coins} of token {token} and owes {vault.liabilities}"]


def _check_receipt(record: Record, change: JobEnded, state: ChannelState, domain: Domain) -> list[str]:
    try:
        message = decode(JOB_PROTOCOL, change.receipt)
    except RemoteProtocolError as error:
        return [f"record {record.seq}: the receipt is unreadable: {error}"]
    if not isinstance(message, ReceiptMessage):
        return [f"record {record.seq}: {type(message).__name__} is no receipt"]
    receipt = receipt_from_wire(message.receipt)
    findings = _signed(record, receipt.digest(domain), message.signature, state.config.receiver_authorizer, "receipt")
    booked = (change.job_id, change.part, change.channel_id, change.sequence, change.spent)
    if booked != (receipt.job_id, receipt.part, receipt.channel_id, receipt.sequence, receipt.cost):
        findings.append(f"record {record.seq}: what is booked is not what the receipt says")
    return findings


def _signed(record: Record, digest: bytes, signature: bytes, expected: bytes, what: str) -> list[str]:
    signer = _recovered(digest, signature)
    return [] if signer == expected else [f"record {record.seq}: the {what} is not signed by {expected.hex()}"]


def _recovered(digest: bytes, signature: bytes) -> bytes | None:
    try:
        return recover(digest, signature)
    except RemoteProtocolError:
        return None


def _changes(records: Iterable[Record]) -> Iterator[tuple[Record, ChannelChange]]:
    """What the records say about channels. One that is unreadable is passed over: `fold` has told of it."""
    for record in records:
        if record.kind in KINDS:
            try:
                yield record, decode_body(record.kind, record.body)
            except LocalProtocolError:
                continue


def _elsewhere(domain: Domain) -> str:
    where = f"chain {domain.chain_id}, contract {domain.verifying_contract}"
    return f"on {where}, which is not configured, so it was not compared"


async def _against_jobs(jobs: Mapping[JobId, BatchState], chains: Chains, only: Chain | None) -> list[str]:
    """Each job with the Jobs contract that its quote is for, also when the configuration has none or another one there."""
    findings: list[str] = []
    times: dict[Domain, int] = {}
    for job in jobs.values():
        if only is not None and job.domain.chain_id != only.chain_id:
            continue
        chain = next((one for one in chains if one.jobs is not None and one.jobs.domain == job.domain), None)
        if chain is None or chain.jobs is None:
            findings.append(f"job {job.job_id}: {_elsewhere(job.domain)}")
            continue
        if job.domain not in times:
            # Openings and ends count when they are confirmed, and so does the time by which they are missed.
            confirmed = await chain.jobs.confirmed_time()
            times[job.domain] = (await chain.head()).timestamp if confirmed is None else confirmed
        findings += await compare_job(job, chain.jobs, times[job.domain])
    return findings


async def _against_vault(chain: Chain, name: str, tokens: Iterable[Address]) -> list[str]:
    findings: list[str] = []
    for token in tokens:
        findings += check_vault(f"chain {name!r}", token, await chain.vault(token))
    return findings


async def _against_chain(state: ChannelState, chain: Chain) -> list[str]:
    """claimed <= signed (for the signer) <= allocated, and both sides of the journal equal to the contract's."""
    seen = await chain.channel(state.channel_id)
    name = f"channel {state.channel_id}"
    findings = []
    if (seen.allocated, seen.claimed) != (state.allocated, state.claimed):
        findings.append(
            f"{name}: the journal has seen {state.claimed} of {state.allocated} claimed, "
            f"the contract says {seen.claimed} of {seen.allocated}"
        )
    if state.role is Role.CLIENT and seen.claimed > state.cumulative:  # L8: only this side's key signs vouchers
        findings.append(f"{name}: {seen.claimed} claimed, only {state.cumulative} signed")
    # A worker takes vouchers up to what is locked, also by a raise that was too small to be shown to it and journaled.
    if state.role is Role.CLIENT and state.cumulative > state.authorized:
        findings.append(f"{name}: {state.cumulative} signed, only {state.authorized} allocated")
    if state.role is Role.WORKER and state.cumulative > seen.allocated and not seen.closed:
        findings.append(f"{name}: vouchers of {state.cumulative}, {seen.allocated} locked on chain")
    if state.open_jobs:
        findings.append(f"{name}: {len(state.open_jobs)} parts have not ended")
    return findings
