"""`earnings`: what a worker has earned, from its journal; and where the money is."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from node.cli.main import Command, Shared
from protocol.ids import ZERO_ADDRESS, Address
from protocol.offers import Asset

if TYPE_CHECKING:
    from node.earnings import Earnings
    from node.ports import TokenInfo
    from protocol.typed_data import Domain

BAR = 24
"""Characters of the longest bar."""


@click.command(cls=Command)
@click.option("--days", type=click.IntRange(1, 3660), default=14, show_default=True, help="How many days to list.")
@click.pass_obj
def command(shared: Shared, days: int) -> None:
    """Show what this worker has earned, day by day, and how much of it is claimed.

    Read from the journal, also while the worker runs, and needs no password. The chain is asked what has been claimed but
    not settled; without a chain the amounts are in the smallest unit.
    """
    import trio

    from node.earnings import earnings
    from node.store.ledger import Ledger
    from node.wiring import configured_domains

    account = shared.keystore.address("worker")
    domains = configured_domains(shared.config)
    with Ledger.open(shared.config.journal("worker"), chain_tag=bytes(account), read_only=True) as ledger:
        found = earnings(ledger.records(), list(domains.values()))
    names = {asset: _chain_name(asset, domains) for asset in found.assets}
    infos, owed = trio.run(_ask_chains, shared, names, account)
    last = max((day for day, _ in found.days), default=0)
    rows = [(day, asset) for day, asset in sorted(found.days) if day > last - days]
    data = {
        "worker": str(account),
        "days": [_day(found, day, asset, names[asset]) for day, asset in rows],
        "totals": [_total(found, asset, names[asset], infos[asset], owed.get(asset)) for asset in found.assets],
    }
    shared.output.result(data, "\n".join([*_table(found, rows, infos), *_sums(found, names, infos, owed)]))


def _chain_name(asset: Asset, domains: Mapping[str, Domain]) -> str:
    named = (name for name, domain in domains.items() if asset[:2] == Asset.of(domain, ZERO_ADDRESS)[:2])
    return next(named, f"chain {asset.chain_id}" if asset.chain_id else "unknown")


async def _ask_chains(
    shared: Shared, names: Mapping[Asset, str], account: Address
) -> tuple[dict[Asset, TokenInfo], dict[Asset, int]]:
    """How to write each token, and what is claimed and not settled. A chain that is away only costs the nice form."""
    from node.errors import NodeError
    from node.ports import TokenInfo
    from node.wiring import look_at_chain

    infos = {asset: TokenInfo(Address(asset.token), "(smallest unit)", 0) for asset in names}
    owed: dict[Asset, int] = {}
    for name in dict.fromkeys(names.values()):
        if name not in shared.config.chain_names:
            continue
        try:
            async with look_at_chain(shared.config, name) as chain:
                for asset in [asset for asset, on in names.items() if on == name]:
                    token = Address(asset.token)
                    infos[asset], owed[asset] = await chain.token_info(token), await chain.owed(account, token)
        except NodeError as error:
            shared.output.say(f"the chain {name} could not be asked: {error}")
    return infos, owed


def _date(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()


def _day(found: Earnings, day: int, asset: Asset, chain: str) -> dict[str, Any]:
    one = found.days[day, asset]
    return {
        "date": _date(day),
        "chain": chain,
        "token": str(Address(asset.token)),
        "parts": one.parts,
        "broken": one.broken,
        "input_tokens": one.input_tokens,
        "output_tokens": one.output_tokens,
        "earned": str(one.earned),
    }


def _total(found: Earnings, asset: Asset, chain: str, info: TokenInfo, owed: int | None) -> dict[str, Any]:
    return {
        "chain": chain,
        "token": str(Address(asset.token)),
        "symbol": info.symbol,
        "decimals": info.decimals,
        "earned": str(found.total(asset, "spent")),
        "claimed": str(found.total(asset, "claimed")),
        "claimable": str(found.total(asset, "claimable")),
        "to_settle": None if owed is None else str(owed),
    }


def _table(found: Earnings, rows: list[tuple[int, Asset]], infos: dict[Asset, TokenInfo]) -> list[str]:
    most = {asset: max(found.days[key].earned for key in rows if key[1] == asset) for _, asset in rows}
    lines = []
    for day, asset in rows:
        one = found.days[day, asset]
        bar = "▇" * (round(BAR * one.earned / most[asset]) if most[asset] else 0)
        broken = f", {one.broken} broken off" if one.broken else ""
        lines.append(
            f"{_date(day)}  {infos[asset].show(one.earned):>20}  {bar:<{BAR}}  "
            f"{one.parts} parts{broken}, {one.output_tokens} tokens out"
        )
    return lines


def _sums(
    found: Earnings, names: Mapping[Asset, str], infos: dict[Asset, TokenInfo], owed: dict[Asset, int]
) -> list[str]:
    lines = []
    for asset in found.assets:
        show = infos[asset].show
        lines += [
            "",
            f"chain      {names[asset]}",
            f"earned     {show(found.total(asset, 'spent'))}",
            f"claimed    {show(found.total(asset, 'claimed'))}",
            f"claimable  {show(found.total(asset, 'claimable'))} (`gristmill claim` takes it now)",
        ]
        if owed.get(asset):
            lines.append(f"to settle  {show(owed[asset])} (claimed, not yet in the payout account's vault balance)")
    return lines or ["nothing earned yet"]
