"""What a worker and a client open alike: journal, chain, clocks, entropy.

The layer between the adapters and the roles: the only code besides `node.app` and `node.client.connect` that names concrete
classes.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from node.config import Config
from node.errors import ConfigError
from node.store.ledger import Entry, Ledger
from protocol.keys import PrivateKey

if TYPE_CHECKING:
    from node.chain.client import EvmChain
    from node.chain.deployment import Deployment


def now_ms() -> int:
    """Unix milliseconds of this machine's clock; for offers and receipts, never for money's deadlines on chain."""
    return time.time_ns() // 1_000_000


def now_s() -> int:
    return int(time.time())


def random32() -> bytes:
    return os.urandom(32)


def open_journal(config: Config, role: str, key: PrivateKey) -> Ledger:
    """The journal of a role, bound to the account whose money it holds. Raises `LedgerError`."""
    path = config.journal(role)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Ledger.open(path, chain_tag=bytes(key.address))


@asynccontextmanager
async def open_chain(config: Config, key: PrivateKey, ledger: Ledger) -> AsyncIterator[EvmChain]:
    """Our contracts, checked, and this account's unfinished transactions brought to their end.

    Raises `ConfigError` when none is configured, `ChainError` when the chain or the contracts are not what they should be.
    """
    from node.chain.client import EvmChain
    from node.chain.txs import TxPolicy, unfinished

    deployment = _deployment(config)

    async def journal(kind: str, subject: bytes, body: Mapping[str, Any]) -> None:
        await ledger.append([Entry(kind, subject, body)])

    pending = unfinished(
        (record.kind, msgspec.msgpack.decode(record.body))
        for record in ledger.records()
        if record.kind.startswith("tx_")
    )
    poll = config.chain.poll_ms / 1000
    policy = TxPolicy(
        poll=min(poll, 0.02) if config.network == "devnet" else poll,
        bump_after=5.0 if config.network == "devnet" else 45.0,
        give_up_after=config.chain.tx_timeout_s,
        confirmations=config.chain.confirmations,
    )
    chain = await EvmChain.connect(
        config.chain.rpc_urls,
        deployment,
        key,
        journal=journal,
        pending=pending,
        policy=policy,
        poll=poll,
    )
    try:
        yield chain
    finally:
        await chain.aclose()


@asynccontextmanager
async def look_at_chain(config: Config) -> AsyncIterator[EvmChain]:
    """Our contracts, checked, to read only: its account is a random one without money. Raises as `open_chain` does."""
    from node.chain.client import EvmChain

    chain = await EvmChain.connect(config.chain.rpc_urls, _deployment(config), PrivateKey(random32()))
    try:
        yield chain
    finally:
        await chain.aclose()


def _deployment(config: Config) -> Deployment:
    from node.chain.deployment import Deployment

    if not config.chain.rpc_urls or config.chain.deployment is None:
        raise ConfigError(
            "no chain is configured: chain.rpc_urls and chain.deployment are empty",
            hint="start a local one with `gristmill devnet up`, or set both",
        )
    return Deployment.load(config.chain.deployment)
