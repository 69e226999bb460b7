"""The pure part of the watcher against a model: whatever the chain does, what was told folds to what is on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.chain.follow import Follower
from node.chain.values import Header
from node.errors import ChainError, ReorgTooDeep
from node.ports import ChainEvent
from protocol.ids import keccak256


@dataclass
class ModelChain:
    """A tree of blocks with one canonical branch."""

    blocks: list[tuple[Header, tuple[ChainEvent, ...]]] = field(default_factory=list)
    made: int = 0

    def mine(self, logs: int) -> None:
        self.made += 1
        parent = self.blocks[-1][0] if self.blocks else None
        number = 0 if parent is None else parent.number + 1
        own = keccak256(f"block {self.made}".encode())
        header = Header(number, own, bytes(32) if parent is None else parent.hash, number)
        events = tuple(ChainEvent("E", number, own, i, {"n": self.made}) for i in range(logs))
        self.blocks.append((header, events))

    def events(self, confirmations: int) -> list[ChainEvent]:
        deep = self.blocks[: max(0, len(self.blocks) - confirmations)]
        return [event for _, events in deep for event in events]


def path_from(chain: ModelChain, follower: Follower) -> list[Header]:
    headers = [header for header, _ in chain.blocks]
    start = len(headers) - 1
    while start > 0 and not follower.knows(headers[start].hash) and not follower.knows(headers[start].parent):
        start -= 1
    return headers[start:]


def feed(chain: ModelChain, follower: Follower) -> list[ChainEvent]:
    return follower.extend(path_from(chain, follower), {header.hash: events for header, events in chain.blocks})


class Reader:
    """A consumer that keeps what was told and not undone, in order, and refuses nonsense."""

    def __init__(self) -> None:
        self.held: list[ChainEvent] = []

    def take(self, events: list[ChainEvent]) -> None:
        for event in events:
            if event.removed:
                last = self.held.pop()
                assert (last.block_hash, last.log_index) == (event.block_hash, event.log_index), "undone last first"
            else:
                assert event not in self.held, "told twice"
                self.held.append(event)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("mine"), st.integers(0, 3)),
        st.tuples(st.just("reorg"), st.integers(1, 6)),
        st.tuples(st.just("drop"), st.integers(1, 6)),
        st.tuples(st.just("look"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(actions, st.integers(0, 3))
def test_what_was_told_is_what_is_on_the_chain(steps: list[tuple[str, int]], confirmations: int) -> None:
    chain, follower, reader = ModelChain(), Follower(confirmations, keep=64), Reader()
    chain.mine(1)
    reader.take(feed(chain, follower))
    for what, n in steps:
        if what == "mine":
            chain.mine(n)
        elif what == "look":
            reader.take(feed(chain, follower))
        else:
            del chain.blocks[max(1, len(chain.blocks) - n) :]
            if what == "reorg":
                for i in range(n):
                    chain.mine(i % 3)
    reader.take(feed(chain, follower))
    # What is told and no longer deep enough after the chain got shorter may stay told; nothing that left it may.
    canonical = chain.events(confirmations)
    assert reader.held[: len(canonical)] == canonical
    assert all(event in chain.events(0) for event in reader.held)


def test_the_same_block_twice_tells_nothing_new() -> None:
    chain, follower = ModelChain(), Follower()
    chain.mine(2)
    assert len(feed(chain, follower)) == 2
    assert feed(chain, follower) == []


def test_memory_is_bounded_and_a_deeper_reorg_is_an_error() -> None:
    chain, follower = ModelChain(), Follower(keep=8)
    for _ in range(30):
        chain.mine(1)
        feed(chain, follower)
    assert follower.oldest is not None and follower.tip is not None
    assert follower.tip.number - follower.oldest.number == 7
    del chain.blocks[20:]
    for _ in range(12):
        chain.mine(1)
    with pytest.raises(ReorgTooDeep):
        follower.extend([header for header, _ in chain.blocks[20:]], {})


def test_headers_that_are_no_chain_are_refused() -> None:
    chain, follower = ModelChain(), Follower()
    for _ in range(3):
        chain.mine(0)
    with pytest.raises(ChainError):
        follower.extend([chain.blocks[0][0], chain.blocks[2][0]], {})


def test_settling_tells_what_waited_for_confirmations() -> None:
    chain, follower = ModelChain(), Follower(confirmations=3)
    chain.mine(1)
    chain.mine(1)
    assert feed(chain, follower) == []
    assert follower.settle() == chain.events(0)
    assert follower.tip is None
