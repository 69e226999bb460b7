"""A node's keys and what they have signed: signer and journal, opened as two that agree.

The order is the promise: the signer opens the keys; the journal of that account is opened behind its fence; the two are held
against each other; only then can anything be signed. What opens a worker, a client or an owner's command comes through here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from node.config import DEFAULT, Config
from node.ports import Signer
from node.signer.journal import attach, known_channels
from node.signer.keys import Signers
from node.signer.sources import KeySource, RawKey, open_key
from node.store.channels import ChannelBook
from node.store.ledger import Ledger
from node.wiring import deployment_of, open_journal
from protocol.channel import Role
from protocol.ids import Address, ChannelId
from protocol.keys import PrivateKey
from protocol.signing import KeyRole, Policy
from protocol.signing_history import Ahead

if TYPE_CHECKING:
    from node.chain.deployment import Deployment

Key = PrivateKey | KeySource
"""A key in hand, or where it is."""
_ACCOUNT: Final = {"worker": KeyRole.WORKER, "client": KeyRole.PAYER, "owner": KeyRole.OWNER}
"""By journal, the key whose account it is bound to."""


@dataclass(frozen=True, slots=True)
class Books:
    signers: Signers
    ledger: Ledger
    book: ChannelBook
    """The channels of the journal; an owner has none."""
    ahead: Mapping[ChannelId, Ahead]
    """Where the signer has signed more than the journal knows."""


@asynccontextmanager
async def open_books(
    config: Config, name: str, keys: Mapping[KeyRole, Key], payees: Sequence[Address] = ()
) -> AsyncIterator[Books]:
    """Signer and journal of `worker`, `client` or `owner`.

    `payees`: accounts besides our own that money may leave the vault for. Raises `ConfigError`, `KeyError_`, `SignerError`,
    `LedgerError`.
    """
    deployments = [deployment_of(config, chain) for chain in config.chain_names]
    policy = _policy(config, name, deployments, payees)
    async with open_signers(config, keys, policy, config.signer_table(name)) as signers:
        with open_journal(config, name, signers[_ACCOUNT[name]].address) as ledger:
            role = Role.WORKER if name == "worker" else Role.CLIENT
            book = ChannelBook.restore(ledger, role, [one.domain for one in deployments])
            yield Books(signers, ledger, book, await attach(signers, ledger, known_channels(book)))


@asynccontextmanager
async def open_consent(config: Config, key: Key) -> AsyncIterator[Signer]:
    """The worker's key for its consent to be registered, and for nothing else; so the worker may run meanwhile."""
    from node.signer.policies import consent_policy

    deployments = [deployment_of(config, chain) for chain in config.chain_names]
    async with open_signers(config, {KeyRole.WORKER: key}, consent_policy(deployments), None) as signers:
        yield signers[KeyRole.WORKER]


@asynccontextmanager
async def open_bench(config: Config, key: Key) -> AsyncIterator[Signer]:
    """The worker's key for a benchmark, and for nothing else; so the worker may run meanwhile."""
    from node.signer.policies import bench_policy

    async with open_signers(config, {KeyRole.WORKER: key}, bench_policy(), None) as signers:
        yield signers[KeyRole.WORKER]


@asynccontextmanager
async def open_signers(
    config: Config, keys: Mapping[KeyRole, Key], policy: Policy, table: Path | None
) -> AsyncIterator[Signers]:
    """These keys behind a policy, in a process of their own unless `keys.signer` says otherwise. Raises `KeyError_`,
    `SignerError`."""
    if config.keys.signer == "process":
        from node.signer.client import open_process

        sources = {role: RawKey(k.secret_bytes()) if isinstance(k, PrivateKey) else k for role, k in keys.items()}
        async with open_process(sources, policy, table) as signers:
            yield signers
        return
    from node.signer.local import open_local

    held = {role: k if isinstance(k, PrivateKey) else open_key(k) for role, k in keys.items()}
    local = open_local(held, policy, table)
    try:
        yield local
    finally:
        local.close()


def _policy(config: Config, name: str, deployments: Sequence[Deployment], payees: Sequence[Address]) -> Policy:
    from node.signer.policies import Spending, client_policy, owner_policy, worker_policy

    by_chain = dict(zip(config.chain_names, deployments, strict=True))
    fees = {by_chain[chain].chain_id: config.chain_named(chain).day_fees for chain in config.chain_names}
    if name == "worker":
        return worker_policy(deployments, day_fees=fees)
    tokens = {DEFAULT: (deployments[0].chain_id, deployments[0].token)}
    for token, given in config.tokens.items():
        home = by_chain[given.chain]
        tokens[token] = (home.chain_id, Address(given.address) if given.address else home.token)
    if name == "owner":
        return owner_policy(deployments, tokens=tokens.values(), payees=payees, day_fees=fees)
    spending = [
        Spending(*tokens[token], config.client.day_limit * _allocation(config, token))
        for token in config.client.pay_with
    ]
    return client_policy(deployments, spending, tokens=tokens.values(), payees=payees, day_fees=fees)


def _allocation(config: Config, token: str) -> int:
    return config.client.allocation if token == DEFAULT else config.tokens[token].allocation
