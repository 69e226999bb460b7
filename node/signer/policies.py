"""Which policy a node's signer gets: from the deployments of its chains and the settings of its role. Made once, before a start.

A policy is closed: what a role does not do, its signer does not sign.
- A worker speaks for its channels and jobs, and to the market; its transactions go to our contracts.
- A client's keys spend the tokens that the configuration names, so much a day; money leaves the vault for the payer's own account
  only, or for accounts that a person has named for this run.
- The hot key's consent to be registered, which decides where its earnings go, is signed for `gristmill payout set` alone; a
  benchmark for `gristmill bench` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from node.chain.artifacts import contract
from node.chain.deployment import Deployment
from node.chain.tx_policy import DEFAULT_POLICY
from protocol.ids import ZERO_ADDRESS, Address
from protocol.signing import OWN_ACCOUNT, CallRule, DomainRule, FeeRule, KeyRole, Policy, TokenRule
from protocol.typed_data import MARKET_DOMAIN

_DOMAINS: Final = {
    "Channels": ("Voucher", "Ask", "Receipt", "Close", "ChannelAllocation"),
    "Jobs": ("Quote", "QuotedOrder", "Submission", "Acceptance"),
}
"""By contract, what is signed for it. The role decides which of them."""
_CALLS: Final = {
    KeyRole.WORKER: ("Channels", "Jobs", "Disputes", "Committee", "Attestations"),
    KeyRole.PAYER: ("Channels", "Jobs", "Disputes"),
    KeyRole.OWNER: ("Workers", "Disputes", "Committee", "Attestations"),
}
"""By role, the contracts all of whose functions it may call. The vault is for all, with what follows."""


NO_LIMITS: Final[Mapping[int, int]] = MappingProxyType({})
"""By chain id, wei of fees on one day."""


@dataclass(frozen=True, slots=True)
class Spending:
    """A token that a client pays with."""

    chain_id: int
    token: Address
    day: int
    """Smallest unit: most that may be locked, and most that may be paid, on one day. 0: no limit."""


def consent_policy(deployments: Sequence[Deployment]) -> Policy:
    """For a command by which a person registers the worker: its hot key consents, and signs nothing else."""
    return Policy(domains=tuple(rule for d in deployments for rule in _rules(("HotKey",), d.chain_id, d.workers)))


def bench_policy() -> Policy:
    """For `gristmill bench`: the hot key signs what was measured, and nothing else."""
    return Policy(domains=tuple(_rules(("Benchmark",), MARKET_DOMAIN.chain_id, ZERO_ADDRESS)))


def worker_policy(deployments: Sequence[Deployment], *, day_fees: Mapping[int, int] = NO_LIMITS) -> Policy:
    market = _rules(("Offer", "Refusal"), MARKET_DOMAIN.chain_id, ZERO_ADDRESS)
    return Policy(
        domains=(*_domains(deployments), *market),
        calls=tuple(_calls(deployments, KeyRole.WORKER, ())),
        fees=tuple(_fees(deployments, day_fees)),
        identity=True,
    )


def client_policy(
    deployments: Sequence[Deployment],
    spending: Iterable[Spending],
    *,
    tokens: Iterable[tuple[int, Address]] = (),
    payees: Sequence[Address] = (),
    day_fees: Mapping[int, int] = NO_LIMITS,
) -> Policy:
    """`tokens`: chain id and address of further ones that may be put into the vault, and not spent. `payees`: accounts besides
    the payer's own that money may leave the vault for."""
    spent = tuple(
        TokenRule(one.chain_id, bytes(one.token), day_vouchers=one.day, day_locked=one.day) for one in spending
    )
    held = {*((rule.chain_id, Address(rule.token)) for rule in spent), *tokens}
    return Policy(
        domains=tuple(_domains(deployments)),
        tokens=spent,
        calls=(*_calls(deployments, KeyRole.PAYER, payees), *_approvals(deployments, held)),
        fees=tuple(_fees(deployments, day_fees)),
        identity=True,
    )


def owner_policy(
    deployments: Sequence[Deployment],
    *,
    tokens: Iterable[tuple[int, Address]] = (),
    payees: Sequence[Address] = (),
    day_fees: Mapping[int, int] = NO_LIMITS,
) -> Policy:
    """The owner registers workers, sets payouts, stakes: transactions only."""
    held = {*((one.chain_id, one.token) for one in deployments), *tokens}
    return Policy(
        calls=(*_calls(deployments, KeyRole.OWNER, payees), *_approvals(deployments, held)),
        fees=tuple(_fees(deployments, day_fees)),
    )


def _domains(deployments: Sequence[Deployment]) -> list[DomainRule]:
    return [
        rule
        for one in deployments
        for name, kinds in _DOMAINS.items()
        if (address := _where(one, name)) is not None
        for rule in _rules(kinds, one.chain_id, address)
    ]


def _rules(kinds: Sequence[str], chain_id: int, address: Address) -> list[DomainRule]:
    return [DomainRule(kind, chain_id, bytes(address)) for kind in kinds]


def _calls(deployments: Sequence[Deployment], role: KeyRole, payees: Sequence[Address]) -> list[CallRule]:
    rules = []
    for one in deployments:
        for name in _CALLS[role]:
            address = _where(one, name)
            if address is not None:
                rules.append(CallRule(one.chain_id, bytes(address)))
        rules += _vault_calls(one, payees)
        if (
            role is KeyRole.PAYER
        ):  # a penalty is moved to where the contract says, whoever sends it; no other call there
            move = contract("Workers").functions["moveSlash"].selector
            rules.append(CallRule(one.chain_id, bytes(one.workers), move))
    return rules


def _vault_calls(one: Deployment, payees: Sequence[Address]) -> list[CallRule]:
    """Into the vault for ourselves; out of it to ourselves, or where a person said."""
    vault = contract("Vault").functions
    out = (OWN_ACCOUNT, *(_word(payee) for payee in payees))
    return [
        CallRule(one.chain_id, bytes(one.vault), vault["deposit"].selector, ((2, (OWN_ACCOUNT,)),), payable=True),
        CallRule(one.chain_id, bytes(one.vault), vault["withdraw"].selector, ((2, out),)),
    ]


def _approvals(deployments: Sequence[Deployment], tokens: Iterable[tuple[int, Address]]) -> list[CallRule]:
    """A token may be told that the vault takes of it, and nothing else."""
    approve = contract("TestToken").functions["approve"].selector
    vaults = {one.chain_id: one.vault for one in deployments}
    return [
        CallRule(chain_id, bytes(token), approve, ((0, (_word(vaults[chain_id]),)),))
        for chain_id, token in sorted(tokens)
        if token != ZERO_ADDRESS and chain_id in vaults
    ]


def _fees(deployments: Sequence[Deployment], day: Mapping[int, int]) -> list[FeeRule]:
    return [FeeRule(one.chain_id, DEFAULT_POLICY.max_fee, day.get(one.chain_id, 0)) for one in deployments]


def _where(one: Deployment, name: str) -> Address | None:
    """None when this deployment has no such contract."""
    found: Address | None = getattr(one, name.lower(), None)
    return None if found in (None, ZERO_ADDRESS) else found


def _word(account: Address) -> bytes:
    return bytes(12) + account
