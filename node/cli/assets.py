"""Which chain and which token a command is about: `--chain`, `--token`, and amounts as people write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from node.cli.main import Shared

if TYPE_CHECKING:
    from node.chains import Chains
    from node.client.client import Client
    from node.ports import TokenInfo
    from protocol.channel import ChannelState
    from protocol.ids import Address
    from protocol.offers import Asset
    from protocol.typed_data import Domain

F = TypeVar("F", bound=Callable[..., Any])

chain_option = click.option(
    "--chain",
    "chain",
    metavar="NAME",
    help="A chain of the configuration: `default`, or the NAME of a [chains.NAME].",
)


def asset_options(command: F) -> F:
    """`--chain` and `--token`, for commands that move one token."""
    return chain_option(
        click.option(
            "--token",
            "token",
            metavar="NAME",
            help="A token of the configuration: `default`, or the NAME of a [tokens.NAME]. By default that which is paid "
            "with first, or the token of --chain.",
        )(command)
    )


def chosen(shared: Shared, client: Client, chain: str | None, token: str | None) -> Asset:
    """The asset that the options name. Raises `ConfigError` for a name that is not there, and for two that do not fit."""
    from node.errors import ConfigError
    from node.wiring import token_of
    from protocol.offers import Asset

    chains = client.wallet.chains
    if token is not None:
        found, address = token_of(shared.config, chains, token)
        if chain is not None and chains.named(chain) is not found:
            raise ConfigError(f"the token {token!r} is on the chain {chains.name(found.domain)!r}, not on {chain!r}")
        return Asset.of(found.domain, address)
    if chain is not None:
        named = chains.named(chain)
        return Asset.of(named.domain, named.token)
    return client.wallet.preferred


def on_chain(chains: Chains, state: ChannelState, chain: str | None) -> bool:
    """Whether a channel is on the chain that `--chain` names; on any when it names none."""
    return chain is None or state.domain == chains.named(chain).domain


async def token_info(chains: Chains, domain: Domain | None, token: Address) -> TokenInfo:
    """How to write amounts of a token on its chain; in smallest units when that chain is not configured."""
    from node.ports import TokenInfo

    chain = chains.get(domain)
    return TokenInfo(token, "(smallest unit)", 0) if chain is None else await chain.token_info(token)


async def show_in(chains: Chains, asset: Asset) -> Callable[[int], str]:
    from protocol.ids import Address

    return (await token_info(chains, asset.domain, Address(asset.token))).show


async def sums(
    chains: Chains, states: Iterable[ChannelState], amounts: Mapping[str, Callable[[ChannelState], int]]
) -> list[dict[str, Any]]:
    """Amounts over channels, one entry for each asset: those of two assets are never added. For `--json`; see `shown`."""
    groups: dict[tuple[Domain | None, Address], list[ChannelState]] = {}
    for state in states:
        groups.setdefault((state.domain, state.config.token), []).append(state)
    found = []
    for (domain, token), members in groups.items():
        info = await token_info(chains, domain, token)
        entry: dict[str, Any] = {
            "chain": chains.name(domain),
            "token": str(token),
            "symbol": info.symbol,
            "decimals": info.decimals,
            "channels": len(members),
        }
        found.append(entry | {name: str(sum(map(amount, members))) for name, amount in amounts.items()})
    order = {name: n for n, name in enumerate(chains.names)}
    return sorted(found, key=lambda entry: order.get(entry["chain"], len(order)))


def shown(entry: Mapping[str, Any], name: str) -> str:
    """One amount of an entry of `sums`, as people write it."""
    from node.ports import TokenInfo
    from protocol.ids import Address

    return TokenInfo(Address(entry["token"]), entry["symbol"], entry["decimals"]).show(int(entry[name]))
