"""How a worker follows one chain: its head, its events, and every channel on it, as the contract has them now.

Each chain is followed by tasks of its own: one that hangs or lies makes its own channels stale and no others.

Rules:
- An event is a hint: it says which channel to look at, and nothing else is believed of it. Whatever is invented costs one look
  per channel and block; whatever is hidden is found when all channels are read again.
- A view is fresh when the head was seen of late, is no older than a head may be, and the channel itself was read of late (N6). A
  server that answers and stands still makes it as stale as one that is silent.
- An allocation that the chain had and has not any more is submitted again: the payer's signature is still good.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from node.errors import ChainError, ReorgTooDeep
from node.ports import REORG_DEPTH, Chain, ChainEvent, Head
from node.store.channels import ChannelBook
from protocol.channel import ChannelState
from protocol.ids import ChannelId

log = logging.getLogger(__name__)
AT_ONCE: Final = 8
"""Channels that are read side by side."""
ALLOWANCE_MAX_S: Final = 225.0
"""However many channels there are: none may go unread for longer than this, a quarter of the shortest withdraw delay."""


class ChainWatch:
    """Keeps the book in step with one chain."""

    def __init__(
        self,
        *,
        name: str,
        chain: Chain,
        book: ChannelBook,
        follow: Callable[[ChannelId], Awaitable[None]],
        restore: Callable[[ChannelId], Awaitable[None]],
        now_s: Callable[[], int],
        poll_ms: int,
        reread_ms: int,
        head_age_s: int = 0,
        heard: Callable[[ChainEvent], None] = lambda event: None,
    ) -> None:
        """`restore` submits a lost allocation again. `head_age_s`: how old a head may be; 0 = any age, for chains that make
        blocks only when there is something in them. `heard`: whoever else wants to know of the chain's events."""
        self.name = name
        self.chain = chain
        self._book = book
        self._follow = follow
        self._restore = restore
        self._now_s = now_s
        self._poll_s = poll_ms / 1000
        self._reread_s = reread_ms / 1000
        self._head_age_s = head_age_s
        self._heard = heard
        self._seen = float("-inf")
        """When a head was last seen that is fresh; trio's time, as all below."""
        self._head: Head | None = None
        self._moved = float("-inf")
        """When the head was last another one than before."""
        self._old_told = False
        self._pass_s = 0.0
        """How long it took to read every channel."""
        self._looked: dict[ChannelId, tuple[bytes, bool]] = {}
        """Block (undone or not) of the last event for which each channel was looked at."""
        self._back, self._lost = trio.Event(), trio.Event()
        """The chain answers again; an event was undone."""
        self._events_from = 0
        """Block from which a new reading of events misses nothing."""

    def age_ms(self) -> int:
        """Since the chain was last seen fresh."""
        return _ms(trio.current_time() - self._seen)

    def unread_ms(self, channel_id: ChannelId) -> int:
        """Since a channel was due to be read; below zero when it is not yet."""
        due = self._book.seen_at.get(channel_id, float("-inf")) + self._allowance
        return _ms(trio.current_time() - due)

    @property
    def _allowance(self) -> float:
        """How long a channel goes unread when all is well."""
        return max(self._reread_s, min(2 * self._pass_s + self._reread_s, ALLOWANCE_MAX_S))

    async def catch_up(self) -> None:
        """See every channel as the contract has it now, before anything is served on it. Raises `ChainError`."""
        head = await self.chain.head()
        self._note(head)
        # From before we look, so that nothing happens between the look and the first event unseen.
        self._events_from = max(0, head.number - REORG_DEPTH)
        await self._look_at_all()

    def start(self, nursery: trio.Nursery) -> None:
        for loop in (self._watch_head, self._watch_events, self._reread, self._mend):
            nursery.start_soon(loop)

    # ------------------------------------------------------------------------------------------------------------ head

    def _note(self, head: Head) -> None:
        """A head was seen. It makes the view fresh unless it is too old: by its own time, or because it does not move."""
        now = trio.current_time()
        if head != self._head:
            self._head, self._moved = head, now
        age = max(self._now_s() - head.timestamp, now - self._moved)
        if self._head_age_s and age > self._head_age_s:
            if not self._old_told:
                log.warning("the newest block of the chain %s, %d, is %d s old", self.name, head.number, age)
            self._old_told = True
            return
        self._seen, self._old_told = now, False

    async def _watch_head(self) -> None:
        """Keep the view of the chain fresh; when it is not, `chain_stale` refuses new work."""
        away = False
        while True:
            try:
                self._note(await self.chain.head())
                if away:
                    log.warning("the chain %s can be read again", self.name)
                    self._back.set()
                away = False
            except ChainError as error:
                if not away:
                    log.warning("the chain %s cannot be read: %s", self.name, error)
                away = True
            await trio.sleep(self._poll_s)

    # ---------------------------------------------------------------------------------------------------------- events

    async def _watch_events(self) -> None:
        """Refresh a channel whenever the contract says something about it, undone or not."""
        missed = failed = False
        pause = self._poll_s
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
                    missed, pause = False, self._poll_s
            except ChainError as error:
                failed, missed = True, missed or isinstance(error, ReorgTooDeep)
                log.warning("events of the chain %s cannot be followed: %s", self.name, error)
                await trio.sleep(pause)
                pause = min(
                    2 * pause, self._reread_s
                )  # a server whose blocks make no chain would keep us reading for ever

    async def _see(self, event: ChainEvent) -> None:
        raw = event.args.get("channelId")
        state = self._book.get(ChannelId(raw)) if isinstance(raw, bytes) and len(raw) == 32 else None
        if state is not None and state.domain == self.chain.domain:
            which = (event.block_hash, event.removed)
            if self._looked.get(state.channel_id) != which:
                await self._follow(state.channel_id)
                self._looked[state.channel_id] = which
        if event.removed:
            self._lost.set()
        self._heard(event)

    # -------------------------------------------------------------------------------------------------------- channels

    def _here(self) -> list[ChannelState]:
        domain = self.chain.domain
        return [state for state in self._book.channels.values() if state.domain == domain and not state.closed]

    async def _look_at_all(self) -> None:
        """Read every channel. One that cannot be read holds up no other; raises the last `ChainError` in the end."""
        began, limit, failed = trio.current_time(), trio.CapacityLimiter(AT_ONCE), None

        async def look(channel_id: ChannelId) -> None:
            nonlocal failed
            async with limit:
                try:
                    await self._follow(channel_id)
                except ChainError as error:
                    failed = error

        async with trio.open_nursery() as nursery:
            for state in self._here():
                nursery.start_soon(look, state.channel_id)
        self._pass_s = trio.current_time() - began
        self._looked.clear()
        if failed is not None:
            raise failed

    async def _reread(self) -> None:
        """Look at every channel now and then, and when the chain is back: an event that never came must not hide a withdrawal
        for long."""
        while True:
            with trio.move_on_after(self._reread_s):
                await self._back.wait()
            self._back = trio.Event()
            try:
                await self._look_at_all()
            except ChainError as error:
                log.warning("channels on the chain %s could not be read again: %s", self.name, error)

    async def _mend(self) -> None:
        """Bring back allocations that a reorganisation took."""
        while True:
            with trio.move_on_after(self._reread_s):
                await self._lost.wait()
            self._lost = trio.Event()
            for state in self._here():
                if state.allocated < state.authorized and not state.leaving:
                    try:
                        await self._restore(state.channel_id)
                    except ChainError as error:
                        log.warning("the allocation of channel %s could not be restored: %s", state.channel_id, error)


def _ms(seconds: float) -> int:
    return int(min(seconds, 1e9) * 1000)
