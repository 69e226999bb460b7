"""Put the contracts on a chain. One script for every chain, simulated or not.

Order matters: the Vault first, Workers on top of it, Channels on top of both, then `seal` names the Vault's modules for ever.
The play-money token is deployed only where it is asked for: never on a chain where coins have value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from node.chain.artifacts import contract
from node.chain.deployment import Deployment
from node.chain.txs import TxSender
from node.errors import ChainError
from node.ports import TxResult
from protocol.ids import ZERO_ADDRESS, Address

ADMIN_DELAY = 2 * 24 * 3600
"""Seconds that a change of the Vault's admin must wait."""


async def deploy(
    sender: TxSender,
    chain_id: int,
    *,
    admin: Address | None = None,
    tokens: Sequence[Address] = (),
    test_token: bool = False,
    mint: Mapping[Address, int] | None = None,
) -> tuple[Deployment, list[TxResult]]:
    """Deploy, seal, allow tokens, mint play money. Raises `ChainError` when a step fails.

    `admin` (the sender by default) holds the Vault's roles; tokens can be allowed here only while it is the sender.
    `tokens` are ERC-20 to allow beside the native coin; the first is the deployment's default token. `test_token` deploys
    play money, which becomes the default. `mint` maps accounts to play money in its smallest unit.
    """
    steps: list[TxResult] = []

    async def create(name: str, *args: object) -> Address:
        result, address = await sender.create(f"deploy {name}", contract(name).initcode(*args))
        steps.append(result)
        return address

    async def call(purpose: str, name: str, to: Address, function: str, *args: object) -> None:
        result = await sender.send(purpose, to, contract(name).encode(function, *args))
        if not result.ok:
            raise ChainError(f"{purpose} failed: {result.error}")
        steps.append(result)

    owner = sender.account if admin is None else admin
    vault = await create("Vault", owner, ADMIN_DELAY)
    workers = await create("Workers", vault)
    channels = await create("Channels", vault, workers)
    await call("seal modules", "Vault", vault, "seal", [channels, workers])
    allowed = list(tokens)
    if test_token:
        allowed.insert(0, await create("TestToken"))
    if owner == sender.account:
        for token in [*allowed, ZERO_ADDRESS]:
            await call("allow token", "Vault", vault, "setToken", token, True)
    for account, amount in (mint or {}).items():
        if not test_token:
            raise ChainError("only the play-money token can be minted")
        await call("mint play money", "TestToken", allowed[0], "mint", account, amount)
    default = allowed[0] if allowed else ZERO_ADDRESS
    return Deployment(chain_id, vault, workers, channels, default, steps[0].block), steps
