"""The search for an event from the head back: each block asked for once, no further than it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from node.chain.reading import PAGE, EvmReader
from node.ports import ChainEvent, Head

DEPLOYED, HEAD = 100, 100 + 3 * PAGE


class Chain(EvmReader):
    """Of one second a block, with an event in each of these blocks."""

    def __init__(self, *blocks: int) -> None:
        self.deployment = SimpleNamespace(block=DEPLOYED)  # type: ignore[assignment]
        self.blocks = blocks
        self.asked: list[tuple[int, int]] = []
        self.agreed = 0

    async def head(self) -> Head:
        return Head(HEAD, bytes(32), HEAD)

    async def block_time(self, number: int) -> int:
        return number

    async def logs(self, name: str, topics: Sequence[bytes], first: int, last: int) -> list[ChainEvent]:
        self.asked.append((first, last))
        return [ChainEvent(name, n, bytes(32), 0, {"n": n}) for n in self.blocks if first <= n <= last]

    async def agreed_logs(self, name: str, topics: Sequence[bytes], first: int, last: int) -> list[ChainEvent]:
        self.agreed += 1
        return await self.logs(name, topics, first, last)


def search(
    chain: Chain, take: Callable[[ChainEvent], int | None] = lambda event: event.args["n"], **how: Any
) -> int | None:
    async def main() -> int | None:
        return await chain.search_back("Jobs", (), take, **how)

    return trio.run(main)


def test_each_block_is_asked_for_once_down_to_the_deployment() -> None:
    chain = Chain()
    assert search(chain) is None
    assert sorted(n for first, last in chain.asked for n in range(first, last + 1)) == list(range(DEPLOYED, HEAD + 1))
    assert all(last - first < PAGE for first, last in chain.asked) and chain.agreed == 0


def test_the_newest_event_that_is_taken_ends_it() -> None:
    chain = Chain(200, HEAD - 3, HEAD - 2, HEAD - 1)
    assert search(chain) == HEAD - 1
    assert search(chain, lambda event: event.args["n"] if event.args["n"] < HEAD - 1 else None) == HEAD - 2
    assert len(chain.asked) == 2


def test_all_are_seen_in_order_when_none_is_taken() -> None:
    blocks, seen = (DEPLOYED, 200, HEAD - PAGE, HEAD - PAGE + 1, HEAD), list[int]()
    assert search(Chain(*blocks), lambda event: seen.append(event.args["n"])) is None
    assert seen == list(reversed(blocks))


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        ({"first": HEAD - 1}, [(HEAD - 1, HEAD)]),
        ({"first": 0, "last": DEPLOYED + 1}, [(DEPLOYED, DEPLOYED + 1)]),
        ({"last": DEPLOYED - 1}, []),
        ({"since": HEAD - PAGE + 2}, [(HEAD - PAGE + 1, HEAD)]),
        ({"since": HEAD - PAGE + 1}, [(HEAD - PAGE + 1, HEAD), (HEAD - 2 * PAGE + 1, HEAD - PAGE)]),
    ],
)
def test_it_goes_no_further_than_it_is_told(how: dict[str, int], asked: list[tuple[int, int]]) -> None:
    chain = Chain()
    assert search(chain, **how) is None and chain.asked == asked


def test_what_is_believed_is_asked_of_a_quorum() -> None:
    chain = Chain(HEAD)
    assert search(chain, agreed=True) == HEAD and chain.agreed == 1
