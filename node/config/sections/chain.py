"""`[chain]` and `[chains.NAME]`: a chain, and which servers tell us about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.config.bounds import AMOUNT_MAX
from node.settings import each, setting, web_address

CONFIRMATIONS_MAX: Final = 63
"""A reorganisation that goes deeper than 64 blocks is an error."""


@dataclass(frozen=True, slots=True)
class ChainConfig:
    """The chain and our contracts on it."""

    rpc_urls: tuple[str, ...] = setting(
        (),
        "JSON-RPC servers, the preferred one first; of strangers' servers take three, since two that differ cannot be judged. "
        "On devnet empty means the one that `devnet up` started.",
        check=each(web_address),
        values="http or https addresses",
    )
    deployment: Path | None = setting(
        None, "Deployment file (JSON): chain id, contract addresses, token. On devnet empty means that of `devnet up`."
    )
    rpc_quorum: int = setting(
        0,
        "How many of the servers must say the same before money is served or booked on it: more than half of them. 0 means the "
        "least that is more than half.",
        unit="servers",
        low=0,
        high=256,
    )
    rpc_max_behind: int = setting(
        8,
        "How far the servers' newest blocks may lie apart. One that is further behind is set aside for a minute.",
        unit="blocks",
        low=0,
        high=10_000,
    )
    confirmations: int = setting(
        0,
        "How many blocks must stand on a block before we act on what it gives us. A withdrawal that begins counts at once.",
        unit="blocks",
        low=0,
        high=CONFIRMATIONS_MAX,
    )
    max_head_age_s: int = setting(
        120,
        "A newest block that is older than this is no fresh view of the chain: new jobs are refused. 0 means any age, for a "
        "chain that makes blocks only when there is something in them, as that of `devnet up`, where it is not looked at.",
        unit="s",
        low=0,
        high=86_400,
    )
    poll_ms: int = setting(200, "How often the head is asked for.", unit="ms", low=5, high=60_000)
    day_fees: int = setting(
        0,
        "Most that our transactions on this chain may cost on one day (UTC); the signer refuses more. 0 means no limit.",
        unit="wei",
        low=0,
        high=AMOUNT_MAX,
    )
    tx_timeout_s: int = setting(
        120, "How long a transaction may wait for its receipt before it is an error.", unit="s", low=1, high=86_400
    )
