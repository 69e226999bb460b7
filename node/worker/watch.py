"""How a worker follows one chain: its head, its events, and every channel on it, as the contract has them now.

Each chain is followed by tasks of its own: one that hangs or lies makes its own channels stale and no others.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from node.errors import ChainError, ReorgTooDeep
from node.ports import REORG_DEPTH, Chain, ChainEvent
from node.store.channels import ChannelBook
from protocol.ids import ChannelId

log = logging.getLogger(__name__)


class ChainWatch:
    """Keeps the book in step with one chain."""

    def __init__(
        self,
        *,
        name: str,
        chain: Chain,
        book: ChannelBook,
        follow: Callable[[ChannelId], Awaitable[None]],
        poll_ms: int,
        reread_ms: int,
        heard: Callable[[ChainEvent], None] = lambda event: None,
    ) -> None:
        """`heard`: whoever else wants to know of the chain's events."""
        self.name = name
        self.chain = chain
        self._book = book
        self._follow = follow
        self._poll_s = poll_ms / 1000
        self._reread_s = reread_ms / 1000
        self._heard = heard
        self._seen = -1e9
        self._events_from = 0
        """Block from which a new reading of events misses nothing."""

    def age_ms(self) -> int:
        """Since the chain was last seen."""
        return int((trio.current_time() - self._seen) * 1000)

    async def catch_up(self) -> None:
        """See every channel as the contract has it now, before anything is served on it. Raises `ChainError`."""
        head = await self.chain.head()
        self._seen = trio.current_time()
        # From before we look, so that nothing happens between the look and the first event unseen.
        self._events_from = max(0, head.number - REORG_DEPTH)
        await self._look_at_all()

    def start(self, nursery: trio.Nursery) -> None:
        for loop in (self._watch_head, self._watch_events, self._reread):
            nursery.start_soon(loop)

    async def _watch_head(self) -> None:
        """Keep the view of the chain fresh; when it is not, `chain_stale` refuses new work."""
        while True:
            try:
                await self.chain.head()
                self._seen = trio.current_time()
            except ChainError as error:
                log.warning("the chain %s cannot be read: %s", self.name, error)
            await trio.sleep(self._poll_s)

    async def _watch_events(self) -> None:
        """Refresh a channel whenever the contract says something about it, undone or not."""
        missed = failed = False
        while True:
            try:
                if failed and (await self.chain.head()).number < self._events_from:
                    missed = True  # another, shorter chain: nothing would be told for long
                if missed:  # events told while we could not look, or undone too far back, are not told again
                    await self.catch_up()
                missed = failed = False
                async for event in self.chain.events(self._events_from):
                    missed = True
                    await self._see(event)
                    self._events_from = max(self._events_from, event.block_number - REORG_DEPTH)
                    missed = False
            except ChainError as error:
                failed, missed = True, missed or isinstance(error, ReorgTooDeep)
                log.warning("events of the chain %s cannot be followed: %s", self.name, error)
                await trio.sleep(self._poll_s)

    async def _see(self, event: ChainEvent) -> None:
        raw = event.args.get("channelId")
        state = self._book.get(ChannelId(raw)) if isinstance(raw, bytes) and len(raw) == 32 else None
        if state is not None and state.domain == self.chain.domain:
            await self._follow(state.channel_id)
        self._heard(event)

    async def _look_at_all(self) -> None:
        for state in list(self._book.channels.values()):
            if not state.closed and state.domain == self.chain.domain:
                await self._follow(state.channel_id)

    async def _reread(self) -> None:
        """Look at every channel now and then: an event that never came must not hide a withdrawal for long."""
        while True:
            await trio.sleep(self._reread_s)
            try:
                await self._look_at_all()
            except ChainError as error:
                log.warning("channels on the chain %s could not be read again: %s", self.name, error)
