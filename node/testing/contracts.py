"""The whole set of contracts in one in-process EVM, wired as a deployment wires them, beside the model's first state.

Keys are derived from names, so a failing test prints the same addresses every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from node.testing.evm import ARTIFACTS, Contract, Evm
from protocol.errors import RemoteProtocolError
from protocol.escrow import CommitteeTerms, Escrow, Module
from protocol.ids import ZERO_ADDRESS, Address, keccak256
from protocol.keys import PrivateKey, recover
from protocol.typed_data import ChannelConfig, Domain, Quote

NATIVE = ZERO_ADDRESS
PUPPET = Address(b"\x9e" * 20)
"""Where a deployment with a puppet has a module that calls whatever anybody tells it to."""
_PUPPET_CODE = bytes.fromhex("602036038060205f375f5f915f5f5f355af13d5f5f3e601c573d5ffd5b3d5ff3")
"""Calldata is a word with the target, then the call; answers and reverts as the target does."""
COMMITTEE = {
    "seat_bond": 100,
    "seats": 5,
    "quorum": 2,
    "commit_window": 24 * 3600,
    "reveal_window": 12 * 3600,
    "leave_delay": 14 * 24 * 3600,
}
"""Parameters of a deployment's committee, in the order of the ABI; its tickets are in the test token."""
_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def key(name: str) -> PrivateKey:
    """The test key called `name`."""
    return PrivateKey(keccak256(b"gristmill test key " + name.encode()))


def signer_of(digest: bytes, signature: bytes) -> Address | None:
    """Who signed, by Python's rules; None when nobody can have. What the contracts are compared with."""
    try:
        return recover(digest, signature)
    except RemoteProtocolError:
        return None


def high_s(signature: bytes) -> bytes:
    """The other valid ECDSA form of the same signature, which must be refused."""
    s = _ORDER - int.from_bytes(signature[32:64])
    return signature[:32] + s.to_bytes(32) + bytes((55 - signature[64],))


def config_tuple(config: ChannelConfig) -> tuple[object, ...]:
    """A config as the ABI wants it."""
    return (
        config.payer,
        config.payer_authorizer,
        config.receiver,
        config.receiver_authorizer,
        config.token,
        config.withdraw_delay,
        config.salt,
    )


def struct_tuple(struct: Any) -> tuple[object, ...]:
    """A typed struct as the ABI wants it."""
    return tuple(getattr(struct, f.name) for f in fields(struct))


def quote_tuple(quote: Quote) -> tuple[object, ...]:
    """A quote as the ABI wants it."""
    return struct_tuple(quote)


class Deployment:
    """Vault, its modules and a TestToken, sealed; token and native coin are allowed."""

    def __init__(
        self,
        artifacts: Path = ARTIFACTS,
        *,
        puppet: bool = False,
        admin_delay: int = 0,
        committee: Mapping[str, int] = COMMITTEE,
    ) -> None:
        """`puppet`: seal with the module `PUPPET` as well, for tests of what only a module may do."""
        self.terms = dict(committee)
        self.evm = Evm(artifacts)
        self.admin = key("admin").address
        self.vault: Contract = self.evm.deploy("Vault", self.admin, admin_delay, sender=self.admin)
        self.workers: Contract = self.evm.deploy("Workers", self.vault.address, sender=self.admin)
        self.channels: Contract = self.evm.deploy(
            "Channels", self.vault.address, self.workers.address, sender=self.admin
        )
        self.jobs: Contract = self.evm.deploy("Jobs", self.vault.address, self.workers.address, sender=self.admin)
        self.disputes: Contract = self.evm.deploy(
            "Disputes",
            *(c.address for c in (self.vault, self.workers, self.jobs, self.channels)),
            sender=self.admin,
        )
        self.token: Contract = self.evm.deploy("TestToken", sender=self.admin)
        self.committee: Contract = self.evm.deploy(
            "Committee",
            *(c.address for c in (self.vault, self.jobs, self.disputes, self.token)),
            tuple(self.terms.values()),
            sender=self.admin,
        )
        self.attestations: Contract = self.evm.deploy("Attestations", sender=self.admin)
        self.modules = {  # all that the vault is sealed with
            Module.CHANNELS: self.channels,
            Module.WORKERS: self.workers,
            Module.JOBS: self.jobs,
            Module.DISPUTES: self.disputes,
            Module.COMMITTEE: self.committee,
        }
        modules = [contract.address for contract in self.modules.values()]
        if puppet:
            self.evm.insert_code(PUPPET, _PUPPET_CODE)
            modules.append(PUPPET)
        self.vault.send(self.admin, "seal", modules)
        for token in (NATIVE, self.token.address):
            self.vault.send(self.admin, "setToken", token, True)
        self.domain = Domain(self.evm.chain_id, self.channels.address)
        self.workers_domain = Domain(self.evm.chain_id, self.workers.address)
        self.jobs_domain = Domain(self.evm.chain_id, self.jobs.address)

    def first_state(self) -> Escrow:
        """The model of this deployment before any deposit."""
        return Escrow(
            self.domain,
            self.vault.address,
            frozenset({NATIVE, self.token.address}),
            guardians=frozenset({self.admin}),
            jobs_domain=self.jobs_domain,
            terms=CommitteeTerms(self.committee.address, self.token.address, **self.terms),
        )

    def purse(self, account: Address, amount: int) -> None:
        """Give `account` coins of both kinds outside the vault, and let the vault pull the token."""
        self.evm.give(account, amount)
        self.token.send(account, "mint", account, amount)
        self.token.send(account, "approve", self.vault.address, 2**256 - 1)

    def fund(self, account: Address, amount: int) -> None:
        """Mint and deposit `amount` of the token for `account`."""
        self.purse(account, amount)
        self.vault.send(account, "deposit", self.token.address, amount, account)
