"""Follow our contracts' logs: headers by parent hash, logs by block hash, events from `node.chain.follow`.

Every poll asks for the latest header and walks back to a remembered block, so blocks missed while the node was away are
fetched the same way as new ones: there is no other path for reconnecting. Where we are far behind the head, at a first start or
after a long absence, the old part is read by ranges, up to `KEEP` blocks below the head, where no reorganisation is expected.
Each range is told before the next is read, so a long history takes no more memory than a short one.

Delivery is at least once: after a restart from `cursor` the last blocks are told again, so readers go by (block hash, log index).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from node.chain.artifacts import Contract, decode_log
from node.chain.eth import Eth
from node.chain.follow import KEEP, Follower
from node.chain.rpc import RpcError, RpcUnavailable
from node.chain.values import Header, Log
from node.errors import ChainError, ReorgTooDeep
from node.ports import ChainEvent
from protocol.ids import Address

RANGE: Final = 2_000
"""Blocks per getLogs when reading history; halved when the node refuses, or has more than we take, down to one."""


class Watcher:
    """An async iterator of events. One reader; make another watcher for another one.

    `start` is the first block to tell of; when None, `keep` blocks below the head at the first look. `poll` is seconds between
    looks when nothing is new. A node that does not answer is asked again after `poll`, for ever: the reader decides how stale is
    too stale by `head`.
    """

    def __init__(
        self,
        eth: Eth,
        contracts: Mapping[Address, Contract],
        *,
        start: int | None,
        poll: float = 2.0,
        confirmations: int = 0,
        keep: int = KEEP,
    ) -> None:
        self._eth = eth
        self._contracts = dict(contracts)
        self._next_old: int | None = start
        self._from_head = start is None
        self._range = RANGE
        self._poll = poll
        self._keep = keep
        self._follower = Follower(confirmations, keep)
        self._ready: deque[ChainEvent] = deque()

    @property
    def head(self) -> Header | None:
        """The newest block whose logs have been read."""
        return self._follower.tip

    @property
    def cursor(self) -> int:
        """Block from which the next watcher must start to miss nothing."""
        oldest = self._follower.oldest
        if oldest is None:
            return self._next_old or 0
        return oldest.number

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> ChainEvent:
        while not self._ready:
            try:
                moved = await self.advance()
            except RpcUnavailable:
                moved = False
            if not self._ready and not moved:
                await trio.sleep(self._poll)
        return self._ready.popleft()

    async def advance(self) -> bool:
        """One look at the chain; True when it had moved. Events wait in the iterator."""
        tip = await self._eth.header("latest")
        if tip is None:
            raise ChainError("the chain's node has no latest block")
        if self._follower.tip == tip:
            return False
        known = self._follower.tip
        behind = known is not None and tip.number - known.number > 2 * self._keep
        if known is not None and behind and await self._eth.header(known.number) == known:
            self._ready += self._follower.settle()
            self._next_old = known.number + 1
        if self._from_head:
            self._next_old, self._from_head = max(0, tip.number - self._keep + 1), False
        if self._next_old is not None:
            if tip.number < self._next_old - 1:
                return False  # the node is still behind where we begin
            if not await self._read_old(tip, self._next_old):
                return True
        try:
            path = await self._path_to(tip)
            events = {
                header.hash: await self._events(header) for header in path if not self._follower.knows(header.hash)
            }
        except _Moved:
            return True  # the chain changed under our feet: look again
        self._ready += self._follower.extend(path, events)
        return bool(path)

    async def _read_old(self, tip: Header, first: int) -> bool:
        """One range of the history before the blocks that can be undone; true when that is all. It counts as final."""
        last = tip.number - self._keep
        if first <= last:
            end = min(first + self._range - 1, last)
            try:
                logs = await self._eth.logs_between(list(self._contracts), first, end)
            except RpcUnavailable:
                raise
            except ChainError:
                if self._range == 1:
                    raise
                self._range //= 2
                return False
            self._ready += self._decoded(sorted(logs, key=lambda log: (log.block_number, log.index)))
            first = self._next_old = end + 1
            if end < last:
                return False
        anchor = await self._eth.header(first - 1) if first > 0 else None
        if anchor is not None:
            self._follower.extend([anchor], {})
        self._next_old = None
        return True

    async def _path_to(self, tip: Header) -> list[Header]:
        """From the child of a remembered block up to `tip`."""
        path: deque[Header] = deque([tip])
        oldest = self._follower.oldest
        floor = 0 if oldest is None else oldest.number
        while not self._follower.knows(path[0].hash) and not self._follower.knows(path[0].parent):
            if path[0].number <= floor:
                if oldest is None:  # the chain begins here
                    break
                raise ReorgTooDeep(
                    f"block {path[0].number} is not on the chain that we followed",
                    hint="the chain was reset or reorganised very deeply: read the channels anew",
                )
            parent = await self._eth.header(path[0].parent)
            if parent is None:
                raise _Moved
            path.appendleft(parent)
        return list(path)

    async def _events(self, header: Header) -> Sequence[ChainEvent]:
        try:
            logs = await self._eth.logs_of_block(list(self._contracts), header.hash)
        except RpcError:  # nodes answer an unknown block hash with an error
            if await self._eth.header(header.hash) is None:
                raise _Moved from None
            raise
        return self._decoded(sorted(logs, key=lambda log: log.index))

    def _decoded(self, logs: Sequence[Log]) -> list[ChainEvent]:
        events: dict[tuple[bytes, int], ChainEvent] = {}
        for log in logs:
            source = self._contracts.get(log.address)
            event = None if source is None else decode_log(source, log)
            if event is not None:
                events.setdefault((log.block_hash, log.index), event)
        return list(events.values())


class _Moved(Exception):
    """A block that we were told of is gone."""
