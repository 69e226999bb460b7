"""A signer that says on stdout what it has signed; for tests that break the disk below its table.

Lines: `ready VOUCHER RECEIPT` once the table is open and a journal was shown, with the highest total and number that it knows;
`signed VOUCHER RECEIPT COST` when both signatures are made; `failed CODE` for a batch that was not signed; `refused CODE` when
the open failed; `again` for a signature of what was signed before, which leaves no mark; `done`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from node.errors import NodeError
from node.signer.core import Core
from node.testing import every_kind, fixtures
from node.testing.every_kind import DOMAIN
from node.testing.journal_child import say
from protocol.ids import JobId, ModelId
from protocol.signing import ChannelAllocation, KeyRole, Mark, Request, Scope, request
from protocol.typed_data import Allocation, Receipt, Voucher

CONFIG: Final = every_kind.config(1)
CHANNEL: Final = CONFIG.channel_id(DOMAIN)
HEAD: Final = Mark(0, bytes(32))
ROUNDS: Final = 3


def table(root: Path) -> Path:
    return root / "signer" / "table.sqlite"


def voucher(total: int) -> Request:
    return request(KeyRole.SESSION, Voucher(CHANNEL, total), DOMAIN)


def receipt(number: int, cost: int) -> Request:
    zero = every_kind.named("nothing")
    return request(
        KeyRole.WORKER,
        Receipt(JobId(zero), 0, CHANNEL, number, ModelId(zero), zero, zero, zero, 1, 2, cost, zero, 1, 2, 0),
        DOMAIN,
    )


def allocated() -> Request:
    return request(KeyRole.PAYER, ChannelAllocation(CONFIG, Allocation(CHANNEL, 2**40, 2**31)), DOMAIN)


def known(core: Core) -> tuple[int, int]:
    """The highest total and the highest number that the table knows."""
    marks = (core.table.get((scope, bytes(CHANNEL))) for scope in (Scope.VOUCHER, Scope.RECEIPTS))
    total, number = (0 if mark is None else mark.value for mark in marks)
    return total, number


def recorded(root: Path, size: int) -> None:
    """A life of so many times three batches, from the open of the table to its close. It goes on after a failure, as nobody
    should."""
    try:
        with fixtures.signer(table(root)) as core:
            _sign(core, ROUNDS * size)
    except NodeError as error:
        say("refused", error.code)
        return
    say("done")


def _sign(core: Core, rounds: int) -> None:
    core.meet([], HEAD, adopting=core.table.empty)
    core.handle([allocated()])
    total, number = known(core)
    say("ready", total, number)
    last: Request | None = None
    for _ in range(rounds):
        total, number, cost = total + 10, number + 1, int.from_bytes(os.urandom(4))
        try:
            core.handle([voucher(total), receipt(number, cost)])
            say("signed", total, number, cost)
            last = voucher(total)
        except NodeError as error:
            say("failed", error.code)
        try:
            if last is not None:
                core.handle([last])
                say("again")
        except NodeError as error:
            say("failed", error.code)
