"""State is the fold of the journal. What the records mean is the reducer's business (`protocol.channel`), not ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from node.store.ledger import Ledger, Record

S = TypeVar("S")


def replay(ledger: Ledger, reducer: Callable[[S, Record], S], initial: S, *, after: int = 0) -> S:
    """Fold the durable records with seq > `after`, in order. The same journal gives the same state, always."""
    state = initial
    for record in ledger.records(after):
        state = reducer(state, record)
    return state
