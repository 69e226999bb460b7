"""The channel book: every channel's money, journaled before anyone hears of it.

`change` applies in memory and queues the record in one synchronous step, so the journal's order is the order of
application; it returns when the record is durable, and only then may the caller speak. It cannot be cancelled in between.
At start the book is the fold of the journal (L1); a snapshot of it (`node.store.snapshot`) saves a start the folding, never
the verifying, of what came before.

`refresh` is the one way in for what the contract says. A sight holds absolute values, so an answer that was slow on its way
must never be applied after a newer one: per channel, asking and applying are one step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import msgspec
import trio

import protocol.channel
import protocol.records
from node.chains import Chains
from node.store import snapshot
from node.store.errors import LedgerError
from node.store.fold import replay
from node.store.ledger import ADOPTED, Entry, Ledger, Pending, Record
from node.store.writer import Work
from protocol.channel import (
    ChainSeen,
    Change,
    ChannelOpened,
    ChannelState,
    Effect,
    JobEnded,
    JobOpened,
    Role,
    apply,
    opened,
)
from protocol.errors import LocalProtocolError, ProtocolError
from protocol.ids import ChannelId, JobId
from protocol.payment import recovered_costs, unsecured
from protocol.records import KINDS, decode_body, decode_state, fold, kind_of, to_body
from protocol.typed_data import Domain

log = logging.getLogger(__name__)
SNAPSHOT_EVERY = 20_000
"""Records; so many are folded in a fraction of a second."""
_FOLDING = (protocol.channel, protocol.records, sys.modules[__name__])


class _Fold(msgspec.Struct, array_like=True):
    """A snapshot's payload."""

    states: list[bytes]
    cut_off: list[tuple[bytes, bytes, int]]
    receipted: list[tuple[bytes, int]]
    adopted: bool
    frozen: list[bytes]


class ChannelBook:
    """All channels of one role in one journal, on however many chains."""

    def __init__(self, ledger: Ledger, role: Role, domains: Sequence[Domain] = ()) -> None:
        self.ledger = ledger
        self.role = role
        self._domains = tuple(domains)
        self._states: dict[ChannelId, ChannelState] = {}
        self._at_risk: set[ChannelId] = set()
        self._sights: dict[ChannelId, trio.Lock] = {}
        self.seen_at: dict[ChannelId, float] = {}
        """When the contract was last asked for each channel and answered; trio's time."""
        self.quarantined: dict[ChannelId, str] = {}
        """Channels whose last sight of the contract breaks a rule, and why: no new work, until a sight that can be taken."""
        self.cut_off: set[tuple[ChannelId, JobId, int]] = set()
        """Parts that ended without a receipt: a worker may not serve them again, because they have been charged for."""
        self.receipted: dict[ChannelId, int] = {}
        """Highest number of a receipt in the journal, for a worker; numbers that were given and never signed are not here."""
        self.adopted = False
        """This journal went on although a later one had been lost: there may be channels that it does not know."""
        self._since = 0
        """Records folded or applied since the last snapshot."""
        self._code = snapshot.code_of(_FOLDING, *(domain.separator for domain in self._domains))
        self.frozen: set[ChannelId] = set()
        """Channels from before that: what the lost journal signed on them would be signed again, so no job is opened."""

    @classmethod
    def restore(cls, ledger: Ledger, role: Role, domains: Sequence[Domain] = ()) -> ChannelBook:
        """Fold the journal. Raises `LocalProtocolError` when it breaks a rule: then nothing is signed.

        `domains`: the chains that we know. A channel from before journals named its chain is on the one that its id fits.
        """
        book = cls(ledger, role, domains)
        replay(ledger, book._fold, None, after=book._resume())
        for state in book._states.values():
            book._weigh(state)
        book._keep()
        return book

    def _resume(self) -> int:
        """Begin with the snapshot, if there is one that can be used: up to which record it goes."""
        kept = snapshot.load(self.ledger, self.role.value, self._code)
        if kept is None:
            return 0
        seq, payload = kept
        fold = msgspec.msgpack.decode(payload, type=_Fold)
        self._states = {state.channel_id: state for state in map(decode_state, fold.states)}
        self.cut_off = {(ChannelId(channel), JobId(job), part) for channel, job, part in fold.cut_off}
        self.receipted = {ChannelId(channel): number for channel, number in fold.receipted}
        self.adopted, self.frozen = fold.adopted, set(map(ChannelId, fold.frozen))
        return seq

    def _keep(self) -> None:
        """Take a snapshot when so much has been folded or applied since the last one that a start would notice.

        What is applied in memory and what is queued for the journal are the same here, in one synchronous step.
        """
        if self._since < SNAPSHOT_EVERY or not self.ledger.writable:
            return
        self._since = 0
        fold = _Fold(
            [msgspec.msgpack.encode(to_body(state)) for state in self._states.values()],
            [(bytes(channel), bytes(job), part) for channel, job, part in self.cut_off],
            [(bytes(channel), number) for channel, number in self.receipted.items()],
            self.adopted,
            [bytes(channel) for channel in self.frozen],
        )
        with suppress(LedgerError):  # a failed journal is told by the appends
            self.ledger.post(snapshot.keeping(self.role.value, self._code, msgspec.msgpack.encode(fold)))

    def _fold(self, _: None, record: Record) -> None:
        self._since += 1
        if record.kind in KINDS:
            change = decode_body(record.kind, record.body)
            fold(self.role, self._states, change, self._domains)
            self._note_end(change)
        elif record.kind == ADOPTED:
            self.adopted = True
            self.frozen = set(self._states)

    async def close_open_jobs(self, tick: Callable[[ChannelState], int]) -> int:
        """After a crash: end the parts that were under way, by the rule of `recovered_costs`. Returns how many.

        `tick`: what the client pays ahead on a channel, in its smallest unit.
        """
        changes: list[Change] = [
            JobEnded(state.channel_id, job_id, part, cost, 0, b"")
            for state in self._states.values()
            for (job_id, part), cost in recovered_costs(state, tick(state)).items()
        ]
        if changes:
            await self.change(changes)
        return len(changes)

    @property
    def channels(self) -> Mapping[ChannelId, ChannelState]:
        return self._states

    def get(self, channel_id: ChannelId) -> ChannelState | None:
        return self._states.get(channel_id)

    @property
    def at_risk(self) -> list[ChannelState]:
        """Channels on which something is, or may come to be, delivered without cover."""
        return [self._states[channel_id] for channel_id in self._at_risk]

    def _weigh(self, state: ChannelState) -> None:
        if not state.closed and unsecured(state, state.reserved):
            self._at_risk.add(state.channel_id)
        else:
            self._at_risk.discard(state.channel_id)

    def _note_end(self, change: Change) -> None:
        if not isinstance(change, JobEnded):
            return
        if not change.receipt:
            self.cut_off.add((change.channel_id, change.job_id, change.part))
        elif change.sequence > self.receipted.get(change.channel_id, 0):
            self.receipted[change.channel_id] = change.sequence

    async def change(self, changes: Sequence[Change], *, also: Work[object] | None = None) -> list[Effect]:
        """Apply and journal, all or none. Raises `ProtocolError` (nothing changed) or `LedgerError` (nothing is to be said).

        `also` may not refuse: what is applied here cannot be taken back, so it has to reach the journal.
        """
        posted = self.begin(changes, also=also)
        await posted.durable()
        return posted.effects

    def begin(self, changes: Sequence[Change], *, also: Work[object] | None = None) -> Posted:
        """The first half of `change`: applied and on its way to the disk when this returns. Whoever begins must await `durable`
        of this or of a later one before speaking; records become durable in the order in which they were begun."""
        staged: dict[ChannelId, ChannelState] = {}
        effects: list[Effect] = []
        for change in changes:
            held = staged.get(change.channel_id) or self._states.get(change.channel_id)
            if isinstance(change, ChannelOpened):
                if held is not None:
                    raise LocalProtocolError(f"channel {change.channel_id} is already open")
                staged[change.channel_id] = opened(self.role, change)
                continue
            if held is None:
                raise LocalProtocolError(f"channel {change.channel_id} is not in this journal")
            if isinstance(change, JobOpened) and self.role is Role.WORKER and change.channel_id in self.frozen:
                raise LocalProtocolError(f"channel {change.channel_id} is frozen: a lost journal has signed on it")
            staged[change.channel_id], more = apply(held, change)
            effects.extend(more)
        entries = [Entry(kind_of(c), bytes(c.channel_id), to_body(c)) for c in changes]
        written = self.ledger.begin(entries, also=also)
        self._states.update(staged)
        for state in staged.values():
            self._weigh(state)
        for change in changes:
            self._note_end(change)
        self._since += len(entries)
        self._keep()
        return Posted(effects, written)


class Posted:
    """Changes that are applied, and on their way to the disk."""

    def __init__(self, effects: list[Effect], written: Pending[object]) -> None:
        self.effects = effects
        self._written = written

    async def durable(self) -> None:
        """Raises `LedgerError`: then nothing is to be said. Cannot be cancelled."""
        await self._written.wait()


async def refresh(book: ChannelBook, chains: Chains, channel_id: ChannelId) -> tuple[ChannelState, list[Effect]]:
    """Bring one channel up to what the contract on its chain says now.

    Raises `ChainError`, `ConfigError` when its chain is none of ours, or `ProtocolError` when the sight breaks a rule; then the
    channel is quarantined.
    """
    held = book.get(channel_id)
    if held is None:
        raise LocalProtocolError(f"channel {channel_id} is not in this journal")
    chain = chains.of(held.domain)
    async with book._sights.setdefault(channel_id, trio.Lock()):
        asked = trio.current_time()
        seen = await chain.channel(channel_id)
        book.seen_at[channel_id] = asked
        state = book.channels[channel_id]
        sight = ChainSeen(channel_id, seen.allocated, seen.claimed, seen.withdraw_at, seen.closed)
        effects: list[Effect] = []
        if sight != ChainSeen(channel_id, state.allocated, state.claimed, state.withdraw_at, state.closed):
            try:
                effects = await book.change([sight])
            except ProtocolError as error:
                book.quarantined[channel_id] = str(error)
                raise
        book.quarantined.pop(channel_id, None)
        return book.channels[channel_id], effects


async def follow(book: ChannelBook, chains: Chains, channel_id: ChannelId) -> list[Effect]:
    """Refresh one channel of many: what is wrong with it is logged and stays its own. Raises `ChainError`."""
    try:
        _, effects = await refresh(book, chains, channel_id)
    except ProtocolError as error:
        log.error("channel %s is quarantined, no new work on it: %s", channel_id, error)
        return []
    return effects


def fold_record(
    role: Role, states: dict[ChannelId, ChannelState], record: Record, domains: Sequence[Domain] = ()
) -> dict[ChannelId, ChannelState]:
    """Reducer for `replay`; records of other kinds (transactions, say) are not about channels."""
    if record.kind in KINDS:
        fold(role, states, decode_body(record.kind, record.body), domains)
    return states
