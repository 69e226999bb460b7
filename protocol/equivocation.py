"""Two receipts of one worker that contradict each other: what `Disputes.proveEquivocation` takes, and why it would not.

Rules
- Same channel, same number, different content, both signed by the receiver's own key. A worker that keeps its journal never
  signs such two; one that runs from two copies of it does, and so does a cheat.
- A receipt need not be true to be evidence: one that the client refused counts like one that it paid for.
- A key that the payer chose (`receiver_authorizer`) proves nothing against the receiver.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import GristmillError
from protocol.keys import recover
from protocol.typed_data import ChannelConfig, Domain, Receipt


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    receipt: Receipt
    signature: bytes


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Not checked yet: `fault` tells."""

    first: SignedReceipt
    second: SignedReceipt


def contradict(first: Receipt, second: Receipt) -> bool:
    """Whether no honest worker signs both."""
    same = (first.channel_id, first.sequence) == (second.channel_id, second.sequence)
    return same and first != second


def fault(found: Contradiction, config: ChannelConfig, domain: Domain) -> str | None:
    """Why the contract would not convict by it; None when it would. `domain`: of the Channels contract."""
    first, second = found.first.receipt, found.second.receipt
    if first.channel_id != second.channel_id:
        return f"one is of channel {first.channel_id}, the other of {second.channel_id}"
    if first.sequence != second.sequence:
        return f"one has number {first.sequence}, the other {second.sequence}"
    if first == second:
        return "they say the same"
    if config.channel_id(domain) != first.channel_id:
        return f"they are not of this channel, or of another chain: {first.channel_id}"
    for name, one in (("first", found.first), ("second", found.second)):
        try:
            signer = recover(one.receipt.digest(domain), one.signature)
        except GristmillError:
            return f"the signature of the {name} is none"
        if signer != config.receiver:
            return f"the {name} is signed by {signer}, not by the worker {config.receiver}"
    return None
