"""Put the contracts on a chain. One script for every chain, simulated or not.

Order matters: the Vault first, Workers on top of it, Channels and Jobs on top of both, Disputes over all of them, a Committee
over that; then `seal` names the Vault's modules for ever. What is left out here can never be added to this vault.
The play-money token is deployed only where it is asked for: never on a chain where coins have value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from node.chain.artifacts import contract
from node.chain.deployment import Deployment
from node.chain.txs import TxSender
from node.errors import ChainError
from node.ports import TxResult
from protocol.escrow import CommitteeTerms
from protocol.ids import ZERO_ADDRESS, Address

PLAY_COMMITTEE: Final = CommitteeTerms(
    seat_bond=10_000_000, seats=5, quorum=3, commit_window=900, reveal_window=900, leave_delay=8 * 24 * 3600
)
"""Of a deployment with play money: ten coins a ticket, and the shortest windows there are."""
ADMIN_DELAY: Final = 2 * 24 * 3600
"""Seconds that a change of the Vault's admin must wait."""


async def deploy(
    sender: TxSender,
    chain_id: int,
    *,
    admin: Address | None = None,
    tokens: Sequence[Address] = (),
    test_token: bool = False,
    mint: Mapping[Address, int] | None = None,
    committee: CommitteeTerms | None = None,
) -> tuple[Deployment, list[TxResult]]:
    """Deploy, seal, allow tokens, mint play money. Raises `ChainError` when a step fails.

    `admin` (the sender by default) holds the Vault's roles; tokens can be allowed here only while it is the sender.
    `tokens` are ERC-20 to allow beside the native coin; the first is the deployment's default token. `test_token` deploys
    play money, which becomes the default. `mint` maps accounts to play money in its smallest unit.
    `committee` is deployed with these terms (its `address` and `token` are not read: its bonds are in the default token); play
    money brings `PLAY_COMMITTEE`, and without either there is none.
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
    jobs = await create("Jobs", vault, workers)
    disputes = await create("Disputes", vault, workers, jobs, channels)
    attestations = await create("Attestations")
    allowed = list(tokens)
    if test_token:
        allowed.insert(0, await create("TestToken"))
        committee = committee or PLAY_COMMITTEE
    default = allowed[0] if allowed else ZERO_ADDRESS
    modules, jury = [channels, workers, jobs, disputes], ZERO_ADDRESS
    if committee is not None:
        jury = await create("Committee", vault, jobs, disputes, default, _parameters(committee))
        modules.append(jury)
    await call("seal modules", "Vault", vault, "seal", modules)
    if owner == sender.account:
        for token in [*allowed, ZERO_ADDRESS]:
            await call("allow token", "Vault", vault, "setToken", token, True)
    for account, amount in (mint or {}).items():
        if not test_token:
            raise ChainError("only the play-money token can be minted")
        await call("mint play money", "TestToken", allowed[0], "mint", account, amount)
    made = Deployment(chain_id, vault, workers, channels, default, steps[0].block, jobs, disputes, jury, attestations)
    return made, steps


def _parameters(terms: CommitteeTerms) -> tuple[int, ...]:
    """As the constructor of Committee takes them."""
    return (
        terms.seat_bond,
        terms.seats,
        terms.quorum,
        terms.commit_window,
        terms.reveal_window,
        terms.leave_delay,
    )
