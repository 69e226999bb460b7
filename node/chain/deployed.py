"""Whether a chain has our contracts where a deployment says, looked at before the first use.

Rules
- Everything is checked: the node's chain id, that each address holds our code (immutables aside), what each contract stands on,
  and that the domains are what signatures are made for.
- A contract that is not ours is refused at start, never discovered by losing money.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import trio

from node.chain.artifacts import Contract, contract
from node.chain.deployment import Deployment
from node.chain.eth import Eth
from node.chain.rpc import Reverted
from node.errors import ChainError
from protocol.ids import Address

_CONTRACTS: Final[Mapping[str, tuple[str, ...]]] = {
    "Vault": (),
    "Workers": ("Vault",),
    "Channels": ("Vault", "Workers"),
    "Jobs": ("Vault", "Workers"),
    "Disputes": ("Vault", "Workers", "Jobs", "Channels"),
    "Committee": ("Vault", "Jobs", "Disputes"),
    "Attestations": (),
}
"""What a deployment has, in the order in which faults are told, and what each stands on; who stands on the Vault is a module."""
CHECK_THE_FILE: Final = "check the deployment file: it must name Gristmill's contracts on this chain"


async def check_deployment(eth: Eth, deployment: Deployment) -> None:
    """Raises `ChainError` saying which contract is not ours and why."""
    found = await eth.chain_id()
    if found != deployment.chain_id:
        raise ChainError(
            f"the node is of chain {found}, the deployment of chain {deployment.chain_id}", hint=CHECK_THE_FILE
        )
    names = [name for name in _CONTRACTS if deployment.has(name)]
    wrong: dict[str, str] = {}

    async def check(name: str) -> None:
        fault = await _fault(eth, deployment, name)
        if fault is not None:
            wrong[name] = fault

    async with trio.open_nursery() as nursery:  # two dozen questions: one after the other they would take seconds
        for name in names:
            nursery.start_soon(check, name)
    for name in names:
        if name in wrong:
            raise ChainError(wrong[name], hint=CHECK_THE_FILE)


async def _fault(eth: Eth, deployment: Deployment, name: str) -> str | None:
    """Why the contract called `name` is not ours; None when it is."""
    address, ours = deployment.address_of(name), contract(name)
    code = await eth.code(address)
    if not code:
        return f"there is no contract at {address}, where {name} should be"
    if not ours.is_runtime(code):
        return f"the contract at {address} is not our {name}: its code differs"

    async def ask(entry: Contract, at: Address, function: str, *args: object) -> object:
        try:
            return entry.decode(function, await eth.eth_call(at, entry.encode(function, *args)))[0]
        except Reverted as error:
            raise ChainError(f"{entry.name}.{function} at {at} reverts", hint=CHECK_THE_FILE) from error

    domain = {"Channels": deployment.domain, "Workers": deployment.workers_domain, "Jobs": deployment.jobs_domain}
    if name in domain and await ask(ours, address, "domainSeparator") != domain[name].separator:
        return f"{name} at {address} has another EIP-712 domain than ours"
    for below in _CONTRACTS[name]:
        if await ask(ours, address, below.lower()) != deployment.address_of(below):
            return f"{name} at {address} stands on another {below.lower()}"
    if _CONTRACTS[name] and await ask(contract("Vault"), deployment.vault, "isModule", address) is not True:
        return f"the Vault at {deployment.vault} does not know these {name}"
    return None
