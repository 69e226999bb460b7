"""The chains of one node side by side: what each is called here, and which of them a channel is on.

A channel is on the chain whose domain its id commits to, so a channel of a chain that we are not configured for is kept in the
journal and never guessed at. A chain id stands here once: nonces belong to an account on a chain, and two senders of one account
would take each other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from node.errors import ConfigError
from node.ports import Chain
from protocol.typed_data import Domain


class Chains:
    """By name, in order; the first is the default."""

    def __init__(self, named: Mapping[str, Chain]) -> None:
        """Raises `ConfigError` when there is none, or two with one chain id."""
        if not named:
            raise ConfigError("no chain is configured", hint="set chain.rpc_urls and chain.deployment")
        self._named = dict(named)
        self._by_domain = {chain.domain: chain for chain in self._named.values()}
        ids: dict[int, str] = {}
        for name, chain in self._named.items():
            other = ids.setdefault(chain.chain_id, name)
            if other != name:
                raise ConfigError(
                    f"the chains {other!r} and {name!r} are one: both have the chain id {chain.chain_id}",
                    hint="a chain is configured once",
                )

    @property
    def first(self) -> Chain:
        return next(iter(self._named.values()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._named)

    @property
    def domains(self) -> tuple[Domain, ...]:
        """Of the Channels contracts."""
        return tuple(self._by_domain)

    def __iter__(self) -> Iterator[Chain]:
        return iter(self._named.values())

    def __len__(self) -> int:
        return len(self._named)

    def named(self, name: str) -> Chain:
        """Raises `ConfigError` when no chain has that name."""
        if name not in self._named:
            raise ConfigError(f"no chain is called {name!r}", hint=f"there are {', '.join(self._named)}")
        return self._named[name]

    def name(self, domain: Domain | None) -> str:
        """What the chain of a domain is called here; in words when it is not one of ours."""
        for name, chain in self._named.items():
            if chain.domain == domain:
                return name
        return f"chain {domain.chain_id}, not configured" if domain else "unknown"

    def get(self, domain: Domain | None) -> Chain | None:
        return None if domain is None else self._by_domain.get(domain)

    def of(self, domain: Domain | None) -> Chain:
        """The chain of a domain. Raises `ConfigError` when it is not configured here."""
        chain = self.get(domain)
        if chain is None:
            where = f"chain {domain.chain_id}, contract {domain.verifying_contract}" if domain else "an unknown chain"
            raise ConfigError(
                f"{where} is not configured here", hint="write a [chains.NAME] with its rpc_urls and deployment"
            )
        return chain
