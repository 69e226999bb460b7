"""Several chains side by side: names, domains, and that one chain stands there once."""

from __future__ import annotations

import pytest

from node.chain.memory import MemoryChain, MemoryLedger
from node.chains import Chains
from node.errors import ConfigError
from node.testing.pair import key
from protocol.typed_data import Domain

ME = key("someone").address
ONE, TWO = (MemoryChain(MemoryLedger(chain_id=chain_id), ME) for chain_id in (1, 2))


def test_chains_are_found_by_name_and_by_domain() -> None:
    chains = Chains({"default": ONE, "two": TWO})
    assert chains.first is ONE and chains.named("two") is TWO and len(chains) == 2 and list(chains) == [ONE, TWO]
    assert chains.domains == (ONE.domain, TWO.domain) and chains.names == ("default", "two")
    assert chains.of(Domain(2, TWO.domain.verifying_contract)) is TWO and chains.get(ONE.domain) is ONE
    assert chains.name(TWO.domain) == "two"
    with pytest.raises(ConfigError, match="no chain is called 'three'"):
        chains.named("three")


def test_a_domain_that_is_not_configured_is_nobodys() -> None:
    """Another chain with our contract's address, our chain with another contract, or a channel that does not say."""
    chains = Chains({"default": ONE, "two": TWO})
    for domain in (Domain(3, ONE.domain.verifying_contract), Domain(1, ME), None):
        assert chains.get(domain) is None
        with pytest.raises(ConfigError, match="not configured here"):
            chains.of(domain)
    assert chains.name(Domain(3, ME)) == "chain 3, not configured" and chains.name(None) == "unknown"


def test_one_chain_stands_there_once() -> None:
    with pytest.raises(ConfigError, match="'a' and 'b' are one: both have the chain id 1"):
        Chains({"a": ONE, "b": MemoryChain(ONE.ledger, ME)})
    with pytest.raises(ConfigError, match="no chain"):
        Chains({})
