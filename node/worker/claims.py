"""Turning vouchers into money: the claim itself. When to claim is `protocol.claiming`.

A claim asks for what the receipts add up to, never for what the client paid ahead. A bad entry is skipped by the contract and
does not hold up the others. A claimer is of one chain: a batch is one transaction, and trouble on one chain keeps no other from
claiming.

Each round first brings to its end what was sent before (`Chain.catch_up`), then looks at the channels, then decides: a claim that
a reorganisation threw out is on its way again by itself, and is not made a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from node.errors import ChainError, ChainMoved
from node.ports import Chain, ClaimEntry, TxResult
from node.store.channels import ChannelBook
from protocol.channel import ChannelState, ClaimNow
from protocol.claiming import ClaimTerms, due, look_within, worth_settling
from protocol.ids import Address, ChannelId
from protocol.offers import Asset
from protocol.typed_data import Domain

log = logging.getLogger(__name__)
LOOKS_AGAIN = 3
"""How often a round starts anew when the chain moved under it."""


@dataclass(frozen=True, slots=True)
class ClaimPolicy:
    """What the operator decides."""

    terms: ClaimTerms = field(default_factory=ClaimTerms)
    """Of assets without terms of their own."""
    own: Mapping[Asset, ClaimTerms] = field(default_factory=dict)
    every_s: float = 300
    """How often channels are looked at, at least."""
    retry_s: float = 10
    """How soon again after the chain failed us: a leaving payer does not wait."""
    least_delay: int = 900
    """The shortest withdraw delay of a channel that we take, seconds."""

    def of(self, domain: Domain | None, token: Address) -> ClaimTerms:
        return self.terms if domain is None else self.own.get(Asset.of(domain, token), self.terms)


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
        # What there was before we began has waited for nobody knows how long: it counts as old.
        self._since = {state.channel_id: float("-inf") for state in self._here() if state.claimable}
        self._urgent = trio.Event()
        self._lock = trio.Lock()

    def hurry(self, effect: ClaimNow) -> None:
        """A payer is leaving: look now, not at the next round."""
        log.warning("the payer of channel %s is leaving; claiming %d now", effect.channel_id, effect.amount)
        self._urgent.set()

    async def run(self) -> None:
        """Look at the channels every `every_s` or more often, and at once when told to hurry. Survives chain trouble."""
        failed = False
        while True:
            pause = look_within(self._here(), self._policy.every_s, self._policy.least_delay)
            with trio.move_on_after(min(pause, self._policy.retry_s) if failed else pause):
                await self._urgent.wait()
            self._urgent = trio.Event()
            failed = False
            try:
                await self.claim()
            except ChainError as error:
                log.warning("claiming failed, will try again: %s", error)
                failed = True

    async def claim(self, *, everything: bool = False) -> ClaimReport:
        """One round. Raises `ChainError`."""
        report = ClaimReport()
        async with self._lock:
            for again in range(LOOKS_AGAIN, -1, -1):
                try:
                    await self._round(report, everything)
                    break
                except ChainMoved as moved:
                    if not again:
                        raise
                    log.info("%s", moved)
        return report

    async def _round(self, report: ClaimReport, everything: bool) -> None:
        await self._chain.catch_up()
        seen, unseen = await self._look_at_all()
        self._note_ages()
        fee = await self._chain.fee()
        for batch in due(seen, self._terms, self._since, self._now_s(), fee, everything=everything):
            await self._claim_batch(batch, report)
        await self._settle(report, fee, everything)
        if unseen is not None:
            raise unseen

    async def _look_at_all(self) -> tuple[list[ChannelState], ChainError | None]:
        """The channels with something to claim as they are now, and why others could not be seen: those wait.

        Who has begun to leave without our hearing of it is found here and claimed first.
        """
        seen, failed = [], None
        for state in [s for s in self._here() if s.claimable and not s.closed]:
            try:
                seen.append(await self._look(state.channel_id))
            except ChainError as error:
                failed = error
        return seen, failed

    def _terms(self, state: ChannelState) -> ClaimTerms:
        return self._policy.of(state.domain, state.config.token)

    def _here(self) -> list[ChannelState]:
        return [state for state in self._book.channels.values() if state.domain == self._chain.domain]

    async def _claim_batch(self, states: Sequence[ChannelState], report: ClaimReport) -> None:
        entries = [ClaimEntry(s.config, s.claimed + s.claimable, s.cumulative, s.voucher_signature) for s in states]
        result = await self._chain.claim(entries)
        report.transactions.append(result)
        result.sound()
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

    async def _settle(self, report: ClaimReport, fee: int, everything: bool) -> None:
        """Move what is owed to us in the contract to our payout's vault balance, once per token."""
        for token in {state.config.token for state in self._here()}:
            owed = await self._chain.owed(self._receiver, token)
            terms = self._policy.of(self._chain.domain, token)
            if worth_settling(owed, terms, fee, everything=everything):
                result = await self._chain.settle(self._receiver, token)
                report.transactions.append(result)
                result.sound()

    def _note_ages(self) -> None:
        now = self._now_s()
        for state in self._here():
            if state.claimable and not state.closed:
                self._since.setdefault(state.channel_id, now)
