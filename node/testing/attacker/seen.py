"""One accepted call and what it changed, as the invariants look at it; who owns what, as the contracts show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from node.testing.attacker.reads import Name, Words
from protocol.escrow import JobState
from protocol.ids import ZERO_ADDRESS, Address
from protocol.typed_data import Quote

if TYPE_CHECKING:
    from node.testing.attacker.judge import Judge

LIVE = (JobState.OPEN, JobState.SUBMITTED, JobState.DISPUTED)


@dataclass(frozen=True, slots=True)
class Seen:
    """One accepted call and what it changed."""

    sender: Address
    call: str
    args: tuple[Any, ...]
    changed: dict[Name, tuple[Words, Words]]
    consent: frozenset[Address]
    """Whose vault balance may fall."""

    def of(self, kind: str) -> Iterator[tuple[Any, Words, Words]]:
        for (name, key), (before, now) in self.changed.items():
            if name == kind:
                yield key, before, now

    def gains(self, token: Address) -> dict[Address, int]:
        """What every account got in this call, or lost."""
        return {k[1]: now[0] - before[0] for k, before, now in self.of("balance") if k[0] == token}


def word(address: Address) -> int:
    return int.from_bytes(address)


def address(number: int) -> Address:
    return Address(number.to_bytes(20))


def owner_of(judge: Judge, worker: Address) -> Address:
    return address(judge.numbers.values.get(("worker", worker), (0,))[0])


def payout_of(judge: Judge, worker: Address) -> Address:
    known = judge.numbers.values.get(("worker", worker), (0, 0, 0, 0))
    return address(known[2]) if known[2] else worker


def open_jobs(judge: Judge, owner: Address, token: Address) -> Iterator[Quote]:
    """Those that hold a penalty of this owner."""
    for key, words in judge.numbers.of("job").items():
        quote = judge.quotes[key]
        if words[0] in LIVE and quote.token == token and owner_of(judge, quote.worker) == owner != ZERO_ADDRESS:
            yield quote
