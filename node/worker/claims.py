"""Turning vouchers into money: when to claim, and the claim itself.

Policy (`due`, pure): claim a channel when its payer has begun to leave, when what accrued is worth a transaction, or when it
is a quarter of the withdraw delay old. A claim asks for what the receipts add up to, never for what the client paid ahead.
Claims go in batches; a bad entry is skipped by the contract and does not hold up the others. A claimer is of one chain: a batch
is one transaction, and trouble on one chain keeps no other from claiming.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from node.errors import ChainError
from node.ports import Chain, ClaimEntry, TxResult
from node.store.channels import ChannelBook
from protocol.channel import ChannelState, ClaimNow
from protocol.ids import Address, ChannelId
from protocol.offers import Asset

log = logging.getLogger(__name__)
BATCH = 400
"""Channels in one transaction: EIP-7825 ends a transaction at 2**24 gas."""


@dataclass(frozen=True, slots=True)
class ClaimPolicy:
    minimum: int = 100_000
    """Smallest unit: below it a claim is not worth its gas."""
    minimums: Mapping[Asset, int] = field(default_factory=dict)
    """Of assets that have one of their own."""
    every_s: float = 300
    """How often channels are looked at."""
    retry_s: float = 10
    """How soon again after the chain failed us: a leaving payer does not wait."""

    def least(self, state: ChannelState) -> int:
        """Smallest unit of the channel's token."""
        own = None if state.domain is None else self.minimums.get(Asset.of(state.domain, state.config.token))
        return self.minimum if own is None else own


def due(
    channels: Iterable[ChannelState],
    policy: ClaimPolicy,
    since: Mapping[ChannelId, float],
    now_s: float,
    *,
    everything: bool = False,
) -> list[ChannelState]:
    """The channels to claim now, largest first. `since`: when each began to have something to claim."""
    chosen = []
    for state in channels:
        if not state.claimable or state.closed:
            continue
        age = now_s - since.get(state.channel_id, now_s)
        old = age * 4 >= state.config.withdraw_delay
        if everything or state.withdraw_at or state.claimable >= policy.least(state) or old:
            chosen.append(state)
    return sorted(chosen, key=lambda state: -state.claimable)


@dataclass(slots=True)
class ClaimReport:
    """What one round of claiming did."""

    claimed: dict[ChannelId, int] = field(default_factory=dict)
    """Amount moved per channel."""
    transactions: list[TxResult] = field(default_factory=list)


async def claim_all(claimers: Iterable[Claimer]) -> ClaimReport:
    """Everything that can be claimed, on each chain. Raises the last `ChainError`, after every chain had its turn."""
    report, failed = ClaimReport(), None
    for claimer in claimers:
        try:
            one = await claimer.claim(everything=True)
        except ChainError as error:
            failed = error
            continue
        report.claimed |= one.claimed
        report.transactions += one.transactions
    if failed is not None:
        raise failed
    return report


class Claimer:
    """Claims and settles for one worker on one chain."""

    def __init__(
        self,
        *,
        book: ChannelBook,
        chain: Chain,
        policy: ClaimPolicy,
        follow: Callable[[ChannelId], Awaitable[None]],
        now_s: Callable[[], float],
        receiver: Address,
    ) -> None:
        self._book = book
        self._chain = chain
        self._policy = policy
        self._follow = follow
        self._now_s = now_s
        self._receiver = receiver
        self._since: dict[ChannelId, float] = {}
        self._urgent = trio.Event()
        self._lock = trio.Lock()

    def hurry(self, effect: ClaimNow) -> None:
        """A payer is leaving: look now, not at the next round."""
        log.warning("the payer of channel %s is leaving; claiming %d now", effect.channel_id, effect.amount)
        self._urgent.set()

    async def run(self) -> None:
        """Look at the channels every `every_s`, and at once when told to hurry. Survives chain trouble."""
        pause = self._policy.every_s
        while True:
            with trio.move_on_after(pause):
                await self._urgent.wait()
            self._urgent = trio.Event()
            pause = self._policy.every_s
            try:
                await self.claim()
            except ChainError as error:
                log.warning("claiming failed, will try again: %s", error)
                pause = min(pause, self._policy.retry_s)

    async def claim(self, *, everything: bool = False) -> ClaimReport:
        """One round. Raises `ChainError`."""
        async with self._lock:
            for state in [s for s in self._here() if s.claimable and not s.closed]:
                await self._look(state.channel_id)  # who has begun to leave without our hearing of it is claimed first
            self._note_ages()
            states = due(self._here(), self._policy, self._since, self._now_s(), everything=everything)
            report = ClaimReport()
            for start in range(0, len(states), BATCH):
                await self._claim_batch(states[start : start + BATCH], report)
            await self._settle(report)
            return report

    def _here(self) -> list[ChannelState]:
        return [state for state in self._book.channels.values() if state.domain == self._chain.domain]

    async def _claim_batch(self, states: Sequence[ChannelState], report: ClaimReport) -> None:
        entries = [ClaimEntry(s.config, s.claimed + s.claimable, s.cumulative, s.voucher_signature) for s in states]
        result = await self._chain.claim(entries)
        report.transactions.append(result)
        if not result.ok:
            raise ChainError(f"the contract refused the claim: {result.error}")
        for state in states:
            after = await self._look(state.channel_id)
            moved = after.claimed - state.claimed
            if moved:
                report.claimed[state.channel_id] = moved
                self._since.pop(state.channel_id, None)
            else:
                log.error("the contract skipped the claim of channel %s", state.channel_id)

    async def _look(self, channel_id: ChannelId) -> ChannelState:
        """The channel as the contract has it now; one whose sight breaks a rule stays as it was, and holds up nobody."""
        await self._follow(channel_id)
        return self._book.channels[channel_id]

    async def _settle(self, report: ClaimReport) -> None:
        """Move what is owed to us in the contract to our payout's vault balance, once per token."""
        for token in {state.config.token for state in self._here()}:
            if await self._chain.owed(self._receiver, token):
                result = await self._chain.settle(self._receiver, token)
                report.transactions.append(result)
                if not result.ok:
                    raise ChainError(f"the contract refused to settle: {result.error}")

    def _note_ages(self) -> None:
        now = self._now_s()
        for state in self._here():
            if state.claimable and not state.closed:
                self._since.setdefault(state.channel_id, now)
