"""`earnings`: what a worker has earned, from its journal; and where the money is."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import click

from node.cli.main import Command, Shared

if TYPE_CHECKING:
    from node.earnings import Earnings
    from node.ports import TokenInfo
    from protocol.ids import Address

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

    account = shared.keystore.address("worker")
    with Ledger.open(shared.config.journal("worker"), chain_tag=bytes(account), read_only=True) as ledger:
        found = earnings(ledger.records())
    infos, owed = trio.run(_ask_chain, shared, found, account)
    last = max((day for day, _ in found.days), default=0)
    rows = [(day, token) for day, token in sorted(found.days) if day > last - days]
    data = {
        "worker": str(account),
        "days": [_day(found, day, token) for day, token in rows],
        "totals": [_total(found, token, infos[token], owed.get(token)) for token in found.tokens],
    }
    shared.output.result(data, "\n".join([*_table(found, rows, infos), *_sums(found, infos, owed)]))


async def _ask_chain(
    shared: Shared, found: Earnings, account: Address
) -> tuple[dict[Address, TokenInfo], dict[Address, int]]:
    """How to write each token, and what is claimed and not settled. A chain that is away only costs the nice form."""
    from node.errors import NodeError
    from node.ports import TokenInfo
    from node.wiring import look_at_chain

    try:
        async with look_at_chain(shared.config) as chain:
            infos = {token: await chain.token_info(token) for token in found.tokens}
            return infos, {token: await chain.owed(account, token) for token in found.tokens}
    except NodeError as error:
        shared.output.say(f"the chain could not be asked: {error}")
        return {token: TokenInfo(token, "(smallest unit)", 0) for token in found.tokens}, {}


def _date(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()


def _day(found: Earnings, day: int, token: Address) -> dict[str, Any]:
    one = found.days[day, token]
    return {
        "date": _date(day),
        "token": str(token),
        "parts": one.parts,
        "broken": one.broken,
        "input_tokens": one.input_tokens,
        "output_tokens": one.output_tokens,
        "earned": str(one.earned),
    }


def _total(found: Earnings, token: Address, info: TokenInfo, owed: int | None) -> dict[str, Any]:
    return {
        "token": str(token),
        "symbol": info.symbol,
        "decimals": info.decimals,
        "earned": str(found.total(token, "spent")),
        "claimed": str(found.total(token, "claimed")),
        "claimable": str(found.total(token, "claimable")),
        "to_settle": None if owed is None else str(owed),
    }


def _table(found: Earnings, rows: list[tuple[int, Address]], infos: dict[Address, TokenInfo]) -> list[str]:
    most = {token: max(found.days[key].earned for key in rows if key[1] == token) for _, token in rows}
    lines = []
    for day, token in rows:
        one = found.days[day, token]
        bar = "▇" * (round(BAR * one.earned / most[token]) if most[token] else 0)
        broken = f", {one.broken} broken off" if one.broken else ""
        lines.append(
            f"{_date(day)}  {infos[token].show(one.earned):>20}  {bar:<{BAR}}  "
            f"{one.parts} parts{broken}, {one.output_tokens} tokens out"
        )
    return lines


def _sums(found: Earnings, infos: dict[Address, TokenInfo], owed: dict[Address, int]) -> list[str]:
    lines = []
    for token in found.tokens:
        show = infos[token].show
        lines += [
            "",
            f"earned     {show(found.total(token, 'spent'))}",
            f"claimed    {show(found.total(token, 'claimed'))}",
            f"claimable  {show(found.total(token, 'claimable'))} (`gristmill claim` takes it now)",
        ]
        if owed.get(token):
            lines.append(f"to settle  {show(owed[token])} (claimed, not yet in the payout account's vault balance)")
    return lines or ["nothing earned yet"]
