"""Refold the journal, check every signature in it, compare it with the chains. A finding is a sentence; none means sound.

Nothing here trusts the running node's memory: the state is folded anew from the records, and the contract on each channel's own
chain is asked. A channel of a chain that cannot be asked is a finding: what was not compared is not sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from node.audit_jobs import audit_jobs
from node.chains import Chains
from node.ports import Chain
from node.store.channels import ChannelBook, fold_record
from node.store.ledger import Ledger, Record
from protocol.channel import ChannelState, JobEnded, Role, VoucherAdded
from protocol.errors import GristmillError, RemoteProtocolError
from protocol.ids import ChannelId
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
    for state in states.values():
        chain = chains.get(state.domain)
        if only is not None and state.domain != only.domain:
            continue
        if chain is not None:
            findings += await _against_chain(state, chain)
        elif state.domain is not None:
            findings.append(
                f"channel {state.channel_id}: on chain {state.domain.chain_id}, contract {state.domain.verifying_contract}, "
                "which is not configured, so it was not compared"
            )
    for one in chains:
        if one.jobs is not None and only in (None, one):
            findings += await audit_jobs(ledger, role, one.jobs, (await one.head()).timestamp)
    return findings


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
    for record in records:
        if record.kind not in KINDS:
            continue
        change = decode_body(record.kind, record.body)
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
    if state.cumulative > state.authorized:
        findings.append(f"{name}: {state.cumulative} signed, only {state.authorized} allocated")
    if state.role is Role.WORKER and state.cumulative > seen.allocated and not seen.closed:
        findings.append(f"{name}: vouchers of {state.cumulative}, {seen.allocated} locked on chain")
    if state.open_jobs:
        findings.append(f"{name}: {len(state.open_jobs)} parts have not ended")
    return findings
