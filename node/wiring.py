"""What a worker and a client open alike: journal, chains, clocks, entropy. Their keys: `node.books`.

The layer between the adapters and the roles: the only code besides `node.app` and `node.client.connect` that names concrete
classes.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from node.chains import Chains
from node.config import DEFAULT, Config
from node.errors import ConfigError
from node.ports import Chain, Signer
from node.signer.bare import Bare
from node.store.faults import fault_point
from node.store.fence import Fence
from node.store.ledger import Entry, Ledger
from protocol.ids import Address
from protocol.keys import PrivateKey
from protocol.typed_data import Domain

if TYPE_CHECKING:
    from node.chain.client import EvmChain
    from node.chain.deployment import Deployment
    from node.chain.endpoints import Rules
    from node.chain.eth import Eth
    from node.chain.pending import Journal
    from node.chain.tx_policy import TxPolicy
    from node.chain.txs import TxSender


def now_ms() -> int:
    """Unix milliseconds of this machine's clock; for offers and receipts, never for money's deadlines on chain."""
    return time.time_ns() // 1_000_000


def now_s() -> int:
    return int(time.time())


def random32() -> bytes:
    return os.urandom(32)


def open_journal(config: Config, role: str, account: Address) -> Ledger:
    """The journal of a role, bound to the account whose money it holds, and behind its fence. Raises `LedgerError`."""
    return Ledger.open(config.journal(role), chain_tag=bytes(account), fence=Fence(config.fence(role, str(account))))


@asynccontextmanager
async def open_chains(config: Config, key: Signer, ledger: Ledger) -> AsyncIterator[Chains]:
    """Every configured chain, as `open_chain` opens one. Raises as it does: with a chain missing, money could be overlooked."""
    async with AsyncExitStack() as stack:
        named = {}
        for name in config.chain_names:
            named[name] = await stack.enter_async_context(open_chain(config, key, ledger, name))
        yield Chains(named)


@asynccontextmanager
async def open_chain(config: Config, key: Signer, ledger: Ledger, name: str = DEFAULT) -> AsyncIterator[EvmChain]:
    """Our contracts on one chain, checked, and this account's unfinished transactions there brought to their end.

    Raises `ConfigError` when none is configured, `ChainError` when the chain or the contracts are not what they should be.
    """
    from node.chain.client import EvmChain

    given = config.chain_named(name)
    deployment = deployment_of(config, name)
    chain = await EvmChain.connect(
        given.rpc_urls,
        deployment,
        key,
        journal=_journal(ledger),
        history=_transactions(ledger),
        policy=_policy(config, name),
        poll=given.poll_ms / 1000,
        rules=endpoint_rules(config, name),
    )
    try:
        yield chain
    finally:
        await chain.aclose()


@asynccontextmanager
async def look_at_chains(config: Config) -> AsyncIterator[Chains]:
    """Every configured chain, to read only. Raises as `open_chain` does."""
    async with AsyncExitStack() as stack:
        names = config.chain_names
        yield Chains({name: await stack.enter_async_context(look_at_chain(config, name)) for name in names})


@asynccontextmanager
async def open_sender(
    config: Config, key: Signer, ledger: Ledger, name: str, chain_id: int
) -> AsyncIterator[tuple[Eth, TxSender]]:
    """Transactions to contracts that no deployment file names, or none yet. Raises as `open_chain` does."""
    from node.chain.agreed import AgreedEth
    from node.chain.artifacts import error_name
    from node.chain.endpoints import Endpoints
    from node.chain.txs import TxSender

    urls = config.chain_named(name).rpc_urls
    nodes = Endpoints.over_http(urls, chain_id=chain_id, rules=endpoint_rules(config, name))
    try:
        await nodes.meet()
        eth = AgreedEth(nodes)
        first = await eth.header(0)
        sender = TxSender(
            eth,
            key,
            chain_id,
            anchor=b"" if first is None else first.hash,
            journal=_journal(ledger),
            error_name=error_name,
            policy=_policy(config, name),
        )
        await sender.resume(_transactions(ledger))
        yield eth, sender
    finally:
        await nodes.aclose()


def _journal(ledger: Ledger) -> Journal:
    async def journal(kind: str, subject: bytes, body: Mapping[str, Any]) -> None:
        await ledger.append([Entry(kind, subject, body)])
        if kind == "tx_signed":
            fault_point("send.transaction")

    return journal


def _transactions(ledger: Ledger) -> list[tuple[str, Any]]:
    """(kind, body) of what was sent before."""
    return [(record.kind, msgspec.msgpack.decode(record.body)) for record in ledger.records(prefix="tx_")]


def _policy(config: Config, name: str) -> TxPolicy:
    from node.chain.tx_policy import TxPolicy

    given, devnet = config.chain_named(name), config.network == "devnet" and name == DEFAULT
    poll = given.poll_ms / 1000
    return TxPolicy(
        poll=min(poll, 0.02) if devnet else poll,
        bump_after=5.0 if devnet else 45.0,
        give_up_after=given.tx_timeout_s,
        confirmations=given.confirmations,
    )


@asynccontextmanager
async def look_at_chain(config: Config, name: str = DEFAULT) -> AsyncIterator[EvmChain]:
    """Our contracts, checked, to read only: its account is a random one without money. Raises as `open_chain` does."""
    from node.chain.client import EvmChain

    rpc_urls, rules = config.chain_named(name).rpc_urls, endpoint_rules(config, name)
    chain = await EvmChain.connect(rpc_urls, deployment_of(config, name), Bare(PrivateKey(random32())), rules=rules)
    try:
        yield chain
    finally:
        await chain.aclose()


def endpoint_rules(config: Config, name: str = DEFAULT) -> Rules:
    """How the nodes of a chain are compared."""
    from node.chain.endpoints import Rules

    given = config.chain_named(name)
    return Rules(quorum=given.rpc_quorum, max_behind=given.rpc_max_behind)


def deployment_of(config: Config, name: str) -> Deployment:
    """Where our contracts are on a chain. Raises `ConfigError` when it is not configured."""
    from node.chain.deployment import Deployment

    given = config.chain_named(name)
    if not given.rpc_urls or given.deployment is None:
        section = "chain" if name == DEFAULT else f"chains.{name}"
        hint = "start a local one with `gristmill devnet up`, or set both" if name == DEFAULT else "set both"
        raise ConfigError(f"no chain is configured: {section}.rpc_urls and {section}.deployment are empty", hint=hint)
    return Deployment.load(given.deployment)


def configured_domains(config: Config) -> dict[str, Domain]:
    """By name: the domains of the chains that are configured. Asks no chain. Raises `ConfigError` for a bad deployment file."""
    from node.chain.deployment import Deployment

    files = {name: config.chain_named(name).deployment for name in config.chain_names}
    return {name: Deployment.load(file).domain for name, file in files.items() if file is not None}


def token_of(config: Config, chains: Chains, name: str) -> tuple[Chain, Address]:
    """The chain and the address of a token by its name in the configuration. Raises `ConfigError`."""
    if name == DEFAULT:
        return chains.first, chains.first.token
    if name not in config.tokens:
        raise ConfigError(f"no token is called {name!r}", hint=f"there are {', '.join((DEFAULT, *config.tokens))}")
    token = config.tokens[name]
    chain = chains.named(token.chain)
    return chain, Address(token.address) if token.address else chain.token
