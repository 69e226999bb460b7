"""Where our contracts are on one chain: a small JSON file that deploy writes and every node reads.

Version 2 names all modules of the money. A file of version 1 is refused with words: its contracts have another code, which
the check at connect would refuse later with fewer. The file names a chain by its id, never by a URL. It is checked against the
chain at connect: code at each address, the code ours, the domains ours (`node.chain.deployed`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from node.errors import ConfigError
from protocol.errors import InvalidValue
from protocol.ids import ZERO_ADDRESS, Address
from protocol.typed_data import Domain

VERSION: Final = 2
MAX_BYTES: Final = 16_384
"""Longest deployment file read."""


class _Version(msgspec.Struct):
    version: int


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    chain_id: int
    vault: str
    workers: str
    channels: str
    jobs: str
    disputes: str
    committee: str
    attestations: str
    token: str
    block: int


@dataclass(frozen=True, slots=True)
class Deployment:
    chain_id: int
    vault: Address
    workers: Address
    channels: Address
    token: Address
    """The default token; the zero address is the native coin."""
    block: int
    """No event of ours is older than this block."""
    jobs: Address = ZERO_ADDRESS
    disputes: Address = ZERO_ADDRESS
    committee: Address = ZERO_ADDRESS
    """Zero where there is none: a committee needs a chain with randomness of its own. Quotes then name another resolver."""
    attestations: Address = ZERO_ADDRESS

    @property
    def domain(self) -> Domain:
        """Domain of the Channels contract."""
        return Domain(self.chain_id, self.channels)

    @property
    def workers_domain(self) -> Domain:
        return Domain(self.chain_id, self.workers)

    @property
    def jobs_domain(self) -> Domain:
        """Of quotes, orders, submissions and acceptances."""
        return Domain(self.chain_id, self.jobs)

    def has(self, name: str) -> bool:
        """Whether there is a contract called `name` here."""
        return bool(getattr(self, name.lower(), ZERO_ADDRESS) != ZERO_ADDRESS)

    def address_of(self, name: str) -> Address:
        """Where the contract called `name` (as in its artifact) is. Raises `ConfigError` when this deployment has none."""
        address = getattr(self, name.lower(), ZERO_ADDRESS)
        if address == ZERO_ADDRESS:
            raise ConfigError(f"this deployment has no {name} contract", hint="it was deployed without one")
        return Address(address)

    def to_json(self) -> bytes:
        file = _File(
            version=VERSION,
            chain_id=self.chain_id,
            vault=str(self.vault),
            workers=str(self.workers),
            channels=str(self.channels),
            jobs=str(self.jobs),
            disputes=str(self.disputes),
            committee=str(self.committee),
            attestations=str(self.attestations),
            token=str(self.token),
            block=self.block,
        )
        return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"

    @classmethod
    def from_json(cls, raw: bytes) -> Deployment:
        """Raises `ConfigError` that says what is wrong."""
        hint = "write it anew with the deploy command, or copy the one published for this chain"
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"a deployment file has at most {MAX_BYTES} bytes", hint=hint)
        try:
            version = msgspec.json.decode(raw, type=_Version).version
            if version != VERSION:
                raise ConfigError(
                    f"deployment file of version {version}, this program reads {VERSION}: its contracts are others",
                    hint=hint,
                )
            file = msgspec.json.decode(raw, type=_File)
            found = cls(
                chain_id=file.chain_id,
                vault=Address(file.vault),
                workers=Address(file.workers),
                channels=Address(file.channels),
                jobs=Address(file.jobs),
                disputes=Address(file.disputes),
                committee=Address(file.committee),
                attestations=Address(file.attestations),
                token=Address(file.token),
                block=file.block,
            )
        except (msgspec.MsgspecError, InvalidValue, RecursionError) as error:
            raise ConfigError(f"not a deployment file: {error}", hint=hint) from error
        named = [found.vault, found.workers, found.channels, found.jobs, found.disputes, found.attestations]
        named += [found.committee] if found.committee != ZERO_ADDRESS else []
        if not 0 < found.chain_id < 2**63 or not 0 <= found.block < 2**63:
            raise ConfigError("not a deployment file: chain_id or block is out of range", hint=hint)
        if ZERO_ADDRESS in named or len(set(named)) != len(named):
            raise ConfigError("not a deployment file: each contract needs an address of its own", hint=hint)
        return found

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_json())

    @classmethod
    def load(cls, path: Path) -> Deployment:
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"cannot read the deployment file {path}: {error.strerror}") from error
        return cls.from_json(raw)

    def describe(self) -> dict[str, Any]:
        """For people and JSON output."""
        plain: dict[str, Any] = msgspec.json.decode(self.to_json())
        return plain
